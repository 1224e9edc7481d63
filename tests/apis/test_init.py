"""From messy folders of images and labels to a training, without editing the config."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from helpers import CHANNELS, TINY
from PIL import Image

from overlock_mm.apis.init import init
from overlock_mm.apis.test import test as evaluate
from overlock_mm.apis.train import train
from overlock_mm.config.load import load_config
from overlock_mm.errors import UserError

TASKS = ['segmentation', pytest.param('detection', marks=pytest.mark.slow)]
PARTS = ('images', 'annotations')
ENDS = ['.py', '_train.txt', '_val.txt']
# a small backbone and a short run: what is not of the data
SMALL = {
    'model.backbone.arch': dict(_delete_=True, **TINY),
    'default_hooks.logger.interval': 1,
}
SEGMENTOR = {
    **SMALL,
    'model.decode_head.in_channels': CHANNELS,
    'model.decode_head.channels': 16,
    'model.auxiliary_head.in_channels': CHANNELS[2],
    'train_cfg.max_iters': 2,
    'train_cfg.val_interval': 2,
    'default_hooks.checkpoint.interval': 2,
}
DETECTOR = {
    **SMALL,
    'model.neck.in_channels': CHANNELS,
    'model.train_cfg.rpn_proposal.nms_pre': 50,
    'model.test_cfg.rpn.max_per_img': 20,
    'model.test_cfg.rcnn.score_thr': 0.0,
    'model.test_cfg.rcnn.max_per_img': 4,
    'train_cfg.max_epochs': 1,
    'train_cfg.val_interval': 1,
}


@pytest.fixture
def scenes(demo_data, tmp_path, monkeypatch):
    """The demo's training scenes as pairs of arrays; the current folder is an empty one."""
    monkeypatch.chdir(tmp_path)
    root = demo_data / 'data/demo'
    names = sorted(p.name for p in (root / 'images/training').iterdir())
    return [
        tuple(np.array(Image.open(root / part / 'training' / name)) for part in PARTS)
        for name in names
    ]


@pytest.fixture
def coco(demo_data, tmp_path, monkeypatch):
    """The demo as a detection data set in the current folder: the training annotations."""
    monkeypatch.chdir(tmp_path)
    root = demo_data / 'data/demo'
    for part in ('training', 'validation'):
        shutil.copytree(root / 'images' / part, part)
        shutil.copy(root / f'annotations/instances_{part}.json', f'{part}.json')
    return json.loads(Path('training.json').read_text())


def run(out, options, workers=0):
    """Train a small model as the config says and evaluate it: its config, the metrics."""
    loaders = ('train_dataloader', 'val_dataloader', 'test_dataloader')
    options = {**options, **{f'{name}.num_workers': workers for name in loaders}}
    runner = train(out, pretrained=False, cfg_options=options)
    checkpoint = Path(runner.work_dir, 'last_checkpoint').read_text()
    return runner.cfg, evaluate(out, checkpoint, cfg_options=options)


def test_binary_masks_with_other_names(scenes, capsys):
    """Two suffixes of images, a void value, objects as 255, a broken pair."""
    for folder in ('in/images', 'in/masks'):
        Path(folder).mkdir(parents=True)
    for i, (image, labels) in enumerate(scenes):
        mask = np.where(labels > 0, 255, 0).astype(np.uint8)
        mask[:3] = 128
        Image.fromarray(image).save(f'in/images/{i}.{("png", "jpg")[i % 2]}')
        Image.fromarray(mask).save(f'in/masks/{i}_mask.png')
    Path('in/images/9.png').touch()
    Image.fromarray(mask).save('in/masks/9_mask.png')
    where = dict(images='in/images', masks='in/masks', arch='xt', ignore=(128,))
    with pytest.raises(UserError, match=r'(?s)cannot be read: 1 of 7.*0, 255 are not 0 to'):
        init('segmentation', **where)
    assert [p.name for p in Path().iterdir()] == ['in']  # nothing was written
    out = init('segmentation', **where, classes='ground,object', fix=True)
    assert 'fixed: images that cannot be read: 1 of 7' in capsys.readouterr().out
    assert len(out.read_text().splitlines()) <= 55
    cfg, results = run(out, SEGMENTOR, workers=1)
    assert cfg.train_dataloader.dataset.type == 'ConcatDataset'
    heads = cfg.model.decode_head, cfg.model.auxiliary_head
    assert [head.num_classes for head in heads] == [2, 2] and 0 <= results['mIoU'] <= 100
    lists = [p.read_text().split() for p in Path().glob('my_segmentation_*.txt')]
    assert sorted(sum(lists, [])) == list('012345')


