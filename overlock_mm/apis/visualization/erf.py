"""Effective receptive fields of backbones (https://arxiv.org/abs/1701.04128)."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle
from torch import Tensor, nn
from tqdm import tqdm

from ...archs import ARCHS
from ...errors import UserError
from ..devices import usable_device
from ..files import check_output
from . import figures
from .networks import Network, build_network, image_files, read_square

SHARES = (20, 50, 90)  # percent
_COLOURS = ('#7fd6ff', '#59c36a', '#ffffff')
_FAINTEST = 1e-4  # of what is drawn, relative to the maximum


class Field(NamedTuple):
    """Effective receptive field of the central position of a map.

    Attributes:
        stride: stride of the map.
        amounts: mean absolute gradient of every pixel, ``(H, W)``, in float64.
        centre: row and column in pixels, in halves.
        sides: by share in percent, the side in pixels of the square around the centre
            that holds this share of the amounts.
    """

    stride: int
    amounts: np.ndarray
    centre: tuple[float, float]
    sides: dict[int, int]


def erf(
    models: Sequence[str],
    out: str,
    *,
    checkpoint: str | None = None,
    images: str | None = None,
    size: int = 512,
    num: int = 20,
    seed: int = 0,
    device: str | None = None,
    trust: bool = False,
    json: str | None = None,
) -> str:
    """Draw the effective receptive fields of backbones side by side.

    The field of a map is the gradient of its central position with respect to the image:
    of the sum of its channels' positive parts (as in https://arxiv.org/abs/2203.06717), the
    absolute value, summed over the channels of the image, mean over the images (section 2
    of https://arxiv.org/abs/1701.04128).

    Args:
        models: backbones, see :func:`~.networks.build_network`.
        out: picture to write.
        checkpoint: weights of the arch, if there is one among the models, as
            ``ARCH=CHECKPOINT``.
        images: folder of images; by default noise from a normal distribution.
        size: side of the images, to whose middle they are resized and cropped.
        num: number of images, at most.
        seed: of noise and of random weights.
        device: by default cuda where there is one, else cpu.
        trust: read checkpoints even if that runs code in them.
        json: file for the numbers.

    Returns:
        A table of the sides of the squares that hold a share of the field.

    Raises:
        UserError: if a model or the images cannot be used.
        CheckpointError: if a checkpoint cannot be read, or does not fit.
    """
    path = figures.check_picture(out)
    if json:
        check_output(json, ('.json',), force=True)
    if size < 32 or num < 1:
        raise UserError(f'--size {size} must be at least 32 and --num {num} at least 1')
    models = _with_checkpoint(models, checkpoint)
    device = usable_device(device)
    files = image_files(images, num) if images else None
    pictures = [read_square(file, size) for file in files or ()]
    fields = []
    for model in models:
        network = build_network(model, size=size, seed=seed, trust=trust, device=device)
        inputs = _inputs(network, model, pictures, size, num, seed)
        count = len(pictures) or num
        inputs = tqdm(inputs, network.name, count, unit='image', disable=None, leave=False)
        fields.append((network, _fields(network, inputs, device)))
    what = f'{len(pictures)} images' if pictures else f'{num} images of noise (seed {seed})'
    what += f' of {size} x {size} pixels'
    figures.save(_draw(fields, what, size), path)
    figures.write_json(_content(fields, pictures, size, num, seed), json)
    return '\n'.join([_table(fields), f'wrote {path}'] + [f'wrote {json}'] * bool(json))


def _with_checkpoint(models: Sequence[str], checkpoint: str | None) -> list[str]:
    """Give the one arch among the models its checkpoint."""
    if not checkpoint:
        return list(models)
    if sum(model in ARCHS for model in models) != 1:
        raise UserError(
            '--checkpoint is for exactly one arch (xt, t, s or b) among the models; write '
            'MODEL=CHECKPOINT to say which of several has it'
        )
    return [f'{m}={checkpoint}' if m in ARCHS else m for m in models]


def _inputs(
    network: Network, model: str, pictures: list, size: int, num: int, seed: int
) -> Iterable[Tensor]:
    if not pictures:
        generator = torch.Generator().manual_seed(seed)
        shape = 1, network.in_channels, size, size
        return (torch.randn(shape, generator=generator) for _ in range(num))
    if network.in_channels != 3:
        raise UserError(
            f'{model} takes images of {network.in_channels} channels, those of --images '
            'have 3; leave --images out, for noise'
        )
    return map(network.normalisation.apply, pictures)


def _fields(network: Network, inputs: Iterable[Tensor], device) -> list[Field]:
    try:
        return fields_of(network.backbone, (image.to(device) for image in inputs))
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f'{network.name} cannot run on these images: {reason}; another --size may help'
        ) from error


def fields_of(backbone: nn.Module, images: Iterable[Tensor]) -> list[Field]:
    """The effective receptive field of each map of a backbone.

    Of several maps of one stride it is that of the last. See :func:`erf`.

    Args:
        backbone: takes images and returns one map or several, ``(N, C, h, w)``. It should
            be in evaluation mode.
        images: images ``(N, C, H, W)`` of one size.

    Raises:
        UserError: if a gradient is zero everywhere, or is not finite.
    """
    totals: dict[int, Tensor] = {}
    for image in images:
        image = image.detach().requires_grad_()
        maps = backbone(image)
        maps = [maps] if torch.is_tensor(maps) else list(maps)
        by_stride = dict(zip(_strides(backbone, maps, image), maps, strict=True))
        for stride, m in by_stride.items():
            # behind a layer norm the plain sum of the channels is constant
            central = m[:, :, m.shape[2] // 2, m.shape[3] // 2].relu().sum()
            (gradient,) = torch.autograd.grad(central, image, retain_graph=True)
            amounts = gradient.abs().sum((0, 1)).double().cpu()
            totals[stride] = totals.get(stride, 0) + amounts
    return [field_of(stride, t.numpy()) for stride, t in sorted(totals.items())]


def _strides(backbone: nn.Module, maps: list[Tensor], image: Tensor) -> Sequence[int]:
    """What the backbone says, else powers of 2: maps are rounded up or down."""
    known = getattr(backbone, 'out_strides', None)
    return known or [2 ** round(math.log2(image.shape[2] / m.shape[2])) for m in maps]


def field_of(stride: int, amounts: np.ndarray) -> Field:
    """The centre of the gradients of an image and the squares around it."""
    total = amounts.sum()
    if not np.isfinite(total) or total <= 0:
        raise UserError(
            f'the gradient of the map of stride {stride} is '
            f'{"zero everywhere" if total == 0 else "not finite"}, so it has no field'
        )
    amounts = amounts / total
    centre = tuple(_median(amounts.sum(axis)) for axis in (1, 0))
    away = [np.abs(np.arange(n) - c) for n, c in zip(amounts.shape, centre, strict=True)]
    # sides of the squares up to each pixel, less one; whole, as the centre is in halves
    steps = (2 * np.maximum(away[0][:, None], away[1])).astype(int)
    held = np.bincount(steps.ravel(), amounts.ravel()).cumsum()
    sides = {s: int(np.searchsorted(held, s / 100 - 1e-9)) + 1 for s in SHARES}
    return Field(stride, amounts, centre, sides)


def _median(amounts: np.ndarray) -> float:
    """Where half of the amounts is on either side, in halves of a pixel.

    The central position of a strided map is not in the middle of the image, and how far
    from it depends on the padding of the network.
    """
    edges = np.concatenate(([0], amounts.cumsum()))
    middle = np.interp(edges[-1] / 2, edges, np.arange(len(edges)) - 0.5)
    return round(2 * middle) / 2


def _table(fields: list[tuple[Network, list[Field]]]) -> str:
    header = ['model', 'weights', 'stride', *(f'{s} %' for s in SHARES)]
    rows = [
        [network.name, network.weights, field.stride, *field.sides.values()]
        for network, of_model in fields
        for field in of_model
    ]
    title = 'side in pixels of the square around the centre that holds a share of the field'
    return f'{title}\n{figures.table(header, rows)}'


def _content(fields, pictures, size: int, num: int, seed: int) -> dict:
    return dict(
        size=size,
        images=len(pictures) or num,
        noise=not pictures,
        seed=seed,
        models=[
            dict(
                name=network.name,
                weights=network.weights,
                maps=[
                    dict(stride=f.stride, centre=f.centre, sides=f.sides) for f in of_model
                ],
            )
            for network, of_model in fields
        ],
    )


@figures.styled()
def _draw(fields: list[tuple[Network, list[Field]]], what: str, size: int):
    strides = sorted({field.stride for _, of_model in fields for field in of_model})
    figure, grid = figures.panels(len(fields), len(strides), aspect=0.95, extra=0.6)
    for row, (network, of_model) in zip(grid, fields, strict=True):
        by_stride = {field.stride: field for field in of_model}
        for axes, stride in zip(row, strides, strict=True):
            if stride in by_stride:
                drawn = _draw_field(axes, by_stride[stride])
            else:
                axes.set_axis_off()
        first = row[strides.index(of_model[0].stride)]
        first.set_ylabel(f'{network.name}\n{network.weights}')
        first.set_yticks([0, size // 2, size])
    for axes, stride in zip(grid[0], strides, strict=True):
        axes.set_title(f'stride {stride}')
    bar = figure.colorbar(drawn, ax=grid, shrink=0.6, pad=0.01, extend='min')
    bar.set_label('gradient relative to its maximum')
    figure.suptitle(f'Effective receptive field of the central position, {what}')
    handles = [Rectangle((0, 0), 1, 1, fill=False, edgecolor=colour) for colour in _COLOURS]
    figure.legend(
        handles,
        [f'side of the square that holds {share} %' for share in SHARES],
        loc='outside lower center',
        ncols=len(SHARES),
        facecolor='0.2',
        framealpha=1,
        labelcolor='white',
    )
    return figure


def _draw_field(axes, field: Field):
    relative = np.maximum(field.amounts / field.amounts.max(), 1e-12)
    drawn = axes.imshow(relative, figures.AMOUNTS, LogNorm(_FAINTEST, 1))
    limits = axes.get_xlim(), axes.get_ylim()
    y, x = field.centre
    for side, colour in zip(field.sides.values(), _COLOURS, strict=True):
        corner = x - side / 2, y - side / 2
        axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=colour))
    axes.set(xlim=limits[0], ylim=limits[1], xticks=[], yticks=[])
    axes.set_xlabel(f'{" / ".join(map(str, field.sides.values()))} pixels')
    return drawn
