"""ContMix by its definition: a weighted sum over the unfolded windows."""

import torch
import torch.nn.functional as F
from torch import Tensor


def contmix(query, key, value, proj_weight, proj_bias, rpbs, kernel_sizes) -> Tensor:
    """See ``overlock_mm.ops.contmix``. Slow: it copies the values k*k times."""
    n, heads, _, height, width = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    affinity = query.to(dtype).flatten(3).mT @ key.to(dtype)
    affinity = affinity.unflatten(2, (height, width))
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
        y, x = (_bias_indices(size, k, value.device) for size in (height, width))
        bias = rpb.to(dtype)[:, y[:, None, :, None], x[None, :, None, :]]
        attn = (scores + bias.flatten(-2)).softmax(dim=-1).to(value.dtype)
        # unfold gives the windows that lie inside the map; queries at the border use
        # the nearest of them
        windows = F.unfold(v, k).unflatten(2, (height - k + 1, width - k + 1))
        windows = F.pad(windows, [k // 2] * 4, mode='replicate')
        windows = windows.unflatten(1, (heads, -1, k * k)).permute(0, 1, 4, 5, 3, 2)
        mixed = (attn[..., None, :] @ windows).squeeze(-2)
        outputs.append(mixed.permute(0, 1, 4, 2, 3).flatten(1, 2))
    return torch.cat(outputs, dim=1)


def _bias_indices(size: int, k: int, device: torch.device) -> Tensor:
    """Indices into the relative position bias along one axis, (queries, taps)."""
    queries = torch.arange(size, device=device)
    starts = (queries - k // 2).clamp(0, size - k)
    return (starts - queries)[:, None] + torch.arange(k, device=device) + k - 1
