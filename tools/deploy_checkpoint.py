"""Merge the dilated branches of a trained model: a checkpoint in deploy form.

Writes OUT and, beside it, a config that loads it. The weights of a folded model
(`overlock_mm.fold`) need no file: fold the loaded model.
"""

import argparse

from _guard import installed

with installed():
    from overlock_mm import cli
    from overlock_mm.apis.deploy import deploy


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config of the trained model')
    parser.add_argument('checkpoint', help='its checkpoint, in training form; file or URL')
    parser.add_argument('out', metavar='OUT.pth', help='checkpoint to write')
    parser.add_argument(
        '--trust', action='store_true', help='read the checkpoint even if it can run code'
    )
    parser.add_argument('--force', action='store_true', help='overwrite OUT and its config')
    cli.add_config_options(parser)
    cli.add_debug_option(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    print(
        deploy(
            args.config,
            args.checkpoint,
            args.out,
            cfg_options=args.cfg_options,
            trust=args.trust,
            force=args.force,
        )
    )


if __name__ == '__main__':
    with cli.plain_errors():
        main()
