"""Layers that the blocks share; attribute names are the released state-dict names."""

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import type_before_parametrizations

from ..archs import DILATED_BRANCHES
from ..ops.depthwise import DepthwiseConv2d
from ..ops.flops import is_counted_trace
from ..ops.modes import differentiable_gradients, is_exporting, needs_plain_ops
from ..ops.reparam import batch_norm_affine, branch_names, sum_branches


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
        self.weight = nn.Parameter(torch.full((dim, 1, 1, 1), float(init_value)))
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
        """Factor of ``x``, ``(N, C, 1, 1)``."""
        return self.proj(x)


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """``nn.AdaptiveAvgPool2d`` that can be exported for maps of any size.

    While a model is exported, the means are two matrix products.
    """

    def forward(self, x: Tensor) -> Tensor:
        size = self.output_size
        rows, columns = (size, size) if isinstance(size, int) else size
        if not is_exporting() or is_counted_trace() or (rows, columns) == (1, 1):
            return super().forward(x)
        height, width = x.shape[-2:]
        rows = _means(height if rows is None else rows, height, x)
        columns = _means(width if columns is None else columns, width, x)
        return rows @ (x @ columns.t())


def _means(bins: int, size: int, like: Tensor) -> Tensor:
    """Matrix (bins, size) whose products are the means over bins of an axis."""
    i = torch.arange(bins, device=like.device)[:, None]
    position = torch.arange(size, device=like.device)
    start, stop = i * size // bins, ((i + 1) * size + bins - 1) // bins
    inside = (position >= start) & (position < stop)
    return inside.to(like.dtype) / (stop - start).to(like.dtype)


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
        """Factor of ``x``, ``(N, C, 1, 1)``, in float32 at least."""
        ratio, _ = _relative_norms(channel_norms(x), self.eps)
        return self.gamma * ratio + 1


def _grn(x, gamma, beta, eps):
    """GRN in differentiable operations."""
    ratio, _ = _relative_norms(channel_norms(x), eps)
    scale = gamma * ratio + 1
    return addcmul(beta.to(x.dtype), x, scale.to(x.dtype))


class _GlobalResponseNorm(torch.autograd.Function):
    """One pass over the map for the output and two for the gradient; keeps the input."""

    @staticmethod
    def forward(ctx, x, gamma, beta, eps):
        norms = channel_norms(x)
        ratio, mean = _relative_norms(norms, eps)
        scale = gamma * ratio + 1
        ctx.save_for_backward(x, gamma, beta, scale, norms, mean)
        ctx.eps = eps
        return torch.addcmul(beta.to(x.dtype), x, scale.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, gamma, beta, scale, norms, mean = ctx.saved_tensors
        if torch.is_grad_enabled():
            norm = partial(_grn, eps=ctx.eps)
            return *differentiable_gradients(norm, (x, gamma, beta), grad), None
        grad_scale = (grad * x).sum((2, 3), keepdim=True, dtype=norms.dtype)
        grad_ratio = grad_scale * gamma
        grad_norms = grad_ratio / mean
        grad_norms -= (grad_norms * norms / mean).mean(1, keepdim=True)
        # the norm's gradient is x / norm, and zero for a channel of zeros
        per_x = torch.where(norms > 0, grad_norms / norms, 0)
        grad_x = (grad * scale.to(grad.dtype)).addcmul_(x, per_x.to(grad.dtype))
        grad_gamma = (grad_scale * norms / mean).sum(0, keepdim=True)
        grad_beta = grad.sum((0, 2, 3), dtype=norms.dtype).view_as(gamma)
        return grad_x, grad_gamma.to(gamma.dtype), grad_beta.to(beta.dtype), None


def _relative_norms(norms, eps):
    mean = norms.mean(dim=1, keepdim=True) + eps
    return norms / mean, mean


def channel_norms(x: Tensor) -> Tensor:
    """L2 norm of every channel over the map, ``(N, C, 1, 1)``, in float32 at least."""
    # a trace is the same with gradients and, when torch checks it, without
    differentiated = x.requires_grad and torch.is_grad_enabled() or torch.jit.is_tracing()
    if (
        x.device.type == 'cpu'
        and x.dtype.itemsize >= 4
        and x.numel()
        and not (differentiated or needs_plain_ops())
    ):
        # batch norm's statistics are torch's fastest sums over a map by far
        stats = [torch.batch_norm_update_stats(i, None, None, 0.0) for i in x.split(1)]
        means, variances = (torch.stack(s) for s in zip(*stats, strict=True))
        return ((variances + means.square()) * x[0, 0].numel()).sqrt()[:, :, None, None]
    dtype = torch.promote_types(x.dtype, torch.float32)
    if not differentiated:
        return torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True, dtype=dtype)
    # a root, unlike the norm, can be kept from dividing by zero in a second derivative
    squares = x.to(dtype).square().sum((2, 3), keepdim=True)
    return torch.where(squares > 0, squares, 1).sqrt() * (squares > 0)


