"""Any model of timm as a backbone, to compare with under the same recipe."""

from collections.abc import Sequence

import timm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..archs import STRIDES
from ..openmmlab import MODELS, BaseModule
from .layers import contiguous_as


@MODELS.register_module()
class TimmBackbone(BaseModule):
    """A model of timm as a backbone: maps of the given strides.

    Args:
        model_name (str): name of a model that timm can build with ``features_only``, such
            as 'convnext_base.fb_in1k'.
        out_strides (Sequence[int]): strides of the maps to return, in increasing order.
            Of several maps of one stride it is the deepest. Defaults to (4, 8, 16, 32).
        pretrained (bool): load timm's pretrained weights. Defaults to False.
        in_channels (int): channels of the image. Defaults to 3.
        norm_eval (bool): keep batch norms in evaluation mode while training. Defaults to
            False.
        with_cp (bool): recompute activations in the backward pass to save memory. Defaults
            to False.
        init_cfg (dict | list[dict], optional): initialisation config. Defaults to None.
        **options: other arguments of ``timm.create_model``, such as ``drop_path_rate``.

    Attributes:
        out_channels (tuple[int]): channels of the returned maps.
        out_strides (tuple[int]): their strides.

    Raises:
        ValueError: if the model has no maps of these strides.

    Examples:
        >>> backbone = TimmBackbone('resnet18', out_strides=(8, 16)).eval()
        >>> [tuple(m.shape) for m in backbone(torch.rand(1, 3, 64, 96))]
        [(1, 128, 8, 12), (1, 256, 4, 6)]
    """

    def __init__(
        self,
        model_name: str,
        out_strides: Sequence[int] = STRIDES,
        pretrained: bool = False,
        in_channels: int = 3,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
        **options,
    ):
        super().__init__(init_cfg)
        build = dict(in_chans=in_channels, features_only=True, **options)
        info = timm.create_model(model_name, **build).feature_info
        deepest = {stride: i for i, stride in enumerate(info.reduction())}
        missing = [stride for stride in out_strides if stride not in deepest]
        if missing or list(out_strides) != sorted(set(out_strides)):
            raise ValueError(
                f'out_strides={tuple(out_strides)} of {model_name} must be increasing and '
                f'among the strides of its maps: {sorted(deepest)}'
            )
        indices = [deepest[stride] for stride in out_strides]
        self.model = timm.create_model(
            model_name, pretrained=pretrained, out_indices=indices, **build
        )
        if with_cp:
            self.model.set_grad_checkpointing(True)
        self.norm_eval = norm_eval
        self.out_channels = tuple(self.model.feature_info.channels())
        self.out_strides = tuple(out_strides)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the maps, ``(N, C, H / stride, W / stride)``, of ``out_strides``."""
        maps = []
        for out, channels in zip(self.model(x), self.out_channels, strict=True):
            # some transformers of timm return (N, H, W, C)
            if out.shape[1] != channels and out.shape[3] == channels:
                out = out.permute(0, 3, 1, 2)
            maps.append(contiguous_as(x, out))
        return tuple(maps)

    def init_weights(self) -> None:
        """Initialise as ``init_cfg`` says; timm has initialised the rest."""
        if self.init_cfg:
            super().init_weights()

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self
