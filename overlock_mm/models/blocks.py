"""The two residual blocks of OverLoCK, and ContMix as a block for any network."""

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d
from torch import Tensor, nn

from ..openmmlab import MODELS
from ..ops.depthwise import DepthwiseConv2d
from .contmix import ContMix
from .layers import (
    ConvMlp,
    DilatedReparamBlock,
    GlobalResponseNorm,
    LayerScale,
    ResDWConv,
    SqueezeExcite,
    contiguous_as,
    conv_bn,
    folded_error,
    init_weights,
    merge_branches,
)
from .recompute import checkpointed


class RepConvBlock(nn.Module):
    """Block of the Base-Net and the Overview-Net: a large static kernel, then an MLP.

    ``(N, C, H, W)`` -> same shape.

    Args:
        dim: channels C.
        kernel_size: large kernel of the dilated re-parameterised convolution.
        mlp_ratio: hidden width of the MLP as a multiple of ``dim``.
        layer_scale: scale the shortcut by a LayerScale.
        drop_path: stochastic depth rate.
        deploy: build the deploy form.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        mlp_ratio: int = 4,
        layer_scale: bool = False,
        drop_path: float = 0.0,
        deploy: bool = False,
    ):
        super().__init__()
        self.dwconv = ResDWConv(dim)
        mixing = [
            LayerNorm2d(dim),
            DilatedReparamBlock(dim, kernel_size, deploy),
            nn.BatchNorm2d(dim),
            SqueezeExcite(dim),
        ]
        self.proj = ConvMlp(dim, mlp_ratio * dim, mixing, [DropPath(drop_path)])
        self.ls = LayerScale(dim) if layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(x)
        return self.ls(x) + self.proj(x)


class DynamicConvBlock(ContMix):
    """Block of the Focus-Net: ContMix guided by the Overview-Net's context, then an MLP.

    It inherits from :class:`ContMix`, rather than having one, because the released
    state-dict names have no prefix for it.

    Args:
        dim: channels C of the feature map.
        context_dim: channels Cc of the context.
        kernel_size: large kernel K of ContMix and of the static branch beside it.
        num_heads: half the number of heads of each of ContMix's two kernels.
        mlp_ratio: hidden width of the MLP as a multiple of ``dim``.
        is_first: first block of the Focus-Net, whose running context is the initial
            context itself.
        is_last: last block of the Focus-Net, which returns both parts joined.
        drop_path: stochastic depth rate.
        deploy: build the deploy form.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        kernel_size: int,
        num_heads: int,
        mlp_ratio: int = 3,
        is_first: bool = False,
        is_last: bool = False,
        drop_path: float = 0.0,
        deploy: bool = False,
    ):
        super().__init__(dim, context_dim, kernel_size, 2 * num_heads)
        joint, hidden = dim + context_dim, mlp_ratio * dim
        self.split = (dim, context_dim)
        self.is_first = is_first
        self.is_last = is_last
        if not is_first:
            self.x_scale = LayerScale(context_dim)
            self.h_scale = LayerScale(context_dim)
        self.dwconv1 = ResDWConv(joint)
        self.norm1 = LayerNorm2d(joint)
        self.fusion = nn.Sequential(
            DepthwiseConv2d(joint, 3),
            nn.BatchNorm2d(joint),
            nn.GELU(),
            nn.Conv2d(joint, dim, 1),
            GlobalResponseNorm(dim),
        )
        # optimizers store their state by the order of the parameters, which is this one
        for name in ('weight_query', 'weight_key', 'weight_proj'):
            self.add_module(name, self._modules.pop(name))
        self.dyconv_proj = conv_bn(dim, dim)
        self.lepe = nn.Sequential(
            DilatedReparamBlock(dim, kernel_size, deploy), nn.BatchNorm2d(dim)
        )
        self.se_layer = SqueezeExcite(dim)
        self.gate = nn.Sequential(*conv_bn(dim, dim), nn.SiLU())
        self.proj = nn.Sequential(nn.BatchNorm2d(dim), nn.Conv2d(dim, joint, 1))

        self.dwconv2 = ResDWConv(joint)
        self.norm2 = LayerNorm2d(joint)
        self.mlp = ConvMlp(joint, hidden)
        self.ls1 = LayerScale(joint)
        self.ls2 = LayerScale(joint)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Tensor, context: Tensor, initial_context: Tensor
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Run the block.

        Args:
            x: feature map, ``(N, C, H, W)``.
            context: running context, ``(N, Cc, H, W)``.
            initial_context: the Overview-Net's context, ``(N, Cc, H, W)``.

        Returns:
            The new ``(x, context)``, or, from the last block, both joined on
            channels, ``(N, C + Cc, H, W)``.
        """
        if not self.is_first:
            context = self.x_scale(context) + self.h_scale(initial_context)
        joint = self.dwconv1(torch.cat((x, context), dim=1))
        joint = self.ls1(joint) + self.drop_path(self._mix(self.norm1(joint)))
        joint = self.dwconv2(joint)
        joint = self.ls2(joint) + self.drop_path(self.mlp(self.norm2(joint)))
        return joint if self.is_last else joint.split(self.split, dim=1)

    def _mix(self, joint: Tensor) -> Tensor:
        """Gated sum of dynamic (ContMix) and static (lepe) large-kernel mixing."""
        value = self.fusion(joint)
        x, context = joint.split(self.split, dim=1)
        dynamic = self.dyconv_proj(super().forward(x, context, value))
        return self.proj(self.gate(value) * self.se_layer(dynamic + self.lepe(value)))


@MODELS.register_module()
class ContMixBlock(ContMix):
    """ContMix as a residual block that can be put into any network.

    ``(N, C, H, W)`` -> same shape, for any height and width. The context is the feature
    map itself. It is the stand-alone block of the released code, with its state-dict
    names; it differs from the block of the Focus-Net, which is guided by the Overview-Net.

    Args:
        dim (int): channels C, a multiple of ``4 * num_heads``.
        num_heads (int): half the number of heads of each of ContMix's two kernels.
            Defaults to 2.
        kernel_size (int): large kernel size of ContMix and of the static branch beside
            it, a key of ``overlock_mm.archs.DILATED_BRANCHES``. Defaults to 7.
        small_kernel_size (int): small kernel size of ContMix, odd. Defaults to 5.
        mlp_ratio (int): hidden width of the MLP as a multiple of ``dim``. Defaults to 4.
        res_scale (bool): put the layer scales on the shortcuts, not on the branches.
            Defaults to False.
        layer_scale_init (float, optional): initial value of the layer scales; None: no
            layer scales. Defaults to None.
        drop_path (float): stochastic depth rate. Defaults to 0.
        deploy (bool): build the deploy form, in which the static large kernel is one
            convolution. Defaults to False.
        with_cp (bool): recompute activations in the backward pass to save memory.
            Defaults to False.

    Raises:
        ValueError: if an argument is not one of the values above.

    Examples:
        >>> block = ContMixBlock(64, kernel_size=13)
        >>> block(torch.rand(2, 64, 20, 30)).shape
        torch.Size([2, 64, 20, 30])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 2,
        kernel_size: int = 7,
        small_kernel_size: int = 5,
        mlp_ratio: int = 4,
        res_scale: bool = False,
        layer_scale_init: float | None = None,
        drop_path: float = 0.0,
        deploy: bool = False,
        with_cp: bool = False,
    ):
        super().__init__(dim, dim, kernel_size, 2 * num_heads, small_kernel_size)
        hidden = int(mlp_ratio * dim)
        self.res_scale = res_scale
        self.with_cp = with_cp
        self.dwconv1 = ResDWConv(dim)
        self.norm1 = LayerNorm2d(dim)
        self.weight_value = conv_bn(dim, dim)
        self.fusion_proj = conv_bn(dim, dim)
        self.lepe = nn.Sequential(
            DilatedReparamBlock(dim, kernel_size, deploy), nn.BatchNorm2d(dim)
        )
        self.se_layer = SqueezeExcite(dim)
        self.gate = nn.Sequential(*conv_bn(dim, dim), nn.SiLU())
        self.proj = nn.Sequential(nn.BatchNorm2d(dim), nn.Conv2d(dim, dim, 1))
        self.dwconv2 = ResDWConv(dim)
        self.norm2 = LayerNorm2d(dim)
        self.mlp = ConvMlp(dim, hidden)
        self.ls1, self.ls2 = (
            nn.Identity() if layer_scale_init is None else LayerScale(dim, layer_scale_init)
            for _ in range(2)
        )
        self.drop_path = DropPath(drop_path)
        self.folded = None  # what fold() makes of this block
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        if self.folded is not None:
            out = self.folded(x)
        elif self.with_cp and torch.is_grad_enabled():
            out = checkpointed(self._forward, self, x)
        else:
            out = self._forward(x)
        return contiguous_as(x, out)

    def _forward(self, x: Tensor) -> Tensor:
        x = self.dwconv1(x)
        x = self._add(x, self._mix(self.norm1(x)), self.ls1)
        x = self.dwconv2(x)
        return self._add(x, self.mlp(self.norm2(x)), self.ls2)

    def _add(self, shortcut: Tensor, branch: Tensor, scale: nn.Module) -> Tensor:
        if self.res_scale:
            return scale(shortcut) + self.drop_path(branch)
        return shortcut + self.drop_path(scale(branch))

    def _mix(self, x: Tensor) -> Tensor:
        """Gated sum of dynamic (ContMix) and static (lepe) large-kernel mixing."""
        enlarged = self.enlarged(x, x.shape[-2:])
        mixed = super().forward(enlarged, enlarged, self.weight_value(enlarged))
        if enlarged is not x:
            mixed = F.adaptive_avg_pool2d(mixed, x.shape[-2:])
        mixed = self.se_layer(self.fusion_proj(mixed) + self.lepe(x))
        return self.proj(self.gate(x) * mixed)

    def switch_to_deploy(self) -> None:
        """Merge the dilated branches of the static large kernel, in place.

        See :func:`overlock_mm.switch_to_deploy` for all blocks of a model.

        Raises:
            TypeError: if a branch was replaced by a layer that cannot be merged.
        """
        merge_branches(self)

    def train(self, mode: bool = True):
        if mode and self.folded is not None:
            raise folded_error(self)
        return super().train(mode)
