"""ContMixBlock, the block for any network, and ContMix as a layer of its own."""

import ast
import copy

import numpy as np
import pytest
import torch
from helpers import (
    CASES,
    check_outputs,
    check_training_step,
    filled,
    image,
    probed,
    randomised,
    relative_error,
)
from mmengine.registry import MODELS
from torch import nn

from overlock_mm import ContMix, ContMixBlock, OverLoCK, fold, switch_to_deploy

PATHS = sorted(CASES.glob('block_*.npz'))
# every place where layer scales may be, and maps larger and smaller than the kernel
FORMS = dict(
    plain={},
    branches=dict(layer_scale_init=0.1),
    shortcuts=dict(layer_scale_init=1.0, res_scale=True),
)
each_form = pytest.mark.parametrize('options', FORMS.values(), ids=FORMS)
each_size = pytest.mark.parametrize('size', [(12, 15), (5, 9)], ids=['large', 'small'])


def block(dim=16, **options):
    torch.manual_seed(0)
    return randomised(ContMixBlock(dim, **options))


class Unet(nn.Module):
    """Somebody's network, with a block between plain layers."""

    def __init__(self, **options):
        super().__init__()
        self.down = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.middle = nn.Sequential(block(**options), nn.BatchNorm2d(16), nn.ReLU())
        self.up = nn.ConvTranspose2d(16, 2, 2, stride=2)

    def forward(self, x):
        return self.up(self.middle(self.down(x)))


def case_of(path, dtype):
    case = np.load(path)
    mode = path.stem.split('_')[-1]
    args = ast.literal_eval(str(case['args']))
    module = filled(ContMixBlock(**args, deploy=mode == 'deploy'), dtype)
    listed = sorted(f'{k} {tuple(v.shape)}' for k, v in module.state_dict().items())
    assert listed == sorted(case['names'])
    shape = [int(n) for n in path.stem.split('_')[-2].split('x')]
    shape.insert(1, args['dim'])
    x = torch.from_numpy(np.random.RandomState(2025).standard_normal(shape)).to(dtype)
    return module.train(mode == 'train'), x, case


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-5), (torch.float32, 1e-3)])
@pytest.mark.parametrize('path', PATHS, ids=[p.stem for p in PATHS])
def test_it_computes_what_the_released_block_does(path, dtype, tolerance):
    module, x, case = case_of(path, dtype)
    x.requires_grad_('loss' in case)
    if 'loss' in case:
        check_training_step(module, module(x), case, tolerance)
        expected = torch.from_numpy(case['grad_input.values'])
        assert relative_error(torch.from_numpy(probed(x.grad)), expected) < tolerance
        return
    check_outputs(module(x), case, tolerance)
    if 'reparam0.shape' in case:
        module.switch_to_deploy()
        check_outputs(module(x), case, tolerance, name='reparam')


def test_there_are_cases_of_every_kind():
    kinds = {path.stem.split('_')[-1] for path in PATHS}
    assert len(PATHS) == 5 and kinds == {'eval', 'train', 'deploy', 'reparam'}


@each_form
@each_size
@pytest.mark.parametrize('batch', [1, 2])
def test_folding_changes_nothing(options, size, batch):
    module, x = block(**options).double().eval(), image(batch, 16, *size).double()
    expected = module(x)
    assert fold(module) is module and relative_error(module(x), expected) < 1e-12
    assert not any(isinstance(m, nn.BatchNorm2d) for m in module.modules())
    assert fold(module) is module  # again
    with pytest.raises(RuntimeError, match=r'folded ContMixBlock.*build the model again'):
        module.train()
    with pytest.raises(ValueError, match=r'no OverLoCK or ContMixBlock.*not folded'):
        switch_to_deploy(module)


