"""Time one thing against another, and measure the memory that each takes.

The two sides take turns in one process, and what counts is the median of the ratios of
the rounds: on a machine that others use too, a time alone says little.
"""

import argparse
import difflib
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
from functools import partial
from pathlib import Path
from typing import NamedTuple

# GNU OpenMP reads this when torch loads it. By its default, idle threads spin, which
# slows everything down several times as soon as anything else runs on the machine.
os.environ.setdefault('GOMP_SPINCOUNT', '20000')

try:
    import timm
    import torch
    from tqdm import tqdm

    import overlock_mm
    from overlock_mm import cli
    from overlock_mm.ops import contmix, set_contmix_backend
    from overlock_mm.ops.contmix import BACKENDS
except ModuleNotFoundError as error:
    sys.stderr.write(
        f'error: {error.name.partition(".")[0]} is not installed; in the folder of '
        "overlock_mm run: pip install -e '.[onedl]'\n"
    )
    sys.exit(2)

Step = Callable[[], object]


class Side(NamedTuple):
    name: str
    build: Callable[[], Step]  # makes model and inputs; a call of the step is measured
    pixels: int | None = None  # results are told per pixel of so many; None: per step


# A comparison is a function from the arguments to a title and two sides.


def compare_op(args) -> tuple[str, Side, Side]:
    """ContMix with one backend against another, on random values."""
    n, channels, h, w = args.shape
    heads, kernels, regions = args.heads, (5, args.kernel), 49

    def build(backend, compiled=False):
        torch.manual_seed(0)
        op = torch.compile(contmix, dynamic=False) if compiled else contmix
        width, taps = channels // 2 // heads, sum(k * k for k in kernels)
        query, key = (n, heads, width, h, w), (n, heads, width, regions)
        rpbs = [(heads, 2 * k - 1, 2 * k - 1) for k in kernels]
        shapes = [query, key, args.shape, (taps, regions), (taps,), *rpbs]
        tensors = [torch.randn(shape) for shape in shapes]
        tensors[0] *= width**-0.5
        tensors[3] *= regions**-0.5  # logits of about 1
        kinds = dict(device=args.device, dtype=getattr(torch, args.dtype))
        tensors = [t.to(**kinds).requires_grad_(args.backward) for t in tensors]
        gradient = torch.ones_like(tensors[2])

        def step():
            with torch.set_grad_enabled(args.backward):
                out = op(*tensors[:5], tensors[5:], kernels, backend=backend)
            if args.backward:
                torch.autograd.grad(out, tensors, gradient)

        return step

    ours = Side(f'ours: {args.backend}', partial(build, args.backend, args.compile))
    theirs = Side(f'theirs: {args.against}', partial(build, args.against))
    passes = 'forward and backward' if args.backward else 'forward'
    sizes = f'{n}x{channels}x{h}x{w}, {heads} heads, kernels 5 and {args.kernel}'
    return f'ContMix, {passes}, {sizes}', ours, theirs


def compare_models(args) -> tuple[str, Side, Side]:
    """The backbone against another, or against itself at another size."""
    per_pixel = args.against.startswith('self:')
    other_size = image_size(args.against[5:]) if per_pixel else args.size
    formats = dict(channels_last=torch.channels_last, contiguous=torch.contiguous_format)
    train, dtype = args.command == 'train-step', getattr(torch, args.dtype)
    if args.amp and args.dtype == 'float32':
        raise cli.UserError('--amp needs --dtype bfloat16 or float16')

    autocast = partial(torch.autocast, args.device, dtype, args.amp)

    def build(make, backend, size, layout):
        torch.manual_seed(0)
        stored = torch.float32 if args.amp else dtype
        kinds = dict(device=args.device, dtype=stored, memory_format=formats[layout])
        model = make(args).to(**kinds).train(train)
        images = torch.rand(args.batch, 3, *size).to(**kinds)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6) if train else None
        model = torch.compile(model, dynamic=False) if args.compile else model

        def step():
            set_contmix_backend(backend)  # of the whole process, and the sides alternate
            with torch.set_grad_enabled(train), autocast():
                maps = model(images)
            if train:
                sum(m.float().square().mean() for m in maps).backward()
                optimizer.step()
                optimizer.zero_grad()

        return step

    ours = partial(build, our_model, args.backend)
    theirs = partial(build, timm_model, None)
    if args.against == 'reference':
        theirs = partial(build, plain_model, 'reference')
    elif per_pixel:
        theirs = ours
    ours, theirs = partial(ours, args.size), partial(theirs, other_size)

    args.layout = faster_layout(args, args.layout, 'ours', ours)
    usual = 'contiguous' if args.against == 'reference' else 'best'
    layout = args.against_layout or (args.layout if per_pixel else usual)
    args.against_layout = faster_layout(args, layout, 'theirs', theirs)

    def side(name, build, layout, size):
        pixels = args.batch * size[0] * size[1] if per_pixel else None
        return Side(f'{name}, {layout}', partial(build, layout), pixels)

    stages = f', with_cp {" ".join(map(str, args.with_cp))}' if args.with_cp else ''
    size, other = ('x'.join(map(str, sides)) for sides in (args.size, other_size))
    name = f'ours: {args.form}, {args.backend}{stages}, {size}'
    return (
        f'OverLoCK-{args.arch.upper()} {args.command}, batch {args.batch}',
        side(name, ours, args.layout, args.size),
        side(f'theirs: {args.against}, {other}', theirs, args.against_layout, other_size),
    )


