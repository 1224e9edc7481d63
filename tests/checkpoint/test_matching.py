"""Pretrained weights load whole, or nothing loads and the message says what differs."""

import copy

import pytest
import torch
from helpers import TINY, Segmentor, changed, classifier_state, tiny
from mmengine.config import ConfigDict
from mmengine.model import PretrainedInit
from mmengine.registry import MODELS
from torch import nn

from overlock_mm import OverLoCK, checkpoint, fold, load_checkpoint
from overlock_mm.checkpoint import LoadOptions
from overlock_mm.errors import CheckpointError


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


def test_the_log_says_what_was_initialised_how(tmp_path, log):
    model = load(tmp_path / 'w.pth', classifier_state(tiny()))
    said = dict(text.split(' - ', 1) for text in log if 'torch.Size' in text)
    said = {name.strip(): text for name, text in said.items()}
    assert set(said) == dict(model.named_parameters()).keys()
    for name, text in said.items():
        fresh = name.startswith('extra_norm.')
        assert ('Pretrained: load from' in text) != fresh, name
        assert ('The value is the same' in text) == fresh, name


def test_second_call_keeps_trained_weights(tmp_path):
    model = load(tmp_path / 'w.pth', classifier_state(tiny()))
    torch.nn.init.zeros_(model.blocks1[0].dwconv.weight)
    model.init_weights()
    assert not model.blocks1[0].dwconv.weight.any()


def test_a_file_of_something_else(tmp_path):
    with pytest.raises(RuntimeError, match='contains a list, but no state dict'):
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


@pytest.mark.parametrize('channels', [1, 2, 5])
def test_other_channels_of_the_image(tmp_path, log, channels):
    """The first convolution is adapted as timm does it, and the report says so."""
    name = 'patch_embed1.0.weight'
    state = classifier_state(tiny())
    model = load(tmp_path / 'w.pth', state, in_channels=channels)
    found = model.state_dict()[name]
    if channels == 1:
        expected = state[name].sum(dim=1, keepdim=True)
    else:
        expected = torch.cat([state[name]] * 2, dim=1)[:, :channels] * 3 / channels
    assert torch.allclose(found, expected)
    report = next(text for text in log if text.startswith('Weights of'))
    assert f'1 key  of them adapted from 3 to {channels} channels: {name}' in report
    others = {k: v for k, v in state.items() if k != name}
    assert_loaded(model, {**others, name: found}, fresh=('extra_norm.',))