@pytest.mark.parametrize('task', TASKS)
def test_multispectral_images(scenes, coco, task):
    """Five channels of 16 bits in planes, beside a colour for each class."""
    for folder in ('images', 'masks'):
        Path(folder).mkdir()
    colors = np.random.default_rng(0).permutation(256)[:30].reshape(10, 3).astype(np.uint8)
    for entry, (image, labels) in zip(coco['images'], scenes, strict=True):
        name = Path(entry['file_name']).stem
        bands = np.concatenate([image, image[..., :2]], axis=-1).astype(np.uint16) * 100
        tifffile.imwrite(f'images/{name}.tif', bands.transpose(2, 0, 1))
        Image.fromarray(colors[labels]).save(f'masks/{name}.png')
        entry['file_name'] = f'{name}.tif'
    if task == 'segmentation':
        lines = [f'class {i},{r},{g},{b}' for i, (r, g, b) in enumerate(colors.tolist())]
        Path('classes.txt').write_text('\n'.join(lines))
        out = init(task, 'images', masks='masks', arch='xt', classes='classes.txt')
        cfg, results = run(out, SEGMENTOR)
        assert 0 <= results['mIoU'] <= 100 and len(cfg.palette) == 10
    else:
        Path('tiff.json').write_text(json.dumps(coco))
        out = init(task, 'images', annotations='tiff.json', arch='xt')
        cfg, results = run(out, DETECTOR)
        assert 'coco/segm_mAP' in results
    assert cfg.model.backbone.in_channels == 5
    assert (
        not cfg.model.data_preprocessor.mean and not cfg.model.data_preprocessor.bgr_to_rgb
    )
    (standardize,) = (t for t in cfg.train_pipeline if t.type == 'Standardize')
    pixels = np.concatenate([image.reshape(-1, 3) for image, _ in scenes]) * 100.0
    assert standardize.mean == pytest.approx(
        [*pixels.mean(0), *pixels.mean(0)[:2]], rel=0.01
    )
    assert standardize.std == pytest.approx([*pixels.std(0), *pixels.std(0)[:2]], rel=0.01)


def test_boxes_of_a_messy_file(coco, capsys):
    """Grey images of 16 bits; no masks, areas and sizes; ids with holes; a bad box."""
    for entry in coco['images']:
        path = f'training/{entry["file_name"]}'
        grey = np.array(Image.open(path).convert('L')).astype(np.uint16) * 256
        cv2.imwrite(path, grey)
        del entry['width']
    for annotation in coco['annotations']:
        del annotation['segmentation'], annotation['area'], annotation['iscrowd']
        annotation['category_id'] = annotation['category_id'] * 10
    for category in coco['categories']:
        category['id'] = category['id'] * 10
    coco['annotations'][0]['bbox'][2] = 0
    Path('messy.json').write_text(json.dumps(coco))
    where = dict(images='training', annotations='messy.json', arch='xt')
    with pytest.raises(UserError, match=r'(?s)4 problems with the data.*less than 1 pixel'):
        init('detection', **where)
    before = Path('messy.json').read_bytes()
    out = init('detection', **where, fix=True, batch=2, out='boxes.py')
    assert Path('messy.json').read_bytes() == before
    assert 'boxes without masks' in capsys.readouterr().out
    parts = [
        json.loads(Path(f'boxes_{part}.json').read_text()) for part in ('train', 'val')
    ]
    count = sum(len(part['annotations']) for part in parts)
    assert count == len(coco['annotations']) - 1
    assert [len(part['images']) for part in parts] == [5, 1]
    cfg, results = run(out, DETECTOR)
    assert cfg.model.type == 'FasterRCNN' and cfg.model.roi_head.mask_head is None
    assert 'coco/bbox_mAP' in results and 'coco/segm_mAP' not in results
    assert cfg.model.backbone.in_channels == 1
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(2e-4 * 2 / 16)


def test_a_given_validation_set_and_some_classes(coco):
    """What is tidy is not copied."""
    where = dict(annotations='training.json', val='validation.json', arch='xt')
    out = init('detection', 'training', val_images='validation', **where, classes='person')
    assert not list(Path().glob('my_detection_*'))
    cfg, results = run(out, DETECTOR)
    assert cfg.train_dataloader.dataset.ann_file == 'training.json'
    assert cfg.val_dataloader.dataset.data_prefix.img == 'validation'
    assert cfg.model.roi_head.mask_head.num_classes == 1 and 'coco/segm_mAP' in results


def images_of(size, count=6):
    for folder in ('images', 'masks'):
        Path(folder).mkdir(exist_ok=True)
    for i in range(count):
        labels = np.full(size, i % 2, np.uint8)
        labels[:4] = 0
        labels[4:8] = 1
        Image.fromarray(labels * 100).save(f'images/{i}.png')
        Image.fromarray(labels).save(f'masks/{i}.png')


@pytest.mark.parametrize(
    'size, scale, crop',
    [
        ((480, 640), (640, 480), 480),
        ((40, 60), (192, 128), 128),
        ((1500, 2000), (2000, 1500), 512),
        ((3000, 6000), (2048, 1024), 512),
    ],
)
def test_sizes_that_fit_the_images(tmp_path, monkeypatch, size, scale, crop):
    monkeypatch.chdir(tmp_path)
    images_of(size, 2)
    cfg = load_config(init('segmentation', 'images', masks='masks'))
    assert cfg.train_pipeline[2].scale == scale and cfg.crop_size == (crop, crop)
    assert cfg.model.data_preprocessor.size == (crop, crop)


