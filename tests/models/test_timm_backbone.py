"""Models of timm as backbones."""

import pytest
import timm
import torch
from helpers import image
from mmengine.registry import MODELS
from torch import nn

from overlock_mm.models import TimmBackbone


def test_maps_are_those_of_timm():
    torch.manual_seed(0)
    backbone = TimmBackbone('resnet18').eval()
    plain = timm.create_model('resnet18', features_only=True, out_indices=(1, 2, 3, 4))
    plain.load_state_dict(backbone.model.state_dict())
    x = image(2, 3, 64, 96)
    for ours, theirs in zip(backbone(x), plain.eval()(x), strict=True):
        assert torch.equal(ours, theirs)
    assert backbone.out_channels == (64, 128, 256, 512)
    assert backbone.out_strides == (4, 8, 16, 32)


def test_strides_and_transformers():
    backbone = TimmBackbone('swin_tiny_patch4_window7_224', out_strides=[8, 32]).eval()
    maps = backbone(image(1, 3, 224, 224))
    assert [tuple(m.shape) for m in maps] == [(1, 192, 28, 28), (1, 768, 7, 7)]
    assert all(m.is_contiguous() for m in maps)


def test_options():
    backbone = MODELS.build(
        dict(
            type='TimmBackbone',
            model_name='resnet18',
            in_channels=4,
            norm_eval=True,
            with_cp=True,
            drop_path_rate=0.3,
        )
    )
    assert backbone.model.conv1.in_channels == 4 and backbone.model.grad_checkpointing
    assert backbone.model.layer4[1].drop_path.drop_prob == pytest.approx(0.3)
    assert backbone.train() is backbone
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms)
    before = backbone.model.conv1.weight.clone()
    backbone.init_weights()  # what timm initialised stays
    assert torch.equal(backbone.model.conv1.weight, before)
    constant = dict(type='Constant', layer='Conv2d', val=0.5)
    backbone = TimmBackbone('resnet18', init_cfg=constant)
    backbone.init_weights()
    assert (backbone.model.conv1.weight == 0.5).all()


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(out_strides=(4, 64)), r'\(4, 64\) of resnet18 must be.*\[2, 4, 8, 16, 32\]'),
        (dict(out_strides=(8, 4)), 'must be increasing'),
        (dict(no_such_option=1), 'no_such_option'),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        TimmBackbone('resnet18', **options)
