"""Large-kernel depth-wise convolution: Triton kernels for channels_last memory.

A lane computes VEC channels of a segment: ``COLUMNS`` output columns of one row. For
each kernel row it loads the ``COLUMNS + k - 1`` inputs that the segment reads and the k
weights into registers, and computes all ``COLUMNS * k`` products from them, so several
products share every load. With dilation r, the columns of a segment are r apart, and
the columns of the map form r interleaved groups; nothing else changes. The weight
gradient works alike: a lane handles one kernel row and sums over positions.

These are plain functions that autograd does not differentiate.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton reads the variable when the kernels are decorated; later changes have no effect.
_INTERPRETED = triton.knobs.runtime.interpret
_DTYPES = torch.float32, torch.bfloat16, torch.float16
_WARPS = 4
_BAND = 8  # rows of a segment that the weight gradient sums before the next segment
# Programs of the weight gradient: several per multiprocessor of a large GPU. Each has
# partial sums of 4 * 128 * VEC * k bytes: 18 MB in all for k = 17 in half precision.
_PROGRAMS = 1024


def unsupported(x: Tensor, weight: Tensor) -> str | None:
    """Return why the kernels cannot run on these tensors, or None if they can.

    Args:
        x: input, ``(N, C, H, W)``.
        weight: one kernel per channel, ``(C, 1, k, k)``.
    """
    if x.device != weight.device:
        return f'x is on {x.device} and weight on {weight.device}'
    if x.device.type != 'cuda' and not (_INTERPRETED and x.device.type == 'cpu'):
        return f'the tensors are on {x.device}, and Triton needs a CUDA device'
    if x.dtype not in _DTYPES:
        return f'x is {x.dtype}, which is none of {_DTYPES}'
    if weight.dtype not in (x.dtype, torch.float32):
        return f'weight is {weight.dtype}, which is neither {x.dtype} nor torch.float32'
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[:2] != (x.shape[1], 1):
        return (
            f'x {tuple(x.shape)} and weight {tuple(weight.shape)} are not (N, C, H, W) '
            'and (C, 1, k, k)'
        )
    if weight.shape[2] != weight.shape[3] or weight.shape[2] % 2 == 0:
        return f'the {weight.shape[2]}x{weight.shape[3]} kernel is not odd and square'
    return None


def forward(x: Tensor, weight: Tensor, dilation: int = 1) -> Tensor:
    """Apply a depth-wise convolution with stride 1 and "same" zero padding.

    Args:
        x: input, ``(N, C, H, W)`` in float32, bfloat16 or float16; copied unless it is
            channels_last.
        weight: ``(C, 1, k, k)``, k odd, in the dtype of ``x`` or float32.
        dilation: distance between taps.

    Returns:
        ``(N, C, H, W)``, channels_last, in the dtype of ``x``; summed in float32.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    if x.numel() == 0:
        return out
    n, c, h, w = x.shape
    k = weight.shape[-1]
    # (k * k, C): lanes next to each other read channels next to each other
    weight = weight.flatten(1).t().float().contiguous()
    vec, channels, rows = _block(x)
    columns, segments = _segments(w, k, dilation)
    positions = n * segments * h
    grid = (triton.cdiv(positions, rows) * triton.cdiv(c, channels),)
    with torch.cuda.device_of(x):
        _conv_kernel[grid](
            *(x, weight, out),
            *(h, w, c // vec, dilation, segments, positions),
            KERNEL=k,
            COLUMNS=columns,
            VEC=vec,
            ROWS=rows,
            CHANNELS=channels,
            num_warps=_WARPS,
        )
    return out


def input_grad(grad: Tensor, weight: Tensor, dilation: int = 1) -> Tensor:
    """Compute the gradient by the input: a convolution with the flipped kernel.

    Args:
        grad: gradient by the output, ``(N, C, H, W)``.
        weight: as in ``forward``.
        dilation: as in ``forward``.

    Returns:
        ``(N, C, H, W)``, channels_last, in the dtype of ``grad``.
    """
    return forward(grad, weight.flip(2, 3), dilation)


def weight_grad(x: Tensor, grad: Tensor, kernel_size: int, dilation: int = 1) -> Tensor:
    """Compute the gradient by the weight; the same bits in every run.

    Args:
        x: as in ``forward``.
        grad: gradient by the output, in the shape and dtype of ``x``.
        kernel_size: k.
        dilation: as in ``forward``.

    Returns:
        ``(C, 1, k, k)`` in float32.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    grad = grad.contiguous(memory_format=torch.channels_last)
    n, c, h, w = x.shape
    k = kernel_size
    if x.numel() == 0:
        return x.new_zeros((c, 1, k, k), dtype=torch.float32)
    vec, channels, taps = _block(x)
    columns, segments = _segments(w, k, dilation)
    bands = triton.cdiv(h, _BAND)
    units = n * segments * bands
    programs = triton.cdiv(c, channels) * triton.cdiv(k, taps)
    chunks = min(units, triton.cdiv(_PROGRAMS, programs))
    partial = x.new_empty((chunks, k * k, c), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _weight_grad_kernel[(programs * chunks,)](
            *(x, grad, partial),
            *(h, w, c // vec, dilation, segments, bands, units, chunks),
            KERNEL=k,
            COLUMNS=columns,
            VEC=vec,
            TAPS=taps,
            CHANNELS=channels,
            BAND=_BAND,
            num_warps=_WARPS,
        )
    return partial.sum(0).t().reshape(c, 1, k, k)


def _block(x):
    """Channels per lane, channels per program, and segments (or taps) per program."""
    c = x.shape[1]
    if x.element_size() == 4 or c % 2:
        return 1, 32, _WARPS
    channels = 32 if 0 < c % 64 <= 32 else 64  # whichever leaves fewer lanes idle
    return 2, channels, _WARPS * 64 // channels


def _segments(width, k, dilation):
    """Return the columns of a segment and the number of segments in a row."""
    phase = triton.cdiv(width, dilation)

    def cost(columns):  # instructions; a masked load takes about four
        return triton.cdiv(phase, columns) * (columns * k + 4 * (columns + k - 1) + 2 * k)

    columns = min((16, 8, 4), key=cost)
    return columns, dilation * triton.cdiv(phase, columns)


# Sizes are not specialised, so there is one compilation per kernel size and dtype.
# Channels are passed as pitch = C / VEC: the product tells Triton the alignment of the
# rows, and it loads VEC channels per lane, not more.


@triton.jit(
    do_not_specialize=['height', 'width', 'pitch', 'dilation', 'segments', 'positions']
)
def _conv_kernel(
    x,
    weight,
    out,
    height,
    width,
    pitch,
    dilation,
    segments,
    positions,
    KERNEL: tl.constexpr,
    COLUMNS: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channels = pitch * VEC
    blocks = tl.cdiv(channels, CHANNELS)
    block, tile = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    c = block * CHANNELS + tl.arange(0, CHANNELS)[None]
    # consecutive rows, so that the warps share inputs in the L1 cache
    position = tile * ROWS + tl.arange(0, ROWS)[:, None]
    h = position % height
    n = position // height // segments
    column = _first_column(position // height % segments, dilation, COLUMNS)
    inside = (position < positions) & (c < channels)

    sums = ()
    for _ in tl.static_range(COLUMNS):
        sums = sums + (tl.zeros((ROWS, CHANNELS), tl.float32),)
    half: tl.constexpr = KERNEL // 2
    # kernel rows that read inside the map for some row of this program
    start = tl.maximum(half - tl.max(h) // dilation, 0)
    stop = tl.minimum(half + (height - 1 - tl.min(h)) // dilation + 1, KERNEL)
    for i in range(start, stop):
        row = h + (i - half) * dilation
        valid = inside & (row >= 0) & (row < height)
        left = column - half * dilation
        inputs = _load_columns(
            x + ((n * height + row).to(tl.int64) * width + left) * channels + c,
            *(left, valid, width, channels, dilation, COLUMNS + KERNEL - 1),
        )
        tap = weight + i * KERNEL * channels + c
        taps = ()
        for _ in tl.static_range(KERNEL):
            taps = taps + (tl.load(tap, mask=c < channels, other=0.0),)
            tap += channels
        updated = ()
        for b in tl.static_range(COLUMNS):
            total = sums[b]
            for j in tl.static_range(KERNEL):
                total += inputs[b + j] * taps[j]
            updated = updated + (total,)
        sums = updated

    target = out + ((n * height + h).to(tl.int64) * width + column) * channels + c
    for b in tl.static_range(COLUMNS):
        tl.store(target, sums[b], mask=inside & (column < width))
        target += dilation * channels
        column += dilation


@triton.jit(
    do_not_specialize=[
        *('height', 'width', 'pitch', 'dilation'),
        *('segments', 'bands', 'units', 'chunks'),
    ]
)
def _weight_grad_kernel(
    x,
    grad,
    partial,
    height,
    width,
    pitch,
    dilation,
    segments,
    bands,
    units,
    chunks,
    KERNEL: tl.constexpr,
    COLUMNS: tl.constexpr,
    VEC: tl.constexpr,
    TAPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BAND: tl.constexpr,
):
    channels = pitch * VEC
    blocks = tl.cdiv(channels, CHANNELS)
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    tap_blocks: tl.constexpr = (KERNEL + TAPS - 1) // TAPS
    chunk = rest // tap_blocks
    c = block * CHANNELS + tl.arange(0, CHANNELS)[None]
    i = rest % tap_blocks * TAPS + tl.arange(0, TAPS)[:, None]
    inside = (i < KERNEL) & (c < channels)

    sums = ()
    for _ in tl.static_range(KERNEL):
        sums = sums + (tl.zeros((TAPS, CHANNELS), tl.float32),)
    half: tl.constexpr = KERNEL // 2
    for unit in range(chunk, units, chunks):
        first = unit % bands * BAND
        n = unit // bands // segments
        column = _first_column(unit // bands % segments, dilation, COLUMNS)
        left = column - half * dilation
        for h in range(first, tl.minimum(first + BAND, height)):
            row = h + (i - half) * dilation
            inputs = _load_columns(
                x + ((n * height + row).to(tl.int64) * width + left) * channels + c,
                *(left, inside & (row >= 0) & (row < height)),
                *(width, channels, dilation, COLUMNS + KERNEL - 1),
            )
            grads = _load_columns(
                grad + ((n * height + h).to(tl.int64) * width + column) * channels + c,
                *(column, c < channels, width, channels, dilation, COLUMNS),
            )
            updated = ()
            for j in tl.static_range(KERNEL):
                total = sums[j]
                for b in tl.static_range(COLUMNS):
                    total += inputs[b + j] * grads[b]
                updated = updated + (total,)
            sums = updated

    target = partial + (chunk * KERNEL + i).to(tl.int64) * KERNEL * channels + c
    for j in tl.static_range(KERNEL):
        tl.store(target, sums[j], mask=inside)
        target += channels


@triton.jit
def _first_column(segment, dilation, COLUMNS: tl.constexpr):
    return segment % dilation + segment // dilation * COLUMNS * dilation


@triton.jit
def _load_columns(pointer, column, valid, width, channels, dilation, COUNT: tl.constexpr):
    """Load COUNT tiles from ``column`` on, in float32; 0 where outside or not valid."""
    # one unsigned comparison per load then checks both ends of the row and ``valid``
    column = tl.where(valid, column, width)
    tiles = ()
    for _ in tl.static_range(COUNT):
        mask = column.to(tl.uint32) < width.to(tl.uint32)
        tiles = tiles + (tl.load(pointer, mask=mask, other=0.0).to(tl.float32),)
        pointer += dilation * channels
        column += dilation
    return tiles
