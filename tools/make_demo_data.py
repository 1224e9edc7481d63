"""Make the demo data set, see overlock_mm/datasets/demo.py."""

import argparse

from _guard import installed


def main() -> None:
    parser = argparse.ArgumentParser(
        prog='make_demo_data.py',
        description='Make a small labelled data set from photos that pip packages ship.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument('--root', default='data/demo', help='folder to make')
    parser.add_argument('--seed', type=int, default=0, help='seed of the composition')
    parser.add_argument('--train', type=int, default=64, help='number of training images')
    parser.add_argument('--val', type=int, default=16, help='number of validation images')
    parser.add_argument('--size', type=int, default=256, help='height and width')
    args = parser.parse_args()

    with installed('onedl,demo'):
        # not at the top: it imports torch, which --help does without
        from overlock_mm.datasets.demo import make_demo_data
    try:
        written = make_demo_data(args.root, args.seed, args.train, args.val, args.size)
    except (ImportError, OSError, ValueError) as error:
        parser.exit(2, f'{parser.prog}: error: {error}\n')
    what = (
        f'{args.train} training and {args.val} validation images of '
        f'{args.size}x{args.size}, seed {args.seed}'
    )
    if written:
        print(f'Wrote {what}, with label maps and COCO annotations to {args.root}')
    else:
        print(f'Nothing to do: {args.root} already holds {what}')


if __name__ == '__main__':
    main()
