"""Putting another backbone into a config of MMDetection or MMSegmentation."""

import copy
from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from timm import get_pretrained_cfg
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..archs import ARCHS, DENSE_DROP_PATH, STRIDES, settings_of
from ..checkpoint import RELEASE
from ..errors import UserError
from ..models import OverLoCK, TimmBackbone
from .edit import (
    add_imports,
    class_of,
    is_pretrained,
    loading_options,
    without_pretrained,
)
from .load import read_config, register_modules, toolbox_of
from .maps import (
    CHANGED_CONVS,
    Map,
    is_one_grid,
    kind,
    maps_of,
    readers,
    without_grid_neck,
)

_TIMM = 'timm/'
# Models inside of others whose backbones stay as they are.
_OTHER_MODELS = ('teacher', 'reid')
# Options that mean the same in OverLoCK as in the backbones of the toolboxes.
_KEPT = ('frozen_stages', 'norm_eval', 'with_cp')
_NECK_CHANNELS = 256


def swap_backbone(
    cfg: Config | str | Path,
    arch: str | dict = 't',
    pretrained: bool = True,
    drop_path_rate: float | None = None,
    backbone: dict | None = None,
    keep_strides: bool = False,
    **backbone_options,
) -> Config:
    """Put another backbone into a config, and change all that depends on it.

    What was changed is printed, a line each.

    Args:
        cfg: the config of a detector or segmentor, or its path. It is left as it is.
        arch: an OverLoCK ('xt', 't', 's', 'b', or a dict of sizes), or ``'timm/NAME'`` for
            a model of timm that can return features.
        pretrained: start from weights pretrained on ImageNet, or as ``backbone`` says.
        drop_path_rate: stochastic depth rate; by default that of the released detection
            or segmentation models for an OverLoCK, and that of the model for others.
        backbone: the config of any registered backbone, in place of ``arch``.
        keep_strides: where the old backbone was dilated, add a neck that gives the heads
            maps of the strides that they had. For segmentation.
        **backbone_options: other arguments of the new backbone.

    Returns:
        The new config.

    Raises:
        UserError: if the backbone cannot be swapped. It says why, and what to do.
    """
    cfg, notes = swap(
        cfg, arch, pretrained, drop_path_rate, backbone, keep_strides, **backbone_options
    )
    for note in notes:
        print_log(note)
    return cfg


def swap(
    cfg: Config | str | Path,
    arch: str | dict = 't',
    pretrained: bool = True,
    drop_path_rate: float | None = None,
    backbone: dict | None = None,
    keep_strides: bool = False,
    **backbone_options,
) -> tuple[Config, list[str]]:
    """As :func:`swap_backbone`, but return what was changed and print nothing."""
    cfg = copy.deepcopy(cfg) if isinstance(cfg, Config) else read_config(cfg)
    toolbox = toolbox_of(cfg)
    register_modules(toolbox)
    path = find_backbone(cfg)
    model, name = _at(cfg, path[:-1]), '.'.join(path)
    old, notes = model['backbone'], []
    _refuse_tied(model, old, name)
    if backbone is not None:
        new = ConfigDict(copy.deepcopy(backbone))
        new.update(backbone_options)
        if not pretrained:
            without_pretrained(new)
        if drop_path_rate is not None:
            new.drop_path_rate = drop_path_rate
    else:
        chosen = {'out_indices', 'out_strides'} & set(backbone_options)
        if chosen:
            raise UserError(
                f'{chosen.pop()} cannot be given: it follows from what reads the backbone. '
                'Change the neck or head of the config first'
            )
        new = _new_backbone(old, toolbox, arch, pretrained, drop_path_rate, notes)
        new.update(backbone_options)
    dropped = [option for option in CHANGED_CONVS if old.get(option)]
    if dropped:
        notes.append(f'{", ".join(dropped)} of the old backbone: left out')
    _swap_maps(model, old, new, name, toolbox, keep_strides, notes)
    model['backbone'] = new
    _drop_old_weights(cfg, path, notes)
    if backbone is None and new.get('in_channels', 3) == 3:
        _set_normalization(cfg.model, 'model', *_mean_std(new), notes)
    _set_runtime(cfg, new, notes)
    return cfg, [f'{name}: {kind(old)} -> {_described(new)}', *notes]


