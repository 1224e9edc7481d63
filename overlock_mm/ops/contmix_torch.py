"""ContMix in plain torch: banded matrix products, with little memory.

Two identities make it cheap. The projection is linear in the affinity, so it is
applied to the key once (one key vector per tap) and the affinity is never stored.
The aggregation is a banded matrix product: the kernels of a tile of queries become
the rows of a (queries x keys) matrix, and no k*k-fold copy of the values is made.

Along each axis the queries fall into three groups. The windows of the first k//2
queries and of the last k//2 queries are fixed at the border; between them the window
moves with the query. The relative position bias depends on the position of a query
in the two border groups only, so a (k, k) table of window biases is enough for a map
of any size.
"""

from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .modes import (
    differentiable_gradients,
    is_compiling,
    is_exporting,
    needs_plain_ops,
)

# Inner columns that share a matrix: wide enough for an efficient product, narrow
# enough that most of the matrix is not zeros.
_TILE = 24
# Taps, over all rows of a chunk, whose logits are in memory at a time (4 MiB in float32).
_CHUNK = 1 << 20


def contmix(query, key, value, proj_weight, proj_bias, rpbs, kernel_sizes) -> Tensor:
    """See ``overlock_mm.ops.contmix``."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    tap_keys = key.to(dtype) @ proj_weight.to(dtype).t()
    return mix_with_tap_keys(query, tap_keys, value, proj_bias, rpbs, kernel_sizes)


def mix_with_tap_keys(query, tap_keys, value, proj_bias, rpbs, kernel_sizes) -> Tensor:
    """ContMix from the keys of the taps, ``(N, G, c, taps)`` in float32 at least."""
    heads, dtype = query.shape[1], tap_keys.dtype
    query = query.to(dtype).permute(0, 1, 3, 4, 2)
    taps = [k * k for k in kernel_sizes]
    mix = _implementation()
    outputs = []
    for k, keys, bias, rpb, v in zip(
        kernel_sizes,
        tap_keys.split(taps, dim=-1),
        proj_bias.to(dtype).split(taps),
        rpbs,
        value.chunk(len(kernel_sizes), dim=1),
        strict=True,
    ):
        # window i (0 <= i < k) along an axis is that of a query at position i of a
        # map of size k; its first tap reads position 0 of the map
        biases = rpb.to(dtype).unfold(1, k, 1).unfold(2, k, 1).flip(1, 2).flatten(-2) + bias
        v = v.unflatten(1, (heads, -1)).permute(0, 1, 3, 4, 2)
        outputs.append(mix(query, keys, biases, v, k))
    out = torch.stack(outputs, dim=3).flatten(3).permute(0, 3, 1, 2)
    if value.is_contiguous():
        return out.contiguous()
    return out


def _implementation():
    if not needs_plain_ops():
        return _BandedMix.apply
    if is_compiling() and not is_exporting() and torch.is_grad_enabled():
        # keep the inputs alone for the backward pass, as _BandedMix does
        return partial(checkpoint, _mix, use_reentrant=False)
    return _mix


def _mix(query, tap_keys, biases, value, k):
    """Mix with the kernels of one size, in differentiable operations.

    Args:
        query: ``(N, G, H, W, c)``.
        tap_keys: ``(N, G, c, k*k)``.
        biases: biases of the windows, ``(G, k, k, k*k)``.
        value: ``(N, G, H, W, d)``.
        k: kernel size.

    Returns:
        The mixed values, ``(N, H, W, G, d)``.
    """
    height, width = value.shape[2:4]
    rows = _spans(height, k)
    # a program for maps of any width has one tile, as its number of tiles is fixed
    columns = _spans(width, k, None if isinstance(width, torch.SymInt) else _TILE)
    biases = _at_every_query(_at_every_query(biases, 1, rows), 2, columns)
    logits = (query.flatten(2, 3) @ tap_keys).unflatten(2, (height, -1)) + biases
    kernels = logits.softmax(-1).to(value.dtype)
    return torch.cat(
        [
            torch.cat([_mix_tile(kernels, value, r, c, k) for c in columns], dim=3)
            for r in rows
        ],
        dim=2,
    ).permute(0, 2, 3, 1, 4)


def _mix_tile(kernels, value, rows, cols, k):
    """The mixed values of some rows and columns, (N, G, rows, cols, d)."""
    band = kernels[:, :, rows.queries, cols.queries]
    if not cols.fixed:
        # Each query's k taps of a row, shifted by one against those of the query before:
        # with count + k elements a row, reading rows of count + k - 1 shifts by one.
        length = cols.count + k - 1
        band = F.pad(band.unflatten(-1, (k, k)).transpose(3, 4), (0, cols.count))
        band = band.flatten(4)[..., : cols.count * length]
        band = band.unflatten(-1, (cols.count, length)).transpose(3, 4).flatten(4)
    if rows.fixed:
        band = band.flatten(2, 3)
    mixed = band @ _windows(value, rows, cols, k)
    return mixed.unflatten(2, (rows.count, -1)) if rows.fixed else mixed


def _at_every_query(biases, dim, spans):
    """Repeat the biases of the windows inside the map along one axis of it."""
    parts = [biases.narrow(dim, s.position, s.windows) for s in spans]
    return torch.cat(
        [
            p if s.fixed else p.expand(*p.shape[:dim], s.count, *p.shape[dim + 1 :])
            for p, s in zip(parts, spans, strict=True)
        ],
        dim=dim,
    )


class _BandedMix(torch.autograd.Function):
    """``_mix`` with little memory: the backward pass computes the kernels again."""

    @staticmethod
    def forward(ctx, query, tap_keys, biases, value, k):
        ctx.save_for_backward(query, tap_keys, biases, value)
        ctx.k = k
        n, heads, height, width, d = value.shape
        out = value.new_empty(n, height, width, heads, d)
        value, bands = value.contiguous(), {}
        for rows in _spans(height, k, _rows_at_a_time(query, k)):
            kernels = _kernels(query, tap_keys, biases, rows, k).to(value.dtype)
            for cols in _spans(width, k, _TILE):
                band = _band(kernels[:, :, :, cols.queries], rows, cols, k, bands)
                mixed = band @ _windows(value, rows, cols, k)
                mixed = mixed.view(n, heads, rows.count, cols.count, d)
                out[:, rows.queries, cols.queries] = mixed.permute(0, 2, 3, 1, 4)
        return out

    @staticmethod
    def backward(ctx, grad):
        query, tap_keys, biases, value = ctx.saved_tensors
        k = ctx.k
        if torch.is_grad_enabled():
            mix = partial(_mix, k=k)
            return *differentiable_gradients(mix, ctx.saved_tensors, grad), None
        n, heads, height, width, d = value.shape
        value, grad = value.contiguous(), grad.permute(0, 3, 1, 2, 4).contiguous()
        bands = {}
        grad_query, grad_value = torch.empty_like(query), torch.zeros_like(value)
        grad_tap_keys, grad_biases = torch.zeros_like(tap_keys), torch.zeros_like(biases)
        for rows in _spans(height, k, _rows_at_a_time(query, k)):
            kernels = _kernels(query, tap_keys, biases, rows, k)
            grad_kernels = torch.empty_like(kernels)
            for cols in _spans(width, k, _TILE):
                band = kernels[:, :, :, cols.queries].to(value.dtype)
                band = _band(band, rows, cols, k, bands)
                windows = _windows(value, rows, cols, k)
                tile = grad[:, :, rows.queries, cols.queries].reshape(*band.shape[:-1], d)
                grad_band = (tile @ windows.mT).to(kernels.dtype)
                grad_kernels[:, :, :, cols.queries] = _unband(grad_band, rows, cols, k)
                _add_windows(grad_value, band.mT @ tile, rows, cols, k)
            grad_logits = torch.ops.aten._softmax_backward_data(
                grad_kernels, kernels, -1, kernels.dtype
            )
            flat = grad_logits.flatten(2, 3)
            grad_query[:, :, rows.queries] = (flat @ tap_keys.mT).unflatten(2, (-1, width))
            grad_tap_keys += query[:, :, rows.queries].flatten(2, 3).mT @ flat
            _add_biases(grad_biases, grad_logits.sum(0), rows, k)
        return grad_query, grad_tap_keys, grad_biases, grad_value, None


class _Span(NamedTuple):
    """Queries ``start`` to ``stop`` of one axis, and the keys that they read."""

    start: int
    stop: int
    first_key: int
    fixed: bool  # all queries read the window of the first; else it moves with them
    position: int  # of the first query on a map of size k (see the module docstring)

    @property
    def count(self):
        return self.stop - self.start

    @property
    def queries(self):
        return slice(self.start, self.stop)

    @property
    def windows(self):
        """Number of window biases, from ``position``, that the queries use."""
        return self.count if self.fixed else 1

    def keys(self, k):
        moves = 0 if self.fixed else self.count - 1
        return slice(self.first_key, self.first_key + k + moves)


def _spans(size: int, k: int, longest: int | None = None) -> list[_Span]:
    """Cut an axis at its border groups, and the inner part into pieces of equal length.

    Args:
        size: length of the axis, at least k.
        k: kernel size.
        longest: longest piece of the inner part; None for one piece.
    """
    half, inner = k // 2, size - 2 * (k // 2)
    pieces = 1 if longest is None else -(-inner // longest)
    cuts = [half + inner * i // pieces for i in range(pieces + 1)]
    spans = [_Span(a, b, a - half, False, half) for a, b in pairwise(cuts)]
    if half:
        spans.insert(0, _Span(0, half, 0, True, 0))
        spans.append(_Span(size - half, size, size - k, True, half + 1))
    return spans


def _rows_at_a_time(query, k):
    n, heads, _, width, _ = query.shape
    return max(1, _CHUNK // max(1, n * heads * width * k * k))


def _kernels(query, tap_keys, biases, rows, k):
    """Softmax weights of some rows, (N, G, rows, W, k*k)."""
    logits = query[:, :, rows.queries].flatten(2, 3) @ tap_keys
    logits = logits.unflatten(2, (rows.count, -1))
    for cols in _spans(logits.shape[3], k):
        logits[:, :, :, cols.queries] += _biases_of(biases, rows, cols)
    return logits.softmax(-1)


def _biases_of(biases, rows, cols):
    """View of the window biases that some rows and columns use."""
    biases = biases.narrow(1, rows.position, rows.windows)
    return biases.narrow(2, cols.position, cols.windows)


def _band(kernels, rows, cols, k, bands):
    """Lay out kernels (N, G, rows, cols, k*k) by the keys that the tile reads.

    The result is (N, G, rows, cols, k * number of key columns); rows and columns are one
    dim if all rows read the same windows. ``bands`` keeps buffers to use again.
    """
    if not cols.fixed:
        shape = (*kernels.shape[:4], k * (k + cols.count - 1))
        if shape not in bands:  # zeros outside the diagonals stay zeros
            bands[shape] = kernels.new_zeros(shape)
        band = bands[shape]
        _diagonals(band, k).copy_(kernels.unflatten(-1, (k, k)))
        kernels = band
    return kernels.flatten(2, 3) if rows.fixed else kernels


def _unband(band, rows, cols, k):
    """The inverse of ``_band``: the taps of every query, (N, G, rows, cols, k*k)."""
    if rows.fixed:
        band = band.unflatten(2, (rows.count, -1))
    return band if cols.fixed else _diagonals(band, k).flatten(-2)


def _diagonals(band, k):
    """View of the k x k taps of every query in a band whose windows move by one."""
    count, length = band.shape[3:]
    strides = (*band.stride()[:3], length + 1, length // k, 1)
    return band.as_strided((*band.shape[:4], k, k), strides)


def _windows(value, rows, cols, k):
    """Values that a span of rows and one of columns read, (N, G, [rows,] keys, d)."""
    keys = value[:, :, rows.keys(k), cols.keys(k)].contiguous()
    if rows.fixed:
        return keys.flatten(2, 3)
    return keys.unfold(2, k, 1).movedim(-1, 3).flatten(3, 4)


def _add_windows(value, windows, rows, cols, k):
    """The adjoint of ``_windows``: add the gradient of windows to the one of values."""
    target = value[:, :, rows.keys(k), cols.keys(k)]
    if rows.fixed:
        target += windows.unflatten(2, (k, -1))
        return
    windows = windows.unflatten(3, (k, -1))
    for i in range(k):
        target[:, :, i : i + rows.count] += windows[:, :, :, i]


def _add_biases(biases, grad, rows, k):
    """The adjoint of adding the biases of the windows; grad is (G, rows, W, k*k)."""
    grad = grad if rows.fixed else grad.sum(1, keepdim=True)
    for cols in _spans(grad.shape[2], k):
        part = grad[:, :, cols.queries]
        part = part if cols.fixed else part.sum(2, keepdim=True)
        _biases_of(biases, rows, cols).add_(part)
