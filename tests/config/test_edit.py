"""Editing configs that are written in different ways."""

import pytest
from helpers import TINY
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.model.weight_init import PretrainedInit
from mmengine.registry import HOOKS

from overlock_mm import OverLoCK
from overlock_mm.config import edit
from overlock_mm.errors import UserError

PRETRAINED = ['Pretrained', 'mmengine.Pretrained', 'mmdet.Pretrained', PretrainedInit]
PRETRAINED += ['mmengine.model.weight_init.PretrainedInit']
BACKBONES = ['OverLoCK', 'mmdet.OverLoCK', 'mmengine.OverLoCK', OverLoCK]
BACKBONES += ['overlock_mm.models.overlock.OverLoCK']


class MyHook(EMAHook):
    """A hook that a user derived."""


@pytest.mark.parametrize('kind', ['EMAHook', 'mmengine.EMAHook', 'mmseg.EMAHook', MyHook])
def test_ways_to_name_a_class(kind):
    assert edit.is_a(dict(type=kind), EMAHook, HOOKS, 'mmdet')
    assert not edit.is_a(dict(type=kind), OverLoCK, HOOKS, 'mmdet')


@pytest.mark.parametrize('node', [None, {}, dict(type='NoSuchHook'), 'EMAHook', [1]])
def test_what_names_no_class(node):
    assert edit.class_of(node, HOOKS, 'mmseg') is None
    assert not edit.is_a(node, EMAHook, HOOKS)


@pytest.mark.parametrize('kind', PRETRAINED)
def test_pretrained_weights_of_a_config(kind):
    pretrained = dict(type=kind, checkpoint='w.pth')
    constant = dict(type='Constant', val=0)
    model = dict(a=dict(init_cfg=[constant, pretrained]), b=[dict(init_cfg=pretrained)])
    model.update(init_cfg=pretrained, pretrained='open-mmlab://resnet50_v1c')
    model['c'] = dict(pretrained=True, init_cfg=(pretrained,))
    cfg = Config(dict(model=model))
    edit.without_pretrained(cfg.model)
    assert cfg.model == dict(
        a=dict(init_cfg=[constant]),
        b=[dict(init_cfg=None)],
        c=dict(pretrained=False, init_cfg=[]),
        init_cfg=None,
        pretrained=None,
    )


@pytest.mark.parametrize(
    'hooks, expected',
    [
        ({}, {}),
        (dict(default_hooks=None), {}),
        (dict(default_hooks=dict(timer=dict(type='IterTimerHook'))), {}),
        (dict(default_hooks=dict(loading=None)), {}),
        (dict(default_hooks=dict(loading=dict(trust=True))), dict(trust=True)),
    ],
)
def test_loading_options(hooks, expected):
    """The hook is in the config itself, not only in what is returned."""
    cfg = Config(hooks)
    options = edit.loading_options(cfg)
    assert cfg.default_hooks.loading == dict(expected, type='StrictLoadingHook')
    options.strict = False
    assert cfg.default_hooks.loading.strict is False
    timer = (hooks.get('default_hooks') or {}).get('timer')
    assert cfg.default_hooks.get('timer') == timer


@pytest.mark.parametrize(
    'given, failed',
    [
        ({}, False),
        (dict(custom_imports=None), False),
        (dict(custom_imports=dict(imports='overlock_mm')), False),
        (
            dict(custom_imports=dict(imports=['json'], allow_failed_imports=True)),
            True,
        ),
    ],
)
def test_imports(given, failed):
    cfg = Config(given)
    edit.add_imports(cfg)
    edit.add_imports(cfg)
    imports = cfg.custom_imports.imports
    assert imports.count('overlock_mm') == imports.count('overlock_mm.hooks') == 1
    assert ('json' in imports) == failed == cfg.custom_imports.allow_failed_imports


def config(work_dir, kind='OverLoCK', **entries):
    model = dict(type='M', backbone=dict(type=kind, arch=TINY))
    return Config(dict(model=model, work_dir=str(work_dir), **entries))


@pytest.mark.parametrize('kind', BACKBONES)
def test_a_checkpoint_replaces_pretrained_weights(kind, tmp_path):
    """Whether it does is decided by what is going to be loaded."""

    def replaces(**entries):
        return edit.replaces_pretrained(config(tmp_path, kind, **entries))

    assert edit.has_overlock(config(tmp_path, kind))
    assert not replaces() and not replaces(resume=False) and not replaces(load_from=None)
    assert not replaces(resume=True), 'the work dir is empty: nothing is loaded'
    assert replaces(load_from='w.pth') and replaces(load_from='w.pth', resume=True)
    for options, expected in (
        (dict(strict=False), False),
        (dict(prefix='backbone.'), False),
        (dict(ignore_mismatched=['decode_head.conv_seg']), True),
        (dict(ignore_mismatched=['back']), False),
        (dict(ignore_mismatched='backbone.patch_embed1'), False),
        (dict(type='LoggerHook'), False),
        (None, True),
    ):
        hooks = dict(loading=options)
        assert replaces(load_from='w.pth', default_hooks=hooks) == expected, options
    resumed = dict(load_from='w.pth', resume=True)
    assert replaces(**resumed, default_hooks=dict(loading=dict(prefix='backbone.')))
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_3.pth'))
    assert replaces(resume=True) and not replaces()
    latest = edit.starting_checkpoint(config(tmp_path, resume=True))
    assert latest == str(tmp_path / 'iter_3.pth')


