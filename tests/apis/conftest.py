"""Stock configs of both toolboxes, made small and given the demo data."""

from pathlib import Path

import mmdet
import mmseg
import pytest
from helpers import CHANNELS, DETECTION, SEGMENTATION, TINY
from mmengine.config import Config

STOCK = dict(
    mmdet=Path(mmdet.__file__).parent
    / '.mim/configs/mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    mmseg=Path(mmseg.__file__).parent
    / '.mim/configs/upernet/upernet_r50_4xb4-160k_ade20k-512x512.py',
)
CHANGES = dict(
    mmdet="""
load = [dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True, with_mask=True)]
resize = dict(type='Resize', scale=(64, 64), keep_ratio=True)
train_pipeline = [*load, resize, dict(type='PackDetInputs')]
test_pipeline = [load[0], resize, load[1], dict(
    type='PackDetInputs',
    meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]
train_dataloader = dict(
    num_workers=0, persistent_workers=False, batch_size=2,
    dataset=dict(metainfo=metainfo, data_root='data/demo',
                 ann_file='annotations/instances_training.json',
                 data_prefix=dict(img='images/training'), pipeline=train_pipeline))
val_dataloader = dict(
    num_workers=0, persistent_workers=False,
    dataset=dict(metainfo=metainfo, data_root='data/demo',
                 ann_file='annotations/instances_validation.json',
                 data_prefix=dict(img='images/validation'), pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file='data/demo/annotations/instances_validation.json')
test_evaluator = val_evaluator
model = dict(
    backbone=dict(_delete_=True, type='OverLoCK', arch=TINY, context_skip=True),
    neck=dict(in_channels=CHANNELS, out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        mask_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=16, num_classes=9),
        mask_head=dict(num_convs=1, in_channels=16, conv_out_channels=16, num_classes=9)),
    train_cfg=dict(rpn_proposal=dict(nms_pre=50, max_per_img=50)),
    test_cfg=dict(rpn=dict(nms_pre=50, max_per_img=20), rcnn=dict(score_thr=0.0)))
train_cfg = dict(max_epochs=1)
""",
    mmseg="""
train_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),
    dict(type='Resize', scale=(64, 64)), dict(type='PackSegInputs')]
test_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64)),
    dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
train_dataloader = dict(
    num_workers=0, persistent_workers=False, batch_size=2, dataset=dict(
        _delete_=True, type='BaseSegDataset', metainfo=metainfo, data_root='data/demo',
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        img_suffix='.png', pipeline=train_pipeline))
val_dataloader = dict(
    num_workers=0, persistent_workers=False, dataset=dict(
        _delete_=True, type='BaseSegDataset', metainfo=metainfo, data_root='data/demo',
        data_prefix=dict(
            img_path='images/validation', seg_map_path='annotations/validation'),
        img_suffix='.png', pipeline=test_pipeline))
test_dataloader = val_dataloader
model = dict(
    pretrained=None, data_preprocessor=dict(size=(64, 64)),
    backbone=dict(_delete_=True, type='OverLoCK', arch=TINY),
    decode_head=dict(in_channels=CHANNELS, channels=16, num_classes=10),
    auxiliary_head=dict(in_channels=CHANNELS[2], channels=16, num_classes=10))
train_cfg = dict(max_iters=2, val_interval=2)
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=-1))
""",
)


@pytest.fixture(scope='session')
def stock(tmp_path_factory):
    """Small stock configs by toolbox, and configs that derive from them.

    ``stock('mmdet', 'resume = True')`` is the path of the stock Mask R-CNN's with one
    more line.
    """
    folder = tmp_path_factory.mktemp('stock')
    for toolbox, demo in (('mmdet', DETECTION), ('mmseg', SEGMENTATION)):
        (folder / f'{toolbox}.py').write_text(
            f'_base_ = {str(STOCK[toolbox])!r}\n'
            "custom_imports = dict(imports=['overlock_mm'], allow_failed_imports=False)\n"
            f'metainfo = {dict(Config.fromfile(demo).metainfo)}\n'
            f'TINY, CHANNELS = {TINY}, {CHANNELS}\n{CHANGES[toolbox]}'
        )

    def derived(toolbox, lines='', drop=()):
        path = folder / f'{toolbox}_{len(list(folder.iterdir()))}.py'
        path.write_text(f'_base_ = {str(folder / toolbox)!r} + ".py"\n{lines}\n')
        if drop:
            cfg = Config.fromfile(path)
            for key in drop:
                cfg.pop(key)
            cfg.dump(path)
        return path

    return derived
