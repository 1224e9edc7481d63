"""Every parameter has the learning rate and weight decay of its place in the network."""

import copy

import pytest
import torch
from helpers import ROOT, Segmentor
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS, init_default_scope
from torch import nn

from overlock_mm import OverLoCK, switch_to_deploy
from overlock_mm.archs import ARCHS
from overlock_mm.errors import UserError
from overlock_mm.hooks import OverLoCKLayerDecayConstructor
from overlock_mm.models import ContMixBlock

LR, DECAY = 1e-3, 0.05


def numbered(prefix, layers):
    return {f'{prefix}.{i}': layer for i, layer in enumerate(layers)}


# Counted by hand in the paper's figure of the network: layers by prefixes of names.
XT = {
    'patch_embed1': 0,
    'blocks1.0': 1,
    'blocks1.1': 2,
    'extra_norm.0': 2,
    'patch_embed2': 3,
    'blocks2.0': 3,
    'blocks2.1': 4,
    'extra_norm.1': 4,  # stage 3 reads it
    'patch_embed3': 5,
    **numbered('blocks3', [5, 6, 7]),
    'patch_embed4': 8,
    **numbered('blocks4', [8, 9]),
    'high_level_proj': 9,
    'extra_norm.4': 9,
    **numbered('sub_blocks3', [10, 11, 12, 13, 14, 15]),
    'extra_norm.2': 15,
    'patch_embedx': 16,
    **numbered('sub_blocks4', [16, 17]),
    'extra_norm.3': 17,
    'h_proj': 17,
}
B = {
    'patch_embed1': 0,
    **numbered('blocks1', range(1, 9)),
    'extra_norm.0': 8,
    'patch_embed2': 9,
    **numbered('blocks2', range(9, 17)),
    'extra_norm.1': 16,
    'patch_embed3': 17,
    **numbered('blocks3', range(17, 27)),
    'patch_embed4': 27,
    **numbered('blocks4', range(27, 31)),
    'high_level_proj': 30,
    'extra_norm.4': 30,
    **numbered('sub_blocks3', range(31, 51)),
    'extra_norm.2': 50,
    'patch_embedx': 51,
    **numbered('sub_blocks4', range(51, 55)),
    'extra_norm.3': 54,
    'h_proj': 54,
}
BY_BLOCK = {'xt': (XT, 17), 'b': (B, 54)}
BY_STAGE = {
    'patch_embed1': 0,
    'blocks1': 1,
    'extra_norm.0': 1,
    'patch_embed2': 2,
    'blocks2': 2,
    'extra_norm.1': 2,
    'patch_embed3': 3,
    'blocks3': 3,
    'patch_embed4': 4,
    'blocks4': 4,
    'high_level_proj': 4,
    'extra_norm.4': 4,
    'sub_blocks3': 5,
    'extra_norm.2': 5,
    'patch_embedx': 6,
    'sub_blocks4': 6,
    'extra_norm.3': 6,
    'h_proj': 6,
}


def wrapper_of(model, decay_rate=0.5, lr=LR, weight_decay=DECAY, **options):
    optimizer = dict(type='AdamW', lr=lr, weight_decay=weight_decay)
    return build_optim_wrapper(
        model,
        dict(
            type='OptimWrapper',
            optimizer={k: v for k, v in optimizer.items() if v is not None},
            constructor='OverLoCKLayerDecayConstructor',
            paramwise_cfg=dict(decay_rate=decay_rate, **options),
        ),
    )


def settings_of(model, wrapper):
    """The group of every parameter by name; each parameter must be in just one."""
    names = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    groups = [(id(p), g) for g in wrapper.optimizer.param_groups for p in g['params']]
    assert sorted(i for i, _ in groups) == sorted(names)
    for group in wrapper.optimizer.param_groups:
        assert group['lr'] == pytest.approx(LR * group['lr_scale'])
        assert len(group['param_names']) == len(group['params'])
    return {names[i]: group for i, group in groups}


def layer_in(table, name):
    matches = [layer for key, layer in table.items() if f'{name}.'.startswith(f'{key}.')]
    assert len(matches) == 1, name
    return matches[0]


