"""The published results again: evaluate the released checkpoints, or train the recipes.

The rows and their published numbers are in the metafiles beside the configs. Every step is
a command of this package, which can be run by hand as well.
"""

import copy
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import yaml

from ..checkpoint import download
from ..errors import CheckpointError, UserError
from ..openmmlab import CONFIGS
from ..version import __version__
from .messages import say

# Metrics of the metafiles: the name in the log of an evaluation, and what 1.0 is there.
_METRICS = {
    'Top 1 Accuracy': ('top1', 100),
    'box AP': ('coco/bbox_mAP', 100),
    'mask AP': ('coco/segm_mAP', 100),
    'mIoU': ('mIoU', 1),
}
# What is evaluated on the data sets of the metafiles; others are no rows.
_MEASURED = {
    'ImageNet-1K': ('Top 1 Accuracy',),
    'COCO': ('box AP', 'mask AP'),
    'ADE20K': ('mIoU',),
}
_IMAGENET = (
    'Get ImageNet-1K (ILSVRC 2012) from https://image-net.org/download.php, with one '
    'folder of images for each class in val, or link it there'
)
_TIMM = 'timm/'
# The folder of the data sets in the configs.
_DATA = 'data'
# What follows from the number of GPUs.
_DIVIDED = ('train_dataloader.batch_size', 'optim_wrapper.accumulative_counts')


@dataclass(frozen=True)
class Row:
    """A row of the tables of results.

    Args:
        name: name of the entry in a metafile.
        backbone: such as 'OverLoCK-T'.
        data: name of the data set.
        config: such as ``'overlock_mm::segmentation/upernet_overlock_t.py'``; None for a
            classifier.
        weights: URL of the released checkpoint; None if none was released.
        published: the published numbers by metric; None where none was published.
    """

    name: str
    backbone: str
    data: str
    config: str | None
    weights: str | None
    published: dict[str, float | None]


@dataclass
class Result:
    """A number, beside the published one.

    Args:
        row: name of the row.
        backbone: 'OverLoCK-T', or the model of timm in its place.
        weights: 'released' or 'trained here'; '' if there is no result.
        metric: as in the metafiles, for instance 'box AP'.
        published: what the authors published, in percent.
        obtained: what was measured, in percent.
        origin: of what was measured: checkpoint and its SHA-256, config, options, versions
            and date.
    """

    row: str
    backbone: str
    weights: str
    metric: str
    published: float | None
    obtained: float | None = None
    origin: dict = field(default_factory=dict)

    @property
    def difference(self) -> float | None:
        if None in (self.published, self.obtained):
            return None
        return round(self.obtained - self.published, 2)

    def cells(self) -> list[str]:
        """The values as text, for a table."""
        published = 'not published' if self.published is None else f'{self.published:.1f}'
        if self.backbone.startswith(_TIMM):  # the row's number is another model's
            published = '-'
        obtained = '-' if self.obtained is None else f'{self.obtained:.2f}'
        difference = '-' if self.difference is None else f'{self.difference:+.2f}'
        name = [self.row, self.backbone, self.weights or '-', self.metric]
        return [*name, published, obtained, difference]


_COLUMNS = ['row', 'backbone', 'weights', 'metric', 'published', 'obtained', 'difference']


