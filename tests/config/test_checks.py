"""Checks before a run, on data with the faults that real data has."""

import copy
import json
import logging
from pathlib import Path

import mmdet
import mmseg
import numpy as np
import pytest
import torch
from helpers import DETECTION, ROOT, SEGMENTATION
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS
from PIL import Image

from overlock_mm.config import data_checks
from overlock_mm.config.checks import check_dataset, check_run
from overlock_mm.errors import UserError

MMDET = Path(mmdet.__file__).parent / '.mim/configs'
MMSEG = Path(mmseg.__file__).parent / '.mim/configs'
LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')
NAMES = ('cat', 'dog', 'water buffalo')


def write_image(path, values=0, size=(32, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.broadcast_to(np.uint8(values), size).copy()).save(path)


def write_coco(path, images, names=NAMES, count=4, first_id=1):
    """A COCO file with one object of each class in each image, and the images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    categories = [dict(id=i, name=name) for i, name in enumerate(names, first_id)]
    listed = [
        dict(id=i, file_name=f'{i}.jpg', height=64, width=64) for i in range(1, count + 1)
    ]
    for image in listed:
        write_image(images / image['file_name'])
    annotations = [
        dict(
            image_id=image['id'],
            category_id=category['id'],
            bbox=[1, 1, 20, 20],
            area=400,
            iscrowd=0,
            segmentation=[[1, 1, 21, 1, 21, 21]],
        )
        for image in listed
        for category in categories
    ]
    annotations = [dict(a, id=i) for i, a in enumerate(annotations, 1)]
    coco = dict(images=listed, annotations=annotations, categories=categories)
    path.write_text(json.dumps(coco))
    return coco


def write_label_maps(root, image='.jpg', label='.png', count=6, values=(0, 1, 255)):
    """Images and label maps whose columns hold ``values`` in turn."""
    for split in ('train', 'val'):
        for i in range(count):
            write_image(root / 'img' / split / f'{i}{image}')
            row = np.resize(np.uint8(values), 32)
            write_image(root / 'ann' / split / f'{i}{label}', row)


def message(cfg, *loaders):
    """The errors of a run, and that its config stays as it is."""
    errors = []

    def check(*args):
        with pytest.raises(UserError) as error:
            check_run(*args)
        errors.append(str(error.value))

    assert not [w for w in warnings_of(cfg, *loaders, check=check) if 'not be done' in w]
    return errors[0]


def check_passes(cfg, *loaders):
    """Nothing is raised, warned of or changed."""
    assert warnings_of(cfg, *loaders) == []


def warnings_of(cfg, *loaders, check=check_run):
    before = cfg.to_dict()
    caught, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: caught.append(record.getMessage())
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    try:
        check(cfg, *(loaders or LOADERS))
    finally:
        logger.removeHandler(handler)
    assert cfg.to_dict() == before
    return caught


def has(text, *words):
    assert all(word in text for word in words), text


@pytest.fixture
def detector(tmp_path):
    """Mask R-CNN with three classes on data that fits."""
    cfg = Config.fromfile(MMDET / 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py')
    cfg.model.roi_head.bbox_head.num_classes = 3
    cfg.model.roi_head.mask_head.num_classes = 3
    for split in ('train', 'val'):
        write_coco(tmp_path / f'{split}.json', tmp_path / split)
    for loader in LOADERS:
        split = 'train' if loader.startswith('train') else 'val'
        dataset = cfg[loader].dataset
        dataset.update(data_root=str(tmp_path), ann_file=f'{split}.json')
        dataset.update(data_prefix=dict(img=split), metainfo=dict(classes=NAMES))
    cfg.val_evaluator.ann_file = cfg.test_evaluator.ann_file = str(tmp_path / 'val.json')
    return cfg


@pytest.fixture
def segmentor(tmp_path):
    """UperNet with two classes on data that fits."""
    cfg = Config.fromfile(SEGMENTATION)
    cfg.model.decode_head.num_classes = cfg.model.auxiliary_head.num_classes = 2
    write_label_maps(tmp_path)
    for loader in LOADERS:
        split = 'train' if loader.startswith('train') else 'val'
        prefix = dict(img_path=f'img/{split}', seg_map_path=f'ann/{split}')
        cfg[loader].dataset.update(data_root=str(tmp_path), data_prefix=prefix)
        cfg[loader].dataset.metainfo = dict(classes=('land', 'water'))
        cfg[loader].dataset.img_suffix = '.jpg'
    return cfg


def rewrite(path, change):
    coco = json.loads(path.read_text())
    change(coco)
    path.write_text(json.dumps(coco))


# --- nothing is wrong ---------------------------------------------------------------


@pytest.mark.parametrize('config', [DETECTION, SEGMENTATION])
def test_demo_configs_pass(config, demo_data, monkeypatch):
    monkeypatch.chdir(demo_data)
    check_passes(Config.fromfile(config))


@pytest.mark.parametrize(
    'config',
    [
        ROOT / 'configs/detection/cascade_mask_rcnn_overlock_t.py',
        MMDET / 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
        MMDET / 'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
        MMDET / 'htc/htc_r50_fpn_1x_coco.py',
        MMDET / 'retinanet/retinanet_r50_fpn_1x_coco.py',
        MMDET / 'dino/dino-4scale_r50_8xb2-12e_coco.py',
        MMDET / 'yolox/yolox_s_8xb8-300e_coco.py',
        MMDET / 'boxinst/boxinst_r50_fpn_ms-90k_coco.py',
        MMDET / 'panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py',
        MMDET / 'mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py',
        MMDET / 'soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py',
        MMDET / 'cityscapes/mask-rcnn_r50_fpn_1x_cityscapes.py',
        MMDET / 'pascal_voc/faster-rcnn_r50_fpn_1x_voc0712.py',
        MMDET / 'lvis/mask-rcnn_r50_fpn_sample1e-3_ms-1x_lvis-v1.py',
        MMDET / 'rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
        ROOT / 'configs/segmentation/upernet_overlock_t.py',
        MMSEG / 'upernet/upernet_r50_4xb4-160k_ade20k-512x512.py',
        MMSEG / 'pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py',
        MMSEG / 'deeplabv3plus/deeplabv3plus_r50-d8_4xb4-40k_voc12aug-512x512.py',
        MMSEG / 'unet/unet-s5-d16_fcn_4xb4-40k_drive-64x64.py',
        MMSEG / 'stdc/stdc1_4xb12-80k_cityscapes-512x1024.py',
        MMSEG / 'mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py',
        MMSEG / 'knet/knet-s3_r50-d8_upernet_8xb2-adamw-80k_ade20k-512x512.py',
    ],
    ids=lambda path: path.stem,
)
def test_stock_configs_pass(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = Config.fromfile(config)
    lay_out(cfg)
    check_passes(cfg)


def lay_out(cfg):
    """Make small data where a stock config looks for it, and for each of its classes."""
    config = data_checks.plain(cfg)
    for dataset in (d for k in LOADERS for d in data_checks.find_datasets(config, k)):
        root = Path(dataset.cfg.get('data_root') or '')
        own = dataset.cls.METAINFO
        prefix = {k: root / v for k, v in dataset.cfg.get('data_prefix', {}).items()}
        for folder in prefix.values():
            folder.mkdir(parents=True, exist_ok=True)
        ann_file = root / (dataset.cfg.get('ann_file') or '')
        if ann_file.suffix == '.json':
            write_coco(ann_file, prefix['img'], own['classes'], count=1)
        elif 'img_path' in prefix:
            ann_file.parent.mkdir(parents=True, exist_ok=True)
            if ann_file.suffix == '.txt':
                ann_file.write_text('0\n')
            built = dataset.built
            if built is None:  # VOC's looks for its files first
                kept = {k: v for k, v in dataset.cfg.items() if k != 'type'}
                built = dataset.cls(**{**kept, 'pipeline': [], 'lazy_init': True})
            write_image(prefix['img_path'] / f'0{built.img_suffix}')
            labels = np.arange(32) % len(own['classes'])
            write_image(prefix['seg_map_path'] / f'0{built.seg_map_suffix}', labels)
        elif ann_file.suffix == '.txt':
            ann_file.parent.mkdir(parents=True, exist_ok=True)
            ann_file.write_text('0\n')
    for key in ('val_evaluator', 'test_evaluator'):
        for _, node in data_checks.nodes(config.get(key), key):
            path = Path(node.get('ann_file') or '.')
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.write_text('{"images": [], "categories": []}')


# --- paths --------------------------------------------------------------------------


def test_missing_paths(detector, tmp_path):
    detector.data_source = 'the data: run make'
    (tmp_path / 'val.json').unlink()
    text = message(detector)
    has(text, f'{tmp_path}/val.json does not exist', 'val_dataloader.dataset.ann_file')
    has(text, 'Get the data: run make, or link it there')
    detector.train_dataloader.dataset.data_prefix.img = 'none'
    has(message(detector), f'{tmp_path}/none does not exist', f'nor do {tmp_path}/val.json')
    with pytest.raises(UserError, match='none does not exist'):
        check_dataset(detector, 'train_dataloader')
    check_dataset(detector)


@pytest.mark.parametrize(
    'backend',
    [dict(backend='petrel'), dict(backend='http'), dict(backend='lmdb', db_path='x')],
)
def test_remote_data_sets_are_not_looked_for(detector, segmentor, backend):
    for cfg in (detector, segmentor):
        for loader in LOADERS:
            cfg[loader].dataset.update(data_root='remote', backend_args=backend)
    for evaluator in (detector.val_evaluator, detector.test_evaluator):
        evaluator.update(ann_file='remote/val.json', backend_args=backend)
    check_passes(detector)
    check_passes(segmentor)
    detector.val_dataloader.dataset.backend_args = dict(backend='local')
    has(message(detector), 'remote/val.json does not exist')


def test_remote_images_with_local_annotations(detector, segmentor, tmp_path):
    load = detector.train_dataloader.dataset.pipeline[0]
    load.file_client_args = dict(backend='petrel')
    detector.train_dataloader.dataset.data_prefix.img = 'remote'
    check_passes(detector)
    detector.train_dataloader.dataset.ann_file = 'none.json'
    has(message(detector), 'none.json does not exist')

    segmentor.train_dataloader.dataset.pipeline[1].backend_args = dict(backend='http')
    segmentor.train_dataloader.dataset.data_prefix.seg_map_path = 'remote'
    check_passes(segmentor)


def test_urls_are_not_looked_for(detector):
    detector.train_dataloader.dataset.data_root = 's3://bucket/data'
    check_passes(detector)


# --- numbers and names of classes -----------------------------------------------------


def test_head_with_other_classes(detector):
    detector.model.roi_head.bbox_head.num_classes = 80
    del detector.model.roi_head.mask_head.num_classes  # 80 by default
    text = message(detector)
    has(text, 'train_dataloader.dataset and val_dataloader.dataset', '3 classes')
    has(text, 'model.roi_head.bbox_head.num_classes=80', 'Set num_classes=3')
    has(text, 'model.roi_head.mask_head.num_classes=80')
    assert 'rpn_head' not in text and '\n' not in text


def test_heads_of_a_cascade(demo_data, monkeypatch):
    monkeypatch.chdir(demo_data)
    cfg = Config.fromfile(DETECTION)
    cfg.model.roi_head.bbox_head[1].num_classes = 80
    text = message(cfg)
    has(text, 'bbox_head[1].num_classes=80', '9 classes', 'Set num_classes=9')
    assert 'bbox_head[0]' not in text and 'mask_head' not in text


def test_head_in_a_wrapper_and_data_in_wrappers(detector):
    detector.model = dict(type='SoftTeacher', detector=detector.model)
    detector.model.detector.roi_head.bbox_head.num_classes = 80
    inner = detector.train_dataloader.dataset
    for wrapper in (
        dict(type='RepeatDataset', times=2, dataset=inner),
        dict(type='ClassBalancedDataset', oversample_thr=0.1, dataset=inner),
        dict(type='mmdet.MultiImageMixDataset', dataset=inner, pipeline=[]),
        dict(type='ConcatDataset', datasets=[inner, dict(type='Mine')]),
    ):
        detector.train_dataloader.dataset = wrapper
        text = message(detector, 'train_dataloader')
        has(text, 'model.detector.roi_head.bbox_head.num_classes=80', '3 classes')
        has(text, 'train_dataloader.dataset.dataset')
    detector.model.detector.roi_head.bbox_head.num_classes = 3
    check_passes(detector)


def test_heads_of_a_segmentor(segmentor):
    head = segmentor.model.auxiliary_head
    segmentor.model.auxiliary_head = [copy.deepcopy(head), copy.deepcopy(head)]
    segmentor.model.auxiliary_head[1].num_classes = 19
    text = message(segmentor)
    has(text, 'model.auxiliary_head[1].num_classes=19', '2 classes', 'Set num_classes=2')
    assert 'decode_head' not in text


def test_classes_of_the_data_set_class(segmentor, tmp_path):
    """Names come from the class where the config has none."""
    for loader in LOADERS:
        dataset = segmentor[loader].dataset
        del dataset.metainfo
        dataset.type = 'mmseg.CityscapesDataset'
        dataset.update(img_suffix='.jpg', seg_map_suffix='.png')
    has(
        message(segmentor),
        '19 classes of CityscapesDataset',
        'decode_head.num_classes=2',
    )


def test_binary_segmentation_with_one_channel(segmentor):
    segmentor.model.decode_head.out_channels = 1
    check_passes(segmentor)


def test_panoptic_heads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = 'mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py'
    cfg = Config.fromfile(MMDET / name)
    lay_out(cfg)
    cfg.model.panoptic_head.num_stuff_classes = 10
    has(message(cfg), 'panoptic_head.num_stuff_classes=10', 'Set num_stuff_classes=53')


def test_classes_in_a_file(detector, tmp_path):
    names = tmp_path / 'names.txt'
    names.write_text('\n'.join(NAMES) + '\n')
    for loader in LOADERS:
        detector[loader].dataset.metainfo = dict(classes=str(names))
    check_passes(detector)
    names.write_text('cat\ndog\n')
    has(message(detector), '2 classes', 'num_classes=3', 'Set num_classes=2')


def test_classes_as_a_string(detector, segmentor):
    for cfg in (detector, segmentor):
        cfg.train_dataloader.dataset.metainfo = dict(classes=('water'))  # no comma
        text = message(cfg)
        has(text, "train_dataloader.dataset.metainfo.classes is the string 'water'")
        has(text, "classes=('water',)")


def test_class_names_under_old_keys(detector):
    detector.train_dataloader.dataset.metainfo = dict(CLASSES=NAMES)
    has(message(detector), 'train_dataloader.dataset.metainfo.CLASSES has no effect')
    del detector.train_dataloader.dataset.metainfo
    detector.train_dataloader.dataset.classes = NAMES
    text = message(detector)
    has(text, 'train_dataloader.dataset.classes is not an argument of CocoDataset')
    has(text, 'metainfo=dict(classes=...)')
    assert '\n' not in text  # nothing on COCO's names, which nobody asked for


def test_one_class_misspelt(detector, tmp_path):
    names = ('cat', 'dog', 'water bufalo')
    detector.train_dataloader.dataset.metainfo = dict(classes=names)
    text = message(detector)
    has(text, 'train_dataloader.dataset.metainfo.classes', "'water bufalo'")
    has(text, "nearest: 'water buffalo'", f'{tmp_path}/train.json', 'Fix the names')
    assert '\n' not in text


def test_all_classes_misspelt(detector):
    detector.train_dataloader.dataset.metainfo = dict(classes=('Cat', 'Dog', 'Cow'))
    text = message(detector)
    has(text, "'Cat' (nearest: 'cat')", "'Dog' (nearest: 'dog')", "'Cow'")
    assert '\n' not in text  # the images that are left are not reported too


def test_coco_names_on_own_data(detector):
    """The class's own names count where metainfo is missing."""
    for loader in LOADERS:
        del detector[loader].dataset.metainfo
    text = message(detector)
    has(text, 'has no metainfo.classes', '78 of the 80 classes of CocoDataset')
    has(text, "metainfo=dict(classes=('cat', 'dog', 'water buffalo'))")


def test_class_names_of_a_large_file(detector, monkeypatch):
    """Categories are read from files that are too large to be parsed."""
    monkeypatch.setattr(data_checks, '_LARGE', 0)
    monkeypatch.setattr(data_checks.json, 'load', None)
    check_passes(detector)
    detector.train_dataloader.dataset.metainfo = dict(classes=('cat', 'dog', 'cow'))
    has(message(detector), "'cow'")


def test_order_of_classes(detector):
    detector.train_dataloader.dataset.metainfo = dict(classes=NAMES[::-1])
    (text,) = warnings_of(detector)
    has(
        text, 'train_dataloader.dataset', 'another order', "('cat', 'dog', 'water buffalo')"
    )


def test_class_names_that_a_segmentation_class_lacks(segmentor):
    dataset = segmentor.train_dataloader.dataset
    dataset.update(type='CityscapesDataset', metainfo=dict(classes=('road', 'sidewalc')))
    text = message(segmentor, 'train_dataloader')
    has(
        text,
        'train_dataloader.dataset.metainfo.classes',
        "'sidewalc' (nearest: 'sidewalk')",
    )
    has(text, 'CityscapesDataset')


def test_no_class_names_for_the_evaluation(segmentor):
    del segmentor.val_dataloader.dataset.metainfo
    has(message(segmentor), 'val_dataloader.dataset has no class names', 'metainfo=dict(')


# --- annotations ----------------------------------------------------------------------


def test_boxes_without_masks(detector, tmp_path):
    def boxes_only(coco):
        del coco['annotations'][4]['segmentation']
        coco['annotations'][7]['segmentation'] = []

    for split in ('train', 'val'):
        rewrite(tmp_path / f'{split}.json', boxes_only)
    text = message(detector)
    has(text, f'{tmp_path}/train.json (train_dataloader.dataset.ann_file)')
    has(text, "2 of 12 annotations have no 'segmentation' (the first: id 5)")
    has(text, 'which with_mask=True reads', 'Add masks, or use boxes only')
    has(text, f'{tmp_path}/val.json (val_evaluator.ann_file)', "metric='segm'")

    detector.model.roi_head.mask_head = None
    for loader in LOADERS:
        for transform in detector[loader].dataset.pipeline:
            transform.pop('with_mask', None)
    text = message(detector)
    has(text, "val_evaluator.metric has 'segm'", 'no mask_head', "Set metric='bbox'")
    assert 'segmentation' not in text
    detector.val_evaluator.metric = detector.test_evaluator.metric = 'bbox'
    check_passes(detector)


def test_mask_head_without_masks_in_the_pipeline(detector):
    del detector.train_dataloader.dataset.pipeline[1].with_mask
    text = message(detector)
    has(text, 'model.roi_head.mask_head', 'train_dataloader.dataset', 'with_mask=True')


@pytest.mark.parametrize(
    'change, words',
    [
        (
            lambda c: c['annotations'][0].update(category_id=9),
            ['1 of 12', 'category_id 9', 'ids 1, 2, 3'],
        ),
        (lambda c: c['annotations'][0].pop('area'), ["no 'area'", '1 of 12']),
        (lambda c: c['annotations'][0].update(bbox=[]), ["no 'bbox'", '1 of 12']),
        (lambda c: c['annotations'][0].clear(), ["no 'id'", '1 of 12']),
        (lambda c: c['images'][1].pop('height'), ["no 'height'", '1 of 4', 'id 2']),
        (lambda c: c['annotations'][0].update(id=2), ['not unique', 'unique: 2']),
        (lambda c: c.update(images=[]), ['has 0 images', 'lists none']),
        (lambda c: c.pop('images'), ['no COCO file', 'no list of images']),
        (
            lambda c: c.update(annotations=[]),
            ['has 0 images', 'filter_cfg', '0 of 0 annotations'],
        ),
        (
            lambda c: c['images'][0].update(file_name='x/1.jpg'),
            ['x/1.jpg does not', '1 of 4'],
        ),
    ],
)
def test_damaged_coco_file(detector, tmp_path, change, words):
    rewrite(tmp_path / 'train.json', change)
    text = message(detector)
    has(text, 'train.json' if 'x/1.jpg' not in text else 'data_prefix.img', *words)
    assert '\n' not in text


def test_filter_that_leaves_nothing(detector):
    detector.train_dataloader.dataset.filter_cfg = dict(min_size=100)
    has(message(detector), 'train_dataloader.dataset has 0 images', "'min_size': 100")


def test_what_needs_no_mask(detector, tmp_path):
    """The data set leaves these out by itself."""

    def boxes_only(coco):
        for annotation in coco['annotations'][:3]:
            del annotation['segmentation']
        coco['annotations'][0]['ignore'] = True
        coco['annotations'][1]['bbox'][2] = 0.5
        coco['annotations'][2]['category_id'] = 9
        coco['categories'].append(dict(id=9, name='cow'))

    rewrite(tmp_path / 'train.json', boxes_only)
    check_passes(detector)


@pytest.mark.parametrize('text', ['{"images": [', '[]'])
def test_no_json(detector, tmp_path, text):
    (tmp_path / 'train.json').write_text(text)
    has(message(detector), f'{tmp_path}/train.json is no COCO file', 'Fix or replace it')


def test_evaluator_of_another_file(detector, tmp_path):
    detector.val_evaluator.ann_file = str(tmp_path / 'train.json')
    (text,) = warnings_of(detector)
    has(text, f'val_evaluator.ann_file={tmp_path}/train.json', f'{tmp_path}/val.json')
    detector.val_evaluator.ann_file = f'{tmp_path}/./val.json'
    check_passes(detector)


# --- label maps -----------------------------------------------------------------------


def test_void_label(segmentor, tmp_path):
    """As CamVid has it: the label after the last class marks pixels to ignore."""
    write_label_maps(tmp_path, values=(0, 1, 2))
    text = message(segmentor, 'train_dataloader')
    has(text, f'{tmp_path}/ann/train/0.png has label 2', 'model.decode_head')
    has(text, 'model.auxiliary_head: 0 to 1, and ignore_index=255')
    has(text, 'set ignore_index=2', 'seg_pad_val=2')
    assert '\n' not in text

    for head in (segmentor.model.decode_head, segmentor.model.auxiliary_head):
        head.ignore_index = 2
    segmentor.model.data_preprocessor.seg_pad_val = 2
    check_passes(segmentor, 'train_dataloader')
    (text,) = warnings_of(segmentor, 'val_dataloader')
    has(
        text, f'{tmp_path}/ann/val/0.png has label 2', 'val_evaluator', 'set ignore_index=2'
    )
    segmentor.val_evaluator.ignore_index = 2
    check_passes(segmentor, 'train_dataloader', 'val_dataloader')


def test_padding_with_a_label(segmentor, tmp_path):
    write_label_maps(tmp_path, values=(0, 1, 2))
    for head in (segmentor.model.decode_head, segmentor.model.auxiliary_head):
        head.ignore_index = 2
    (text,) = warnings_of(segmentor, 'train_dataloader')
    has(text, 'model.data_preprocessor.seg_pad_val=255', 'Set it to 2')


def test_one_file_in_many(segmentor, tmp_path):
    """Files are taken from the whole data set."""
    write_label_maps(tmp_path, count=100)
    write_image(tmp_path / 'ann/train/98.png', 7)
    write_image(tmp_path / 'ann/train/99.png', 7)
    write_image(tmp_path / 'ann/train/97.png', 7)
    write_image(tmp_path / 'ann/train/96.png', 7)
    has(message(segmentor), 'has label 7')


def test_labels_from_one(segmentor, tmp_path):
    write_label_maps(tmp_path, values=(0, 1, 2))
    has(message(segmentor), 'reduce_zero_label=True')
    for loader in LOADERS:
        segmentor[loader].dataset.reduce_zero_label = True
    check_passes(segmentor)


def test_reduce_zero_label_set_in_one_place(segmentor):
    segmentor.train_dataloader.dataset.pipeline[1].reduce_zero_label = True
    text = message(segmentor)
    has(text, 'train_dataloader.dataset: LoadAnnotations has reduce_zero_label=True')
    has(text, 'the data set reduce_zero_label=False', 'Set both alike')


def test_label_map_of_colours(segmentor, tmp_path):
    path = tmp_path / 'ann/train/0.png'
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    has(message(segmentor), f'{path} has 3 channels', 'Convert the colours')


def test_mask_of_0_and_255(segmentor, tmp_path):
    """255 is ignored: such a model learns nothing."""
    write_label_maps(tmp_path, values=(0, 255))
    text = warnings_of(segmentor)
    has(text[0], 'train_dataloader.dataset', 'hold 0 and 255 only', 'write its index')


def test_own_transforms_may_change_labels(segmentor, tmp_path):
    write_label_maps(tmp_path, values=(0, 1, 2))
    segmentor.train_dataloader.dataset.pipeline.insert(2, dict(type='MyRelabel'))
    check_passes(segmentor, 'train_dataloader')


def test_wrong_suffix(segmentor, tmp_path):
    for loader in LOADERS:
        segmentor[loader].dataset.img_suffix = '.jpeg'
    text = message(segmentor, 'train_dataloader')
    has(text, 'train_dataloader.dataset has 0 images', f'{tmp_path}/img/train')
    has(text, "img_suffix='.jpeg'", '6 of .jpg', 'Set img_suffix')


def test_wrong_suffix_of_label_maps(segmentor, tmp_path):
    segmentor.train_dataloader.dataset.seg_map_suffix = '_gt.png'
    text = message(segmentor)
    has(text, f'{tmp_path}/ann/train/0_gt.png does not exist', '6 of 6', "'_gt.png'")


def test_no_folder_of_label_maps(segmentor):
    del segmentor.train_dataloader.dataset.data_prefix.seg_map_path
    has(message(segmentor), 'train_dataloader.dataset.data_prefix has no seg_map_path')


def test_empty_list_of_images(segmentor, tmp_path):
    (tmp_path / 'train.txt').write_text('')
    segmentor.train_dataloader.dataset.ann_file = 'train.txt'
    has(message(segmentor), f'{tmp_path}/train.txt is empty', 'has 0 images')


# --- batch norm -----------------------------------------------------------------------


def test_batch_of_one_in_a_pooling_head(segmentor):
    segmentor.train_dataloader.batch_size = 1
    text = message(segmentor)
    has(text, 'train_dataloader.batch_size=1', 'model.decode_head', 'batch_size=2 or more')

    # SyncBN takes its statistics from all processes
    segmentor.launcher = 'pytorch'
    check_passes(segmentor)
    segmentor.model.decode_head.norm_cfg = dict(type='BN')
    check_passes(segmentor)  # sync_bn converts it
    segmentor.sync_bn = None
    has(message(segmentor), 'train_dataloader.batch_size=1')

    # no pooling to 1x1: legal, and seldom wanted
    segmentor.launcher = 'none'
    segmentor.model.decode_head.pool_scales = (2, 3, 6)
    (text,) = warnings_of(segmentor)
    has(text, 'train_dataloader.batch_size=1', 'norm_eval=True')


@pytest.mark.parametrize(
    'kind, options',
    [
        ('UPerHead', dict(in_channels=[4, 4], in_index=[0, 1], pool_scales=(1, 2))),
        ('PSPHead', dict(in_channels=4, in_index=1)),
        ('APCHead', dict(in_channels=4, in_index=1)),
        ('ASPPHead', dict(in_channels=4, in_index=1)),
        (
            'mmseg.DepthwiseSeparableASPPHead',
            dict(in_channels=4, in_index=1, c1_in_channels=4, c1_channels=4),
        ),
    ],
)
def test_pooling_heads_fail_on_one_image(segmentor, kind, options):
    """torch refuses what the check refuses, and takes what it takes."""
    loss = dict(type='mmseg.CrossEntropyLoss')
    norm = dict(type='BN')
    head = dict(type=kind, channels=4, num_classes=2, norm_cfg=norm, loss_decode=loss)
    head.update(options)
    segmentor.model.decode_head = head
    segmentor.train_dataloader.batch_size = 1
    has(message(segmentor, 'train_dataloader'), 'train_dataloader.batch_size=1')
    with MODELS.switch_scope_and_registry('mmseg') as registry:
        model = registry.build(head).train()
    maps = [torch.rand(1, 4, 8, 8), torch.rand(1, 4, 8, 8)]
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        model(maps)
    model([m.repeat(2, 1, 1, 1) for m in maps])


def test_last_batch_of_one(segmentor):
    loader = segmentor.train_dataloader
    loader.batch_size = 5  # of 6 images
    check_passes(segmentor)  # the infinite sampler has no last batch
    loader.sampler.type = 'DefaultSampler'
    has(message(segmentor), 'last batch', '6 in batches of 5', 'drop_last=True')
    loader.drop_last = True
    check_passes(segmentor)


def test_batch_of_one_of_a_detector(detector):
    """A frozen backbone and heads without norms have no use for a warning."""
    detector.train_dataloader.batch_size = 1
    check_passes(detector)
    detector.model.backbone = dict(type='OverLoCK')
    (text,) = warnings_of(detector)
    has(text, 'model.backbone')
    detector.model.backbone.norm_eval = True
    check_passes(detector)


# --- all of it ------------------------------------------------------------------------


def test_all_problems_at_once(segmentor):
    segmentor.model.decode_head.num_classes = 5
    segmentor.train_dataloader.batch_size = 1
    segmentor.val_dataloader.dataset.img_suffix = '.tif'
    text = message(segmentor)
    has(text, '3 problems', '\n  1. ', '\n  2. ', '\n  3. ', 'num_classes=5', "'.tif'")


def test_unknown_data_sets_are_checked_as_far_as_they_are_known(detector, tmp_path):
    dataset = detector.train_dataloader.dataset
    dataset.update(type='MyDataset', whatever=object(), pipeline=[print, dict(type=int)])
    check_passes(detector)
    dataset.metainfo.classes = ('cat', 'dog')
    has(message(detector), '2 classes', 'num_classes=3')
    dataset.metainfo.classes = NAMES
    dataset.ann_file = 'none.json'
    has(message(detector), 'none.json does not exist')


@pytest.mark.parametrize('kind', ['mmdet.CocoDataset', 'class'])
def test_ways_to_name_a_data_set(detector, kind):
    from mmdet.datasets import CocoDataset

    dataset = detector.train_dataloader.dataset
    dataset.type = CocoDataset if kind == 'class' else kind
    check_passes(detector)
    dataset.metainfo = dict(classes=('cat', 'dog', 'cow'))
    has(message(detector), "'cow'")


def test_pure_python_config(detector, tmp_path):
    """Classes stand in it in place of names, and there is no default scope."""
    path = tmp_path / 'pure.py'
    path.write_text(f"""
from mmdet.datasets import CocoDataset
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets.transforms import LoadAnnotations
from mmdet.models import BBoxHead, FasterRCNN, StandardRoIHead
from mmengine.dataset import RepeatDataset

default_scope = None
model = dict(type=FasterRCNN, roi_head=dict(
    type=StandardRoIHead, bbox_head=dict(type=BBoxHead, num_classes=3)))
dataset = dict(
    type=CocoDataset, data_root={str(tmp_path)!r}, ann_file='train.json',
    data_prefix=dict(img='train'), metainfo=dict(classes={NAMES}),
    pipeline=[dict(type=LoadImageFromFile), dict(type=LoadAnnotations, with_bbox=True)])
train_dataloader = dict(
    batch_size=2, dataset=dict(type=RepeatDataset, times=2, dataset=dataset))
""")
    cfg = Config.fromfile(path)
    check_passes(cfg)
    cfg.train_dataloader.dataset.dataset.metainfo = dict(classes=('cat', 'dog', 'cow'))
    cfg.model.roi_head.bbox_head.num_classes = 4
    has(message(cfg), "'cow'", 'bbox_head.num_classes=4', 'Set num_classes=3')


def test_configs_without_some_parts(detector):
    check_run(Config({}), *LOADERS)
    check_passes(Config(dict(train_dataloader=None, val_evaluator=[], model=None)))
    for name in ('model', 'val_evaluator', 'default_scope'):
        detector.pop(name)
    check_passes(detector, 'train_dataloader')


def test_a_check_that_fails_does_not_stop_the_run(detector):
    detector.train_dataloader.dataset.data_prefix = ['odd']
    (text, *_) = warnings_of(detector)
    has(text, 'could not be done', 'the run goes on')
