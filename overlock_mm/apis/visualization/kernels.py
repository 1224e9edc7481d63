"""The kernels that ContMix makes at points of an image (https://arxiv.org/abs/2502.20087)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.colors import LogNorm, Normalize
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from ...errors import UserError
from ...models import OverLoCK
from ...models.contmix import REGIONS, ContMix
from ...ops import contmix
from . import figures
from .networks import Seen, backbone_of, look, open_model

_COLOUR, _ALPHA = '#00e5ff', 0.75
_POINT = dict(marker='+', color=_COLOUR, markersize=4, markeredgewidth=0.8)


class Kernels(NamedTuple):
    """What ContMix mixes a position with.

    Attributes:
        weights: for the small and the large kernel, the weights of every head over the
            map, ``(heads, H, W)``; zero outside of the window.
        affinity: scaled dot products of the position's query with the keys of the
            regions, ``(heads, 7, 7)``.
    """

    weights: tuple[np.ndarray, np.ndarray]
    affinity: np.ndarray


class _Shown(NamedTuple):
    """A point, and the kernels there with the context and without it."""

    point: tuple[float, float]  # in pixels of the file
    cell: tuple[int, int]  # row and column in the map
    kernels: tuple[Kernels, Kernels]


def kernels(
    config: str,
    checkpoint: str,
    image: str,
    out: str,
    *,
    points: Sequence[tuple[float, float]] | None = None,
    block: str = '3.0',
    heads: Sequence[int] | None = None,
    device: str | None = None,
    cfg_options: dict | None = None,
    trust: bool = False,
) -> str:
    """Draw the kernels of a block of the Focus-Net, with the context and without it.

    Without it means that the Overview-Net's context, which guides all blocks, is zero.

    Args:
        config: config of a detector or segmentor whose backbone is an OverLoCK.
        checkpoint: file or URL of its weights.
        image: path of the image.
        out: picture to write.
        points: x and y in pixels of the image; by default its centre.
        block: stage of the Focus-Net, 3 or 4, and the number of its block from 0 on.
        heads: which heads to draw; by default all.
        device: by default cuda where there is one, else cpu.
        cfg_options: values of the config to override, by key.
        trust: read the checkpoint even if that runs code in it.

    Returns:
        A table of how far the context changes each kernel.

    Raises:
        UserError: if an argument cannot be used.
        CheckpointError: if the checkpoint cannot be read, or does not fit.
    """
    path = figures.check_picture(out)
    predictor = open_model(config, checkpoint, device, cfg_options, trust)
    backbone = backbone_of(predictor.model, config)
    mixer = _block(backbone, block, config)
    heads = _checked_heads(heads, mixer.num_heads, block)
    seen = look(predictor, backbone, image)
    points = _checked_points(points, seen, image)
    both = [affinities_of(backbone, mixer, seen.inputs, context=c) for c in (True, False)]
    size = both[0][0].shape[-2:]
    shown = []
    for point in points:
        cell = _cell(seen, point, size)
        shown.append(_Shown(point, cell, tuple(kernels_at(mixer, *b, cell) for b in both)))
    figures.save(_draw(shown, seen, mixer, block, heads), path)
    return f'{_table(shown, mixer, heads)}\nwrote {path}'


def _block(backbone: nn.Module, name: str, config: str) -> ContMix:
    if not isinstance(backbone, OverLoCK):
        raise UserError(
            f'the backbone of {config} is a {type(backbone).__name__}, and only OverLoCK '
            'has these kernels; give the config of a model with it'
        )
    blocks = {
        f'{stage}.{i}': block
        for stage in (3, 4)
        for i, block in enumerate(getattr(backbone, f'sub_blocks{stage}', ()))
    }
    if name not in blocks:
        raise UserError(
            f'--block {name} is not one of the Focus-Net of {config}: '
            f'{", ".join(blocks) or "its out_indices leave out the whole net"}'
        )
    return blocks[name]


def _checked_heads(heads: Sequence[int] | None, count: int, block: str) -> list[int]:
    if heads is None:
        return list(range(count))
    if not heads or not set(heads) <= set(range(count)):
        raise UserError(
            f'--heads {",".join(map(str, heads))}: block {block} has the heads 0 to '
            f'{count - 1}; give some of these, or all'
        )
    return list(heads)


def _checked_points(points, seen: Seen, image: str) -> list[tuple[float, float]]:
    height, width = seen.size
    points = points or [(width // 2, height // 2)]
    for x, y in points:
        if not (0 <= x < width and 0 <= y < height):
            raise UserError(
                f'--points {x:g},{y:g} is outside of {image}, which has {width} x {height} '
                f'pixels; give X within 0 to {width - 1} and Y within 0 to {height - 1}'
            )
    return list(points)


def _cell(seen: Seen, point: tuple[float, float], size: Sequence[int]) -> tuple[int, int]:
    """Row and column of a map of ``size`` at a point of the image."""
    x, y = seen.scaled(*point)
    (height, width), (rows, columns) = seen.inputs.shape[-2:], size
    row, column = int((y + 0.5) / height * rows), int((x + 0.5) / width * columns)
    return min(row, rows - 1), min(column, columns - 1)


@torch.no_grad()
def affinities_of(
    backbone: OverLoCK, mixer: ContMix, inputs: Tensor, context: bool = True
) -> tuple[Tensor, Tensor]:
    """Run the backbone, and keep what a block makes its kernels of.

    Args:
        backbone: not folded, in evaluation mode.
        mixer: one of its blocks.
        inputs: an image, ``(1, C, H, W)``.
        context: whether the block gets the Overview-Net's context; else it is zero.

    Returns:
        The scaled query ``(1, heads, c, h, w)`` and the key ``(1, heads, c, 49)``.
    """
    kept = {}

    def keep(module, given, out):
        kept[module] = out

    hooks = [m.register_forward_hook(keep) for m in (mixer.weight_query, mixer.weight_key)]
    if not context:
        zero = backbone.high_level_proj
        hooks.append(
            zero.register_forward_hook(lambda m, given, out: torch.zeros_like(out))
        )
    try:
        backbone(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    split = mixer.num_heads, -1
    query = kept[mixer.weight_query].unflatten(1, split) * mixer.query_scale
    return query, kept[mixer.weight_key].flatten(2).unflatten(1, split)


def kernels_at(
    mixer: ContMix, query: Tensor, key: Tensor, cell: tuple[int, int]
) -> Kernels:
    """The kernels at a position.

    The output of ContMix is linear in the values, so its derivative by them is the kernel
    that the operation has really used, at the border, too.

    Args:
        mixer: the block.
        query: scaled queries, ``(1, heads, c, H, W)``.
        key: keys, ``(1, heads, c, 49)``.
        cell: row and column of the position.
    """
    heads, (y, x) = mixer.num_heads, cell
    value = query.new_zeros(1, 2 * heads, *query.shape[-2:], requires_grad=True)
    rpbs = mixer.rpb1, mixer.rpb2
    with torch.enable_grad():
        out = contmix(query, key, value, *mixer.projection(), rpbs, mixer.kernel_sizes)
        (weights,) = torch.autograd.grad(out[0, :, y, x].sum(), value)
    affinity = torch.einsum('gc,gcl->gl', query[0, ..., y, x], key[0])
    small, large = weights[0].cpu().numpy().reshape(2, heads, *query.shape[-2:])
    affinity = affinity.cpu().numpy().reshape(heads, REGIONS, REGIONS)
    return Kernels((small, large), affinity)


def window(cell: tuple[int, int], size: Sequence[int], k: int) -> tuple[int, int]:
    """First row and column of the k x k window of a position; it is inside of the map."""
    row, column = (min(max(c - k // 2, 0), n - k) for c, n in zip(cell, size, strict=True))
    return row, column


def _table(shown: list[_Shown], mixer: ContMix, heads: list[int]) -> str:
    names = [f'{k} x {k}' for k in mixer.kernel_sizes]
    rows = []
    for point, _, (given, zeroed) in shown:
        changes = [_moved(a, b) for a, b in zip(given.weights, zeroed.weights, strict=True)]
        for head in heads:
            moved = (f'{change[head]:.3f}' for change in changes)
            rows.append([f'{point[0]:g},{point[1]:g}', head, *moved])
    title = 'share of the weight that moves to other taps when the context is zero'
    return f'{title}\n{figures.table(["point", "head", *names], rows)}'


def _moved(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Total variation distance of the kernels of every head."""
    return np.abs(a - b).sum((1, 2)) / 2


