"""From a stock config to a training with another backbone."""

import pytest
import torch
from helpers import TINY

from overlock_mm import OverLoCK
from overlock_mm.apis.swap import write_swapped
from overlock_mm.apis.test import test as evaluate
from overlock_mm.apis.train import train
from overlock_mm.models import TimmBackbone

RESNET = """
model = dict(
    backbone=dict(
        _delete_=True, type='{}ResNet', depth=18, style='caffe', frozen_stages=1,
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet18')),
    {})
"""
CHANNELS = dict(
    mmdet='neck=dict(in_channels=[64, 128, 256, 512])',
    mmseg='decode_head=dict(in_channels=[64, 128, 256, 512]), '
    'auxiliary_head=dict(in_channels=256)',
)


@pytest.mark.parametrize('toolbox, scope', [('mmdet', 'mmdet.'), ('mmseg', '')])
@pytest.mark.parametrize(
    'arch',
    [TINY, pytest.param('timm/resnet18', marks=pytest.mark.slow)],
    ids=['overlock', 'timm'],
)
def test_it_trains_and_predicts(
    demo_data, monkeypatch, stock, toolbox, scope, arch, tmp_path
):
    monkeypatch.chdir(demo_data)
    config = stock(toolbox, RESNET.format(scope, CHANNELS[toolbox]))
    out = str(tmp_path / 'new.py')
    write_swapped(str(config), out, arch, pretrained=False)
    runner = train(out, work_dir=str(tmp_path / 'run'))
    expected = TimmBackbone if arch == 'timm/resnet18' else OverLoCK
    assert type(runner.model.backbone) is expected
    assert all(p.requires_grad for p in runner.model.backbone.parameters())
    assert runner.iter > 0
    checkpoint = (tmp_path / 'run/last_checkpoint').read_text()
    trained = torch.load(checkpoint, weights_only=False)['state_dict']
    assert trained.keys() == runner.model.state_dict().keys()
    if expected is OverLoCK:  # for others the toolboxes' own loading is tested enough
        evaluate(out, checkpoint, work_dir=str(tmp_path / 'test'))