def check(model, wrapper, table, last, at='backbone.', rate=0.5):
    """Learning rates are those of the table in the backbone, and whole outside."""
    found = settings_of(model, wrapper)
    inside = [name for name in found if name.startswith(at)]
    assert inside
    for name, group in found.items():
        layer = layer_in(table, name.removeprefix(at)) if name in inside else last + 1
        assert group['lr_scale'] == pytest.approx(rate ** (last + 1 - layer)), name
        assert group['group_name'].split('_')[1] == str(layer), name
    return found


class Net(nn.Module):
    """A model with a backbone on the meta device, where the rest has no part in it."""

    def __init__(self, arch='xt', **kwargs):
        super().__init__()
        with torch.device('meta'):
            self.backbone = OverLoCK(arch, **kwargs)
            self.head = nn.Sequential(nn.Conv2d(8, 1, 1), nn.BatchNorm2d(1))


@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize('arch', ['xt', 'b'])
def test_layer_wise(arch, deploy):
    model = Net(arch, context_skip=True, deploy=deploy)
    table, last = BY_BLOCK[arch]
    found = check(model, wrapper_of(model), table, last)
    assert found['head.0.weight']['lr'] == LR
    layers = {group['group_name'] for group in found.values()}
    kinds = ('decay', 'no_decay')
    assert layers == {f'layer_{i}_{kind}' for i in range(last + 2) for kind in kinds}


@pytest.mark.parametrize('arch', ['xt', 'b'])
def test_stage_wise(arch):
    model = Net(arch, context_skip=True)
    check(model, wrapper_of(model, decay_type='stage_wise'), BY_STAGE, 6)


def test_blocks_are_spread_over_the_layers():
    """12 layers for the 54 blocks of OverLoCK-B: a layer has 4.5 blocks."""
    model = Net('b', context_skip=True)
    found = settings_of(model, wrapper_of(model, num_layers=12))
    layers = {
        'patch_embed1.0': 0,
        'blocks1.0.dwconv': 1,
        'blocks1.3.dwconv': 1,  # block 4
        'blocks1.4.dwconv': 2,  # block 5
        'patch_embed2.0': 2,
        'blocks2.0.dwconv': 2,  # block 9
        'blocks2.1.dwconv': 3,  # block 10
        'blocks4.3.dwconv': 7,  # block 30
        'high_level_proj': 7,
        'sub_blocks3.18.dwconv1': 11,  # block 49
        'sub_blocks3.19.dwconv1': 12,  # block 50
        'sub_blocks4.3.dwconv1': 12,
        'h_proj.0': 12,
    }
    for name, layer in layers.items():
        scale = found[f'backbone.{name}.weight']['lr_scale']
        assert scale == pytest.approx(0.5 ** (13 - layer)), name
    assert found['head.0.weight']['lr_scale'] == 1


def test_options_of_stock_convnext_configs():
    """Stages over 12 layers, so that the stem is 13 from the heads as in theirs."""
    table = {name: 2 * stage for name, stage in BY_STAGE.items()}
    model = Net('b')
    options = dict(decay_rate=0.9, decay_type='stage_wise', num_layers=12)
    found = check(model, wrapper_of(model, **options), table, 12, rate=0.9)
    stem = found['backbone.patch_embed1.0.weight']['lr_scale']
    assert stem == pytest.approx(0.2541866, rel=1e-6)


@pytest.mark.parametrize(
    'out_indices, blocks, stages', [(0, 2, 1), ((0, 1), 4, 2), ((0, 2), 15, 5), (3, 17, 6)]
)
def test_parts_that_are_left_out(out_indices, blocks, stages):
    model = Net('xt', out_indices=out_indices)
    check(model, wrapper_of(model), XT, blocks)
    check(model, wrapper_of(model, decay_type='stage_wise'), BY_STAGE, stages)


@pytest.mark.parametrize('frozen_stages', [0, 2, 4])
def test_frozen_stages_count_but_have_no_group(frozen_stages):
    model = Net('xt', frozen_stages=frozen_stages)
    wrapper = wrapper_of(model)
    found = settings_of(model, wrapper)
    assert found['head.0.weight']['lr_scale'] == 1
    if frozen_stages < 4:
        check(model, wrapper, XT, 17)
    else:
        assert all(name.startswith('head.') for name in found)


class Wrapper(nn.Module):
    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


