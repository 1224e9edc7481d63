"""Every config builds, trains and predicts; the recipes are those that were published."""

from pathlib import Path

import pytest
import torch
from helpers import ROOT, TINY
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, PARAM_SCHEDULERS, init_default_scope

from overlock_mm import OverLoCK

CONFIGS = sorted(
    p
    for task in ('segmentation', 'detection')
    for p in (ROOT / 'configs' / task).glob('*.py')
)
PAPER = [p for p in CONFIGS if not p.stem.endswith('demo')]
SEGMENTATION = [p for p in PAPER if p.parent.name == 'segmentation']
DETECTION = [p for p in PAPER if p.parent.name == 'detection']
SHRINK = 8


def name(path):
    return path.stem


def arch_of(path):
    return next(part for part in path.stem.split('_') if part in ('xt', 't', 's', 'b'))


def load(path):
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    return cfg


def build_model(cfg):
    channels = OverLoCK.channels_of(TINY)
    cfg.model.backbone.update(arch=TINY, init_cfg=None)
    if cfg.default_scope == 'mmseg':
        from mmseg.utils import register_all_modules

        cfg.model.decode_head.in_channels = list(channels)
        cfg.model.auxiliary_head.in_channels = channels[2]
        cfg.model.data_preprocessor.size = [
            shrink_sizes(s) for s in cfg.model.data_preprocessor.size
        ]
    else:
        from mmdet.utils import register_all_modules

        cfg.model.neck.in_channels = list(channels)
    register_all_modules(init_default_scope=True)
    torch.manual_seed(0)
    return revert_sync_batchnorm(MODELS.build(cfg.model))


def shrink(node):
    """Divide every size in a pipeline, so that it fits the small scenes."""
    if isinstance(node, dict):
        return {
            k: shrink_sizes(v) if k in ('scale', 'scales', 'crop_size') else shrink(v)
            for k, v in node.items()
        }
    return [shrink(v) for v in node] if isinstance(node, list) else node


