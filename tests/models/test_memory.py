"""What a training step keeps, and that keeping less changes no gradient."""

import copy

import pytest
import torch
from helpers import image, randomised, tiny
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from overlock_mm.models import layers
from overlock_mm.models.layers import ConvMlp, DilatedReparamBlock, LayerScale
from overlock_mm.models.recompute import without_input
from overlock_mm.ops.depthwise import DepthwiseConv2d


def gradients(module, x, forward=None):
    """Output, and gradients of the input and of all parameters that need one."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = (forward or module)(x)
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [out, *torch.autograd.grad(out, [x, *parameters], image(*out.shape).to(out))]


def kept(run):
    """Bytes that the graph of ``run()`` keeps."""
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    return out, sum(sizes.values())


def one_by_one(module):
    """The layers of an MLP, each with its own part of the graph."""
    return lambda x: nn.Sequential.forward(module, x)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype, close', [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize('shape', [(1, 6, 7, 9), (3, 6, 7, 9), (2, 6, 1, 1)], ids=str)
def test_the_mlp_has_the_gradients_of_its_layers(shape, dtype, close, memory_format):
    module = randomised(ConvMlp(6, 20, [LayerScale(6)], [nn.Dropout(0)])).to(dtype)
    module = module.to(memory_format=memory_format).train()
    x = image(*shape).to(dtype).contiguous(memory_format=memory_format)
    other = copy.deepcopy(module)
    found = gradients(module, x)
    expected = gradients(other, x, one_by_one(other))
    assert found[0].stride() == expected[0].stride()
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype and (a - b).norm() <= close * (b.norm() + 1e-3)


def test_the_mlp_keeps_one_of_its_hidden_maps():
    module, x = ConvMlp(8, 64).train(), image(2, 8, 16, 16).requires_grad_()
    weights = sum(p.nbytes for p in module.parameters())
    _, all_of_them = kept(lambda: one_by_one(module)(x))
    _, few = kept(lambda: module(x))
    hidden = 2 * 64 * 16 * 16 * 4
    assert few < x.nbytes + weights + 1.1 * hidden < 4 * hidden < all_of_them


def test_first_and_second_derivatives_of_the_mlp():
    module = randomised(ConvMlp(2, 3)).double()
    names, values = zip(*module.named_parameters(), strict=True)

    def run(x, *values):
        parameters = dict(zip(names, values, strict=True))
        return torch.func.functional_call(module, parameters, (x,))

    for images in (1, 2):
        inputs = image(images, 2, 3, 3).double().requires_grad_(), *values
        assert gradcheck(run, inputs, fast_mode=True)
        assert gradgradcheck(run, inputs, fast_mode=True)


def test_an_mlp_with_frozen_parts():
    module, x = randomised(ConvMlp(4, 8)).double(), image(2, 4, 5, 5).double()
    for name in ('1', '2'):
        getattr(module, name).requires_grad_(False)
    module[0].weight.requires_grad_(False)
    for a, b in zip(
        gradients(module, x), gradients(module, x, one_by_one(module)), strict=True
    ):
        torch.testing.assert_close(a, b)
    module(x).sum().backward()  # and the input needs no gradient
    assert module[0].weight.grad is None and module[2].bias.grad is None
    assert module[4].weight.grad is not None


def test_layers_with_hooks_or_of_another_type_are_called():
    x, seen = image(1, 4, 5, 5), []
    for i in range(5):
        module = ConvMlp(4, 8)
        module[i].register_forward_hook(lambda *_, i=i: seen.append(i))
        module(x)
    assert seen == [0, 1, 2, 3, 4]
    module = ConvMlp(4, 8)
    module[1] = nn.ReLU()
    torch.testing.assert_close(module(x), one_by_one(module)(x))
    module[4] = nn.Conv2d(8, 4, 3)
    assert module(x).shape == (1, 4, 3, 3)
    del module[3]
    assert module(x).shape == (1, 4, 3, 3)


class OwnNorm(torch.autograd.Function):
    """A norm that keeps its input, as torch's SyncBatchNorm does."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class OwnNormLayer(nn.Module):
    forward = staticmethod(OwnNorm.apply)


@pytest.mark.parametrize(
    'norm', [lambda: nn.BatchNorm2d(4), lambda: nn.BatchNorm2d(4).eval(), OwnNormLayer]
)
@pytest.mark.parametrize('images', [1, 2])
def test_an_input_that_is_made_again(norm, images):
    x = image(images, 4, 9, 9).contiguous(memory_format=torch.channels_last)
    conv, norm = randomised(DepthwiseConv2d(4, 5)), randomised(norm())
    module = nn.Sequential(conv, norm)
    before = copy.deepcopy(module)
    expected = gradients(before, x)
    calls = []
    conv.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    found = gradients(module, x, lambda x: without_input(conv, norm, x))
    assert calls == [True, False]  # once more in the backward pass
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()
    for a, b in zip(module.buffers(), before.buffers(), strict=True):
        assert torch.equal(a, b)  # statistics of one pass


def test_branches_keep_their_input_alone():
    block = randomised(DilatedReparamBlock(8, 17)).train()
    x = image(2, 8, 24, 24).requires_grad_()
    weights = sum(p.nbytes for p in block.parameters())
    out, few = kept(lambda: block(x))
    assert few < 1.5 * x.nbytes + weights
    out.sum().backward(retain_graph=True)
    once = x.grad.clone()
    out.sum().backward()
    torch.testing.assert_close(x.grad, 2 * once)


@pytest.fixture
def plain_layers(monkeypatch):
    """A function that turns off what saves memory."""

    def switch():
        for name in ('_is_plain_mlp', '_can_make_again'):
            monkeypatch.setattr(layers, name, lambda *_: False)

    return switch


@pytest.mark.parametrize('autocast', [False, True])
def test_a_training_step(autocast, plain_layers):
    """Outputs, gradients and statistics stay the same, with stochastic depth."""
    results = []
    for plain in (False, True):
        if plain:
            plain_layers()
        model, x = tiny(drop_path_rate=0.3, norm_eval=autocast).train(), image(2, 3, 64, 64)
        if not autocast:
            model, x = model.double(), x.double()
        torch.manual_seed(3)
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            maps = model(x)
        sum(m.float().square().mean() for m in maps).backward()
        found = [*maps, *(p.grad for p in model.parameters()), *model.buffers()]
        results.append([t for t in found if t is not None and t.is_floating_point()])
    largest = max(t.norm() for t in results[1])
    for a, b in zip(*results, strict=True):
        error = (a - b).norm() / (b.norm() + 1e-3 * largest)
        assert error < (0.1 if autocast else 1e-9)


def test_a_training_step_keeps_less(plain_layers):
    model, x = tiny().train(), image(1, 3, 128, 128)
    _, few = kept(lambda: model(x))
    plain_layers()
    _, all_of_them = kept(lambda: model(x))
    assert few < 0.75 * all_of_them