def test_a_trained_model_keeps_its_channels(tmp_path):
    torch.save(Segmentor().state_dict(), tmp_path / 'w.pth')
    with pytest.raises(CheckpointError, match='has another shape: backbone.patch_embed1.0'):
        load_checkpoint(Segmentor(in_channels=5), tmp_path / 'w.pth')


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
            '1 key is missing from the file: blocks3.0.dwconv.bias',
        ),
        (
            lambda: ({**classifier_state(tiny()), 'neck.weight': torch.ones(1)}, {}),
            '1 key is not in the model: neck.weight',
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
            r'have another shape: patch_embed1.0.weight \(file \(8, 3, 3, 3\), model',
        ),
        (
            lambda: (tiny().state_dict(), dict(context_skip=True)),
            'keys are missing from the file: .*h_proj.* is .*segmentation layout.*; '
            'the model is .*detection layout.*To make them fit, use context_skip=False',
        ),
        (
            lambda: (tiny(context_skip=True).state_dict(), {}),
            'not in the model: .*h_proj.*context_skip=True, for a detection file',
        ),
        (
            lambda: (tiny(deploy=True).state_dict(), {}),
            'missing from the file: .*origin_bn.*deploy=True, because merged branches',
        ),
        (
            lambda: (without(tiny().state_dict(), 'extra_norm.2.weight'), {}),
            'missing from the file: extra_norm.2.weight',
        ),
        (
            lambda: (classifier_state(tiny()), dict(prefix='backbone.')),
            "no key that starts with prefix='backbone.'; its keys start with aux_head",
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


class Derived(PretrainedInit):
    """A user's own; it must not load what fits, either."""


@pytest.mark.parametrize('wrap', [dict, ConfigDict, lambda **c: [c], lambda **c: (c,)])
@pytest.mark.parametrize(
    'kind',
    [
        'Pretrained',
        'mmengine.Pretrained',
        'mmseg.Pretrained',
        'mmengine.model.weight_init.PretrainedInit',
        PretrainedInit,
        Derived,
    ],
    ids=str,
)
def test_every_way_to_write_pretrained(tmp_path, kind, wrap):
    """All load strictly, and leave the init_cfg as it was."""
    path, state = tmp_path / 'w.pth', classifier_state(changed(tiny()))
    torch.save(without(state, 'blocks3.0.dwconv.bias'), path)
    given = wrap(type=kind, checkpoint=str(path))
    model = OverLoCK(TINY, init_cfg=given)
    for _ in range(2):
        with pytest.raises(CheckpointError, match='1 key is missing .* nothing was|noth'):
            model.init_weights()
        assert model.init_cfg == given and not model.is_init
        assert not any(hasattr(m, '_params_init_info') for m in model.modules())
    torch.save(state, path)
    before = copy.deepcopy(model.init_cfg)
    model.init_weights()
    assert model.init_cfg == before and model.is_init
    assert torch.equal(model.patch_embed1[0].weight, state['patch_embed1.0.weight'])


def test_pretrained_weights_come_last(tmp_path):
    state = classifier_state(changed(tiny()))
    torch.save(state, tmp_path / 'w.pth')
    load = dict(type='mmengine.Pretrained', checkpoint=str(tmp_path / 'w.pth'))
    constant = dict(type='Constant', layer=['Conv2d', 'LayerNorm2d'], val=0.5)
    model = OverLoCK(TINY, init_cfg=[load, constant])
    model.init_weights()
    assert torch.equal(model.patch_embed1[0].weight, state['patch_embed1.0.weight'])
    assert (model.high_level_proj.weight != 0.5).all()


def test_pretrained_weights_of_a_part(tmp_path):
    override = dict(type='Pretrained', name='blocks1', checkpoint='w.pth')
    init_cfg = dict(type='Constant', layer='Conv2d', val=0.5, override=override)
    for given in (init_cfg, dict(init_cfg, override=[override])):
        with pytest.raises(CheckpointError, match='a Pretrained in override'):
            OverLoCK(TINY, init_cfg=given).init_weights()


@pytest.mark.parametrize(
    'option, value',
    [
        ('prefix', 3),
        ('strict', 'False'),
        ('trust', 1),
        ('ignore_mismatched', {'a': 1}),
        ('ignore_mismatched', None),
        ('ignore_unexpected', ['']),
        ('ignore_unexpected', [1]),
    ],
)
def test_options_that_cannot_be(option, value):
    with pytest.raises(CheckpointError, match=f'{option}=.* must be'):
        LoadOptions(**{option: value})


META = dict(classes=('a', 'b', 'c'), palette=[[0, 0, 0], [1, 1, 1], [2, 2, 2]])


@pytest.mark.parametrize(
    'meta, expected',
    [
        (dict(dataset_meta=META), META),
        (dict(dataset_meta={k.upper(): v for k, v in META.items()}), META),
        ({k.upper(): v for k, v in META.items()}, META),
        (dict(CLASSES=META['classes']), dict(classes=META['classes'])),
        (dict(epoch=1), None),
        (None, None),
    ],
)
def test_class_names(tmp_path, log, meta, expected):
    """A whole model gets them from the file, whatever it had before."""
    path, model = tmp_path / 'w.pth', Segmentor()
    torch.save(dict(meta=meta, state_dict=model.state_dict()), path)
    model.dataset_meta = before = dict(classes=('person',) * 80)
    report = load_checkpoint(model, path)
    assert model.dataset_meta == report.dataset_meta if expected else before
    assert model.dataset_meta == (expected or before)
    assert ('dataset_meta of the file: 3 class names' in log[-1]) == bool(expected)
    backbone = tiny()
    load_checkpoint(backbone, path)
    assert not hasattr(backbone, 'dataset_meta')


def test_the_report_reads_well(tmp_path, log):
    path = tmp_path / 'w.pth'
    torch.save(dict(state_dict=classifier_state(tiny(in_channels=3))), path)
    load_checkpoint(tiny(), path)
    sizes = 'embed_dims=(8, 16, 32, 32) and depths=(1, 1, 1, 1)'
    number = len(classifier_state(tiny())) - 2
    assert log[-1].splitlines() == [
        f"Weights of {path}, under 'state_dict'",
        f'  file:  OverLoCK with {sizes}, classification layout, training form',
        f'  model: OverLoCK with {sizes}, segmentation layout (context_skip=False), '
        'training form',
        f'  {number:5d} keys loaded',
        '      2 keys only in the file, skipped: classifier heads: head.0.weight, '
        'aux_head.2.bias',
        '      8 keys only in the model, kept: output norms, which ImageNet files do not '
        'have: extra_norm.0.weight, extra_norm.0.bias, extra_norm.1.weight, '
        'extra_norm.1.bias, extra_norm.2.weight, ...',
    ]


def test_a_whole_model(tmp_path):
    source, path = changed(Segmentor()), tmp_path / 'w.pth'
    torch.save(dict(meta=dict(epoch=1), state_dict=source.state_dict()), path)
    model = Segmentor()
    report = load_checkpoint(model, path)
    torch.testing.assert_close(model.state_dict(), source.state_dict(), rtol=0, atol=0)
    assert report.complete and len(report.loaded) == len(source.state_dict())
    assert not report.skipped and not report.kept
    assert f'{len(report.loaded)} keys loaded' in str(report)


def test_a_bare_backbone_finds_itself_in_a_whole_model(tmp_path):
    source, path = changed(Segmentor()), tmp_path / 'w.pth'
    torch.save(source.state_dict(), path)
    model = tiny()
    report = load_checkpoint(model, path)
    assert torch.equal(model.patch_embed1[0].weight, source.backbone.patch_embed1[0].weight)
    (others,) = report.skipped.values()
    assert others == ['decode_head.weight', 'decode_head.bias']
    assert 'parts around the backbone' in str(report) and 'decode_head.weight' in str(
        report
    )


def test_an_imagenet_file_is_no_whole_model(tmp_path):
    path = tmp_path / 'w.pth'
    torch.save(classifier_state(tiny()), path)
    with pytest.raises(RuntimeError, match='missing from the file: decode_head.weight'):
        load_checkpoint(Segmentor(), path)


def test_another_number_of_classes(tmp_path):
    source, path = changed(Segmentor(classes=5)), tmp_path / 'w.pth'
    torch.save(source.state_dict(), path)
    model = Segmentor()
    before = model.decode_head.weight.clone()
    with pytest.raises(RuntimeError, match=r"ignore_mismatched=\['decode_head'\]"):
        load_checkpoint(model, path)
    report = load_checkpoint(model, path, ignore_mismatched=['decode_head'])
    assert (
        list(report.ignored) == ['decode_head.weight', 'decode_head.bias']
        and report.complete
    )
    assert torch.equal(model.decode_head.weight, before)
    assert torch.equal(
        model.backbone.patch_embed1[0].weight, source.backbone.patch_embed1[0].weight
    )


@pytest.mark.parametrize('whole', [False, True])
def test_a_training_file_is_merged_for_a_deploy_model(tmp_path, whole):
    make = Segmentor if whole else tiny
    source, path = make(), tmp_path / 'w.pth'
    torch.save(source.state_dict(), path)
    model = changed(make(deploy=True))
    assert load_checkpoint(model, path).complete
    getattr(source, 'backbone', source).switch_to_deploy()
    torch.testing.assert_close(model.state_dict(), source.state_dict())


def test_unexpected_keys_to_ignore(tmp_path):
    path = tmp_path / 'w.pth'
    torch.save({**tiny().state_dict(), 'neck.weight': torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match='not in the model: neck.weight'):
        load_checkpoint(tiny(), path)
    report = load_checkpoint(tiny(), path, ignore_unexpected=['neck.'])
    assert report.complete and report.skipped == {'ignore_unexpected': ['neck.weight']}


def test_not_strict_must_be_asked_for(tmp_path, log):
    path = tmp_path / 'w.pth'
    torch.save(without(changed(tiny()).state_dict(), 'blocks3.0.dwconv.bias'), path)
    model = tiny()
    with pytest.raises(RuntimeError, match='nothing was loaded'):
        load_checkpoint(model, path)
    assert torch.equal(model.patch_embed1[0].weight, tiny().patch_embed1[0].weight)
    report = load_checkpoint(model, path, strict=False)
    assert report.missing == ['blocks3.0.dwconv.bias'] and not report.complete
    assert '1 key  MISSING from the file: blocks3.0.dwconv.bias' in log[-1]
    assert not torch.equal(model.patch_embed1[0].weight, tiny().patch_embed1[0].weight)


@pytest.mark.parametrize('arch', ['xt', 't', 's', 'b'])
def test_the_arch_is_recognised(tmp_path, arch):
    path = tmp_path / 'w.pth'
    with torch.device('meta'):
        state = OverLoCK(arch, out_indices=(0,)).state_dict()
        full = OverLoCK(arch).state_dict()
    torch.save({k: torch.zeros(v.shape) for k, v in state.items()}, path)
    with pytest.raises(
        RuntimeError, match="The file is OverLoCK-(XT|T|S|B), .*arch='(xt|t|s|b)'"
    ):
        load_checkpoint(tiny(), path)
    assert checkpoint.form_of(full).arch == arch


def test_models_that_take_no_checkpoint(tmp_path):
    path = tmp_path / 'w.pth'
    torch.save(tiny().state_dict(), path)
    with pytest.raises(CheckpointError, match='load first, then fold'):
        load_checkpoint(fold(tiny()), path)
    with pytest.raises(CheckpointError, match='Conv2d is not an OverLoCK, and neither'):
        load_checkpoint(nn.Conv2d(1, 1, 1), path)


@pytest.mark.parametrize('option', ['ignore_mismatched', 'ignore_unexpected'])
def test_prefixes_of_keys(tmp_path, option):
    """A single one needs no list; an empty one would be a prefix of every key."""
    path = tmp_path / 'w.pth'
    state = changed(tiny()).state_dict()
    if option == 'ignore_unexpected':
        state['neck.weight'] = torch.ones(1)
    else:
        state['blocks1.0.dwconv.bias'] = torch.ones(3)
    torch.save(state, path)
    for right in ('neck', 'blocks1.0.dwconv'):
        ok = (right == 'neck') == (option == 'ignore_unexpected')
        if ok:
            assert load_checkpoint(tiny(), path, **{option: right}).complete
        else:
            with pytest.raises(CheckpointError, match='does not fit'):
                load_checkpoint(tiny(), path, **{option: right})
    with pytest.raises(CheckpointError, match=f'{option}=.* must be a list of prefixes'):
        load_checkpoint(tiny(), path, **{option: ['']})


def test_a_whole_model_has_its_output_norms(tmp_path):
    path = tmp_path / 'w.pth'
    state = changed(Segmentor()).state_dict()
    torch.save({k: v for k, v in state.items() if 'extra_norm' not in k}, path)
    with pytest.raises(CheckpointError, match='missing from the file: backbone.extra_norm'):
        load_checkpoint(Segmentor(), path)


def test_what_is_no_checkpoint_of_the_model_says_where_it_goes(tmp_path):
    path = tmp_path / 'w.pth'
    torch.save(classifier_state(tiny()), path)
    with pytest.raises(CheckpointError, match='a backbone alone. Load it with init_cfg'):
        load_checkpoint(Segmentor(), path)
    state = changed(Segmentor(context_skip=True)).state_dict()
    torch.save({k.replace('decode_head', 'neck'): v for k, v in state.items()}, path)
    with pytest.raises(
        CheckpointError, match=r'other heads.*prefix="backbone."\).*context_sk'
    ):
        load_checkpoint(Segmentor(), path)
    torch.save(dict(a=torch.ones(1)), path)
    with pytest.raises(CheckpointError, match='nothing was loaded'):
        load_checkpoint(tiny(), path, strict=False)
    half = {k: v for k, v in tiny().state_dict().items() if 'blocks4' not in k}
    torch.save(half, path)
    with pytest.raises(CheckpointError, match='missing from the file') as error:
        load_checkpoint(tiny(), path)
    assert 'arch=' not in str(error.value)


@pytest.mark.parametrize('wrap', ['module.', '_orig_mod.', 'module._orig_mod.'])
def test_names_of_wrapped_models(tmp_path, wrap):
    path, source = tmp_path / 'w.pth', changed(Segmentor())
    inner = {
        k.replace('backbone.', f'backbone.{wrap}'): v
        for k, v in source.state_dict().items()
    }
    for state in ({f'{wrap}{k}': v for k, v in source.state_dict().items()}, inner):
        torch.save(state, path)
        model = Segmentor()
        assert load_checkpoint(nn.DataParallel(model), path).complete
        torch.testing.assert_close(model.state_dict(), source.state_dict(), rtol=0, atol=0)
    model = Segmentor()
    load_checkpoint(torch.compile(model, backend='eager'), path)
    torch.testing.assert_close(model.state_dict(), source.state_dict(), rtol=0, atol=0)
    model.backbone = torch.compile(model.backbone, backend='eager')
    with pytest.raises(CheckpointError, match='load, then compile'):
        load_checkpoint(model, path)


@pytest.mark.parametrize('key', ['state_dict_ema', 'model_ema', 'ema'])
def test_averaged_weights_come_first(tmp_path, key):
    path, last = tmp_path / 'w.pth', tiny()
    content = {'state_dict': last.state_dict(), key: changed(tiny()).state_dict()}
    torch.save(content, path)
    model = tiny()
    assert load_checkpoint(model, path).key == key
    assert torch.equal(model.patch_embed1[0].weight, last.patch_embed1[0].weight + 1)
    content[key] = dict(decay=torch.tensor(0.9))  # something else of that name
    torch.save(content, path)
    assert load_checkpoint(tiny(), path).key == 'state_dict'


def test_old_files_have_no_counters_of_batches(tmp_path):
    path, source = tmp_path / 'w.pth', changed(tiny())
    state = {k: v for k, v in source.state_dict().items() if 'num_batches' not in k}
    torch.save(state, path)
    report = load_checkpoint(tiny(), path)
    assert report.complete and 'batch counters' in str(report)


def test_odd_keys(tmp_path):
    path = tmp_path / 'w.pth'
    state = {**tiny().state_dict(), 7: torch.ones(1)}
    torch.save(state, path)
    assert load_checkpoint(tiny(), path).complete
    for name, value in (
        ('patch_embed1.6.weight', torch.tensor(1.0)),
        ('sub_blocks3.0.rpb1', torch.tensor(1.0)),
        ('blocks1.0.proj.1.lk_origin.weight', torch.ones(8, 1, 6, 6)),
        ('blocks1.0.proj.1.lk_origin.weight', torch.ones(0)),
    ):
        torch.save({**tiny().state_dict(), name: value}, path)
        for deploy in (False, True):
            with pytest.raises(CheckpointError, match='does not fit'):
                load_checkpoint(tiny(deploy=deploy), path)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_files_are_merged_in_full_precision(tmp_path, dtype):
    path, source = tmp_path / 'w.pth', tiny()
    state = {
        k: v.to(dtype) if v.is_floating_point() else v
        for k, v in source.state_dict().items()
    }
    torch.save(state, path)
    source.load_state_dict(state)
    source.switch_to_deploy()
    model = tiny(deploy=True)
    load_checkpoint(model, path)
    torch.testing.assert_close(model.state_dict(), source.state_dict())
