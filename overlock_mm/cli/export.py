"""Write a trained segmentor or detector as a file for ONNX Runtime, OpenVINO or PyTorch.

The file is run and compared with PyTorch before it gets its name.
"""

import argparse

from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('config', help='config of the model, with OverLoCK')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument('out', help='file to write: .onnx, .xml (openvino), .pt2 or .pt')
    parser.add_argument(
        '--format',
        default='onnx',
        metavar='NAME',
        help='onnx (default), openvino, pt2 (torch.export) or torchscript',
    )
    parser.add_argument(
        '--backbone-only', action='store_true', help='export the backbone alone'
    )
    parser.add_argument(
        '--logits', action='store_true', help='of a segmentor: logits, not label maps'
    )
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        metavar=('H', 'W'),
        help='height and width of the images; default: those of the config',
    )
    parser.add_argument(
        '--dynamic',
        default='none',
        metavar='WHAT',
        help='what may change from run to run: none (default), batch, hw (height and '
        'width) or all',
    )
    parser.add_argument(
        '--half', action='store_true', help='compute in float16; input and output float32'
    )
    parser.add_argument(
        '--int8',
        metavar='FOLDER',
        help='compute convolutions in 8 bits (onnx, openvino); ranges of values come from '
        'the images in this folder',
    )
    parser.add_argument(
        '--with-preprocess',
        action='store_true',
        help='take images in RGB with values of 0..255 and normalise them in the file',
    )
    parser.add_argument(
        '--verify',
        action=argparse.BooleanOptionalAction,
        default=True,
        help='compare the file with PyTorch (default)',
    )
    parser.add_argument(
        '--opset', type=int, metavar='N', help='version of the ONNX operators (default: 20)'
    )
    parser.add_argument(
        '--trust', action='store_true', help='read the checkpoint even if it can run code'
    )
    parser.add_argument('--force', action='store_true', help='overwrite the file')
    common.add_config_options(parser)


def run(args: argparse.Namespace) -> None:
    from ..apis.export import export

    print(export(**vars(args)))
