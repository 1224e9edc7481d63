"""Evaluate a checkpoint of a detector or segmentor."""

import argparse

from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument(
        '--out',
        help='save predictions: a .pkl file from a detector, a folder of label maps from '
        'a segmentor',
    )
    parser.add_argument(
        '--show-dir', help='save pictures of the predictions in this folder'
    )
    parser.add_argument(
        '--show', action='store_true', help='show pictures of the predictions in a window'
    )
    parser.add_argument(
        '--wait-time',
        type=float,
        default=2.0,
        metavar='SECONDS',
        help='how long --show shows each picture; 0 waits for a key (default: 2)',
    )
    parser.add_argument(
        '--tta',
        action='store_true',
        help="test-time augmentation: as the config's tta_pipeline says, else flipped "
        '(boxes only for detectors)',
    )
    parser.add_argument(
        '--fold',
        action='store_true',
        help="evaluate the backbone's inference-only form (overlock_mm.fold): the same "
        'predictions up to rounding, faster',
    )
    common.add_dtype_option(parser)
    common.add_run_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from ..apis.test import test

    options = vars(args)
    options.pop('local_rank')
    test(**options)
