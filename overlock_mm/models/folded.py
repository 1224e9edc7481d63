"""The inference-only form: everything that is linear at inference is one operation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops.depthwise import DepthwiseConv2d
from ..ops.modes import needs_plain_ops
from .blocks import DynamicConvBlock, RepConvBlock
from .layers import LayerScale, ResDWConv, affine
from .overlock import OverLoCK


def fold(model: nn.Module) -> nn.Module:
    """Turn every OverLoCK in ``model`` into its inference-only form, in place.

    Beyond the deploy form (``OverLoCK.switch_to_deploy``) it merges all batch norms,
    the identities of the residual depth-wise convolutions, the layer scales and the
    scale of the query into the convolutions beside them; scales that depend on the
    image go into the weights of the convolutions behind them. Outputs stay the same up
    to rounding. Parameters have other names and need no gradient: save and load
    checkpoints of the model before it is folded.

    Args:
        model: an OverLoCK, or a detector, segmentor or other module that has one.

    Returns:
        ``model``, in evaluation mode; ``train()`` raises from now on.

    Raises:
        ValueError: if there is no OverLoCK in ``model``.
    """
    backbones = [m for m in model.modules() if isinstance(m, OverLoCK)]
    if not backbones:
        raise ValueError(
            f'there is no OverLoCK in this {type(model).__name__}; fold() takes an '
            'OverLoCK or a model that has one'
        )
    model.eval()
    with torch.no_grad():
        for backbone in backbones:
            if not backbone.folded:
                for name in backbone.training_only:
                    setattr(backbone, name, None)
                _fold_children(backbone)
                backbone.folded = True
                backbone.requires_grad_(False)
    return model


def _fold_children(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, RepConvBlock):
            setattr(module, name, _FoldedRepConvBlock(child))
        elif isinstance(child, DynamicConvBlock):
            setattr(module, name, _FoldedDynamicConvBlock(child))
        elif isinstance(child, nn.Sequential):
            setattr(module, name, _fold_sequence(child))
        else:
            _fold_children(child)


def _fold_sequence(sequence: nn.Sequential) -> nn.Sequential:
    """Merge each batch norm or layer scale into the convolution right before it."""
    layers = []
    for layer in sequence:
        if isinstance(layer, _BatchNorm | LayerScale) and isinstance(layers[-1], nn.Conv2d):
            layers[-1] = _conv(layers[-1], after=layer)
        else:
            layers.append(layer)
    return nn.Sequential(*layers)


class _FoldedMlp(nn.Module):
    """1x1 convolution, GELU, 3x3 depth-wise convolution, GRN, 1x1 convolution, shortcut."""

    def __init__(self, expand, dwconv, norm, reduce, shortcut):
        super().__init__()
        self.expand = expand
        self.dwconv = _conv(dwconv)
        self.norm = norm
        shift = shortcut.bias if isinstance(shortcut, LayerScale) else 0
        beta = norm.beta.double().flatten()
        self.reduce = _conv(reduce, before=(torch.ones_like(beta), beta), shift=shift)
        self.shortcut = _Shortcut(shortcut)

    def forward(self, x: Tensor, shortcut: Tensor, scale: Tensor | None = None) -> Tensor:
        x = self.dwconv(_gelu_(_pointwise(x, self.expand, scale)))
        return self.shortcut(shortcut, _pointwise(x, self.reduce, self.norm.scale(x)))


class _Shortcut(nn.Module):
    """Add the shortcut, scaled, to the branch, which has the shift of the layer scale."""

    def __init__(self, scale: LayerScale | nn.Identity):
        super().__init__()
        weight = (
            scale.weight.detach().view(-1, 1, 1) if isinstance(scale, LayerScale) else None
        )
        self.register_buffer('weight', weight)

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        if self.weight is None:
            return branch.add_(shortcut)
        return branch.addcmul_(shortcut, self.weight)


class _FoldedRepConvBlock(nn.Module):
    def __init__(self, block: RepConvBlock):
        super().__init__()
        norm, large, bn, se, expand, _, dwconv, grn, reduce, _ = block.proj
        large.switch_to_deploy()
        self.dwconv = _conv(block.dwconv)
        self.norm = norm
        self.large = _conv(large.lk_origin, after=bn)
        self.se = se
        self.mlp = _FoldedMlp(expand, dwconv, grn, reduce, block.ls)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(x)
        y = self.large(self.norm(x))
        return self.mlp(y, x, self.se.scale(y))


class _FoldedDynamicConvBlock(DynamicConvBlock):
    def __init__(self, block: DynamicConvBlock):
        nn.Module.__init__(self)
        for name in ('split', 'is_first', 'is_last', 'kernel_sizes', 'num_heads'):
            setattr(self, name, getattr(block, name))
        if not block.is_first:
            (x_scale, x_shift), (h_scale, h_shift) = map(
                affine, (block.x_scale, block.h_scale)
            )
            like = block.x_scale.weight
            for name, values in dict(
                x_scale=x_scale, h_scale=h_scale, h_shift=x_shift + h_shift
            ).items():
                self.register_buffer(name, values.to(like.dtype).view(-1, 1, 1))
        self.dwconv1, self.norm1 = _conv(block.dwconv1), block.norm1
        self.fusion = _fold_sequence(block.fusion)
        self.weight_query = _conv(block.weight_query[0], after=block.weight_query[1])
        self.weight_query.weight *= block.query_scale
        self.weight_query.bias *= block.query_scale
        self.query_scale = 1
        self.weight_key = _fold_sequence(block.weight_key)
        self.weight_proj, self.rpb1, self.rpb2 = block.weight_proj, block.rpb1, block.rpb2
        self.dyconv_proj = _conv(block.dyconv_proj[0], after=block.dyconv_proj[1])
        block.lepe[0].switch_to_deploy()
        self.lepe = _conv(block.lepe[0].lk_origin, after=block.lepe[1])
        self.se_layer = block.se_layer
        self.gate = _fold_sequence(block.gate)
        self.proj = _conv(
            block.proj[1], before=affine(block.proj[0]), shift=block.ls1.bias.double()
        )
        self.shortcut = _Shortcut(block.ls1)
        self.dwconv2, self.norm2 = _conv(block.dwconv2), block.norm2
        expand, _, dwconv, grn, reduce = block.mlp
        self.mlp = _FoldedMlp(expand, dwconv, grn, reduce, block.ls2)

    def forward(self, x, context, initial_context):
        if not self.is_first:
            context = torch.addcmul(
                torch.addcmul(self.h_shift, initial_context, self.h_scale),
                context,
                self.x_scale,
            )
        joint = self.dwconv1(torch.cat((x, context), dim=1))
        joint = self.shortcut(joint, self._mix(self.norm1(joint)))
        joint = self.dwconv2(joint)
        joint = self.mlp(self.norm2(joint), joint)
        return joint if self.is_last else joint.split(self.split, dim=1)

    def _mix(self, joint):
        value = self.fusion(joint)
        mixed = self.dyconv_proj(self._contmix(joint, value)).add_(self.lepe(value))
        scale = self.se_layer.scale(mixed)
        return _pointwise(mixed.mul_(self.gate(value)), self.proj, scale)


def _conv(conv: nn.Conv2d, before=None, after=None, shift=0) -> nn.Conv2d:
    """The convolution with what stands around it merged into its weights.

    Args:
        conv: any convolution, with or without bias.
        before: scale and shift of its input, for 1x1 convolutions.
        after: batch norm or layer scale behind it.
        shift: something to add to its bias.
    """
    dtype = torch.promote_types(conv.weight.dtype, torch.float32)
    weight = conv.weight.to(dtype)
    bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.to(dtype)
    if isinstance(conv, ResDWConv):
        weight = weight.clone()
        weight[:, :, 1, 1] += 1
    if before is not None:
        scale, offset = (t.to(dtype) for t in before)
        bias = bias + weight.flatten(1) @ offset
        weight = weight * scale.view(-1, 1, 1)
    if after is not None:
        scale, offset = (t.to(dtype) for t in affine(after))
        weight, bias = weight * scale.view(-1, 1, 1, 1), bias * scale + offset
    with torch.device('meta'):  # no memory, and no random weights
        if conv.groups == 1:
            sizes = conv.in_channels, conv.out_channels, conv.kernel_size
            merged = nn.Conv2d(*sizes, conv.stride, conv.padding)
        else:
            merged = DepthwiseConv2d(conv.in_channels, conv.kernel_size[0])
    for name, values in dict(weight=weight, bias=bias + shift).items():
        values = values.to(conv.weight.dtype).contiguous()
        setattr(merged, name, nn.Parameter(values, requires_grad=False))
    return merged.eval()


# The forward passes change maps in place where nothing else reads them: fresh memory
# costs as much as the arithmetic on it.
_gelu_ = torch.ops.aten.gelu_


def _pointwise(x: Tensor, conv: nn.Conv2d, scale: Tensor | None) -> Tensor:
    """1x1 convolution of ``x * scale``, where scale is (N, C, 1, 1); may change ``x``."""
    if scale is None:
        return conv(x)
    if not needs_plain_ops() and len(x) == 1 and x[0, 0].numel() > conv.out_channels:
        # The map is larger than the weights: scale the weights. A program for other
        # sizes must not depend on that.
        weight = conv.weight * scale.to(conv.weight.dtype).view(-1, 1, 1)
        return F.conv2d(x, weight, conv.bias)
    return conv(x.mul_(scale.to(x.dtype)))
