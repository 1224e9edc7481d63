"""Time one thing against another, and measure the memory that each takes.

The two sides take turns in one process, and what counts is the median of the ratios of
the rounds: on a machine that others use too, a time alone says little.

For times that mean something on such a machine, set ``GOMP_SPINCOUNT=20000`` before torch
is imported, as ``tools/benchmark.py`` does: by default, idle OpenMP threads spin.
"""

import difflib
import importlib
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import timm
import torch
from tqdm import tqdm

from ..errors import UserError
from ..models import OverLoCK, fold
from ..models.folded import prepare_for_export
from ..ops import contmix, set_contmix_backend
from ..version import __version__

Step = Callable[[], object]
Layout = Literal['channels_last', 'contiguous', 'best']


class Side(NamedTuple):
    """One of the two things that are compared."""

    name: str
    build: Callable[[], Step]  # makes model and inputs; a call of the step is measured
    pixels: int | None = None  # if set, results are reported per pixel, not per step


@dataclass(kw_only=True)
class BenchmarkOptions:
    """Base class of the comparisons.

    Args:
        backend: our side's implementation of ContMix, see ``set_contmix_backend``.
        device: 'cpu' or 'cuda'; by default cuda where there is one.
        threads: CPU threads; by default as many as torch takes.
        rounds: measured turns of each side.
        warmup: turns before them that do not count.
        compile: use ``torch.compile`` for the op of our side, or the models of both.
        dtype: name of the dtype of the tensors, or of autocast.
    """

    command: ClassVar[str]
    backend: str = 'auto'
    device: str = field(default_factory=lambda: 'cuda' if _has_cuda() else 'cpu')
    threads: int = field(default_factory=torch.get_num_threads)
    rounds: int = 11
    warmup: int = 2
    compile: bool = False
    dtype: str = 'float32'


@dataclass(kw_only=True)
class OpOptions(BenchmarkOptions):
    """The ContMix op with one backend against another, on random values.

    Args:
        shape: (N, C, H, W) of the values.
        heads: heads of each of the two kernels.
        kernel: the large kernel; the small one is 5.
        backward: measure forward and backward, not forward alone.
        against: backend of the other side.
    """

    command: ClassVar[str] = 'op'
    shape: tuple[int, int, int, int] = (1, 256, 50, 84)
    heads: int = 8
    kernel: int = 13
    backward: bool = False
    against: str = 'reference'


@dataclass(kw_only=True)
class ModelOptions(BenchmarkOptions):
    """The backbone against another, or against itself at another size.

    Args:
        arch: arch of OverLoCK.
        size: height and width of the images.
        batch: images in a step.
        layout: memory format of our side; 'best' tries both and takes the faster.
        against_layout: that of the other side; by default contiguous for the reference,
            as ours for 'self:SIZE', and the best for a model of timm.
        against: 'reference' for the same arch in training form with the reference op,
            'self:SIZE' for our side at another size (results are then per pixel), or the
            name of a timm model, built with ``features_only=True``.
        form: 'train', 'deploy' or 'fold'.
    """

    arch: str = 't'
    size: tuple[int, int] = (512, 512)
    batch: int = 1
    layout: Layout = 'best'
    against_layout: Layout | None = None
    against: str = 'reference'
    form: str = 'fold'
    amp: ClassVar[bool] = False
    drop_path: ClassVar[float] = 0.0
    with_cp: ClassVar[tuple[int, ...]] = ()


@dataclass(kw_only=True)
class BackboneOptions(ModelOptions):
    """The forward pass in evaluation mode, without gradients."""

    command: ClassVar[str] = 'backbone'


@dataclass(kw_only=True)
class TrainStepOptions(ModelOptions):
    """A training step: forward, backward of the mean squares of the maps, and AdamW.

    Args:
        amp: autocast to ``dtype``, without gradient scaling.
        drop_path: stochastic depth rate of both sides.
        with_cp: stages (0 to 4) whose activations our side recomputes.
    """

    command: ClassVar[str] = 'train-step'
    batch: int = 2
    form: str = 'train'
    amp: bool = False
    drop_path: float = 0.0
    with_cp: tuple[int, ...] = ()


