"""Exported files with 8-bit convolutions, made from files in float32 and from images."""

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...datasets.survey.images import SUFFIXES, files_below
from ...errors import UserError
from ..inference import Predictor, UnreadableError
from ..messages import say
from .graphs import channel_order, mean_and_std
from .program import Dims
from .verification import first_line

# Images that are read at most, and those of them that the file is checked with.
LARGEST_COUNT = 64
CHECKED = 16
# What may change: the share of pixels with another label, and of values in float32 the
# norm of the difference as a part of their norm.
LABELS_CHANGED = 0.05
VALUES_CHANGED = 0.2
_FORMATS = ('onnx', 'openvino')
_MARK = 'onnx.quant.pre_process'  # without it onnxruntime gives advice that is not for us


def check_int8(format: str, half: bool) -> None:
    """Raise UserError if a file of this kind cannot have 8-bit convolutions."""
    if format not in _FORMATS:
        raise UserError(
            f'--int8 is for --format {" and ".join(_FORMATS)}, not for {format}; leave one '
            'of them out'
        )
    if half:
        raise UserError('--int8 and --half exclude each other; leave one of them out')
    if find_spec('onnxruntime') is None:
        raise UserError(
            '--int8 needs onnxruntime, which is not installed; run: pip install '
            "'overlock_mm[export]'"
        )


