"""Writing a config for a data set: what a look at it has found, in a few lines."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

_WIDTH = 92
# The recipes: what is inherited, the learning rate, for how many images that is, and the
# processes that load images.
_BASES = dict(
    segmentation='overlock_mm::segmentation/upernet_overlock_{arch}.py',
    detection='overlock_mm::detection/mask_rcnn_overlock_{arch}_1x.py',
)
_RATES = dict(segmentation=6e-5, detection=2e-4)
_RATE_IMAGES = 16
_WORKERS = dict(segmentation=4, detection=2)
_ADE20K_EPOCHS = 127  # 160,000 iterations of 16 images, of 20,210


@dataclass(frozen=True)
class Training:
    """How to train.

    Attributes:
        batch: images in an iteration.
        accumulation: iterations in a step of the optimizer.
        small_gpu: activation checkpointing, and for segmentors mixed precision in bfloat16.
        workers: processes that load images.
    """

    batch: int
    accumulation: int
    small_gpu: bool
    workers: int

    @classmethod
    def of(cls, task: str, batch: int | None, small_gpu: bool) -> 'Training':
        """The defaults for a batch size, or for a small GPU."""
        batch = batch or (2 if small_gpu else 4)
        accumulation = max(1, _RATE_IMAGES // batch) if small_gpu else 1
        workers = min(_WORKERS[task], os.cpu_count() or 1)
        return cls(batch, accumulation, small_gpu, workers)


class _Name(str):
    """A name in a config, which is written without quotes."""


def segmentation_config(
    data, lists: Sequence[dict[tuple[str, str], tuple[str, int]]], arch: str, how: Training
) -> str:
    """The config of a segmentor.

    Args:
        data (Segmentation): the data set.
        lists: for training and for validation: by the suffixes of images and label maps,
            the file that lists their names, and how many names it has.
        arch: 'xt', 't', 's' or 'b'.
        how: how to train.

    Returns:
        The text of a Python file.
    """
    count = len(data.classes.names)
    scale, crop = _segmentation_sizes(data.size)
    labels = [dict(type='LoadAnnotations')]
    if not data.classes.are_indices:
        labels.append(dict(type='MapLabels', values=data.classes.values))
    load, normalise = _loading(data.loading)
    photometric = [] if normalise else [dict(type='PhotoMetricDistortion')]
    resize = dict(type='RandomResize', scale=scale, ratio_range=(0.5, 2.0), keep_ratio=True)
    crop_size = _Name('crop_size')
    train = [
        *load,
        *labels,
        resize,
        dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
        dict(type='RandomFlip', prob=0.5),
        *photometric,
        *normalise,
        dict(type='PackSegInputs'),
    ]
    # labels come after resizing: metrics are computed at their own size
    test = [
        *load,
        dict(type='Resize', scale=scale, keep_ratio=True),
        *normalise,
        *labels,
        dict(type='PackSegInputs'),
    ]
    images = sum(n for _, n in lists[0].values())
    iterations = _segmentation_iterations(images, how)
    warmup, interval = min(1500, iterations // 10), max(1, iterations // 20)
    poly = dict(type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False)
    entries = [
        ('classes', tuple(data.classes.names)),
        ('palette', [list(color) for color in data.classes.palette]),
        ('crop_size', crop),
        (
            'model',
            dict(
                data_preprocessor=dict(size=crop_size, **_preprocessor(data.loading)),
                backbone=_backbone(data.loading, how),
                decode_head=dict(num_classes=count),
                auxiliary_head=dict(num_classes=count),
            ),
        ),
        ('train_pipeline', train),
        ('test_pipeline', test),
        *_loaders(
            'segmentation',
            how,
            _segmentation_datasets(data.sets[0], lists[0], 'train_pipeline'),
            _segmentation_datasets(data.sets[-1], lists[-1], 'test_pipeline'),
        ),
        *_optimizer('segmentation', how),
        ('train_cfg', dict(max_iters=iterations, val_interval=interval)),
        (
            'param_scheduler',
            [
                dict(type='LinearLR', start_factor=1e-6, by_epoch=False, end=warmup),
                dict(**poly, begin=warmup, end=iterations),
            ],
        ),
        ('default_hooks', dict(checkpoint=dict(interval=interval))),
    ]
    about = f'{images} images of {data.sets[0].images}, {count} classes'
    return _text('segmentation', arch, about, entries)


def _segmentation_sizes(size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Size that images are scaled to, long side first, and the size of crops.

    Images keep their size between 128 pixels, the short side, and 2048, the long one.
    """
    long, short = max(size), min(size)
    factor = max(1.0, 128 / short)
    factor = min(factor, max(2048 / long, 128 / short))
    long, short = round(long * factor), round(short * factor)
    side = min(512, short // 32 * 32)
    return (long, short), (side, side)


def _segmentation_iterations(images: int, how: Training) -> int:
    """As many epochs as on ADE20K, within limits, in round numbers."""
    iterations = images * _ADE20K_EPOCHS / how.batch
    iterations = min(max(iterations, 4000 * how.accumulation), 160000 * how.accumulation)
    return round(iterations, 1 - int(math.log10(iterations)))


def _segmentation_datasets(own, lists: dict, pipeline: str) -> list[dict]:
    """One data set for each pair of suffixes."""
    return [
        dict(
            type='BaseSegDataset',
            metainfo=dict(classes=_Name('classes'), palette=_Name('palette')),
            data_prefix=dict(img_path=str(own.images), seg_map_path=str(own.masks)),
            img_suffix=image,
            seg_map_suffix=label_map,
            ann_file=file,
            pipeline=_Name(pipeline),
        )
        for (image, label_map), (file, _) in lists.items()
    ]


def detection_config(
    data, files: Sequence[tuple[str, str, int]], arch: str, how: Training
) -> str:
    """The config of a detector.

    Args:
        data (Detection): the data set.
        files: for training and for validation: COCO file, folder of the images, and how
            many images are trained on.
        arch: 'xt', 't', 's' or 'b'.
        how: how to train.

    Returns:
        The text of a Python file.
    """
    count = dict(num_classes=len(data.classes))
    load, normalise = _loading(data.loading)
    annotations = dict(type='LoadAnnotations', with_bbox=True)
    heads = dict(bbox_head=count, mask_head=count)
    evaluator = dict(ann_file=files[-1][0])
    model = dict(
        data_preprocessor=_preprocessor(data.loading),
        backbone=_backbone(data.loading, how),
        roi_head=heads,
    )
    if data.has_masks:
        annotations['with_mask'] = True
    else:
        heads.update(mask_head=None, mask_roi_extractor=None)
        evaluator['metric'] = 'bbox'
        model = dict(type='FasterRCNN', **model)
    resize = dict(type='Resize', scale=_detection_scale(data.size), keep_ratio=True)
    train = [
        *load,
        annotations,
        resize,
        dict(type='RandomFlip', prob=0.5),
        *normalise,
        dict(type='PackDetInputs'),
    ]
    test = [
        *load,
        resize,
        *normalise,
        annotations,
        dict(type='PackDetInputs'),
    ]
    epochs = _detection_epochs(files[0][2])
    steps = [round(epochs * 2 / 3), round(epochs * 11 / 12)]
    entries = [
        ('classes', tuple(data.classes)),
        ('model', model),
        ('train_pipeline', train),
        ('test_pipeline', test),
        *_loaders(
            'detection',
            how,
            [_detection_dataset(*files[0][:2], 'train_pipeline')],
            [_detection_dataset(*files[-1][:2], 'test_pipeline')],
        ),
        ('test_evaluator = val_evaluator', evaluator),
        *_optimizer('detection', how),
        ('train_cfg', dict(max_epochs=epochs, val_interval=max(1, epochs // 12))),
        (
            'param_scheduler',
            [
                dict(
                    type='LinearLR',
                    start_factor=0.001,
                    by_epoch=False,
                    end=min(500, max(1, files[0][2] * epochs // how.batch // 10)),
                ),
                dict(type='MultiStepLR', by_epoch=True, milestones=steps, gamma=0.1),
            ],
        ),
    ]
    about = f'{files[0][2]} images of {files[0][1]}, {len(data.classes)} classes'
    return _text('detection', arch, about, entries)


def _detection_scale(size: tuple[int, int]) -> tuple[int, int]:
    """COCO's (1333, 800); small images are enlarged to twice their size at most."""
    long, short = max(size), min(size)
    target = min(800, max(128, 2 * short))
    target = math.ceil(target / 32) * 32
    longest = max(1333 / 800, min(long / short, 2.5))
    return math.ceil(target * longest), target


def _detection_epochs(images: int) -> int:
    """The 12 epochs of the recipe, more for few images."""
    return 12 if images >= 2000 else min(96, 12 * math.ceil(2000 / max(images, 1)))


def _detection_dataset(file: str, folder: str, pipeline: str) -> dict:
    train = pipeline.startswith('train')
    return dict(
        type='CocoDataset',
        metainfo=dict(classes=_Name('classes')),
        ann_file=file,
        data_prefix=dict(img=folder),
        **(dict(filter_cfg=dict(filter_empty_gt=True)) if train else dict(test_mode=True)),
        pipeline=_Name(pipeline),
    )


def _loading(loading: dict) -> tuple[list[dict], list[dict]]:
    """Transforms that load an image, and those that normalise it if the model does not."""
    layout, load = loading['layout'], dict(type='LoadImageFromFile')
    if layout.is_common:
        if loading['ignore_orientation']:
            load['color_type'] = 'color_ignore_orientation'
        return [load], []
    load.update(color_type='unchanged', to_float32=True)
    if layout.tiff:
        load['imdecode_backend'] = 'tifffile'
    turn = [dict(type='ChannelsLast')] if layout.planar else []
    return [load, *turn], [
        dict(type='Standardize', mean=loading['mean'], std=loading['std'])
    ]


def _preprocessor(loading: dict) -> dict:
    layout = loading['layout']
    if layout.is_common:
        return {}
    # OpenCV loads blue first, tifffile does not
    swap = layout.channels == 3 and not layout.tiff
    return dict(mean=None, std=None, bgr_to_rgb=swap)


def _backbone(loading: dict, how: Training) -> dict:
    channels = loading['layout'].channels
    other = dict(in_channels=channels) if channels != 3 else {}
    return dict(**other, **(dict(with_cp=True) if how.small_gpu else {}))


def _loaders(task: str, how: Training, train: list[dict], val: list[dict]) -> list[tuple]:
    workers = dict(num_workers=how.workers)
    if not how.workers:
        workers['persistent_workers'] = False
    elif how.workers == _WORKERS[task]:
        workers = {}
    first, *others = (list(own.items()) for own in (*train, *val))
    shared = {k: v for k, v in first if all((k, v) in other for other in others)}
    train, val = (_dataset(own, shared) for own in (train, val))
    return [
        ('dataset', shared),
        ('train_dataloader', dict(batch_size=how.batch, **workers, dataset=train)),
        ('test_dataloader = val_dataloader', dict(**workers, dataset=val)),
    ]


def _dataset(own: list[dict], shared: dict) -> dict:
    """A data set, in which ``dataset`` of the config stands for what is shared."""
    short = [{k: v for k, v in one.items() if k not in shared} for one in own]
    if len(own) == 1:
        return {'_delete_': True, '**': _Name('dataset'), **short[0]}
    datasets = [{'**': _Name('dataset'), **one} for one in short]
    return dict(_delete_=True, type='ConcatDataset', datasets=datasets)


def _optimizer(task: str, how: Training) -> list[tuple]:
    images = how.batch * how.accumulation
    rate = float(f'{_RATES[task] * images / _RATE_IMAGES:.3g}')
    wrapper = dict(optimizer=dict(lr=rate))
    if how.small_gpu:
        wrapper['accumulative_counts'] = how.accumulation
    if how.small_gpu and task == 'segmentation':  # mmcv's RoIAlign has no bfloat16
        wrapper.update(type='AmpOptimWrapper', dtype='bfloat16')
    return [
        ('optim_wrapper', wrapper),
        ('auto_scale_lr', dict(base_batch_size=how.batch)),
    ]


def _text(task: str, arch: str, about: str, entries: Sequence[tuple]) -> str:
    base = _BASES[task].format(arch=arch)
    lines = [f'# {about}. Written by overlock init.', f'_base_ = {base!r}']
    lines.append(
        'data_source = tta_pipeline = None  # those of the base are for its own data'
    )
    for name, value in entries:
        lines += _written(f'{name} = ', _without_empty(value), '')
    return '\n'.join(lines) + '\n'


def _without_empty(value):
    """The same without dicts that say nothing."""
    if isinstance(value, dict):
        value = {k: _without_empty(v) for k, v in value.items()}
        return {k: v for k, v in value.items() if v != {}}
    return value


def _written(start: str, value, end: str) -> list[str]:
    """Lines of a value: one if it fits, else its items fill lines."""
    line = start + _inline(value) + end
    if len(line) <= _WIDTH or not isinstance(value, dict | list | tuple):
        return [line]
    indent = ' ' * (len(start) - len(start.lstrip()))
    if isinstance(value, dict):
        opening, closing = 'dict(', ')'
        items = [(_keyword(key), item) for key, item in value.items()]
    else:
        opening, closing = '[]' if isinstance(value, list) else '()'
        items = [('', item) for item in value]
    *before, (key, last) = items
    head = start + opening + ''.join(f'{k}{_inline(v)}, ' for k, v in before) + key
    if isinstance(last, dict) and len(head) + len('dict(') <= _WIDTH and key:
        return _written(head, last, closing + end)
    lines, full = [start + opening], True
    for key, item in items:
        text = f'{indent}    {key}{_inline(item)},'
        if len(text) > _WIDTH:
            lines += _written(f'{indent}    {key}', item, ',')
        elif full or len(lines[-1]) + len(text.lstrip()) >= _WIDTH:
            lines.append(text)
        else:
            lines[-1] += ' ' + text.lstrip()
        full = len(text) > _WIDTH
    return [*lines, indent + closing + end]


def _keyword(key: str) -> str:
    return key if key == '**' else f'{key}='


def _inline(value) -> str:
    if isinstance(value, _Name):
        return str(value)
    if isinstance(value, dict):
        return f'dict({", ".join(_keyword(k) + _inline(v) for k, v in value.items())})'
    if isinstance(value, list):
        return f'[{", ".join(map(_inline, value))}]'
    if isinstance(value, tuple):
        inner = ', '.join(map(_inline, value))
        return f'({inner},)' if len(value) == 1 else f'({inner})'
    return repr(value)
