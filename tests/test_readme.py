"""The README's recipes, as they stand there, on the toolboxes' stock configs."""

import re
from pathlib import Path

import mmdet
import mmseg
import numpy as np
import pytest
import torch
from helpers import ROOT

from overlock_mm import OverLoCK
from overlock_mm.config.load import build_model, load_config

SECTION = (ROOT / 'README.md').read_text().split('## Use it in your own config')[1]
BLOCKS = re.findall(r'```python\n(.*?)```', SECTION.split('\n## ')[0], re.DOTALL)
STOCK = dict(
    mmseg=('upernet', 'upernet_r50_4xb4-160k_ade20k-512x512.py', mmseg),
    mmdet=('mask_rcnn', 'mask-rcnn_r50_fpn_1x_coco.py', mmdet),
)


def block(text):
    """The one code block that holds the text."""
    (found,) = (code for code in BLOCKS if text in code)
    return found


def segmentor_data():
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    sample = SegDataSample(metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64)))
    labels = torch.from_numpy(np.arange(64 * 64).reshape(1, 64, 64) % 150)
    sample.gt_sem_seg = PixelData(data=labels)
    return sample


def detector_data():
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    sample = DetDataSample(metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64)))
    mask = np.zeros((1, 64, 64), np.uint8)
    mask[:, 8:40, 8:48] = 1
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor([[8.0, 8.0, 48.0, 40.0]]),
        labels=torch.tensor([3]),
        masks=BitmapMasks(mask, 64, 64),
    )
    return sample


@pytest.mark.parametrize(
    'toolbox, name, sample',
    [
        ('mmseg', 'your_upernet_config.py', segmentor_data),
        ('mmdet', 'your_mask_rcnn_config.py', detector_data),
    ],
)
def test_recipes(toolbox, name, sample, tmp_path):
    """A model that is built, and has a loss."""
    folder, config, package = STOCK[toolbox]
    stock = Path(package.__file__).parent / '.mim/configs' / folder / config
    (tmp_path / name).write_text(f'_base_ = {str(stock)!r}\n')
    (tmp_path / 'mine.py').write_text(block(name))
    model = build_model(load_config(tmp_path / 'mine.py')).train()
    assert isinstance(model.backbone, OverLoCK)
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    model.data_preprocessor.size = (64, 64)  # MMSegmentation's pads to its crop otherwise
    # two images: the pooling branches of UPerNet have batch norms on one pixel each
    data = model.data_preprocessor(
        dict(inputs=[image, image], data_samples=[sample(), sample()]), training=True
    )
    with torch.no_grad():
        total, _ = model.parse_losses(model(**data, mode='loss'))
    assert total.isfinite() and total > 0


def test_weights():
    """The entry that starts from the ImageNet weights is one of the backbone."""
    entries = {}
    exec(block('init_cfg'), entries)
    backbone = OverLoCK('xt', init_cfg=entries['init_cfg'])
    assert backbone.init_cfg['checkpoint'].endswith('/v1/overlock_t_in1k_224.pth')


def test_channels():
    rows = re.findall(r'\| `(\w+)` \| ([\d, ]+) \|', SECTION)
    assert len(rows) == 4
    for arch, channels in rows:
        assert tuple(map(int, channels.split(', '))) == OverLoCK.channels_of(arch)


def test_without_a_toolbox():
    names = {}
    exec(block('import torch'), names)
    channels = OverLoCK.channels_of('t')[1:]
    shapes = [
        (1, c, 224 // s, 320 // s) for c, s in zip(channels, (8, 16, 32), strict=True)
    ]
    assert [tuple(m.shape) for m in names['maps']] == shapes
