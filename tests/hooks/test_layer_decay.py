"""Learning rates by depth; expected depths are counted from the sizes of the archs."""

import pytest
import torch
from helpers import ROOT, TINY
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from torch import nn

from overlock_mm import OverLoCK, archs
from overlock_mm.config.load import build_model, load_config
from overlock_mm.errors import UserError
from overlock_mm.hooks import OverLoCKLayerDecayConstructor

LR, DECAY = 1e-3, 0.05
CONFIGS = [
    'segmentation/upernet_overlock_b_layer_decay.py',
    'detection/cascade_mask_rcnn_overlock_b_layer_decay.py',
]


class Model(nn.Module):
    """A model with a backbone and a head."""

    def __init__(self, **kwargs):
        super().__init__()
        self.backbone = OverLoCK(**kwargs)
        self.head = nn.Conv2d(8, 3, 1)


def groups_of(model, constructor='OverLoCKLayerDecayConstructor', **paramwise):
    cfg = dict(
        type='OptimWrapper',
        optimizer=dict(type='AdamW', lr=LR, weight_decay=DECAY),
        constructor=constructor,
        paramwise_cfg=paramwise,
    )
    return build_optim_wrapper(model, cfg).optimizer.param_groups


def rates(groups, model):
    """(learning rate, weight decay) of each parameter by its name; each stands once."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = [
        (names[id(p)], g['lr'], g['weight_decay']) for g in groups for p in g['params']
    ]
    listed = [name for name, *_ in found]
    assert len(listed) == len(set(listed))
    assert set(listed) == {n for n, p in model.named_parameters() if p.requires_grad}
    return {name: (lr, decay) for name, lr, decay in found}


def on_meta(**kwargs):
    with torch.device('meta'):
        return Model(**kwargs)


def expected_depths(arch):
    """The depth of the first block of each part, and how many there are."""
    depths, focus = archs.ARCHS[arch]['depths'], archs.ARCHS[arch]['focus_depths']
    parts = ['blocks1', 'blocks2', 'blocks3', 'blocks4', 'sub_blocks3', 'sub_blocks4']
    first, start = {}, 1
    for part, count in zip(parts, (*depths, *focus), strict=True):
        first[part] = (start, count)
        start += count
    return first, start  # the head


@pytest.mark.parametrize('arch, last', [('xt', 17), ('b', 54)])
def test_depths_follow_the_data(arch, last):
    model = on_meta(arch=arch, context_skip=True)
    found = rates(groups_of(model, decay_rate=0.5), model)
    parts, head = expected_depths(arch)
    assert head == last + 1

    def depth(name):
        return head - round(-torch.tensor(found[name][0] / LR).log2().item())

    assert depth('head.weight') == head
    assert depth('backbone.patch_embed1.0.weight') == 0
    for part, (start, count) in parts.items():
        block = 'proj.4.weight' if part.startswith('blocks') else 'mlp.0.weight'
        for i in range(count):
            assert depth(f'backbone.{part}.{i}.{block}') == start + i
    ends = {part: start + count - 1 for part, (start, count) in parts.items()}
    for name, expected in {
        'patch_embed2.0.weight': parts['blocks2'][0],
        'patch_embed3.0.weight': parts['blocks3'][0],
        'patch_embed4.0.weight': parts['blocks4'][0],
        'high_level_proj.weight': ends['blocks4'],
        'patch_embedx.h_proj.0.weight': parts['sub_blocks4'][0],
        'extra_norm.0.weight': ends['blocks1'],
        'extra_norm.1.weight': ends['blocks2'],
        'extra_norm.2.weight': ends['sub_blocks3'],
        'extra_norm.3.weight': ends['sub_blocks4'],
        'extra_norm.4.weight': ends['sub_blocks4'],
        'h_proj.0.weight': ends['sub_blocks4'],
    }.items():
        assert depth(f'backbone.{name}') == expected, name


def test_stages():
    model = on_meta(arch='b')
    found = rates(groups_of(model, decay_rate=0.5, decay_type='stage_wise'), model)
    for name, depth in {
        'backbone.patch_embed1.0.weight': 0,
        'backbone.blocks1.7.proj.4.weight': 1,
        'backbone.blocks3.0.proj.4.weight': 3,
        'backbone.blocks4.3.proj.4.weight': 4,
        'backbone.sub_blocks3.19.mlp.0.weight': 5,
        'backbone.sub_blocks4.0.mlp.0.weight': 6,
        'head.bias': 7,
    }.items():
        assert found[name][0] == pytest.approx(LR * 0.5 ** (7 - depth)), name


def test_a_number_of_layers_of_another_backbone():
    """17 layers spread over 12, as a config for ConvNeXt has it."""
    model = on_meta(arch='xt')
    groups = groups_of(model, decay_rate=0.9, decay_type='layer_wise', num_layers=12)
    found = rates(groups, model)
    assert found['backbone.patch_embed1.0.weight'][0] == pytest.approx(LR * 0.9**13)
    assert found['backbone.blocks4.0.proj.4.weight'][0] == pytest.approx(LR * 0.9**7)
    assert found['backbone.sub_blocks4.1.mlp.0.weight'][0] == pytest.approx(LR * 0.9)
    assert found['head.weight'][0] == LR == groups[0]['lr']
    assert len({g['lr'] for g in groups}) == 14


def test_weight_decay():
    model = on_meta(arch=TINY)
    found = rates(groups_of(model, decay_rate=0.9), model)
    without = [name for name, (_, decay) in found.items() if decay == 0]
    assert all(decay in (0, DECAY) for _, decay in found.values())
    for name in (
        'head.bias',
        'backbone.blocks3.0.ls.weight',
        'backbone.blocks1.0.proj.7.gamma',
        'backbone.sub_blocks3.0.rpb1',
        'backbone.sub_blocks3.1.rpb2',
        'backbone.extra_norm.0.weight',
        'backbone.patch_embed1.1.weight',
    ):
        assert name in without
    for name in ('head.weight', 'backbone.blocks1.0.dwconv.weight'):
        assert name not in without


def test_with_the_options_of_the_default_constructor():
    model = on_meta(arch=TINY)
    options = dict(decay_rate=0.5, custom_keys={'head': dict(lr_mult=10, decay_mult=0)})
    found = rates(groups_of(model, **options), model)
    assert found['head.weight'] == (pytest.approx(10 * LR), 0)
    last = found['backbone.sub_blocks4.1.mlp.0.weight']
    assert last == (pytest.approx(LR / 2), DECAY)


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(out_indices=(0, 1)),
        dict(out_indices=(1, 2), deploy=True),
        dict(frozen_stages=2),
        dict(context_skip=True, deploy=True),
    ],
)
def test_other_forms(kwargs):
    model = on_meta(arch=TINY, **kwargs)
    found = rates(groups_of(model, OverLoCKLayerDecayConstructor, decay_rate=0.5), model)
    assert found['head.weight'][0] == LR
    assert max(lr for name, (lr, _) in found.items() if 'backbone' in name) == LR / 2


def test_a_wrapped_model():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.ModuleDict(dict(detector=on_meta(arch=TINY)))

    model = Wrapper()
    found = rates(groups_of(model, decay_rate=0.5), model.module)
    assert found['detector.head.weight'][0] == LR
    assert found['detector.backbone.patch_embed1.0.weight'][0] < LR / 100


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(), 'decay_rate=None must be a number'),
        (dict(decay_rate=1.5), r'decay_rate=1.5 must be a number in \(0, 1\]'),
        (
            dict(decay_rate=0.9, decay_type='block'),
            r"'block' must be one of \['layer_wise'",
        ),
        (dict(decay_rate=0.9, num_layers=0), 'num_layers=0 must be a positive'),
        (dict(decay_rate=0.9, layers=12), r"\['layers'\], which is unknown; choose"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        groups_of(on_meta(arch=TINY), **options)


def test_another_backbone():
    with pytest.raises(UserError, match='there is no OverLoCK in this Sequential; leave'):
        groups_of(nn.Sequential(nn.Conv2d(3, 3, 1)), decay_rate=0.9)


@pytest.mark.parametrize('path', CONFIGS)
def test_the_configs(path):
    cfg = load_config(ROOT / 'configs' / path)
    with torch.device('meta'):
        model = build_model(cfg)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    base = Config.fromfile(ROOT / 'configs' / path.replace('_layer_decay', ''))
    lr = base.optim_wrapper.optimizer.lr
    assert groups[0]['lr'] == lr
    assert min(g['lr'] for g in groups) == pytest.approx(lr * 0.9**13)