@dataclass(kw_only=True)
class RuntimeOptions(ModelOptions):
    """The exported backbone in another runtime, on the CPU.

    Args:
        runtime: 'onnxruntime' or 'openvino'.
        dynamic: export for images of any size.
        against: 'torch' for the folded backbone in PyTorch, or the name of a timm model,
            which runs in the same runtime.
    """

    command: ClassVar[str] = 'runtime'
    runtime: str = 'onnxruntime'
    dynamic: bool = False
    against: str = 'torch'


@dataclass(kw_only=True)
class FileOptions(BenchmarkOptions):
    """An exported file against another, on the CPU.

    Args:
        file: the file, ``.onnx`` or ``.xml``.
        against: the other.
        size: height and width of the images.
        batch: images in a step.
    """

    command: ClassVar[str] = 'file'
    file: str = 'model.onnx'
    against: str = 'other.onnx'
    size: tuple[int, int] = (512, 512)
    batch: int = 1


_OPTIONS = {
    kind.command: kind
    for kind in (OpOptions, BackboneOptions, TrainStepOptions, RuntimeOptions, FileOptions)
}


def run_benchmark(options: OpOptions | ModelOptions) -> dict:
    """Measure both sides, in turns.

    Args:
        options: what to compare.

    Returns:
        dict: ``what`` (a title), ``sides`` (name, all times in seconds and their median,
        peak memory in bytes beyond what stays between steps), ``ratios`` of their times to
        ours and ``median_ratio``, ``memory_ratio`` of ours to theirs, and ``date``,
        ``versions``, ``hardware`` and ``options``. It can be written as JSON.

    Raises:
        UserError: if a side cannot run with these options.
    """
    if options.device == 'cuda' and not _has_cuda():
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


def _has_cuda() -> bool:
    return torch.cuda.is_available()


def compare(options) -> tuple[BenchmarkOptions, str, list[Side]]:
    """The options with layouts decided, a title and the two sides."""
    if isinstance(options, OpOptions):
        return options, *compare_op(options)
    if isinstance(options, RuntimeOptions):
        return compare_runtimes(options)
    if isinstance(options, FileOptions):
        return options, *compare_files(options)
    return compare_models(options)


def compare_op(options: OpOptions) -> tuple[str, list[Side]]:
    """A title and the two sides: ContMix with one backend and with another."""
    n, channels, h, w = options.shape
    heads, kernels, regions = options.heads, (5, options.kernel), 49

    def build(backend, compiled=False):
        torch.manual_seed(0)
        op = torch.compile(contmix, dynamic=False) if compiled else contmix
        width, taps = channels // 2 // heads, sum(k * k for k in kernels)
        query, key = (n, heads, width, h, w), (n, heads, width, regions)
        rpbs = [(heads, 2 * k - 1, 2 * k - 1) for k in kernels]
        shapes = [query, key, options.shape, (taps, regions), (taps,), *rpbs]
        tensors = [torch.randn(shape) for shape in shapes]
        tensors[0] *= width**-0.5
        tensors[3] *= regions**-0.5  # logits of about 1
        kinds = dict(device=options.device, dtype=getattr(torch, options.dtype))
        tensors = [t.to(**kinds).requires_grad_(options.backward) for t in tensors]
        gradient = torch.ones_like(tensors[2])

        def step():
            with torch.set_grad_enabled(options.backward):
                out = op(*tensors[:5], tensors[5:], kernels, backend=backend)
            if options.backward:
                torch.autograd.grad(out, tensors, gradient)

        return step

    backend, against = options.backend, options.against
    ours = Side(f'ours: {backend}', partial(build, backend, options.compile))
    theirs = Side(f'theirs: {against}', partial(build, against))
    passes = 'forward and backward' if options.backward else 'forward'
    sizes = f'{n}x{channels}x{h}x{w}, {heads} heads, kernels 5 and {options.kernel}'
    return f'ContMix, {passes}, {sizes}', [ours, theirs]


