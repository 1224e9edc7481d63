"""Merge the dilated branches of a trained model: a checkpoint in deploy form.

Writes OUT and, beside it, a config that loads it. The weights of a folded model
(`overlock_mm.fold`) need no file: fold the loaded model.
"""

import argparse

from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('config', help='config of the trained model')
    parser.add_argument('checkpoint', help='its checkpoint, in training form; file or URL')
    parser.add_argument('out', metavar='OUT.pth', help='checkpoint to write')
    parser.add_argument(
        '--trust', action='store_true', help='read the checkpoint even if it can run code'
    )
    parser.add_argument('--force', action='store_true', help='overwrite OUT and its config')
    common.add_config_options(parser)


def run(args: argparse.Namespace) -> None:
    from ..apis.deploy import deploy

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
