"""The OverLoCK backbone (https://arxiv.org/abs/2502.20087)."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch
from mmengine.model import BaseModule
from mmengine.model.weight_init import PretrainedInit, update_init_info
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d, trunc_normal_
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..archs import (
    ARCHS,
    PARTS_FROM,
    STRIDES,
    channels_of,
    context_channels,
    settings_of,
)
from ..checkpoint import load_checkpoint
from ..ops.modes import is_compiling
from .blocks import DynamicConvBlock, RepConvBlock
from .layers import DilatedReparamBlock, LayerScale, resize

_MIN_SIDE = 32


@MODELS.register_module()
class OverLoCK(BaseModule):
    """OverLoCK, in the form that dense prediction uses: four multi-scale maps.

    A Base-Net (stages 1 to 3) encodes the image. The Overview-Net (stage 4) takes
    a quick look on from stage 3, and what it sees, the context, is handed to the
    Focus-Net, which goes over stage 3's map again with dynamic kernels guided by
    that context (ContMix). The paper is
    `OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing
    Dynamic Kernels <https://arxiv.org/abs/2502.20087>`_.

    Where an argument takes stage numbers, 0 to 2 are stages 1 to 3 of the Base-Net
    (0 with the stem), 3 is the Overview-Net, and 4 the Focus-Net.

    Args:
        arch (str | dict): 'xt', 't', 's' or 'b' (long names: 'extreme-tiny',
            'tiny', 'small', 'base'), or a dict with the fields of an entry of
            ``arch_settings``.
        in_channels (int): channels of the image. Defaults to 3.
        out_indices (int | Sequence[int]): which of the four maps (strides 4, 8, 16, 32)
            to return, in increasing order. What a map that is not asked for would
            need is neither built nor run. Defaults to (0, 1, 2, 3).
        context_skip (bool): add the Overview-Net's context to the last map, as the
            released detection models do; the segmentation models do not. Defaults
            to False.
        drop_path_rate (float): stochastic depth rate of the last block; it grows
            linearly from 0 over the blocks. Defaults to 0.
        frozen_stages (int): freeze (no gradient, evaluation mode) every stage up to
            this number; -1 freezes nothing. The norm before stage 3 freezes with
            it, the other output norms and all that joins the parts with 4, which
            freezes the whole backbone. Defaults to -1.
        norm_eval (bool): keep batch norms in evaluation mode while training, so
            that they use their running statistics and leave them as they are.
            Defaults to False.
        with_cp (bool | int | Sequence[int]): recompute activations in the backward pass
            to save memory, in all stages or in those listed. Outputs, gradients and
            running statistics stay the same. Defaults to False.
        deploy (bool): build the deploy form, in which every large kernel is one
            convolution. Defaults to False.
        init_cfg (dict | list[dict], optional): initialisation config. Loading
            (``type='Pretrained'``) fails if anything but classifier heads and the
            output norms of the dense form differs. Defaults to None.

    Attributes:
        out_channels (tuple[int]): channels of the returned maps.
        out_strides (tuple[int]): strides of the returned maps.

    Examples:
        >>> backbone = OverLoCK('xt').eval()
        >>> [tuple(m.shape) for m in backbone(torch.rand(1, 3, 64, 96))]
        [(1, 56, 16, 24), (1, 112, 8, 12), (1, 340, 4, 6), (1, 420, 2, 3)]
        >>> backbone.out_channels == OverLoCK.channels_of('xt')
        True
    """

    arch_settings = ARCHS
    strides = STRIDES
    # Children that only training uses; fold() drops them.
    training_only: tuple[str, ...] = ()

    @classmethod
    def channels_of(cls, arch: str | dict) -> tuple[int, int, int, int]:
        """Channels of the four maps (of strides ``OverLoCK.strides``) of ``arch``."""
        return channels_of(arch)

    def __init__(
        self,
        arch: str | dict = 't',
        in_channels: int = 3,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        context_skip: bool = False,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool | int | Sequence[int] = False,
        deploy: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ):
        super().__init__(init_cfg)
        settings = settings_of(arch)
        dims, kernels = settings['embed_dims'], settings['kernel_sizes']
        depths, focus_depths = settings['depths'], settings['focus_depths']
        heads, context_dim = settings['focus_heads'], context_channels(arch)
        channels = self.channels_of(arch)
        out_indices = _as_tuple(out_indices)
        if not out_indices or list(out_indices) != sorted(set(out_indices) & set(range(4))):
            raise ValueError(
                f'out_indices={out_indices} must be increasing and within '
                '0..3, for instance (0, 1, 2, 3)'
            )
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate={drop_path_rate} must be in [0, 1)')
        if frozen_stages not in range(-1, 5):
            raise ValueError(f'frozen_stages={frozen_stages} must be within -1..4')
        if isinstance(with_cp, bool):
            with_cp = range(5) if with_cp else ()
        with_cp = _as_tuple(with_cp)
        if not set(with_cp) <= set(range(5)):
            raise ValueError(f'with_cp={with_cp} must be True, False or stages of 0..4')
        self.in_channels = in_channels
        self.out_indices = out_indices
        self.out_channels = tuple(channels[i] for i in out_indices)
        self.out_strides = tuple(self.strides[i] for i in out_indices)
        self.context_skip = context_skip
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.with_cp = with_cp
        self.deploy = deploy
        self.folded = False  # see overlock_mm.fold
        deepest = out_indices[-1]

        blocks = sum(depths) + sum(focus_depths)
        rates = (drop_path_rate * i / (blocks - 1) for i in range(blocks))

        def stage(i):
            return nn.ModuleList(
                RepConvBlock(
                    dims[i],
                    kernels[i],
                    layer_scale=i >= 2,
                    drop_path=next(rates),
                    deploy=deploy,
                )
                for _ in range(depths[i])
            )

        def focus_stage(i):
            return nn.ModuleList(
                DynamicConvBlock(
                    dims[i + 2],
                    context_dim,
                    kernels[i + 2],
                    heads[i],
                    is_first=i == 0 and j == 0,
                    is_last=i == 1 and j == focus_depths[1] - 1,
                    drop_path=next(rates),
                    deploy=deploy,
                )
                for j in range(focus_depths[i])
            )

        # Base-Net
        self.patch_embed1 = _stem(in_channels, dims[0])
        self.blocks1 = stage(0)
        if deepest >= 1:
            self.patch_embed2 = _downsample(dims[0], dims[1])
            self.blocks2 = stage(1)
        if deepest >= 2:
            self.patch_embed3 = _downsample(dims[1], dims[2])
            self.blocks3 = stage(2)
            # Overview-Net
            self.patch_embed4 = _downsample(dims[2], dims[3])
            self.blocks4 = stage(3)
            # Focus-Net
            self.high_level_proj = nn.Conv2d(dims[3], context_dim, 1)
            self.sub_blocks3 = focus_stage(0)
        if deepest == 3:
            self.patch_embedx = nn.ModuleDict(
                dict(
                    x_proj=_downsample(dims[2], dims[3]),
                    h_proj=_downsample(context_dim, context_dim),
                )
            )
            self.sub_blocks4 = focus_stage(1)

        # Output norms. Stage 3 reads the normed second map.
        needed = {*out_indices, *((1,) if deepest >= 2 else ())}
        self.extra_norm = nn.ModuleList(
            LayerNorm2d(c) if i in needed else nn.Identity() for i, c in enumerate(channels)
        )
        if context_skip and deepest == 3:
            self.extra_norm.append(LayerNorm2d(dims[3]))
            self.h_proj = nn.Sequential(
                nn.Conv2d(dims[3], channels[3], 1), LayerScale(channels[3], 1e-5)
            )

        self.apply(init_weights)
        self._freeze_stages()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the maps.

        Args:
            x: images, ``(N, in_channels, H, W)``, both sides at least 32.

        Returns:
            The maps of ``out_indices``; the one of stride s has the shape
            ``(N, channels, ceil(H / s), ceil(W / s))`` and, outside autocast, the
            dtype of ``x``.

        Raises:
            ValueError: if ``x`` has another number of dimensions or channels, or
                is too small.
        """
        maps, _ = self._encode(x, self.out_indices[-1])
        return tuple(maps[i] for i in self.out_indices)

    def _encode(self, x: Tensor, deepest: int) -> tuple[dict[int, Tensor], Tensor | None]:
        """All maps up to index ``deepest``, and the Overview-Net's map if it ran."""
        if x.ndim != 4 or x.shape[1] != self.in_channels or min(x.shape[2:]) < _MIN_SIDE:
            raise ValueError(
                f'OverLoCK takes images (N, {self.in_channels}, H, W) with H and W at '
                f'least {_MIN_SIDE}, got {tuple(x.shape)}; resize or pad the images, or '
                'set in_channels'
            )
        maps, overview = {}, None
        x = self._base_stage(0, self.patch_embed1(x))
        maps[0] = self.extra_norm[0](x)
        if deepest >= 1:
            x = self._base_stage(1, self.patch_embed2(x))
            maps[1] = self.extra_norm[1](x)
        if deepest >= 2:
            x = self._base_stage(2, self.patch_embed3(maps[1]))
            overview = self._base_stage(3, self.patch_embed4(x))
            initial = self.high_level_proj(overview)
            x, context = self._focus_stage(
                self.sub_blocks3, x, resize(initial, x.shape[2:])
            )
            maps[2] = self.extra_norm[2](torch.cat((x, context), dim=1))
        if deepest == 3:
            x = self.patch_embedx['x_proj'](x)
            context = self.patch_embedx['h_proj'](context)
            x = self._focus_stage(self.sub_blocks4, x, initial, context)
            maps[3] = self.extra_norm[3](x)
            if self.context_skip:
                maps[3] = maps[3] + self.h_proj(self.extra_norm[4](overview))
        return maps, overview

    def _base_stage(self, stage: int, x: Tensor) -> Tensor:
        for block in getattr(self, f'blocks{stage + 1}'):
            x = self._run(stage, block, x)
        return x

    def _focus_stage(self, blocks, x, initial_context, context=None):
        """Thread (x, context) through the blocks; the context starts as the initial."""
        state = (x, initial_context if context is None else context)
        for block in blocks:
            state = self._run(4, block, *state, initial_context)
        return state

    def _run(self, stage: int, block: nn.Module, *inputs: Tensor):
        if stage not in self.with_cp or not torch.is_grad_enabled():
            return block(*inputs)
        if is_compiling():
            # the compiler updates the running statistics once by itself, and takes no
            # context_fn
            return checkpoint(block, *inputs, use_reentrant=False)
        return checkpoint(
            block,
            *inputs,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), _StatisticsKept(block)),
        )

    def switch_to_deploy(self) -> None:
        """Merge the dilated branches of every large kernel, in place.

        The state dict is then that of ``OverLoCK(..., deploy=True)``; in evaluation
        mode outputs do not change. The merged model can be fine-tuned, but not
        turned back.
        """
        for module in self.modules():
            if isinstance(module, DilatedReparamBlock):
                module.switch_to_deploy()
        self.deploy = True
        self._freeze_stages()

    def init_weights(self) -> None:
        """Initialise as ``init_cfg`` says; pretrained weights load or raise.

        Raises:
            CheckpointError: if the checkpoint of ``init_cfg`` is not of this backbone.
        """
        if self.is_init:  # as in mmengine: a second call changes nothing
            return
        init_cfg = self.init_cfg
        cfgs = [init_cfg] if isinstance(init_cfg, dict) else list(init_cfg or [])
        pretrained = [c for c in cfgs if c['type'] in ('Pretrained', PretrainedInit)]
        others = [c for c in cfgs if c not in pretrained]
        self.init_cfg = [*others, *(dict(c, type=_CheckedPretrained) for c in pretrained)]
        super().init_weights()
        self.init_cfg = init_cfg

    def __prepare_scriptable__(self):
        """Called by ``torch.jit.script``, also for a model that has an OverLoCK."""
        raise RuntimeError(
            f'{type(self).__name__} cannot be scripted: torch.jit.script does not take '
            'its Python code. Use torch.jit.trace(model.eval(), images), torch.export or '
            'torch.compile instead'
        )

    def train(self, mode: bool = True):
        if mode and self.folded:
            raise RuntimeError(
                'a folded OverLoCK has no batch norms to train with: build the model '
                'again and load its checkpoint to train it; fold() is for inference only'
            )
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _freeze_stages(self) -> None:
        if self.frozen_stages == 4:
            frozen = list(self.children())
        else:
            frozen = [
                getattr(self, f'{name}{i + 1}', None)
                for i in range(self.frozen_stages + 1)
                for name in ('patch_embed', 'blocks')
            ]
            if self.frozen_stages >= 2:
                frozen.append(self.extra_norm[1])
        for module in frozen:
            if module is not None:
                module.eval().requires_grad_(False)

    def absent_parts(self) -> tuple[str, ...]:
        """Prefixes of the state-dict entries that ``out_indices`` leaves out."""
        deepest = self.out_indices[-1]
        parts = [
            part for depth, names in PARTS_FROM.items() if depth > deepest for part in names
        ]
        parts += [
            f'extra_norm.{i}'
            for i, norm in enumerate(self.extra_norm)
            if isinstance(norm, nn.Identity)
        ]
        if self.context_skip and deepest < 3:
            parts += ['extra_norm.4', 'h_proj']
        return tuple(f'{part}.' for part in parts)


