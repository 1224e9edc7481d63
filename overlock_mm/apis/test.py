"""Evaluating a detector or segmentor."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from mmengine.device import get_device
from mmengine.fileio import get
from mmengine.hooks import Hook
from mmengine.runner import Runner
from PIL import Image

from ..config.checks import check_run
from ..config.edit import evaluators, fit_workers, require_keys, without_pretrained
from ..config.load import build_runner, load_run_config, toolbox_of
from ..config.tta import use_tta
from ..errors import UserError
from ..hooks import AutocastHook, FoldHook
from ..models import OverLoCK
from .devices import usable_dtype
from .files import check_file
from .messages import say

_VISUALIZERS = dict(mmdet='mmdet.DetLocalVisualizer', mmseg='mmseg.SegLocalVisualizer')


def test(
    config: str | Path,
    checkpoint: str | Path,
    *,
    work_dir: str | None = None,
    cfg_options: dict | None = None,
    out: str | None = None,
    show_dir: str | None = None,
    show: bool = False,
    wait_time: float = 2.0,
    tta: bool = False,
    fold: bool = False,
    dtype: str | None = None,
    skip_checks: bool = False,
    launcher: str = 'none',
) -> dict:
    """Evaluate a checkpoint as a config says; what ``tools/test.py`` does.

    Args:
        config: path of a config of MMDetection or MMSegmentation, with any backbone.
        checkpoint: path or URL of the weights.
        work_dir: where logs go; by default that of the config, or ``work_dirs/`` and the
            name of the config.
        cfg_options: values to override, by key: ``{'test_dataloader.num_workers': 0}``.
        out: where predictions go: a .pkl file from a detector, a folder of label maps
            from a segmentor.
        show_dir: folder for pictures of the predictions.
        show: show these pictures in a window, one after the other.
        wait_time: seconds for which a picture is shown; 0 waits for a key.
        tta: test-time augmentation: as the config's ``tta_model`` and ``tta_pipeline``
            say, else with the images as they are and flipped.
        fold: evaluate the inference-only form of the backbone (:func:`overlock_mm.fold`).
        dtype: 'bfloat16' or 'float16' for half precision in backbone, neck and the heads
            of segmentors. Defaults to 'float32'.
        skip_checks: do not check data, classes and annotations before the run.
        launcher: how distributed processes were started: 'none', 'pytorch', 'slurm' or
            'mpi'.

    Returns:
        dict[str, float]: the metrics.

    Raises:
        UserError: if the config, the data or an argument cannot be used.
        CheckpointError: if the weights cannot be loaded, or do not fit.
    """
    dtype = usable_dtype(dtype, torch.device(get_device()))
    cfg = load_run_config(config, cfg_options, work_dir, launcher)
    toolbox = toolbox_of(cfg)
    require_keys(cfg, 'model', 'test_dataloader')
    cfg.load_from, cfg.resume = check_file(checkpoint, 'checkpoint'), False
    without_pretrained(cfg.model)
    _check_outputs(cfg, toolbox, out, show_dir, show)
    if not skip_checks:
        check_run(cfg, 'test_dataloader')
    notes = fit_workers(cfg, 'test_dataloader')
    pictures = _picture_options(cfg, toolbox, show_dir, show, wait_time)
    if tta:
        notes += use_tta(cfg, toolbox)
    for note in notes:
        say(note)
    runner = build_runner(cfg)
    if out and toolbox == 'mmdet':
        from mmdet.evaluation import DumpDetResults

        runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=out))
    label_maps = out if toolbox == 'mmseg' else None
    if label_maps or pictures:
        runner.register_hook(_PredictionWriter(label_maps, pictures))
    if fold:
        if not any(isinstance(module, OverLoCK) for module in runner.model.modules()):
            raise UserError(f'--fold: the model of {config} has no OverLoCK; leave it out')
        runner.register_hook(FoldHook())
    if dtype:
        runner.register_hook(AutocastHook(dtype))
    return runner.test()


test.__test__ = False  # what its name says to pytest


def _check_outputs(cfg, toolbox, out, show_dir, show) -> None:
    """Raise :class:`UserError` for what would otherwise fail after the test, or in it."""
    if out and toolbox == 'mmdet' and not str(out).endswith(('.pkl', '.pickle')):
        raise UserError(f'--out {out} must end in .pkl for a detector')
    if not cfg.get('test_cfg'):
        cfg.test_cfg = {}
    if not evaluators(cfg):
        if not (out or show_dir or show):
            raise UserError(
                f'{cfg.filename} has no test_evaluator, so there is nothing to compute; '
                'add one, or save predictions with --out or --show-dir'
            )
        cfg.test_evaluator = []
    if show:
        import matplotlib.pyplot as plt

        if plt.get_backend().lower() in ('agg', 'cairo', 'pdf', 'pgf', 'ps', 'svg'):
            raise UserError(
                f'--show needs a display, and matplotlib has none here (its backend is '
                f'{plt.get_backend()}); save pictures with --show-dir instead'
            )


def _picture_options(cfg, toolbox, show_dir, show, wait_time) -> dict | None:
    """Set up the drawing of predictions; add the toolbox's visualizer if there is none."""
    if not (show_dir or show):
        return None
    if not cfg.get('visualizer'):
        cfg.visualizer = dict(type=_VISUALIZERS[toolbox])
    hook = (cfg.get('default_hooks') or {}).get('visualization') or {}
    options = dict(show_dir=show_dir, show=show, wait_time=wait_time)
    options['backend_args'] = hook.get('backend_args')
    if hook.get('score_thr') is not None:
        options['pred_score_thr'] = hook['score_thr']
    return options