def compare_models(options: ModelOptions) -> tuple[ModelOptions, str, list[Side]]:
    """The options with both layouts decided, a title and the two sides."""
    per_pixel = options.against.startswith('self:')
    other_size = parse_size(options.against[5:]) if per_pixel else options.size
    if options.amp and options.dtype == 'float32':
        raise UserError('--amp needs --dtype bfloat16 or float16')

    if options.against == 'torch':
        raise UserError('--against torch is for runtime; use a model of timm, or reference')

    ours = partial(_model_step, options, our_model, options.backend, options.size)
    theirs = partial(_model_step, options, timm_model, None, other_size)
    if options.against == 'reference':
        theirs = partial(_model_step, options, plain_model, 'reference', other_size)
    elif per_pixel:
        theirs = partial(_model_step, options, our_model, options.backend, other_size)

    layout = faster_layout(options.device, options.layout, 'ours', ours)
    usual = 'contiguous' if options.against == 'reference' else 'best'
    against_layout = options.against_layout or (layout if per_pixel else usual)
    against_layout = faster_layout(options.device, against_layout, 'theirs', theirs)

    def side(name, build, layout, size):
        pixels = options.batch * size[0] * size[1] if per_pixel else None
        return Side(f'{name}, {layout}', partial(build, layout), pixels)

    stages = f', with_cp {" ".join(map(str, options.with_cp))}' if options.with_cp else ''
    size, other = ('x'.join(map(str, sides)) for sides in (options.size, other_size))
    name = f'ours: {options.form}, {options.backend}{stages}, {size}'
    sides = [
        side(name, ours, layout, options.size),
        side(f'theirs: {options.against}, {other}', theirs, against_layout, other_size),
    ]
    what = f'OverLoCK-{options.arch.upper()} {options.command}, batch {options.batch}'
    return replace(options, layout=layout, against_layout=against_layout), what, sides


def compare_runtimes(options: RuntimeOptions) -> tuple[RuntimeOptions, str, list[Side]]:
    """The options, a title and two sides: a runtime and PyTorch, or two models in one."""
    if options.device != 'cpu':
        raise UserError('runtime measures on the CPU; use --device cpu')
    if options.runtime == 'onnxruntime' and options.dtype != 'float32':
        raise UserError(
            f'--runtime onnxruntime with --dtype {options.dtype}: on the CPU it computes '
            'in float32; use --runtime openvino'
        )
    if options.against == 'reference' or options.against.startswith('self:'):
        raise UserError(
            f'--against {options.against} is for backbone and train-step; with runtime it '
            'is torch or a model of timm'
        )
    size = 'x'.join(map(str, options.size))
    ours = partial(_runtime_step, options, our_model, options.dynamic)
    theirs = partial(_runtime_step, options, timm_model, False)
    name = f'theirs: {options.against} in {options.runtime}'
    if options.against == 'torch':
        theirs = partial(_model_step, options, our_model, options.backend, options.size)
        layout = faster_layout('cpu', options.against_layout or 'best', 'theirs', theirs)
        theirs, name = partial(theirs, layout), f'theirs: PyTorch, {layout}'
        options = replace(options, against_layout=layout)
    kind = ', for any size' if options.dynamic else ''
    sides = [Side(f'ours: {options.runtime}{kind}, {size}', ours), Side(name, theirs)]
    what = f'OverLoCK-{options.arch.upper()}, exported, batch {options.batch}'
    return options, what, sides


def compare_files(options: FileOptions) -> tuple[str, list[Side]]:
    """A title and the two sides: two exported files."""
    from .export.formats import load_onnx, load_openvino

    loaders = {'.onnx': load_onnx, '.xml': load_openvino}
    images = torch.randn(options.batch, 3, *options.size).numpy()

    def build(path):
        run = loaders[path.suffix](path, options.threads)
        return lambda: run(images)

    sides = []
    for name, text in (('ours', options.file), ('theirs', options.against)):
        path = Path(text)
        if path.suffix not in loaders or not path.is_file():
            raise UserError(f'{text} must be an exported file, .onnx or .xml')
        size = path.stat().st_size
        if path.suffix == '.xml':
            size += path.with_suffix('.bin').stat().st_size
        name = f'{name}: {path.name}, {size / 2**20:.1f} MiB'
        sides.append(Side(name, partial(build, path)))
    return f'Exported files, {"x".join(map(str, images.shape))}', sides


