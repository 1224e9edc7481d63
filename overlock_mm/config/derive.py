"""Writing a changed config as one that inherits from the original."""

import importlib.util
import os
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from mmengine.config import Config
from yapf.yapflib.yapf_api import FormatCode

from ..openmmlab import config_path

_STYLE = dict(
    based_on_style='pep8',
    column_limit=92,
    dedent_closing_brackets=True,
    each_dict_entry_on_separate_line=True,
    split_before_first_argument=True,
)


def derived_config(base: str | Path, old: Config, new: Config, out: str | Path) -> str:
    """The text of a config that inherits from a file and is equal to a changed config.

    It has the changed keys alone, for people to read and edit.

    Args:
        base: path of the original config.
        old: the original config, as it was read.
        new: the changed config.
        out: where the text is going to be written.

    Returns:
        A pure-Python config (``with read_base()``) if the original is one, else one with
        ``_base_``.
    """
    before, after = (_plain(cfg.to_dict()) for cfg in (old, new))
    if is_pure_python(base):
        lines = [
            'from mmengine.config import read_base',
            '',
            'with read_base():',
            f'    from {_module(base, out)} import *',
            '',
        ]
        lines += _assignments(before, after)
    else:
        lines = [f'_base_ = {_inherited(base, out)!r}']
        for key, value in _changes(before, after).items():
            lines.append(f'{key} = {_inline(value)}')
    text, _ = FormatCode('\n'.join(lines) + '\n', style_config=_STYLE)
    return text


def is_pure_python(config: str | Path) -> bool:
    """Whether a config is one of mmengine's pure-Python configs."""
    path = config_path(config)
    return path.suffix == '.py' and bool(Config._is_lazy_import(str(path)))


def _plain(node):
    """The same with names in place of classes and functions."""
    if isinstance(node, dict):
        return {k: _plain(v) for k, v in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(_plain(v) for v in node)
    if isinstance(node, type) or callable(node):
        return f'{node.__module__}.{node.__qualname__}'
    return node


def _changes(old: dict, new: dict) -> dict:
    """What a config has to say to turn ``old`` into ``new``, as mmengine merges dicts."""
    changes = {}
    for key, value in new.items():
        if key not in old:
            changes[key] = value
        elif old[key] != value or type(old[key]) is not type(value):
            both = isinstance(value, dict) and isinstance(old[key], dict)
            if both and _replaced(old[key], value):
                changes[key] = {'_delete_': True, **value}
            else:
                changes[key] = _changes(old[key], value) if both else value
    return changes


def _replaced(old: dict, new: dict) -> bool:
    """Whether a dict is another one, and not the same with other values."""
    return old.get('type') != new.get('type') or bool(set(old) - set(new))


def _assignments(old: dict, new: dict, start: str = '') -> list[str]:
    """Statements that turn ``old`` into ``new``."""
    lines = []
    for key, value in new.items():
        target = f'{start}[{key!r}]' if start else key
        if key in old and old[key] == value:
            continue
        both = isinstance(value, dict) and isinstance(old.get(key), dict)
        if both and not _replaced(old[key], value):
            lines += _assignments(old[key], value, target)
            continue
        lines.append(f'{target} = {_inline(value)}')
    return lines


def _inline(value) -> str:
    if isinstance(value, dict):
        if all(isinstance(k, str) and k.isidentifier() for k in value):
            return f'dict({", ".join(f"{k}={_inline(v)}" for k, v in value.items())})'
        return f'{{{", ".join(f"{k!r}: {_inline(v)}" for k, v in value.items())}}}'
    if isinstance(value, list):
        return f'[{", ".join(map(_inline, value))}]'
    if isinstance(value, tuple):
        inner = ', '.join(map(_inline, value))
        return f'({inner},)' if len(value) == 1 else f'({inner})'
    return repr(value)


def _inherited(base: str | Path, out: str | Path) -> str:
    """How ``_base_`` names a file: by its toolbox where mmengine finds it."""
    if str(base).startswith('overlock_mm::'):
        return str(base)
    base = config_path(base).resolve()
    for toolbox, package in (('mmdet', 'mmdet'), ('mmseg', 'mmsegmentation')):
        spec = importlib.util.find_spec(toolbox)
        configs = spec and Path(spec.origin).parent / '.mim' / 'configs'
        if configs and base.is_relative_to(configs) and _mmengine_finds(package):
            return f'{toolbox}::{base.relative_to(configs)}'
    return os.path.relpath(base, Path(out).resolve().parent)


def _mmengine_finds(package: str) -> bool:
    with suppress(PackageNotFoundError):
        distribution(package)
        return True
    return importlib.util.find_spec(package) is not None


def _module(base: str | Path, out: str | Path) -> str:
    """How a pure-Python config imports another one."""
    base = config_path(base).resolve().with_suffix('')
    for toolbox in ('mmdet', 'mmseg'):
        spec = importlib.util.find_spec(toolbox)
        package = spec and Path(spec.origin).parent
        if package and base.is_relative_to(package):
            return '.'.join((toolbox, *base.relative_to(package).parts))
    *up, name = Path(os.path.relpath(base, Path(out).resolve().parent)).parts
    return '.' * (1 + up.count('..')) + '.'.join([p for p in up if p != '..'] + [name])