def test_the_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images_of((40, 60))
    first = init('segmentation', 'images', masks='masks', arch='s')
    texts = {p.name: p.read_text() for p in Path().glob('my_*')}
    assert sorted(texts) == [f'my_segmentation{end}' for end in ENDS]
    assert 20 <= len(first.read_text().splitlines()) <= 40
    cfg = load_config(first)
    assert cfg.model.backbone.arch == 's' and cfg.train_dataloader.batch_size == 4
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(6e-5 * 4 / 16)
    assert cfg.auto_scale_lr.base_batch_size == 4
    assert not cfg.get('tta_pipeline') and not cfg.get('data_source')
    with pytest.raises(UserError, match='my_segmentation.py exists; give another name, or'):
        init('segmentation', 'images', masks='masks')
    with pytest.raises(UserError, match='my_segmentation_train.txt exists'):
        first.unlink()
        init('segmentation', 'images', masks='masks')
    again = dict(masks='masks', arch='s', force=True)
    init('segmentation', 'images', **again)
    assert {p.name: p.read_text() for p in Path().glob('my_*')} == texts
    init('segmentation', 'images', **again, seed=5, val_share=0.5, small_gpu=True)
    assert len(Path('my_segmentation_val.txt').read_text().split()) == 3
    cfg = load_config(first)
    wrapper = cfg.optim_wrapper
    assert (wrapper.type, wrapper.dtype) == ('AmpOptimWrapper', 'bfloat16')
    assert wrapper.accumulative_counts == 8 and wrapper.optimizer.lr == pytest.approx(6e-5)
    assert cfg.model.backbone.with_cp is True and cfg.train_dataloader.batch_size == 2
    monkeypatch.setattr('os.cpu_count', lambda: None)
    init('segmentation', 'images', **again, batch=8)
    cfg = load_config(first)
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(3e-5)
    assert cfg.train_dataloader.num_workers == 1


@pytest.mark.parametrize('task', TASKS)
def test_the_preset_for_small_gpus_trains(coco, monkeypatch, task):
    """On the CPU, with mmengine's refusal of it out of the way."""
    monkeypatch.setattr('overlock_mm.apis.train.get_device', lambda: 'cuda')
    amp = 'mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available'
    monkeypatch.setattr(amp, lambda: True)
    if task == 'segmentation':
        images_of((40, 60))
        out = init(task, 'images', masks='masks', arch='xt', small_gpu=True)
        cfg, results = run(out, SEGMENTOR)
        assert 'mIoU' in results and cfg.optim_wrapper.type == 'AmpOptimWrapper'
    else:
        annotations = 'training.json'
        out = init(task, 'training', annotations=annotations, arch='xt', small_gpu=True)
        cfg, results = run(out, DETECTOR)
        assert 'coco/segm_mAP' in results and cfg.optim_wrapper.type == 'OptimWrapper'
    assert cfg.optim_wrapper.accumulative_counts == 8 and cfg.model.backbone.with_cp


@pytest.mark.parametrize(
    'task, options, message',
    [
        ('segmentation', {}, '--task segmentation needs --masks'),
        ('detection', {}, '--task detection needs --annotations'),
        ('segmentation', dict(masks='m', val='v'), '--val is not an option of --task seg'),
        ('detection', dict(annotations='a', masks='m'), '--masks is not an option of'),
        ('segmentation', dict(masks='m', val_masks='v'), 'belong together'),
        ('detection', dict(annotations='a', val_images='v'), 'needs the annotations'),
        ('segmentation', dict(masks='m', batch=0), '--batch 0 must be at least 1'),
        ('segmentation', dict(masks='m', batch=1), '--batch 1 is too small for UperNet'),
        ('segmentation', dict(masks='m', seed=-1), '--seed -1 must be at least 0'),
        (
            'segmentation',
            dict(masks='m', val_images='./images', val_masks='m/'),
            'is the training set',
        ),
        ('detection', dict(annotations='a', val='./a'), '--val ./a is the training set'),
        ('segmentation', dict(masks='m', val_share=1.5), '--val-share 1.5 must be between'),
        ('segmentation', dict(masks='m', out='a.txt'), 'a.txt must end in .py'),
        ('detection', dict(annotations='a', classes='c.txt'), 'names alone'),
    ],
)
def test_options_that_cannot_be(tmp_path, monkeypatch, task, options, message):
    monkeypatch.chdir(tmp_path)
    Path('c.txt').write_text('road,7')
    with pytest.raises(UserError, match=message):
        init(task, 'images', **options)
    assert [p.name for p in Path().iterdir()] == ['c.txt']