class DilatedReparamBlock(nn.Module):
    """Large depth-wise convolution, trained with parallel dilated branches.

    In the training form it is the sum of one k x k and several small dilated depth-wise
    convolutions, each with its batch norm (https://arxiv.org/abs/2311.15599). In the
    deploy form all of them are one k x k depth-wise convolution with bias.
    ``(N, C, H, W)`` -> same shape.

    Args:
        dim: channels C.
        kernel_size: size of the large kernel, a key of ``DILATED_BRANCHES``.
        deploy: build the deploy form.

    Raises:
        ValueError: if ``kernel_size`` has no dilated branches.
    """

    def __init__(self, dim: int, kernel_size: int, deploy: bool = False):
        super().__init__()
        if kernel_size not in DILATED_BRANCHES:
            raise ValueError(
                f'kernel_size={kernel_size} has no dilated branches; choose '
                f'one of {sorted(DILATED_BRANCHES)}'
            )
        self.kernel_size = kernel_size
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
            conv, bn = (
                getattr(self, f'dil_conv_k{k}_{r}'),
                getattr(self, f'dil_bn_k{k}_{r}'),
            )
            out = out + bn(conv(x))
        return out

    @torch.no_grad()
    def merged(self) -> nn.Conv2d:
        """All branches as one convolution; the block stays as it is.

        Raises:
            UnmergeableError: if a branch is not a convolution with a batch norm behind it,
                or with one that was fused into it.
        """
        if self.deploy:
            return mergeable(self.lk_origin, DepthwiseConv2d)
        branches = []
        for conv, (bn, _, dilation) in branch_names(self.kernel_size).items():
            conv = mergeable(getattr(self, conv), DepthwiseConv2d)
            branches.append((*merge(conv, getattr(self, bn)), dilation))
        kernel, bias = sum_branches(branches)
        like = self.lk_origin.weight
        with torch.device('meta'):  # no memory, and no random weights
            merged = DepthwiseConv2d(len(kernel), self.kernel_size)
        merged.weight = nn.Parameter(kernel.to(like.dtype))
        merged.bias = nn.Parameter(bias.to(like.dtype))
        return merged.train(self.training)

    def switch_to_deploy(self) -> None:
        """Merge all branches into one convolution, in place; idempotent."""
        if self.deploy:
            return
        merged = self.merged()
        for conv, (bn, *_) in branch_names(self.kernel_size).items():
            delattr(self, conv)
            delattr(self, bn)
        self.lk_origin = merged
        self.branches, self.deploy = (), True


class UnmergeableError(TypeError):
    """A layer that cannot be merged with those around it.

    Attributes:
        layer: the layer.
    """

    def __init__(self, layer: nn.Module):
        super().__init__(f'a layer of type {type(layer).__name__}')
        self.layer = layer

    def named(self, model: nn.Module, action: str) -> TypeError:
        """The error to show, with the name of the layer in ``model``."""
        name = next((n for n, m in model.named_modules() if m is self.layer), '?')
        return TypeError(
            f'{action} cannot merge {name!r}, a {type(self.layer).__name__} that is not '
            'part of OverLoCK or has hooks. Merge adapters into the layers that they wrap, '
            f'remove hooks and pruning masks, or call {action} before they are added. '
            'Nothing was changed'
        )