def our_model(args) -> torch.nn.Module:
    model = plain_model(args, with_cp=args.with_cp)
    if args.form == 'deploy':
        model.switch_to_deploy()
    return overlock_mm.fold(model.eval()) if args.form == 'fold' else model


def plain_model(args, **options) -> torch.nn.Module:
    return overlock_mm.OverLoCK(args.arch, drop_path_rate=args.drop_path, **options)


def timm_model(args) -> torch.nn.Module:
    options = dict(drop_path_rate=args.drop_path) if args.drop_path else {}
    if timm.models.get_pretrained_cfg(args.against).fixed_input_size:
        options['img_size'] = args.size
    return timm.create_model(args.against, features_only=True, **options)


def faster_layout(args, layout: str, side: str, build) -> str:
    """``layout``, or for 'best' the one in which three steps went fastest."""
    if layout != 'best':
        return layout
    seconds = {}
    for tried in ('channels_last', 'contiguous'):
        step = prepare(Side(side, partial(build, tried)))
        seconds[tried] = min(seconds_of(step, args.device) for _ in range(3))
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
        raise cli.UserError(f'{side.name} cannot run: {lines[0]}') from error
    return step


def seconds_of(step: Step, device: str) -> float:
    synchronize = torch.cuda.synchronize if device == 'cuda' else lambda: None
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


def peak_memory(step: Step, device: str) -> int | None:
    """Bytes that one more step takes at its peak, beyond all that lives between steps."""
    if device == 'cuda':
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = _resident('VmRSS')
    Path('/proc/self/clear_refs').write_text('5')  # forget the peak so far
    step()
    return max(_resident('VmHWM') - before, 0)


def _resident(field: str) -> int:
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(s.split()[1]) for s in lines if s.startswith(field)) * 1024


def child_memory(args, side: int) -> int | None:
    """Peak memory of a side on the CPU, measured in a process of its own."""
    if not os.access('/proc/self/clear_refs', os.W_OK):
        return None  # only Linux can forget a peak
    command = [sys.executable, __file__, *without_outputs(), f'--measure-memory={side}']
    if args.command != 'op':
        command += ['--layout', args.layout, '--against-layout', args.against_layout]
    # By default the C library keeps freed blocks for later, which hides what the next
    # step takes. With these, blocks go back to the system as soon as they are free.
    small = dict.fromkeys(('MALLOC_MMAP_THRESHOLD_', 'MALLOC_TRIM_THRESHOLD_'), '65536')
    env = {**os.environ, 'MALLOC_ARENA_MAX': '1', **small}
    child = subprocess.run(command, env=env, capture_output=True, text=True)
    if child.returncode:
        lines = child.stderr.strip().splitlines() or [f'status {child.returncode}']
        raise cli.UserError(f'measuring the memory failed: {lines[-1]}')
    return int(child.stdout.split()[-1])


def measure(args, sides: list[Side]) -> dict:
    """Measure both sides; seconds and bytes are per step, ratios are theirs to ours."""
    steps, seconds, memory = [prepare(side) for side in sides], ([], []), []
    turns = range(-args.warmup, args.rounds)
    with tqdm(total=len(turns) + 2, disable=None, leave=False) as bar:
        for i, step in enumerate(steps):
            bar.set_description('memory')
            on_cuda = args.device == 'cuda'
            memory.append(peak_memory(step, 'cuda') if on_cuda else child_memory(args, i))
            bar.update()
        bar.set_description('time')
        for turn in turns:
            for step, times in zip(steps, seconds, strict=True):
                spent = seconds_of(step, args.device)
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


