"""Does a backbone learn? Two scenes, again and again, with OverLoCK and with others."""

import copy
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS
from mmengine.runner import set_random_seed

from ..config.load import build_model

# Backbones of both toolboxes to compare with.
BACKBONES = dict(
    resnet18=dict(type='ResNet', depth=18, norm_eval=False),
    swin_t=dict(type='SwinTransformer', drop_path_rate=0.0),
)
# The first loss of each task that needs features of objects.
LOSSES = dict(mmdet='s0.loss_cls', mmseg='decode.loss_ce')


def fit_two_scenes(
    cfg: Config,
    iterations: int = 40,
    lr: float = 5e-4,
    memory_format: torch.memory_format | None = None,
) -> list[dict[str, float]]:
    """Train on the first two scenes alone, without augmentation or a schedule.

    Args:
        cfg: config of a demo, for detection or for segmentation.
        iterations: steps of the config's optimizer.
        lr: learning rate, the same in all iterations.
        memory_format: memory format of the maps that the backbone hands on; by default
            as it returns them.

    Returns:
        list[dict[str, float]]: all losses and accuracies of every iteration.
    """
    set_random_seed(0)
    model = revert_sync_batchnorm(build_model(cfg))
    model.init_weights()
    if memory_format is not None:
        model.backbone.register_forward_hook(
            lambda module, inputs, maps: tuple(
                m.contiguous(memory_format=memory_format) for m in maps
            )
        )
    data = _two_scenes(cfg)
    optim_wrapper = copy.deepcopy(cfg.optim_wrapper)
    optim_wrapper.optimizer.lr = lr
    optim_wrapper = build_optim_wrapper(model, optim_wrapper)
    set_random_seed(1)  # what the heads sample is then the same for every backbone
    model.train()
    history = []
    for _ in range(iterations):
        log = model.train_step(copy.deepcopy(data), optim_wrapper)
        history.append({name: value.item() for name, value in log.items()})
    return history


def _two_scenes(cfg: Config) -> dict:
    dataset = copy.deepcopy(cfg.train_dataloader.dataset)
    detection = cfg.default_scope == 'mmdet'
    annotations = dict(with_bbox=True, with_mask=True) if detection else {}
    dataset.pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', **annotations),
        dict(type='Resize', scale=(192, 192) if detection else (160, 160)),
        dict(type='PackDetInputs' if detection else 'PackSegInputs'),
    ]
    dataset = DATASETS.build(dataset)
    return pseudo_collate([dataset[0], dataset[1]])


def draw_curves(
    histories: dict[str, dict[str, list[dict[str, float]]]], path: str | Path
) -> None:
    """Draw the losses of both tasks.

    Args:
        histories: of each scope, 'mmdet' and 'mmseg', what ``fit_two_scenes`` returned
            for each run, by the run's name.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout='constrained')
    titles = dict(mmdet='Cascade Mask R-CNN: first stage', mmseg='UPerNet: decode head')
    for axes, (scope, runs) in zip(figure.subplots(1, 2), histories.items(), strict=True):
        for name, history in runs.items():
            values = [log[LOSSES[scope]] for log in history]
            style = '--' if 'channels_last' in name else '-'
            axes.plot(range(1, len(values) + 1), values, style, label=name)
        axes.set(xlabel='iteration', ylim=(0, None), title=titles[scope])
        axes.set_ylabel('classification loss')
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
