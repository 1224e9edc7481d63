"""Convert a released checkpoint for this project's models, or back.

Weights keep their values. Without --to, SRC is a detector or segmentor of MMDetection 2.x
or MMSegmentation 0.x with OverLoCK, and DST becomes one for mmengine and the configs here.
"""

import argparse

from ..convert import TARGETS
from ..errors import UserError
from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('src', metavar='SRC', help='checkpoint file or URL')
    parser.add_argument('dst', metavar='DST', help='file to write: .pth or .safetensors')
    parser.add_argument(
        '--to',
        choices=TARGETS,
        default='overlock_mm',
        help='what DST is for: this project (default); the released code; or, from an '
        'ImageNet file, a backbone in segmentation or detection layout, for toolboxes that '
        'load strictly',
    )
    parser.add_argument(
        '--verify',
        metavar='CONFIG',
        help='build the model of this config, load DST into it strictly, predict an image, '
        'and store the config in DST',
    )
    parser.add_argument('--half', action='store_true', help='store weights as float16')
    parser.add_argument(
        '--safetensors', action='store_true', help='require that DST has this format'
    )
    parser.add_argument(
        '--keep-optimizer',
        action='store_true',
        help='keep the state of the optimizer and all else that training resumes from',
    )
    parser.add_argument(
        '--trust', action='store_true', help='read SRC even if it can run code'
    )
    parser.add_argument('--force', action='store_true', help='overwrite DST')
    common.add_config_options(parser)


def run(args: argparse.Namespace) -> None:
    from ..apis.convert import convert

    if args.safetensors and not args.dst.endswith('.safetensors'):
        raise UserError(f'with --safetensors, {args.dst} must end in .safetensors')
    print(
        convert(
            args.src,
            args.dst,
            args.to,
            verify=args.verify,
            cfg_options=args.cfg_options,
            half=args.half,
            keep_optimizer=args.keep_optimizer,
            trust=args.trust,
            force=args.force,
        )
    )
