"""Layers that the blocks share; attribute names are the released state-dict names."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..archs import DILATED_BRANCHES
from ..ops.depthwise import DepthwiseConv2d
from ..ops.modes import differentiable_gradients, needs_plain_ops
from ..ops.reparam import batch_norm_affine, branch_names, merge_branches


class ResDWConv(DepthwiseConv2d):
    """3x3 depth-wise convolution added to its input, ``(N, C, H, W)`` -> same."""

    def __init__(self, dim: int):
        super().__init__(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class LayerScale(nn.Module):
    """Channel-wise ``x * weight + bias``; timm's has no bias and another shape."""

    def __init__(self, dim: int, init_value: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim, 1, 1, 1), init_value))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


class SqueezeExcite(nn.Module):
    """Channel attention (https://arxiv.org/abs/1709.01507) with a GELU."""

    def __init__(self, dim: int):
        super().__init__()
        hidden = max(16, dim // 8)
        self.proj = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(dim, hidden, 1),
            nn.GELU(),
            nn.Conv2d(hidden, dim, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale(x)

    def scale(self, x: Tensor) -> Tensor:
        """What ``x`` is multiplied by, ``(N, C, 1, 1)``."""
        return self.proj(x)


class GlobalResponseNorm(nn.Module):
    """GRN of ConvNeXt V2 (https://arxiv.org/abs/2301.00808), channels first.

    ``(gamma * n + 1) * x + beta``, where ``n`` is each channel's L2 norm over the
    map divided by the mean of these norms over the channels. The norms are summed up
    in float32 at least, so that half precision does not overflow.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.zeros(1, dim, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        norm = _grn if needs_plain_ops() else _GlobalResponseNorm.apply
        return norm(x, self.gamma, self.beta, self.eps)

    def scale(self, x: Tensor) -> Tensor:
        """What ``x`` is multiplied by, ``(N, C, 1, 1)``, in float32 at least."""
        ratio, _ = _relative_norms(channel_norms(x), self.eps)
        return self.gamma * ratio[:, :, None, None] + 1


def _grn(x, gamma, beta, eps):
    """GRN in differentiable operations."""
    ratio, _ = _relative_norms(channel_norms(x), eps)
    scale = gamma * ratio[:, :, None, None] + 1
    return torch.addcmul(beta.to(x.dtype), x, scale.to(x.dtype))


class _GlobalResponseNorm(torch.autograd.Function):
    """One pass over the map for the output and two for the gradient; keeps the input."""

    @staticmethod
    def forward(ctx, x, gamma, beta, eps):
        norms = channel_norms(x)
        ratio, mean = _relative_norms(norms, eps)
        scale = gamma * ratio[:, :, None, None] + 1
        ctx.save_for_backward(x, gamma, beta, scale, norms, mean)
        ctx.eps = eps
        return torch.addcmul(beta.to(x.dtype), x, scale.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, gamma, beta, scale, norms, mean = ctx.saved_tensors
        if torch.is_grad_enabled():
            norm = partial(_grn, eps=ctx.eps)
            return *differentiable_gradients(norm, (x, gamma, beta), grad), None
        grad_scale = (grad * x).sum((2, 3), dtype=norms.dtype)
        grad_ratio = grad_scale * gamma.flatten()
        grad_norms = grad_ratio / mean
        grad_norms -= (grad_norms * norms / mean).mean(1, keepdim=True)
        # the norm's gradient is x / norm, and zero for a channel of zeros
        per_x = torch.where(norms > 0, grad_norms / norms, 0)[:, :, None, None]
        grad_x = (grad * scale.to(grad.dtype)).addcmul_(x, per_x.to(grad.dtype))
        grad_gamma = (grad_scale * norms / mean).sum(0).view_as(gamma)
        grad_beta = grad.sum((0, 2, 3), dtype=norms.dtype).view_as(gamma)
        return grad_x, grad_gamma.to(gamma.dtype), grad_beta.to(beta.dtype), None


def _relative_norms(norms, eps):
    mean = norms.mean(dim=1, keepdim=True) + eps
    return norms / mean, mean


def channel_norms(x: Tensor) -> Tensor:
    """L2 norm of every channel over the map, ``(N, C)``, in float32 at least."""
    differentiated = x.requires_grad and torch.is_grad_enabled()
    if (
        x.device.type == 'cpu'
        and x.dtype.itemsize >= 4
        and x.numel()
        and not (differentiated or needs_plain_ops())
    ):
        # batch norm's statistics are torch's fastest sums over a map by far
        stats = [torch.batch_norm_update_stats(i, None, None, 0.0) for i in x.split(1)]
        means, variances = (torch.stack(s) for s in zip(*stats, strict=True))
        return ((variances + means.square()) * x[0, 0].numel()).sqrt()
    dtype = torch.promote_types(x.dtype, torch.float32)
    if not differentiated:
        return torch.linalg.vector_norm(x, dim=(2, 3), dtype=dtype)
    # a root, unlike the norm, can be kept from dividing by zero in a second derivative
    squares = x.to(dtype).square().sum((2, 3))
    return torch.where(squares > 0, squares, 1).sqrt() * (squares > 0)


class DilatedReparamBlock(nn.Module):
    """Large depth-wise convolution trained with parallel dilated branches.

    In the training form it is the sum of one k x k and several small dilated
    depth-wise convolutions, each with its batch norm
    (https://arxiv.org/abs/2311.15599). In the deploy form all of them are one
    k x k depth-wise convolution with bias.

    Args:
        dim: channels.
        kernel_size: size of the large kernel, a key of ``DILATED_BRANCHES``.
        deploy: build the deploy form.
    """

    def __init__(self, dim: int, kernel_size: int, deploy: bool = False):
        super().__init__()
        if kernel_size not in DILATED_BRANCHES:
            raise ValueError(
                f'kernel_size={kernel_size} has no dilated branches; choose '
                f'one of {sorted(DILATED_BRANCHES)}'
            )
        self.branches = () if deploy else DILATED_BRANCHES[kernel_size]
        self.deploy = deploy
        self.lk_origin = DepthwiseConv2d(dim, kernel_size, bias=deploy)
        if deploy:
            return
        self.origin_bn = nn.BatchNorm2d(dim)
        for k, r in self.branches:
            self.add_module(f'dil_conv_k{k}_{r}', DepthwiseConv2d(dim, k, r, bias=False))
            self.add_module(f'dil_bn_k{k}_{r}', nn.BatchNorm2d(dim))

    def forward(self, x: Tensor) -> Tensor:
        out = self.lk_origin(x)
        if self.deploy:
            return out
        out = self.origin_bn(out)
        for k, r in self.branches:
            conv, bn = self._branch(k, r)
            out = out + bn(conv(x))
        return out

    def _branch(self, k: int, r: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
        return getattr(self, f'dil_conv_k{k}_{r}'), getattr(self, f'dil_bn_k{k}_{r}')

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        """Merge all branches into one convolution, in place; idempotent."""
        if self.deploy:
            return
        old = self.lk_origin
        kernel, bias = merge_branches(
            self.state_dict(), old.kernel_size[0], self.origin_bn.eps
        )
        for conv, (bn, *_) in branch_names(old.kernel_size[0]).items():
            delattr(self, conv)
            delattr(self, bn)
        merged = DepthwiseConv2d(old.in_channels, old.kernel_size[0])
        self.lk_origin = merged.to(old.weight.device, old.weight.dtype)
        self.lk_origin.weight.copy_(kernel)
        self.lk_origin.bias.copy_(bias)
        self.lk_origin.train(self.training)
        self.branches, self.deploy = (), True


def affine(layer: _BatchNorm | LayerScale) -> tuple[Tensor, Tensor]:
    """Scale and shift of every channel, (C,) each in float64, in evaluation mode."""
    if isinstance(layer, _BatchNorm):
        statistics = layer.running_mean, layer.running_var, layer.eps
        return batch_norm_affine(layer.weight, layer.bias, *statistics)
    return layer.weight.double().flatten(), layer.bias.double()


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize to ``size`` (H, W), corners not aligned."""
    return F.interpolate(x, size, mode='bilinear', align_corners=False)
