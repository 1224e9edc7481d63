"""Loss, learning rate, metrics, memory and time of trainings, from mmengine's logs."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator

from ...errors import UserError
from ..messages import say
from . import figures

# What a record has beside losses and metrics.
_POSITIONS = ('step', 'iter', 'epoch')
_TIMES = ('time', 'data_time')
# Metrics that are drawn unless others are named, by the last part of their names.
_MAIN_METRICS = ('mIoU', 'bbox_mAP', 'segm_mAP', 'mAP')
# Metrics of MMSegmentation, which gives them in percent.
_PERCENT = ('aAcc', 'mIoU', 'mAcc', 'mDice', 'mFscore', 'mPrecision', 'mRecall')
# Title and unit of the panels beside those of metrics; names that they show if logged.
_PANELS = (
    ('Loss', '', ('loss',)),
    # base_lr is what the config gives, lr that of the first group of parameters
    ('Learning rate', '', ('base_lr', 'lr')),
    ('GPU memory', 'MiB', ('memory',)),
    ('Time per iteration', 's', ('time',)),
)
_LEGEND = dict(loc='outside lower center', frameon=False)
# More values of a loss than these are drawn with a running mean.
_MANY = 300

Series = dict[int, float]


@dataclass
class Run:
    """What one training has logged.

    Attributes:
        label: its name in the figure.
        files: logs that it was read from, in order.
        training: values by iteration, by name, as the toolbox names them.
        metrics: the same of validations.
    """

    label: str = ''
    files: list[Path] = field(default_factory=list)
    training: dict[str, Series] = field(default_factory=dict)
    metrics: dict[str, Series] = field(default_factory=dict)

    def first(self) -> int:
        """The first iteration of which something was logged."""
        series = (self.training or self.metrics).values()
        return min(iteration for values in series for iteration in values)

    def last(self) -> int:
        """The last iteration of which something was logged."""
        series = [*self.training.values(), *self.metrics.values()]
        return max(iteration for values in series for iteration in values)


@figures.styled()
def curves(
    work_dirs: Sequence[str | Path],
    out: str | Path,
    *,
    labels: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    json_path: str | None = None,
) -> str:
    """Draw the logs of one or several trainings in one figure.

    Of a work dir, runs that were resumed are joined: from the iteration at which a later
    log begins, it replaces the earlier ones. A run that was started anew replaces all
    before it, which is said; name its own folder, ``WORK_DIR/TIMESTAMP``, to draw one of
    those. The x axis is the iteration, for validations after epochs too.

    Args:
        work_dirs: work dirs, folders of single runs in them, or ``scalars.json`` files.
        out: picture to write.
        labels: a name for each of them; by default what tells the paths apart.
        metrics: metrics to draw, as they are named in the log or by the part after the
            last slash; by default mIoU, box and mask AP, or the first one that there is.
        json_path: file for all that was read, as
            ``{label: {'files', 'training', 'metrics'}}``; there a series is
            ``{'iteration': [...], 'value': [...]}``, with null for what is not finite.

    Returns:
        str: a table of the last loss, the highest metrics, time and memory.

    Raises:
        UserError: if there is nothing to draw, or it cannot be written.
    """
    out = figures.check_picture(out)
    labels = _labels(work_dirs, labels)
    runs = [read_run(path, name) for path, name in zip(work_dirs, labels, strict=True)]
    chosen = _chosen_metrics(runs, metrics)
    panels = [
        (title, unit, [_named(run.training, names) for run in runs])
        for title, unit, names in _PANELS
    ]
    panels[2:2] = [
        (name, '%' if _short(name) in _PERCENT else '', [r.metrics.get(name) for r in runs])
        for name in chosen
    ]
    panels = [panel for panel in panels if any(panel[2])]
    if not panels:
        names = sorted({name for run in runs for name in run.training})
        raise UserError(f'the logs have no loss and no metrics, but {_listed(names)}')
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure, grid = figures.panels(rows, columns, aspect=0.72, extra=0.3)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, (title, unit, series) in zip(grid.flat, panels, strict=False):
        _draw(axes, title, unit, series, labels, title in chosen)
        if title == 'Loss' and len(runs) == 1:
            _draw_parts(axes, runs[0])
    if len(runs) > 1:
        lines, names = _legend(grid.flat[: len(panels)])
        figure.legend(lines, names, **_LEGEND, ncols=min(len(runs), 4))
    else:
        figure.suptitle(labels[0])
    figures.save(figure, out)
    figures.write_json({run.label: _plain(run) for run in runs}, json_path)
    return f'{_summary(runs, chosen)}\nsaved as {out}'


def read_run(path: str | Path, label: str = '') -> Run:
    """Read the logs of a training, with what was resumed joined.

    Args:
        path: a work dir, the folder of a single run in it, or a ``scalars.json`` file.
        label: name of the run.

    Returns:
        Run: what was logged.

    Raises:
        UserError: if there are no logs, or nothing in them.
    """
    path = Path(path).expanduser()
    joined, replaced = Run(label), 0
    files = _logs(path)
    for file in files:
        part = _read_log(file)
        if not part.training and not part.metrics:
            continue
        if joined.files and (not _resumed(file) or part.first() <= joined.first()):
            replaced += len(joined.files)
            joined = Run(label)
        joined.files.append(file)
        for ours, theirs in (
            (joined.training, part.training),
            (joined.metrics, part.metrics),
        ):
            for name, series in ours.items():
                ours[name] = {i: v for i, v in series.items() if i < part.first()}
            for name, series in theirs.items():
                ours.setdefault(name, {}).update(series)
    if not joined.files:
        raise UserError(
            f'{path}: nothing was logged in {_listed(files)}; a run logs its first line '
            'after default_hooks.logger.interval iterations'
        )
    if replaced:
        say(
            f'{path}: training was started anew; {replaced} earlier '
            f'log{"s are" if replaced > 1 else " is"} left out; give the folder of a run '
            '(WORK_DIR/TIMESTAMP) to draw that one'
        )
    # what a resumed run has replaced and did not log again
    for series in (joined.training, joined.metrics):
        for name in [name for name, values in series.items() if not values]:
            del series[name]
    return joined


def _logs(path: Path) -> list[Path]:
    """The logs of a work dir, of a run's folder or of the file itself, in order of time."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f'{path} does not exist; give a work dir, or a scalars.json in it')
    for folders in ([path], [path / 'vis_data'], sorted(path.glob('*/vis_data'))):
        found = []
        for folder in folders:
            files = [folder / 'scalars.json']
            if folder.name == 'vis_data':  # the same, if the one above has another name
                files += sorted(folder.glob('[0-9]*_[0-9]*.json'))
            found += [file for file in files if file.is_file()][:1]
        if found:
            return found
    inside = sorted({str(p.parents[2]) for p in path.glob('*/*/vis_data/*.json')})
    hint = 'give the folder in which a training keeps TIMESTAMP/vis_data/scalars.json'
    if inside:
        hint = f'there are some in {_listed(inside)}: give these'
    raise UserError(f'{path} has no logs of a training; {hint}')


