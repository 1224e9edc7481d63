"""ContMix: aggregation with per-position kernels made from region affinities."""

import torch
from torch import Tensor

# Queries of one row that share a dense (queries x keys) matrix: wide enough for
# an efficient product, narrow enough that most of the matrix is not zeros.
_TILE = 24


def contmix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    rpbs: list[Tensor],
    kernel_sizes: tuple[int, ...],
) -> Tensor:
    """Mix ``value`` with kernels that every position makes from its context.

    The affinity of a position to the L regions of the key is projected to the
    logits of one k x k kernel per entry of ``kernel_sizes``; a relative position
    bias is added, and the softmax over the taps weighs the k x k window of values
    around the position. Windows move inward at the border instead of being
    padded, so every window is full (the rule of neighborhood attention,
    https://arxiv.org/abs/2204.07143). See section 3.3 of
    https://arxiv.org/abs/2502.20087.

    Two identities make this cheap. The projection is linear in the affinity, so
    it is applied to the key once (one key vector per tap) and the affinity is
    never stored. The aggregation is a banded matrix product: the kernels of a
    tile of queries are scattered into a (queries x keys) matrix, and the k*k-fold
    copy of the values is never made.

    Args:
        query: already scaled queries of G heads, ``(N, G, c, H, W)``.
        key: region keys, ``(N, G, c, L)``.
        value: values, ``(N, C, H, W)``; channels are ordered (kernel, head,
            channel), so C is a multiple of ``len(kernel_sizes) * G``.
        proj_weight: from affinities to taps, ``(sum of k*k, L)``; rows are
            ordered by kernel, then by tap, row-major.
        proj_bias: ``(sum of k*k,)``.
        rpbs: relative position bias of each kernel, ``(G, 2k-1, 2k-1)``.
        kernel_sizes: odd kernel sizes, none larger than H or W.

    Returns:
        The mixed values, ``(N, C, H, W)``, in the dtype of ``value``.

    Raises:
        ValueError: if the kernel sizes do not fit the other arguments.
    """
    _check(query, value, proj_weight, rpbs, kernel_sizes)
    n, heads, _, height, width = query.shape
    query = query.permute(0, 1, 3, 4, 2).flatten(2, 3)
    taps = [k * k for k in kernel_sizes]
    outputs = []
    for k, v, weight, bias, rpb in zip(
        kernel_sizes,
        value.chunk(len(kernel_sizes), dim=1),
        proj_weight.split(taps),
        proj_bias.split(taps),
        rpbs,
        strict=True,
    ):
        rows = _window_starts(height, k, value.device)
        cols = _window_starts(width, k, value.device)
        tap_keys = key @ weight.t()  # (N, G, c, k*k)
        logits = query @ tap_keys + bias
        logits = logits.unflatten(-1, (k, k)).unflatten(2, (height, width))
        logits = logits + _window_bias(rpb, rows, cols, k)
        attn = logits.flatten(-2).softmax(dim=-1).to(v.dtype)
        v = v.unflatten(1, (heads, -1)).permute(0, 1, 3, 4, 2)
        out = _aggregate(attn.unflatten(-1, (k, k)), v, rows, cols, k)
        outputs.append(out.permute(0, 1, 4, 2, 3).flatten(1, 2))
    return torch.cat(outputs, dim=1)


def _check(query, value, proj_weight, rpbs, kernel_sizes):
    heads, (height, width) = query.shape[1], value.shape[-2:]
    for k in kernel_sizes:
        if k % 2 == 0 or k > min(height, width):
            raise ValueError(
                f'kernel_sizes={tuple(kernel_sizes)}: every kernel must be odd and at '
                f'most the shorter side of the {height}x{width} map; resize the map or '
                'choose a smaller kernel'
            )
    expected = [(heads, 2 * k - 1, 2 * k - 1) for k in kernel_sizes]
    if [tuple(r.shape) for r in rpbs] != expected:
        raise ValueError(
            f'rpbs must have the shapes {expected} for {heads} heads and '
            f'kernel_sizes={tuple(kernel_sizes)}, got '
            f'{[tuple(r.shape) for r in rpbs]}'
        )
    if proj_weight.shape[0] != sum(k * k for k in kernel_sizes):
        raise ValueError(
            f'proj_weight has {proj_weight.shape[0]} rows, but kernel_sizes='
            f'{tuple(kernel_sizes)} need {sum(k * k for k in kernel_sizes)}'
        )
    if value.shape[1] % (heads * len(kernel_sizes)):
        raise ValueError(
            f'value has {value.shape[1]} channels, which {heads} heads times '
            f'{len(kernel_sizes)} kernels do not divide'
        )


def _window_starts(size: int, k: int, device: torch.device) -> Tensor:
    """First position that the window of each query reads along one axis, (size,)."""
    return (torch.arange(size, device=device) - k // 2).clamp(0, size - k)


def _window_bias(rpb: Tensor, rows: Tensor, cols: Tensor, k: int) -> Tensor:
    """Bias of every tap of every window: (G, 2k-1, 2k-1) -> (G, H, W, k, k)."""
    taps = torch.arange(k, device=rpb.device)

    def offsets(starts):
        positions = torch.arange(len(starts), device=rpb.device)
        return ((starts - positions)[:, None] + taps + k - 1).flatten()

    bias = rpb.index_select(1, offsets(rows)).index_select(2, offsets(cols))
    return bias.unflatten(2, (-1, k)).unflatten(1, (-1, k)).transpose(2, 3)


def _aggregate(attn: Tensor, value: Tensor, rows: Tensor, cols: Tensor, k: int) -> Tensor:
    """Weigh windows: attn (N, G, H, W, k, k), value (N, G, H, W, d) -> as value."""
    n, heads, height, width = attn.shape[:4]
    taps = torch.arange(k, device=attn.device)
    window_rows = rows[:, None] + taps
    tiles = []
    for begin in range(0, width, _TILE):
        end = min(begin + _TILE, width)
        # the columns that this tile's windows read
        first = min(max(begin - k // 2, 0), width - k)
        last = min(max(end - 1 - k // 2, 0), width - k) + k
        index = ((cols[begin:end] - first)[:, None] + taps)[:, None]
        kernels = attn[:, :, :, begin:end]
        band = kernels.new_zeros(*kernels.shape[:-1], last - first)
        band = band.scatter(-1, index.expand_as(kernels), kernels).flatten(-2)
        halo = value[:, :, window_rows, first:last]  # (N, G, H, k, last-first, d)
        tiles.append(band @ halo.flatten(3, 4))
    return torch.cat(tiles, dim=3)
