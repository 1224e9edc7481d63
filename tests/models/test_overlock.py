"""The backbone's options, forms and metadata."""

import copy
import subprocess
import sys
from functools import partial

import pytest
import torch
from helpers import TINY, filled, image, randomised, relative_error, tiny
from mmcv.ops import RoIAlign
from mmengine.registry import MODELS, Registry
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from overlock_mm import OverLoCK, fold
from overlock_mm.models.contmix import ContMix
from overlock_mm.models.layers import (
    DILATED_BRANCHES,
    DilatedReparamBlock,
    GlobalResponseNorm,
)


@pytest.mark.parametrize(
    'arch, long_name',
    [('xt', 'extreme-tiny'), ('t', 'tiny'), ('s', 'small'), ('b', 'base')],
)
def test_metadata_without_building(arch, long_name, monkeypatch):
    # ContMix keeps shapes, and its loops take most of the time on meta tensors
    monkeypatch.setattr(ContMix, 'forward', lambda self, x, context, value: value)
    with torch.device('meta'):
        model = OverLoCK(long_name).eval()
        maps = model(torch.empty(1, 3, 64, 96))
    assert tuple(m.shape[1] for m in maps) == OverLoCK.channels_of(arch)
    assert model.out_channels == OverLoCK.channels_of(long_name)
    assert model.out_strides == OverLoCK.strides == (4, 8, 16, 32)
    assert [m.shape[2:] for m in maps] == [(64 // s, 96 // s) for s in OverLoCK.strides]


@pytest.mark.parametrize(
    'size',
    [(32, 32), (33, 47), (47, 33), (64, 200), (201, 64), (72, 72), (255, 129)],
    ids=str,
)
def test_any_image_size(size):
    with torch.no_grad():
        maps = tiny().eval()(image(1, 3, *size))
    for out, channels, stride in zip(
        maps, OverLoCK.channels_of(TINY), (4, 8, 16, 32), strict=True
    ):
        assert out.shape == (1, channels, -(-size[0] // stride), -(-size[1] // stride))
        assert out.isfinite().all()


def test_smallest_image_on_the_real_kernels():
    with torch.no_grad():
        maps = OverLoCK('xt').eval()(image(1, 3, 32, 45))
    assert [tuple(m.shape[2:]) for m in maps] == [(8, 12), (4, 6), (2, 3), (1, 2)]


@pytest.mark.parametrize(
    'shape', [(1, 3, 31, 64), (1, 3, 64, 31), (1, 4, 64, 64), (3, 64, 64)]
)
def test_bad_image(shape):
    with pytest.raises(ValueError, match='at least 32'):
        tiny()(torch.zeros(shape))


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(arch='l'), "arch='l' is unknown"),
        (dict(arch=dict(depths=(1, 1, 1, 1))), 'exactly these fields'),
        (dict(arch=dict(TINY, depths=(1, 1))), 'exactly these fields'),
        (dict(arch=dict(TINY, focus_heads=(3, 2))), 'focus_heads'),
        (dict(arch=dict(TINY, kernel_sizes=(7, 7, 6, 5))), 'kernel_size=6'),
        (dict(out_indices=(0, 4)), 'out_indices'),
        (dict(out_indices=()), 'out_indices'),
        (dict(arch=dict(TINY, focus_depths=(2, 0))), 'at least 1'),
        (dict(arch=dict(TINY, depths=2)), 'exactly these fields'),
        (dict(out_indices=(2, 1)), 'out_indices'),
        (dict(frozen_stages=5), 'frozen_stages=5'),
        (dict(frozen_stages=-2), 'frozen_stages=-2'),
        (dict(with_cp=(5,)), 'with_cp'),
        (dict(drop_path_rate=1.0), 'drop_path_rate'),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        OverLoCK(**{'arch': TINY, **kwargs})


def test_named_archs():
    """Long names are in the public table too; a subclass may have a table of its own."""
    assert OverLoCK.arch_settings['tiny'] == OverLoCK.arch_settings['t']

    class Mine(OverLoCK):
        arch_settings = dict(mine=TINY)

    model = Mine('mine')
    assert model.out_channels == Mine.channels_of('mine') == OverLoCK.channels_of(TINY)
    with pytest.raises(ValueError, match=r"arch='t' is unknown; choose one of \['mine'\]"):
        Mine('t')
    with pytest.raises(ValueError, match="'small', 't', 'tiny', 'xt'"):
        OverLoCK.channels_of('huge')


def test_unknown_argument_is_not_swallowed():
    with pytest.raises(TypeError, match='drop_path'):
        OverLoCK(TINY, drop_path=0.1)


@pytest.mark.parametrize('context_skip', [False, True])
@pytest.mark.parametrize(
    'out_indices', [(0,), (1,), (2,), (3,), (0, 2), (1, 3), (0, 1, 2, 3)], ids=str
)
def test_out_indices(out_indices, context_skip):
    full = tiny(context_skip=context_skip)
    part = OverLoCK(TINY, out_indices=out_indices, context_skip=context_skip)
    state = full.state_dict()
    part.load_state_dict({k: state[k] for k in part.state_dict()})
    x = image(2, 3, 64, 64)
    expected = [full(x)[i] for i in out_indices]
    maps = part(x)
    for out, same in zip(maps, expected, strict=True):
        torch.testing.assert_close(out, same)
    # no parameter is without a gradient, so distributed training needs no search for them
    sum(m.sum() for m in maps).backward()
    assert [n for n, p in part.named_parameters() if p.grad is None] == []
    assert part.out_channels == tuple(full.out_channels[i] for i in out_indices)
    # and what the model lacks is what the full one has beside it
    lacking = [k for k in state if k not in part.state_dict()]
    assert all(k.startswith(part.absent_parts()) for k in lacking)
    assert not any(
        k.startswith(part.absent_parts()) for k in part.state_dict() if part.absent_parts()
    )


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('out_indices', [(1,), (1, 3)], ids=str)
def test_distributed_training(out_indices, with_cp):
    """DistributedDataParallel finds a gradient for every parameter, step after step."""
    torch.distributed.init_process_group(
        'gloo', store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        model = OverLoCK(TINY, out_indices=out_indices, with_cp=with_cp).train()
        parallel = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # it is the second step that fails after unused parameters
            sum(m.square().sum() for m in parallel(image(2, 3, 64, 64))).backward()
    finally:
        torch.distributed.destroy_process_group()


def test_unneeded_blocks_do_not_run():
    model = OverLoCK(TINY, out_indices=0)
    assert not hasattr(model, 'blocks2') and not hasattr(model, 'sub_blocks3')


def test_in_channels():
    assert len(OverLoCK(TINY, in_channels=5).eval()(image(1, 5, 64, 64))) == 4


def test_drop_path_rates_rise_linearly():
    model = OverLoCK(TINY, drop_path_rate=0.7)
    rates = [
        b.proj[9].drop_prob
        for blocks in (model.blocks1, model.blocks2, model.blocks3, model.blocks4)
        for b in blocks
    ]
    rates += [
        b.drop_path.drop_prob
        for blocks in (model.sub_blocks3, model.sub_blocks4)
        for b in blocks
    ]
    assert rates == pytest.approx([0.1 * i for i in range(8)])


def test_drop_path_acts_in_training_only():
    model, x = tiny(drop_path_rate=0.9, norm_eval=True), image(2, 3, 64, 64)
    assert not torch.equal(model(x)[3], model(x)[3])
    model.eval()
    assert torch.equal(model(x)[3], model(x)[3])


@pytest.mark.parametrize('context_skip', [False, True])
def test_switch_to_deploy(context_skip):
    model, x = tiny(context_skip=context_skip).eval(), image(2, 3, 96, 64)
    with torch.no_grad():
        before = model(x)
        model.switch_to_deploy()
        after = model(x)
        model.switch_to_deploy()  # again: nothing left to do
        again = model(x)
    for a, b, c in zip(before, after, again, strict=True):
        assert relative_error(b, a) < 1e-5
        assert torch.equal(b, c)
    assert model.deploy
    fresh = OverLoCK(TINY, context_skip=context_skip, deploy=True)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x)[3], after[3])


@pytest.mark.parametrize('kernel_size', DILATED_BRANCHES)
def test_switch_to_deploy_of_every_kernel(kernel_size):
    block = randomised(DilatedReparamBlock(8, kernel_size)).eval()
    x = image(1, 8, 20, 23)
    with torch.no_grad():
        before = block(x)
        block.switch_to_deploy()
        assert relative_error(block(x), before) < 1e-5


def test_switch_to_deploy_of_a_real_arch():
    model = filled(OverLoCK('xt', context_skip=True), torch.float32).eval()
    x = image(1, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        model.switch_to_deploy()
        for out, expected in zip(model(x), before, strict=True):
            assert relative_error(out, expected) < 1e-5


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('context_skip', [False, True])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_fold(context_skip, memory_format, dtype, tolerance):
    """On maps larger and smaller than the weights, on several images at once."""
    model = tiny(context_skip=context_skip).to(dtype)
    for shape in ((2, 3, 96, 64), (1, 3, 200, 233)):
        x = image(*shape).to(dtype).contiguous(memory_format=memory_format)
        with torch.no_grad():
            expected = model.eval()(x)
            folded = fold(copy.deepcopy(model).train())  # in evaluation mode from now on
            for out, needed in zip(folded(x), expected, strict=True):
                assert out.shape == needed.shape and out.dtype == dtype
                assert relative_error(out, needed) < tolerance
    assert not any(isinstance(m, _BatchNorm) for m in folded.modules())


@pytest.mark.parametrize(
    'form', [dict(arch='xt', context_skip=True), dict(arch='xt', deploy=True)]
)
def test_fold_a_real_arch(form):
    model = filled(OverLoCK(**form), torch.float32).eval()
    x = image(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(x)
        assert fold(model) is model
        for out, needed in zip(model(x), expected, strict=True):
            assert relative_error(out, needed) < 1e-4
        assert fold(model) is model  # again: nothing left to do
        assert torch.equal(model(x)[3], out)


def test_a_folded_model_is_for_inference():
    class Segmentor(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = tiny(), nn.Conv2d(40, 2, 1)

    model = fold(Segmentor())
    assert not model.training and not model.backbone.training
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert model.head.weight.requires_grad
    assert model.eval() is model
    with pytest.raises(RuntimeError, match='fold.. is for inference only'):
        model.train()
    with pytest.raises(ValueError, match='no OverLoCK or ContMixBlock in this Conv2d'):
        fold(nn.Conv2d(1, 1, 1))


def test_fold_after_synchronised_batch_norms():
    model = tiny().eval()
    x = image(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)[3]
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        assert relative_error(fold(model)(x)[3], expected) < 1e-4


def test_channels_last_throughout():
    """Every layer gets and returns channels_last maps, or channels cut out of them."""
    model, seen = tiny(context_skip=True).to(memory_format=torch.channels_last).eval(), []

    def check(module, inputs, outputs, name):
        for t in (*inputs, *(outputs if isinstance(outputs, tuple) else (outputs,))):
            if t.ndim == 4 and min(t.shape[1:]) > 1:
                seen.append(name)
                assert t.stride(1) == 1, (name, t.shape, t.stride())

    for name, module in model.named_modules():
        module.register_forward_hook(partial(check, name=name))
    with torch.no_grad():
        model(image(2, 3, 96, 128).contiguous(memory_format=torch.channels_last))
    assert len(seen) > 200


@pytest.mark.dev_stack
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_finite(dtype):
    """With the largest maps that are usual, whose channels' norms are beyond float16."""
    model = tiny().eval()
    with torch.no_grad(), torch.autocast('cpu', dtype):
        maps = model(image(1, 3, 1024, 1024))
        folded = fold(model)(image(1, 3, 1024, 1024))
    assert all(m.isfinite().all() for m in (*maps, *folded))
    norm = randomised(GlobalResponseNorm(8))
    x = 300 * image(1, 8, 256, 256)  # of norm 300 * 256
    exact = norm(x)
    assert relative_error(norm.to(dtype)(x.to(dtype)).float(), exact) < 0.02


@pytest.mark.parametrize('shape', [(2, 6, 5, 7), (1, 6, 1, 1), (0, 6, 4, 4)], ids=str)
def test_global_response_norm(shape):
    norm = randomised(GlobalResponseNorm(6)).double()
    x = image(*shape).double().requires_grad_()
    with torch.no_grad():
        x[:, 2] = 0  # a channel of zeros, whose norm has no gradient

    def plain(x, gamma, beta):
        norms = x.square().sum((2, 3), keepdim=True)
        norms = torch.where(norms > 0, norms, 1).sqrt() * (norms > 0)
        return (gamma * norms / (norms.mean(1, keepdim=True) + norm.eps) + 1) * x + beta

    expected = plain(x, norm.gamma, norm.beta)
    out = norm(x)
    torch.testing.assert_close(out, expected)
    weights = image(*shape).double() + 1
    parts = x, norm.gamma, norm.beta
    torch.testing.assert_close(
        torch.autograd.grad((out * weights).sum(), parts),
        torch.autograd.grad((expected * weights).sum(), parts),
    )


@pytest.mark.parametrize('frozen_stages', range(-1, 5))
def test_frozen_stages(frozen_stages):
    """As in MMDetection's ResNet: the stem, and so many stages; here 4 is everything."""
    model = tiny(frozen_stages=frozen_stages, context_skip=True).train()
    groups = [
        ('patch_embed1.',),
        ('blocks1.',),
        ('patch_embed2.', 'blocks2.'),
        ('extra_norm.1.', 'patch_embed3.', 'blocks3.'),
        ('',),
    ]
    frozen = tuple(p for group in groups[: frozen_stages + 1] for p in group)
    for name, param in model.named_parameters():
        assert param.requires_grad is not name.startswith(frozen), name
    before = {k: v.clone() for k, v in model.state_dict().items()}
    maps = model(image(2, 3, 64, 64))
    if frozen_stages < 4:
        sum(m.sum() for m in maps).backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    else:
        assert not any(m.requires_grad for m in maps)
    for name, tensor in model.state_dict().items():
        moved = not torch.equal(tensor, before[name])
        assert moved == ('running_' in name or 'num_batches' in name) * (
            not name.startswith(frozen)
        ), name


@pytest.mark.parametrize('frozen_stages', range(5))
def test_frozen_stages_of_a_shallow_backbone(frozen_stages):
    """Stages that are not built need no freezing."""
    model = OverLoCK(TINY, out_indices=1, frozen_stages=frozen_stages).train()
    left = {n.split('.')[0] for n, p in model.named_parameters() if p.requires_grad}
    stages = [{'blocks1'}, {'patch_embed2', 'blocks2'}, set(), {'extra_norm'}]
    assert left == set().union(*stages[frozen_stages:])


def test_norm_eval():
    model, x = tiny(norm_eval=True), image(2, 3, 64, 64)
    assert model.train() is model and model.training
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(m.training for m in norms)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.testing.assert_close(model(x)[3], tiny().eval()(x)[3])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert any(
        m.training for m in tiny().train().modules() if isinstance(m, nn.BatchNorm2d)
    )


@pytest.mark.parametrize('with_cp', [True, (0, 4), (3,)], ids=str)
def test_checkpointing_changes_nothing(with_cp):
    """Neither outputs, gradients nor running statistics, with stochastic depth on."""
    x, results = image(2, 3, 64, 64), []
    for cp in (False, with_cp):
        model = tiny(with_cp=cp, drop_path_rate=0.5, context_skip=True).train()
        torch.manual_seed(3)
        maps = model(x)
        sum((m * m).sum() for m in maps).backward()
        results.append(
            (
                maps,
                {n: p.grad for n, p in model.named_parameters()},
                dict(model.named_buffers()),
            )
        )
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_checkpointing_allows_a_second_backward():
    model = tiny(with_cp=True).train()
    loss = model(image(2, 3, 64, 64))[3].square().sum()
    loss.backward(retain_graph=True)
    once = model.blocks1[0].dwconv.weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(model.blocks1[0].dwconv.weight.grad, 2 * once)


def test_checkpointing_saves_memory():
    def kept(with_cp):
        model, sizes = tiny(with_cp=with_cp).train(), []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t, lambda t: t
        ):
            model(image(2, 3, 64, 64))
        return sum(sizes)

    assert kept(True) < kept((3, 4)) < kept(False)
    assert kept(True) < 0.3 * kept(False)


def test_registered_once_and_found_from_every_scope():
    child = Registry('model', parent=MODELS, scope='another_toolbox', locations=[])
    for registry in (MODELS, child):
        built = registry.build(dict(type='OverLoCK', arch=TINY))
        assert type(built) is OverLoCK


@pytest.mark.parametrize(
    'order',
    [
        'import overlock_mm, mmseg.models, mmdet.models',
        'import mmdet.models, mmseg.models, overlock_mm',
    ],
)
def test_import_order(order):
    code = (
        order
        + """
from mmdet.registry import MODELS as DET
from mmseg.registry import MODELS as SEG
from mmengine.registry import MODELS
assert DET.get('OverLoCK') is SEG.get('OverLoCK') is MODELS.get('OverLoCK') is not None
assert 'OverLoCK' not in DET.module_dict and 'OverLoCK' not in SEG.module_dict
"""
    )
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True)


def test_import_is_light():
    code = """
import sys, overlock_mm
heavy = [m for m in sys.modules if m.split('.')[0] in ('mmdet', 'mmseg', 'mmcv', 'cv2')]
assert not heavy, heavy
"""
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True)


def test_initial_values():
    model = OverLoCK(TINY, context_skip=True)
    state = model.state_dict()
    assert state['blocks1.0.proj.4.weight'].std().item() == pytest.approx(0.02, rel=0.2)
    assert not state['blocks1.0.proj.4.bias'].any()
    assert not state['sub_blocks3.0.rpb2'].any()
    assert (state['h_proj.1.weight'] == 1e-5).all()
    assert (state['blocks3.0.ls.weight'] == 1).all() and 'blocks2.0.ls.weight' not in state


@pytest.mark.parametrize('folded', [False, True])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_contiguous_images_give_contiguous_maps(layout, folded):
    """Whatever format the weights have: mmcv's RoIAlign takes all maps as contiguous."""
    model = tiny(context_skip=True).eval().to(memory_format=layout)
    model = fold(model) if folded else model
    x = image(2, 3, 64, 96)
    maps = model(x)
    assert all(m.is_contiguous() for m in maps)
    align = RoIAlign(3, 0.25)
    boxes = torch.tensor([[0.0, 0, 0, 40, 40], [1.0, 8, 8, 60, 90]])
    copy = torch.empty_like(maps[0], memory_format=torch.contiguous_format).copy_(maps[0])
    torch.testing.assert_close(align(maps[0], boxes), align(copy, boxes))
    fast = model(x.to(memory_format=torch.channels_last))
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in fast)
