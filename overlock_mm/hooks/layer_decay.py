"""Layer-wise learning rate decay for models with an OverLoCK."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.logging import MMLogger, print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from ..errors import UserError
from ..models import OverLoCK
from ..models.contmix import ContMix
from ..models.layers import GlobalResponseNorm, LayerScale

_DECAY_TYPES = ('layer_wise', 'stage_wise')
_KEYS = (
    'num_layers',
    'decay_rate',
    'decay_type',
    # those of mmengine's constructor
    'custom_keys',
    'bias_lr_mult',
    'bias_decay_mult',
    'norm_decay_mult',
    'flat_decay_mult',
    'dwconv_decay_mult',
    'dcn_offset_lr_mult',
    'bypass_duplicate',
)
# The stages behind the stem, in the order of the data flow: the blocks, what stands in
# front of the first one, and what reads the map of the last one (of h_proj, what it is
# added to).
_STAGES = (
    ('blocks1', (), ('extra_norm.0',)),
    ('blocks2', ('patch_embed2',), ('extra_norm.1',)),
    ('blocks3', ('patch_embed3',), ()),
    ('blocks4', ('patch_embed4',), ('high_level_proj', 'extra_norm.4')),  # Overview-Net
    ('sub_blocks3', (), ('extra_norm.2',)),  # Focus-Net
    ('sub_blocks4', ('patch_embedx',), ('extra_norm.3', 'h_proj')),
)
# What mmengine's constructor logs for every parameter.
_LISTINGS = ('paramwise_options -- ', 'is skipped since its requires_grad')


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class OverLoCKLayerDecayConstructor(DefaultOptimWrapperConstructor):
    """Smaller learning rates for the layers of an :class:`OverLoCK` nearer to the image.

    The constructors with layer-wise decay of MMDetection and MMSegmentation know other
    backbones only. This one takes their options. In a config::

        custom_imports = dict(imports=['overlock_mm', 'overlock_mm.hooks'])
        optim_wrapper = dict(
            constructor='OverLoCKLayerDecayConstructor',
            paramwise_cfg=dict(decay_rate=0.9, num_layers=12))

    Layers count in the order of the data flow: the stem is layer 0, then come the blocks
    of stages 1 to 3, of the Overview-Net and of the Focus-Net, and everything outside the
    backbone (neck, heads) is in the layer after the last. The learning rate is multiplied
    by ``decay_rate`` to the power of the number of layers from there. Downsampling layers
    belong to the block that follows, an output norm to the block whose map it norms,
    ``high_level_proj`` to the last block of the Overview-Net and ``h_proj`` to the last
    block of the Focus-Net. Frozen layers count, parts that ``out_indices`` leaves out do
    not. A model may have several OverLoCKs, anywhere.

    Weight decay is 0 for all parameters (of the whole model) with at most one dimension,
    which are norms and biases, for everything named ``bias``, and for the weights of
    LayerScale, gamma and beta of GRN and the relative position biases of ContMix.

    The options of mmengine's constructor apply too: their factors of the learning rate are
    multiplied with those of the layers, and where one of them is about the weight decay
    of a parameter, it replaces the 0. A parameter that is used in two places is in one
    group, under its first name.

    The groups with the config's learning rate come first, as mmengine logs that of the
    first group; the others are sorted from the largest to the smallest. A scheduler's
    ``eta_min`` is the same for all groups; ``eta_min_ratio`` follows their learning rates.

    Args:
        optim_wrapper_cfg (dict): config of the optimizer wrapper, with an ``optimizer``
            that has an ``lr``.
        paramwise_cfg (dict): the options of ``DefaultOptimWrapperConstructor``, and

            - ``decay_rate`` (float): within (0, 1].
            - ``decay_type`` (str): ``'layer_wise'``, one layer for each block, or
              ``'stage_wise'``, one for each stage: 1, 2, 3, the Overview-Net and the two of
              the Focus-Net. Defaults to ``'layer_wise'``.
            - ``num_layers`` (int): spread the blocks (or stages) evenly over this many
              layers, so that the stem's factor is ``decay_rate ** (num_layers + 1)``
              whatever the arch. Defaults to their number, which is 17, 30, 42 and 54 blocks
              for OverLoCK-XT, T, S and B.

    Raises:
        UserError: if an option is missing, unknown or has a value that it cannot have, or
            if there is no OverLoCK in the model.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        options = self.paramwise_cfg
        unknown = sorted(set(options) - set(_KEYS))
        if unknown:
            raise UserError(
                f'paramwise_cfg has keys that {type(self).__name__} does not know: '
                f'{unknown}; remove them, or choose from {sorted(_KEYS)}'
            )
        self.decay_rate = options.get('decay_rate')
        self.decay_type = options.get('decay_type', 'layer_wise')
        self.num_layers = options.get('num_layers')
        if not isinstance(self.decay_rate, int | float) or not 0 < self.decay_rate <= 1:
            raise UserError(
                f'decay_rate={self.decay_rate!r} in paramwise_cfg must be a number above 0 '
                'and at most 1; set, for instance, decay_rate=0.9'
            )
        if self.decay_type not in _DECAY_TYPES:
            raise UserError(
                f'decay_type={self.decay_type!r} in paramwise_cfg must be one of '
                f'{_DECAY_TYPES}'
            )
        if self.num_layers is not None and (
            not isinstance(self.num_layers, int) or self.num_layers < 1
        ):
            raise UserError(
                f'num_layers={self.num_layers!r} in paramwise_cfg must be an integer of at '
                'least 1; leave it out for one layer for each block or stage'
            )
        if self.base_lr is None:
            raise UserError(
                'optim_wrapper.optimizer has no lr for the layer decay to multiply; add '
                'it, for instance lr=1e-4'
            )

    def add_params(
        self,
        params: list[dict],
        module: nn.Module,
        prefix: str = '',
        is_dcn_module: int | float | None = None,
    ) -> None:
        """Add the groups of all parameters of a model that are trained.

        Args:
            params: list of groups, which is extended.
            module: the model.
            prefix: name of the module, in the calls that mmengine makes for each part.
            is_dcn_module: as in mmengine.

        Raises:
            UserError: if there is no OverLoCK in the model.
        """
        if prefix:
            super().add_params(params, module, prefix, is_dcn_module)
            return
        layers, count = self._layers_of(module)
        found: list[dict] = []
        with _without_listings():
            super().add_params(found, module, prefix, is_dcn_module)
        groups = self._merged(module, found, layers, count)
        params.extend(groups)
        scales = [group['lr_scale'] for group in groups]
        print_log(
            f'{type(self).__name__}: {self.decay_type} decay of {self.decay_rate} over '
            f'{count} layers and the stem; {len(groups)} parameter groups, learning rates '
            f'of {min(scales, default=1):.3g} to {max(scales, default=1):.3g} times '
            f'{self.base_lr}',
            logger='current',
        )

    def _layers_of(self, model: nn.Module) -> tuple[dict[nn.Parameter, int], int]:
        """The layer of every parameter of an OverLoCK, and the number of the last layer."""
        stacks = [
            _stack(module, self.decay_type == 'stage_wise')
            for module in model.modules()
            if isinstance(module, OverLoCK)
        ]
        if not stacks:
            raise UserError(
                f'there is no OverLoCK in this {type(model).__name__}, so '
                f'{type(self).__name__} does not know its layers; use a backbone of type '
                "'OverLoCK', or remove `constructor` and its options from optim_wrapper"
            )
        last = self.num_layers or max(len(stack) - 1 for stack in stacks)
        layers = {}
        for stack in stacks:
            blocks = len(stack) - 1
            total = self.num_layers or blocks
            for i, modules in enumerate(stack):
                # with several backbones, layers count from the heads
                layer = last - total + -(-i * total // blocks)
                layers |= {p: layer for module in modules for p in module.parameters()}
        return layers, last

    def _merged(
        self,
        model: nn.Module,
        found: list[dict],
        layers: dict[nn.Parameter, int],
        last: int,
    ) -> list[dict]:
        """One group for all parameters of a layer that have the same settings."""
        names = {param: name for name, param in model.named_parameters()}
        without_decay = _without_decay(model)
        groups: dict[tuple, dict] = {}
        for settings in found:
            (param,) = settings['params']
            name = names.pop(param, None)
            if name is None:  # it is used in two places
                continue
            layer = layers.get(param, last + 1)
            scale = self.decay_rate ** (last + 1 - layer)
            own_lr = settings.get('lr', self.base_lr)
            factor = 1.0 if own_lr == self.base_lr else own_lr / self.base_lr
            decay = self._weight_decay(name, settings, param in without_decay)
            others = {
                key: value
                for key, value in settings.items()
                if key not in ('params', 'lr', 'lr_mult', 'weight_decay', 'decay_mult')
            }
            key = (layer, own_lr, decay, repr(sorted(others.items())))
            if key not in groups:
                groups[key] = dict(
                    params=[],
                    param_names=[],
                    lr_scale=scale * factor,
                    group_name=self._group_name(layer, factor, decay),
                    lr=scale * own_lr,
                    **({} if decay is None else dict(weight_decay=decay)),
                    **others,
                )
            groups[key]['params'].append(param)
            groups[key]['param_names'].append(name)
        return sorted(
            groups.values(),
            key=lambda group: (
                group['lr_scale'] != 1,
                -group['lr_scale'],
                group.get('weight_decay') == 0,
            ),
        )

    def _weight_decay(
        self, name: str, settings: dict, is_without_decay: bool
    ) -> float | None:
        """The weight decay of a parameter; None: the optimizer's default."""
        custom = any(key in name for key in self.paramwise_cfg.get('custom_keys', {}))
        given = settings.get('weight_decay')
        # a custom key that says nothing about weight decay has the base one in mmengine
        if custom and 'decay_mult' not in settings and given == self.base_wd:
            given = None
        if given is not None:
            return given
        return 0.0 if is_without_decay else self.base_wd

    def _group_name(self, layer: int, factor: float, decay: float | None) -> str:
        name = f'layer_{layer}'
        if factor != 1:
            name += f'_lr_x{factor:.3g}'
        if decay == 0:
            return f'{name}_no_decay'
        if decay == self.base_wd:
            return f'{name}_decay'
        return f'{name}_decay_{decay:.3g}'


def _stack(backbone: OverLoCK, stage_wise: bool) -> list[list[nn.Module]]:
    """The layers of a backbone from the stem on, each as its modules."""
    modules = dict(backbone.named_modules())
    stack = [[backbone.patch_embed1]]
    for blocks, before, behind in _STAGES:
        if blocks not in modules:  # out_indices leaves it out
            break
        stage = [[block] for block in modules[blocks]]
        stage[0] += [modules[name] for name in before]
        stage[-1] += [modules[name] for name in behind if name in modules]
        stack += [sum(stage, [])] if stage_wise else stage
    return stack


def _without_decay(model: nn.Module) -> set[nn.Parameter]:
    return {
        param
        for module in model.modules()
        for name, param in module.named_parameters(recurse=False)
        if param.ndim <= 1
        or name == 'bias'
        or isinstance(module, LayerScale | GlobalResponseNorm)
        or (isinstance(module, ContMix) and name in ('rpb1', 'rpb2'))
    }


@contextmanager
def _without_listings() -> Iterator[None]:
    """Keep mmengine's lines about single parameters out of the log."""

    def keep(record: logging.LogRecord) -> bool:
        return not any(words in record.getMessage() for words in _LISTINGS)

    logger = MMLogger.get_current_instance()
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
