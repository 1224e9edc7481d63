"""The command ``overlock``: one module here for each of its commands.

A module has the command's description as its docstring, ``add_arguments(parser)`` and
``run(args)``, which returns the exit status or None for 0. It imports what it runs only
then: ``overlock doctor`` and ``--help`` work where nothing else does.
"""

import argparse
import importlib
import sys

import overlock_mm

from ..errors import UserError
from .common import add_debug_option, plain_errors

COMMANDS = dict(
    train='train a detector or segmentor from a config',
    test='evaluate a checkpoint of a detector or segmentor',
    infer='predict images, folders and videos; draw what was found',
    serve='predict images in the browser',
    init='write a config for your own images and labels',
    swap='put OverLoCK, or a model of timm, into a config that you have',
    convert='convert a released checkpoint, or back',
    deploy='merge the dilated branches of a trained model',
    export='write a trained model as a file for ONNX Runtime, OpenVINO or PyTorch',
    validate='top-1 and top-5 accuracy of a classifier on a folder of images',
    reproduce='the published results again: published, obtained, difference',
    visualize='draw figures: receptive fields, kernels, maps, trainings, errors',
    flops='parameters and multiply-adds of a model, part by part',
    demo_data='make the demo data set',
    doctor='say what is installed, what is wrong with it, and how to fix it',
)
# What brings a package, where its name is not enough.
_INSTALLED_BY = dict(
    dict.fromkeys(('mmengine', 'mmdet', 'mmseg'), "'overlock_mm[onedl]'"),
    **dict.fromkeys(('nicegui', 'fastapi', 'uvicorn'), "'overlock_mm[serve]'"),
    **dict.fromkeys(('imgviz', 'skimage', 'pycocotools'), "'overlock_mm[demo]'"),
    **dict.fromkeys(
        ('onnx', 'onnxscript', 'onnxruntime', 'openvino'), "'overlock_mm[export]'"
    ),
    cv2='opencv-python',
)


def main(command: str | None = None) -> None:
    """Run ``overlock``, or one of its commands as a script of its own.

    The process ends with the exit status, unless that is 0.

    Args:
        command: a key of ``COMMANDS``. By default it is the first argument on the command
            line.
    """
    with plain_errors():
        if status := _run(command, sys.argv[1:]):
            sys.exit(status)


def _run(command: str | None, arguments: list[str]) -> int | None:
    prog = None
    if command is None:
        parser = _parser()
        given = parser.parse_args(arguments)
        command, arguments = given.command.replace('-', '_'), given.arguments
        prog = f'overlock {given.command}'
    if command != 'doctor' and overlock_mm.import_error:
        error = overlock_mm.import_error
        raise UserError(
            f'overlock_mm cannot be imported ({type(error).__name__}: {error}); '
            '`overlock doctor` says what to do'
        ) from error
    module = importlib.import_module(f'{__name__}.{command}')
    parser = argparse.ArgumentParser(prog=prog, description=module.__doc__)
    try:
        module.add_arguments(parser)
        add_debug_option(parser)
        return module.run(parser.parse_args(arguments))
    except ModuleNotFoundError as error:
        name = (error.name or '').partition('.')[0]
        if not name or name == 'overlock_mm':
            raise
        how = f'run: pip install {_INSTALLED_BY.get(name, name)}'
        if name == 'mmcv':  # it must fit torch
            how = '`overlock doctor` says how to install it'
        raise UserError(f'{name} is not installed; {how}') from error


def _parser() -> argparse.ArgumentParser:
    names = {name.replace('_', '-'): about for name, about in COMMANDS.items()}
    width = max(map(len, names)) + 2
    parser = argparse.ArgumentParser(
        prog='overlock',
        description='The OverLoCK backbone for MMDetection and MMSegmentation.',
        epilog='commands:\n'
        + '\n'.join(f'  {name:{width}}{about}' for name, about in names.items())
        + '\n\noverlock COMMAND --help describes each.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f'overlock_mm {overlock_mm.__version__}'
    parser.add_argument('--version', action='version', version=version)
    parser.add_argument('command', choices=names, metavar='COMMAND')
    parser.add_argument('arguments', nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser
