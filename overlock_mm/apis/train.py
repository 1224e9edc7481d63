"""Training a detector or segmentor."""

from pathlib import Path

import torch
from mmengine.device import get_device
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import Runner

from ..config.checks import check_run
from ..config.edit import (
    fit_workers,
    is_a,
    latest_checkpoint,
    move_pretrained_model,
    replaces_pretrained,
    require_keys,
    starting_checkpoint,
    without_pretrained,
)
from ..config.load import build_runner, load_run_config
from ..errors import CheckpointError, UserError
from ..hooks import AutocastHook
from .devices import usable_dtype
from .files import check_file
from .messages import say


def train(
    config: str | Path,
    *,
    work_dir: str | None = None,
    cfg_options: dict | None = None,
    resume: bool | str = False,
    amp: bool = False,
    auto_scale_lr: bool = False,
    pretrained: bool = True,
    skip_checks: bool = False,
    launcher: str = 'none',
) -> Runner:
    """Train as a config says; what ``tools/train.py`` does.

    Args:
        config: path of a config of MMDetection or MMSegmentation, with any backbone.
        work_dir: where logs and checkpoints go; by default that of the config, or
            ``work_dirs/`` and the name of the config.
        cfg_options: values to override, by key: ``{'train_dataloader.batch_size': 4}``.
        resume: True to go on from the latest checkpoint in the work dir, if there is one,
            or the path of a checkpoint.
        amp: train in mixed precision: with mmengine's AmpOptimWrapper or, without a GPU,
            with :class:`overlock_mm.hooks.AutocastHook`.
        auto_scale_lr: scale the learning rate with the number of GPUs and images.
        pretrained: load the pretrained weights that the config names. What a checkpoint
            brings anyway is not loaded twice.
        skip_checks: do not check data, classes and annotations before the run.
        launcher: how distributed processes were started: 'none', 'pytorch', 'slurm' or
            'mpi'.

    Returns:
        mmengine.runner.Runner: the runner, after training.

    Raises:
        UserError: if the config, the data or an argument cannot be used.
        CheckpointError: if weights cannot be loaded, or do not fit.
    """
    cfg = load_run_config(config, cfg_options, work_dir, launcher)
    require_keys(cfg, 'model', 'train_dataloader', 'train_cfg', 'optim_wrapper')
    if amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    _autocast_on_cpu(cfg)
    if auto_scale_lr:
        if not (cfg.get('auto_scale_lr') or {}).get('base_batch_size'):
            raise UserError(
                f'--auto-scale-lr needs auto_scale_lr.base_batch_size in {config}: the '
                'batch size that its rates are for'
            )
        cfg.auto_scale_lr.enable = True
    start = _find_checkpoint(cfg, resume, pretrained)
    if not pretrained or replaces_pretrained(cfg):
        without_pretrained(cfg.model)
    loaders = ('train_dataloader', 'val_dataloader')
    if not skip_checks:
        check_run(cfg, *loaders)
    for note in fit_workers(cfg, *loaders):
        say(note)
    runner = build_runner(cfg)
    try:
        runner.train()
    except CheckpointError as error:
        if start:
            raise
        raise UserError(f'{error}; or start without: --no-pretrained') from error
    return runner


def _autocast_on_cpu(cfg) -> None:
    """Without a GPU, put AutocastHook in place of mmengine's mixed precision."""
    scope = cfg.get('default_scope')
    wrapper = cfg.optim_wrapper
    if get_device() != 'cpu' or not is_a(wrapper, AmpOptimWrapper, OPTIM_WRAPPERS, scope):
        return
    wrapper.type = 'OptimWrapper'
    dtype, scale = wrapper.pop('dtype', None), wrapper.pop('loss_scale', None)
    wrapper.pop('use_fsdp', None)
    usual = dtype in (None, 'bfloat16', torch.bfloat16) and scale in (None, 'dynamic')
    say(
        'Mixed precision without a GPU: backbone, neck and the heads of segmentors are in '
        'bfloat16, and losses are not scaled'
        + ('' if usual else f' (dtype={dtype}, loss_scale={scale} are for a GPU)')
    )
    usable_dtype('bfloat16', torch.device('cpu'))
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), dict(type=AutocastHook.__name__)]


def _find_checkpoint(cfg, resume: bool | str, pretrained: bool) -> str | None:
    """Set ``load_from`` and ``resume`` of a config; return the checkpoint to start from."""
    if resume is True:
        latest = latest_checkpoint(cfg.work_dir)
        if latest:
            cfg.load_from, cfg.resume = latest, True
        elif not starting_checkpoint(cfg):
            say(f'No checkpoint in {cfg.work_dir} yet: training starts from the beginning.')
    elif resume:
        cfg.load_from, cfg.resume = resume, True
    elif cfg.get('resume') and not starting_checkpoint(cfg):
        say(
            f'resume=True, and no checkpoint in {cfg.work_dir} yet: training starts from '
            'the beginning.'
        )
    note = move_pretrained_model(cfg) if pretrained else None
    if note:
        say(note)
    start = starting_checkpoint(cfg)
    if start:
        start = check_file(start, 'checkpoint')
        if cfg.get('load_from'):
            cfg.load_from = start
    return start