@pytest.mark.parametrize('kind', ['Pretrained', 'mmengine.Pretrained', PretrainedInit])
@pytest.mark.parametrize('inside', [list, dict])
def test_pretrained_weights_of_a_whole_model(kind, inside, tmp_path):
    """mmengine would load what fits of them; load_from is strict."""
    init_cfg = dict(type=kind, checkpoint='w.pth', prefix='student.')
    others = [dict(type='Normal', std=0.01)] if inside is list else []
    cfg = config(tmp_path, resume=True)
    cfg.model.init_cfg = [*others, init_cfg] if inside is list else init_cfg
    assert 'load_from=w.pth' in edit.move_pretrained_model(cfg)
    assert (cfg.load_from, cfg.resume, cfg.model.init_cfg) == ('w.pth', False, others)
    assert cfg.default_hooks.loading == dict(type='StrictLoadingHook', prefix='student.')


def test_pretrained_weights_of_a_whole_model_stay(tmp_path):
    """Where a checkpoint replaces them anyway, and in models without an OverLoCK."""
    init_cfg = dict(type='Pretrained', checkpoint='w.pth')
    for cfg in (config(tmp_path, load_from='other.pth'), config(tmp_path, 'mmdet.ResNet')):
        cfg.model.init_cfg = init_cfg
        before = cfg.to_dict()
        assert edit.move_pretrained_model(cfg) is None and cfg.to_dict() == before
    assert edit.move_pretrained_model(config(tmp_path)) is None


def test_other_models_keep_their_pretrained_weights(tmp_path):
    """mmengine loads of a checkpoint what fits, so it may bring too little."""
    cfg = config(tmp_path, 'mmdet.ResNet', load_from='w.pth')
    assert not edit.replaces_pretrained(cfg)
    assert not edit.replaces_pretrained(Config(dict(load_from='w.pth')))


def test_home_folders(monkeypatch):
    monkeypatch.setenv('HOME', '/home/someone')
    weights = [dict(type='mmengine.Pretrained', checkpoint='~/a.pth'), dict(type='Xavier')]
    cfg = Config(dict(load_from='~/w.pth', work_dir='~/runs', model=dict(a=[{}])))
    cfg.model.b = dict(init_cfg=weights, checkpoint='~/no-file')
    edit.expand_user(cfg)
    assert (cfg.load_from, cfg.work_dir) == ('/home/someone/w.pth', '/home/someone/runs')
    assert cfg.model.b.init_cfg[0].checkpoint == '/home/someone/a.pth'
    assert cfg.model.b.checkpoint == '~/no-file'
    cfg = Config(dict(load_from='https://x.org/~me/w.pth'))
    edit.expand_user(cfg)
    assert cfg.load_from == 'https://x.org/~me/w.pth'


def test_loaders_without_workers():
    several = dict(num_workers=2, persistent_workers=True, prefetch_factor=4)
    cfg = Config(dict(a=dict(several, num_workers=0), b=several, c=dict(num_workers=0)))
    cfg.d = dict(persistent_workers=True)  # without workers is torch's default
    notes = edit.fit_workers(cfg, 'a', 'b', 'c', 'd', 'none')
    assert cfg.a == dict(num_workers=0) and cfg.b == several and cfg.d == {}
    assert notes == [
        'a has num_workers=0, so its persistent_workers and prefetch_factor is left out.',
        'd has num_workers=0, so its persistent_workers is left out.',
    ]


def test_missing_keys(tmp_path):
    (tmp_path / 'some.py').write_text('model, train_cfg = {}, None')
    cfg = Config.fromfile(tmp_path / 'some.py')
    edit.require_keys(cfg, 'model')
    with pytest.raises(UserError, match='some.py has no train_cfg, optim_wrapper; add'):
        edit.require_keys(cfg, 'model', 'train_cfg', 'optim_wrapper')


@pytest.mark.parametrize(
    'given, expected',
    [
        (dict(type='A'), ['A']),
        ([dict(type='A'), dict(type='B')], ['A', 'B']),
        (dict(type='Evaluator', metrics=[dict(type='A'), dict(type='B')]), ['A', 'B']),
        (dict(metrics=dict(type='A')), ['A']),
        (None, []),
    ],
)
def test_evaluators(given, expected):
    cfg = Config(dict(test_evaluator=given))
    found = edit.evaluators(cfg)
    assert [e.type for e in found] == expected
    for evaluator in found:
        evaluator['metric'] = 'bbox'
    assert str(cfg.to_dict()).count('bbox') == len(expected)


def test_inner_datasets():
    a, b = dict(type='A', data_root='a'), dict(type='B', pipeline=[])
    repeated = dict(type='RepeatDataset', times=2, dataset=b)
    both = dict(type='ConcatDataset', datasets=[a, repeated])
    for given, expected in ((a, [a]), (repeated, [b]), (both, [a, b])):
        assert list(edit.inner_datasets(Config(dict(d=given)).d)) == expected
