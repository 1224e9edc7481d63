"""Put OverLoCK, or a model of timm, into a config that you have.

Everything that depends on the backbone is changed with it, and printed. The new config
inherits from the given one.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('config', help='config of MMDetection or MMSegmentation')
    parser.add_argument(
        '--arch', default='t', help='xt, t, s or b, or timm/NAME for a model of timm'
    )
    parser.add_argument(
        '--out',
        metavar='NEW.py',
        help='config to write; default: the name of the config '
        'with the arch at its end, in the current folder',
    )
    parser.add_argument(
        '--no-pretrained',
        dest='pretrained',
        action='store_false',
        help='start from random weights',
    )
    parser.add_argument('--drop-path-rate', type=float, help='stochastic depth rate')
    parser.add_argument(
        '--keep-strides',
        action='store_true',
        help='add a neck that gives segmentation heads maps of the strides that they had '
        'from a dilated backbone',
    )
    parser.add_argument(
        '--dry-run', action='store_true', help='print the new config and write nothing'
    )
    parser.add_argument(
        '--build',
        action='store_true',
        help='build the model, and compute one loss and one prediction, before writing',
    )
    parser.add_argument('--force', action='store_true', help='overwrite the output')


def run(args: argparse.Namespace) -> None:
    from ..apis.swap import write_swapped

    text, notes, out = write_swapped(**vars(args))
    print(*notes, sep='\n')
    print(text if out is None else f'wrote {out}', end='\n' if out else '')