def find_backbone(cfg: Config) -> tuple[str, ...]:
    """The keys that lead to the backbone of a config's model, or of the model inside it."""
    if not isinstance(cfg.get('model'), dict):
        raise UserError(f'{cfg.filename} has no model; give the config of one')
    paths = list(_backbones(cfg.model, ('model',)))
    if len(paths) != 1:
        found = ', '.join('.'.join(path) for path in paths) or 'no backbone'
        raise UserError(
            f'{cfg.filename} has {found}; one backbone is needed, as model.backbone or '
            'inside of a wrapped model (model.detector.backbone, for instance). Change '
            'this config by hand'
        )
    return paths[0]


def _backbones(node, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if not isinstance(node, dict):
        return
    if isinstance(node.get('backbone'), dict):
        yield (*path, 'backbone')
        return
    for key, value in node.items():
        if not key.startswith(_OTHER_MODELS):
            yield from _backbones(value, (*path, key))


def _at(node, path: tuple[str, ...]):
    for key in path:
        node = node[key]
    return node


def _refuse_tied(model: dict, old: dict, name: str) -> None:
    """Raise an error for models that are made for their backbone alone."""
    reason = None
    necks = model.get('neck') or []
    if any('rfp_backbone' in n for n in ([necks] if isinstance(necks, dict) else necks)):
        reason = 'its neck has copies of the backbone'
    elif 'num_branch' in old:
        reason = 'its branches share the weights of the backbone'
    elif 'type' not in old:
        reason = 'the backbone belongs to another library'
    elif 'roi_head' in model and not necks:
        reason = (
            'its heads read the backbone without a neck (C4 or DC5). Take a config with an '
            'FPN'
        )
    if reason:
        raise UserError(f'{name} of a {kind(model)} cannot be swapped: {reason}')


def _new_backbone(
    old: dict,
    toolbox: str,
    arch: str | dict,
    pretrained: bool,
    drop_path_rate: float | None,
    notes: list[str],
) -> ConfigDict:
    """An OverLoCK or a model of timm, with the old options that mean the same."""
    kept = {k: old[k] for k in _KEPT if old.get(k) not in (None, False, -1, ())}
    if old.get('in_channels', 3) != 3:
        kept['in_channels'] = old['in_channels']
    if isinstance(arch, str) and arch.startswith(_TIMM):
        new = ConfigDict(type='TimmBackbone', model_name=arch.removeprefix(_TIMM))
        new.pretrained = pretrained
        if kept.pop('frozen_stages', None):
            notes.append('frozen_stages: left out, as TimmBackbone has no such option')
    else:
        try:
            settings_of(arch)
        except (ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{error}; or give 'timm/NAME', a model of timm") from error
        new = ConfigDict(type='OverLoCK', arch=arch)
        if toolbox == 'mmdet':
            new.context_skip = True
        short = _short(arch)
        if drop_path_rate is None and short:
            drop_path_rate = DENSE_DROP_PATH[toolbox][short]
        channels = kept.get('in_channels', 3)
        if pretrained and (not short or channels != 3):
            why = f'for {channels} channels' if short else 'for sizes of your own'
            notes.append(f'pretrained weights: there are none {why}')
            pretrained = False
        if pretrained:
            file = f'overlock_{short}_in1k_224.pth'
            new.init_cfg = dict(type='Pretrained', checkpoint=RELEASE + file)
        elif kept.pop('frozen_stages', None) is not None:
            notes.append('frozen_stages: left out, as there are no pretrained weights')
    if drop_path_rate is not None:
        new.drop_path_rate = drop_path_rate
    new.update(kept)
    return new


def _short(arch: str | dict) -> str | None:
    """'t' for 'tiny', and so on; None for sizes of one's own."""
    names = ('xt', 't', 's', 'b')
    named = isinstance(arch, str)
    return next(n for n in names if ARCHS[n] is ARCHS[arch]) if named else None


def _swap_maps(
    model: dict,
    old: dict,
    new: ConfigDict,
    name: str,
    toolbox: str,
    keep_strides: bool,
    notes: list[str],
) -> None:
    """Choose the maps of the new backbone, and give their channels to what reads them."""
    old_maps = _old_maps(model, old, name, notes)
    found = readers(model)
    if not found:
        raise UserError(
            f'nothing in this {kind(model)} was found to read {name}: a neck or head needs '
            'in_channels. Change this config by hand'
        )
    for reader in found:
        reader.check(old_maps)
    reads = sorted({i for reader in found for i in reader.indices(len(old_maps))})
    neck = bool(model.get('neck'))
    old_strides = [m.stride for m in old_maps]
    main_reads_last = neck or found[0].indices(len(old_maps))[-1] == len(old_maps) - 1
    if old_strides != sorted(old_strides) or not main_reads_last:
        raise UserError(
            f'{name} cannot be swapped: it returns maps of strides {old_strides}, which it '
            'has decoded itself, and the heads leave that to it. Take a config with a '
            'plain backbone'
        )
    strides = _new_strides(old_strides, reads, neck)
    maps = _select_maps(new, strides, reads, name)
    if any(maps[i].stride != old_strides[i] for i in reads):
        can_keep = toolbox == 'mmseg' and not neck
        if not (keep_strides and can_keep):
            _refuse_dilated(
                [old_strides[i] for i in reads],
                [maps[i].stride for i in reads],
                name,
                can_keep,
            )
        maps = _select_maps(new, {i: strides[i] for i in reads}, reads, name)
        maps = _enlarge(model, maps, old_strides, notes)
    for reader in found:
        notes += reader.adapt(old_maps, maps)


def _old_maps(model: dict, old: dict, name: str, notes: list[str]) -> list[Map]:
    """The maps that the heads or the neck get now; a neck that makes them is removed."""
    maps = None
    if class_of(old, MODELS) is None:  # its library is not installed
        maps = _maps_by_readers(model)
    if maps is None:
        try:
            maps = maps_of(old)
        except UserError as error:
            raise UserError(f'{name} cannot be swapped: {error}') from error
    pyramid = without_grid_neck(model, maps)
    if pyramid:
        notes.append('neck: left out, as the new maps have the strides that it made')
    elif is_one_grid(old, maps):
        raise UserError(
            f'{name} cannot be swapped: the heads of this {kind(model)} read maps of one '
            f'stride ({maps[0].stride}) and not a pyramid. Take a config with a backbone '
            'that returns maps of strides 4 to 32'
        )
    return pyramid or maps


def _maps_by_readers(model: dict) -> list[Map] | None:
    """The maps of a backbone that cannot be built, if what reads them shows all four."""
    for reader in readers(model):
        channels = reader.node['in_channels']
        if isinstance(channels, list | tuple) and len(channels) == len(STRIDES):
            return [Map(c, s) for c, s in zip(channels, STRIDES, strict=True)]
    return None


def _new_strides(old: list[int], reads: list[int], neck: bool) -> dict[int, int]:
    """The stride of the new map that takes the place of each old one.

    It is the same stride, or for a dilated backbone that of the same stage, counted from
    the last one.
    """
    if len(set(old)) == len(old) and (neck or old[reads[-1]] >= STRIDES[-2]):
        return dict(enumerate(old))
    first = len(STRIDES) - len(old)
    return {i: STRIDES[first + i] for i in range(len(old)) if first + i >= 0}


def _select_maps(
    new: ConfigDict, strides: dict[int, int], reads: list[int], name: str
) -> dict[int, Map]:
    """Have the new backbone return the maps that are needed.

    Args:
        new: its config, changed in place.
        strides: strides of the new maps by the index of the old ones.
        reads: indices of the old maps that are read.
        name: the key of the backbone.

    Returns:
        The new maps, in the order in which they are returned, by the index of the old ones.
    """
    cls = class_of(new, MODELS)
    if cls in (OverLoCK, TimmBackbone):
        wanted = {i: s for i, s in strides.items() if s in STRIDES}
        if cls is OverLoCK:
            indices = [STRIDES.index(s) for s in wanted.values()]
            if indices != list(range(len(STRIDES))):
                new.out_indices = tuple(indices)
        elif tuple(wanted.values()) != STRIDES or 'out_strides' in new:
            new.out_strides = tuple(wanted.values())
        maps = dict(zip(wanted, maps_of(new), strict=True))
    else:
        given = maps_of(new)
        wanted = {i: s for i, s in strides.items() if s in [m.stride for m in given]}
        if [m.stride for m in given] != list(wanted.values()):
            raise UserError(
                f'{kind(new)} returns maps of strides {[m.stride for m in given]}, and '
                f'{list(strides.values())} are needed in place of {name}. Give it other '
                'out_indices'
            )
        maps = dict(zip(wanted, given, strict=True))
    missing = [strides.get(i) for i in reads if i not in maps]
    if missing:
        raise UserError(
            f'{name} cannot be swapped: maps of strides '
            f'{[strides.get(i) for i in reads]} are read, and {kind(new)} has '
            f'{[m.stride for m in maps.values()]}'
        )
    return maps


def _refuse_dilated(old: list[int], new: list[int], name: str, can_keep: bool) -> None:
    how = (
        'Give keep_strides=True (--keep-strides), which adds a neck that enlarges them, or '
        'take a config with a head for a pyramid, such as UPerNet'
        if can_keep
        else 'Take a config whose backbone is not dilated'
    )
    raise UserError(
        f'{name} cannot be swapped: it is dilated, so that its heads read maps of strides '
        f'{old}, and they would get {new}. {how}'
    )


def _enlarge(
    model: dict, maps: dict[int, Map], old_strides: list[int], notes: list[str]
) -> dict[int, Map]:
    """Add a neck that gives the maps the strides that the heads read before."""
    scales = [m.stride // old_strides[i] for i, m in maps.items()]
    model['neck'] = ConfigDict(
        type='MultiLevelNeck',
        in_channels=[m.channels for m in maps.values()],
        out_channels=_NECK_CHANNELS,
        scales=scales,
    )
    notes.append(f'neck: MultiLevelNeck, which enlarges the maps {scales} times')
    return {i: Map(_NECK_CHANNELS, old_strides[i]) for i in maps}


def _drop_old_weights(cfg: Config, path: tuple[str, ...], notes: list[str]) -> None:
    """Remove all that would load weights of the old model."""
    for depth in range(1, len(path)):
        node, key = _at(cfg, path[:depth]), '.'.join(path[:depth])
        if node.get('pretrained'):
            notes.append(f'{key}.pretrained: {node["pretrained"]} -> None')
            node['pretrained'] = None
        init_cfg = node.get('init_cfg')
        given = [init_cfg] if isinstance(init_cfg, dict) else list(init_cfg or [])
        if any(is_pretrained(c) for c in given):
            node['init_cfg'] = [c for c in given if not is_pretrained(c)] or None
            notes.append(f'{key}.init_cfg: left out, weights of the old model')
    if cfg.get('load_from'):
        notes.append(f'load_from: {cfg.load_from} -> None')
        cfg.load_from = None


def _mean_std(new: dict) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the images that a backbone was pretrained with."""
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    if new['type'] == 'TimmBackbone':
        known = get_pretrained_cfg(new['model_name'])
        mean, std = (known.mean, known.std) if known else (mean, std)
    return tuple([round(255 * v, 3) for v in values] for values in (mean, std))


def _set_normalization(node, key: str, mean, std, notes: list[str]) -> None:
    """Have all data preprocessors in a model give RGB images with this normalization."""
    if not isinstance(node, dict):
        return
    name = kind(node).lower() if node.get('type') else ''
    if name.endswith('datapreprocessor') and 'data_preprocessor' not in node:
        before = {k: node.get(k) for k in ('mean', 'std', 'bgr_to_rgb')}
        after = dict(mean=mean, std=std, bgr_to_rgb=True)
        if {k: list(v) if isinstance(v, tuple) else v for k, v in before.items()} != after:
            node.update(after)
            node.pop('rgb_to_bgr', None)
            notes.append(f'{key}: RGB, mean={mean}, std={std}')
    for name, value in node.items():
        _set_normalization(value, f'{key}.{name}', mean, std, notes)


def _set_runtime(cfg: Config, new: dict, notes: list[str]) -> None:
    """Set what training with the new backbone needs outside of the model."""
    hooks = cfg.get('default_hooks') or {}
    add_imports(cfg)
    if not hooks.get('loading'):
        loading_options(cfg)
        notes.append('default_hooks.loading: checkpoints are loaded strictly')
    if cfg.get('sync_bn') is None:
        cfg.sync_bn = 'torch'
        notes.append("sync_bn: 'torch', batch norms share statistics across GPUs")
    if cfg.get('optim_wrapper'):
        _set_optimizer(cfg, new, notes)


def _set_optimizer(cfg: Config, new: dict, notes: list[str]) -> None:
    """Set the layer decay and the weight decay of norms of the new backbone."""
    wrapper = cfg.optim_wrapper
    ours = kind(new) == 'OverLoCK'
    constructor = class_of(
        dict(type=wrapper.get('constructor')),
        OPTIM_WRAPPER_CONSTRUCTORS,
        cfg.get('default_scope'),
    )
    if getattr(constructor, '__name__', '').startswith(('LearningRateDecay', 'LayerDecay')):
        if ours:
            wrapper.constructor = 'OverLoCKLayerDecayConstructor'
        else:
            wrapper.pop('constructor')
            wrapper.pop('paramwise_cfg', None)
        notes.append(
            'optim_wrapper.constructor: '
            f'{constructor.__name__} -> {wrapper.get("constructor", "left out")}'
        )
        return  # it decides the weight decay, too
    kind_of = kind(wrapper.get('optimizer') or {})
    if kind_of != 'AdamW':
        if ours:
            notes.append(
                f'optim_wrapper.optimizer: {kind_of}, unchanged; OverLoCK was trained with '
                'AdamW at 1e-4'
            )
        return
    paramwise = wrapper.get('paramwise_cfg') or {}
    keys = paramwise.get('custom_keys') or {}
    whole = [key for key in keys if key in 'backbone']
    if ours and whole:  # mmengine takes the longest key that fits
        notes.append(
            f'optim_wrapper.paramwise_cfg: unchanged; its key {whole[0]!r} also decides '
            'the weight decay of the norms of the backbone'
        )
    elif ours and 'norm' not in keys and 'norm_decay_mult' not in paramwise:
        wrapper.paramwise_cfg = {
            **paramwise,
            'custom_keys': {**keys, 'norm': dict(decay_mult=0.0)},
        }
        notes.append('optim_wrapper.paramwise_cfg: no weight decay for norms')


def _described(new: dict) -> str:
    """A backbone's type and options in one line."""
    options = ', '.join(f'{k}={v}' for k, v in new.items() if k not in ('type', 'init_cfg'))
    weights = new.get('init_cfg')
    start = f', weights {weights["checkpoint"]}' if weights else ''
    return f'{kind(new)}({options}){start}'
