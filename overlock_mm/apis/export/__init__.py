"""Writing trained models as files that run without this package."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from ...errors import UserError
from ...models import OverLoCK, fold
from ...models.folded import prepare_for_export
from ..files import check_output
from ..flops import default_shape
from ..inference import Predictor
from ..messages import say
from . import graphs
from .detectors import Detector
from .formats import Format, Job, format_of, load_onnx
from .metadata import describe
from .program import Dims
from .quantization import CalibrationImages, check_int8, quantize, verify_int8
from .verification import (
    TOLERANCES,
    Case,
    compare_labels,
    compare_objects,
    compare_values,
    first_line,
    random_images,
)
from .verification import verify as check

DYNAMIC = dict(none=(), batch=(0,), hw=(2, 3), all=(0, 2, 3))
OPSETS = range(18, 24)
_OPSET = 20  # the first with Gelu
_LARGEST = 1 << 14


def export(
    config: str,
    checkpoint: str,
    out: str,
    *,
    format: str = 'onnx',
    backbone_only: bool = False,
    logits: bool = False,
    shape: Sequence[int] | None = None,
    dynamic: str = 'none',
    half: bool = False,
    int8: str | None = None,
    with_preprocess: bool = False,
    verify: bool = True,
    opset: int | None = None,
    cfg_options: dict | None = None,
    trust: bool = False,
    force: bool = False,
) -> str:
    """Write a trained segmentor or detector with OverLoCK as a file for other runtimes.

    The backbone is folded first (:func:`overlock_mm.fold`), and batch norms are merged.
    The file is run and compared with PyTorch before it gets its name.

    Args:
        config: config of the trained model.
        checkpoint: path or URL of its checkpoint.
        out: the file to write.
        format: 'onnx', 'openvino' (an ``.xml`` with a ``.bin`` beside it), 'pt2'
            (:func:`torch.export.save`) or 'torchscript'.
        backbone_only: export the backbone alone; its outputs are the maps.
        logits: of a segmentor: return the logits in place of label maps.
        shape: height and width of the images; by default those of the config.
        dynamic: what may change from run to run: 'none', 'batch', 'hw' (height and width)
            or 'all'.
        half: store and compute in float16; images and results stay float32.
        int8: folder of images, with which an ONNX or OpenVINO file gets 8-bit
            convolutions: see :mod:`overlock_mm.apis.export.quantization`.
        with_preprocess: take images in RGB with values of 0..255, and normalise them in
            the file. By default images have been normalised.
        verify: compare the file with PyTorch.
        opset: version of the ONNX operators, in ``OPSETS``. Defaults to 20.
        cfg_options: values for keys of the config.
        trust: read a checkpoint that holds more than plain data, which can run code.
        force: overwrite an existing file.

    Returns:
        What was written, as text.

    Raises:
        UserError: if an option cannot be used, the model cannot be exported, or the file
            gives other results than PyTorch. Nothing is written then.
        CheckpointError: if the checkpoint cannot be read, or does not fit the model.
    """
    chosen = format_of(format)
    _check_options(format, dynamic, shape, opset)
    if int8 is not None:
        check_int8(format, half)
    out = check_output(out, [chosen.suffix], force)
    predictor = Predictor(
        config, checkpoint, 'cpu', False, cfg_options=cfg_options, trust=trust
    )
    model, backbone = predictor.model, getattr(predictor.model, 'backbone', None)
    if not isinstance(backbone, OverLoCK):
        raise UserError(
            f'the backbone of {config} is a {type(backbone).__name__}, and only models '
            'with OverLoCK are exported; `overlock swap` puts it into a config'
        )
    if predictor.toolbox == 'mmdet' and not backbone_only:
        _check_detector(logits, dynamic, half, int8)
    graph, reference, compare = _graphs(predictor, backbone_only, logits)
    if with_preprocess:
        graphs.check_channels(backbone)
        graph = graphs.Normalized(graph, model.data_preprocessor)
        reference = graphs.Normalized(reference, model.data_preprocessor)
    shape = tuple(shape or default_shape(predictor.cfg, model, predictor.toolbox))
    smallest = graphs.smallest_side(backbone)
    dims = _dims(dynamic, smallest)
    images = ()
    if int8 is not None:
        images = CalibrationImages(predictor, int8, shape, dims, smallest, with_preprocess)
    values = (0.0, 255.0) if with_preprocess else (-2.0, 2.0)
    cases = list(_cases(reference, shape, dims, smallest, values)) if verify else []
    _simplify(model, config, format)
    metadata = describe(predictor, graph, with_preprocess, dims, shape, smallest)
    if half:
        graph = graphs.Half(graph)
    # of two tiles of columns at least, see contmix_export
    size = (224, 896) if 2 in dims else shape
    image = random_images(size, 2 if 0 in dims else 1)
    error, lines = None, []

    def rewrite(path: Path) -> int:
        nonlocal error
        if verify:
            error = check(cases, load_onnx(path), compare, TOLERANCES['float32'])
        return quantize(path, images)

    job = Job(graph.eval(), image, dims, opset or _OPSET, half, metadata)
    if images:
        job = job._replace(rewrite=rewrite)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f'.{out.name}.') as folder:
        written = Path(folder, out.name)
        nodes = _written(chosen, job, written, config)
        if images:
            lines = [images.summary()]
            if verify:
                lines.append(verify_int8(graph, images, chosen.load(written)))
        elif verify:
            tolerance = TOLERANCES['float16' if half else 'float32']
            error = check(cases, chosen.load(written), compare, tolerance)
        for file in Path(folder).iterdir():
            file.replace(out.with_name(file.name))
    summary = _summary(out, graph, dims, shape, smallest, nodes, cases, error)
    return '\n'.join([summary, *lines])


def _check_options(format, dynamic, shape, opset) -> None:
    if dynamic not in DYNAMIC:
        raise UserError(f'--dynamic {dynamic} is not one of {", ".join(DYNAMIC)}')
    if format == 'torchscript' and dynamic != 'none':
        raise UserError(
            f'--format torchscript with --dynamic {dynamic}: a trace runs at the size of '
            'its example alone; use --dynamic none, or --format onnx or pt2'
        )
    if opset is not None and format not in ('onnx', 'openvino'):
        raise UserError(f'--opset is for ONNX operators, which --format {format} has not')
    if opset is not None and opset not in OPSETS:
        raise UserError(
            f'--opset {opset} must be within {OPSETS[0]}..{OPSETS[-1]}: torch writes no '
            'others'
        )
    if shape is not None and (len(shape) != 2 or min(shape) < 32):
        raise UserError(
            f'--shape {" ".join(map(str, shape))} must be height and width, at least 32'
        )
    if shape is not None and 2 in DYNAMIC[dynamic]:
        raise UserError(
            f'--shape and --dynamic {dynamic}: a file for images of any size has no shape; '
            'leave one of them out'
        )


def _graphs(predictor: Predictor, backbone_only: bool, logits: bool):
    """What is exported, what gives the expected values, and how they are compared."""
    if backbone_only:
        graph = graphs.Backbone(predictor.model.backbone)
        return graph, graph, compare_values
    if predictor.toolbox == 'mmseg':
        if (predictor.cfg.model.get('test_cfg') or {}).get('mode', 'whole') != 'whole':
            say('the config predicts in tiles, and the file predicts whole images')
        graph = graphs.Segmentor(predictor.model, logits)
        reference = graphs.Segmentor(predictor.model, logits=True)
        return graph, reference, compare_values if logits else compare_labels(graph)
    divisor = getattr(predictor.model.data_preprocessor, 'pad_size_divisor', 1)
    graph = Detector(predictor.model, divisor)
    return graph, graph, compare_objects


def _check_detector(logits: bool, dynamic: str, half: bool, int8: str | None) -> None:
    """Raise UserError for what is not for detectors."""
    if logits:
        raise UserError('--logits is for segmentors, and the config is of a detector')
    if 0 in DYNAMIC[dynamic]:
        raise UserError(
            f'--dynamic {dynamic}: the file of a detector takes one image at a time; use '
            '--dynamic hw, or none'
        )
    if half:
        raise UserError(
            '--half is for segmentors and backbones: float16 is too coarse for the '
            'coordinates of boxes'
        )
    if int8 is not None:
        raise UserError(
            '--int8 is for segmentors and backbones: what 8 bits do to the objects of a '
            'detector was not measured; add --backbone-only'
        )


def _dims(dynamic: str, smallest: int) -> Dims:
    names = {0: ('batch', 1, 64), 2: ('height', smallest, _LARGEST)}
    names[3] = ('width', smallest, _LARGEST)
    return {dim: names[dim] for dim in DYNAMIC[dynamic]}


def _cases(
    reference: nn.Module, shape, dims: Dims, smallest: int, values
) -> Iterator[Case]:
    """Images of sizes that the file must take, and what PyTorch makes of them."""
    sizes = [shape]
    if 2 in dims:  # small, portrait, landscape, odd, more than one tile of columns
        a = smallest
        sizes = [(a, a), (a + 96, a + 31), (a + 1, 2 * a), (2 * a + 3, a + 62), (a, 4 * a)]
    for i, size in enumerate(sizes):
        image = random_images(size, 1 + i % 2 if 0 in dims else 1, *values)
        with torch.no_grad():
            expected = reference(image)
        expected = (expected,) if isinstance(expected, torch.Tensor) else tuple(expected)
        yield Case(image, expected)


def _simplify(model: nn.Module, config: str, format: str) -> None:
    """Merge what is linear at inference, in place."""
    from mmcv.cnn import fuse_conv_bn

    try:
        fold(model)
    except (TypeError, RuntimeError) as error:
        raise UserError(f'{config}: {error}') from error
    fuse_conv_bn(model)
    prepare_for_export(model, plain_norms=format == 'openvino')


def _written(chosen: Format, job: Job, path: Path, config: str) -> int | None:
    try:
        return chosen.write(job, path)
    except UserError:  # of a check
        raise
    except Exception as error:  # an exporter may raise anything
        raise UserError(
            f'{config} cannot be exported as {path.suffix} ({first_line(error)}); nothing '
            'was written. --backbone-only exports the backbone alone, --debug shows where '
            'the error comes from'
        ) from error


def _summary(out, graph, dims, shape, smallest, nodes, cases, error) -> str:
    files = [out, *([out.with_suffix('.bin')] if out.suffix == '.xml' else [])]
    size = sum(file.stat().st_size for file in files) / 2**20
    batch = 'N' if 0 in dims else '1'
    sides = ('H', 'W') if 2 in dims else shape
    lines = [
        f'Wrote {" and ".join(map(str, files))}: {size:.1f} MiB'
        + (f', {nodes} nodes' if nodes else ''),
        f'input   image ({batch}, 3, {sides[0]}, {sides[1]}), float32'
        + (f', sides of {smallest} and more' if 2 in dims else ''),
        f'outputs {", ".join(graph.outputs)}',
    ]
    if cases:
        sizes = ', '.join('x'.join(map(str, c.image.shape[2:])) for c in cases)
        lines.append(f'checked against PyTorch at {sizes}: largest difference {error:.1e}')
    else:
        lines.append('not checked against PyTorch')
    return '\n'.join(lines)