@pytest.mark.parametrize(
    'wrap, at',
    [
        (lambda net: Wrapper(detector=net), 'detector.backbone.'),
        (lambda net: net.backbone, ''),
    ],
)
def test_backbone_anywhere(wrap, at):
    model = wrap(Net('xt'))
    check(model, wrapper_of(model), XT, 17, at)


def test_distributed_wrappers():
    model = Net('xt')
    whole = nn.DataParallel(model)  # has the `module` of DistributedDataParallel
    check(model, wrapper_of(whole), XT, 17)
    model.backbone = nn.DataParallel(model.backbone)
    check(model, wrapper_of(model), XT, 17, 'backbone.module.')


def test_several_backbones_count_from_the_heads():
    model = Wrapper(student=Net('xt'), teacher=Net('b'))
    found = settings_of(model, wrapper_of(model))
    for at, table, last in (('student', XT, 17), ('teacher', B, 54)):
        for name in ('patch_embed1.0', 'blocks4.0.dwconv', 'sub_blocks4.1.dwconv1'):
            scale = found[f'{at}.backbone.{name}.weight']['lr_scale']
            assert scale == pytest.approx(0.5 ** (last + 1 - layer_in(table, name)))


def test_switched_to_deploy():
    model = Segmentor()
    switch_to_deploy(model)
    blocks = {'blocks1.0': 1, 'blocks2.0': 2, 'blocks3.0': 3, 'blocks4.0': 4}
    focus = {'sub_blocks3.0': 5, 'sub_blocks3.1': 6, 'sub_blocks4.0': 7, 'sub_blocks4.1': 8}
    before = {'patch_embed1': 0, 'patch_embed2': 2, 'patch_embed3': 3, 'patch_embed4': 4}
    behind = {'high_level_proj': 4, 'patch_embedx': 7}
    norms = numbered('extra_norm', [1, 2, 6, 8])
    check(model, wrapper_of(model), {**blocks, **focus, **before, **behind, **norms}, 8)


def test_weight_decay():
    model = Net('xt', context_skip=True)
    with torch.device('meta'):
        model.neck = ContMixBlock(64, layer_scale_init=1.0)
    found = settings_of(model, wrapper_of(model))
    without = [
        'backbone.patch_embed1.1.weight',
        'backbone.patch_embed1.1.bias',
        'backbone.extra_norm.2.weight',
        'backbone.high_level_proj.bias',
        'backbone.blocks1.0.proj.0.weight',
        'backbone.blocks1.0.proj.2.bias',
        'backbone.blocks3.0.ls.weight',
        'backbone.blocks3.0.ls.bias',
        'backbone.h_proj.1.weight',
        'backbone.blocks1.0.proj.7.gamma',
        'backbone.blocks1.0.proj.7.beta',
        'backbone.sub_blocks3.0.fusion.4.gamma',
        'backbone.sub_blocks3.1.x_scale.weight',
        'backbone.sub_blocks3.0.rpb1',
        'backbone.sub_blocks4.1.rpb2',
        'neck.rpb1',
        'neck.rpb2',
        'neck.ls1.weight',
        'neck.mlp.3.gamma',
        'head.0.bias',
        'head.1.weight',
        'head.1.bias',
    ]
    for name in without:
        assert found[name]['weight_decay'] == 0, name
    # what decays is a kernel of a convolution, of one output channel too
    modules = dict(model.named_modules())
    for name, group in found.items():
        owner, _, own = name.rpartition('.')
        kernel = own == 'weight' and isinstance(modules[owner], nn.Conv2d)
        assert group['weight_decay'] == (DECAY if kernel else 0), name
    assert found['head.0.weight']['weight_decay'] == DECAY
    assert found['backbone.sub_blocks3.0.weight_proj.weight']['weight_decay'] == DECAY


def test_without_weight_decay_in_the_config():
    model = Net('xt')
    found = settings_of(model, wrapper_of(model, weight_decay=None))
    assert found['head.0.weight']['weight_decay'] == 0.01  # the default of AdamW
    assert found['head.0.bias']['weight_decay'] == 0