@each_form
def test_inside_of_other_networks(options):
    model, x = Unet(**options).double().eval(), image(2, 3, 18, 22).double()
    expected = model(x)
    assert switch_to_deploy(model) is model
    assert relative_error(model(x), expected) < 1e-12
    built = Unet(**options, deploy=True).double().eval()
    built.load_state_dict(model.state_dict())
    assert torch.equal(built(x), model(x))
    switch_to_deploy(model)  # again
    fold(model)
    assert relative_error(model(x), expected) < 1e-12
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())  # theirs


def test_beside_a_backbone():
    tiny = dict(
        depths=(1, 1, 1, 1),
        focus_depths=(1, 1),
        embed_dims=(8, 16, 32, 32),
        kernel_sizes=(7, 7, 5, 5),
        focus_heads=(2, 2),
    )
    backbone = randomised(OverLoCK(tiny, out_indices=1))
    model = nn.Sequential(backbone, block()).eval()
    x = image(1, 3, 64, 96)
    expected = model[1](backbone(x)[0])
    switch_to_deploy(model)
    assert backbone.deploy and model[1].lepe[0].deploy
    assert relative_error(model[1](backbone(x)[0]), expected) < 1e-5
    fold(model)
    assert backbone.folded and relative_error(model[1](backbone(x)[0]), expected) < 1e-5


@each_size
def test_with_cp_changes_nothing_but_memory(size):
    results = []
    for with_cp in (False, True):
        module = block(with_cp=with_cp).double().train()
        x = image(2, 16, *size).double().requires_grad_()
        module(x).square().sum().backward()
        grads = [x.grad, *(p.grad for p in module.parameters())]
        results.append([*grads, *(b.double() for b in module.buffers())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-8)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(held.append, lambda t: t):
        module(x)
    assert len(held) < 5


def test_any_size_and_memory_format():
    module = block(kernel_size=13).eval()
    for size in ((1, 1), (3, 40), (14, 13)):
        x = image(1, 16, *size)
        assert module(x).shape == x.shape and module(x).is_contiguous()
        x = x.to(memory_format=torch.channels_last)
        assert module(x).is_contiguous(memory_format=torch.channels_last)


def test_it_is_registered():
    module = MODELS.build(dict(type='ContMixBlock', dim=16, drop_path=0.5))
    assert isinstance(module, ContMixBlock) and module.drop_path.drop_prob == 0.5
    assert not module.rpb1.any() and module.proj[1].weight.std() < 0.03


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(dim=18), 'dim=18 must be a multiple of 2 . 4 heads'),
        (dict(dim=16, num_heads=0), '0 heads'),
        (dict(dim=16, kernel_size=8), 'kernel sizes 5 and 8 must be odd'),
        (dict(dim=16, small_kernel_size=9), 'small_kernel_size=9 must be within 1..7'),
        (dict(dim=16, kernel_size=21), 'kernel_size=21 has no dilated branches; choose'),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ContMixBlock(**options)


def test_what_cannot_be_folded():
    module = nn.Sequential(block(), block()).eval()
    module[1].gate = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Sigmoid())
    module[1].fusion_proj[1] = nn.GroupNorm(2, 16)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(TypeError, match=r"cannot merge '1.fusion_proj.1', a GroupNorm"):
        fold(module)
    assert module.state_dict().keys() == before.keys()
    with pytest.raises(ValueError, match='no OverLoCK or ContMixBlock in this Conv2d'):
        fold(nn.Conv2d(3, 3, 1))


def test_contmix_alone():
    mix = randomised(ContMix(16, 8, kernel_size=7, num_heads=4, small_kernel_size=3)).eval()
    x, context = image(2, 16, 9, 12), image(2, 8, 9, 12)
    out = mix(x, context, value=x)
    assert out.shape == x.shape
    # the first half of the channels sees 3 x 3 positions, the second 7 x 7
    changed = x.clone()
    changed[:, :, 0, 6] += 1
    rows = (mix(x, context, value=changed) != out).any(dim=3).any(dim=0)
    reached = [int(half.any(dim=0).nonzero().max()) for half in rows.split(8)]
    assert reached == [1, 3]