def _read_log(file: Path) -> Run:
    """Read one log, of one process without interruption."""
    records, broken = [], 0
    try:
        lines = file.read_text(errors='replace').splitlines()
    except OSError as error:
        raise UserError(f'{file} cannot be read: {error.strerror}') from error
    for line in filter(str.strip, lines):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            broken += 1
    if broken and not records:
        raise UserError(f'{file} is not a log of mmengine, which has a JSON object a line')
    if broken:
        say(
            f'{file}: {broken} broken line{"s" if broken > 1 else ""} left out, as a run '
            'leaves them that is killed'
        )
    epoch_length = _epoch_length([r for r in records if _is_training(r)])
    run, before = Run(), {}
    for record in records:
        if _is_training(record):
            before, target = record, run.training
            iteration = _number(record.get('iter', record.get('step')))
        else:
            target, iteration = run.metrics, _validated_at(record, before, epoch_length)
        if iteration is None:
            continue
        for name, value in record.items():
            name = name.removeprefix('train/').removeprefix('val/')
            skipped = _POSITIONS if target is run.training else (*_POSITIONS, *_TIMES)
            if name not in skipped and _number(value) is not None:
                target.setdefault(name, {})[int(iteration)] = float(value)
    return run


def _number(value) -> int | float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number else None