def hardware(args) -> dict:
    """What it ran on; nothing that tells whose machine it is."""
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(':')[1].strip() for line in lines if 'model name' in line]
    found = {
        'cpu': models[0] if models else platform.processor() or platform.machine(),
        'cores': os.cpu_count(),
        'threads': args.threads,
    }
    if args.device == 'cuda':
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
        'overlock_mm': overlock_mm.__version__,
    }


def units(side: dict) -> tuple[str, float, str, float]:
    """Units of time and memory, and the factors from seconds and bytes to them."""
    if side['pixels']:
        return 'ns/pixel', 1e9 / side['pixels'], 'B/pixel', 1 / side['pixels']
    return 'ms', 1e3, 'MiB', 2**-20


def table(result: dict) -> str:
    width = max(len(side['name']) for side in result['sides'])
    row = f'{{:{width}}}  {{:<14}}  {{:<26}}  {{}}'.format
    lines = [row('side', 'time (median)', 'spread', 'peak extra memory')]
    for side in result['sides']:
        unit, scale, memory_unit, memory_scale = units(side)
        low, high = (number(f(side['seconds']) * scale) for f in (min, max))
        time = f'{number(side["median_seconds"] * scale)} {unit}'
        peak = side['peak_extra_bytes']
        memory = '-' if peak is None else f'{number(peak * memory_scale)} {memory_unit}'
        lines.append(row(side['name'], time, f'{low} to {high} {unit}', memory))
    return '\n'.join([*lines, summary(result)])


def summary(result: dict) -> str:
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
    """Bars of both sides' times, with the spread, and of their memory."""
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


def dimensions(text: str, counts: tuple[int, ...], example: str) -> tuple[int, ...]:
    numbers = text.split('x')
    if len(numbers) not in counts or not all(n.isdecimal() and int(n) for n in numbers):
        raise argparse.ArgumentTypeError(f'{text!r} must be like {example}')
    return tuple(map(int, numbers))


def image_size(text: str) -> tuple[int, int]:
    size = dimensions(text, (1, 2), '512 or 480x640')
    return size[0], size[-1]


def positive(text: str) -> int:
    return dimensions(text, (1,), '11, and at least 1')[0]


def other_model(text: str) -> str:
    if text.startswith('self:'):
        image_size(text[5:])
    elif text != 'reference' and not timm.is_model(text):
        near = difflib.get_close_matches(text, timm.list_models()) or ['timm.list_models()']
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither 'reference' nor 'self:SIZE' nor a model of timm "
            f'{timm.__version__}; near: {", ".join(near)}'
        )
    return text


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise cli.UserError(f'{message}; see --help')


def output_options() -> Parser:
    parser, about = Parser(add_help=False), 'save all times, ratios, versions, hardware'
    parser.add_argument('--json', metavar='PATH', help=about)
    about = 'draw time and memory; needs matplotlib'
    parser.add_argument('--plot', metavar='PATH.png', help=about)
    return parser


def without_outputs() -> list[str]:
    """The command line, but for the files to write."""
    return output_options().parse_known_args()[1]