def is_plain(layer: nn.Module, *types: type) -> bool:
    """Whether ``layer`` is exactly of one of ``types`` and computes what that type does.

    Then its weights can be read in place of calling it. Parametrizations are allowed, as
    reading gives their values.
    """
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    own = 'forward' in vars(layer)  # replaced in this one layer
    return type_before_parametrizations(layer) in types and not hooks and not own


def mergeable(layer: nn.Module, *types: type) -> nn.Module:
    """``layer``, or an ``UnmergeableError`` if it is not plainly of one of ``types``."""
    if not is_plain(layer, *types):
        raise UnmergeableError(layer)
    return layer


def affine(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Scale and shift of a layer in evaluation mode, ``(C,)`` each in float64.

    Args:
        layer: batch norm, LayerScale, or an identity, as is left where a batch norm was
            fused into the convolution before it.

    Returns:
        None for an identity.

    Raises:
        UnmergeableError: if it is another layer, or a batch norm without statistics.
    """
    if isinstance(layer, _BatchNorm) and layer.running_var is not None:
        mean, var = layer.running_mean, layer.running_var
        weight = torch.ones_like(mean) if layer.weight is None else layer.weight
        bias = torch.zeros_like(mean) if layer.bias is None else layer.bias
        mergeable(layer, type_before_parametrizations(layer))
        return batch_norm_affine(weight, bias, mean, var, layer.eps)
    if isinstance(mergeable(layer, LayerScale, nn.Identity), nn.Identity):
        return None
    return layer.weight.double().flatten(), layer.bias.double()


def merge(conv: nn.Conv2d, after: nn.Module | None = None) -> tuple[Tensor, Tensor]:
    """Weight and bias, in float64, of a convolution with the layer behind it."""
    weight = conv.weight.double()
    bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.double()
    scale_and_shift = None if after is None else affine(after)
    if scale_and_shift is not None:
        scale, shift = scale_and_shift
        weight, bias = weight * scale.view(-1, 1, 1, 1), bias * scale + shift
    return weight, bias


def conv_bn(in_dim: int, out_dim: int) -> nn.Sequential:
    """1x1 convolution and batch norm."""
    return nn.Sequential(nn.Conv2d(in_dim, out_dim, 1, bias=False), nn.BatchNorm2d(out_dim))


def addcmul(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``x + a * b``; exporters write ``torch.addcmul`` as three operations."""
    return x + a * b if is_exporting() else torch.addcmul(x, a, b)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize to ``size`` (H, W), corners not aligned."""
    return F.interpolate(x, size, mode='bilinear', align_corners=False)


@torch.fx.wrap
def contiguous_as(image: Tensor, x: Tensor) -> Tensor:
    """``x``, contiguous if the image is.

    Norms over the channels return maps in channels_last memory, and convolutions pass
    that on. Code outside torch may not expect it: mmcv's RoIAlign reads all memory as
    contiguous, without a check, and hands wrong features to the heads.
    """
    return x.contiguous() if image.is_contiguous() else x


def init_weights(module: nn.Module) -> None:
    """Initialise a convolution: truncated normal of std 0.02, and zero biases."""
    # on the meta device there are no values, and drawing them takes most of the time
    if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def folded_error(module: nn.Module) -> RuntimeError:
    """The error for ``train()`` after ``fold()``."""
    return RuntimeError(
        f'a folded {type(module).__name__} has no batch norms to train with: build the '
        'model again and load its checkpoint to train it; fold() is for inference only'
    )


def merge_branches(model: nn.Module, action: str = 'switch_to_deploy()') -> None:
    """Merge the dilated branches of every large kernel in ``model``, in place; idempotent.

    Raises:
        TypeError: if a branch was replaced by a layer that cannot be merged. Nothing was
            merged then.
    """
    blocks = [m for m in model.modules() if isinstance(m, DilatedReparamBlock)]
    try:
        for block in blocks:
            block.merged()  # all of them, or none
    except UnmergeableError as error:
        raise error.named(model, action) from None
    for block in blocks:
        block.switch_to_deploy()
