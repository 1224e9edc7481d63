"""Models whose layers were fused, wrapped or hooked by others before they are merged."""

import copy

import pytest
import torch
from helpers import TINY, image, randomised, relative_error, tiny
from mmcv.cnn import fuse_conv_bn
from mmengine.model import revert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize, prune
from torchvision.ops import FrozenBatchNorm2d

from overlock_mm import fold
from overlock_mm.models.classifier import OverLoCKClassifier


class Wrapper(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 2 * self.layer(x)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def classifier(**kwargs):
    torch.manual_seed(0)
    return randomised(OverLoCKClassifier(TINY, 5, **kwargs))


def merged(model, ways):
    for way in ways.split():
        if way == 'fuse':
            model = fuse_conv_bn(model)
        elif way == 'deploy':
            model.switch_to_deploy()
        else:
            model = fold(model)
    return model


@pytest.mark.parametrize(
    'ways',
    ['fuse', 'fuse deploy', 'fuse fold', 'fuse deploy fold', 'deploy fuse fold'],
)
@pytest.mark.parametrize('make', [tiny, classifier], ids=['backbone', 'classifier'])
def test_after_batch_norms_were_fused(make, ways):
    model, x = make().eval(), image(2, 3, 64, 96)
    with torch.no_grad():
        expected = model(x)
        model = merged(model, ways)
        for out, needed in zip(model(x), expected, strict=True):
            assert relative_error(out, needed) < 1e-5
    if 'fold' in ways:
        assert not any(isinstance(m, _BatchNorm) for m in model.modules())
    if 'deploy' in ways:
        assert model.deploy


def test_batch_norms_of_other_types():
    """Those that mmengine makes of synchronised ones, and those without affine weights."""
    model = tiny().eval()
    with torch.no_grad():
        for norm in (model.blocks1[0].proj[2], model.blocks3[0].proj[1].origin_bn):
            norm.weight.fill_(1), norm.bias.zero_()
        x, expected = image(1, 3, 64, 64), model(image(1, 3, 64, 64))
        for norm in (model.blocks1[0].proj[2], model.blocks3[0].proj[1].origin_bn):
            norm.weight = norm.bias = None
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model = revert_sync_batchnorm(model).eval()
        for out, needed in zip(fold(model)(x), expected, strict=True):
            assert relative_error(out, needed) < 1e-5


@pytest.mark.parametrize('action', ['fold', 'deploy'])
def test_parametrized_weights_are_read(action):
    model, x = tiny(), image(1, 3, 64, 64)
    for block in (*model.blocks1, *model.sub_blocks3):
        for module in block.modules():
            if isinstance(module, nn.Conv2d):
                parametrize.register_parametrization(module, 'weight', Doubled())
    with torch.no_grad():
        expected = model.eval()(x)[3]
        assert relative_error(expected, tiny().eval()(x)[3]) > 1e-3
        out = merged(copy.deepcopy(model), action)(x)[3]
    assert relative_error(out, expected) < 1e-5


def test_layers_that_are_called_may_be_anything():
    """What is not merged stays in the folded model, wrapped as it is."""
    model, x = tiny().eval(), image(1, 3, 64, 64)
    for parent, name in (
        (model, 'high_level_proj'),
        (model.blocks1[0].proj, '0'),
        (model.sub_blocks3[0].fusion, '0'),
        (model.sub_blocks3[0].gate, '0'),
        (model.sub_blocks3[0], 'norm2'),
        (model.sub_blocks3[1].weight_key, '1'),
        (model.blocks2[0].proj[3].proj, '1'),
        (model.patch_embed1, '0'),
        (model.patch_embed2, '1'),
    ):
        setattr(parent, name, Wrapper(getattr(parent, name)))
    model.patch_embed3.register_forward_hook(lambda module, inputs, out: 2 * out)
    with torch.no_grad():
        expected = model(x)
        for out, needed in zip(fold(model)(x), expected, strict=True):
            assert relative_error(out, needed) < 1e-4


READ = [
    'blocks1.0',
    'blocks1.0.dwconv',
    'blocks1.0.proj.1',
    'blocks1.0.proj.1.lk_origin',
    'blocks1.0.proj.1.dil_bn_k5_1',
    *(f'blocks1.0.proj.{i}' for i in range(2, 10)),
    'blocks3.0.ls',
    'sub_blocks3.0',
    'sub_blocks3.0.weight_query.0',
    'sub_blocks3.0.weight_query.1',
    'sub_blocks3.1.x_scale',
    'sub_blocks3.1.h_scale',
    *(f'sub_blocks3.0.dwconv{i}' for i in (1, 2)),
    *(f'sub_blocks3.0.ls{i}' for i in (1, 2)),
    *(f'sub_blocks3.0.dyconv_proj.{i}' for i in (0, 1)),
    *(f'sub_blocks3.0.lepe.{i}' for i in (0, 1)),
    *(f'sub_blocks3.0.proj.{i}' for i in (0, 1)),
    *(f'sub_blocks3.0.mlp.{i}' for i in range(5)),
    'sub_blocks3.0.se_layer',
    'sub_blocks3.0.drop_path',
]


def assert_fold_refuses(model, name):
    before = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(TypeError, match=rf"fold\(\) cannot merge '{name}', a "):
        fold(model)
    assert {n: type(m) for n, m in model.named_modules()} == before and not model.folded


@pytest.mark.parametrize('name', READ)
def test_a_layer_that_cannot_be_folded_is_named(name):
    """Wrapped, with hooks or pruned; and the model is left as it was."""
    model = tiny()
    layer = model.get_submodule(name)
    hook = layer.register_forward_hook(lambda module, inputs, out: None)
    assert_fold_refuses(model, name)
    hook.remove()
    if isinstance(layer, nn.Conv2d):
        prune.l1_unstructured(layer, 'weight', amount=0.5)
        assert_fold_refuses(model, name)
    if name not in ('blocks1.0', 'sub_blocks3.0'):  # blocks inside a wrapper are folded
        parent, _, child = name.rpartition('.')
        setattr(model.get_submodule(parent), child, Wrapper(layer))
        assert_fold_refuses(model, name)


def test_the_name_is_that_in_the_whole_model():
    model = nn.ModuleDict({'backbone': tiny()})
    layer = model.backbone.blocks2[0].proj
    layer[4] = Wrapper(layer[4])
    with pytest.raises(TypeError, match=r"'backbone.blocks2.0.proj.4', a Wrapper"):
        fold(model)


def test_frozen_batch_norms_of_torchvision_are_refused():
    model = tiny()
    model.sub_blocks3[0].lepe[1] = FrozenBatchNorm2d(32)
    with pytest.raises(TypeError, match="'sub_blocks3.0.lepe.1', a FrozenBatchNorm2d"):
        fold(model)


def test_a_branch_that_cannot_be_merged_is_named():
    model, x = tiny().eval(), image(1, 3, 64, 64)
    branches = model.sub_blocks4[1].lepe[0]
    branches.dil_conv_k3_1 = Wrapper(branches.dil_conv_k3_1)
    with torch.no_grad():
        expected = model(x)[3]
        with pytest.raises(
            TypeError,
            match=r"switch_to_deploy\(\) cannot merge 'sub_blocks4.1.lepe.0.dil_conv_k3_1'",
        ):
            model.switch_to_deploy()
        assert torch.equal(model(x)[3], expected)
    assert not model.deploy
    assert not any(m.deploy for m in model.modules() if type(m) is type(branches))


def test_other_approximations_of_gelu_are_kept():
    model, x = tiny().eval(), image(1, 3, 64, 64) * 3
    for block in model.blocks1:
        block.proj[5] = nn.GELU('tanh')
    for block in model.sub_blocks3:
        block.mlp[1] = nn.GELU('tanh')
    with torch.no_grad():
        expected = model.double()(x.double())[3]
        assert relative_error(tiny().eval().double()(x.double())[3], expected) > 1e-7
        assert relative_error(fold(model)(x.double())[3], expected) < 1e-10
