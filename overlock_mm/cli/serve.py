"""Predict images in the browser: drop one in, see what was found, download it.

The page is for this machine alone unless --host says otherwise. Nothing is kept: images
and results are in memory, and go when the page is closed.
"""

import argparse

from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument('--device', help='default: the GPU if there is one, else cpu')
    parser.add_argument(
        '--host',
        default='127.0.0.1',
        help='address to serve on; 0.0.0.0 lets everyone in who can reach this machine '
        '(default: 127.0.0.1, this machine alone)',
    )
    parser.add_argument(
        '--port',
        type=int,
        default=7860,
        help='port to serve on; 0 takes a free one (default: 7860)',
    )
    parser.add_argument(
        '--max-mb',
        type=float,
        default=32,
        metavar='N',
        help='largest file that is taken, in MB (default: 32)',
    )
    parser.add_argument(
        '--max-pixels',
        type=int,
        metavar='N',
        help='largest image that is taken, in pixels (default: 25000000; fewer for a '
        'segmentor of many classes without --tile, which needs much memory)',
    )
    parser.add_argument(
        '--tile',
        type=int,
        metavar='SIZE',
        help='predict large images in tiles of this side, which are not resized',
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        help='lowest score of the objects that are shown at first (default: 0.3)',
    )
    parser.add_argument(
        '--trust', action='store_true', help='read the checkpoint even if it can run code'
    )
    common.add_config_options(parser)


def run(args: argparse.Namespace) -> None:
    from ..apis.serve import serve

    serve(**vars(args))
