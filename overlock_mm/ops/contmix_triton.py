"""ContMix as fused Triton kernels for GPUs.

The projection is linear in the affinity, so it is applied to the key once, in torch:
one float32 key vector per tap. A program handles a tile of queries of one row and head
and loops over the tap rows of every kernel size. For each tap row, a small matrix
product computes the logits and an online softmax the weights. A gather along the taps
arranges the weights by key column (a band, as the taps of a query start at its own
window), and a second product with the row of values aggregates. Nothing of size
positions x taps is written to memory: the backward pass computes the weights again
from the log-sum-exp of every query.

Gradients need no atomics and are deterministic: each is summed within one program, or
written as partial sums that torch adds up.
"""

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import constexpr_function

from . import contmix_torch
from .modes import (
    differentiable_gradients,
    is_compiling,
    is_exporting,
    needs_plain_ops,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_WIDTH, _MAX_KERNEL, _MAX_KERNELS = 64, 31, 3

# Queries, or keys for the gradient of the values, of a program: the rows of one tensor
# core instruction.
_TILE = tl.constexpr(16)
# Rows of queries over which one program sums the gradients of the taps.
_ROWS = 8


def unsupported(
    query, key, value, proj_weight, proj_bias, rpbs, kernel_sizes
) -> str | None:
    """Return why the kernels cannot run on these arguments, or None if they can."""
    if needs_plain_ops() and (is_exporting() or not is_compiling()):
        return (
            'torch.export, torch.jit.trace, torch.func and forward-mode AD cannot follow '
            'the kernels'
        )
    interpreted = not isinstance(_forward, triton.JITFunction)
    if not (query.is_cuda or interpreted):
        return f'the tensors are on {query.device.type!r}, not on a GPU'
    if query.is_cuda and torch.version.hip:
        return 'the kernels are written for NVIDIA GPUs'
    if query.is_cuda and torch.cuda.get_device_capability(query.device) < (8, 0):
        return 'the GPU is older than compute capability 8.0'
    for tensor in (query, key, value, proj_weight, proj_bias, *rpbs):
        if tensor.dtype not in _DTYPES:
            return f'{tensor.dtype} is not one of float32, bfloat16 and float16'
    depth = value.shape[1] // (query.shape[1] * len(kernel_sizes))
    for name, width in (('query', query.shape[2]), ('value', depth)):
        if not 0 < width <= _MAX_WIDTH:
            return f'a head of the {name} has {width} channels, not 1 to {_MAX_WIDTH}'
    if max(kernel_sizes) > _MAX_KERNEL or len(kernel_sizes) > _MAX_KERNELS:
        return (
            f'kernel_sizes={tuple(kernel_sizes)} has more than {_MAX_KERNELS} kernels or '
            f'one larger than {_MAX_KERNEL}'
        )
    return None


def contmix(query, key, value, proj_weight, proj_bias, rpbs, kernel_sizes) -> Tensor:
    """See ``overlock_mm.ops.contmix``."""
    tap_keys = torch.nn.functional.linear(key.float(), proj_weight.float())
    return _ContMix.apply(
        query,
        value,
        tap_keys.transpose(-1, -2).contiguous(),
        proj_bias.float().contiguous(),
        torch.cat([rpb.float().flatten(1) for rpb in rpbs], dim=1),
        tuple(kernel_sizes),
    )


class _ContMix(torch.autograd.Function):
    """Query (N, G, c, H, W), value (N, C, H, W) and, in float32 and contiguous,
    tap_keys (N, G, taps, c), proj_bias (taps,), rpb (G, sum of (2k-1)^2).
    """

    @staticmethod
    def forward(ctx, query, value, tap_keys, proj_bias, rpb, kernel_sizes):
        n, heads, _, height, width = query.shape
        out = torch.empty_like(value)
        lse = query.new_empty(
            (n, len(kernel_sizes), heads, height, width), dtype=torch.float32
        )
        tables = tap_keys, proj_bias, rpb
        parts = len(kernel_sizes) * heads
        sizes, constants = _sizes(query, value, kernel_sizes)
        grid = (triton.cdiv(width, _TILE.value) * height * heads * n,)
        with torch.cuda.device_of(query):
            _forward[grid](
                _map(query), _map(value, parts), _map(out, parts), lse, *tables, *sizes,
                **constants
            )  # fmt: skip
        ctx.save_for_backward(query, value, lse, *tables)
        ctx.kernel_sizes = kernel_sizes
        return out

    @staticmethod
    def backward(ctx, grad):
        query, value, lse, *tables = ctx.saved_tensors
        if torch.is_grad_enabled():
            mix = partial(_in_torch, kernel_sizes=ctx.kernel_sizes)
            inputs = query, value, *tables
            return *differentiable_gradients(mix, inputs, grad), None
        tap_keys, _, rpb = tables
        kernel_sizes = ctx.kernel_sizes
        n, heads, _, height, width = query.shape
        sizes, constants = _sizes(query, value, kernel_sizes)
        parts = len(kernel_sizes) * heads
        tiles = triton.cdiv(width, _TILE.value) * height * heads * n
        chunks = triton.cdiv(height, _ROWS)
        grad_query, grad_value = torch.empty_like(query), torch.empty_like(value)
        delta = torch.empty_like(lse)
        # sums over the rows of a chunk, and over one row for each tap row
        grad_keys = tap_keys.new_empty((chunks, *tap_keys.shape))
        grad_bias = tap_keys.new_empty((chunks, *tap_keys.shape[:3]))
        grad_rpb = [rpb.new_empty((n, heads, k, height, 2 * k - 1)) for k in kernel_sizes]
        maps = _map(query), _map(value, parts), _map(grad, parts)
        with torch.cuda.device_of(query):
            _backward_query[(tiles,)](
                *maps, _map(grad_query), lse, delta, *tables, *sizes,
                **constants
            )  # fmt: skip
            for i, k in enumerate(kernel_sizes):
                _backward_taps[(k * chunks * heads * n,)](
                    *maps, lse, delta, *tables, grad_keys, grad_bias, grad_rpb[i], *sizes,
                    INDEX=i, ROWS=_ROWS, **constants
                )  # fmt: skip
                _backward_value[(tiles,)](
                    maps[0], maps[2], _map(grad_value, parts), lse, *tables, *sizes,
                    INDEX=i, **constants
                )  # fmt: skip
        return (
            grad_query,
            grad_value,
            grad_keys.sum(0),
            grad_bias.sum((0, 1, 2)),
            torch.cat(
                [
                    torch.einsum(
                        'gahx,hay->gyx', rows.sum(0), _bias_rows(height, k, rows)
                    ).flatten(1)
                    for k, rows in zip(kernel_sizes, grad_rpb, strict=True)
                ],
                dim=1,
            ),
            None,
        )


def _in_torch(query, value, tap_keys, proj_bias, rpb, kernel_sizes):
    """Compute what ``_ContMix`` does, in differentiable operations."""
    sides = [2 * k - 1 for k in kernel_sizes]
    rpbs = [
        r.unflatten(1, (side, side))
        for r, side in zip(rpb.split([s * s for s in sides], dim=1), sides, strict=True)
    ]
    return contmix_torch.mix_with_tap_keys(
        query, tap_keys.mT, value, proj_bias, rpbs, kernel_sizes
    )


def _bias_rows(height, k, like):
    """(H, k, 2k-1): 1 where the query row and tap row use the row of the bias."""
    rows = torch.arange(height, device=like.device)[:, None, None]
    taps = torch.arange(k, device=like.device)[:, None]
    used = (rows - k // 2).clamp(0, height - k) - rows + k - 1 + taps
    return (used == torch.arange(2 * k - 1, device=like.device)).to(like.dtype)


class _Map(NamedTuple):
    """A map (N, heads, channels, H, W) and its strides, for a kernel."""

    data: Tensor
    image: int
    head: int
    channel: int
    row: int
    column: int


def _map(x, parts=None):
    """Return a query, or values with channels split into ``parts``, as a ``_Map``."""
    if parts is not None:
        x = x.unflatten(1, (parts, -1))
    return _Map(x, *x.stride())


def _sizes(query, value, kernel_sizes):
    """Return the arguments that all launches share: (sizes, constants and options)."""
    _, heads, width, *size = query.shape
    depth = value.shape[1] // (heads * len(kernel_sizes))
    single = query.dtype == torch.float32
    return (heads, *size), dict(
        C=width,
        D=depth,
        KERNELS=kernel_sizes,
        # The logits are as exact as float32. The tap keys are float32 for queries of
        # any type, as rounding them to half precision would change large logits by whole
        # units. Half-precision queries are exact in TF32, and three TF32 products on the
        # tensor cores cover all bits of the tap keys; float32 queries use float32.
        PRECISION='ieee' if single else 'tf32x3',
        # One warp can do a tile of tensor core products. Float32 products and wider
        # tiles need more registers than one warp has. So does pipelining the loads;
        # other programs of the multiprocessor hide their latency.
        num_warps=2 if single or max(width, depth, *kernel_sizes) > _TILE.value else 1,
        num_stages=1,
    )


@constexpr_function
def _padded(n):
    return max(16, 1 << (n - 1).bit_length())


@constexpr_function
def _taps_before(kernels, index):
    return sum(k * k for k in kernels[:index])


@constexpr_function
def _biases_before(kernels, index):
    return sum((2 * k - 1) ** 2 for k in kernels[:index])


@triton.jit
def _locate(program, columns, rows, heads):
    """(column, row, head, image) of a program that is one of a grid of them."""
    row = program // columns
    head = row // rows
    return program % columns, row % rows, head % heads, (head // heads).to(tl.int64)


@triton.jit
def _window_start(position, size, K: tl.constexpr):
    return tl.minimum(tl.maximum(position - K // 2, 0), size - K)


@triton.jit
def _first_reader(position, K: tl.constexpr):
    """The first query whose window contains the position."""
    return tl.where(position < K, 0, position - K // 2)


@triton.jit
def _last_reader(position, size, K: tl.constexpr):
    return tl.where(position >= size - K, size - 1, position + K // 2)


@triton.jit
def _pointers(x, image, head, row, columns, CHANNELS: tl.constexpr):
    """(columns, channels) of one row of a map."""
    channels = tl.arange(0, _padded(CHANNELS))[None, :]
    base = x.data + image * x.image + head * x.head + row * x.row
    # the offsets stay the same over a loop over rows
    return base + (columns[:, None] * x.column + channels * x.channel)


@triton.jit
def _load(x, image, head, row, columns, width, CHANNELS: tl.constexpr):
    """As ``_pointers``; zeros right of the map and in the padding of the channels."""
    channels = tl.arange(0, _padded(CHANNELS))
    mask = (columns < width)[:, None] & (channels < CHANNELS)[None, :]
    pointers = _pointers(x, image, head, row, columns, CHANNELS)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _store(x, data, image, head, row, columns, width, CHANNELS: tl.constexpr):
    channels = tl.arange(0, _padded(CHANNELS))
    mask = (columns < width)[:, None] & (channels < CHANNELS)[None, :]
    pointers = _pointers(x, image, head, row, columns, CHANNELS)
    tl.store(pointers, data.to(x.data.dtype.element_ty), mask=mask)


@triton.jit
def _tables(
    tap_keys, proj_bias, rpb, image, head, heads,
    C: tl.constexpr, KERNELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Pointers to the tap keys and biases of one head and kernel."""
    COUNT: tl.constexpr = len(KERNELS)
    tap = (image * heads + head) * _taps_before(KERNELS, COUNT)
    return (
        tap_keys + (tap + _taps_before(KERNELS, INDEX)) * C,
        proj_bias + _taps_before(KERNELS, INDEX),
        rpb + head * _biases_before(KERNELS, COUNT) + _biases_before(KERNELS, INDEX),
    )


@triton.jit
def _load_keys(tap_keys, a, C: tl.constexpr, K: tl.constexpr):
    """(taps, channels) of tap row a; zeros in the padding."""
    taps = tl.arange(0, _padded(K))[:, None]
    channels = tl.arange(0, _padded(C))[None, :]
    mask = (taps < K) & (channels < C)
    return tl.load(tap_keys + a * K * C + (taps * C + channels), mask=mask, other=0.0)


@triton.jit
def _logits(
    q, keys, proj_bias, rpb, a, bias_row, bias_columns,
    K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(queries, taps) of tap row a; -inf in the padding of the taps.

    ``bias_row`` and ``bias_columns`` are the indices of the bias of tap (0, 0).
    """
    taps = tl.arange(0, _padded(K))
    logits = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
    logits += tl.load(proj_bias + a * K + taps, mask=taps < K, other=0.0)[None, :]
    rpb += (a + bias_row) * (2 * K - 1)
    place = bias_columns[:, None] + taps[None, :]
    return logits + tl.load(rpb + place, mask=(taps < K)[None, :], other=-float('inf'))


@triton.jit
def _tap_of(offset, K: tl.constexpr):
    """The tap at an offset into the window, or outside of it a padding tap of weight 0.

    There always is padding: K is odd and the padded size is a power of two.
    """
    return tl.where((offset >= 0) & (offset < K), offset, _padded(K) - 1)


@triton.jit
def _forward(
    query, value, out, lse, tap_keys, proj_bias, rpb, heads, height, width,
    C: tl.constexpr, D: tl.constexpr, KERNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for each tile of queries, for all kernel sizes."""
    tile, row, head, image = _locate(tl.program_id(0), tl.cdiv(width, _TILE), height, heads)
    queries = tile * _TILE + tl.arange(0, _TILE)
    # queries right of the map repeat the last one and are not stored
    columns = tl.minimum(queries, width - 1)
    q = _load(query, image, head, row, columns, width, C).to(tl.float32)
    for i in tl.static_range(len(KERNELS)):
        _mix(
            q, value, out, lse, tap_keys, proj_bias, rpb, image, head, row, tile,
            heads, height, width, C, D, KERNELS, PRECISION, i,
        )  # fmt: skip


@triton.jit
def _mix(
    q, value, out, lse, tap_keys, proj_bias, rpb, image, head, row, tile,
    heads, height, width,
    C: tl.constexpr, D: tl.constexpr, KERNELS: tl.constexpr, PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """The part of ``_forward`` for one kernel size."""
    COUNT: tl.constexpr = len(KERNELS)
    K: tl.constexpr = KERNELS[INDEX]
    tap_keys, proj_bias, rpb = _tables(
        tap_keys, proj_bias, rpb, image, head, heads, C, KERNELS, INDEX
    )
    part = INDEX * heads + head
    queries = tile * _TILE + tl.arange(0, _TILE)
    columns = tl.minimum(queries, width - 1)
    top = _window_start(row, height, K)
    left = _window_start(columns, width, K)
    band = _window_start(tile * _TILE, width, K) + tl.arange(0, _padded(_TILE + K - 1))
    skew = _tap_of(band[None, :] - left[:, None], K)
    highest = tl.full((_TILE,), -float('inf'), tl.float32)
    total = tl.zeros((_TILE,), tl.float32)
    mixed = tl.zeros((_TILE, _padded(D)), tl.float32)
    for a in range(K):
        keys = _load_keys(tap_keys, a, C, K)
        logits = _logits(
            q, keys, proj_bias, rpb, a, top - row + K - 1, left - columns + K - 1,
            K, PRECISION,
        )  # fmt: skip
        before = highest
        highest = tl.maximum(highest, tl.max(logits, 1))
        weights = tl.exp(logits - highest[:, None])
        scale = tl.exp(before - highest)
        total = total * scale + tl.sum(weights, 1)
        v = _load(value, image, part, top + a, band, width, D)
        weights = tl.gather(weights, skew, 1).to(v.dtype)
        mixed = mixed * scale[:, None] + tl.dot(weights, v, input_precision='ieee')
    _store(out, mixed / total[:, None], image, part, row, queries, width, D)
    lse += ((image * COUNT * heads + part) * height + row) * width
    tl.store(lse + queries, highest + tl.log(total), mask=queries < width)


@triton.jit
def _grad_weights(grad, v, unskew):
    """Gradients of the weights, (queries, taps), of a tap row; padding is undefined."""
    grad_band = tl.dot(grad, tl.trans(v), input_precision='ieee')
    return tl.gather(grad_band, unskew, 1)


@triton.jit
def _backward_query(
    query, value, grad, grad_query, lse, delta, tap_keys, proj_bias, rpb,
    heads, height, width,
    C: tl.constexpr, D: tl.constexpr, KERNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for each tile of queries. Also writes delta, which the other kernels
    read: the sum over the taps of weight times its gradient, by query and kernel size.
    """
    tile, row, head, image = _locate(tl.program_id(0), tl.cdiv(width, _TILE), height, heads)
    queries = tile * _TILE + tl.arange(0, _TILE)
    columns = tl.minimum(queries, width - 1)
    q = _load(query, image, head, row, columns, width, C).to(tl.float32)
    grad_q = tl.zeros((_TILE, _padded(C)), tl.float32)
    for i in tl.static_range(len(KERNELS)):
        grad_q = _add_grad_query(
            grad_q, q, value, grad, lse, delta, tap_keys, proj_bias, rpb,
            image, head, row, tile, heads, height, width, C, D, KERNELS, PRECISION, i,
        )  # fmt: skip
    _store(grad_query, grad_q, image, head, row, queries, width, C)


@triton.jit
def _add_grad_query(
    grad_q, q, value, grad, lse, delta, tap_keys, proj_bias, rpb,
    image, head, row, tile, heads, height, width,
    C: tl.constexpr, D: tl.constexpr, KERNELS: tl.constexpr, PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """The part of ``_backward_query`` for one kernel size.

    The gradient of a logit is weight times (gradient of the weight - delta). Delta is
    known after the last tap, so its part is subtracted at the end. Output times its
    gradient would give delta earlier, but the output is rounded to its type: where one
    tap has nearly all the weight, that error is larger than the gradient.
    """
    COUNT: tl.constexpr = len(KERNELS)
    K: tl.constexpr = KERNELS[INDEX]
    BAND: tl.constexpr = _padded(_TILE + K - 1)
    tap_keys, proj_bias, rpb = _tables(
        tap_keys, proj_bias, rpb, image, head, heads, C, KERNELS, INDEX
    )
    part = INDEX * heads + head
    queries = tile * _TILE + tl.arange(0, _TILE)
    columns = tl.minimum(queries, width - 1)
    top = _window_start(row, height, K)
    left = _window_start(columns, width, K)
    first = _window_start(tile * _TILE, width, K)
    taps = tl.arange(0, _padded(K))
    unskew = tl.minimum((left - first)[:, None] + taps[None, :], BAND - 1)
    g = _load(grad, image, part, row, queries, width, D)
    place = ((image * COUNT * heads + part) * height + row) * width
    lse_q = tl.load(lse + place + columns)
    delta_q = tl.zeros((_TILE,), tl.float32)
    mean_keys = tl.zeros((_TILE, _padded(C)), tl.float32)
    for a in range(K):
        keys = _load_keys(tap_keys, a, C, K)
        logits = _logits(
            q, keys, proj_bias, rpb, a, top - row + K - 1, left - columns + K - 1,
            K, PRECISION,
        )  # fmt: skip
        weights = tl.exp(logits - lse_q[:, None])
        v = _load(value, image, part, top + a, first + tl.arange(0, BAND), width, D)
        weighed = weights * _grad_weights(g, v, unskew)
        delta_q += tl.sum(weighed, 1)
        grad_q += tl.dot(weighed, keys, input_precision=PRECISION)
        mean_keys += tl.dot(weights, keys, input_precision=PRECISION)
    tl.store(delta + place + queries, delta_q, mask=queries < width)
    return grad_q - delta_q[:, None] * mean_keys


@triton.jit
def _backward_taps(
    query, value, grad, lse, delta, tap_keys, proj_bias, rpb,
    grad_keys, grad_bias, grad_rpb, heads, height, width,
    C: tl.constexpr, D: tl.constexpr, KERNELS: tl.constexpr, PRECISION: tl.constexpr,
    INDEX: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program for each tap row of a kernel, head and chunk of rows.

    Tap keys and proj_bias get one sum over the queries of the chunk. The row of the
    position bias differs at the border, so it gets a sum for each row of queries.
    """
    COUNT: tl.constexpr = len(KERNELS)
    K: tl.constexpr = KERNELS[INDEX]
    BAND: tl.constexpr = _padded(_TILE + K - 1)
    chunks = tl.cdiv(height, ROWS)
    a, chunk, head, image = _locate(tl.program_id(0), K, chunks, heads)
    tap_keys, proj_bias, rpb = _tables(
        tap_keys, proj_bias, rpb, image, head, heads, C, KERNELS, INDEX
    )
    keys = _load_keys(tap_keys, a, C, K)
    part = INDEX * heads + head
    taps = tl.arange(0, _padded(K))
    places = tl.arange(0, _padded(2 * K - 1))
    keys_sum = tl.zeros((_padded(K), _padded(C)), tl.float32)
    bias_sum = tl.zeros((_padded(K),), tl.float32)
    for row in range(chunk * ROWS, tl.minimum((chunk + 1) * ROWS, height)):
        top = _window_start(row, height, K)
        rpb_sum = tl.zeros((_padded(2 * K - 1),), tl.float32)
        for start in range(0, width, _TILE):
            queries = start + tl.arange(0, _TILE)
            columns = tl.minimum(queries, width - 1)
            left = _window_start(columns, width, K)
            first = _window_start(start, width, K)
            bias_columns = left - columns + K - 1
            q = _load(query, image, head, row, columns, width, C).to(tl.float32)
            logits = _logits(
                q, keys, proj_bias, rpb, a,
                top - row + K - 1, bias_columns, K, PRECISION,
            )  # fmt: skip
            place = ((image * COUNT * heads + part) * height + row) * width
            weights = tl.exp(logits - tl.load(lse + place + columns)[:, None])
            # queries right of the map add nothing: their gradient is loaded as 0
            g = _load(grad, image, part, row, queries, width, D)
            delta_q = tl.load(delta + place + queries, mask=queries < width, other=0.0)
            v = _load(value, image, part, top + a, first + tl.arange(0, BAND), width, D)
            unskew = tl.minimum((left - first)[:, None] + taps[None, :], BAND - 1)
            grad_logits = weights * (_grad_weights(g, v, unskew) - delta_q[:, None])
            keys_sum += tl.dot(tl.trans(grad_logits), q, input_precision=PRECISION)
            bias_sum += tl.sum(grad_logits, 0)
            skew = _tap_of(places[None, :] - bias_columns[:, None], K)
            rpb_sum += tl.sum(tl.gather(grad_logits, skew, 1), 0)
        place = (((image * heads + head) * K + a) * height + row) * (2 * K - 1)
        tl.store(grad_rpb + place + places, rpb_sum, mask=places < 2 * K - 1)
    images = tl.num_programs(0) // (K * chunks * heads)
    tap = (chunk * images + image) * heads + head
    tap = tap * _taps_before(KERNELS, COUNT) + _taps_before(KERNELS, INDEX) + a * K
    tl.store(grad_bias + tap + taps, bias_sum, mask=taps < K)
    channels = tl.arange(0, _padded(C))[None, :]
    mask = (taps < K)[:, None] & (channels < C)
    tl.store(grad_keys + tap * C + (taps[:, None] * C + channels), keys_sum, mask=mask)


@triton.jit
def _backward_value(
    query, grad, grad_value, lse, tap_keys, proj_bias, rpb, heads, height, width,
    C: tl.constexpr, D: tl.constexpr, KERNELS: tl.constexpr, PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """One program for each tile of keys; it loops over the queries that read it."""
    COUNT: tl.constexpr = len(KERNELS)
    K: tl.constexpr = KERNELS[INDEX]
    tile, key_row, head, image = _locate(
        tl.program_id(0), tl.cdiv(width, _TILE), height, heads
    )
    tap_keys, proj_bias, rpb = _tables(
        tap_keys, proj_bias, rpb, image, head, heads, C, KERNELS, INDEX
    )
    part = INDEX * heads + head
    key_columns = tile * _TILE + tl.arange(0, _TILE)
    last_key = tl.minimum(tile * _TILE + _TILE, width) - 1
    first = _first_reader(tile * _TILE, K)
    stop = _last_reader(last_key, width, K) + 1
    grad_v = tl.zeros((_TILE, _padded(D)), tl.float32)
    for row in range(_first_reader(key_row, K), _last_reader(key_row, height, K) + 1):
        top = _window_start(row, height, K)
        a = key_row - top
        keys = _load_keys(tap_keys, a, C, K)
        for start in range(first, stop, _TILE):
            queries = start + tl.arange(0, _TILE)
            columns = tl.minimum(queries, width - 1)
            left = _window_start(columns, width, K)
            q = _load(query, image, head, row, columns, width, C).to(tl.float32)
            logits = _logits(
                q, keys, proj_bias, rpb, a,
                top - row + K - 1, left - columns + K - 1, K, PRECISION,
            )  # fmt: skip
            place = ((image * COUNT * heads + part) * height + row) * width
            weights = tl.exp(logits - tl.load(lse + place + columns)[:, None])
            skew = _tap_of(key_columns[None, :] - left[:, None], K)
            weights = tl.gather(weights, skew, 1)
            g = _load(grad, image, part, row, queries, width, D)
            grad_v += tl.dot(tl.trans(weights.to(g.dtype)), g, input_precision='ieee')
    _store(grad_value, grad_v, image, part, key_row, key_columns, width, D)
