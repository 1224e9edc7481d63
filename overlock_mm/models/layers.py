"""Layers that the blocks share; attribute names are the released state-dict names."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import type_before_parametrizations

from ..archs import DILATED_BRANCHES
from ..ops.conv_mlp import conv_mlp
from ..ops.depthwise import DepthwiseConv2d
from ..ops.flops import counters, is_counted_trace
from ..ops.grn import channel_norms, global_response_norm, relative_norms
from ..ops.modes import is_exporting, needs_plain_ops
from ..ops.reparam import batch_norm_affine, branch_names, sum_branches
from .recompute import without_input


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
        return global_response_norm(x, self.gamma, self.beta, self.eps)

    def scale(self, x: Tensor) -> Tensor:
        """Factor of ``x``, ``(N, C, 1, 1)``, in float32 at least."""
        ratio, _ = relative_norms(channel_norms(x), self.eps)
        return self.gamma * ratio + 1


class ConvMlp(nn.Sequential):
    """MLP over the channels, with a depth-wise convolution and GRN between its layers.

    While gradients are computed, :func:`overlock_mm.ops.conv_mlp.conv_mlp` does what the
    five layers of the MLP do, with less memory. If one of them was replaced by a layer of
    another type or has hooks, the layers are called one by one.

    Args:
        dim: channels C of the input and the output.
        hidden: channels between.
        before: layers in front of the MLP.
        after: layers behind it.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        before: Sequence[nn.Module] = (),
        after: Sequence[nn.Module] = (),
    ):
        super().__init__(
            *before,
            nn.Conv2d(dim, hidden, 1),
            nn.GELU(),
            ResDWConv(hidden),
            GlobalResponseNorm(hidden),
            nn.Conv2d(hidden, dim, 1),
            *after,
        )
        self.first = len(before)

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self)
        mlp = layers[self.first : self.first + 5]
        if not torch.is_grad_enabled() or needs_plain_ops() or not _is_plain_mlp(mlp):
            return super().forward(x)
        for layer in layers[: self.first]:
            x = layer(x)
        conv1, gelu, depthwise, grn, conv2 = mlp
        x = conv_mlp(
            x,
            conv1.weight,
            conv1.bias,
            depthwise.weight,
            depthwise.bias,
            grn.gamma,
            grn.beta,
            conv2.weight,
            conv2.bias,
            grn.eps,
            gelu.approximate,
        )
        for layer in layers[self.first + 5 :]:
            x = layer(x)
        return x


def _is_plain_mlp(layers):
    types = nn.Conv2d, nn.GELU, ResDWConv, GlobalResponseNorm, nn.Conv2d
    if len(layers) != len(types) or counters():
        return False
    plain = all(is_plain(*pair) for pair in zip(layers, types, strict=True))
    convs = layers[::4]
    return plain and all(c.kernel_size == (1, 1) and c.bias is not None for c in convs)


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
        if self.deploy:
            return self.lk_origin(x)
        branches = [(self.lk_origin, self.origin_bn)]
        for k, r in self.branches:
            names = f'dil_conv_k{k}_{r}', f'dil_bn_k{k}_{r}'
            branches.append(tuple(getattr(self, name) for name in names))
        lean, out = _can_make_again(conv for conv, _ in branches), None
        for conv, bn in branches:
            branch = without_input(conv, bn, x) if lean else bn(conv(x))
            out = branch if out is None else out + branch
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


def _can_make_again(layers):
    if not torch.is_grad_enabled() or needs_plain_ops() or counters():
        return False
    return all(is_plain(layer, DepthwiseConv2d) for layer in layers)


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
