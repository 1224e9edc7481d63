"""Reading configs, and what they need to be installed."""

import importlib.util

import pytest
from helpers import DETECTION, SEGMENTATION, TINY
from mmengine.config import Config

from overlock_mm import OverLoCK
from overlock_mm.config.load import (
    _require_working,
    build_model,
    load_config,
    load_run_config,
    toolbox_of,
)
from overlock_mm.errors import UserError

# types are classes; no default_scope, no hooks, no runtime
PURE_PYTHON = """
from mmengine.config import read_base
from mmseg.models import EncoderDecoder, FCNHead
from mmengine.model.weight_init import PretrainedInit

with read_base():
    from .base import *

model.update(type=EncoderDecoder, decode_head=dict(
    type=FCNHead, in_channels=40, in_index=3, channels=8, num_classes=2, num_convs=1))
model['backbone'].update(init_cfg=dict(type=PretrainedInit, checkpoint='~/w.pth'))
"""
BASE = f"""
from overlock_mm import OverLoCK

model = dict(backbone=dict(type=OverLoCK, arch={TINY}))
"""


@pytest.fixture
def pure_python(tmp_path):
    (tmp_path / 'base.py').write_text(BASE)
    (tmp_path / 'pure.py').write_text(PURE_PYTHON)
    return tmp_path / 'pure.py'


def test_pure_python(pure_python, monkeypatch):
    monkeypatch.setenv('HOME', '/home/someone')
    cfg = load_config(pure_python, {'model.backbone.drop_path_rate': 0.5})
    assert toolbox_of(cfg) == 'mmseg'
    assert cfg.model.backbone.init_cfg.checkpoint == '/home/someone/w.pth'
    model = build_model(cfg)
    assert isinstance(model.backbone, OverLoCK)
    assert model.backbone.sub_blocks4[-1].drop_path.drop_prob == 0.5


@pytest.mark.parametrize('suffix', ['py', 'json', 'yaml'])
def test_dumps_of_it(pure_python, tmp_path, suffix):
    path = tmp_path / f'dumped.{suffix}'
    load_config(pure_python).dump(path)
    cfg = load_config(path)
    assert toolbox_of(cfg) == 'mmseg'
    assert cfg.custom_imports.imports == [
        'overlock_mm',
        'overlock_mm.hooks',
        'overlock_mm.datasets',
    ]
    assert isinstance(build_model(cfg).backbone, OverLoCK)


@pytest.mark.parametrize(
    'entries, toolbox',
    [
        (dict(default_scope='mmdet'), 'mmdet'),
        (dict(default_scope='mmengine', model=dict(type='mmdet.MaskRCNN')), 'mmdet'),
        (dict(model=dict(type='mmseg.EncoderDecoder')), 'mmseg'),
        (
            dict(
                model=dict(type='MyModel'),
                train_dataloader=dict(dataset=dict(type='mmseg.ADE20KDataset')),
            ),
            'mmseg',
        ),
        (dict(model=dict(type='mmdet.A'), hooks=[dict(type='mmseg.B')]), 'mmdet'),
    ],
)
def test_toolbox(entries, toolbox):
    assert toolbox_of(Config(entries)) == toolbox


@pytest.mark.parametrize(
    'entries', [{}, dict(default_scope='mmpose'), dict(model=dict(type='MaskRCNN'))]
)
def test_no_toolbox(entries):
    with pytest.raises(UserError, match="write default_scope = 'mmdet' or 'mmseg'"):
        toolbox_of(Config(entries))


def test_missing_config(tmp_path):
    missing = SEGMENTATION.with_name('upernet_overlock_x.py')
    with pytest.raises(UserError, match='x.py does not exist.*upernet_overlock_xt.py'):
        load_config(missing)
    (tmp_path / 'w.pth').touch()
    with pytest.raises(UserError, match='is not a config; configs end in .py'):
        load_config(tmp_path / 'w.pth')


@pytest.mark.parametrize(
    'text, message',
    [
        ("_base_ = 'none.py'", 'none.py'),
        ('model = dict(', 'SyntaxError'),
        ("custom_imports = dict(imports=['no_such_package'])", 'no_such_package'),
    ],
)
def test_a_config_that_cannot_be_read(tmp_path, text, message):
    (tmp_path / 'c.py').write_text(text)
    with pytest.raises(UserError, match=f'(?s)c.py cannot be read: .*{message}'):
        load_config(tmp_path / 'c.py')


@pytest.mark.parametrize(
    'given, entry, expected',
    [
        (None, '', 'work_dirs/c'),
        (None, "work_dir = 'there'", 'there'),
        ('~/here', "work_dir = 'there'", '/home/someone/here'),
    ],
)
def test_work_dir(tmp_path, monkeypatch, given, entry, expected):
    monkeypatch.setenv('HOME', '/home/someone')
    (tmp_path / 'c.py').write_text(f"default_scope = 'mmseg'\n{entry}\n")
    cfg = load_run_config(tmp_path / 'c.py', work_dir=given, launcher='slurm')
    assert (cfg.work_dir, cfg.launcher) == (expected, 'slurm')


@pytest.mark.parametrize(
    'absent, config, message',
    [
        ('mmcv', SEGMENTATION, 'mmcv is not installed.*pip install.*mmcv'),
        ('mmseg', SEGMENTATION, 'MMSegmentation is not installed.*mmsegmentation'),
        ('mmdet', DETECTION, 'MMDetection is not installed.*mmdet'),
        ('mmcv._ext', DETECTION, 'without its compiled ops.*MMCV_WITH_OPS=1'),
    ],
)
def test_missing_toolbox(monkeypatch, absent, config, message):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, 'find_spec', lambda name: None if name == absent else find(name)
    )
    with pytest.raises(UserError, match=message):
        load_config(config)


def test_a_toolbox_that_lacks_a_package(monkeypatch):
    def without_ftfy(name):
        raise ModuleNotFoundError(f'import of {name} needs it', name='ftfy')

    monkeypatch.setattr(importlib, 'import_module', without_ftfy)
    with pytest.raises(UserError, match='MMSegmentation needs ftfy.*pip install ftfy'):
        _require_working('mmseg')


@pytest.mark.parametrize(
    'base',
    [
        'mmseg::upernet/upernet_r50_4xb4-80k_ade20k-512x512.py',
        'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
    ],
)
def test_bases_of_a_toolbox(base, tmp_path):
    """mmengine knows MMSegmentation's package by the name mmsegmentation alone."""
    path = tmp_path / 'a.py'
    path.write_text(f'_base_ = {[base]}')
    assert load_config(path).model.backbone.depth == 50


def test_a_config_of_a_toolbox_by_its_name():
    assert load_config('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py').model.neck
    with pytest.raises(UserError, match='mmseg::fcn/nothing.py does not exist'):
        load_config('mmseg::fcn/nothing.py')


def test_a_config_of_a_toolbox_can_be_swapped(tmp_path, monkeypatch):
    from overlock_mm.apis.swap import write_swapped

    monkeypatch.chdir(tmp_path)
    name = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
    text, _, path = write_swapped(name, arch='t', pretrained=False)
    assert '_base_ = ' in text and path.name == 'retinanet_r18_fpn_1x_coco_t.py'
    assert load_config(path).model.neck.in_channels[-1] == 640