class CalibrationImages(Sequence):
    """Images as an exported file takes them, each ``(1, C, H, W)`` in float32.

    They are read by the test pipeline. If the file is for one shape they are resized to it;
    if it is for many, those with a side that is too small are enlarged. Of more than
    ``LARGEST_COUNT`` images in the folder that many are used, evenly chosen from the sorted
    paths. Those that cannot be read are left out, with a line that names them.

    Args:
        predictor: reads the images.
        folder: the folder, with folders below it.
        shape: height and width of the images of the file.
        dims: dims of the images that may change.
        smallest: the smallest side, where sides may change.
        with_preprocess: whether the file takes RGB with values of 0..255.

    Attributes:
        found (int): how many images the folder has.

    Raises:
        UserError: if there is no image that can be read.
    """

    def __init__(
        self,
        predictor: Predictor,
        folder: str | Path,
        shape: Sequence[int],
        dims: Dims,
        smallest: int,
        with_preprocess: bool,
    ):
        preprocessor = predictor.model.data_preprocessor
        self.shape = None if 2 in dims else tuple(shape)
        self.smallest = smallest
        mean, std = mean_and_std(preprocessor)
        order = channel_order(preprocessor)
        if with_preprocess:
            mean, std, order = [0.0], [1.0], 'rgb'
        self.mean, self.std = (torch.tensor(v).view(-1, 1, 1) for v in (mean, std))
        self.flip = order == 'rgb'
        paths = _image_files(Path(folder).expanduser())
        self.found = len(paths)
        read = [_read(predictor, path) for path in evenly(paths, LARGEST_COUNT)]
        self.images = [image for image in read if image is not None]
        if not self.images:
            raise UserError(
                f'--int8 {folder}: none of its images can be read; give a folder with some '
                'of the images that the model is for'
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        image = self.images[index].float()
        if self.flip and len(image) == 3:  # the toolboxes read BGR
            image = image.flip(0)
        return ((self._resized(image[None]) - self.mean) / self.std).contiguous()

    def summary(self) -> str:
        """How many images are used, as a line."""
        return f'int8, calibrated with {len(self)} of {self.found} images'

    def _resized(self, image: Tensor) -> Tensor:
        size = self.shape
        if size is None:
            sides = image.shape[2:]
            factor = max(1, self.smallest / min(sides))
            size = tuple(max(self.smallest, round(side * factor)) for side in sides)
        if size == tuple(image.shape[2:]):
            return image
        return F.interpolate(image, size, mode='bilinear', antialias=True)


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(
            f'--int8 {folder} is not a folder; give one with some of the images that the '
            'model is for'
        )
    paths = sorted(p for p in files_below(folder) if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise UserError(
            f'--int8 {folder} has no images ({", ".join(SUFFIXES)}); give a folder with '
            'some of those that the model is for'
        )
    return paths


def _read(predictor: Predictor, path: Path) -> Tensor | None:
    try:
        return predictor._packed(predictor.load(path))['inputs']
    except UnreadableError as error:
        say(f'left out: {error}')
        return None


def evenly(items: Sequence, count: int) -> list:
    """At most ``count`` items, at equal distances, the first and the last among them."""
    places = np.linspace(0, len(items) - 1, min(count, len(items)))
    return [items[round(place)] for place in places]


def quantize(path: Path, images: Sequence[Tensor]) -> int:
    """Give an ONNX file 8-bit convolutions; the number of its nodes.

    Dense convolutions have weights of int8, with a scale for each output channel, and take
    and give uint8, with a scale for each map, which comes from its smallest and its largest
    value. Weights use 7 of the 8 bits: two products of 255 * 64 fit into the 16 bits in
    which CPUs without VNNI add them up, and larger ones would be cut off there.

    Everything else stays in float32: softmax and matrix products of ContMix, GRN and other
    norms, GELU, additions and depth-wise convolutions. Products, additions and depth-wise
    convolutions were tried in 8 bits: no time was gained, and the latter two lost accuracy.

    Args:
        path: a file in float32; it is replaced.
        images: what it is run with, each an input of the file.
    """
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.images = iter(images)

        def get_next(self):
            image = next(self.images, None)
            return None if image is None else {'image': image.numpy()}

    model = onnx.load(path)
    model.metadata_props.add(key=_MARK, value='onnxruntime.quant')
    quantize_static(
        model,
        path,
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=['Conv'],
        nodes_to_quantize=_dense_convolutions(model),
        per_channel=True,
        reduce_range=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    quantized = onnx.load(path)
    del quantized.graph.value_info[:]
    del quantized.metadata_props[:]
    quantized.metadata_props.extend(p for p in model.metadata_props if p.key != _MARK)
    quantized.metadata_props.add(key='int8_images', value=json.dumps(len(images)))
    onnx.save(quantized, path)
    return len(quantized.graph.node)


def _dense_convolutions(model) -> list[str]:
    weights = {initializer.name for initializer in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.op_type == 'Conv'
        and node.input[1] in weights
        and not any(a.name == 'group' and a.i > 1 for a in node.attribute)
    ]


def changed(expected: Sequence[Tensor], results: Sequence[np.ndarray]) -> float:
    """How much the results of a file are others; see :func:`verify_int8`."""
    if len(results) != len(expected):
        return float('inf')
    return max(map(_changed, expected, map(torch.from_numpy, results)))


def _changed(expected: Tensor, result: Tensor) -> float:
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return float('inf')
    if not expected.is_floating_point():
        return (result != expected).float().mean().item()
    found = ((result - expected).norm() / expected.norm()).item()
    return found if np.isfinite(found) else float('inf')


def verify_int8(
    graph: nn.Module,
    images: Sequence[Tensor],
    run: Callable[[np.ndarray], list[np.ndarray]],
) -> str:
    """Compare a file with PyTorch on ``CHECKED`` of the images; what was found, as text.

    Eight bits cannot give what float32 gives. Of label maps, at most ``LABELS_CHANGED`` of
    the pixels may have another label; of logits and of a backbone's maps, the norm of the
    difference may be ``VALUES_CHANGED`` of the norm of the values. Both are means over the
    images, and of several outputs the largest counts. A file that passes may still be less
    accurate than its model: only a test with labels says by how much.

    Args:
        graph: what the file should compute.
        images: inputs.
        run: runs the file.

    Raises:
        UserError: if it gives other results, or does not run.
    """
    found = []
    for image in evenly(range(len(images)), CHECKED):
        image = images[image]
        with torch.no_grad():
            expected = graph(image)
        expected = (expected,) if isinstance(expected, Tensor) else tuple(expected)
        try:
            results = run(image.numpy())
        except Exception as error:  # of any runtime
            raise UserError(
                f'the int8 file does not run ({first_line(error)}); nothing was written. '
                '--no-verify writes it'
            ) from error
        found.append(changed(expected, results))
    labels = graph.outputs == ('labels',)
    found, limit = float(np.mean(found)), LABELS_CHANGED if labels else VALUES_CHANGED
    what = 'of the pixels have another label' if labels else 'of the norm is an error'
    text = f'{found:.2%} {what}, on {min(len(images), CHECKED)} of the images'
    if found > limit:
        raise UserError(
            f'the int8 file differs from PyTorch: {text}, and {limit:.0%} is allowed; '
            'nothing was written. Give images that the model is for, and a trained '
            'checkpoint; --no-verify writes it'
        )
    return f'compared with PyTorch: {text}'
