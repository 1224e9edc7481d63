"""What can be compared, and how texts of a command line become options."""

import difflib
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import timm
import torch

Layout = Literal['channels_last', 'contiguous', 'best']


def _device() -> str:
    return 'cuda' if torch.cuda.is_available() else 'cpu'


@dataclass(kw_only=True)
class BenchmarkOptions:
    """Base class of the comparisons.

    Args:
        backend: our side's implementation of ContMix, see ``set_contmix_backend``.
        device: 'cpu' or 'cuda'; by default cuda where there is one.
        threads: CPU threads; by default as many as torch takes.
        rounds: measured turns of each side.
        warmup: turns before them that do not count.
        compile: use ``torch.compile`` for the op of our side, or the models of both.
        dtype: name of the dtype of the tensors, or of autocast.
    """

    command: ClassVar[str]
    backend: str = 'auto'
    device: str = field(default_factory=_device)
    threads: int = field(default_factory=torch.get_num_threads)
    rounds: int = 11
    warmup: int = 2
    compile: bool = False
    dtype: str = 'float32'


@dataclass(kw_only=True)
class OpOptions(BenchmarkOptions):
    """The ContMix op with one backend against another, on random values.

    Args:
        shape: (N, C, H, W) of the values.
        heads: heads of each of the two kernels.
        kernel: the large kernel; the small one is 5.
        backward: measure forward and backward, not forward alone.
        against: backend of the other side.
    """

    command: ClassVar[str] = 'op'
    shape: tuple[int, int, int, int] = (1, 256, 50, 84)
    heads: int = 8
    kernel: int = 13
    backward: bool = False
    against: str = 'reference'


@dataclass(kw_only=True)
class ModelOptions(BenchmarkOptions):
    """The backbone against another, or against itself at another size.

    Args:
        arch: arch of OverLoCK.
        size: height and width of the images.
        batch: images in a step.
        layout: memory format of our side; 'best' tries both and takes the faster.
        against_layout: that of the other side; by default contiguous for the reference,
            as ours for 'self:SIZE', and the best for a model of timm.
        against: 'reference' for the same arch in training form with the reference op,
            'self:SIZE' for our side at another size (results are then per pixel), or the
            name of a timm model, built with ``features_only=True``.
        form: 'train', 'deploy' or 'fold'.
    """

    arch: str = 't'
    size: tuple[int, int] = (512, 512)
    batch: int = 1
    layout: Layout = 'best'
    against_layout: Layout | None = None
    against: str = 'reference'
    form: str = 'fold'
    amp: ClassVar[bool] = False
    drop_path: ClassVar[float] = 0.0
    with_cp: ClassVar[tuple[int, ...]] = ()


@dataclass(kw_only=True)
class BackboneOptions(ModelOptions):
    """The forward pass in evaluation mode, without gradients."""

    command: ClassVar[str] = 'backbone'


@dataclass(kw_only=True)
class TrainStepOptions(ModelOptions):
    """A training step: forward, backward of the mean squares of the maps, and AdamW.

    Args:
        amp: autocast to ``dtype``, without gradient scaling.
        drop_path: stochastic depth rate of both sides.
        with_cp: stages (0 to 4) whose activations our side recomputes.
    """

    command: ClassVar[str] = 'train-step'
    batch: int = 2
    form: str = 'train'
    amp: bool = False
    drop_path: float = 0.0
    with_cp: tuple[int, ...] = ()


@dataclass(kw_only=True)
class RuntimeOptions(ModelOptions):
    """The exported or compiled backbone against PyTorch without it, on the CPU.

    Args:
        runtime: 'onnxruntime', 'openvino', 'compile' (``torch.compile``) or 'aotinductor'.
        dynamic: export or compile for images of any size.
        config: config of a segmentor, which is measured in place of the backbone.
        against: 'torch' for the folded backbone in PyTorch, or the name of a timm model,
            which runs in the same runtime.
    """

    command: ClassVar[str] = 'runtime'
    runtime: str = 'onnxruntime'
    dynamic: bool = False
    config: str | None = None
    against: str = 'torch'


@dataclass(kw_only=True)
class FileOptions(BenchmarkOptions):
    """An exported file against another, on the CPU.

    Args:
        file: the file, ``.onnx`` or ``.xml``.
        against: the other.
        size: height and width of the images.
        batch: images in a step.
    """

    command: ClassVar[str] = 'file'
    file: str = 'model.onnx'
    against: str = 'other.onnx'
    size: tuple[int, int] = (512, 512)
    batch: int = 1


def parse_numbers(text: str, counts: tuple[int, ...], example: str) -> tuple[int, ...]:
    """Positive numbers from a text such as '480x640'.

    Args:
        text: the numbers, with an x between them.
        counts: how many there may be.
        example: what the text should look like, for the error.

    Raises:
        ValueError: if the text is anything else.
    """
    numbers = text.split('x')
    if len(numbers) not in counts or not all(n.isdecimal() and int(n) for n in numbers):
        raise ValueError(f'{text!r} must be like {example}')
    return tuple(map(int, numbers))


def parse_size(text: str) -> tuple[int, int]:
    """Height and width from '480x640', or '512' for both."""
    size = parse_numbers(text, (1, 2), '512 or 480x640')
    return size[0], size[-1]


def check_model(text: str) -> str:
    """Return ``against`` of :class:`ModelOptions` if it is one; else raise ValueError."""
    if text.startswith('self:'):
        parse_size(text[5:])
    elif text not in ('reference', 'torch') and not timm.is_model(text):
        near = difflib.get_close_matches(text, timm.list_models()) or ['timm.list_models()']
        raise ValueError(
            f"{text!r} is neither 'reference' nor 'self:SIZE' nor a model of timm "
            f'{timm.__version__}; near: {", ".join(near)}'
        )
    return text
