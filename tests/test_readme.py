"""The code and commands of the README and of docs/swap.md, as they stand there."""

import re
from pathlib import Path

import mmdet
import mmseg
import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image

from overlock_mm import OverLoCK
from overlock_mm.cli import main
from overlock_mm.config.load import build_model, load_config

README = (ROOT / 'README.md').read_text()
SWAP = (ROOT / 'docs/swap.md').read_text()
STOCK = dict(
    mmseg=('upernet', 'upernet_r50_4xb4-160k_ade20k-512x512.py', mmseg),
    mmdet=('mask_rcnn', 'mask-rcnn_r50_fpn_1x_coco.py', mmdet),
)


def block(text, document=SWAP):
    """The one code block of a document that holds the text."""
    codes = re.findall(r'```\w+\n(.*?)```', document, re.DOTALL)
    (found,) = (code for code in codes if text in code)
    return found


def stock_config(toolbox):
    folder, config, package = STOCK[toolbox]
    return Path(package.__file__).parent / '.mim/configs' / folder / config


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_results_are_those_of_the_page():
    """Every number of the README's table, beside the same backbone in docs/results.md."""
    page = (ROOT / 'docs/results.md').read_text()
    rows = re.findall(r'^\| (OverLoCK-\w+) \| (.*) \|$', README, re.M)
    assert [name for name, _ in rows] == [f'OverLoCK-{a}' for a in ('XT', 'T', 'S', 'B')]
    for name, cells in rows:
        segmentation, detection = re.findall(rf'^\| {name} \| (.*) \|$', page, re.M)
        parameters, _, accuracy, miou, _ = segmentation.split(' | ')
        once, _, thrice, _ = detection.split(' | ')
        assert cells.split(' | ') == [parameters, accuracy, miou, once, thrice]


@pytest.mark.parametrize('document', [README, SWAP], ids=['README', 'swap'])
def test_the_swap_command(document, tmp_path, monkeypatch):
    (command,) = re.findall('^overlock (swap .*)', block('overlock swap', document), re.M)
    (tmp_path / 'my_config.py').write_text(f'_base_ = {str(stock_config("mmseg"))!r}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('sys.argv', ['overlock', *command.split()])
    main()
    cfg = load_config('my_overlock_config.py')
    assert (cfg.model.backbone.type, cfg.model.backbone.arch) == ('OverLoCK', 't')
    assert cfg.model.decode_head.in_channels == list(OverLoCK.channels_of('t'))


def test_the_predictor(configs, tmp_path, monkeypatch):
    """The README's example predicts a photo, and its picture shows what was predicted."""
    monkeypatch.chdir(tmp_path)
    config = configs / 'segmentor.py'
    (tmp_path / 'my_config.py').write_text(f'_base_ = {str(config)!r}\n')
    torch.manual_seed(0)
    state = build_model(load_config(config)).state_dict()
    torch.save(dict(state_dict=state), 'my_checkpoint.pth')
    photo = np.random.default_rng(0).integers(0, 256, (48, 80, 3), np.uint8)
    Image.fromarray(photo).save('photo.jpg')
    names = {}
    exec(block('Predictor', README), names)
    labels = names['result'].pred_sem_seg.data
    assert labels.shape == (1, 48, 80) and labels.max() < 10
    picture = names['picture']
    assert picture.ndim == 3 and picture.shape[2] == 3 and picture.dtype == np.uint8
    names['result'].pred_sem_seg.data = (labels + 1) % 10
    other = names['predictor'].draw('photo.jpg', names['result'])
    assert other.shape != picture.shape or (other != picture).mean() > 0.3


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
    (tmp_path / name).write_text(f'_base_ = {str(stock_config(toolbox))!r}\n')
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
    rows = re.findall(r'\| `(\w+)` \| ([\d, ]+) \|', SWAP)
    assert len(rows) == 4
    for arch, channels in rows:
        assert tuple(map(int, channels.split(', '))) == OverLoCK.channels_of(arch)


@pytest.mark.parametrize('document', [README, SWAP], ids=['README', 'swap'])
def test_without_a_toolbox(document):
    names = {}
    exec(block('import torch', document), names)
    channels = OverLoCK.channels_of('t')[1:]
    shapes = [
        (1, c, 224 // s, 320 // s) for c, s in zip(channels, (8, 16, 32), strict=True)
    ]
    assert [tuple(m.shape) for m in names['maps']] == shapes