def shrink_sizes(value):
    if isinstance(value, list | tuple):
        return type(value)(shrink_sizes(v) for v in value)
    return max(64, value // SHRINK)


def samples(cfg, loader, folder, count):
    """Demo scenes through the config's own pipeline."""
    dataset = cfg[loader].dataset
    split = 'training' if loader.startswith('train') else 'validation'
    demo = load(
        next(
            p
            for p in CONFIGS
            if p.stem.endswith('demo')
            and p.parent.name
            == ('segmentation' if cfg.default_scope == 'mmseg' else 'detection')
        )
    )
    dataset.update(
        data_root=str(folder / 'data/demo'),
        metainfo=demo[loader].dataset.metainfo,
        pipeline=shrink(cfg[loader].dataset.to_dict()['pipeline']),
    )
    if cfg.default_scope == 'mmseg':
        dataset.update(
            img_suffix='.png',
            data_prefix=dict(
                img_path=f'images/{split}', seg_map_path=f'annotations/{split}'
            ),
        )
        dataset.metainfo = None if dataset.type == 'ADE20KDataset' else dataset.metainfo
    else:
        dataset.update(
            ann_file=f'annotations/instances_{split}.json',
            data_prefix=dict(img=f'images/{split}'),
            filter_cfg=None,
        )
    dataset = DATASETS.build(dataset)
    return pseudo_collate([dataset[i] for i in range(count)])


@pytest.mark.parametrize('path', CONFIGS, ids=name)
def test_loss_and_prediction(path, demo_data):
    torch.set_num_threads(2)
    cfg = load(path)
    model = build_model(cfg).train()
    batch = model.data_preprocessor(samples(cfg, 'train_dataloader', demo_data, 2), True)
    loss, log = model.parse_losses(model(**batch, mode='loss'))
    loss.backward()
    assert loss.isfinite() and loss > 0
    assert ('loss_rpn_cls' in log) == (cfg.default_scope == 'mmdet')
    lacking = [n for n, p in model.backbone.named_parameters() if p.grad is None]
    assert lacking == []

    model.eval()
    with torch.no_grad():
        (sample,) = model.test_step(samples(cfg, 'test_dataloader', demo_data, 1))
    if cfg.default_scope == 'mmseg':
        labels = sample.pred_sem_seg.data
        assert labels.shape == (1, 96, 96) == sample.gt_sem_seg.data.shape
        assert labels.max() < cfg.model.decode_head.num_classes
    else:
        instances = sample.pred_instances
        assert instances.masks.shape == (len(instances.bboxes), 96, 96)


def test_there_is_a_config_for_every_row():
    """Four archs for UperNet and the cascade, two schedules for Mask R-CNN, two demos."""
    archs = ('xt', 't', 's', 'b')
    assert {p.stem for p in CONFIGS} == {
        *(f'upernet_overlock_{a}' for a in archs),
        *(f'cascade_mask_rcnn_overlock_{a}' for a in archs),
        *(f'mask_rcnn_overlock_{a}_{s}' for a in archs for s in ('1x', '3x')),
        'upernet_overlock_xt_demo',
        'cascade_mask_rcnn_overlock_xt_demo',
    }


@pytest.mark.parametrize('path', CONFIGS, ids=name)
def test_backbone(path):
    cfg, arch = load(path), arch_of(path)
    backbone, channels = cfg.model.backbone, list(OverLoCK.channels_of(arch))
    assert (backbone.type, backbone.arch) == ('OverLoCK', arch)
    assert backbone.context_skip == (path.parent.name == 'detection')
    assert cfg.custom_imports.imports == ['overlock_mm', 'overlock_mm.hooks']
    assert cfg.default_hooks.loading.type == 'StrictLoadingHook'
    if path.parent.name == 'segmentation':
        assert cfg.model.decode_head.in_channels == channels
        assert cfg.model.auxiliary_head.in_channels == channels[2]
    else:
        assert cfg.model.neck.in_channels == channels
    if path in PAPER:
        rates = (
            dict(xt=0.1, t=0.2, s=0.3, b=0.5)
            if path in SEGMENTATION
            else dict(xt=0.1, t=0.2, s=0.4, b=0.6)
        )
        assert backbone.drop_path_rate == rates[arch]
        assert backbone.init_cfg == dict(
            type='Pretrained',
            checkpoint='https://github.com/LMMMEng/OverLoCK/releases/'
            f'download/v1/overlock_{arch}_in1k_224.pth',
        )


@pytest.mark.parametrize('path', PAPER, ids=name)
def test_optimiser(path):
    cfg = load(path)
    lr, decay = (
        (6e-5, 0.01)
        if path in SEGMENTATION
        else (2e-4 if path.stem.endswith('1x') else 1e-4, 0.05)
    )
    model = build_model(cfg)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    assert type(wrapper).__name__ == 'OptimWrapper' and not wrapper.clip_grad_kwargs
    assert type(wrapper.optimizer) is torch.optim.AdamW
    decays = {
        id(p): g['weight_decay']
        for g in wrapper.optimizer.param_groups
        for p in g['params']
    }
    for param_name, param in model.named_parameters():
        expected = 0.0 if 'norm' in param_name else decay
        assert decays[id(param)] == expected, param_name
    undecayed = [n for n, p in model.named_parameters() if decays[id(p)] == 0]
    assert 'backbone.extra_norm.2.weight' in undecayed
    assert 'backbone.sub_blocks3.0.norm1.weight' in undecayed
    assert 'backbone.patch_embed1.1.weight' not in undecayed  # a batch norm in a Sequential
    for group in wrapper.optimizer.param_groups:
        assert (group['lr'], group['betas']) == (lr, (0.9, 0.999))


def learning_rates(cfg, iterations, epoch_length=None):
    """The rate at every iteration, stepping as mmengine's hook does."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=cfg.optim_wrapper.optimizer.lr)
    schedulers = [
        PARAM_SCHEDULERS.build(s, default_args=dict(optimizer=optimizer))
        for s in cfg.param_scheduler
    ]
    rates = []
    for iteration in range(iterations):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        epoch_ends = epoch_length and (iteration + 1) % epoch_length == 0
        for scheduler in schedulers:
            if not scheduler.by_epoch or epoch_ends:
                scheduler.step()
    return rates


def test_segmentation_schedule():
    cfg = load(SEGMENTATION[0])
    assert cfg.train_cfg == dict(
        type='IterBasedTrainLoop', max_iters=160000, val_interval=8000
    )
    rates = learning_rates(cfg, 160000)
    assert rates[0] == pytest.approx(6e-5 * 1e-6)
    assert rates[1] == pytest.approx(6e-5 / 1499, rel=1e-2)
    assert rates[1499] == pytest.approx(6e-5)
    assert rates[1500] == pytest.approx(6e-5)
    assert rates[1500 + 158500 // 2] == pytest.approx(3e-5, rel=1e-3)
    assert rates[-1] == pytest.approx(0, abs=1e-9)
    assert cfg.default_hooks.checkpoint.interval == 8000


@pytest.mark.parametrize('path', [p for p in DETECTION if arch_of(p) == 't'], ids=name)
def test_detection_schedule(path):
    cfg = load(path)
    epochs, steps, lr = (
        (12, (8, 11), 2e-4) if path.stem.endswith('1x') else (36, (27, 33), 1e-4)
    )
    assert cfg.train_cfg == dict(
        type='EpochBasedTrainLoop', max_epochs=epochs, val_interval=1
    )
    length = 600
    rates = learning_rates(cfg, epochs * length, length)
    assert rates[0] == pytest.approx(lr * 0.001)
    assert rates[1] == pytest.approx(lr * (0.001 + 0.999 / 499))
    assert rates[499] == rates[500] == pytest.approx(lr)
    for epoch in range(1, epochs):
        expected = lr * 0.1 ** sum(epoch >= step for step in steps)
        assert rates[epoch * length] == pytest.approx(expected)
    assert rates[-1] == pytest.approx(lr * 0.01)


def steps_of(pipeline):
    return [step['type'] for step in pipeline]


@pytest.mark.parametrize('path', SEGMENTATION, ids=name)
def test_segmentation_data(path):
    cfg = load(path)
    train, test = cfg.train_dataloader.dataset, cfg.test_dataloader.dataset
    assert train.type == test.type == 'ADE20KDataset'
    assert train.data_root == test.data_root == 'data/ade/ADEChallengeData2016/'
    assert cfg.train_dataloader.batch_size == 2
    assert steps_of(train.pipeline) == [
        'LoadImageFromFile',
        'LoadAnnotations',
        'RandomResize',
        'RandomCrop',
        'RandomFlip',
        'PhotoMetricDistortion',
        'PackSegInputs',
    ]
    assert train.pipeline[1].reduce_zero_label
    assert (train.pipeline[2].scale, train.pipeline[2].ratio_range) == (
        (2048, 512),
        (0.5, 2.0),
    )
    assert (train.pipeline[3].crop_size, train.pipeline[3].cat_max_ratio) == (
        (512, 512),
        0.75,
    )
    assert train.pipeline[4].prob == 0.5
    assert steps_of(test.pipeline) == [
        'LoadImageFromFile',
        'Resize',
        'ResizeToMultiple',
        'LoadAnnotations',
        'PackSegInputs',
    ]
    assert (test.pipeline[1].scale, test.pipeline[1].keep_ratio) == ((2048, 512), True)
    assert (test.pipeline[2].size_divisor, test.pipeline[2].interpolation) == (
        32,
        'bicubic',
    )
    assert cfg.model.data_preprocessor.size == (512, 512)
    assert cfg.model.data_preprocessor.seg_pad_val == 255
    assert cfg.model.test_cfg.mode == 'whole'
    decode, aux = cfg.model.decode_head, cfg.model.auxiliary_head
    assert (
        decode.type,
        decode.channels,
        decode.pool_scales,
        decode.dropout_ratio,
        decode.num_classes,
    ) == ('UPerHead', 512, (1, 2, 3, 6), 0.1, 150)
    assert (
        aux.type,
        aux.channels,
        aux.num_convs,
        aux.in_index,
        aux.loss_decode.loss_weight,
        aux.num_classes,
    ) == ('FCNHead', 256, 1, 2, 0.4, 150)
    assert decode.norm_cfg.type == aux.norm_cfg.type == 'SyncBN'


@pytest.mark.parametrize('path', DETECTION, ids=name)
def test_detection_data(path):
    cfg = load(path)
    train, test = cfg.train_dataloader.dataset, cfg.test_dataloader.dataset
    assert train.type == test.type == 'CocoDataset'
    assert train.data_root == test.data_root == 'data/coco/'
    assert cfg.train_dataloader.batch_size == 2
    if path.stem.endswith('1x'):
        assert steps_of(train.pipeline) == [
            'LoadImageFromFile',
            'LoadAnnotations',
            'Resize',
            'RandomFlip',
            'PackDetInputs',
        ]
        assert (train.pipeline[2].scale, train.pipeline[3].prob) == ((1333, 800), 0.5)
    else:
        assert steps_of(train.pipeline) == [
            'LoadImageFromFile',
            'LoadAnnotations',
            'RandomFlip',
            'RandomChoice',
            'PackDetInputs',
        ]
        assert train.pipeline[2].prob == 0.5
        plain, cropped = train.pipeline[3].transforms
        sizes = [
            (short, 1333)
            for short in (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
        ]
        assert plain[0].scales == cropped[2].scales == sizes
        assert [s[0] for s in cropped[0].scales] == [400, 500, 600]
        assert (
            cropped[1].crop_type,
            cropped[1].crop_size,
            cropped[1].allow_negative_crop,
        ) == ('absolute_range', (384, 600), True)
    assert steps_of(test.pipeline) == [
        'LoadImageFromFile',
        'Resize',
        'LoadAnnotations',
        'PackDetInputs',
    ]
    assert (test.pipeline[1].scale, test.pipeline[1].keep_ratio) == ((1333, 800), True)
    assert cfg.model.data_preprocessor.pad_size_divisor == 32
    assert (cfg.model.neck.type, cfg.model.neck.out_channels, cfg.model.neck.num_outs) == (
        'FPN',
        256,
        5,
    )


@pytest.mark.parametrize('path', DETECTION, ids=name)
def test_detector_is_the_stock_one(path):
    """But for backbone and neck, the model is MMDetection's own R50-FPN config."""
    import mmdet

    kind = 'cascade-mask-rcnn' if path.stem.startswith('cascade') else 'mask-rcnn'
    stock = Config.fromfile(
        Path(mmdet.__file__).parent
        / '.mim'
        / 'configs'
        / '_base_'
        / 'models'
        / f'{kind}_r50_fpn.py'
    ).model
    ours = load(path).model
    for part in set(stock) | set(ours):
        if part not in ('backbone', 'neck'):
            assert ours[part] == stock[part], part


@pytest.mark.parametrize('path', PAPER, ids=name)
def test_shared_settings(path):
    cfg = load(path)
    preprocessor = cfg.model.data_preprocessor
    assert preprocessor.mean == [123.675, 116.28, 103.53]
    assert preprocessor.std == [58.395, 57.12, 57.375]
    assert preprocessor.bgr_to_rgb
    assert cfg.sync_bn == 'torch'
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=16)
    assert cfg.optim_wrapper.type == 'OptimWrapper'  # mixed precision is off


def test_demo_classes_are_those_of_the_data():
    from overlock_mm.datasets.demo import CLASSES, PALETTE

    for task, first in (('segmentation', 0), ('detection', 1)):
        (path,) = (ROOT / 'configs' / task).glob('*demo.py')
        info = load(path).train_dataloader.dataset.metainfo
        assert tuple(info.classes) == CLASSES[first:]
        assert [tuple(c) for c in info.palette] == [tuple(c) for c in PALETTE[first:]]
