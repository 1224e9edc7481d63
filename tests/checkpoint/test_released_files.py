"""Files of every released layout load whole, and compute what the released code does.

The files themselves cannot be had in a test. Theirs are the names and shapes (parity/),
and the values are those of the parity cases.
"""

import argparse
import json
from collections import OrderedDict
from functools import cache

import numpy as np
import pytest
import timm
import torch
from helpers import (
    CASES,
    MANIFEST,
    ROOT,
    build,
    check_outputs,
    listing,
    parity_image,
    parity_value,
)
from mmengine.config import Config

import overlock_mm.timm  # noqa: F401
from overlock_mm import OverLoCK, load_checkpoint
from overlock_mm.checkpoint import read_weights, unwrap
from overlock_mm.config.edit import without_pretrained
from overlock_mm.config.load import build_model
from overlock_mm.convert import convert_checkpoint

HEADS = json.loads((CASES / 'heads.json').read_text())
NAMES = dict(xt='xt', t='tiny', s='small', b='base')
# Rows of the table of released weights; the keys that ImageNet files may have.
IMAGENET = [
    (arch, form, key)
    for form in ('training', 'deploy')
    for arch, key in zip(NAMES, ('', 'state_dict', 'model', 'state_dict_ema'), strict=True)
]
SLOW = [('s', 'training'), ('s', 'deploy'), ('b', 'deploy')]
DENSE = [
    *(f'maskrcnn{s}_overlock_{NAMES[a]}_coco' for s in ('1x', '3x') for a in 'tsb'),
    *(f'upernet_overlock_{NAMES[a]}_ade20k' for a in 'tsb'),
]
CLASSES = {
    'detection': tuple(f'thing {i}' for i in range(80)),
    'segmentation': tuple(f'stuff {i}' for i in range(150)),
}


def parity_state(shapes):
    values = {
        k: torch.from_numpy(np.asarray(parity_value(k, v))) for k, v in shapes.items()
    }
    return {k: v.float() if v.is_floating_point() else v for k, v in values.items()}


@cache
def backbone_state(task, arch):
    """Entries of a backbone or classifier in training form, as parity/ lists them."""
    with torch.device('meta'):
        state = build(task, arch).state_dict()
    shapes = {k: tuple(v.shape) for k, v in state.items()}
    assert listing(shapes)[1] == MANIFEST[f'{task}_{arch}_train']['sha256']
    return parity_state(shapes)


@cache
def head_state(family, arch):
    channels = OverLoCK.channels_of(arch)

    def size(n):
        return sum(
            channels[int(p[1])] if p[0] == 'C' else int(p) for p in str(n).split('+')
        )

    return parity_state({k: tuple(map(size, v)) for k, v in HEADS[family].items()})


def imagenet_file(arch, form, key):
    state = backbone_state('cls', arch)
    if form == 'deploy':
        model = build('cls', arch)
        model.load_state_dict(state)
        model.switch_to_deploy()
        state = model.state_dict()
        shapes = {k: tuple(v.shape) for k, v in state.items()}
        assert listing(shapes)[1] == MANIFEST[f'cls_{arch}_deploy']['sha256']
    if not key:
        return state
    args = argparse.Namespace(model=f'overlock_{arch}', lr=1e-3)
    return {'epoch': 300, 'arch': arch, 'args': args, 'metric': 84.2, key: state}


def dense_file(name):
    """What the toolboxes of the released code save."""
    family = 'upernet' if 'upernet' in name else 'mask_rcnn'
    task = dict(upernet='seg', mask_rcnn='det')[family]
    arch = arch_of(name)
    state = OrderedDict((f'backbone.{k}', v) for k, v in backbone_state(task, arch).items())
    state.update(head_state(family, arch))
    classes = CLASSES['segmentation' if task == 'seg' else 'detection']
    meta = dict(
        epoch=36 if '3x' in name else 12,
        iter=160000,
        time='Wed Jan  1 00:00:00 2025',
        env_info='sys.platform: linux',
        config="model = dict(type='...')",
        seed=None,
        CLASSES=classes,
        PALETTE=[[i, 2 * i % 256, 0] for i in range(len(classes))],
    )
    moments = {0: dict(step=12, exp_avg=torch.ones(3), exp_avg_sq=torch.ones(3))}
    optimizer = dict(state=moments, param_groups=[dict(lr=1e-4, params=[0])])
    return dict(meta=meta, state_dict=state, optimizer=optimizer)


def arch_of(name):
    return next(a for a, long in NAMES.items() if f'_{long}_' in name)


