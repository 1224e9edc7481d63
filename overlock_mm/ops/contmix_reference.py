"""ContMix as it is defined: unfold the moved windows, weigh them, add them up."""

import torch
from torch import Tensor


def contmix(query, key, value, proj_weight, proj_bias, rpbs, kernel_sizes) -> Tensor:
    """See ``overlock_mm.ops.contmix``. Slow, and copies the values k*k times."""
    n, heads, _, height, width = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    affinity = torch.einsum('ngchw,ngcl->nghwl', query.to(dtype), key.to(dtype))
    logits = affinity @ proj_weight.to(dtype).t() + proj_bias.to(dtype)
    taps = [k * k for k in kernel_sizes]
    outputs = []
    for k, v, scores, rpb in zip(
        kernel_sizes,
        value.chunk(len(kernel_sizes), dim=1),
        logits.split(taps, dim=-1),
        rpbs,
        strict=True,
    ):
        rows, y = _windows(height, k, value.device)
        cols, x = _windows(width, k, value.device)
        bias = rpb.to(dtype)[:, y[:, None, :, None], x[None, :, None, :]]
        attn = (scores + bias.flatten(-2)).softmax(dim=-1).to(value.dtype)
        v = v.unflatten(1, (heads, -1))
        windows = v[..., rows[:, None, :, None], cols[None, :, None, :]].flatten(-2)
        outputs.append(torch.einsum('nghwt,ngdhwt->ngdhw', attn, windows).flatten(1, 2))
    return torch.cat(outputs, dim=1)


def _windows(size: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Along one axis, (size, k): positions that each query reads, and where in rpb."""
    queries = torch.arange(size, device=device)[:, None]
    starts = (queries - k // 2).clamp(0, size - k)
    positions = starts + torch.arange(k, device=device)
    return positions, positions - queries + k - 1