@figures.styled()
def _draw(
    shown: list[_Shown], seen: Seen, mixer: ContMix, block: str, heads: list[int]
) -> figures.Figure:
    small, large = mixer.kernel_sizes
    size = shown[0].kernels[0].weights[0].shape[1:]
    # six rows of panels for each point, beside the image
    panel = min(figures.TEXT / (len(heads) + 4), 0.8)
    width, height = panel * (len(heads) + 4), 0.3 + len(shown) * (6 * panel + 0.3)
    figure = figures.Figure((width, height), layout='constrained')
    figure.suptitle(
        f'ContMix kernels of block {block}: {small} x {small} and {large} x {large} taps\n'
        f'on a map of {size[0]} x {size[1]} positions'
    )
    norms = _norms(shown, mixer, heads)
    parts = figure.subfigures(len(shown), 1, squeeze=False)[:, 0]
    for part, item in zip(parts, shown, strict=True):
        left, right = part.subfigures(1, 2, width_ratios=(3, len(heads) + 1))
        _draw_image(left.subplots(), item, seen, mixer)
        grid = right.subplots(6, len(heads), squeeze=False)
        _draw_kernels(right, grid, item, seen, mixer, heads, norms)
    return figure


def _norms(shown: list[_Shown], mixer: ContMix, heads: list[int]) -> list[Normalize]:
    """Ranges of the colours, the same for all that is compared."""
    norms = []
    for i, k in enumerate(mixer.kernel_sizes):
        values = np.stack(
            [b.weights[i][h] for item in shown for b in item.kernels for h in heads]
        )
        # weights relative to those of a plain mean, as far to either side
        largest = max(k * k * values.max(), 1.01)
        norms.append(LogNorm(1 / largest, largest))
    largest = max(np.abs(b.affinity[heads]).max() for item in shown for b in item.kernels)
    return [*norms, Normalize(-max(largest, 1e-12), max(largest, 1e-12))]


