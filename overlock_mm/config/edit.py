"""Changing configs, in every way in which they may be written.

The type of a module can be a name (``'EMAHook'``), a name with its scope
(``'mmengine.EMAHook'``) or module, or, in pure-Python configs, the class itself. So types
are not compared as text here, but looked up in the registry.
"""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import suppress

from mmengine.config import ConfigDict
from mmengine.model.weight_init import PretrainedInit
from mmengine.registry import HOOKS, MODELS, TRANSFORMS, WEIGHT_INITIALIZERS, Registry
from mmengine.runner import find_latest_checkpoint

from ..datasets import MapLabels
from ..errors import UserError
from ..hooks import StrictLoadingHook
from ..models import OverLoCK

# What this package registers, for configs that are read without its tools.
_IMPORTS = ('overlock_mm', 'overlock_mm.hooks', 'overlock_mm.datasets')


def class_of(node, registry: Registry, scope: str | None = None) -> type | None:
    """The class that a config of a module names.

    Args:
        node (dict | None): the config of a module, with its ``type``.
        registry: where a name is looked up.
        scope: the default scope of the config.

    Returns:
        The class or function; None if there is no ``type``, or none of that name.
    """
    kind = node.get('type') if isinstance(node, dict) else None
    if not isinstance(kind, str):
        return kind
    # mmengine notes the scope of what a config inherits from a toolbox
    with registry.switch_scope_and_registry(node.get('_scope_', scope)) as scoped:
        # 'mmdet.Name' may be a name of mmengine's: a toolbox's registry does not always
        # look there, depending on what was imported
        for name in (kind, kind.rpartition('.')[2]):
            with suppress(RuntimeError):  # there is no such name
                if found := scoped.get(name):
                    return found
    return None


def is_a(node, base: type, registry: Registry, scope: str | None = None) -> bool:
    """Whether a config of a module is of a class or of one derived from it."""
    found = class_of(node, registry, scope)
    return isinstance(found, type) and issubclass(found, base)


def has_overlock(cfg) -> bool:
    """Whether the backbone of a config's model is an OverLoCK."""
    backbone = (cfg.get('model') or {}).get('backbone')
    return is_a(backbone, OverLoCK, MODELS, cfg.get('default_scope'))


def add_imports(cfg) -> None:
    """Have a config import this package, so that what a run dumps can be read anywhere."""
    given = cfg.get('custom_imports') or {}
    imports = given.get('imports') or []
    imports = [imports] if isinstance(imports, str) else list(imports)
    imports += [name for name in _IMPORTS if name not in imports]
    cfg.custom_imports = {'allow_failed_imports': False, **given, 'imports': imports}


def loading_options(cfg) -> ConfigDict:
    """``default_hooks.loading`` of a config, which is added if it is not there."""
    # a ConfigDict stores copies of plain dicts: assign first, then read back
    if not cfg.get('default_hooks'):
        cfg.default_hooks = {}
    if not cfg.default_hooks.get('loading'):
        cfg.default_hooks.loading = {}
    cfg.default_hooks.loading.setdefault('type', 'StrictLoadingHook')
    return cfg.default_hooks.loading


def is_pretrained(init_cfg) -> bool:
    """Whether an ``init_cfg`` loads a file."""
    return is_a(init_cfg, PretrainedInit, WEIGHT_INITIALIZERS)


def without_pretrained(node) -> None:
    """Remove all that loads a file from a model config, in place.

    This is every such ``init_cfg``, and the older ``pretrained`` of MMSegmentation's
    models and timm's.
    """
    if isinstance(node, dict):
        init_cfg = node.get('init_cfg')
        if isinstance(init_cfg, list | tuple):
            node['init_cfg'] = [c for c in init_cfg if not is_pretrained(c)]
        elif is_pretrained(init_cfg):
            node['init_cfg'] = None
        if node.get('pretrained'):
            node['pretrained'] = None if isinstance(node['pretrained'], str) else False
        for value in node.values():
            without_pretrained(value)
    elif isinstance(node, list | tuple):
        for value in node:
            without_pretrained(value)


def starting_checkpoint(cfg) -> str | None:
    """The checkpoint that training is going to load or resume, as mmengine decides."""
    if cfg.get('resume') and not cfg.get('load_from'):
        return latest_checkpoint(cfg.work_dir)
    return cfg.get('load_from')


def latest_checkpoint(work_dir: str) -> str | None:
    """The checkpoint that a run in a work dir wrote last, if there is one."""
    if not os.path.exists(os.path.join(work_dir, 'last_checkpoint')):
        return None  # where mmengine would also print it
    return find_latest_checkpoint(work_dir)


