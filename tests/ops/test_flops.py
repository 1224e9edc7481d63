"""What counters of multiply-adds see of the operators, in the backward pass, too."""

import math

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from helpers import TINY, image, randomised, relative_error
from mmengine.analysis import get_model_complexity_info
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from overlock_mm import ContMix, OverLoCK, fold
from overlock_mm.ops import contmix, contmix_reference, flops
from overlock_mm.ops.depthwise import depthwise_conv2d

# Two images of 9 x 8 positions, 3 heads with queries of 4 channels, 49 regions, 12 channels
# of values, kernels of 3 x 3 and 5 x 5: 34 taps.
AFFINITY = 2 * 3 * 72 * 4 * 49
PROJECTION = 2 * 3 * 72 * 49 * 34
MIXING = 2 * 72 * (6 * 9 + 6 * 25)  # each kernel has half of the channels
NAMES = ('query', 'key', 'value', 'proj_weight', 'proj_bias', 'rpbs')


def arguments():
    shapes = (2, 3, 4, 9, 8), (2, 3, 4, 49), (2, 12, 9, 8), (34, 49), (34,)
    rpbs = image(3, 5, 5), image(3, 9, 9)
    return [*(image(*shape) for shape in shapes), rpbs, (3, 5)]


def small(**kwargs):
    torch.manual_seed(0)
    return randomised(OverLoCK(dict(TINY, focus_depths=(1, 1)), **kwargs))


def counted(function, counter=FlopCounterMode):
    """Multiply-adds, and what the function returns."""
    with counter(display=False) as count:
        out = function()
    return count.get_total_flops() / 2, out


@pytest.mark.parametrize(
    'backend',
    ['torch', 'reference', pytest.param('triton', marks=pytest.mark.dev_stack), 'auto'],
)
def test_contmix_counts_as_it_is_defined(backend):
    args = arguments()
    total, out = counted(lambda: contmix(*args, backend=backend))
    assert total == AFFINITY + PROJECTION + MIXING == 833760
    assert relative_error(out, contmix_reference.contmix(*args)) < 1e-5


@pytest.mark.parametrize(
    'needed, expected',
    [
        ('', 0),
        ('value', MIXING),
        ('proj_bias', MIXING),
        ('rpbs', MIXING),
        ('proj_weight', PROJECTION + MIXING),
        ('key', AFFINITY + PROJECTION + MIXING),
        ('query value', AFFINITY + PROJECTION + 2 * MIXING),
        (' '.join(NAMES), 2 * (AFFINITY + PROJECTION + MIXING)),
    ],
)
def test_the_gradient_of_contmix_counts_what_is_needed(needed, expected):
    """And no more than torch counts for the definition; the gradients are its own."""
    results = []
    for function in (contmix, contmix_reference.contmix):
        args = arguments()
        tensors = [
            tensor
            for name, arg in zip(NAMES, args, strict=False)
            for tensor in (arg if name == 'rpbs' else [arg])
            if name in needed.split()
        ]
        for tensor in tensors:
            tensor.requires_grad_()
        out = function(*args)
        if not tensors:
            total, _ = counted(lambda out=out: out.square().sum())
            results.append((total, ()))
            continue
        with FlopCounterMode(display=False) as counter:
            out = function(*args)
            forward = counter.get_total_flops()
            grads = torch.autograd.grad(out.square().sum(), tensors)
        results.append(((counter.get_total_flops() - forward) / 2, grads))
    (total, grads), (defined, exact) = results
    assert total == expected == defined
    for grad, other in zip(grads, exact, strict=True):
        assert relative_error(grad, other) < 1e-4


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('kernel, dilation', [(3, 1), (7, 1), (5, 4)])
def test_depthwise_convolutions(bias, kernel, dilation):
    """(5, 4) is computed with a dense kernel of 17 x 17 on the CPU."""
    products = 2 * 6 * 80 * kernel**2
    x, weight = image(2, 6, 8, 10), image(6, 1, kernel, kernel).requires_grad_()
    args = x, weight, image(6) if bias else None, dilation
    total, out = counted(lambda: depthwise_conv2d(*args))
    assert total == products
    backward, _ = counted(lambda: out.sum().backward(retain_graph=True))
    assert backward == products
    x.requires_grad_()
    total, _ = counted(lambda: depthwise_conv2d(*args).sum().backward())
    assert total == 3 * products


@pytest.fixture(scope='module')
def step():
    """A training step: the model, multiply-adds of its forward pass and of all."""
    model, x = small().train(), image(2, 3, 64, 96)
    with FlopCounterMode(display=False) as counter:
        loss = sum(m.square().sum() for m in model(x))
        forward = counter.get_total_flops() / 2
        loss.backward()
    return model, forward, counter.get_total_flops() / 2


def test_a_training_step(step):
    """Three times the forward pass, but for the gradient of the images."""
    model, forward, total = step
    first = model.patch_embed1[0]
    images = 2 * 32 * 48 * first.weight.numel()
    assert total == 3 * forward - images


