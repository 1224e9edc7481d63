"""Time one thing against another, and measure the memory that each takes.

The two sides take turns in one process, and what counts is the median of the ratios of
the rounds: on a machine that others use too, a time alone says little.
"""

import json
import sys
import time
from dataclasses import asdict

import torch

from ...errors import UserError
from .measuring import Side, hardware, measure, peak_on_cpu, prepare, versions
from .models import compare_models, compare_op
from .options import (
    BackboneOptions,
    BenchmarkOptions,
    FileOptions,
    ModelOptions,
    OpOptions,
    RuntimeOptions,
    TrainStepOptions,
)

_OPTIONS = {
    kind.command: kind
    for kind in (OpOptions, BackboneOptions, TrainStepOptions, RuntimeOptions, FileOptions)
}


def run_benchmark(options: OpOptions | ModelOptions) -> dict:
    """Measure both sides, in turns.

    Args:
        options: what to compare.

    Returns:
        dict: ``what`` (a title), ``sides`` (name, seconds until it was ready, with
        its first step, all times in seconds and their median, peak memory in bytes beyond
        what stays between steps), ``ratios`` of their times to
        ours and ``median_ratio``, ``memory_ratio`` of ours to theirs, and ``date``,
        ``versions``, ``hardware`` and ``options``. It can be written as JSON.

    Raises:
        UserError: if a side cannot run with these options.
    """
    if options.device == 'cuda' and not torch.cuda.is_available():
        raise UserError('--device cuda: torch sees no GPU; use --device cpu')
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = True  # shapes never change
    options, what, sides = compare(options)
    machine = hardware(options)
    on = machine.get('gpu') or f'{machine["cpu"]} with {options.threads} thread(s)'
    what += f', {options.dtype}{", compiled" * options.compile}, on {on}'
    return {
        'date': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
        'versions': versions(),
        'hardware': machine,
        'options': {'command': options.command, **asdict(options)},
        'what': what,
        **measure(options, sides),
    }


def compare(options) -> tuple[BenchmarkOptions, str, list[Side]]:
    """The options with layouts decided, a title and the two sides."""
    if isinstance(options, OpOptions):
        return options, *compare_op(options)
    if isinstance(options, RuntimeOptions | FileOptions):
        from . import runtimes  # the others need neither exporters nor mmengine

        if isinstance(options, RuntimeOptions):
            return runtimes.compare_runtimes(options)
        return options, *runtimes.compare_files(options)
    return compare_models(options)


def _measure_memory() -> None:
    """The child process: read command, options and side from stdin, print the bytes."""
    command, values, side = json.load(sys.stdin)
    lists = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    options = _OPTIONS[command](**lists)
    torch.set_num_threads(options.threads)
    _, _, sides = compare(options)
    print(peak_on_cpu(prepare(sides[side])))