def test_options_of_mmengine():
    model = Net('xt')
    custom_keys = {
        'head': dict(lr_mult=10.0),
        'patch_embed1': dict(lr_mult=0.1, decay_mult=0.5),
        'blocks1.0.dwconv': dict(decay_mult=0.0, eps=1e-6),
        'extra_norm.3': dict(decay_mult=1.0),
    }
    options = dict(custom_keys=custom_keys, norm_decay_mult=1.0, bias_lr_mult=2.0)
    wrapper = wrapper_of(model, **options)
    found = settings_of(model, wrapper)

    def values(name):
        group = found[name]
        return group['lr_scale'], group['weight_decay']

    assert values('head.0.weight') == pytest.approx((10, DECAY))
    assert values('head.0.bias') == pytest.approx((10, 0))
    stem = 0.1 * 0.5**18
    assert values('backbone.patch_embed1.0.weight') == pytest.approx((stem, DECAY / 2))
    assert values('backbone.patch_embed1.1.bias') == pytest.approx((stem, DECAY / 2))
    assert values('backbone.blocks1.0.dwconv.weight') == pytest.approx((0.5**17, 0))
    assert values('backbone.extra_norm.3.weight') == pytest.approx((0.5, DECAY))
    assert found['backbone.blocks1.0.dwconv.weight']['eps'] == 1e-6
    assert found['backbone.blocks1.1.dwconv.weight']['eps'] == 1e-8
    # a norm has its weight decay back; a bias has twice the learning rate, but for norms
    assert values('backbone.blocks1.0.proj.0.weight') == pytest.approx((0.5**17, DECAY))
    assert values('backbone.blocks1.0.proj.4.weight') == pytest.approx((0.5**17, DECAY))
    assert values('backbone.blocks1.0.proj.4.bias') == pytest.approx((2 * 0.5**17, 0))
    assert found['head.0.weight']['group_name'] == 'layer_18_lr_x10_decay'
    last = wrapper.optimizer.param_groups[-1]
    stem = {name for name in found if name.startswith('backbone.patch_embed1.')}
    assert {name for name, group in found.items() if group is last} == stem


def test_logged_learning_rate_is_the_configs(log):
    """mmengine logs the rate of the first group; and one line says what was done."""
    model = Net('xt')
    model.tail = nn.Conv2d(1, 1, 1, device='meta')
    options = dict(custom_keys={'head': dict(lr_mult=10.0), 'norm': dict(decay_mult=0.0)})
    model.backbone.patch_embed1.requires_grad_(False)
    wrapper = wrapper_of(model, **options)
    assert wrapper.get_lr()['lr'][0] == LR
    scales = [group['lr_scale'] for group in wrapper.optimizer.param_groups]
    whole = scales.count(1)
    assert scales[:whole] == [1] * whole and whole == 2
    assert scales[whole:] == sorted(scales[whole:], reverse=True)
    (line,) = (line for line in log if ' decay of ' in line)
    assert not any('paramwise_options' in line or 'requires_grad' in line for line in log)
    groups = f'{len(scales)} parameter groups'
    assert 'layer_wise decay of 0.5 over 17 layers' in line and groups in line


def test_other_lines_of_the_log_stay(log):
    wrapper_of(Net('xt', frozen_stages=0))
    del log[:]
    print_log('paramwise_options -- of another', logger='current')
    assert log == ['paramwise_options -- of another']


@pytest.mark.parametrize('bypass_duplicate', [True, False])
def test_shared_parameters(bypass_duplicate):
    model = Net('xt')
    model.second = nn.ModuleList([model.head, nn.Conv2d(8, 1, 1, device='meta')])
    model.second[1].weight = model.backbone.patch_embed1[0].weight
    options = dict(bypass_duplicate=bypass_duplicate)
    found = settings_of(model, wrapper_of(model, **options))
    assert found['head.0.weight']['lr_scale'] == 1
    assert found['backbone.patch_embed1.0.weight']['lr_scale'] == 0.5**18
    assert [name for name in found if name.startswith('second.')] == ['second.1.bias']


CONFIGS = [
    'segmentation/upernet_overlock_b_layer_decay.py',
    'detection/cascade_mask_rcnn_overlock_b_layer_decay.py',
    'segmentation/upernet_overlock_xt.py',
    'detection/mask_rcnn_overlock_xt_1x.py',
]


