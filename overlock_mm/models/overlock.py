"""The OverLoCK backbone (https://arxiv.org/abs/2502.20087)."""

from collections.abc import Sequence
from functools import partial

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..archs import (
    ARCHS,
    PARTS_FROM,
    STRIDES,
    context_channels,
    map_channels,
    settings_of,
)
from ..checkpoint import check_form, load_checkpoint
from ..errors import CheckpointError
from ..openmmlab import (
    MODELS,
    WEIGHT_INITIALIZERS,
    BaseModule,
    PretrainedInit,
    update_init_info,
)
from .blocks import DynamicConvBlock, RepConvBlock
from .layers import (
    LayerScale,
    contiguous_as,
    folded_error,
    init_weights,
    merge_branches,
    resize,
)
from .recompute import checkpointed

_MIN_SIDE = 32


@MODELS.register_module()
class OverLoCK(BaseModule):
    """OverLoCK as a backbone for dense prediction: four maps of strides 4 to 32.

    It looks at an image twice. The Base-Net (stages 1 to 3) encodes the image. The
    Overview-Net (stage 4) goes on from stage 3 in a few blocks: what it sees is the
    context. The Focus-Net (two stages) goes over stage 3's map again, with dynamic
    kernels that are guided by the context (ContMix). The paper is
    `OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing
    Dynamic Kernels <https://arxiv.org/abs/2502.20087>`_.

    The first two maps are those of stages 1 and 2, the last two those of the Focus-Net.

    Args:
        arch (str | dict): 'xt', 't', 's' or 'b' (or in full 'extreme-tiny', 'tiny',
            'small', 'base'), or a dict with the same fields as a value of
            ``arch_settings``. Defaults to 't'.
        in_channels (int): channels of the image. Defaults to 3.
        out_indices (int | Sequence[int]): which of the four maps to return, in
            increasing order. Layers that none of them needs are neither built nor run.
            Defaults to (0, 1, 2, 3).
        context_skip (bool): add the Overview-Net's map to the last map, as the released
            detection models do; the segmentation models do not. Defaults to False.
        drop_path_rate (float): stochastic depth rate of the last block; it grows
            linearly from 0 over the blocks. Defaults to 0.
        frozen_stages (int): freeze (no gradient, evaluation mode) the stem and this many
            stages, as in MMDetection's and MMSegmentation's backbones. -1: nothing;
            0: the stem; 1, 2 or 3: the stem and the Base-Net's stages up to this one,
            with the downsampling in front of each, and with 3 also the norm through
            which stage 3 reads the second map; 4: the whole backbone. The other output
            norms, the Overview-Net and the Focus-Net are frozen with 4 only. Defaults
            to -1.
        norm_eval (bool): keep batch norms in evaluation mode while training, so that
            they use their running statistics and do not update them. Defaults to False.
        with_cp (bool | int | Sequence[int]): activation checkpointing: recompute
            activations in the backward pass to save memory. True: in all stages; or
            only in those listed: 0, 1 and 2 are stages 1, 2 and 3 of the Base-Net, 3
            is the Overview-Net, 4 the Focus-Net. Outputs, gradients and running
            statistics stay the same. Defaults to False.
        deploy (bool): build the deploy form, in which every large kernel is one
            convolution. Defaults to False.
        init_cfg (dict | list[dict], optional): initialisation config. Loading
            (``type='Pretrained'``) raises an error if anything but classifier heads and
            the output norms differs. Defaults to None.

    Attributes:
        out_channels (tuple[int]): channels of the returned maps.
        out_strides (tuple[int]): strides of the returned maps.
        arch_settings (dict): sizes of the named architectures, see
            ``overlock_mm.archs``.

    Raises:
        ValueError: if an argument is not one of the values above.

    Examples:
        >>> backbone = OverLoCK('xt').eval()
        >>> [tuple(m.shape) for m in backbone(torch.rand(1, 3, 64, 96))]
        [(1, 56, 16, 24), (1, 112, 8, 12), (1, 340, 4, 6), (1, 420, 2, 3)]
        >>> backbone.out_channels == OverLoCK.channels_of('xt')
        True
    """

    arch_settings = ARCHS
    strides = STRIDES
    # Children that are used in training only; fold() drops them.
    training_only: tuple[str, ...] = ()

    @classmethod
    def channels_of(cls, arch: str | dict) -> tuple[int, int, int, int]:
        """Channels of the four maps (of strides ``OverLoCK.strides``) of ``arch``."""
        return map_channels(settings_of(arch, cls.arch_settings))

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
        settings = settings_of(arch, self.arch_settings)
        channels = map_channels(settings)
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate={drop_path_rate} must be in [0, 1)')
        if frozen_stages not in range(-1, 5):
            raise ValueError(
                f'frozen_stages={frozen_stages} must be within -1..4: -1 for none, 0 for '
                'the stem, 1 to 3 for that many stages too, 4 for the whole backbone'
            )
        self.in_channels = in_channels
        self.out_indices = _checked_indices(out_indices)
        self.out_channels = tuple(channels[i] for i in self.out_indices)
        self.out_strides = tuple(self.strides[i] for i in self.out_indices)
        self.context_skip = context_skip
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.with_cp = _checked_stages(with_cp)
        self.deploy = deploy
        self.folded = False  # see overlock_mm.fold

        self._build(settings, drop_path_rate)
        self._build_output_norms(channels)
        self.apply(init_weights)
        self._freeze_stages()

    def _build(self, settings: dict[str, tuple[int, ...]], drop_path_rate: float) -> None:
        """Build the three nets, as far as the deepest map that is returned needs them."""
        dims, kernels = settings['embed_dims'], settings['kernel_sizes']
        context_dim = context_channels(settings)
        base_rates, focus_rates = _drop_path_rates(
            drop_path_rate, settings['depths'], settings['focus_depths']
        )

        def stage(i: int) -> nn.ModuleList:
            return nn.ModuleList(
                RepConvBlock(
                    dims[i],
                    kernels[i],
                    layer_scale=i >= 2,
                    drop_path=rate,
                    deploy=self.deploy,
                )
                for rate in base_rates[i]
            )

        def focus_stage(i: int) -> nn.ModuleList:
            return nn.ModuleList(
                DynamicConvBlock(
                    dims[i + 2],
                    context_dim,
                    kernels[i + 2],
                    settings['focus_heads'][i],
                    is_first=i == 0 and j == 0,
                    is_last=i == 1 and j == len(focus_rates[1]) - 1,
                    drop_path=rate,
                    deploy=self.deploy,
                )
                for j, rate in enumerate(focus_rates[i])
            )

        deepest = self.out_indices[-1]
        # Base-Net
        self.patch_embed1 = _stem(self.in_channels, dims[0])
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
            self.high_level_proj = nn.Conv2d(dims[3], context_dim, 1)
            # Focus-Net
            self.sub_blocks3 = focus_stage(0)
        if deepest >= 3:
            self.patch_embedx = nn.ModuleDict(
                dict(
                    x_proj=_downsample(dims[2], dims[3]),
                    h_proj=_downsample(context_dim, context_dim),
                )
            )
            self.sub_blocks4 = focus_stage(1)

    def _build_output_norms(self, channels: Sequence[int]) -> None:
        """One norm for each map, and what adds the Overview-Net's map to the last one.

        Stage 3 reads the second map behind its norm.
        """
        needed = set(self.out_indices)
        if self.out_indices[-1] >= 2:
            needed.add(1)
        self.extra_norm = nn.ModuleList(
            LayerNorm2d(c) if i in needed else nn.Identity() for i, c in enumerate(channels)
        )
        if self.context_skip and self.out_indices[-1] >= 3:
            overview_dim, dim = self.high_level_proj.in_channels, channels[3]
            self.extra_norm.append(LayerNorm2d(overview_dim))
            self.h_proj = nn.Sequential(
                nn.Conv2d(overview_dim, dim, 1), LayerScale(dim, 1e-5)
            )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the maps.

        Args:
            x: images, ``(N, in_channels, H, W)``, both sides at least 32.

        Returns:
            The maps of ``out_indices``; the one of stride s has the shape
            ``(N, channels, ceil(H / s), ceil(W / s))`` and, outside autocast, the
            dtype of ``x``. Contiguous images give contiguous maps.

        Raises:
            ValueError: if ``x`` has another number of dimensions or channels, or
                is too small.
        """
        maps, _ = self._encode(x, self.out_indices[-1])
        return tuple(contiguous_as(x, maps[i]) for i in self.out_indices)

    def _encode(self, x: Tensor, deepest: int) -> tuple[list[Tensor], Tensor | None]:
        """The maps up to index ``deepest``, and the Overview-Net's map if it ran."""
        x = _checked_image(x, self.in_channels)
        # Base-Net
        x = self._stage(0, self.patch_embed1(x))
        maps = [self.extra_norm[0](x)]
        if deepest == 0:
            return maps, None
        x = self._stage(1, self.patch_embed2(x))
        maps.append(self.extra_norm[1](x))
        if deepest == 1:
            return maps, None
        x = self._stage(2, self.patch_embed3(maps[1]))
        # Overview-Net
        overview = self._stage(3, self.patch_embed4(x))
        initial = self.high_level_proj(overview)
        # Focus-Net
        enlarged = resize(initial, x.shape[2:])
        x, context = self._focus_stage(self.sub_blocks3, x, enlarged, enlarged)
        maps.append(self.extra_norm[2](torch.cat((x, context), dim=1)))
        if deepest == 2:
            return maps, overview
        x = self.patch_embedx['x_proj'](x)
        context = self.patch_embedx['h_proj'](context)
        x = self._focus_stage(self.sub_blocks4, x, context, initial)
        maps.append(self.extra_norm[3](x))
        if self.context_skip:
            maps[3] = maps[3] + self.h_proj(self.extra_norm[4](overview))
        return maps, overview

    def _stage(self, stage: int, x: Tensor) -> Tensor:
        """Run the blocks of a stage of the Base-Net (0 to 2) or the Overview-Net (3)."""
        for block in getattr(self, f'blocks{stage + 1}'):
            x = self._run(stage, block, x)
        return x

    def _focus_stage(
        self, blocks: nn.ModuleList, x: Tensor, context: Tensor, initial_context: Tensor
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Run the blocks of a stage of the Focus-Net, which go on changing the context."""
        for block in blocks:
            out = self._run(4, block, x, context, initial_context)
            if block.is_last:
                return out
            x, context = out
        return x, context

    def _run(self, stage: int, block: nn.Module, *inputs: Tensor):
        if stage in self.with_cp and torch.is_grad_enabled():
            return checkpointed(block, block, *inputs)
        return block(*inputs)

    def switch_to_deploy(self) -> None:
        """Merge the dilated branches of every large kernel, in place.

        The state dict is then that of ``OverLoCK(..., deploy=True)``; in evaluation
        mode outputs do not change. The merged model can be fine-tuned, but not
        turned back. Batch norms may have been fused into the convolutions before
        (``mmcv.cnn.fuse_conv_bn``).

        Raises:
            TypeError: if a branch was replaced by a layer that cannot be merged.
        """
        merge_branches(self)
        self.deploy = True
        self._freeze_stages()

    def init_weights(self) -> None:
        """Initialise as ``init_cfg`` says; pretrained weights are loaded strictly.

        Raises:
            CheckpointError: if the checkpoint of ``init_cfg`` does not fit this backbone,
                or is for a part of it alone, in ``override``.
        """
        if self.is_init:  # as in mmengine: a second call changes nothing
            return
        given, inside = self.init_cfg, hasattr(self, '_params_init_info')
        try:
            self.init_cfg = _checked(given)
            super().init_weights()
        except Exception:
            if not inside:  # mmengine's records, which it would take for an outer model's
                for module in self.modules():
                    module.__dict__.pop('_params_init_info', None)
            raise
        finally:
            self.init_cfg = given

    def train(self, mode: bool = True):
        if mode and self.folded:
            raise folded_error(self)
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Refuse weights of another form or size, whoever loads them.

        The toolboxes' ``init_model``, ``init_detector`` and inferencers load what fits and
        only log the rest.
        """
        if not self.folded:
            check_form(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __prepare_scriptable__(self):
        """Called by ``torch.jit.script``, also for a model that has an OverLoCK."""
        raise RuntimeError(
            f'{type(self).__name__} cannot be scripted: torch.jit.script does not take '
            'its Python code. Use torch.jit.trace(model.eval(), images), torch.export or '
            'torch.compile instead'
        )

    def _freeze_stages(self) -> None:
        if self.frozen_stages < 0:
            return
        if self.frozen_stages == 4:
            names = [name for name, _ in self.named_children()]
        else:
            stages = range(1, self.frozen_stages + 1)
            names = ['patch_embed1']
            names += [f'{part}{i}' for i in stages for part in ('patch_embed', 'blocks')]
        frozen = [getattr(self, name) for name in names if hasattr(self, name)]
        if self.frozen_stages == 3 and hasattr(self, 'blocks3'):
            frozen.append(self.extra_norm[1])
        for module in frozen:
            module.eval().requires_grad_(False)

    def absent_parts(self) -> tuple[str, ...]:
        """Prefixes of the state-dict names that ``out_indices`` leaves out."""
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


@torch.fx.wrap  # one node of a graph: what it looks at is not known while tracing
def _checked_image(x: Tensor, channels: int) -> Tensor:
    if x.ndim != 4 or x.shape[1] != channels or min(x.shape[2:]) < _MIN_SIDE:
        raise ValueError(
            f'OverLoCK takes images (N, {channels}, H, W) with H and W at least '
            f'{_MIN_SIDE}, got {tuple(x.shape)}; resize or pad the images, or set '
            'in_channels'
        )
    return x


def _checked_indices(out_indices: int | Sequence[int]) -> tuple[int, ...]:
    indices = _as_tuple(out_indices)
    if not indices or list(indices) != sorted(set(indices) & set(range(4))):
        raise ValueError(
            f'out_indices={out_indices} must be increasing and within 0..3, for instance '
            '(0, 1, 2, 3)'
        )
    return indices


def _checked_stages(with_cp: bool | int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(with_cp, bool):
        with_cp = range(5) if with_cp else ()
    stages = _as_tuple(with_cp)
    if not set(stages) <= set(range(5)):
        raise ValueError(
            f'with_cp={with_cp} must be True, False or a list of stages within 0..4'
        )
    return stages


def _as_tuple(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _drop_path_rates(
    last: float, depths: Sequence[int], focus_depths: Sequence[int]
) -> tuple[list[list[float]], list[list[float]]]:
    """Stochastic depth rates of each stage's blocks: of stages 1 to 4, of the Focus-Net.

    They grow linearly, from 0 in the first block to ``last``.
    """
    counts = (*depths, *focus_depths)
    step = last / (sum(counts) - 1)
    starts = [sum(counts[:i]) for i in range(len(counts))]
    rates = [
        [step * (start + j) for j in range(count)]
        for start, count in zip(starts, counts, strict=True)
    ]
    return rates[: len(depths)], rates[len(depths) :]


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


class _CheckedPretrained:
    """Instead of mmengine's ``Pretrained``, which loads what fits and ignores the rest."""

    def __init__(self, checkpoint: str, **options):
        self.checkpoint, self.options = checkpoint, options

    def __call__(self, module: nn.Module) -> None:
        load_checkpoint(module, self.checkpoint, **self.options)
        if hasattr(module, '_params_init_info'):
            update_init_info(module, f'Pretrained: load from {self.checkpoint}')


def _checked(init_cfg: dict | Sequence[dict] | None) -> list[dict]:
    """A copy of an ``init_cfg`` that loads strictly; pretrained weights come last."""
    cfgs = [init_cfg] if isinstance(init_cfg, dict) else list(init_cfg or [])
    for cfg in cfgs:
        overrides = cfg.get('override') or []
        overrides = [overrides] if isinstance(overrides, dict) else overrides
        if any(_is_pretrained(override) for override in overrides):
            raise CheckpointError(
                'init_cfg has a Pretrained in override, which would load what fits and '
                "ignore the rest; give the whole backbone's init_cfg=dict("
                "type='Pretrained', checkpoint=...) instead"
            )
    others = [cfg for cfg in cfgs if not _is_pretrained(cfg)]
    pretrained = [dict(c, type=_CheckedPretrained) for c in cfgs if _is_pretrained(c)]
    return [*others, *pretrained]


def _is_pretrained(cfg: dict) -> bool:
    """Whether an initializer loads a file, however its type is written."""
    kind = cfg.get('type')
    if isinstance(kind, str):  # with or without a scope
        kind = WEIGHT_INITIALIZERS.get(kind)
    return isinstance(kind, type) and issubclass(kind, PretrainedInit)