def _is_training(record: dict) -> bool:
    return 'iter' in record or any(name.endswith('lr') for name in record)


def _epoch_length(training: Sequence[dict]) -> float | None:
    """Iterations of an epoch; None if the records do not name epochs.

    The first line of every epoch comes as many iterations after its start.
    """
    firsts = {}
    for record in training:
        epoch, iteration = _number(record.get('epoch')), _number(record.get('iter'))
        if epoch and iteration:
            firsts.setdefault(epoch, iteration)
            latest = iteration
    if not firsts:
        return None
    first, last = min(firsts), max(firsts)
    if first < last:
        return (firsts[last] - firsts[first]) / (last - first)
    return math.ceil(latest / last)


def _validated_at(record: dict, before: dict, epoch_length: float | None) -> int | None:
    """The iteration after which a validation took place.

    Its step is the iteration or, with ``log_metric_by_epoch`` of mmengine's LoggerHook,
    the epoch, which is always 0 in training loops that count iterations.

    Args:
        record: that of the validation.
        before: the last one of the training before it, or nothing.
        epoch_length: iterations of an epoch, if training counts epochs.
    """
    step = _number(record.get('step'))
    if step is None:
        return None
    last = _number(before.get('iter')) or 0
    if epoch_length and (not before or step <= (_number(before.get('epoch')) or 0)):
        step = round(step * epoch_length)
    return int(max(step, last))


def _resumed(log: Path) -> bool:
    """Whether a run was to resume another one, as its config beside the log says.

    Without a config it may be.
    """
    config = log.parent / 'config.py'
    if not config.is_file():
        return True
    given = re.findall(r'^resume *= *(.+)$', config.read_text(errors='replace'), re.M)
    return bool(given) and given[-1].strip() not in ('False', 'None')


def _labels(paths: Sequence[str | Path], given: Sequence[str] | None) -> list[str]:
    """A name for each path: the given ones, or as much of their ends as they differ in."""
    if given:
        if len(given) != len(paths) or len(set(given)) < len(given):
            raise UserError(
                f'--labels: {len(paths)} different names are needed, one for each work '
                f'dir, and there are {len(given)}: {", ".join(given)}'
            )
        return list(given)
    parts = []
    for path in paths:
        path = Path(path).expanduser().resolve()
        if path.suffix == '.json':
            path = path.parent
        parts.append((path.parent if path.name == 'vis_data' else path).parts)
    for name, count in {p: parts.count(p) for p in parts}.items():
        if count > 1:
            raise UserError(f'{Path(*name)} is given {count} times; give it once')
    # a timestamp alone says little
    least = 2 if any(re.fullmatch(r'\d{8}_\d{6}', p[-1]) for p in parts) else 1
    for depth in range(least, max(map(len, parts)) + 1):
        labels = ['/'.join(p[-depth:]) for p in parts]
        if len(set(labels)) == len(labels):
            break
    return labels


def _short(name: str) -> str:
    return name.rpartition('/')[2]


def _chosen_metrics(runs: Sequence[Run], given: Sequence[str] | None) -> list[str]:
    """The full names of the metrics to draw."""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    if not given:
        main = [name for name in names if _short(name) in _MAIN_METRICS]
        return main or names[:1]
    chosen = []
    for metric in given:
        found = [name for name in names if metric in (name, _short(name))]
        if not found:
            has = f'they have {_listed(names)}' if names else 'they have no metrics'
            raise UserError(f'--metrics: {metric} is not in the logs; {has}')
        chosen += [name for name in found if name not in chosen]
    return chosen


def _named(training: dict[str, Series], names: Sequence[str]) -> Series | None:
    """The first series with one of the names, which may have a prefix (``encoder.lr``)."""
    for name in names:
        for found in training:
            if found.rpartition('.')[2] == name:
                return training[found]
    return None


