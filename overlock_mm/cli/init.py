"""Look at all of your images and labels, and write a config that trains on them.

What would break or spoil a training is an error. --fix fixes what can be fixed without
changing your files.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('--task', choices=['segmentation', 'detection'], required=True)
    add('--images', metavar='DIR', required=True, help='folder of the images')
    add('--masks', metavar='DIR', help='segmentation: folder of the label maps')
    add('--annotations', metavar='FILE', help='detection: COCO file')
    about = 'detection: COCO file for validation; default: a part is held out'
    add('--val', metavar='FILE', help=about)
    add('--val-images', metavar='DIR', help='folder of the images for validation')
    about = 'segmentation: folder of their label maps; default: a part is held out'
    add('--val-masks', metavar='DIR', help=about)
    add('--arch', choices=['xt', 't', 's', 'b'], default='t', help='(%(default)s)')
    about = 'names with commas between them, or a file with one a line, for segmentation '
    about += 'also with the label value (road,7) or colour (road,128,64,128)'
    add('--classes', metavar='FILE|A,B,C', help=about)
    about = 'segmentation: label values of pixels without a class (255)'
    add('--ignore', metavar='N,N', type=_numbers, default=(255,), help=about)
    about = 'how names of images end, where label maps have other names'
    add('--image-suffix', metavar='END', help=about)
    add('--mask-suffix', metavar='END', help='likewise of label maps, such as _mask.png')
    add('--boxes-only', action='store_true', help='detection: train without masks')
    add('--batch', type=int, metavar='N', help='images in an iteration (4)')
    about = 'for GPUs with little memory: activation checkpointing, 2 images in an '
    about += 'iteration, the gradients of 8 iterations added up, bfloat16 for segmentation'
    add('--small-gpu', action='store_true', help=about)
    about = 'share of the images that is held out for validation (%(default)s)'
    add('--val-share', type=float, default=0.15, help=about)
    add('--seed', type=int, default=0, help='of the division (%(default)s)')
    add('--out', metavar='NEW.py', help='config to write (my_segmentation.py)')
    add('--fix', action='store_true', help='fix what can be fixed')
    add('--force', action='store_true', help='overwrite what is there')


def run(args: argparse.Namespace) -> None:
    from ..apis.init import init

    init(**vars(args))


def _numbers(text: str) -> tuple[int, ...]:
    if not all(n.strip().isdecimal() and int(n) < 256 for n in text.split(',')):
        raise argparse.ArgumentTypeError(f'{text!r} must be numbers of 0 to 255, as 0,255')
    return tuple(int(number) for number in text.split(','))