def _draw_image(axes, item: _Shown, seen: Seen, mixer: ContMix) -> None:
    height, width = seen.inputs.shape[-2:]
    size = item.kernels[0].weights[0].shape[1:]
    axes.imshow(seen.picture)
    limits = dict(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    for k, style in zip(mixer.kernel_sizes, ('-', '--'), strict=True):
        row, column = window(item.cell, size, k)
        y, x = row * height / size[0] - 0.5, column * width / size[1] - 0.5
        box = (x, y), k * width / size[1], k * height / size[0]
        axes.add_patch(
            Rectangle(
                *box, fill=False, edgecolor=_COLOUR, linestyle=style, label=f'{k} x {k}'
            )
        )
    axes.plot(*seen.scaled(*item.point), **_POINT)
    axes.set(**limits)
    figures.without_ticks(axes)
    axes.set_title(f'point {item.point[0]:g}, {item.point[1]:g}')
    axes.legend(loc='upper center', bbox_to_anchor=(0.5, -0.02), ncols=2, frameon=False)


def _draw_kernels(
    figure, grid: np.ndarray, item: _Shown, seen: Seen, mixer: ContMix, heads, norms
) -> None:
    """Three pairs of rows: small kernels, large kernels and affinities."""
    names = [f'{k} x {k}' for k in mixer.kernel_sizes] + ['affinity']
    for axes, head in zip(grid[0], heads, strict=True):
        axes.set_title(f'head {head}')
    for i, (name, norm) in enumerate(zip(names, norms, strict=True)):
        rows = grid[2 * i : 2 * i + 2]
        for row, found, which in zip(rows, item.kernels, ('', 'no context'), strict=True):
            row[0].set_ylabel(f'{name}\n{which}' if which else name)
            for axes, head in zip(row, heads, strict=True):
                if i < 2:
                    drawn = _draw_window(axes, found.weights[i][head], item, seen, mixer, i)
                else:
                    drawn = _draw_regions(axes, found.affinity[head], seen)
                drawn.set_norm(norm)
                figures.without_ticks(axes)
        bar = figure.colorbar(drawn, ax=rows, pad=0.02, aspect=15)
        bar.set_label('query · key' if i == 2 else 'weight / mean weight')
        if i < 2:
            bar.set_ticks([norm.vmin, 1, norm.vmax], minor=False)
            bar.set_ticks([], minor=True)
            bar.set_ticklabels([f'{norm.vmin:.2g}', '1', f'{norm.vmax:.2g}'])


def _draw_window(axes, weights: np.ndarray, item: _Shown, seen: Seen, mixer, i: int):
    """Lay the weights of the window over this part of the image; 1 is a plain mean."""
    k, size = mixer.kernel_sizes[i], weights.shape
    row, column = window(item.cell, size, k)
    values = weights[row : row + k, column : column + k] * k * k
    per_row, per_column = (n / s for n, s in zip(seen.inputs.shape[-2:], size, strict=True))
    left, top = column * per_column - 0.5, row * per_row - 0.5
    right, bottom = left + k * per_column, top + k * per_row
    axes.imshow(seen.picture.mean(2), 'gray')
    drawn = axes.imshow(
        values, figures.DIFFERENCES, extent=(left, right, bottom, top), alpha=_ALPHA
    )
    y, x = ((c + 0.5) * n for c, n in zip(item.cell, (per_row, per_column), strict=True))
    axes.plot(x - 0.5, y - 0.5, **_POINT)
    axes.set(xlim=(left, right), ylim=(bottom, top), aspect='equal')
    return drawn


def _draw_regions(axes, affinity: np.ndarray, seen: Seen):
    """Lay the affinities over the regions, which are a grid over the whole map."""
    height, width = seen.inputs.shape[-2:]
    axes.imshow(seen.picture.mean(2), 'gray')
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    drawn = axes.imshow(affinity, figures.DIFFERENCES, extent=extent, alpha=_ALPHA)
    height, width = seen.picture.shape[:2]
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    return drawn
