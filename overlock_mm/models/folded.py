"""The inference-only form: everything that is linear at inference is one operation."""

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops.depthwise import DepthwiseConv2d
from ..ops.modes import is_exporting, needs_plain_ops
from ..ops.pointwise import PointwiseConv2d, pointwise_conv2d
from .blocks import ContMixBlock, DynamicConvBlock, RepConvBlock
from .contmix import ContMix
from .layers import (
    AdaptiveAvgPool2d,
    ConvMlp,
    DilatedReparamBlock,
    GlobalResponseNorm,
    LayerScale,
    ResDWConv,
    SqueezeExcite,
    UnmergeableError,
    addcmul,
    affine,
    is_plain,
    merge,
    merge_branches,
    mergeable,
)
from .overlock import OverLoCK


def switch_to_deploy(model: nn.Module) -> nn.Module:
    """Merge the dilated branches of every OverLoCK and ContMixBlock in ``model``, in place.

    The state dict is then that of the deploy form (``deploy=True``); in evaluation mode
    outputs do not change. The merged model can be fine-tuned, but not turned back.

    Args:
        model: any module.

    Returns:
        ``model``.

    Raises:
        ValueError: if there is nothing to merge in ``model``, merged or not.
        TypeError: if a branch was replaced by a layer that cannot be merged. Nothing was
            merged then.
    """
    if not any(isinstance(m, DilatedReparamBlock) for m in model.modules()):
        raise ValueError(
            f'there is no OverLoCK or ContMixBlock in this {type(model).__name__} that is '
            'not folded; switch_to_deploy() takes a model that has one'
        )
    merge_branches(model)
    for module in model.modules():
        if isinstance(module, OverLoCK):
            module.switch_to_deploy()
    return model


def fold(model: nn.Module) -> nn.Module:
    """Turn every OverLoCK and ContMixBlock in ``model`` into its inference-only form.

    It works in place.

    Beyond the deploy form (``OverLoCK.switch_to_deploy``) it merges all batch norms,
    the identities of the residual depth-wise convolutions, the layer scales and the
    scale of the query into the convolutions beside them; scales that depend on the
    image go into the weights of the convolutions behind them. Outputs stay the same up
    to rounding. Batch norms may have been fused into the convolutions before
    (``mmcv.cnn.fuse_conv_bn``). Parameters have other names and need no gradient: save
    and load checkpoints of the model before it is folded.

    Args:
        model: an OverLoCK or ContMixBlock, or a detector, segmentor or other module that
            has some.

    Returns:
        ``model``, in evaluation mode; ``train()`` raises an error from now on.

    Raises:
        ValueError: if there is no OverLoCK or ContMixBlock in ``model``.
        TypeError: if a layer that would be merged was replaced by one of another type, or
            has hooks. Nothing was merged then.
    """
    backbones = [m for m in model.modules() if isinstance(m, OverLoCK)]
    blocks = [m for m in model.modules() if isinstance(m, ContMixBlock)]
    if not backbones and not blocks:
        raise ValueError(
            f'there is no OverLoCK or ContMixBlock in this {type(model).__name__}; fold() '
            'takes one of them or a model that has one'
        )
    backbones = [b for b in backbones if not b.folded]
    blocks = [b for b in blocks if b.folded is None]
    model.eval()
    try:
        with torch.no_grad():
            replaced = [r for b in backbones for r in _folded_children(b, b.training_only)]
            forms = [_FoldedContMixBlock(mergeable(b, ContMixBlock)) for b in blocks]
    except UnmergeableError as error:
        raise error.named(model, 'fold()') from None
    for module, name, folded in replaced:
        setattr(module, name, folded)
    for backbone in backbones:
        for name in backbone.training_only:
            setattr(backbone, name, None)
        backbone.folded = True
        backbone.requires_grad_(False)
    for block, folded in zip(blocks, forms, strict=True):
        block._modules.clear()
        block._parameters.clear()
        block.folded = folded.eval().requires_grad_(False)
    return model


def prepare_for_export(model: nn.Module, plain_norms: bool = False) -> None:
    """Give a folded model, in place, the layers that make the best exported program.

    Args:
        model: any module.
        plain_norms: write layer norms over channels in plain arithmetic, without moving
            the channels to the end.
    """
    for module in model.modules():
        if type(module) is nn.AdaptiveAvgPool2d:
            module.__class__ = AdaptiveAvgPool2d
        elif isinstance(module, _FoldedDynamicConvBlock):
            module.read_joint()
        elif plain_norms and type(module) is LayerNorm2d:
            module.__class__ = _PlainLayerNorm2d


