"""Time one thing against another, and measure the memory that each takes.

The two sides take turns in one process, and what counts is the median of the ratios of
the rounds: on a machine that others use too, a time alone says little.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
from pathlib import Path

from _guard import installed

with installed():
    from overlock_mm.apis import benchmark
    from overlock_mm.apis.benchmark import options as inputs
    from overlock_mm.apis.benchmark import report
    from overlock_mm.archs import ARCHS
    from overlock_mm.cli import common as cli
    from overlock_mm.errors import UserError
    from overlock_mm.ops.contmix import BACKENDS


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f'{message}; see --help')


def checked(function, **kwargs):
    """A type for argparse, which shows the message of a ValueError only as its own."""

    def convert(text):
        try:
            return function(text, **kwargs)
        except ValueError as error:
            raise argparse.ArgumentTypeError(error) from error

    return convert


def positive(text: str) -> int:
    return inputs.parse_numbers(text, (1,), '11, and at least 1')[0]


def parse_args() -> argparse.Namespace:
    count = checked(positive)

    outputs = Parser(add_help=False)
    add, about = outputs.add_argument, 'save all times, ratios, versions, hardware'
    add('--json', metavar='PATH', help=about)
    about = 'draw time and memory; needs matplotlib'
    add('--plot', metavar='PATH.png', help=about)

    common = Parser(add_help=False, parents=[outputs])
    add, defaults = common.add_argument, benchmark.OpOptions()
    add('--backend', choices=BACKENDS, default='auto', help="our side's ContMix (auto)")
    add('--device', choices=['cpu', 'cuda'], default=defaults.device)
    add('--threads', type=count, default=defaults.threads, help='of the CPU (%(default)s)')
    about = 'turns of each side (%(default)s)'
    add('--rounds', type=count, default=defaults.rounds, help=about)
    about = 'turns that do not count (%(default)s)'
    add('--warmup', type=count, default=defaults.warmup, help=about)
    about = 'torch.compile the op of our side, or the models of both'
    add('--compile', action='store_true', help=about)

    models = Parser(add_help=False)
    add, defaults = models.add_argument, benchmark.ModelOptions()
    size = checked(inputs.parse_size)
    layouts = ('channels_last', 'contiguous', 'best')
    add('--arch', choices=ARCHS, default=defaults.arch, help='(%(default)s)')
    add('--size', type=size, default='512', help='H or HxW of images (%(default)s)')
    about = 'memory format of our side; best tries both and takes the faster (%(default)s)'
    add('--layout', choices=layouts, default=defaults.layout, help=about)
    about = 'of theirs (contiguous for the reference, as ours for self:, else best)'
    add('--against-layout', choices=layouts, help=about)
    about = (
        'reference: the same arch in its training form with the reference op (default); '
        'torch: PyTorch, of runtime (its default); self:SIZE: our side at another size, '
        'with results per pixel; or a model of timm, as features_only makes it'
    )
    model, metavar = checked(inputs.check_model), 'reference|self:SIZE|MODEL'
    add('--against', type=model, metavar=metavar, help=about)

    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest='command', required=True)

    def command(options, *parents):
        about = options.__doc__.splitlines()[0]
        added = commands.add_parser(
            options.command, parents=parents, help=about, description=about
        )
        added.set_defaults(options=options)
        return added.add_argument, options()

    dtypes = ['float32', 'bfloat16', 'float16']
    add, defaults = command(benchmark.OpOptions, common)
    add('--dtype', choices=[*dtypes, 'float64'], default='float32')
    shape = checked(inputs.parse_numbers, counts=(4,), example='1x256x50x84')
    add('--shape', type=shape, default='1x256x50x84', help='of values (%(default)s)')
    about = 'of each kernel (%(default)s)'
    add('--heads', type=count, default=defaults.heads, help=about)
    add('--kernel', type=count, default=defaults.kernel, help='the large one (%(default)s)')
    add('--backward', action='store_true', help='forward and backward, not only forward')
    add('--against', choices=BACKENDS[1:], default='reference', help='(%(default)s)')

    add, defaults = command(benchmark.BackboneOptions, common, models)
    add('--dtype', choices=dtypes, default='float32', help='of weights and images')
    about = 'images in a step (%(default)s)'
    add('--batch', type=count, default=defaults.batch, help=about)
    forms = ['train', 'deploy', 'fold']
    add('--form', choices=forms, default=defaults.form, help='(%(default)s)')

    add, defaults = command(benchmark.TrainStepOptions, common, models)
    add('--dtype', choices=dtypes, default='float32', help='of weights, or of autocast')
    add('--form', choices=forms[:2], default=defaults.form, help='(%(default)s)')
    add('--amp', action='store_true', help='autocast to --dtype; no gradient scaling')
    add('--batch', type=count, default=defaults.batch, help=about)
    about = 'stages 0..4 whose activations our side recomputes'
    add('--with-cp', type=int, nargs='+', default=(), metavar='STAGE', help=about)
    about = 'stochastic depth rate of both sides (%(default)s)'
    add('--drop-path', type=float, default=defaults.drop_path, help=about)

    add, defaults = command(benchmark.RuntimeOptions, common, models)
    runtimes = ['onnxruntime', 'openvino', 'compile', 'aotinductor']
    add('--runtime', choices=runtimes, default=defaults.runtime, help='(%(default)s)')
    add('--dtype', choices=dtypes[:2], default='float32', help='bfloat16: OpenVINO alone')
    add('--dynamic', action='store_true', help='for images of any size')
    about = 'measure the segmentor of this config in place of the backbone'
    add('--config', help=about)
    add(
        '--batch', type=count, default=defaults.batch, help='images in a step (%(default)s)'
    )

    add, defaults = command(benchmark.FileOptions, common)
    add('--file', required=True, metavar='FILE', help='an exported file, .onnx or .xml')
    add('--against', required=True, metavar='FILE', help='another')
    add('--size', type=size, default='512', help='H or HxW of images (%(default)s)')
    add('--batch', type=count, default=defaults.batch, help='images in a step')
    add('--dtype', choices=dtypes[:1], default='float32', help=argparse.SUPPRESS)

    cli.add_debug_option(parser)
    args = parser.parse_args()
    # without the files to write: it is recorded in one of them
    args.command_line = ['python tools/benchmark.py', *outputs.parse_known_args()[1]]
    return args


def check_outputs(args) -> None:
    """Raise UserError for what would otherwise fail after the measuring."""
    if args.plot and importlib.util.find_spec('matplotlib') is None:
        raise UserError('--plot needs matplotlib; run: pip install matplotlib')
    if args.plot and not args.plot.endswith('.png'):
        raise UserError(f'--plot {args.plot} must end in .png')
    for path in map(Path, filter(None, (args.json, args.plot))):
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UserError(f'cannot write {path}; give a file in a folder that exists')


def main() -> None:
    args = parse_args()
    check_outputs(args)
    names = [field.name for field in dataclasses.fields(args.options)]
    given = {k: v for k, v in vars(args).items() if k in names and v is not None}
    options = args.options(**given)
    result = benchmark.run_benchmark(options)
    print(f'{result["what"]}\n{report.table(result)}')
    if args.json:
        result = {'command': ' '.join(args.command_line), **result}
        Path(args.json).write_text(json.dumps(result, indent=1) + '\n')
    if args.plot:
        report.plot(result, args.plot)


if __name__ == '__main__':
    with cli.plain_errors():
        main()
