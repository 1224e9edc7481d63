"""ContMix as it is defined: unfold the moved windows, weigh them, add them up."""

import torch
import torch.nn.functional as F
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
        y, x = (_bias_places(size, k, value.device) for size in (height, width))
        bias = rpb.to(dtype)[:, y[:, None, :, None], x[None, :, None, :]]
        attn = (scores + bias.flatten(-2)).softmax(dim=-1).to(value.dtype)
        # the k x k windows that lie inside; those at the border serve their neighbours
        windows = F.unfold(v, k).unflatten(2, (height - k + 1, width - k + 1))
        windows = F.pad(windows, [k // 2] * 4, mode='replicate')
        windows = windows.unflatten(1, (heads, -1, k * k))
        outputs.append(torch.einsum('nghwt,ngdthw->ngdhw', attn, windows).flatten(1, 2))
    return torch.cat(outputs, dim=1)


def _bias_places(size: int, k: int, device: torch.device) -> Tensor:
    """Where each query's taps read a position bias along one axis, (size, k)."""
    queries = torch.arange(size, device=device)
    starts = (queries - k // 2).clamp(0, size - k)
    return (starts - queries)[:, None] + torch.arange(k, device=device) + k - 1
