"""Evaluate released checkpoints, or train the recipes, and compare with what was published.

ROW is a name that --list shows, a pattern such as 'mask_rcnn*', or all: every row with a
published number. What is done already is not done again.
"""

import argparse
import os
from pathlib import Path

from ..errors import UserError
from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('rows', nargs='*', metavar='ROW', help='rows, or all')
    action = parser.add_mutually_exclusive_group()
    action.add_argument(
        '--list',
        action='store_true',
        help='show the rows (default: all that there are), what was published, and what '
        '--out has, and run nothing',
    )
    action.add_argument(
        '--dry-run', action='store_true', help='print the commands, and run nothing'
    )
    parser.add_argument(
        '--data-root',
        metavar='DIR',
        default='data',
        help='folder that has coco/, ade/ADEChallengeData2016/ or imagenet/val/ '
        '(default: data)',
    )
    parser.add_argument(
        '--gpus', type=int, metavar='N', help='default: all that torch sees; 0: the CPU'
    )
    parser.add_argument(
        '--weights', metavar='DIR', help='folder of released checkpoints, for no download'
    )
    parser.add_argument(
        '--train',
        action='store_true',
        help='train as the recipe says, with as many images in an update and in total on '
        'any number of GPUs; then evaluate the last checkpoint',
    )
    parser.add_argument(
        '--baseline',
        metavar='timm/NAME',
        help='with --train: a model of timm as the backbone',
    )
    parser.add_argument(
        '--images-per-gpu',
        type=int,
        metavar='N',
        help='with --train: the most images on a GPU in an iteration (default: 2)',
    )
    parser.add_argument(
        '--no-pretrained',
        dest='pretrained',
        action='store_false',
        help='with --train: start from random weights',
    )
    parser.add_argument(
        '--out',
        metavar='DIR',
        default='work_dirs/reproduce',
        help='folder of results (default: work_dirs/reproduce)',
    )
    parser.add_argument('--json', metavar='FILE', help='also write the results as JSON')
    parser.add_argument(
        '--markdown', metavar='FILE', help='also write the results as a Markdown table'
    )
    common.add_config_options(parser)


def run(args: argparse.Namespace) -> int:
    from ..apis import reproduce as api

    options = vars(args)
    names, listing = options.pop('rows'), options.pop('list')
    files = {
        path: write
        for path, write in (
            (options.pop('json'), api.as_json),
            (options.pop('markdown'), api.as_markdown),
        )
        if path
    }
    for path in files:
        if args.dry_run:
            raise UserError(f'--dry-run has no results to write to {path}; leave it out')
        file = Path(path).expanduser().absolute()
        if not file.parent.is_dir():
            raise UserError(f'the folder of {path} does not exist; make it first')
        if file.is_dir() or not os.access(file.parent, os.W_OK):
            raise UserError(f'{path} cannot be written: give the name of a file')
    for given, option in (
        (args.images_per_gpu is not None, '--images-per-gpu'),
        (not args.pretrained, '--no-pretrained'),
    ):
        if given and not args.train:
            raise UserError(f'{option} is for --train; add that, or leave it out')
    failures = {}
    if args.images_per_gpu is None:
        options.pop('images_per_gpu')
    if listing:
        results = api.results_of(api.select_rows(names or ['*']), args.out)
    elif not names:
        raise UserError('give a row, or all; overlock reproduce --list shows the rows')
    else:
        results, failures = api.reproduce(names, **options)
    if not args.dry_run:
        print(api.as_text(results))
    for path, write in files.items():
        Path(path).expanduser().write_text(write(results))
        print(f'wrote {path}')
    if failures:
        listed = '; '.join(f'{name}: {reason}' for name, reason in failures.items())
        raise UserError(f'{len(failures)} of the rows failed: {listed}')
    return 0
