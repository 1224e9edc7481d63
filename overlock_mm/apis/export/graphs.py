"""What is exported of a model: modules from an image tensor to plain tensors."""

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...models import OverLoCK


class Normalized(nn.Module):
    """A graph with the preprocessing of the images in front.

    Args:
        graph: takes images as the model sees them.
        preprocessor: the model's data preprocessor.

    The image is RGB, ``(N, 3, H, W)``, with values of 0..255.
    """

    def __init__(self, graph: nn.Module, preprocessor: nn.Module):
        super().__init__()
        self.inner, self.outputs = graph, graph.outputs
        self.flip = channel_order(preprocessor) == 'bgr'
        mean, std = (
            torch.tensor(values).view(-1, 1, 1) for values in mean_and_std(preprocessor)
        )
        self.register_buffer('scale', 1 / std)
        self.register_buffer('shift', -mean / std)

    def forward(self, image: Tensor):
        image = image.flip(1) if self.flip else image
        return self.inner(image * self.scale + self.shift)


class Backbone(nn.Module):
    """The maps of a backbone; the one of stride s is the output ``stride_s``."""

    def __init__(self, backbone: OverLoCK):
        super().__init__()
        self.backbone = backbone
        self.outputs = tuple(f'stride_{s}' for s in backbone.out_strides)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return self.backbone(image)


class Segmentor(nn.Module):
    """A segmentor of MMSegmentation, at the size of the image.

    Args:
        model: the segmentor, which predicts whole images.
        logits: return the logits, ``(N, classes, H, W)``, not the label maps,
            ``(N, H, W)`` in uint8, or int32 if there are more than 256 classes.
    """

    def __init__(self, model: nn.Module, logits: bool = False):
        super().__init__()
        self.model = model
        self.outputs = ('logits' if logits else 'labels',)
        head = model.decode_head
        head = head[-1] if isinstance(head, nn.ModuleList) else head
        self.threshold = getattr(head, 'threshold', None)  # of a single class

    def forward(self, image: Tensor) -> Tensor:
        size = tuple(image.shape[2:])
        meta = dict(img_shape=size, ori_shape=size, pad_shape=size, scale_factor=(1, 1))
        logits = self.model.encode_decode(image, [meta])
        return logits if self.outputs == ('logits',) else self.labels(logits)

    def labels(self, logits: Tensor) -> Tensor:
        """The label maps that MMSegmentation makes of logits."""
        classes = logits.shape[1]
        if classes == 1:
            return (logits.sigmoid() > self.threshold).squeeze(1).to(torch.uint8)
        return logits.argmax(1).to(torch.uint8 if classes <= 256 else torch.int32)


class Half(nn.Module):
    """A graph that computes in float16, of images and results in float32."""

    def __init__(self, graph: nn.Module):
        super().__init__()
        self.inner, self.outputs = graph.half(), graph.outputs

    def forward(self, image: Tensor):
        results = self.inner(image.half())
        if isinstance(results, Tensor):
            return _in_float32(results)
        return tuple(map(_in_float32, results))


def _in_float32(result: Tensor) -> Tensor:
    return result.float() if result.dtype == torch.float16 else result


def smallest_side(backbone: OverLoCK) -> int:
    """The smallest side of images that a file for many sizes can be run on.

    On smaller ones ContMix enlarges its maps, which is another program.
    """
    sides = [1]
    for stride, stage in ((16, 'sub_blocks3'), (32, 'sub_blocks4')):
        for block in getattr(backbone, stage, ()):
            mixer = getattr(block, 'contmix', block)  # in the folded form, or itself
            sides.append((max(mixer.kernel_sizes) - 1) * stride + 1)
    return max(32, *sides)


def mean_and_std(preprocessor: nn.Module) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, in the order of the model's."""
    if not getattr(preprocessor, '_enable_normalize', False):
        return [0.0] * 3, [1.0] * 3
    return preprocessor.mean.flatten().tolist(), preprocessor.std.flatten().tolist()


def channel_order(preprocessor: nn.Module) -> str:
    """Order of the channels that the model sees: 'rgb' or 'bgr'."""
    # the toolboxes read files in BGR
    return 'rgb' if getattr(preprocessor, '_channel_conversion', False) else 'bgr'


def check_channels(backbone: OverLoCK) -> None:
    """Raise UserError if images do not have three channels."""
    if backbone.in_channels != 3:
        raise UserError(
            f'the model takes images of {backbone.in_channels} channels, and only those of '
            '3 can be exported with --with-preprocess; leave it out'
        )