def parse_args() -> argparse.Namespace:
    threads, cuda = torch.get_num_threads(), torch.cuda.is_available()
    common = Parser(add_help=False, parents=[output_options()])
    add = common.add_argument
    add('--backend', choices=BACKENDS, default='auto', help="our side's ContMix (auto)")
    add('--device', choices=['cpu', 'cuda'], default='cuda' if cuda else 'cpu')
    add('--threads', type=positive, default=threads, help='CPU threads (%(default)s)')
    add('--rounds', type=positive, default=11, help='turns of each side (%(default)s)')
    add('--warmup', type=positive, default=2, help='turns that do not count (%(default)s)')
    compiled = 'torch.compile the op of our side, or the models of both'
    add('--compile', action='store_true', help=compiled)
    add('--measure-memory', type=int, help=argparse.SUPPRESS)  # only that, of this side

    models = Parser(add_help=False)
    add, archs = models.add_argument, ('xt', 't', 's', 'b')
    add('--arch', choices=archs, default='t', help='(%(default)s)')
    add('--size', type=image_size, default='512', help='H or HxW of images (%(default)s)')
    layouts = ('channels_last', 'contiguous', 'best')
    fastest = 'memory format of our side; best tries both and takes the faster (best)'
    add('--layout', choices=layouts, default='best', help=fastest)
    theirs = 'of theirs (contiguous for the reference, as ours for self:, else best)'
    add('--against-layout', choices=layouts, help=theirs)
    against = (
        'reference: the same arch in its training form with the reference op (default); '
        'self:SIZE: our side at another size, and all is told per pixel; or a model of '
        'timm, as features_only makes it'
    )
    add(
        '--against',
        default='reference',
        metavar='reference|self:SIZE|MODEL',
        type=other_model,
        help=against,
    )

    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest='command', required=True)

    def command(name, compare, text, *parents):
        added = commands.add_parser(name, parents=parents, help=text, description=text)
        added.set_defaults(compare=compare, amp=False, with_cp=(), drop_path=0.0)
        return added.add_argument

    dtypes = ['float32', 'bfloat16', 'float16']
    add = command('op', compare_op, 'the ContMix op, against another backend', common)
    add('--dtype', choices=[*dtypes, 'float64'], default='float32')
    map_shape = partial(dimensions, counts=(4,), example='1x256x50x84')
    add('--shape', type=map_shape, default='1x256x50x84', help='of values (%(default)s)')
    add('--heads', type=positive, default=8, help='of each kernel (%(default)s)')
    add('--kernel', type=positive, default=13, help='the large one (%(default)s)')
    add('--backward', action='store_true', help='forward and backward, not only forward')
    add('--against', choices=BACKENDS[1:], default='reference', help='(%(default)s)')

    text = 'the forward pass of the backbone in evaluation mode, without gradients'
    add = command('backbone', compare_models, text, common, models)
    add('--dtype', choices=dtypes, default='float32', help='of weights and images')
    add('--batch', type=positive, default=1, help='images in a step (%(default)s)')
    add('--form', choices=['train', 'deploy', 'fold'], default='fold', help='(%(default)s)')

    text = 'a training step: forward, backward of the mean squares of the maps, and AdamW'
    add = command('train-step', compare_models, text, common, models)
    add('--dtype', choices=dtypes, default='float32', help='of weights, or of autocast')
    add('--form', choices=['train', 'deploy'], default='train', help='(%(default)s)')
    add('--amp', action='store_true', help='autocast to --dtype; no gradient scaling')
    add('--batch', type=positive, default=2, help='images in a step (%(default)s)')
    stages = 'stages 0..4 whose activations our side recomputes'
    add('--with-cp', type=int, nargs='+', metavar='STAGE', help=stages)
    rate = 'stochastic depth rate of both sides (%(default)s)'
    add('--drop-path', type=float, help=rate)
    return parser.parse_args()


def check(args) -> None:
    """Raise :class:`UserError` for what would otherwise fail after the measuring."""
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise cli.UserError('--device cuda: torch sees no GPU; use --device cpu')
    if args.plot and importlib.util.find_spec('matplotlib') is None:
        raise cli.UserError('--plot needs matplotlib; run: pip install matplotlib')
    if args.plot and not args.plot.endswith('.png'):
        raise cli.UserError(f'--plot {args.plot} must end in .png')
    for path in map(Path, filter(None, (args.json, args.plot))):
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise cli.UserError(f'cannot write {path}; give a file in a folder that exists')


def main() -> None:
    args = parse_args()
    check(args)
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True  # shapes never change
    what, *sides = args.compare(args)
    if args.measure_memory is not None:
        print(peak_memory(prepare(sides[args.measure_memory]), args.device))
        return
    machine = hardware(args)
    on = machine.get('gpu') or f'{machine["cpu"]} with {args.threads} thread(s)'
    what += f', {args.dtype}{", compiled" * args.compile}, on {on}'
    result = {'what': what, **measure(args, sides)}
    print(f'{what}\n{table(result)}')
    if args.json:
        left_out = ('json', 'plot', 'compare', 'measure_memory')
        about = {
            'command': ' '.join(['python tools/benchmark.py', *without_outputs()]),
            'date': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
            'versions': versions(),
            'hardware': machine,
            'options': {k: v for k, v in vars(args).items() if k not in left_out},
        }
        Path(args.json).write_text(json.dumps({**about, **result}, indent=1) + '\n')
    if args.plot:
        plot(result, args.plot)


if __name__ == '__main__':
    with cli.plain_errors():
        main()
