"""Write a config with another backbone, and try the model that it describes."""

import importlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS
from mmengine.structures import InstanceData, PixelData

from ..config.derive import derived_config
from ..config.edit import without_pretrained
from ..config.load import read_config, register_modules, toolbox_of
from ..config.swap import find_backbone, swap
from ..errors import UserError
from ..openmmlab import config_path
from .files import check_output


def write_swapped(
    config: str,
    out: str | None = None,
    arch: str | dict = 't',
    build: bool = False,
    dry_run: bool = False,
    force: bool = False,
    **options,
) -> tuple[str, list[str], Path | None]:
    """Put another backbone into a config, and write a config that inherits from it.

    Args:
        config: path of the config.
        out: path of the config to write; by default the name of the config with the arch
            at its end, in the current folder.
        arch: as in :func:`overlock_mm.swap_backbone`.
        build: build the model, and compute one loss and one prediction, before the
            config is written.
        dry_run: write nothing.
        force: overwrite ``out``.
        **options: other arguments of :func:`overlock_mm.swap_backbone`.

    Returns:
        The text of the new config; what was changed, a line each; and where it was
        written, None with ``dry_run``.

    Raises:
        UserError: if the backbone cannot be swapped, or the model fails. Then nothing is
            written.
    """
    old = read_config(config)
    name = arch.replace('/', '_') if isinstance(arch, str) else 'own'
    path = Path(out or f'{Path(config).stem}_{name}.py')
    if not dry_run:
        path = check_output(path, ('.py',), force)
        if path.exists() and path.samefile(config_path(config)):
            raise UserError(f'{path} is the given config; choose another --out')
    new, notes = swap(old, arch, **options)
    if build:
        try_model(new)
        notes.append('built: one loss and one prediction on random images succeeded')
    text = derived_config(config, old, new, path)
    if dry_run:
        return text, notes, None
    path.write_text(text)
    return text, notes, path


def try_model(cfg: Config) -> None:
    """Build the model of a config, and compute one loss and one prediction.

    It runs on the CPU, on random images, from random weights. In a config for tracking or
    semi-supervised training it is the detector inside of the model.

    Args:
        cfg: the config.

    Raises:
        UserError: if anything fails.
    """
    toolbox = toolbox_of(cfg)
    register_modules(toolbox)
    node = cfg.model
    for key in find_backbone(cfg)[1:-1]:
        node = node[key]
    node = Config(dict(model=node.to_dict())).model
    without_pretrained(node)
    if not node.get('data_preprocessor'):
        node.data_preprocessor = (
            dict(type='DetDataPreprocessor', pad_size_divisor=32)
            if toolbox == 'mmdet'
            else dict(type='SegDataPreProcessor', size=(64, 64))
        )
    hub = MessageHub.get_current_instance()
    for key in ('iter', 'epoch', 'max_iters', 'max_epochs'):  # which some losses look up
        hub.update_info(key, 0 if key in ('iter', 'epoch') else 1)
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel('WARNING')  # init_weights would list every weight
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = revert_sync_batchnorm(MODELS.build(node))
            model.init_weights()
            make = _segmentation_batch
            if toolbox == 'mmdet':
                make = partial(_detection_batch, with_masks=_loads_masks(dict(cfg.items())))
            model.train()
            losses = model(**model.data_preprocessor(make(model), True), mode='loss')
            total, _ = model.parse_losses(losses)
            total.backward()
            if not torch.isfinite(total):
                raise FloatingPointError(f'the loss is {total.item()}')
            model.eval()
            with torch.no_grad():
                model.test_step(make(model, batch=1))  # some heads take no more
    except Exception as error:  # anything may go wrong in others' heads
        raise UserError(
            f'the model of the new config fails on random images: {type(error).__name__}: '
            f'{error}'
        ) from error
    finally:
        logger.setLevel(level)


def _segmentation_batch(model, batch: int = 2, side: int = 64) -> dict:
    """Random images and label maps."""
    from mmseg.structures import SegDataSample

    samples = []
    size = dict(img_shape=(side, side), ori_shape=(side, side), pad_shape=(side, side))
    for _ in range(batch):
        labels = torch.randint(0, _classes(model), (1, side, side))
        sample = SegDataSample(metainfo=size)
        sample.gt_sem_seg = PixelData(data=labels)
        samples.append(sample)
    return dict(inputs=_images(model, batch, side), data_samples=samples)


def _detection_batch(
    model, with_masks: bool = True, batch: int = 2, side: int = 320
) -> dict:
    """Random images with three objects each, and a label map."""
    structures = importlib.import_module('mmdet.structures')
    masks = importlib.import_module('mmdet.structures.mask')
    samples = []
    size = dict(
        img_shape=(side, side),
        ori_shape=(side, side),
        pad_shape=(side, side),
        batch_input_shape=(side, side),
        scale_factor=(1.0, 1.0),
        img_id=0,
        flip=False,
        img_path='',
    )
    for _ in range(batch):
        corners = torch.tensor([[8, 8], [40, 90], [150, 20]]) + torch.randint(0, 20, (3, 2))
        boxes = torch.cat((corners, corners + torch.randint(60, 140, (3, 2))), 1).float()
        bitmaps = np.zeros((3, side, side), dtype=np.uint8)
        for bitmap, box in zip(bitmaps, boxes.int().tolist(), strict=True):
            bitmap[box[1] : box[3], box[0] : box[2]] = 1
        sample = structures.DetDataSample(metainfo=size)
        sample.gt_instances = InstanceData(
            bboxes=boxes,
            labels=torch.randint(0, _classes(model), (3,)),
        )
        if with_masks:
            sample.gt_instances.masks = masks.BitmapMasks(bitmaps, side, side)
        sample.ignored_instances = InstanceData(
            bboxes=torch.zeros(0, 4), labels=torch.zeros(0).long()
        )
        sample.gt_sem_seg = PixelData(
            sem_seg=torch.randint(0, _classes(model), (1, side, side))
        )
        if not getattr(model, 'with_rpn', False):  # Fast R-CNN
            sample.proposals = InstanceData(bboxes=boxes, scores=torch.ones(3))
        samples.append(sample)
    return dict(inputs=_images(model, batch, side), data_samples=samples)


def _loads_masks(node) -> bool:
    """Whether a config loads masks of instances."""
    if isinstance(node, dict):
        return bool(node.get('with_mask')) or any(map(_loads_masks, node.values()))
    return isinstance(node, list | tuple) and any(map(_loads_masks, node))


def _images(model, batch: int, side: int) -> list[torch.Tensor]:
    channels = getattr(model.backbone, 'in_channels', 3)
    channels = channels if isinstance(channels, int) else 3
    return [torch.randint(0, 256, (channels, side, side)).byte() for _ in range(batch)]


def _classes(model) -> int:
    """The smallest number of classes of all heads; at most 20."""
    counts = [getattr(m, 'num_classes', None) for m in model.modules()]
    return min((c for c in counts if isinstance(c, int) and c > 0), default=20)
