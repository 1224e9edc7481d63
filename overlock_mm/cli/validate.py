"""Top-1 and top-5 accuracy of a classifier on a folder of images."""

import argparse

from ..apis.files import check_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        'folder',
        help='folder with one folder of images for each class, in the order of the '
        'classes, or the folder that has this one as val',
    )
    parser.add_argument(
        '--model',
        choices=[f'overlock_{arch}' for arch in ('xt', 't', 's', 'b')],
        default='overlock_t',
    )
    parser.add_argument(
        '--checkpoint',
        help='file or URL of a classifier, in training or deploy form; of several sets of '
        'weights the moving average is taken; default: the released weights, downloaded',
    )
    parser.add_argument(
        '--trust', action='store_true', help='read the file even if that runs code in it'
    )
    parser.add_argument('--batch-size', type=_positive, default=64)
    parser.add_argument('--workers', type=int, default=4)
    parser.add_argument(
        '--subset',
        type=_positive,
        metavar='N',
        help='evaluate N images, spread evenly over the classes in order',
    )
    parser.add_argument('--device', help='default: cuda where there is one, else cpu')
    parser.add_argument(
        '--fold',
        action='store_true',
        help='evaluate the inference-only form (overlock_mm.fold): the same predictions '
        'up to rounding, faster',
    )


def run(args: argparse.Namespace) -> None:
    from ..apis.validate import validate

    if args.checkpoint:
        check_file(args.checkpoint, 'checkpoint')
    print(validate(**vars(args)))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'{value} must be at least 1')
    return value
