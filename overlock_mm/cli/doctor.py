"""Say what is installed, what is wrong with it here, and which command fixes it."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--json', action='store_true', help='print JSON')


def run(args: argparse.Namespace) -> int:
    from ..apis.doctor import doctor

    return doctor(as_json=args.json)
