"""Predict images, folders of images and videos with a trained detector or segmentor.

Pictures and label files go into the folder of --out, under the names of the inputs.
The exit status is 3 if a file could not be read or predicted.
"""

import argparse

from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument(
        'inputs',
        nargs='+',
        metavar='INPUT',
        help="images, videos, folders (with all that is below them), patterns ('a/*.jpg')",
    )
    parser.add_argument(
        '--out', default='predictions', help='folder for results (default: predictions)'
    )
    parser.add_argument(
        '--save',
        nargs='+',
        action='extend',
        metavar='KIND',
        help='what to save: pictures, png (label maps), json, coco (default: pictures and '
        'png of a segmentor, pictures and coco of a detector)',
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        help='leave out objects with a lower score (default: 0.3)',
    )
    parser.add_argument('--device', help='default: the GPU if there is one, else cpu')
    parser.add_argument(
        '--batch', type=int, default=1, metavar='N', help='images at once (default: 1)'
    )
    parser.add_argument(
        '--tile',
        type=int,
        metavar='SIZE',
        help='predict large images in tiles of this side, which are not resized',
    )
    parser.add_argument(
        '--overlap',
        type=int,
        metavar='N',
        help='pixels that tiles share (default: an eighth of the side)',
    )
    parser.add_argument(
        '--fold',
        action=argparse.BooleanOptionalAction,
        help="use the backbone's form for inference (default: where it can be folded)",
    )
    common.add_dtype_option(parser)
    parser.add_argument(
        '--trust', action='store_true', help='read the checkpoint even if it can run code'
    )
    parser.add_argument(
        '--force', action='store_true', help='write into a folder that has files'
    )
    common.add_config_options(parser)


def run(args: argparse.Namespace) -> int:
    from ..apis.infer import infer

    options = vars(args)
    summary = infer(batch_size=options.pop('batch'), **options)
    print(summary)
    return 3 if summary.failed else 0