def test_gradients_are_the_same(step):
    model = small().train()
    sum(m.square().sum() for m in model(image(2, 3, 64, 96))).backward()
    largest = max(p.grad.norm() for p in model.parameters())
    for p, q in zip(model.parameters(), step[0].parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 1e-3 * p.grad.norm() + 1e-5 * largest


@pytest.mark.parametrize('form', [lambda model: model, fold], ids=['unfolded', 'folded'])
def test_fvcore_and_mmengine_count_the_same(form):
    """Without their estimates for norms, pooling and resizing, which they add."""
    model, x = form(small().eval()), image(1, 3, 64, 64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    counts = counter.get_flop_counts()['Global']
    analysis = FlopCountAnalysis(model, (x,)).unsupported_ops_warnings(False)
    found = analysis.uncalled_modules_warnings(False).by_operator()
    assert found['conv'] + found['matmul'] + found['linear'] == sum(counts.values()) / 2
    assert found['matmul'] == counts[torch.ops.overlock_mm.contmix] / 2
    info = get_model_complexity_info(model, (3, 64, 64), show_table=False, show_arch=False)
    assert info['flops'] == analysis.total()


def test_the_layers_add_up():
    """Nothing but ContMix is counted by a formula of this package."""
    model, layers = small().eval(), []

    def add(module, args, out):
        layers.append(out.numel() * module.weight[0].numel())

    for name, module in model.named_modules():
        # a hook on the projection would make ContMix call it
        if isinstance(module, nn.Conv2d) and not name.endswith('weight_proj'):
            module.register_forward_hook(add)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image(1, 3, 64, 64))
    counts = counter.get_flop_counts()['Global']
    convolutions = sum(counts.values()) - counts[torch.ops.overlock_mm.contmix]
    assert convolutions / 2 == sum(layers)


def test_a_projection_of_ones_own_is_not_counted_twice():
    """ContMix calls it on unit vectors."""
    model, x = small().eval(), image(1, 3, 64, 64)
    with torch.no_grad():
        expected, _ = counted(lambda: model(x))
        for block in (*model.sub_blocks3, *model.sub_blocks4):
            block.weight_proj = nn.Sequential(block.weight_proj)
        total, _ = counted(lambda: model(x))
    assert total == expected


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
def test_other_traces_stay_as_they_are(monkeypatch):
    """They have the fast path, even where fvcore is imported."""
    monkeypatch.setattr(contmix_reference, 'contmix', None)
    model = ContMix(dim=16, context_dim=8, kernel_size=7, num_heads=4).eval()
    inputs = image(1, 16, 9, 12), image(1, 8, 9, 12), image(1, 16, 9, 12)
    traced = torch.jit.trace(model, inputs)
    assert relative_error(traced(*inputs), model(*inputs)) < 1e-5


def test_transforms_of_functions_count_the_definition():
    *args, rpbs, kernels = arguments()
    total, _ = counted(
        lambda: torch.func.vmap(
            lambda value: contmix(args[0], args[1], value, *args[3:], rpbs, kernels)
        )(args[2].expand(2, *args[2].shape))
    )
    assert total == AFFINITY + PROJECTION + 2 * MIXING


def test_autocast_and_fake_tensors():
    model, x = small().eval(), image(1, 3, 64, 64)
    with torch.no_grad():
        expected, _ = counted(lambda: model(x))
        with torch.autocast('cpu', torch.bfloat16):
            assert counted(lambda: model(x))[0] == expected
        meta = small().eval().to('meta')
        assert counted(lambda: meta(x.to('meta')))[0] == expected


class OldCounter(TorchDispatchMode):
    """Counts as torch 2.1 does: the mode has the formulas, under another name."""

    def __init__(self, display):
        super().__init__()
        self.flop_mapping = {torch.ops.aten.relu: lambda x, out_shape: math.prod(out_shape)}
        self.total = 0

    def get_total_flops(self):
        return self.total

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        formula = self.flop_mapping.get(func._overloadpacket)
        if formula:
            self.total += formula(*args, out_shape=getattr(out, 'shape', None))
        return out


def test_counters_of_other_versions_and_two_at_once():
    args = arguments()
    with FlopCounterMode(display=False) as outer:
        total, _ = counted(lambda: contmix(*args).relu(), OldCounter)
    assert outer.get_total_flops() / 2 == 833760
    assert total == 833760 + 2 * 12 * 72 / 2


def test_an_error_inside_leaves_the_counter_as_it_was():
    with FlopCounterMode(display=False) as counter:
        with pytest.raises(KeyError), flops.uncounted():
            torch.ones(2, 3) @ torch.ones(3, 4)
            raise KeyError
        torch.ones(2, 3) @ torch.ones(3, 5)
    assert counter.get_total_flops() == 2 * 2 * 3 * 5
