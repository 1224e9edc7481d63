"""Train a detector or segmentor from a config."""

import argparse

from _guard import installed

with installed():
    from overlock_mm import cli
    from overlock_mm.apis.train import train


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--resume',
        nargs='?',
        const=True,
        default=False,
        metavar='PATH',
        help='go on from PATH or, without it, from the latest checkpoint in the work dir',
    )
    parser.add_argument('--amp', action='store_true', help='mixed precision (GPU only)')
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
    cli.add_run_arguments(parser)
    return parser.parse_args()


if __name__ == '__main__':
    with cli.plain_errors():
        args = vars(parse_args())
        args.pop('local_rank')
        train(**args)
