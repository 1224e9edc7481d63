"""OverLoCK as an image classifier, with timm's interface, and its loss."""

from collections.abc import Sequence

import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..archs import PARTS_FROM, map_channels, settings_of
from .layers import contiguous_as, init_weights
from .overlock import OverLoCK

_HEAD_WIDTH = 1024
_POOLS = ('avg', 'max', 'avgmax', '')


class OverLoCKClassifier(OverLoCK):
    """OverLoCK with the heads of the ImageNet models, with timm's interface.

    The network is that of :class:`OverLoCK` without output norms, so stage 3 reads the
    second map as it is. The main head reads the last map; an auxiliary head, which is
    used in training only, reads the Overview-Net's map. State-dict names are those of the
    released ImageNet weights.

    Args:
        arch: as in :class:`OverLoCK`.
        num_classes: number of classes; with 0 there are no classifiers, and the model
            returns the features that the main one would read, ``(N, 1024)``.
        in_chans: channels of the image.
        drop_rate: dropout rate in front of the main classifier.
        drop_path_rate: stochastic depth rate of the last block.
        deploy: build the deploy form.
        aux_head: build the auxiliary head; without it, training too returns one tensor.
        global_pool: pooling in front of the classifiers: ``'avg'`` (that of the released
            weights), ``'max'``, ``'avgmax'``, or ``''`` for none: the model then returns
            maps, ``(N, num_classes or 1024, ceil(H / 32), ceil(W / 32))``.

    Attributes:
        feature_info: channels, stride and module of the four maps.
        num_features: channels of the last map.
        head_hidden_size: channels that the main classifier reads.

    Raises:
        ValueError: if ``global_pool`` is none of the above, or as in :class:`OverLoCK`.
    """

    training_only = ('aux_head',)

    def __init__(
        self,
        arch: str | dict = 't',
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        deploy: bool = False,
        aux_head: bool = True,
        global_pool: str = 'avg',
    ):
        super().__init__(
            arch,
            in_channels=in_chans,
            out_indices=3,
            drop_path_rate=drop_path_rate,
            deploy=deploy,
        )
        settings = settings_of(arch, self.arch_settings)
        channels = map_channels(settings)
        self.extra_norm = nn.ModuleList(nn.Identity() for _ in channels)
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.has_aux_head = aux_head
        self.num_classes = num_classes
        self.feature_info = [
            dict(num_chs=c, reduction=s, module=f'extra_norm.{i}')
            for i, (c, s) in enumerate(zip(channels, self.strides, strict=True))
        ]
        self.num_features = channels[3]
        self.head_hidden_size = _HEAD_WIDTH
        self.overview_features = settings['embed_dims'][3]
        self.global_pool = _checked_pool(global_pool)
        self.head = nn.Sequential(
            nn.Conv2d(channels[3], _HEAD_WIDTH, 1, bias=False),
            nn.BatchNorm2d(_HEAD_WIDTH),
            nn.SiLU(),
            SelectAdaptivePool2d(pool_type=global_pool),
            _classifier(_HEAD_WIDTH, num_classes),
        )
        self.head.apply(init_weights)
        self.aux_head = self._make_aux_head()

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the logits.

        Args:
            x: images, ``(N, in_chans, H, W)``, both sides at least 32.

        Returns:
            The logits ``(N, num_classes)``; in training the main and the auxiliary
            ones, for :class:`AuxiliaryLoss`. Without classes only the features,
            ``(N, 1024)``, in training too. Without pooling all of them are maps.
        """
        deepest = self.out_indices[-1]
        maps, overview = self._encode(x, deepest)
        logits = self.forward_head(maps[deepest])
        if self.training and self.aux_head is not None:
            return logits, self._flattened(self.aux_head(overview))
        return logits

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map, ``(N, num_features, ceil(H / 32), ceil(W / 32))``."""
        deepest = self.out_indices[-1]
        return self._encode(x, deepest)[0][deepest]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Main logits of the last map, or with ``pre_logits`` the features in front."""
        if self.head is None:
            return x
        *layers, classifier = self.head
        for layer in layers:
            x = layer(x)
        if not pre_logits:
            x = classifier(F.dropout(x, self.drop_rate, self.training))
        return self._flattened(x)

    def _flattened(self, x: Tensor) -> Tensor:
        return x.flatten(1) if self.global_pool else x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Compute several of the four maps.

        Args:
            x: images, ``(N, in_chans, H, W)``.
            indices: indices of the maps, in the order wanted; a number takes that many
                of the last ones, None all.
            norm: without effect, as the maps of a classifier have no norms.
            stop_early: run only the layers that the maps need.
            output_fmt: must be ``'NCHW'``.
            intermediates_only: return only the list.

        Returns:
            The last map that was computed, and the list of the maps.

        Raises:
            ValueError: if ``output_fmt`` is another one.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt={output_fmt!r} must be 'NCHW'")
        deepest = self.out_indices[-1]
        indices, last = feature_take_indices(deepest + 1, indices)
        if stop_early:
            deepest = last
        maps, _ = self._encode(x, deepest)
        wanted = [contiguous_as(x, maps[i]) for i in indices]
        return wanted if intermediates_only else (maps[deepest], wanted)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove the layers that the maps of ``indices`` do not need, and the heads.

        Args:
            indices: indices of the maps to keep; a number keeps that many of the last.
            prune_norm: without effect, as there are no norms.
            prune_head: remove the heads even if the last map is kept.

        Returns:
            The indices as non-negative numbers.
        """
        taken, last = feature_take_indices(self.out_indices[-1] + 1, indices)
        for depth, parts in PARTS_FROM.items():
            for part in parts if depth > last else ():
                if hasattr(self, part):
                    delattr(self, part)
        self.out_indices = tuple(sorted(set(taken)))
        self.out_channels = tuple(self.feature_info[i]['num_chs'] for i in self.out_indices)
        self.out_strides = tuple(self.strides[i] for i in self.out_indices)
        if prune_head or last < 3:
            self.head = self.aux_head = None
            self.num_classes = 0
            self.num_features = self.head_hidden_size = self.out_channels[-1]
        return taken

    def get_classifier(self) -> nn.Module:
        """The main classifier, a 1x1 convolution on the pooled features."""
        self._check_head()
        return self.head[-1]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifiers of both heads by fresh ones.

        Args:
            num_classes: number of classes; 0 removes the classifiers.
            global_pool: as in the constructor; None keeps the pooling.

        Raises:
            ValueError: if ``global_pool`` is another value.
            RuntimeError: if the head was pruned.
        """
        self._check_head()
        if global_pool is not None:
            self.global_pool = _checked_pool(global_pool)
            self.head[3] = SelectAdaptivePool2d(pool_type=global_pool)
        self.num_classes = num_classes
        like = next(self.head.parameters())
        self.head[-1] = _classifier(_HEAD_WIDTH, num_classes).to(like.device, like.dtype)
        self.head[-1].apply(init_weights)
        old = self.aux_head
        # a folded model has none, as it cannot be trained
        self.aux_head = None if self.folded else self._make_aux_head()
        if self.aux_head is not None:
            if old is not None:
                self.aux_head[0] = old[0]
            self.aux_head.to(like.device, like.dtype).train(self.training)

    def _check_head(self) -> None:
        if self.head is None:
            raise RuntimeError(
                'this model was pruned to its features and has no head; build it again '
                'to classify'
            )

    def _make_aux_head(self) -> nn.Sequential | None:
        if not self.num_classes or not self.has_aux_head:
            return None
        dim = self.overview_features
        head = nn.Sequential(
            nn.BatchNorm2d(dim),
            SelectAdaptivePool2d(pool_type=self.global_pool),
            _classifier(dim, self.num_classes),
        )
        return head.apply(init_weights)

    def absent_parts(self) -> tuple[str, ...]:
        """Prefixes of the state-dict names that a pruned model does not have."""
        parts = super().absent_parts()  # classifiers have no output norms
        return tuple(p for p in parts if not p.startswith('extra_norm.'))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass, or not."""
        self.with_cp = tuple(range(5)) if enable else ()

    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns that group parameters by depth, for layer-wise learning rates.

        Args:
            coarse: one group for each stage; otherwise one for each block.
        """
        if coarse:
            base = r'^(?:patch_embed|blocks)([1-4])\.'
            focus = [
                (r'^(?:high_level_proj|sub_blocks3)\.', (3,)),
                (r'^(?:patch_embedx|sub_blocks4)\.', (4,)),
            ]
        else:  # the layers in front of a stage belong to its first block
            base = [
                (r'^blocks([1-4])\.(\d+)\.', None),
                (r'^patch_embed([2-4])\.', (0,)),
            ]
            focus = [
                (r'^sub_blocks([34])\.(\d+)\.', None),
                (r'^high_level_proj\.', (3, 0)),
                (r'^patch_embedx\.', (4, 0)),
            ]
        return dict(stem=r'^patch_embed1\.', base=base, focus=focus)


class AuxiliaryLoss(nn.Module):
    """Main loss plus weighted auxiliary loss, for any loss of logits.

    Args:
        criterion: takes logits ``(N, C)`` and targets, returns a scalar.
        weight: weight of the auxiliary loss; 0.4 in the released training script.
    """

    def __init__(self, criterion: nn.Module, weight: float = 0.4):
        super().__init__()
        self.criterion = criterion
        self.weight = weight

    def forward(self, output: Tensor | tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        """Compute the loss of what :class:`OverLoCKClassifier` returns."""
        if isinstance(output, Tensor):
            return self.criterion(output, target)
        main, aux = output
        return self.criterion(main, target) + self.weight * self.criterion(aux, target)


def _checked_pool(global_pool: str) -> str:
    if global_pool not in _POOLS:
        raise ValueError(f'global_pool={global_pool!r} must be one of {_POOLS}')
    return global_pool


def _classifier(dim: int, num_classes: int) -> nn.Module:
    return nn.Conv2d(dim, num_classes, 1) if num_classes else nn.Identity()
