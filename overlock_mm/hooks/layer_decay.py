"""Learning rates that decay with the depth of a layer."""

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from ..errors import UserError
from ..models import ContMix, OverLoCK
from ..models.layers import GlobalResponseNorm, LayerScale

_KEYS = ('num_layers', 'decay_rate', 'decay_type')
# Those of mmengine's default constructor.
_DEFAULT_KEYS = (
    'custom_keys',
    'bias_lr_mult',
    'bias_decay_mult',
    'norm_decay_mult',
    'flat_decay_mult',
    'dwconv_decay_mult',
    'dcn_offset_lr_mult',
    'bypass_duplicate',
)
_TYPES = ('layer_wise', 'stage_wise')
# Parts of the network in the order in which the data goes through them. The first block
# of a part has the layers in front of it, and the last one those behind it.
_STAGES = (
    (('patch_embed1',), None, ()),
    ((), 'blocks1', ('extra_norm.0',)),
    (('patch_embed2',), 'blocks2', ('extra_norm.1',)),
    (('patch_embed3',), 'blocks3', ()),
    (('patch_embed4',), 'blocks4', ('high_level_proj',)),  # Overview-Net
    ((), 'sub_blocks3', ('extra_norm.2',)),  # Focus-Net
    (('patch_embedx',), 'sub_blocks4', ('extra_norm.3', 'extra_norm.4', 'h_proj')),
)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class OverLoCKLayerDecayConstructor(DefaultOptimWrapperConstructor):
    """Layer-wise decay of the learning rate for models with an OverLoCK.

    A layer has the learning rate times ``decay_rate ** (num_layers + 1 - depth)``. The
    depth follows the data: the stem is 0; then come the blocks of stages 1 to 3 of the
    Base-Net, of the Overview-Net and of the Focus-Net, up to ``num_layers``; all that is
    not in the backbone is ``num_layers + 1``, with the full rate. Downsampling layers
    belong to the block behind them, and output norms to the one in front of them.

    Biases, norms, layer scales, response norms (GRN) and relative position biases have
    no weight decay. It takes the options of the constructors of MMDetection and
    MMSegmentation in ``paramwise_cfg``, and those of mmengine's default constructor
    besides::

        optim_wrapper = dict(
            constructor='OverLoCKLayerDecayConstructor',
            paramwise_cfg=dict(decay_rate=0.9, decay_type='layer_wise', num_layers=12),
        )

    * ``decay_rate``: factor between two layers, in (0, 1].
    * ``decay_type``: 'layer_wise' (the default) counts blocks, 'stage_wise' the stages:
      the stem, three stages of the Base-Net, the Overview-Net, two of the Focus-Net.
    * ``num_layers``: the depth of the last layer. The layers are spread evenly over a
      number that is not their own. By default it is: 17 for xt, 54 for b.

    Raises:
        UserError: if an option is not one of these, or there is no OverLoCK in the model.
    """

    def __call__(self, model: nn.Module):
        if not self.paramwise_cfg:  # mmengine would build one group without a word
            self._options(model)
        return super().__call__(model)

    def add_params(self, params, module, prefix='', is_dcn_module=None) -> None:
        """Add the parameter groups of ``module`` to ``params``, the full rate first."""
        if prefix:
            super().add_params(params, module, prefix, is_dcn_module)
            return
        rate, depths, last = self._options(module)
        single: list[dict] = []
        super().add_params(single, module)
        undecayed = _undecayed(module)
        names = {id(p): name for name, p in module.named_parameters()}
        groups: dict[tuple, dict] = {}
        for group in single:
            (param,) = group['params']
            if not param.requires_grad:
                continue
            scale = rate ** (last + 1 - depths.get(id(param), last + 1))
            group['lr'] = group.get('lr', self.base_lr) * scale
            if self.base_wd is not None and (param.ndim <= 1 or id(param) in undecayed):
                group['weight_decay'] = 0.0
            rest = {k: v for k, v in group.items() if k != 'params'}
            key = (scale, *sorted(rest.items()))
            merged = groups.setdefault(
                key, dict(rest, params=[], param_names=[], lr_scale=scale)
            )
            merged['params'].append(param)
            merged['param_names'].append(names[id(param)])
        # mmengine logs the rate of the first group
        params.extend(sorted(groups.values(), key=lambda g: (-g['lr_scale'], -g['lr'])))
        print_log(
            f'Layer decay: {len(groups)} parameter groups, learning rates from '
            f'{min(g["lr"] for g in params):.3g} to {max(g["lr"] for g in params):.3g}',
            logger='current',
        )

    def _options(self, model: nn.Module) -> tuple[float, dict[int, int], int]:
        """The decay rate, the depth of each parameter of the backbone, and the last one."""
        cfg = self.paramwise_cfg
        unknown = set(cfg) - {*_KEYS, *_DEFAULT_KEYS}
        if unknown:
            raise UserError(
                f'paramwise_cfg has {sorted(unknown)}, which is unknown; choose from '
                f'{[*_KEYS, *_DEFAULT_KEYS]}'
            )
        rate, kind = cfg.get('decay_rate'), cfg.get('decay_type', 'layer_wise')
        if not isinstance(rate, int | float) or not 0 < rate <= 1:
            raise UserError(
                f'paramwise_cfg.decay_rate={rate} must be a number in (0, 1], such as 0.9'
            )
        if kind not in _TYPES:
            raise UserError(
                f'paramwise_cfg.decay_type={kind!r} must be one of {list(_TYPES)}'
            )
        backbones = [m for m in model.modules() if isinstance(m, OverLoCK)]
        if not backbones:
            raise UserError(
                f'there is no OverLoCK in this {type(model).__name__}; leave out '
                "optim_wrapper.constructor, or use the toolbox's own"
            )
        found = [parameter_depths(backbone, kind) for backbone in backbones]
        own = max(max(depths.values()) for depths in found)
        last = cfg.get('num_layers', own)
        if not isinstance(last, int) or last < 1:
            raise UserError(f'paramwise_cfg.num_layers={last} must be a positive integer')
        merged = {}
        for depths in found:
            deepest = max(depths.values())
            merged |= {k: round(depth * last / deepest) for k, depth in depths.items()}
        return rate, merged, last


def parameter_depths(backbone: OverLoCK, decay_type: str = 'layer_wise') -> dict[int, int]:
    """Depths of the parameters of a backbone, along the way of the data.

    Args:
        backbone: an OverLoCK.
        decay_type: 'layer_wise' or 'stage_wise'.

    Returns:
        The depth of each parameter, by its ``id``; 0 is the stem.
    """
    modules, depths, depth = dict(backbone.named_modules()), {}, -1
    for before, blocks, after in _STAGES:
        stage = list(modules.get(blocks, ()))
        if not stage and not any(name in modules for name in before):
            continue  # out_indices leaves it out
        depth += 1
        for name in before:
            depths |= {id(p): depth for p in modules[name].parameters()}
        for i, block in enumerate(stage):
            depth += decay_type == 'layer_wise' and i > 0
            depths |= {id(p): depth for p in block.parameters()}
        for name in after:
            if name in modules:
                depths |= {id(p): depth for p in modules[name].parameters()}
    return depths


def _undecayed(model: nn.Module) -> set[int]:
    """Ids of parameters that are vectors or biases of positions, whatever their shape."""
    found = set()
    for module in model.modules():
        if isinstance(module, LayerScale | GlobalResponseNorm):
            found |= {id(p) for p in module.parameters()}
        elif isinstance(module, ContMix):
            found |= {id(module.rpb1), id(module.rpb2)}
    return found
