"""Count parameters and multiply-adds of a model, part by part.

Counted are convolutions and matrix products, for one image at inference.
"""

import argparse
import json
from contextlib import suppress

from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        'config',
        help='config of MMDetection or MMSegmentation, with any backbone; or xt, t, s or b '
        'for a classifier of OverLoCK; or timm/NAME',
    )
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        metavar=('H', 'W'),
        help='height and width of the image; default: those of the config or model',
    )
    parser.add_argument(
        '--deploy', action='store_true', help='merge the dilated branches first'
    )
    parser.add_argument('--json', metavar='FILE', help='write the exact numbers, too')
    parser.add_argument('--force', action='store_true', help='overwrite FILE')
    with suppress(ModuleNotFoundError):  # mmengine, which a classifier does not need
        common.add_config_options(parser)


def run(args: argparse.Namespace) -> None:
    from ..apis.files import check_output
    from ..apis.flops import count

    out = check_output(args.json, ['.json'], args.force) if args.json else None
    cfg_options = getattr(args, 'cfg_options', None)
    counted = count(args.config, args.shape, args.deploy, cfg_options)
    print(counted)
    if out:
        out.write_text(json.dumps(counted.as_dict(), indent=2) + '\n')
        print(f'\nwrote {out}')