class _PredictionWriter(Hook):
    """Save label maps and pictures of predictions under the names of the images.

    The toolboxes' own metrics and hooks use the base name alone, so that of two images
    ``a/1.png`` and ``b/1.png`` one result is left. Here folders are kept.

    Args:
        label_maps: folder for label maps.
        pictures: ``show_dir``, ``backend_args`` and what the visualizer draws with.
    """

    def __init__(self, label_maps: str | None, pictures: dict | None):
        self.label_maps = label_maps
        self.pictures = dict(pictures or {})
        self.show_dir = self.pictures.pop('show_dir', None)
        self.backend_args = self.pictures.pop('backend_args', None)

    def before_test_epoch(self, runner: Runner) -> None:
        dataset = runner.test_loop.dataloader.dataset
        paths = [dataset.get_data_info(i)['img_path'] for i in range(len(dataset))]
        self.names = output_names(paths)

    def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=()) -> None:
        for sample in outputs:
            name = self.names[os.path.normpath(sample.img_path)]
            if self.label_maps:
                self._save_label_map(sample, Path(self.label_maps, f'{name}.png'))
            if self.pictures:
                self._draw(runner.visualizer, sample, name)

    def _save_label_map(self, sample, path: Path) -> None:
        labels = sample.pred_sem_seg.data.squeeze().cpu().numpy()
        if sample.get('reduce_zero_label', False):
            labels = labels + 1  # as in the files that the data set is read from
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(labels.astype(np.uint8)).save(path)

    def _draw(self, visualizer, sample, name: str) -> None:
        import mmcv

        content = get(sample.img_path, backend_args=self.backend_args)
        image = mmcv.imfrombytes(content, channel_order='rgb')
        out_file = None
        if self.show_dir:
            suffix = os.path.splitext(sample.img_path)[1]
            out_file = str(Path(self.show_dir, f'{name}{suffix}'))
        else:
            visualizer._vis_backends = {}  # else what is shown is saved as well
        visualizer.add_datasample(name, image, sample, out_file=out_file, **self.pictures)


def output_names(paths: Sequence[str]) -> dict[str, str]:
    """Names for what belongs to images: without suffix, below the folder of them all.

    Args:
        paths: paths of the images.

    Returns:
        The names, with their folders, by path.

    Raises:
        UserError: if two images differ in their suffix alone.
    """
    paths = [os.path.normpath(path) for path in paths]
    top = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ''
    names, taken = {}, {}
    for path in paths:
        name = os.path.splitext(os.path.relpath(path, top or '.'))[0]
        if taken.setdefault(name, path) != path:
            raise UserError(
                f'{taken[name]} and {path} would both be saved as {name}: rename one of '
                'them, or test without --out and --show-dir'
            )
        names[path] = name
    return names