class _PlainLayerNorm2d(LayerNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(1, keepdim=True)
        scale = ((x * x).mean(1, keepdim=True) + self.eps).rsqrt()
        return x * scale * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


def _folded_children(
    module: nn.Module, left_out: tuple[str, ...] = ()
) -> list[tuple[nn.Module, str, nn.Module]]:
    """Replacements of children: (their parent, their name, the folded form)."""
    replaced = []
    for name, child in module.named_children():
        if name in left_out:
            continue
        if isinstance(child, RepConvBlock):
            folded = _FoldedRepConvBlock(mergeable(child, RepConvBlock))
            replaced.append((module, name, folded))
        elif isinstance(child, DynamicConvBlock):
            folded = _FoldedDynamicConvBlock(mergeable(child, DynamicConvBlock))
            replaced.append((module, name, folded))
        elif is_plain(child, nn.Sequential):
            replaced.append((module, name, _fold_sequence(child)))
        else:
            replaced += _folded_children(child)
    return replaced


def _fold_sequence(sequence: nn.Sequential) -> nn.Sequential:
    """Merge each batch norm or layer scale into the convolution right before it."""
    layers, convs = [], (nn.Conv2d, DepthwiseConv2d, PointwiseConv2d)
    for layer in sequence:
        if is_plain(layer, nn.Conv2d):
            layers.append(_conv(layer))
        elif (
            layers
            and is_plain(layers[-1], *convs)
            and isinstance(layer, _BatchNorm | LayerScale)
        ):
            layers[-1] = _conv(layers[-1], after=layer)
        else:
            layers.append(layer)
    return nn.Sequential(*layers)


def _fold_contmix(mixer: ContMix) -> ContMix:
    """ContMix with its batch norms and the scale of the query merged."""
    with torch.device('meta'):  # no memory, and no random weights
        folded = ContMix(
            mixer.dim,
            mixer.context_dim,
            mixer.kernel_sizes[1],
            mixer.num_heads,
            mixer.kernel_sizes[0],
        )
    query = _conv_bn(mixer.weight_query)
    query.weight *= mixer.query_scale
    query.bias *= mixer.query_scale
    folded.weight_query, folded.query_scale = query, 1
    folded.weight_key = _fold_sequence(mixer.weight_key)
    weight, bias = mixer.projection()
    folded.weight_proj.weight = _constant(weight[:, :, None, None])
    folded.weight_proj.bias = _constant(bias)
    folded.rpb1, folded.rpb2 = _constant(mixer.rpb1), _constant(mixer.rpb2)
    return folded.eval()


class _FoldedMlp(nn.Module):
    """1x1 convolution, GELU, 3x3 depth-wise convolution, GRN, 1x1 convolution, shortcut.

    Args:
        layers: the first five of these.
        shortcut: layer scale of the shortcut, or an identity.
        after: layer scale of the last convolution's output, or an identity.
    """

    def __init__(
        self, layers: list[nn.Module], shortcut: nn.Module, after: nn.Module | None = None
    ):
        super().__init__()
        expand, gelu, dwconv, norm, reduce = layers
        self.approximate = mergeable(gelu, nn.GELU).approximate
        self.expand = _conv(mergeable(expand, nn.Conv2d))
        self.dwconv = _conv(mergeable(dwconv, ResDWConv))
        self.norm = mergeable(norm, GlobalResponseNorm)
        self.reduce = _conv(
            mergeable(reduce, nn.Conv2d),
            before=(1, norm.beta.flatten()),
            after=after,
            shift=_shift(shortcut),
        )
        self.shortcut = _Shortcut(shortcut)

    def forward(self, x: Tensor, shortcut: Tensor, scale: Tensor | None = None) -> Tensor:
        x = _gelu_(_pointwise(x, self.expand, scale), approximate=self.approximate)
        x = self.dwconv(x)
        return self.shortcut(shortcut, _pointwise(x, self.reduce, self.norm.scale(x)))


class _Shortcut(nn.Module):
    """Add the shortcut, scaled, to the branch, which has the shift of the layer scale."""

    def __init__(self, scale: nn.Module):
        super().__init__()
        merged = affine(scale)
        if merged is not None:
            merged = merged[0].detach().to(scale.weight.dtype).view(-1, 1, 1)
        self.register_buffer('weight', merged)

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        if self.weight is None:
            return branch.add_(shortcut)
        if is_exporting():
            return addcmul(branch, shortcut, self.weight)
        return branch.addcmul_(shortcut, self.weight)


class _FoldedRepConvBlock(nn.Module):
    def __init__(self, block: RepConvBlock):
        super().__init__()
        norm, large, bn, se, *mlp, drop_path = mergeable(block.proj, ConvMlp)
        mergeable(drop_path, DropPath, nn.Identity)  # nothing to do at inference
        self.dwconv = _conv(mergeable(block.dwconv, ResDWConv))
        self.norm = norm
        self.large = _conv(mergeable(large, DilatedReparamBlock).merged(), after=bn)
        self.se = mergeable(se, SqueezeExcite)
        self.mlp = _FoldedMlp(mlp, block.ls)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(x)
        y = self.large(self.norm(x))
        return self.mlp(y, x, self.se.scale(y))


class _FoldedDynamicConvBlock(nn.Module):
    def __init__(self, block: DynamicConvBlock):
        super().__init__()
        self.split, self.is_first, self.is_last = block.split, block.is_first, block.is_last
        self.reads_joint = False
        if not block.is_first:
            (x_scale, x_shift), (h_scale, h_shift) = (
                affine(mergeable(scale, LayerScale))
                for scale in (block.x_scale, block.h_scale)
            )
            buffers = dict(x_scale=x_scale, h_scale=h_scale, h_shift=x_shift + h_shift)
            for name, values in buffers.items():
                values = values.to(block.x_scale.weight.dtype).view(-1, 1, 1)
                self.register_buffer(name, values)
        self.dwconv1, self.norm1 = _conv(mergeable(block.dwconv1, ResDWConv)), block.norm1
        self.fusion = _fold_sequence(mergeable(block.fusion, nn.Sequential))
        self.contmix = _fold_contmix(block)
        self.dyconv_proj = _conv_bn(block.dyconv_proj)
        large, norm = mergeable(block.lepe, nn.Sequential)
        self.lepe = _conv(mergeable(large, DilatedReparamBlock).merged(), after=norm)
        self.se_layer = mergeable(block.se_layer, SqueezeExcite)
        self.gate = _fold_sequence(mergeable(block.gate, nn.Sequential))
        norm, proj = mergeable(block.proj, nn.Sequential)
        self.proj = _conv(
            mergeable(proj, nn.Conv2d), before=affine(norm), shift=_shift(block.ls1)
        )
        self.shortcut = _Shortcut(block.ls1)
        self.dwconv2, self.norm2 = _conv(mergeable(block.dwconv2, ResDWConv)), block.norm2
        self.mlp = _FoldedMlp(list(mergeable(block.mlp, ConvMlp)), block.ls2)
        mergeable(block.drop_path, DropPath, nn.Identity)  # nothing to do at inference

    def forward(self, x, context, initial_context):
        if not self.is_first:
            context = addcmul(
                addcmul(self.h_shift, initial_context, self.h_scale), context, self.x_scale
            )
        joint = self.dwconv1(torch.cat((x, context), dim=1))
        joint = self.shortcut(joint, self._mix(self.norm1(joint)))
        joint = self.dwconv2(joint)
        joint = self.mlp(self.norm2(joint), joint)
        return joint if self.is_last else joint.split(self.split, dim=1)

    def read_joint(self) -> None:
        """Let ContMix read the joint map, with weights that are zero for the other part.

        Exported programs copy what they split, which takes longer.
        """
        if self.reads_joint:
            return
        dim, context_dim = self.split
        mixer = self.contmix
        mixer.weight_query = _widened(mixer.weight_query, 0, context_dim)
        mixer.weight_key[1] = _widened(mixer.weight_key[1], dim, 0)
        self.reads_joint = True

    def _mix(self, joint):
        value = self.fusion(joint)
        x = context = joint
        if not self.reads_joint:
            x, context = joint.split(self.split, dim=1)
        mixed = self.dyconv_proj(self.contmix(x, context, value)).add_(self.lepe(value))
        scale = self.se_layer.scale(mixed)
        return _pointwise(mixed.mul_(self.gate(value)), self.proj, scale)


class _FoldedContMixBlock(nn.Module):
    def __init__(self, block: ContMixBlock):
        super().__init__()
        (scaled1, after1), (scaled2, after2) = (
            (scale, nn.Identity()) if block.res_scale else (nn.Identity(), scale)
            for scale in (block.ls1, block.ls2)
        )
        self.dwconv1, self.norm1 = _conv(mergeable(block.dwconv1, ResDWConv)), block.norm1
        self.weight_value = _conv_bn(block.weight_value)
        self.contmix = _fold_contmix(block)
        self.fusion_proj = _conv_bn(block.fusion_proj)
        large, norm = mergeable(block.lepe, nn.Sequential)
        self.lepe = _conv(mergeable(large, DilatedReparamBlock).merged(), after=norm)
        self.se_layer = mergeable(block.se_layer, SqueezeExcite)
        self.gate = _fold_sequence(mergeable(block.gate, nn.Sequential))
        norm, proj = mergeable(block.proj, nn.Sequential)
        self.proj = _conv(
            mergeable(proj, nn.Conv2d),
            before=affine(norm),
            after=after1,
            shift=_shift(scaled1),
        )
        self.shortcut = _Shortcut(scaled1)
        self.dwconv2, self.norm2 = _conv(mergeable(block.dwconv2, ResDWConv)), block.norm2
        self.mlp = _FoldedMlp(list(mergeable(block.mlp, ConvMlp)), scaled2, after=after2)
        mergeable(block.drop_path, DropPath, nn.Identity)  # nothing to do at inference

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv1(x)
        x = self.shortcut(x, self._mix(self.norm1(x)))
        x = self.dwconv2(x)
        return self.mlp(self.norm2(x), x)

    def _mix(self, x: Tensor) -> Tensor:
        mixed = self.fusion_proj(self.contmix(x, x, self.weight_value(x)))
        mixed = mixed.add_(self.lepe(x))
        scale = self.se_layer.scale(mixed)
        return _pointwise(mixed.mul_(self.gate(x)), self.proj, scale)


def _conv(
    conv: nn.Conv2d,
    before: tuple[Tensor | int, Tensor] | None = None,
    after: nn.Module | None = None,
    shift: Tensor | int = 0,
) -> nn.Conv2d:
    """The convolution with what stands around it merged into its weights.

    Args:
        conv: any convolution, with or without bias.
        before: scale and shift of its input, for 1x1 convolutions.
        after: batch norm or layer scale behind it; nothing if it is an identity.
        shift: added to its bias.
    """
    weight, bias = merge(conv, after)
    if isinstance(conv, ResDWConv):
        weight = weight.clone()
        weight[:, :, 1, 1] += 1
    if before is not None:
        scale, offset = before
        bias = bias + weight.flatten(1) @ offset.to(weight.dtype)
        weight = weight * (scale if isinstance(scale, int) else scale.view(-1, 1, 1))
    with torch.device('meta'):  # no memory, and no random weights
        if conv.groups == 1 and conv.kernel_size == conv.stride == (1, 1):
            merged = PointwiseConv2d(conv.in_channels, conv.out_channels)
        elif conv.groups == 1:
            sizes = conv.in_channels, conv.out_channels, conv.kernel_size
            merged = nn.Conv2d(*sizes, conv.stride, conv.padding)
        else:
            merged = DepthwiseConv2d(conv.in_channels, conv.kernel_size[0])
    merged.weight = _constant(weight.to(conv.weight.dtype))
    merged.bias = _constant((bias + shift).to(conv.weight.dtype))
    return merged.eval()


def _widened(conv: nn.Conv2d, before: int, after: int) -> nn.Conv2d:
    """A 1x1 convolution that ignores channels before and after those it had."""
    with torch.device('meta'):
        channels = before + conv.in_channels + after
        wide = PointwiseConv2d(channels, conv.out_channels)
    wide.weight = _constant(F.pad(conv.weight, (0, 0, 0, 0, before, after)))
    wide.bias = conv.bias
    return wide.eval()


def _conv_bn(layers: nn.Sequential) -> nn.Conv2d:
    """A convolution and its batch norm as one convolution."""
    conv, norm = mergeable(layers, nn.Sequential)
    return _conv(mergeable(conv, nn.Conv2d), after=norm)


def _shift(shortcut: nn.Module) -> Tensor | int:
    """Return what the layer scale of a shortcut adds; the branch adds it instead."""
    merged = affine(shortcut)
    return 0 if merged is None else merged[1]


def _constant(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().contiguous(), requires_grad=False)


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
        return pointwise_conv2d(x, weight, conv.bias)
    return conv(x.mul_(scale.to(x.dtype)))