def as_text(results: Sequence[Result]) -> str:
    """Results as a table for a terminal."""
    lines = [_COLUMNS, *(result.cells() for result in results)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return '\n'.join(
        '  '.join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def as_markdown(results: Sequence[Result]) -> str:
    """Results as a table in Markdown."""
    lines = [_COLUMNS, ['---'] * len(_COLUMNS), *(result.cells() for result in results)]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines) + '\n'


def as_json(results: Sequence[Result]) -> str:
    """Results as a list of objects in JSON."""
    listed = [dict(asdict(r), difference=r.difference) for r in results]
    return json.dumps(listed, indent=1) + '\n'


def read_rows() -> dict[str, Row]:
    """The rows by name: every model of the metafiles that is not a demo.

    Raises:
        UserError: if the package has no metafiles.
    """
    rows = {}
    for path in sorted(CONFIGS.glob('*/metafile.yml')):
        for entry in yaml.safe_load(path.read_text())['Models']:
            data = entry['Metadata']['Training Data']
            if data not in _MEASURED:
                continue
            published = dict.fromkeys(_MEASURED[data])
            for result in entry.get('Results', ()):
                published.update(result['Metrics'])
            config = entry.get('Config')
            rows[entry['Name']] = Row(
                entry['Name'],
                entry['Metadata']['Backbone'],
                data,
                config and config.replace('configs/', 'overlock_mm::', 1),
                entry.get('Weights'),
                published,
            )
    if not rows:
        raise UserError(
            f'{CONFIGS} has no metafiles: overlock_mm is not installed completely; run pip '
            'install . or pip install -e . in its folder'
        )
    return rows


def select_rows(names: Sequence[str], train: bool = False) -> list[Row]:
    """The rows that are asked for.

    Args:
        names: names of rows, patterns such as ``'mask_rcnn*'``, or ``'all'`` for every row
            with a published number.
        train: whether they are to be trained, which classifiers are not here.

    Raises:
        UserError: if there is no such row.
    """
    rows, chosen = read_rows(), {}
    for name in names:
        if name == 'all':
            found = [r for r in rows.values() if any(r.published.values())]
            found = [r for r in found if r.config or not train]
        else:
            found = [row for row in rows.values() if fnmatchcase(row.name, name)]
        if not found:
            near = get_close_matches(name, rows)
            hint = f'did you mean {" or ".join(near)}? ' if near else ''
            raise UserError(
                f'there is no row {name}; {hint}overlock reproduce --list shows all'
            )
        chosen.update({row.name: row for row in found})
    return list(chosen.values())


class Division(NamedTuple):
    """How the images of an update of the weights are divided."""

    gpus: int  # 0: the CPU
    images: int  # on a GPU in an iteration
    accumulated: int  # iterations whose gradients are added up

    @property
    def total(self) -> int:
        """Images of an update."""
        return max(self.gpus, 1) * self.images * self.accumulated


def divide(total: int, gpus: int, most: int) -> Division:
    """Divide the images of an update among GPUs and iterations.

    Args:
        total: images of an update in the recipe.
        gpus: number of GPUs; 0 for the CPU.
        most: the most images on a GPU in an iteration.

    Returns:
        The division that is nearest to the total, and of several the one with the most
        images in an iteration, as batch norms see these.
    """
    return min(
        (
            Division(gpus, images, accumulated)
            for images in range(1, most + 1)
            for accumulated in range(1, total + 1)
        ),
        key=lambda d: (abs(d.total - total), d.accumulated),
    )


def training_options(cfg, gpus: int, most: int) -> tuple[dict, list[str]]:
    """What a recipe needs on another number of GPUs: the same updates on as many images.

    mmengine counts iterations of the data loader, also where the gradients of several are
    added up for one update. So everything that is counted in iterations becomes that many
    times as long: the training, warm-up and schedule, and the intervals of validation and
    checkpoints. Epochs stay as they are.

    Args:
        cfg (mmengine.Config): the recipe, whose ``auto_scale_lr.base_batch_size`` is the
            number of images of an update.
        gpus: number of GPUs; 0 for the CPU.
        most: the most images on a GPU in an iteration.

    Returns:
        Values by key of the config, and what they mean, a line each. Where the recipe's
        number of images of an update cannot be reached, the learning rate is scaled
        linearly (https://arxiv.org/abs/1706.02677).
    """
    base = cfg.auto_scale_lr.base_batch_size
    division = divide(base, gpus, most)
    total = division.total

    def iterations(count: int) -> int:
        return -(-count * base // total) * division.accumulated

    options = dict(zip(_DIVIDED, division[1:], strict=True))
    where = f'{gpus} GPU{"s" * (gpus != 1)}' if gpus else 'the CPU'
    notes = [
        f'{total} images in an update: {division.images} in an iteration on {where} x '
        f'{division.accumulated} iteration{"s" * (division.accumulated > 1)}'
    ]
    if total != base:
        rate = cfg.optim_wrapper.optimizer.lr
        options['optim_wrapper.optimizer.lr'] = rate * total / base
        notes.append(
            f'the recipe has {base}, which {gpus} GPUs cannot have: learning rate {rate:g} '
            f'-> {rate * total / base:g}'
        )
    if max(gpus, 1) * division.images < base:
        notes.append(
            'batch norms take statistics of an iteration, so of fewer images than in the '
            'recipe'
        )
    for i, scheduler in enumerate(cfg.param_scheduler):
        if not scheduler.get('by_epoch', True):
            for key in ('begin', 'end'):
                if scheduler.get(key):
                    options[f'param_scheduler.{i}.{key}'] = iterations(scheduler[key])
    if 'max_iters' in cfg.train_cfg:
        for key in ('max_iters', 'val_interval'):
            options[f'train_cfg.{key}'] = iterations(cfg.train_cfg[key])
    saving = cfg.default_hooks.checkpoint
    if not saving.get('by_epoch', True):
        options['default_hooks.checkpoint.interval'] = iterations(saving.interval)
    same = division == (gpus, cfg.train_dataloader.batch_size, 1) and total == base
    return ({} if same else options), notes


def reproduce(
    names: Sequence[str] = ('all',),
    *,
    data_root: str = _DATA,
    gpus: int | None = None,
    train: bool = False,
    baseline: str | None = None,
    out: str = 'work_dirs/reproduce',
    weights: str | None = None,
    images_per_gpu: int = 2,
    pretrained: bool = True,
    cfg_options: dict | None = None,
    dry_run: bool = False,
) -> tuple[list[Result], dict[str, str]]:
    """Evaluate the released checkpoints of rows, or train the rows and evaluate them.

    What is done already is not done again, unless its checkpoint, config or options have
    changed. Each row has a folder in ``out``.

    Args:
        names: rows, as in :func:`select_rows`.
        data_root: folder that has ``coco/``, ``ade/ADEChallengeData2016/`` and
            ``imagenet/val/``, as far as the rows need them.
        gpus: number of GPUs, by default all that torch sees; 0 for the CPU.
        train: train as the recipe says, and evaluate the last checkpoint.
        baseline: ``'timm/NAME'``: train with this model of timm as the backbone, and the
            row's stochastic depth if it has any.
        out: folder of results.
        weights: folder that has released checkpoints. What is not there is taken from
            torch hub's cache, or downloaded.
        images_per_gpu: the most images on a GPU in an iteration of training.
        pretrained: start training from pretrained weights.
        cfg_options: values for keys of the configs, before ``gpus`` is taken into account.
        dry_run: print the commands, and run nothing.

    Returns:
        The results that ``out`` has for these rows, and the reason for each row that
        failed.

    Raises:
        UserError: if an argument cannot be used, or if data is missing.
    """
    rows = select_rows(names, train)
    gpus = _check_gpus(gpus, dry_run)
    _check_arguments(train, baseline, weights, images_per_gpu, cfg_options)
    common = _Common(
        os.path.expanduser(str(data_root)).rstrip('/') or '/',
        gpus,
        train,
        baseline,
        Path(out).expanduser(),
        weights and Path(weights).expanduser(),
        images_per_gpu,
        pretrained,
        cfg_options or {},
    )
    if 'all' in names and not train and not dry_run:
        rows = _without_imagenet(rows, common)
    jobs = [_Job(row, common) for row in rows]
    if not dry_run:
        jobs = _possible(jobs)
    missing = dict.fromkeys(filter(None, (job.missing_data() for job in jobs)))
    if missing and not dry_run:
        raise UserError('; '.join(missing))
    for reason in missing:
        say(f'# {reason}')
    failures = {}
    for job in jobs:
        say(f'# {job}')
        if dry_run:
            job.show()
            continue
        try:
            job.run()
        except (UserError, CheckpointError) as error:
            failures[job.row.name] = str(error)
            say(f'# failed: {error}')
    return ([] if dry_run else results_of(rows, common.out)), failures


def results_of(rows: Sequence[Row], out: str | Path) -> list[Result]:
    """The results of rows that a folder has; what is not there has no number.

    Args:
        rows: the rows.
        out: the folder of results.
    """
    found = {}
    for path in sorted(Path(out).expanduser().glob(f'*/{_STATE}')):
        state = _read_state(path)
        if state.get('metrics'):
            found.setdefault(state['row'], []).append(state)
    results = []
    for row in rows:
        states = found.get(row.name, [])
        released = any(s['weights'] == 'released' for s in states)
        if not released:
            for metric, value in row.published.items():
                results.append(Result(row.name, row.backbone, '', metric, value))
        for state in states:
            ours = state['backbone'] == row.backbone
            for metric, value in row.published.items():
                results.append(
                    Result(
                        row.name,
                        state['backbone'],
                        state['weights'],
                        metric,
                        value if ours else None,
                        state['metrics'][metric],
                        state['origin'],
                    )
                )
    # a line without a number says nothing beside one with it
    with_number = {(r.row, r.metric) for r in results if r.obtained is not None}
    return [r for r in results if r.weights or (r.row, r.metric) not in with_number]


def _check_gpus(gpus: int | None, dry_run: bool) -> int:
    seen = torch.cuda.device_count()
    if gpus is None:
        return seen
    if gpus < 0 or gpus > seen and not dry_run:
        allowed = f'0 (the CPU) to {seen}' if seen else '0 (the CPU), or --dry-run'
        raise UserError(f'--gpus {gpus}: torch sees {seen} GPUs here; give {allowed}')
    return gpus


def _check_arguments(train, baseline, weights, images_per_gpu, cfg_options) -> None:
    if baseline is not None and not train:
        raise UserError('--baseline has no released checkpoint to evaluate; add --train')
    if baseline is not None:
        name = baseline.removeprefix(_TIMM)
        if name == baseline or not timm.is_model(name):
            near = get_close_matches(name, timm.list_models())
            near = f', such as {" or ".join(_TIMM + n for n in near)}' if near else ''
            raise UserError(
                f'--baseline {baseline} must be timm/ and a model of timm{near}'
            )
    if weights is not None and not Path(weights).expanduser().is_dir():
        raise UserError(
            f'--weights {weights} is not a folder; give that of the checkpoints'
        )
    if images_per_gpu < 1:
        raise UserError(f'--images-per-gpu {images_per_gpu} must be at least 1')
    for key in _DIVIDED:
        if train and key in (cfg_options or {}):
            raise UserError(f'{key} follows from --gpus and --images-per-gpu; give these')


def _without_imagenet(rows: list[Row], common: '_Common') -> list[Row]:
    """The rows without classifiers, if their data is missing: few have it."""
    kept = [row for row in rows if row.config or Path(common.imagenet).is_dir()]
    if len(kept) < len(rows):
        say(f'# without the rows of ImageNet: {common.imagenet} does not exist')
    return kept


def _possible(jobs: list['_Job']) -> list['_Job']:
    """The jobs that can be run."""
    reasons = {job.row.name: job.impossible for job in jobs if job.impossible}
    if len(reasons) == len(jobs):
        raise UserError('; '.join(f'{name}: {why}' for name, why in reasons.items()))
    for name, why in reasons.items():
        say(f'# left out {name}: {why}')
    return [job for job in jobs if not job.impossible]


@dataclass(frozen=True)
class _Common:
    """What all rows of a call have in common; see :func:`reproduce`."""

    data_root: str
    gpus: int
    train: bool
    baseline: str | None
    out: Path
    weights: Path | None
    images_per_gpu: int
    pretrained: bool
    cfg_options: dict

    @property
    def imagenet(self) -> str:
        return f'{self.data_root}/imagenet/val'

    @property
    def processes(self) -> int:
        return max(self.gpus, 1)


class _Job:
    """A row, and how it is evaluated or trained."""

    def __init__(self, row: Row, common: _Common):
        self.row, self.common = row, common
        name, self.backbone, self.weights = row.name, row.backbone, 'released'
        if common.train:
            name, self.weights = f'{name}_trained', 'trained here'
        if common.baseline:
            self.backbone = common.baseline
            name = f'{row.name}_{common.baseline.replace("/", "_")}'
        self.folder = common.out / name
        self.work_dir = self.folder / 'training'
        self.evaluation = self.folder / 'evaluation'
        self.converted = self.folder / 'weights.pth'

    def __str__(self) -> str:
        whose = f' of {self.row.backbone}' if self.common.baseline else ''
        numbers = [f'{k} {v}' for k, v in self.row.published.items() if v is not None]
        published = f'published{whose}: {", ".join(numbers) or "nothing"}'
        return f'{self.row.name}, {self.backbone}, {self.weights} ({published})'

    @property
    def impossible(self) -> str | None:
        """Why the job cannot be run; None if it can."""
        if self.common.train and not self.row.config:
            return 'it is trained with the train.py of timm (docs/classification.md)'
        if not self.common.train and not self.row.weights:
            return 'no checkpoint was released; --train trains it'
        return None

    @cached_property
    def cfg(self):
        """The config of the row, with the options of the user."""
        from ..config.load import load_config

        with redirect_stdout(sys.stderr):  # what toolboxes print is not a command
            return load_config(self.row.config, self.common.cfg_options)

    @property
    def _own_config(self) -> Path:
        return self.folder / 'config.py'

    @property
    def config(self) -> str:
        """What the commands have as the config."""
        return str(self._own_config) if self.common.baseline else self.row.config

    def missing_data(self) -> str | None:
        """What is missing of the data set, and where it is had."""
        from ..config.checks import check_dataset

        if not self.row.config:
            there = Path(self.common.imagenet).is_dir()
            return None if there else f'{self.common.imagenet} does not exist. {_IMAGENET}'
        parts = ('train', 'val', 'test') if self.common.train else ('test',)
        cfg = copy.deepcopy(self.cfg)
        cfg.merge_from_dict(self._data_options(*parts))
        if cfg.get('data_source'):
            default, own = f'in {_DATA}/', f'in {self.common.data_root}/'
            cfg.data_source = cfg.data_source.replace(default, own)
        try:
            with redirect_stdout(sys.stderr):
                check_dataset(cfg, *(f'{part}_dataloader' for part in parts))
        except UserError as error:
            return str(error)
        return None

    def _data_options(self, *parts: str) -> dict:
        """The options that lead to another folder of data sets."""
        if self.common.data_root == _DATA:
            return {}
        return {
            key: self.common.data_root + value.removeprefix(_DATA)
            for part in parts
            for kind in ('dataloader', 'evaluator')
            for key, value in _texts(self.cfg.get(f'{part}_{kind}'), f'{part}_{kind}')
            if value.startswith(f'{_DATA}/')
        }

    @cached_property
    def _training(self) -> tuple[dict, list[str]]:
        common = self.common
        options, notes = training_options(self.cfg, common.gpus, common.images_per_gpu)
        given = {**self._data_options('train', 'val'), **common.cfg_options}
        return {**given, **options}, notes

    @property
    def _test_options(self) -> dict:
        return {**self._data_options('test'), **self.common.cfg_options}

    @cached_property
    def _drop_path(self) -> float | None:
        """The row's stochastic depth, if the baseline has such an option."""
        name = self.common.baseline.removeprefix(_TIMM)
        rate = self.cfg.model.backbone.get('drop_path_rate')
        try:
            with torch.device('meta'):
                timm.create_model(name, features_only=True, drop_path_rate=rate)
        except TypeError:
            return None
        except Exception:  # noqa: BLE001  what else is wrong with it, overlock swap says
            return rate
        return rate

    @cached_property
    def source(self) -> str:
        """The released checkpoint: a file, or its URL."""
        if self.common.weights:
            path = self.common.weights / Path(self.row.weights).name
            if path.is_file():
                return str(path)
            say(f'# {path} does not exist, so it is downloaded unless it is in the cache')
        return self.row.weights

    @property
    def checkpoint(self) -> str:
        """The checkpoint to evaluate."""
        if not self.row.config:
            return self.source
        if not self.common.train:
            return str(self.converted)
        cfg = copy.deepcopy(self.cfg)
        cfg.merge_from_dict(self._training[0])
        unit = 'iter' if 'max_iters' in cfg.train_cfg else 'epoch'
        return str(self.work_dir / f'{unit}_{cfg.train_cfg[f"max_{unit}s"]}.pth')

    # The commands, in the order in which they are run.

    def _convert(self) -> list[str]:
        words = ['convert', self.source, str(self.converted), '--verify', self.row.config]
        return _command([*words, '--force'], 1, self.common.cfg_options)

    def _swap(self) -> list[str]:
        words = ['swap', self.row.config, '--arch', self.common.baseline, '--force']
        if self._drop_path is not None:
            words += ['--drop-path-rate', str(self._drop_path)]
        words += [] if self.common.pretrained else ['--no-pretrained']
        return _command([*words, '--out', str(self._own_config)], 1)

    def _train(self) -> list[str]:
        words = ['train', self.config, '--resume', '--work-dir', str(self.work_dir)]
        words += [] if self.common.pretrained else ['--no-pretrained']
        return _command(words, self.common.processes, self._training[0])

    def _test(self) -> list[str]:
        words = ['test', self.config, self.checkpoint]
        words += ['--work-dir', str(self.evaluation)]
        return _command(words, self.common.processes, self._test_options)

    def _validate(self) -> list[str]:
        words = ['validate', self.common.imagenet, '--model', self.row.name]
        words += ['--checkpoint', self.source, '--workers', str(self._workers)]
        return _command(words + (['--device', 'cpu'] if not self.common.gpus else []), 1)

    @property
    def _workers(self) -> int:
        return min(4, os.cpu_count() or 1)

    def show(self) -> None:
        """Print the commands, with what is to be known about them as comments."""
        if self.impossible:
            say(f'# {self.impossible}\n')
            return
        if not self.row.config:
            commands = [self._validate()]
        elif not self.common.train:
            commands = [self._convert(), self._test()]
        else:
            for note in self._training[1]:
                say(f'# {note}')
            swap = [self._swap()] if self.common.baseline else []
            commands = [*swap, self._train(), self._test()]
        if self.row.config:
            say(shlex.join(['mkdir', '-p', str(self.folder)]))
        for command in commands:
            say(shown(command, self.common.gpus))
        say('')

    def run(self) -> None:
        """Do what is not done yet."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.row.config:
            self._run_classifier()
        elif self.common.train:
            self._run_training()
            self._run_evaluation(self.checkpoint)
        else:
            source = self.source
            self._run_evaluation(download(source) if '://' in source else source)

    def _run_classifier(self) -> None:
        from .validate import validate

        source = self.source
        file = download(source) if '://' in source else Path(source)
        digest = _sha256(file)
        fingerprint = _fingerprint(self.common.imagenet, digest, __version__)
        if self._is_done(fingerprint):
            return
        self._say(self._validate())
        found = validate(
            self.common.imagenet,
            self.row.name,
            str(file),
            workers=self._workers,
            device=None if self.common.gpus else 'cpu',
        )
        say(str(found))
        self._record(fingerprint, dict(top1=found.top1 / found.total), source, digest)

    def _run_training(self) -> None:
        """Train, unless that is done; go on with a training that was interrupted."""
        options, notes = self._training
        trained = _fingerprint(
            self.cfg.to_dict(), options, self.backbone, self.common.pretrained
        )
        state = self._state
        if state.get('training', trained) != trained and self.work_dir.exists():
            raise UserError(
                f'{self.work_dir} is of a training with another config, other options or '
                'another number of GPUs; delete it, or give another --out'
            )
        if state.get('trained') and Path(self.checkpoint).is_file():
            say(f'trained already: {self.checkpoint}')
            return
        for note in notes:
            say(f'# {note}')
        self._write(training=trained, trained=False)
        if self.common.baseline:
            self._execute(self._swap())
        self._execute(self._train())
        if not Path(self.checkpoint).is_file():
            raise UserError(
                f'the training has not written {self.checkpoint}; --cfg-options must leave '
                'the checkpoint hook on'
            )
        self._write(trained=True)

    def _run_evaluation(self, file: str | Path) -> None:
        """Evaluate a file, converted first if it is a released one."""
        digest = _sha256(file)
        tested = self.cfg.to_dict(), self._test_options, self.backbone
        fingerprint = _fingerprint(*tested, digest, __version__)
        if self._is_done(fingerprint):
            return
        if not self.common.train:
            done = self._state.get('converted') == fingerprint
            if not done or not self.converted.is_file():
                self._execute(self._convert())
                self._write(converted=fingerprint)
        before = set(self.evaluation.glob('*/*.json'))
        self._execute(self._test())
        logs = set(self.evaluation.glob('*/*.json')) - before
        logged = json.loads(max(logs).read_text()) if logs else {}
        source = self.checkpoint if self.common.train else self.source
        self._record(fingerprint, logged, source, digest)

    def _is_done(self, fingerprint: str) -> bool:
        state = self._state
        if state.get('evaluated') == fingerprint and state.get('metrics'):
            say(f'evaluated already, on {state["origin"]["date"]}')
            return True
        self._write(metrics=None)  # what is there is of something else
        return False

    def _record(self, fingerprint: str, logged: dict, source: str, digest: str) -> None:
        metrics = {}
        for metric in self.row.published:
            name, unit = _METRICS[metric]
            if not isinstance(logged.get(name), int | float):
                raise UserError(
                    f'the evaluation has logged no {name} in {self.evaluation}; '
                    '--cfg-options must leave the evaluator and the logger hook on'
                )
            metrics[metric] = round(logged[name] * unit, 2)
        origin = dict(
            checkpoint=source,
            sha256=digest,
            config=self.config if self.row.config else None,
            options=self._test_options if self.row.config else {},
            training=self._training[0] if self.common.train else {},
            gpus=self.common.gpus,
            overlock_mm=__version__,
            torch=torch.__version__,
            date=datetime.now(UTC).isoformat(timespec='seconds'),
        )
        self._write(evaluated=fingerprint, metrics=metrics, origin=origin)

    def _execute(self, command: list[str]) -> None:
        self._say(command)
        status = execute(command, self.common.gpus)
        if status:
            raise UserError(
                f'`overlock {_subcommand(command)}` has ended with exit status {status}; '
                'what it printed is above'
            )

    def _say(self, command: list[str]) -> None:
        say(shown(command, self.common.gpus))

    @property
    def _state(self) -> dict:
        return _read_state(self.folder / _STATE)

    def _write(self, **changes) -> None:
        who = dict(row=self.row.name, backbone=self.backbone, weights=self.weights)
        path = self.folder / _STATE
        partial = path.with_suffix('.partial')
        content = {**self._state, **who, **changes}
        partial.write_text(json.dumps(content, indent=1, default=str))
        os.replace(partial, path)  # whole or not at all


_STATE = 'state.json'


def _read_state(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f'{path} is damaged ({error}); delete it') from error


def _command(words: list[str], processes: int, options: dict | None = None) -> list[str]:
    """A command of ``overlock``, in one process or one for each GPU."""
    command = ['overlock', *words]
    if processes > 1:
        launcher = ['torchrun', '--standalone', f'--nproc_per_node={processes}']
        command = [*launcher, '-m', 'overlock_mm', *words, '--launcher', 'pytorch']
    if options:
        command += ['--cfg-options', *written_options(options)]
    return command


# How the programs of a command are run with this Python, on a PATH or not.
_PROGRAMS = dict(
    overlock=['-m', 'overlock_mm'],
    torchrun=['-m', 'torch.distributed.run'],
)


def _subcommand(command: list[str]) -> str:
    return command[1] if command[0] == 'overlock' else command[command.index('-m') + 2]


def execute(command: list[str], gpus: int) -> int:
    """Run a command with this Python; return its exit status.

    Args:
        command: ``overlock`` or ``torchrun``, and the arguments.
        gpus: number of GPUs that it may use; with 0 it sees none.
    """
    env = dict(os.environ, CUDA_VISIBLE_DEVICES='') if not gpus else None
    words = [sys.executable, *_PROGRAMS[command[0]], *command[1:]]
    return subprocess.run(words, env=env).returncode


def shown(command: list[str], gpus: int) -> str:
    """A command as it can be pasted into a shell."""
    program, *words = command
    start, found = [program], shutil.which(program)
    if not found or Path(found).parent != Path(sys.executable).parent:
        start = [sys.executable, *_PROGRAMS[program]]  # its environment is not activated
    hidden = 'CUDA_VISIBLE_DEVICES= ' if not gpus and torch.cuda.is_available() else ''
    return hidden + shlex.join([*start, *words])


def written_options(options: dict, prefix: str = '') -> list[str]:
    """Options as ``--cfg-options`` takes them.

    Args:
        options: values by key, also nested.
        prefix: of the keys.

    Raises:
        UserError: if ``--cfg-options`` would read another value.
    """
    from mmengine.config import DictAction

    words = []
    for key, value in options.items():
        if isinstance(value, dict):
            words += written_options(value, f'{prefix}{key}.')
            continue
        text = _written(value)
        try:
            same = DictAction._parse_iterable(text) == value
        except AssertionError:  # brackets that do not match
            same = False
        if not same:
            raise UserError(
                f'{prefix}{key}={value!r} cannot be given to --cfg-options, which does not '
                'take spaces, commas, quotes and brackets in a name; use another name, or '
                'a link to it'
            )
        words.append(f'{prefix}{key}={text}')
    return words


def _written(value) -> str:
    if isinstance(value, list | tuple):
        start, end = '()' if isinstance(value, tuple) else '[]'
        return start + ','.join(map(_written, value)) + end
    return str(value)


def _texts(node, key: str) -> Iterator[tuple[str, str]]:
    """Every text in a config, by its key."""
    if isinstance(node, str):
        yield key, node
    items = enumerate(node) if isinstance(node, list | tuple) else ()
    for name, value in node.items() if isinstance(node, dict) else items:
        yield from _texts(value, f'{key}.{name}')


def _sha256(path: str | Path) -> str:
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _fingerprint(*values) -> str:
    """A digest of values that changes when one of them does."""
    text = json.dumps(values, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