def config_of(name):
    arch = arch_of(name)
    if 'upernet' in name:
        return ROOT / f'configs/segmentation/upernet_overlock_{arch}.py'
    return ROOT / f'configs/detection/mask_rcnn_overlock_{arch}_{name[8:10]}.py'


def model_of(config):
    cfg = Config.fromfile(config)
    without_pretrained(cfg.model)
    return build_model(cfg)


def check_parity(model, case, name='out'):
    size = case.split('_')[2].split('x')
    image = torch.from_numpy(parity_image((int(size[0]), 3, *map(int, size[1:])))).float()
    with torch.no_grad():
        check_outputs(model.eval()(image), np.load(CASES / f'{case}.npz'), 1e-3, name)


@pytest.mark.parametrize(
    'arch, form, key',
    [
        pytest.param(
            *case,
            marks=[pytest.mark.slow] if case[0] in 'sb' else [],
        )
        for case in IMAGENET
    ],
    ids=lambda v: v or 'bare',
)
def test_imagenet_files(tmp_path, log, arch, form, key):
    path = tmp_path / 'weights.pth'
    content = imagenet_file(arch, form, key)
    torch.save(content, path)
    deploy = form == 'deploy'
    # as a classifier
    model = timm.create_model(f'overlock_{arch}', deploy=deploy)
    report = load_checkpoint(model, path)
    assert report.complete and not report.skipped and not report.kept
    assert len(report.loaded) == len(unwrap(content, '')[1])
    assert f'{len(report.loaded)} keys loaded' in log[-1]
    case, output = f'cls_{arch}_1x224x224_eval', 'out'
    if arch in ('xt', 't'):  # whose case has both forms
        case, output = f'cls_{arch}_1x224x224_reparam', 'reparam' if deploy else 'out'
    check_parity(model, case, output)
    # as the backbone of a segmentor
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    backbone = OverLoCK(arch, deploy=deploy, init_cfg=init_cfg)
    backbone.init_weights()
    printed = next(text for text in log if 'segmentation layout' in text)
    heads = sum(k.startswith(('head.', 'aux_head.')) for k in model.state_dict())
    assert f'{len(report.loaded) - heads} keys loaded' in printed
    assert f'{heads} keys only in the file, skipped: classifier heads' in printed
    own = backbone.state_dict()
    for name, value in model.state_dict().items():
        if not name.startswith(('head.', 'aux_head.')):
            assert torch.equal(own[name], value), name


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(n, marks=[pytest.mark.slow] if 'tiny' not in n or '3x' in n else [])
        for n in DENSE
    ],
)
def test_detectors_and_segmentors(tmp_path, log, name):
    path = tmp_path / f'{name}.pth'
    content = dense_file(name)
    torch.save(content, path)
    model = model_of(config_of(name))
    report = load_checkpoint(model, path)
    assert report.complete and not (report.skipped or report.kept or report.ignored)
    assert set(report.loaded) == set(content['state_dict'])
    assert f'{len(report.loaded)} keys loaded' in log[-1]
    task = 'seg' if 'upernet' in name else 'det'
    check_parity(model.backbone, f'{task}_{arch_of(name)}_1x64x64_eval')
    for key, value in model.state_dict().items():
        assert torch.equal(value, content['state_dict'][key]), key

    converted = convert_checkpoint(read_weights(path), source=str(path))
    assert ROOT / converted['meta']['overlock_mm']['config'] == config_of(name)
    assert 'optimizer' not in converted


def test_cascade_heads_are_the_stock_ones():
    config = 'configs/detection/cascade_mask_rcnn_overlock_t.py'
    model = model_of(ROOT / config)
    heads = {k: v.shape for k, v in model.state_dict().items() if 'backbone.' not in k}
    assert heads == {k: v.shape for k, v in head_state('cascade_mask_rcnn', 't').items()}
    converted = convert_checkpoint(model.state_dict())
    assert converted['meta']['overlock_mm']['config'] == config


def test_config_that_a_converted_file_is_for():
    content = dense_file('maskrcnn1x_overlock_tiny_coco')
    for epoch, source, schedule in (
        (12, 'w.pth', '1x'),
        (36, 'w.pth', '3x'),
        (12, 'maskrcnn3x.pth', '3x'),
        (None, 'w.pth', '1x'),
    ):
        content['meta']['epoch'] = epoch
        origin = convert_checkpoint(content, source=source)['meta']['overlock_mm']
        assert origin['config'] == f'configs/detection/mask_rcnn_overlock_t_{schedule}.py'
    content['state_dict']['roi_head.bbox_head.fc_cls.weight'] = torch.ones(4, 1024)
    assert convert_checkpoint(content)['meta']['overlock_mm']['config'] is None