def _runtime_step(options, make, dynamic) -> Step:
    """Export a model with random weights, load it and return the step to measure."""
    from .export.formats import load_onnx, load_openvino
    from .export.onnx import write_onnx
    from .export.program import capture

    torch.manual_seed(0)
    start = time.perf_counter()
    model = _Maps(make(options).eval())
    prepare_for_export(model, plain_norms=options.runtime == 'openvino')
    image = torch.rand(options.batch, 3, *options.size)
    dims = {2: ('height', 193, 8192), 3: ('width', 193, 8192)} if dynamic else None
    example = torch.rand(1, 3, 224, 896) if dynamic else image
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'model.onnx')
        outputs = [f'map_{i}' for i in range(4)]
        nodes = write_onnx(capture(model, example, dims), path, outputs, opset=20)
        spent = time.perf_counter() - start
        print(f'{make.__name__}: {nodes} nodes, exported in {spent:.0f} s')
        if options.runtime == 'openvino':
            precision = dict(float32='f32', bfloat16='bf16')[options.dtype]
            run = load_openvino(path, options.threads, precision)
        else:
            run = load_onnx(path, options.threads)
    images = image.numpy()
    return lambda: run(images)


class _Maps(torch.nn.Module):
    """A backbone whose maps are a tuple."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, image):
        return tuple(self.backbone(image))


def _model_step(options, make, backend, size, layout) -> Step:
    """Build a model with ``make(options)``, and images; return the step to measure."""
    train, dtype = isinstance(options, TrainStepOptions), getattr(torch, options.dtype)
    formats = dict(channels_last=torch.channels_last, contiguous=torch.contiguous_format)
    torch.manual_seed(0)
    kinds = dict(
        device=options.device,
        dtype=torch.float32 if options.amp else dtype,
        memory_format=formats[layout],
    )
    model = make(options).to(**kinds).train(train)
    images = torch.rand(options.batch, 3, *size).to(**kinds)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6) if train else None
    model = torch.compile(model, dynamic=False) if options.compile else model

    def step():
        set_contmix_backend(backend)  # of the whole process, and the sides alternate
        autocast = torch.autocast(options.device, dtype) if options.amp else nullcontext()
        with torch.set_grad_enabled(train), autocast:
            maps = model(images)
        if train:
            sum(m.float().square().mean() for m in maps).backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


def our_model(options) -> torch.nn.Module:
    model = plain_model(options, with_cp=options.with_cp)
    if options.form == 'deploy':
        model.switch_to_deploy()
    return fold(model.eval()) if options.form == 'fold' else model


def plain_model(options, **kwargs) -> torch.nn.Module:
    return OverLoCK(options.arch, drop_path_rate=options.drop_path, **kwargs)


def timm_model(options) -> torch.nn.Module:
    kwargs = dict(drop_path_rate=options.drop_path) if options.drop_path else {}
    if timm.models.get_pretrained_cfg(options.against).fixed_input_size:
        kwargs['img_size'] = options.size
    return timm.create_model(options.against, features_only=True, **kwargs)


def faster_layout(device: str, layout: Layout, side: str, build) -> str:
    """``layout``, or for 'best' the one in which the fastest of three steps was faster."""
    if layout != 'best':
        return layout
    seconds = {}
    for tried in ('channels_last', 'contiguous'):
        step = prepare(Side(side, partial(build, tried)))
        seconds[tried] = min(seconds_of(step, device) for _ in range(3))
    best = min(seconds, key=seconds.get)
    print(f'{side}: {best} is the faster layout')
    return best


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
    steps, seconds, memory = [prepare(side) for side in sides], ([], []), []
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
                'seconds': times,
                'median_seconds': statistics.median(times),
                'peak_extra_bytes': peak,
            }
            for side, times, peak in zip(sides, seconds, memory, strict=True)
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


def _peak_on_cpu(step: Step) -> int:
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
    env = {**os.environ, 'MALLOC_ARENA_MAX': '1', **small}
    # the package that is imported here, wherever it is
    package = Path(__file__).parents[2]
    env['PYTHONPATH'] = os.pathsep.join(filter(None, [str(package), env.get('PYTHONPATH')]))
    what = json.dumps([options.command, asdict(options), side])
    code = f'from {__name__} import _measure_memory; _measure_memory()'
    command = [sys.executable, '-c', code]
    child = subprocess.run(command, env=env, input=what, capture_output=True, text=True)
    if child.returncode:
        lines = child.stderr.strip().splitlines() or [f'status {child.returncode}']
        raise UserError(f'measuring the memory failed: {lines[-1]}')
    return int(child.stdout.split()[-1])


def _measure_memory() -> None:
    """The child process: read command, options and side from stdin, print the bytes."""
    command, values, side = json.load(sys.stdin)
    lists = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    options = _OPTIONS[command](**lists)
    torch.set_num_threads(options.threads)
    _, _, sides = compare(options)
    print(_peak_on_cpu(prepare(sides[side])))


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


def units(side: dict) -> tuple[str, float, str, float]:
    """Units of time and memory, and the factors from seconds and bytes to them."""
    if side['pixels']:
        return 'ns/pixel', 1e9 / side['pixels'], 'B/pixel', 1 / side['pixels']
    return 'ms', 1e3, 'MiB', 2**-20


def table(result: dict) -> str:
    """The result of :func:`run_benchmark` as lines to print."""
    width = max(len(side['name']) for side in result['sides'])
    row = f'{{:{width}}}  {{:<14}}  {{:<26}}  {{}}'.format
    lines = [row('side', 'time (median)', 'spread', 'peak extra memory')]
    for side in result['sides']:
        unit, scale, memory_unit, memory_scale = units(side)
        low, high = (number(f(side['seconds']) * scale) for f in (min, max))
        median = f'{number(side["median_seconds"] * scale)} {unit}'
        peak = side['peak_extra_bytes']
        memory = '-' if peak is None else f'{number(peak * memory_scale)} {memory_unit}'
        lines.append(row(side['name'], median, f'{low} to {high} {unit}', memory))
    return '\n'.join([*lines, summary(result)])


def summary(result: dict) -> str:
    """Say in one line how much faster ours is."""
    ratio, ratios = result['median_ratio'], result['ratios']
    word = 'faster' if ratio >= 1 else 'slower'
    if ratio < 1:
        ratio, ratios = 1 / ratio, [1 / r for r in ratios]
    memory = result['memory_ratio']
    return (
        ('per pixel, ' if result['sides'][0]['pixels'] else '')
        + f'ours is {number(ratio)} times {word} ({number(min(ratios))} to '
        f'{number(max(ratios))} over {len(ratios)} rounds)'
        + (f', with {number(memory)} of its peak extra memory' if memory else '')
    )


def number(value: float) -> str:
    """Three significant digits, or all before the decimal point."""
    return f'{value:.0f}' if value >= 99.95 else f'{value:#.3g}'


def plot(result: dict, path: str) -> None:
    """Draw bars of both sides' times, with the spread, and of their memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout='constrained')
    figure.suptitle(f'{result["what"]}\n{summary(result)}', fontsize='medium')
    left, right = figure.subplots(1, 2)
    for side, color in zip(result['sides'], ('tab:blue', 'tab:gray'), strict=True):
        unit, scale, memory_unit, memory_scale = units(side)
        times, name = [t * scale for t in side['seconds']], side['name'].replace(', ', '\n')
        median = statistics.median(times)
        spread = [[median - min(times)], [max(times) - median]]
        left.bar(name, median, yerr=spread, capsize=6, color=color)
        right.bar(name, (side['peak_extra_bytes'] or 0) * memory_scale, color=color)
    left.set_title(f'time, {unit} (median, lowest to highest)', fontsize='medium')
    right.set_title(f'peak extra memory, {memory_unit}', fontsize='medium')
    figure.savefig(path, dpi=120)


