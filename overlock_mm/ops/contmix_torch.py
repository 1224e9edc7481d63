"""ContMix in plain torch: banded matrix products, with little memory.

Two identities make it cheap. The projection is linear in the affinity, so it is
applied to the key once (one key vector per tap) and the affinity is never stored.
The aggregation is a banded matrix product: the kernels of a tile of queries are laid
into a (queries x keys) matrix, and the k*k-fold copy of the values is never made.

Along each axis the queries fall into three groups: those at the begin, whose window
is stuck to the border; those inside, whose window moves with them; those at the end.
The relative position bias depends on a query's place in the border groups only, so
that a (k, k) table of window biases serves every size of map.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Inner columns that share a matrix: wide enough for an efficient product, narrow
# enough that most of the matrix is not zeros.
_TILE = 24
# Taps, over all rows of a chunk, whose logits are in memory at a time (4 MiB in float32).
_CHUNK = 1 << 20


def contmix(query, key, value, proj_weight, proj_bias, rpbs, kernel_sizes) -> Tensor:
    """See ``overlock_mm.ops.contmix``."""
    heads = query.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    query = query.to(dtype).permute(0, 1, 3, 4, 2)
    tap_keys = key.to(dtype) @ proj_weight.to(dtype).t()
    taps = [k * k for k in kernel_sizes]
    outputs = []
    for k, keys, bias, rpb, v in zip(
        kernel_sizes,
        tap_keys.split(taps, dim=-1),
        proj_bias.to(dtype).split(taps),
        rpbs,
        value.chunk(len(kernel_sizes), dim=1),
        strict=True,
    ):
        # window i (0 <= i < k) along an axis is the one of a query at place i of a
        # map of size k; its first tap reads place 0 of the map
        biases = rpb.to(dtype).unfold(1, k, 1).unfold(2, k, 1).flip(1, 2).flatten(-2) + bias
        v = v.unflatten(1, (heads, -1)).permute(0, 1, 3, 4, 2)
        outputs.append(_BandedMix.apply(query, keys, biases, v, k))
    out = torch.stack(outputs, dim=3).flatten(3).permute(0, 3, 1, 2)
    if value.is_contiguous():
        return out.contiguous()
    return out


class _BandedMix(torch.autograd.Function):
    """Mix with the kernels of one size; they are made again in the backward pass.

    Query (N, G, H, W, c), tap_keys (N, G, c, k*k), biases of the windows
    (G, k, k, k*k) and value (N, G, H, W, d) give (N, H, W, G, d).
    """

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
    @once_differentiable
    def backward(ctx, grad):
        query, tap_keys, biases, value = ctx.saved_tensors
        k = ctx.k
        n, heads, height, width, d = value.shape
        value, grad, bands = (
            value.contiguous(),
            grad.permute(0, 3, 1, 2, 4).contiguous(),
            {},
        )
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
    """Queries [begin, end) of one axis, the first key that they read, and how."""

    begin: int
    end: int
    first: int  # key
    stuck: bool  # all have the window of the first; else each moves by one
    place: int  # of the first query in a map of size k (see the module docstring)

    @property
    def count(self):
        return self.end - self.begin

    @property
    def queries(self):
        return slice(self.begin, self.end)

    def keys(self, k):
        return slice(self.first, self.first + k + (0 if self.stuck else self.count - 1))


def _spans(size: int, k: int, longest: int) -> list[_Span]:
    """Cut an axis at its borders, and the inner part into pieces of equal length."""
    half, inner = k // 2, size - 2 * (k // 2)
    pieces = -(-inner // longest)
    cuts = [half + inner * i // pieces for i in range(pieces + 1)]
    spans = [_Span(a, b, a - half, False, half) for a, b in pairwise(cuts)]
    if half:
        end = size - half
        spans.insert(0, _Span(0, half, 0, True, 0))
        spans.append(_Span(end, size, size - k, True, half + 1))
    return spans


def _rows_at_a_time(query, k):
    n, heads, _, width, _ = query.shape
    return max(1, _CHUNK // max(1, n * heads * width * k * k))


def _kernels(query, tap_keys, biases, rows, k):
    """Softmax weights of some rows, (N, G, rows, W, k*k)."""
    logits = query[:, :, rows.queries].flatten(2, 3) @ tap_keys
    logits = logits.unflatten(2, (rows.count, -1))
    for cols in _spans(logits.shape[3], k, logits.shape[3]):
        logits[:, :, :, cols.queries] += biases[:, _places(rows), _places(cols)]
    return logits.softmax(-1)


def _places(span):
    return slice(span.place, span.place + (span.count if span.stuck else 1))


def _band(kernels, rows, cols, k, bands):
    """(N, G, rows, cols, k*k) -> (N, G, rows, cols, k * width of the keys); rows and
    columns are one dim if all rows read the same windows."""
    if not cols.stuck:
        shape = (*kernels.shape[:4], k * (k + cols.count - 1))
        if shape not in bands:  # zeros outside the diagonals stay zeros
            bands[shape] = kernels.new_zeros(shape)
        band = bands[shape]
        _diagonals(band, k).copy_(kernels.unflatten(-1, (k, k)))
        kernels = band
    return kernels.flatten(2, 3) if rows.stuck else kernels


def _unband(band, rows, cols, k):
    """The entries that ``_band`` laid out, (N, G, rows, cols, k*k)."""
    if rows.stuck:
        band = band.unflatten(2, (rows.count, -1))
    return band if cols.stuck else _diagonals(band, k).flatten(-2)


def _diagonals(band, k):
    """View of the k x k taps of every query in a band whose windows move by one."""
    count, length = band.shape[3:]
    strides = (*band.stride()[:3], length + 1, length // k, 1)
    return band.as_strided((*band.shape[:4], k, k), strides)


def _windows(value, rows, cols, k):
    """Values that a span of rows and one of columns read, (N, G, [rows,] keys, d)."""
    keys = value[:, :, rows.keys(k), cols.keys(k)].contiguous()
    if rows.stuck:
        return keys.flatten(2, 3)
    return keys.unfold(2, k, 1).movedim(-1, 3).flatten(3, 4)


def _add_windows(value, windows, rows, cols, k):
    """The adjoint of ``_windows``: add the gradient of windows to the one of values."""
    target = value[:, :, rows.keys(k), cols.keys(k)]
    if rows.stuck:
        target += windows.unflatten(2, (k, -1))
        return
    windows = windows.unflatten(3, (k, -1))
    for i in range(k):
        target[:, :, i : i + rows.count] += windows[:, :, :, i]


def _add_biases(biases, grad, rows, k):
    """The adjoint of adding the biases of the windows; grad is (G, rows, W, k*k)."""
    grad = grad if rows.stuck else grad.sum(1, keepdim=True)
    for cols in _spans(grad.shape[2], k, grad.shape[2]):
        part = grad[:, :, cols.queries]
        part = part if cols.stuck else part.sum(2, keepdim=True)
        biases[:, _places(rows), _places(cols)] += part
