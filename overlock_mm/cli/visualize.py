"""Draw figures, for a paper or to see what a model does."""

import argparse
import importlib

from ..errors import UserError
from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    figures = parser.add_subparsers(dest='figure', required=True, metavar='FIGURE')
    for name, (about, add) in FIGURES.items():
        figure = figures.add_parser(name, help=about, description=f'{about.capitalize()}.')
        add(figure)
        figure.add_argument(
            '--out', required=True, help='picture to write; it ends in .png, .svg or .pdf'
        )
        figure.add_argument(
            '--dpi', type=int, default=200, help='dots per inch of a .png (default: 200)'
        )
        common.add_debug_option(figure)


def run(args: argparse.Namespace) -> None:
    """Call the function named as the figure, in its module, and print what it returns."""
    import matplotlib

    options = vars(args)
    name, dpi = options.pop('figure'), options.pop('dpi')
    if not 10 <= dpi <= 2400:
        raise UserError(f'--dpi {dpi} must be within 10 to 2400')
    module = importlib.import_module(f'overlock_mm.apis.visualization.{name}')
    with matplotlib.rc_context({'savefig.dpi': dpi}):
        print(getattr(module, name)(**options))


def _erf(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        'models',
        nargs='+',
        metavar='MODEL',
        help='xt, t, s or b, or a config, of which the backbone is taken, both with random '
        'weights or as MODEL=CHECKPOINT; or timm/NAME, with its pretrained weights if they '
        'can be had, or timm/NAME=random',
    )
    parser.add_argument(
        '--checkpoint', help='file or URL of weights for the one arch among the models'
    )
    parser.add_argument('--images', metavar='DIR', help='folder of images; default: noise')
    parser.add_argument(
        '--size', type=int, default=512, help='side of the images in pixels (default: 512)'
    )
    parser.add_argument(
        '--num', type=int, default=20, help='number of images, at most (default: 20)'
    )
    parser.add_argument(
        '--seed', type=int, default=0, help='of noise and random weights (default: 0)'
    )
    parser.add_argument('--json', metavar='FILE', help='write the numbers there, too')
    _add_running(parser)


def _kernels(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument(
        '--points',
        nargs='+',
        type=_point,
        metavar='X,Y',
        help="in pixels of the image; default: the image's centre",
    )
    parser.add_argument(
        '--block',
        default='3.0',
        help='stage of the Focus-Net, 3 or 4, and number of the block (default: 3.0)',
    )
    parser.add_argument(
        '--heads', type=_heads, metavar='0,1,...', help='heads to draw, or all (default)'
    )
    _add_running(parser)


def _maps(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    evidence = parser.add_mutually_exclusive_group()
    evidence.add_argument(
        '--class',
        dest='class_name',
        metavar='NAME',
        help="show the evidence for a class, or for a detector's best box of it",
    )
    evidence.add_argument(
        '--box',
        type=int,
        metavar='N',
        help="show the evidence for a detector's box; 0 is the one of the highest score",
    )
    parser.add_argument(
        '--cam',
        choices=['gradcam', 'hirescam', 'layercam'],
        help='how evidence is computed (default: gradcam of a segmentor, hirescam of a '
        'detector)',
    )
    _add_running(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument('image', help='image file')
    common.add_config_options(parser)


def _add_running(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--device', help='default: cuda where there is one, else cpu')
    parser.add_argument(
        '--trust',
        action='store_true',
        help='read the checkpoint even if that runs code in it',
    )


def _point(text: str) -> tuple[float, float]:
    try:
        x, y = map(float, text.split(','))
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text} is not X,Y, as in 120,80') from None
    return x, y


def _heads(text: str) -> list[int] | None:
    try:
        return None if text == 'all' else [int(head) for head in text.split(',')]
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text} is not all, or as in 0,1') from None


def _curves(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        'work_dirs',
        nargs='+',
        metavar='WORK_DIR',
        help='work dir of a training, the folder of one run in it, or a scalars.json',
    )
    parser.add_argument(
        '--labels', nargs='+', help='a name for each; default: what tells the paths apart'
    )
    parser.add_argument(
        '--metrics',
        nargs='+',
        help='metrics to draw, as they are named in the log; default: mIoU, box and mask '
        'AP, or the first one that there is',
    )
    parser.add_argument(
        '--json', dest='json_path', metavar='FILE', help='write the numbers there, too'
    )


def _errors(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('config', help='config file')
    parser.add_argument(
        'predictions',
        help='what `overlock test --out` wrote: a folder of label maps, or a .pkl file; a '
        'COCO results .json; or a checkpoint, which is evaluated first',
    )
    parser.add_argument(
        '--masks', action='store_true', help='compare masks of detections, not boxes'
    )
    common.add_config_options(parser)
    parser.add_argument(
        '--json', dest='json_path', metavar='FILE', help='write the numbers there, too'
    )


# Description of each figure, and what adds its arguments.
FIGURES = dict(
    erf=('effective receptive fields of backbones, side by side', _erf),
    kernels=("ContMix's kernels at points of an image", _kernels),
    maps=('context and maps of OverLoCK, and class evidence', _maps),
    curves=('loss, learning rate, metrics, memory and time of trainings', _curves),
    errors=('confusion matrix of a segmentor, kinds of errors of a detector', _errors),
)