def parse_numbers(text: str, counts: tuple[int, ...], example: str) -> tuple[int, ...]:
    """Positive numbers from a text such as '480x640'.

    Args:
        text: the numbers, with an x between them.
        counts: how many there may be.
        example: what the text should look like, for the error.

    Raises:
        ValueError: if the text is anything else.
    """
    numbers = text.split('x')
    if len(numbers) not in counts or not all(n.isdecimal() and int(n) for n in numbers):
        raise ValueError(f'{text!r} must be like {example}')
    return tuple(map(int, numbers))


def parse_size(text: str) -> tuple[int, int]:
    """Height and width from '480x640', or '512' for both."""
    size = parse_numbers(text, (1, 2), '512 or 480x640')
    return size[0], size[-1]


def check_model(text: str) -> str:
    """Return ``against`` of :class:`ModelOptions` if it is one; else raise ValueError."""
    if text.startswith('self:'):
        parse_size(text[5:])
    elif text not in ('reference', 'torch') and not timm.is_model(text):
        near = difflib.get_close_matches(text, timm.list_models()) or ['timm.list_models()']
        raise ValueError(
            f"{text!r} is neither 'reference' nor 'self:SIZE' nor a model of timm "
            f'{timm.__version__}; near: {", ".join(near)}'
        )
    return text