def _as_tuple(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _stem(in_channels: int, dim: int) -> nn.Sequential:
    conv = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
    half = dim // 2
    return nn.Sequential(
        conv(in_channels, half, stride=2),
        nn.BatchNorm2d(half),
        nn.GELU(),
        conv(half, half),
        nn.BatchNorm2d(half),
        nn.GELU(),
        conv(half, dim, stride=2),
        nn.BatchNorm2d(dim),
        nn.GELU(),
        conv(dim, dim),
        nn.BatchNorm2d(dim),
    )


def _downsample(in_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_dim, out_dim, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(out_dim),
    )


def init_weights(module: nn.Module) -> None:
    """Start a convolution from a truncated normal of std 0.02 and zero biases."""
    if isinstance(module, nn.Conv2d):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class _CheckedPretrained:
    """In place of mmengine's ``Pretrained``, which loads what fits and goes on."""

    def __init__(self, checkpoint: str, **options):
        self.checkpoint, self.options = checkpoint, options

    def __call__(self, module: nn.Module) -> None:
        load_checkpoint(module, self.checkpoint, **self.options)
        if hasattr(module, '_params_init_info'):
            update_init_info(module, f'Pretrained: load from {self.checkpoint}')


class _StatisticsKept:
    """Let a recomputation update copies of the running statistics, not them again.

    A context that can be entered again, for a second backward pass.
    """

    def __init__(self, module: nn.Module):
        self.norms = [
            m for m in module.modules() if isinstance(m, _BatchNorm) and m.training
        ]

    def __enter__(self):
        self.kept = [dict(norm._buffers) for norm in self.norms]
        for norm, buffers in zip(self.norms, self.kept, strict=True):
            norm._buffers.update(
                {k: v.clone() for k, v in buffers.items() if v is not None}
            )

    def __exit__(self, *error):
        for norm, buffers in zip(self.norms, self.kept, strict=True):
            norm._buffers.update(buffers)
