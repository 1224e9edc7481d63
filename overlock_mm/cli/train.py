"""Train a detector or segmentor from a config."""

import argparse

from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--resume',
        nargs='?',
        const=True,
        default=False,
        metavar='PATH',
        help='go on from PATH or, without it, from the latest checkpoint in the work dir',
    )
    parser.add_argument(
        '--amp', action='store_true', help='mixed precision; bfloat16 without a GPU'
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate with the number of GPUs and images',
    )
    parser.add_argument(
        '--no-pretrained',
        dest='pretrained',
        action='store_false',
        help='start from random weights',
    )
    common.add_run_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from ..apis.train import train

    options = vars(args)
    options.pop('local_rank')
    train(**options)