def _draw(axes: Axes, title, unit, series, labels, validation) -> None:
    for i, (values, label) in enumerate(zip(series, labels, strict=True)):
        if values:
            x, y = zip(*sorted(values.items()), strict=True)
            marker = 'o' if validation or len(x) == 1 else ''
            style = ('-', '--', ':', '-.')[i // 10 % 4]
            look = dict(color=f'C{i % 10}', marker=marker, ms=2.5)
            if title.startswith('Loss') and len(y) > _MANY:
                axes.plot(x, y, lw=0.4, alpha=0.25, **look)
                y, title = _running_mean(y), 'Loss (pale) and its running mean'
            axes.plot(x, y, style, lw=None if validation else 0.8, label=label, **look)
    axes.set(title=title, xlabel='iteration', ylabel=unit)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=''))
    axes.ticklabel_format(axis='y', scilimits=(-3, 5))
    axes.grid(alpha=0.3, lw=0.4)
    found = [v for values in series if values for v in values.values() if math.isfinite(v)]
    if found and min(found) > 0 and max(found) > 20 * median(found):
        axes.set_yscale('log')  # a first iteration that takes long, a loss that explodes
    elif found and min(found) >= 0 and (not validation or max(found) == 0):
        axes.set_ylim(0, 1.05 * max(found) or 1)


def _running_mean(values: Sequence[float]) -> np.ndarray:
    """The mean of a hundredth of all around each one; NaN near what is not finite."""
    window = np.ones(2 * max(len(values) // 200, 1) + 1)
    counts = np.convolve(np.ones(len(values)), window, mode='same')
    return np.convolve(values, window, mode='same') / counts


def _draw_parts(axes: Axes, run: Run) -> None:
    """Add the parts of the loss."""
    parts = [name for name in run.training if 'loss' in name and name != 'loss']
    if not 2 <= len(parts) <= 8 or 'loss' not in run.training:
        return
    for i, name in enumerate(parts, 1):
        x, y = zip(*sorted(run.training[name].items()), strict=True)
        axes.plot(x, y, lw=0.6, color=f'C{i}', label=name)
    axes.lines[0].set_label('sum')
    axes.legend(fontsize=5, frameon=False)


def _legend(axes: Sequence[Axes]) -> tuple[list, list[str]]:
    """A line for each run; not every panel has all of them."""
    lines = {}
    for item in axes:
        for line in item.get_lines():
            if not line.get_label().startswith('_'):
                lines.setdefault(line.get_label(), line)
    return list(lines.values()), list(lines)


def _summary(runs: Sequence[Run], metrics: Sequence[str]) -> str:
    header = ['run', 'iterations', 'last loss']
    header += [f'highest {_short(name)} (at)' for name in metrics]
    header += ['median s/iteration', 'peak MiB']
    rows = []
    for run in runs:
        losses, times, memory = (
            _named(run.training, (name,)) for name in ('loss', 'time', 'memory')
        )
        row = [run.label, run.last(), f'{losses[max(losses)]:.4g}' if losses else '-']
        for name in metrics:
            values = {i: v for i, v in run.metrics.get(name, {}).items() if v == v}
            best = max(values, key=values.get, default=None)
            row.append(f'{values[best]:.4g} ({best})' if values else '-')
        row.append(f'{median(times.values()):.3g}' if times else '-')
        row.append(f'{max(memory.values()):.0f}' if memory else '-')
        rows.append(row)
    return figures.table(header, rows)


def _plain(run: Run) -> dict:
    def plain(series: Series) -> dict:
        values = sorted(series.items())
        return dict(
            iteration=[i for i, _ in values],
            value=[v if math.isfinite(v) else None for _, v in values],
        )

    return dict(
        files=[str(file) for file in run.files],
        training={name: plain(series) for name, series in run.training.items()},
        metrics={name: plain(series) for name, series in run.metrics.items()},
    )


def _listed(items: Sequence, most: int = 8) -> str:
    shown = ', '.join(map(str, items[:most]))
    return shown + (f' and {len(items) - most} more' if len(items) > most else '')