def move_pretrained_model(cfg) -> str | None:
    """Move the pretrained weights of a whole model with an OverLoCK to ``load_from``.

    From the model's own ``init_cfg`` mmengine would load what fits and ignore the rest.
    Both ways replace the pretrained weights of the model's parts.

    Args:
        cfg (mmengine.Config): the config, changed in place unless a checkpoint is loaded
            or resumed anyway.

    Returns:
        What was changed, for the user; None if nothing was.
    """
    if starting_checkpoint(cfg) or not has_overlock(cfg):
        return None
    given = cfg.model.get('init_cfg')
    given = [given] if isinstance(given, dict) else list(given or [])
    pretrained = [init_cfg for init_cfg in given if is_pretrained(init_cfg)]
    if not pretrained:
        return None
    options = {k: v for k, v in pretrained[-1].items() if k not in ('type', 'map_location')}
    # resume=True is only reached here if there is nothing to resume
    cfg.load_from, cfg.resume = options.pop('checkpoint'), False
    loading_options(cfg).update(options)
    cfg.model.init_cfg = [init_cfg for init_cfg in given if init_cfg not in pretrained]
    return f'The Pretrained of model.init_cfg is loaded strictly: load_from={cfg.load_from}'


def replaces_pretrained(cfg) -> bool:
    """Whether :func:`starting_checkpoint` brings every weight that is pretrained otherwise.

    Only then can the pretrained weights be left out. It is certain for a model whose
    backbone is an OverLoCK: it loads strictly, but for what the options leave alone.
    """
    if not starting_checkpoint(cfg) or not has_overlock(cfg):
        return False
    loading = loading_options(cfg)
    if not is_a(loading, StrictLoadingHook, HOOKS, cfg.get('default_scope')):
        return False
    if cfg.get('resume'):  # of the options, trust alone counts for it
        return True
    kept = loading.get('ignore_mismatched') or ()
    kept = [kept] if isinstance(kept, str) else kept
    in_backbone = any(k.startswith('backbone') or 'backbone.'.startswith(k) for k in kept)
    return loading.get('strict', True) and not loading.get('prefix') and not in_backbone


def expand_user(cfg) -> None:
    """Expand ``~`` in ``load_from``, ``work_dir`` and the files of pretrained weights."""
    for key in ('load_from', 'work_dir'):
        if cfg.get(key):
            cfg[key] = os.path.expanduser(cfg[key])
    for init_cfg in _init_cfgs(cfg.get('model')):
        if is_pretrained(init_cfg) and init_cfg.get('checkpoint'):
            init_cfg['checkpoint'] = os.path.expanduser(init_cfg['checkpoint'])


def fit_workers(cfg, *loaders: str) -> list[str]:
    """Drop what a data loader cannot have without worker processes.

    Returns:
        What was changed, a line for each loader.
    """
    notes = []
    for name in loaders:
        loader = cfg.get(name) or {}
        if loader.get('num_workers', 0):
            continue
        dropped = [k for k in ('persistent_workers', 'prefetch_factor') if loader.get(k)]
        for key in dropped:
            loader.pop(key)
        if dropped:
            notes.append(
                f'{name} has num_workers=0, so its {" and ".join(dropped)} is left out.'
            )
    return notes


def require_keys(cfg, *keys: str) -> None:
    """Raise :class:`UserError` if one of the keys that a run needs is not there."""
    missing = [key for key in keys if cfg.get(key) is None]
    if missing:
        raise UserError(
            f'{cfg.filename} has no {", ".join(missing)}; add what is missing, or inherit '
            'it: the toolboxes keep data sets and schedules in configs/_base_'
        )


def evaluators(cfg, key: str = 'test_evaluator') -> list[dict]:
    """The configs of all metrics of an evaluator, which may be a list or hold one."""
    node = cfg.get(key) or []
    if isinstance(node, dict) and 'metrics' in node:
        node = node['metrics']
    return [m for m in (node if isinstance(node, list | tuple) else [node]) if m]


def inner_datasets(node) -> Iterator[dict]:
    """The data set configs inside all wrappers (repeated, concatenated) of a loader's."""
    if isinstance(node, list | tuple):
        for item in node:
            yield from inner_datasets(item)
    elif isinstance(node, dict):
        wrapped = [node[key] for key in ('dataset', 'datasets') if node.get(key)]
        if wrapped:
            yield from inner_datasets(wrapped)
        else:
            yield node


def loads_labels(step, scope: str | None = None) -> bool:
    """Whether a step of a pipeline reads or changes labels, which a new image has not."""
    from mmcv.transforms import LoadAnnotations

    return any(is_a(step, t, TRANSFORMS, scope) for t in (LoadAnnotations, MapLabels))


def without_steps(steps, is_unwanted: Callable) -> list:
    """A copy of a pipeline without some of its steps, at any depth.

    Args:
        steps: configs of the steps; a step may have steps in its ``transforms``.
        is_unwanted: whether the config of a step is to be left out.
    """
    kept = []
    for step in copy.deepcopy(list(steps)):
        if isinstance(step, list | tuple):
            step = without_steps(step, is_unwanted)
            if not step:  # all branches of one augmentation
                continue
        elif is_unwanted(step):
            continue
        elif isinstance(step, dict) and 'transforms' in step:
            step['transforms'] = without_steps(step['transforms'], is_unwanted)
        kept.append(step)
    return kept


def _init_cfgs(node) -> Iterator[dict]:
    """Every single ``init_cfg`` of a model config."""
    if isinstance(node, dict):
        given = node.get('init_cfg')
        yield from given if isinstance(given, list | tuple) else [given]
        for value in node.values():
            yield from _init_cfgs(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _init_cfgs(value)
