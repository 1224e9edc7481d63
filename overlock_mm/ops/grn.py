"""Global response normalization (https://arxiv.org/abs/2301.00808), channels first."""

from functools import partial

import torch
from torch import Tensor

from .modes import differentiable_gradients, is_exporting, needs_plain_ops

# Values that are converted to float32 at a time, 1 MiB.
_PART = 1 << 18


def global_response_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """``(gamma * n + 1) * x + beta``, where n is ``relative_norms`` of ``x``.

    Args:
        x: ``(N, C, H, W)``.
        gamma: ``(1, C, 1, 1)``.
        beta: ``(1, C, 1, 1)``.
        eps: added to the mean of the norms.

    Returns:
        ``(N, C, H, W)``, in the dtype of ``x``.
    """
    norm = plain_grn if needs_plain_ops() else _GlobalResponseNorm.apply
    return norm(x, gamma, beta, eps)


def plain_grn(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """:func:`global_response_norm` in differentiable operations."""
    ratio, _ = relative_norms(channel_norms(x), eps)
    scale = (gamma * ratio + 1).to(x.dtype)
    if is_exporting():  # as one operation, exporters would write it as three
        return beta.to(x.dtype) + x * scale
    return torch.addcmul(beta.to(x.dtype), x, scale)


class _GlobalResponseNorm(torch.autograd.Function):
    """One pass over the map for the output and two for the gradient; keeps the input."""

    @staticmethod
    def forward(ctx, x, gamma, beta, eps):
        norms = channel_norms(x)
        ratio, mean = relative_norms(norms, eps)
        scale = gamma * ratio + 1
        ctx.save_for_backward(x, gamma, beta, scale, norms, mean)
        ctx.eps = eps
        return torch.addcmul(beta.to(x.dtype), x, scale.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, gamma, beta, scale, norms, mean = ctx.saved_tensors
        if torch.is_grad_enabled():
            norm = partial(plain_grn, eps=ctx.eps)
            return *differentiable_gradients(norm, (x, gamma, beta), grad), None
        grad_scale = (grad * x).sum((2, 3), keepdim=True, dtype=norms.dtype)
        grad_gamma, per_x = scale_gradients(grad_scale, gamma, norms, mean)
        grad_x = (grad * scale.to(grad.dtype)).addcmul_(x, per_x.to(grad.dtype))
        grad_beta = grad.sum((0, 2, 3), dtype=norms.dtype).view_as(gamma)
        return grad_x, grad_gamma.to(gamma.dtype), grad_beta.to(beta.dtype), None


def scale_gradients(
    grad_scale: Tensor, gamma: Tensor, norms: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients through the scale ``gamma * norms / mean + 1`` of a map.

    Args:
        grad_scale: gradient of the scale, ``(N, C, 1, 1)``.
        gamma: ``(1, C, 1, 1)``.
        norms: ``channel_norms`` of the map, ``(N, C, 1, 1)``.
        mean: their mean, see :func:`relative_norms`.

    Returns:
        The gradient of gamma, and the factor of the map in its gradient,
        ``(N, C, 1, 1)``.
    """
    grad_norms = grad_scale * gamma / mean
    grad_norms -= (grad_norms * norms / mean).mean(1, keepdim=True)
    # the norm's gradient is x / norm, and zero for a channel of zeros
    per_x = torch.where(norms > 0, grad_norms / norms, 0)
    return (grad_scale * norms / mean).sum(0, keepdim=True), per_x


def relative_norms(norms: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Norms ``(N, C, 1, 1)`` divided by their mean over the channels, and the mean."""
    mean = norms.mean(dim=1, keepdim=True) + eps
    return norms / mean, mean


def channel_norms(x: Tensor) -> Tensor:
    """L2 norm of every channel over the map, ``(N, C, 1, 1)``, in float32 at least."""
    # a trace is the same with gradients and, when torch checks it, without
    differentiated = x.requires_grad and torch.is_grad_enabled() or torch.jit.is_tracing()
    plain = differentiated or needs_plain_ops()
    if x.device.type == 'cpu' and x.numel() and not plain:
        squares = torch.stack([_sums_of_squares(image) for image in x.split(1)])
        return squares.sqrt()[:, :, None, None]
    dtype = torch.promote_types(x.dtype, torch.float32)
    if not differentiated:
        return torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True, dtype=dtype)
    # a root, unlike the norm, can be kept from dividing by zero in a second derivative
    squares = x.to(dtype).square().sum((2, 3), keepdim=True)
    return torch.where(squares > 0, squares, 1).sqrt() * (squares > 0)


def _sums_of_squares(image: Tensor) -> Tensor:
    """Sums over a map of the squares of its values, ``(C,)``, in float32 at least.

    Batch norm's statistics are torch's fastest sums over a map by far, also for half
    precision with the conversion before, in parts that stay in the cache.
    """
    dtype = torch.promote_types(image.dtype, torch.float32)
    rows = image.shape[2]
    if image.dtype != dtype:
        rows = max(1, _PART * rows // image.numel())
    sums = 0
    for part in image.split(rows, dim=2):
        means, variances = torch.batch_norm_update_stats(part.to(dtype), None, None, 0.0)
        sums = sums + (variances + means.square()) * part[0, 0].numel()
    return sums
