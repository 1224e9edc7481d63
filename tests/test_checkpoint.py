"""Pretrained weights load whole, or nothing loads and the message says what differs."""

import pytest
import torch
from mmengine.registry import MODELS
from test_overlock import TINY, tiny

from overlock_mm import OverLoCK


def classifier_state(model):
    """The entries of an ImageNet file: the backbone without dense norms, and two heads."""
    state = {
        k: v
        for k, v in model.state_dict().items()
        if not k.startswith(('extra_norm.', 'h_proj.'))
    }
    return {**state, 'head.0.weight': torch.ones(4), 'aux_head.2.bias': torch.ones(2)}


def load(path, state, prefix=None, **kwargs):
    torch.save(state, path)
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    if prefix is not None:
        init_cfg['prefix'] = prefix
    model = MODELS.build(dict(type='OverLoCK', arch=TINY, init_cfg=init_cfg, **kwargs))
    model.before = {k: v.clone() for k, v in model.state_dict().items()}
    model.init_weights()
    return model


def assert_loaded(model, source, fresh=()):
    for name, value in model.state_dict().items():
        expected = model.before if name.startswith(fresh or '-') else source
        assert torch.equal(value, expected[name]), name


def test_names_of_a_distributed_model(tmp_path):
    state = classifier_state(tiny())
    model = load(tmp_path / 'w.pth', {f'module.{k}': v for k, v in state.items()})
    assert_loaded(model, state, fresh=('extra_norm.',))


def test_second_call_keeps_trained_weights(tmp_path):
    model = load(tmp_path / 'w.pth', classifier_state(tiny()))
    torch.nn.init.zeros_(model.blocks1[0].dwconv.weight)
    model.init_weights()
    assert not model.blocks1[0].dwconv.weight.any()


def test_a_file_of_something_else(tmp_path):
    with pytest.raises(RuntimeError, match='holds a list'):
        load(tmp_path / 'w.pth', [1, 2])


@pytest.mark.parametrize('wrapper', [None, 'state_dict', 'model', 'state_dict_ema'])
@pytest.mark.parametrize('context_skip', [False, True])
def test_classifier_file(tmp_path, wrapper, context_skip):
    state = classifier_state(tiny())
    model = load(
        tmp_path / 'w.pth',
        {wrapper: state} if wrapper else state,
        context_skip=context_skip,
    )
    assert_loaded(model, state, fresh=('extra_norm.', 'h_proj.'))


@pytest.mark.parametrize('context_skip', [False, True])
def test_dense_file_with_prefix(tmp_path, context_skip):
    state = tiny(context_skip=context_skip).state_dict()
    wrapped = {f'backbone.{k}': v for k, v in state.items()}
    wrapped['decode_head.conv_seg.bias'] = torch.ones(2)
    model = load(
        tmp_path / 'w.pth',
        dict(state_dict=wrapped),
        prefix='backbone',
        context_skip=context_skip,
    )
    assert_loaded(model, state)


@pytest.mark.parametrize('out_indices', [(0,), (1,), (2,), (0, 3)], ids=str)
@pytest.mark.parametrize('dense', [False, True])
def test_part_of_the_backbone(tmp_path, out_indices, dense):
    source = tiny(context_skip=True)
    state = source.state_dict() if dense else classifier_state(source)
    model = load(tmp_path / 'w.pth', state, out_indices=out_indices, context_skip=True)
    assert_loaded(model, state, fresh=() if dense else ('extra_norm.', 'h_proj.'))


def test_inside_a_model(tmp_path):
    """A detector or segmentor initialises its backbone through the same call."""
    from mmseg.registry import MODELS as SEG
    from mmseg.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    state = classifier_state(tiny())
    torch.save(state, tmp_path / 'w.pth')
    model = SEG.build(
        dict(
            type='EncoderDecoder',
            backbone=dict(
                type='OverLoCK',
                arch=TINY,
                init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'w.pth')),
            ),
            decode_head=dict(
                type='FCNHead',
                in_channels=40,
                in_index=3,
                channels=4,
                num_classes=2,
                norm_cfg=dict(type='BN'),
            ),
        )
    )
    model.init_weights()
    assert torch.equal(
        model.backbone.state_dict()['blocks1.0.proj.4.weight'],
        state['blocks1.0.proj.4.weight'],
    )


def without(state, name):
    return {k: v for k, v in state.items() if k != name}


@pytest.mark.parametrize(
    'make, message',
    [
        (
            lambda: (without(classifier_state(tiny()), 'blocks3.0.dwconv.bias'), {}),
            '1 entries are missing from the file: blocks3.0.dwconv.bias',
        ),
        (
            lambda: ({**classifier_state(tiny()), 'neck.weight': torch.ones(1)}, {}),
            '1 entries are not in the model: neck.weight',
        ),
        (
            lambda: (
                {**classifier_state(tiny()), 'rpb': torch.ones(1)},
                dict(out_indices=(0,)),
            ),
            'not in the model: rpb',
        ),
        (
            lambda: (
                classifier_state(OverLoCK(dict(TINY, embed_dims=(16, 16, 32, 32)))),
                {},
            ),
            r'another shape: patch_embed1.0.weight \(file \(8, 3, 3, 3\), model',
        ),
        (
            lambda: (tiny().state_dict(), dict(context_skip=True)),
            'missing from the file: .*h_proj',
        ),
        (lambda: (tiny(context_skip=True).state_dict(), {}), 'not in the model: .*h_proj'),
        (
            lambda: (tiny(deploy=True).state_dict(), {}),
            'missing from the file: .*origin_bn',
        ),
        (lambda: (tiny().state_dict(), dict(deploy=True)), 'not in the model: .*origin_bn'),
        (
            lambda: (without(tiny().state_dict(), 'extra_norm.2.weight'), {}),
            'missing from the file: extra_norm.2.weight',
        ),
        (
            lambda: (classifier_state(tiny()), dict(prefix='backbone.')),
            'missing from the file',
        ),
    ],
)
def test_other_differences_are_errors(tmp_path, make, message):
    state, kwargs = make()
    prefix = kwargs.pop('prefix', None)
    torch.save(state, tmp_path / 'w.pth')
    model = OverLoCK(
        TINY,
        **kwargs,
        init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'w.pth'), prefix=prefix),
    )
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=message):
        model.init_weights()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_missing_file(tmp_path):
    model = OverLoCK(
        TINY, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'none.pth'))
    )
    with pytest.raises(FileNotFoundError, match='none.pth'):
        model.init_weights()


def test_other_initialisers_still_work():
    model = OverLoCK(TINY, init_cfg=[dict(type='Constant', layer='Conv2d', val=0.5)])
    model.init_weights()
    assert (model.blocks1[0].proj[4].weight == 0.5).all()
