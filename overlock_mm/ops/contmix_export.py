"""ContMix for programs that leave Python: few operations, which every runtime has.

It is the banded matrix product of ``contmix_torch`` without loops and without strides.
Only shapes and tables of indices depend on the size of the map, and the program computes
them from it; so one program serves all sizes. See ``contmix_torch`` for the groups of
queries along an axis and the table of window biases.

The queries are put in another order: those of the left and the right border group, then
the ones between them, in tiles of T columns. A query at a border reads the window of its
group. In a tile, query x reads the columns x to x + k - 1 of k rows. Its taps are padded
to k rows of L = T + k, and those of all queries of the tile are laid end to end, without
the last T zeros. Cut into pieces of k * L - 1, the taps of each query start one column
later than those of the query before: they stand at the keys that they belong to.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Columns of a tile: wide enough for an efficient product, narrow enough that most of the
# matrix is not zeros. The first is for maps of any width, where the last tile may be
# almost empty.
_TILE, _LARGEST_TILE = 20, 32


def contmix(query, key, value, proj_weight, proj_bias, rpbs, kernel_sizes) -> Tensor:
    """See ``overlock_mm.ops.contmix``."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    heads, size = query.shape[1], value.shape[2:]
    taps = [k * k for k in kernel_sizes]
    tap_keys = (key.to(dtype) @ proj_weight.to(dtype).t()).split(taps, dim=-1)
    biases = proj_bias.to(dtype).split(taps)
    query = query.to(dtype).flatten(3).transpose(2, 3)
    values = value.unflatten(1, (len(taps) * heads, -1)).permute(0, 1, 3, 4, 2)
    values = values.split(heads, dim=1)
    outputs = [
        _mix(query, *of_kernel)
        for of_kernel in zip(tap_keys, biases, rpbs, values, kernel_sizes, strict=True)
    ]
    return torch.cat(outputs, dim=1).transpose(2, 3).reshape(-1, value.shape[1], *size)


def _mix(query, tap_keys, bias, rpb, value, k):
    """Mix with the kernels of one size.

    Args:
        query: ``(N, G, H * W, c)``.
        tap_keys: ``(N, G, c, k*k)``.
        bias: bias of the taps, ``(k*k,)``.
        rpb: relative position bias, ``(G, 2k-1, 2k-1)``.
        value: ``(N, G, H, W, d)``.
        k: kernel size.

    Returns:
        The mixed values, ``(N, G, H * W, d)``.
    """
    height, width = value.shape[2:4]
    half, inner = k // 2, width - k + 1
    # exporters round negative quotients to zero: there are none here
    if isinstance(width, torch.SymInt):
        tile = _TILE
        tiles = (inner + tile - 1) // tile
    else:  # of equal width
        tiles = (inner + _LARGEST_TILE - 1) // _LARGEST_TILE
        tile = (inner + tiles - 1) // tiles
    length = tile + k

    def numbers(count):
        return torch.arange(count, device=value.device)

    # Lines of queries that share a window: rows of the two border groups, left then
    # right, and rows of the tiles. Sizes of dims stay apart from the number of tiles,
    # which may be 1: torch.export would take it for fixed.
    at_sides, side, y = _lines(numbers(2 * height), height)
    in_tiles, at_tile, row = _lines(numbers(tiles * height), height)
    x = side * (width - half) + numbers(half)
    column = (at_tile * tile + numbers(tile) + half).clamp(max=width - half - 1)
    order = torch.cat([(y * width + x).flatten(), (row * width + column).flatten()])
    biases = rpb.to(query.dtype).unfold(1, k, 1).unfold(2, k, 1).flip(1, 2).flatten(-2)
    biases = (biases + bias).flatten(1, 2)
    classes = [_class(y, height, k) * k + _class(x, width, k)]
    classes.append(_class(row, height, k) * k + _class(column, width, k))
    classes = torch.cat([c.flatten() for c in classes])
    logits = query.index_select(2, order) @ tap_keys + biases.index_select(1, classes)
    kernels = logits.softmax(-1).to(value.dtype)

    value = F.pad(value, (0, 0, 0, 1))  # one more column, of zeros
    places = value.flatten(2, 3)
    split = 2 * half * height
    keys = _at(places, y * (width + 1) + side * (width - k) + numbers(k))
    windows = _windows(keys, side * height + _tops(y, height, k), k)
    mixed = [kernels[:, :, :split].unflatten(2, (at_sides, half)) @ windows]

    band = kernels[:, :, split:].reshape(*kernels.shape[:2], in_tiles, tile, k, k)
    band = F.pad(band, (0, tile)).flatten(3)
    band = band[..., :-tile].unflatten(-1, (tile, k * length - 1))
    keys = value
    if isinstance(width, torch.SymInt) or tiles > 1:
        column = (at_tile * tile + numbers(length)).clamp(max=width)
        keys = _at(places, row * (width + 1) + column)
    windows = _windows(keys, at_tile * height + _tops(row, height, k), k)
    mixed.append(band @ windows[..., :-1, :])

    # back to the order of the map
    y, x = numbers(height)[:, None], numbers(width)
    inside = x - half
    at_tile = inside // tile
    inside = split + (at_tile * height + y) * tile + inside - at_tile * tile
    left, right = y * half + x, (y + height) * half + x - (width - half)
    places = torch.where(x < half, left, torch.where(x < width - half, inside, right))
    return torch.cat([m.flatten(2, 3) for m in mixed], 2).index_select(2, places.flatten())


def _lines(numbers, height):
    """How many lines there are; the part of each and its row in it, (lines, 1)."""
    part = numbers[:, None] // height
    return numbers.shape[0], part, numbers[:, None] - part * height


def _tops(row, height, k):
    """The k rows that each row reads, (rows, k)."""
    first = (row - k // 2).clamp(min=0).clamp(max=height - k)
    return first + torch.arange(k, device=row.device)


def _windows(keys, lines, k):
    """The keys (N, G, lines, L, d) of k lines for each line, (N, G, lines, k * L, d)."""
    length, d = keys.shape[3:]
    windows = keys.flatten(3).index_select(2, lines.flatten())
    return windows.view(*keys.shape[:2], lines.shape[0], k * length, d)


def _at(values, places):
    """Values (N, G, H * W, d) at a table of places, (N, G, *table, d)."""
    return values.index_select(2, places.flatten()).unflatten(2, places.shape)


def _class(positions, size, k):
    """Positions on a map of size k that read their window in the same way."""
    half = k // 2
    return positions.clamp(max=half) + (positions - (size - half - 1)).clamp(min=0)
