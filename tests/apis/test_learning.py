"""The models learn: both tasks overfit two scenes, and each part of the backbone helps."""

import cv2
import pytest
import torch
from helpers import DETECTION, SEGMENTATION, TINY, image
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm

from overlock_mm import OverLoCK
from overlock_mm.apis import learning
from overlock_mm.config.load import build_model
from overlock_mm.config.swap import swap
from overlock_mm.datasets.demo import make_demo_data

# Prefixes of the parameters of each part; of ContMix, the names inside a block.
PARTS = {
    'Base-Net': ('patch_embed1.', 'blocks1.', 'patch_embed2.', 'blocks2.', 'blocks3.'),
    'Overview-Net': ('patch_embed4.', 'blocks4.', 'high_level_proj.'),
    'Focus-Net, stage 3': ('sub_blocks3.',),
    'Focus-Net, stage 4': ('sub_blocks4.',),
    'ContMix': ('weight_query', 'weight_key', 'weight_proj', 'rpb'),
    'context added to the last map': ('h_proj.', 'extra_norm.4.'),
}


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp('scenes')
    make_demo_data(root / 'data/demo', train=2, val=1)
    return root


def fitted(config, scenes, monkeypatch, **options):
    monkeypatch.chdir(scenes)
    history = learning.fit_two_scenes(Config.fromfile(config), **options)
    last = history[-5:]
    return {name: sum(log[name] for log in last) / len(last) for name in last[0]}


@pytest.mark.slow
def test_detection_overfits_two_scenes(scenes, monkeypatch):
    last = fitted(DETECTION, scenes, monkeypatch, iterations=25)
    assert last['s0.loss_cls'] < 0.6 and last['s0.acc'] > 80
    assert last['s0.loss_mask'] < 0.5
    assert last['loss_rpn_cls'] < 0.06


@pytest.mark.slow
def test_segmentation_overfits_two_scenes(scenes, monkeypatch):
    last = fitted(SEGMENTATION, scenes, monkeypatch, iterations=40, lr=1e-3)
    # what knows only the shares of the classes gets a loss of 1.0 and 71%
    assert last['decode.loss_ce'] < 0.65 and last['decode.acc_seg'] > 85


@pytest.mark.parametrize('part', PARTS)
def test_every_part_learns_alone(part):
    """With all else frozen, the last map comes closer to a target that another net gave."""
    torch.manual_seed(0)
    context_skip = part == 'context added to the last map'
    teacher, model = (OverLoCK(TINY, context_skip=context_skip).train() for _ in range(2))
    x = image(2, 3, 96, 128)
    with torch.no_grad():
        target = teacher(x)[3]
    for name, p in model.named_parameters():
        p.requires_grad_(
            name.startswith(PARTS[part]) or any(f'.{n}' in name for n in PARTS[part])
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    losses = []
    for _ in range(12):
        loss = (model(x)[3] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize('name', learning.BACKBONES)
@pytest.mark.parametrize('config', [DETECTION, SEGMENTATION], ids=['det', 'seg'])
def test_another_backbone_in_a_demo_config(config, name):
    cfg, _ = swap(config, backbone=learning.BACKBONES[name])
    model = revert_sync_batchnorm(build_model(cfg))
    assert type(model.backbone).__name__ == learning.BACKBONES[name]['type']
    x = image(2, 3, 64, 64)
    assert len(model.extract_feat(x)) >= 4  # through the neck, if there is one


def test_curves(tmp_path):
    runs = {name: [{loss: 1.0}, {loss: 0.5}] for name, loss in learning.LOSSES.items()}
    learning.draw_curves(
        {name: {'a run': log} for name, log in runs.items()}, tmp_path / 'c.png'
    )
    assert cv2.imread(str(tmp_path / 'c.png')).ndim == 3