@pytest.mark.parametrize('constructor', ['name', 'class'])
@pytest.mark.parametrize('path', CONFIGS)
def test_configs(path, constructor):
    """In both toolboxes, with their default scopes, by name and as a class."""
    cfg = Config.fromfile(ROOT / 'configs' / path)
    if cfg.default_scope == 'mmseg':
        from mmseg.utils import register_all_modules
    else:
        from mmdet.utils import register_all_modules
    register_all_modules(init_default_scope=True)
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    optim_wrapper = copy.deepcopy(cfg.optim_wrapper)
    if 'layer_decay' not in path:  # paste what is in the documentation of the class
        optim_wrapper.constructor = 'OverLoCKLayerDecayConstructor'
        optim_wrapper.paramwise_cfg.update(decay_rate=0.9, num_layers=12)
    if constructor == 'class':
        optim_wrapper = ConfigDict(optim_wrapper)
        optim_wrapper['constructor'] = OverLoCKLayerDecayConstructor
    optim_wrapper.optimizer.lr = LR
    wrapper = build_optim_wrapper(model, optim_wrapper)
    found = settings_of(model, wrapper)
    for name, group in found.items():
        if not name.startswith('backbone.'):
            assert group['lr_scale'] == 1, name
        elif name.startswith('backbone.patch_embed1.'):
            assert group['lr_scale'] == pytest.approx(0.9**13), name
        elif name.startswith('backbone.sub_blocks4.1.'):
            # XT: the last block; B: block 52 of 54; both in layer 12
            assert group['lr_scale'] == pytest.approx(0.9), name
    decay = cfg.optim_wrapper.optimizer.weight_decay
    assert found['backbone.patch_embed1.0.weight']['weight_decay'] == decay
    assert found['backbone.extra_norm.0.weight']['weight_decay'] == 0
    assert len(wrapper.optimizer.param_groups) == 28  # stem, 12 layers, heads, twice each


def test_name():
    assert (
        OPTIM_WRAPPER_CONSTRUCTORS.get('OverLoCKLayerDecayConstructor')
        is OverLoCKLayerDecayConstructor
    )


@pytest.mark.parametrize('arch, blocks', [('xt', 17), ('t', 30), ('s', 42), ('b', 54)])
def test_documented_numbers_of_blocks(arch, blocks):
    sizes = ARCHS[arch]
    assert sum(sizes['depths']) + sum(sizes['focus_depths']) == blocks
    assert f'{blocks}' in OverLoCKLayerDecayConstructor.__doc__


@pytest.mark.parametrize(
    'options, words',
    [
        (dict(decay_rate=None), 'decay_rate=None .* above 0 and at most 1'),
        (dict(decay_rate=0), 'decay_rate=0 '),
        (dict(decay_rate=1.1), 'decay_rate=1.1 '),
        (dict(decay_rate='0.9'), "decay_rate='0.9' "),
        (dict(decay_type='layer_wise_vit'), "'layer_wise_vit' .* 'stage_wise'"),
        (dict(num_layers=0), 'num_layers=0 .* leave it out'),
        (dict(num_layers=1.5), 'num_layers=1.5 '),
        (dict(layer_decay_rate=0.9), r"\['layer_decay_rate'\].*'decay_rate'"),
        (dict(lr=None), 'no lr .* add it'),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(UserError, match=words):
        wrapper_of(Net('xt'), **options)


def test_options_that_are_missing():
    optimizer = dict(type='AdamW', lr=LR)
    with pytest.raises(UserError, match='decay_rate=None'):
        OverLoCKLayerDecayConstructor(dict(optimizer=optimizer))


def test_a_model_without_overlock():
    words = r"no OverLoCK in this Conv2d, .* type 'OverLoCK'"
    with pytest.raises(UserError, match=words):
        wrapper_of(nn.Conv2d(1, 1, 1))


def test_training_step_and_resuming():
    """The groups hold what torch can save and load."""
    model = Segmentor()
    wrapper = wrapper_of(model)
    model.backbone(torch.rand(2, 3, 64, 64))[3].sum().backward()
    wrapper.step()
    state = copy.deepcopy(wrapper.state_dict())
    again = wrapper_of(Segmentor())
    again.load_state_dict(state)
    rates = [[g['lr'] for g in w.optimizer.param_groups] for w in (wrapper, again)]
    assert rates[0] == rates[1]
