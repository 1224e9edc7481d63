"""Times of two sides that take turns, their memory, and the machine they ran on."""

import importlib
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from tqdm import tqdm

from ...errors import UserError
from ...version import __version__
from .options import BenchmarkOptions, FileOptions, RuntimeOptions

Step = Callable[[], object]


class Side(NamedTuple):
    """One of the two things that are compared."""

    name: str
    build: Callable[[], Step]  # makes model and inputs; a call of the step is measured
    pixels: int | None = None  # if set, results are reported per pixel, not per step


def prepare(side: Side) -> Step:
    """Build a side and run its first step, so that what cannot run fails here."""
    try:
        step = side.build()
        step()
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f'{side.name} cannot run: {lines[0]}') from error
    return step


def seconds_of(step: Step, device: str) -> float:
    synchronize = torch.cuda.synchronize if device == 'cuda' else lambda: None
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


def measure(options: BenchmarkOptions, sides: list[Side]) -> dict:
    """Measure both sides; seconds and bytes are per step, ratios are theirs to ours."""
    steps, ready, seconds, memory = [], [], ([], []), []
    for side in sides:
        start = time.perf_counter()
        steps.append(prepare(side))
        ready.append(time.perf_counter() - start)
    turns = range(-options.warmup, options.rounds)
    with tqdm(total=len(turns) + 2, disable=None, leave=False) as bar:
        for i, step in enumerate(steps):
            bar.set_description('memory')
            on_cuda = options.device == 'cuda'
            if isinstance(options, RuntimeOptions | FileOptions):  # they keep memory
                memory.append(None)
            else:
                memory.append(
                    _peak_on_cuda(step) if on_cuda else _memory_of_child(options, i)
                )
            bar.update()
        bar.set_description('time')
        for turn in turns:
            for step, times in zip(steps, seconds, strict=True):
                spent = seconds_of(step, options.device)
                if turn >= 0:
                    times.append(spent)
            bar.update()
    scale = (sides[0].pixels or 1) / (sides[1].pixels or 1)
    ratios = [theirs / ours * scale for ours, theirs in zip(*seconds, strict=True)]
    return {
        'sides': [
            {
                'name': side.name,
                'pixels': side.pixels,
                'ready_seconds': spent,
                'seconds': times,
                'median_seconds': statistics.median(times),
                'peak_extra_bytes': peak,
            }
            for side, spent, times, peak in zip(sides, ready, seconds, memory, strict=True)
        ],
        'ratios': ratios,
        'median_ratio': statistics.median(ratios),
        'memory_ratio': memory[0] / memory[1] / scale if all(memory) else None,
    }


def _peak_on_cuda(step: Step) -> int:
    """Bytes that one more step takes at its peak, beyond all that lives between steps."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_on_cpu(step: Step) -> int:
    """The same for this whole process on Linux."""
    before = _resident('VmRSS')
    Path('/proc/self/clear_refs').write_text('5')  # forget the peak so far
    step()
    return max(_resident('VmHWM') - before, 0)


def _resident(name: str) -> int:
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(s.split()[1]) for s in lines if s.startswith(name)) * 1024


def _memory_of_child(options: BenchmarkOptions, side: int) -> int | None:
    """Peak memory of a side on the CPU, measured in a process of its own."""
    if not os.access('/proc/self/clear_refs', os.W_OK):
        return None  # only Linux can forget a peak
    # By default the C library keeps freed blocks for later, which hides what the next
    # step takes. With these, blocks go back to the system as soon as they are free.
    small = dict.fromkeys(('MALLOC_MMAP_THRESHOLD_', 'MALLOC_TRIM_THRESHOLD_'), '65536')
    env = {**os.environ, 'MALLOC_ARENA_MAX': '1', 'THP_MEM_ALLOC_ENABLE': '0', **small}
    # the package that is imported here, wherever it is
    package = Path(__file__).parents[3]
    env['PYTHONPATH'] = os.pathsep.join(filter(None, [str(package), env.get('PYTHONPATH')]))
    what = json.dumps([options.command, asdict(options), side])
    code = f'from {__package__} import _measure_memory; _measure_memory()'
    command = [sys.executable, '-c', code]
    child = subprocess.run(command, env=env, input=what, capture_output=True, text=True)
    if child.returncode:
        lines = child.stderr.strip().splitlines() or [f'status {child.returncode}']
        raise UserError(f'measuring the memory failed: {lines[-1]}')
    return int(child.stdout.split()[-1])


def hardware(options: BenchmarkOptions) -> dict:
    """Describe the hardware, without what identifies the machine."""
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(':')[1].strip() for line in lines if 'model name' in line]
    found = {
        'cpu': models[0] if models else platform.processor() or platform.machine(),
        'cores': os.cpu_count(),
        'threads': options.threads,
    }
    if options.device == 'cuda':
        query = 'nvidia-smi --query-gpu=driver_version --format=csv,noheader'
        lines = (
            subprocess.getoutput(query).splitlines() if shutil.which('nvidia-smi') else []
        )
        found['driver'] = lines[0] if lines else None
        found['gpu'] = torch.cuda.get_device_name()
        found['gpus'] = torch.cuda.device_count()
    return found


def versions() -> dict:
    triton = importlib.util.find_spec('triton') and importlib.import_module('triton')
    return {
        'torch': torch.__version__,
        'cuda': torch.version.cuda,
        'triton': triton.__version__ if triton else None,
        'timm': timm.__version__,
        'overlock_mm': __version__,
    }
