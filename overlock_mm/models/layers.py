"""Layers that the blocks share; attribute names are the released state-dict names."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Kernel size and dilation of the branches beside each large kernel, as in
# UniRepLKNet (https://arxiv.org/abs/2311.15599).
DILATED_BRANCHES = {
    19: ((5, 1), (7, 1), (9, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    5: ((3, 1), (3, 2)),
}


class ResDWConv(nn.Conv2d):
    """3x3 depth-wise convolution added to its input, ``(N, C, H, W)`` -> same."""

    def __init__(self, dim: int):
        super().__init__(dim, dim, 3, padding=1, groups=dim)

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
        return x * self.proj(x)


class GlobalResponseNorm(nn.Module):
    """GRN of ConvNeXt V2 (https://arxiv.org/abs/2301.00808), channels first.

    ``(gamma * n + 1) * x + beta``, where ``n`` is each channel's L2 norm over the
    map divided by the mean of these norms over the channels.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.zeros(1, dim, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        norm = norm / (norm.mean(dim=1, keepdim=True) + self.eps)
        return (self.gamma * norm + 1) * x + self.beta


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
        self.lk_origin = nn.Conv2d(
            dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=deploy
        )
        if deploy:
            return
        self.origin_bn = nn.BatchNorm2d(dim)
        for k, r in self.branches:
            conv = nn.Conv2d(
                dim, dim, k, padding=r * (k - 1) // 2, dilation=r, groups=dim, bias=False
            )
            self.add_module(f'dil_conv_k{k}_{r}', conv)
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
        kernel, bias = _fuse_bn(old.weight, self.origin_bn)
        for k, r in self.branches:
            conv, bn = self._branch(k, r)
            branch_kernel, branch_bias = _fuse_bn(conv.weight, bn)
            reach = r * (k - 1) // 2
            edge = old.kernel_size[0] // 2 - reach
            span = slice(edge, edge + 2 * reach + 1, r)
            kernel[:, :, span, span] += branch_kernel
            bias += branch_bias
            delattr(self, f'dil_conv_k{k}_{r}')
            delattr(self, f'dil_bn_k{k}_{r}')
        del self.origin_bn
        self.lk_origin = nn.Conv2d(
            old.in_channels,
            old.out_channels,
            old.kernel_size,
            padding=old.padding,
            groups=old.groups,
            device=kernel.device,
            dtype=old.weight.dtype,
        )
        self.lk_origin.weight.copy_(kernel)
        self.lk_origin.bias.copy_(bias)
        self.lk_origin.train(self.training)
        self.branches, self.deploy = (), True


def _fuse_bn(kernel: Tensor, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Float64 kernel and bias of a bias-free convolution followed by ``bn``."""
    scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    bias = bn.bias.double() - bn.running_mean.double() * scale
    return kernel.double() * scale.view(-1, 1, 1, 1), bias


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize to ``size`` (H, W), corners not aligned."""
    return F.interpolate(x, size, mode='bilinear', align_corners=False)
