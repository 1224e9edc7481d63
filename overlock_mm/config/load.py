"""Reading a config, and whether what it needs is installed."""

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, distribution, distributions
from pathlib import Path

from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import MODELS, RUNNERS, init_default_scope

from ..errors import UserError
from ..openmmlab import config_path
from .edit import add_imports, expand_user, loading_options

# name, and its packages in the two families that own the same import names
_TOOLBOXES = {
    'mmseg': ('MMSegmentation', 'onedl-mmsegmentation', 'mmsegmentation'),
    'mmdet': ('MMDetection', 'onedl-mmdetection', 'mmdet'),
    'mmcv': ('mmcv', 'onedl-mmcv', 'mmcv'),
}

_TOOLBOX_SCOPES = ('mmdet', 'mmseg')


def _package(name: str) -> str:
    """The distribution of ``name`` in the family of which something is installed."""
    _, onedl, openmmlab = _TOOLBOXES[name]
    installed = {d.metadata['Name'] for d in distributions()}
    return openmmlab if installed & {'mmengine', 'mmdet', 'mmsegmentation'} else onedl


def _require(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise UserError(
            f'{_TOOLBOXES[name][0]} is not installed; run: pip install '
            f'--no-build-isolation {_package(name)}'
        )


def _read(path: Path):
    """Read a config; say what to install where it inherits from a toolbox."""
    _find_packages()
    try:
        return Config.fromfile(path)
    except ModuleNotFoundError as error:
        # mmengine's own, for _base_ = 'mmdet::...', has a message but no name
        package = str(error).partition(' is not installed')[0]
        toolbox = next((n for n in _TOOLBOXES if package in _TOOLBOXES[n]), None)
        if error.name or toolbox is None:
            raise
        _require(toolbox)
        raise UserError(
            f"{path} inherits '{toolbox}::...', which mmengine finds only where "
            f'{_TOOLBOXES[toolbox][0]} is installed as {package}; write the path of the '
            'file instead'
        ) from error


def _find_packages() -> None:
    """Have mmengine find the onedl packages for ``_base_ = 'mmseg::...'``."""
    for name, package in MODULE2PACKAGE.items():
        if name in _TOOLBOXES and _package(name) != package:
            with suppress(PackageNotFoundError):
                distribution(_package(name))
                MODULE2PACKAGE[name] = _package(name)


def read_config(config: str | Path):
    """Read a config that may import packages which are not installed.

    Args:
        config: its path.

    Returns:
        mmengine.Config: the config as it is in the file.

    Raises:
        UserError: if it is missing or cannot be read.
    """
    path = _check_path(config)
    with _readable(path):
        try:
            return _read(path)
        except ImportError:
            return Config.fromfile(path, import_custom_modules=False)


def load_config(config: str | Path, options: dict | None = None):
    """Read a config, override keys of it, and check that what it needs is installed.

    Args:
        config: path of a config of MMDetection or MMSegmentation; one of a package also as
            ``'overlock_mm::segmentation/upernet_overlock_t.py'`` or ``'mmdet::...'``.
        options: values by key, as ``{'train_dataloader.batch_size': 4}``.

    Returns:
        mmengine.Config: the config, which also imports this package.

    Raises:
        UserError: if the file is missing or not a config of a known toolbox, or if the
            toolbox or what it needs (mmcv's compiled ops, for one) is not installed.
    """
    path = _check_path(config)
    with _readable(path):
        cfg = _read(path)
        cfg.merge_from_dict(options or {})
    toolbox = toolbox_of(cfg)
    _require('mmcv')
    _require(toolbox)
    _require_working(toolbox)
    add_imports(cfg)
    expand_user(cfg)
    return cfg


def _check_path(config: str | Path) -> Path:
    path = config_path(config)
    package, mark, _ = str(config).partition('::')
    if mark and package in _TOOLBOXES:
        _require(package)
    if not path.is_file():
        near = get_close_matches(path.name, [p.name for p in path.parent.glob('*.py')])
        hint = f'{path.parent} has {", ".join(near)}' if near else 'give another path'
        raise UserError(f'config {config} does not exist; {hint}')
    if path.suffix not in ('.py', '.yml', '.yaml', '.json'):
        raise UserError(f'{path} is not a config; configs end in .py, .yml, .yaml or .json')
    return path


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what may go wrong in a config into an error that names it."""
    try:
        yield
    except (OSError, ImportError, SyntaxError, KeyError, TypeError) as error:
        raise UserError(
            f'{path} cannot be read: {type(error).__name__}: {error}; fix the config, or '
            'what it inherits or imports (--debug shows where)'
        ) from error


def load_run_config(
    config: str | Path,
    options: dict | None = None,
    work_dir: str | None = None,
    launcher: str = 'none',
):
    """Read a config as :func:`load_config` does, for a run.

    Args:
        config: path of the config.
        options: values by key.
        work_dir: where logs and results go; by default that of the config, or
            ``work_dirs/`` and the name of the config.
        launcher: how distributed processes were started: 'none', 'pytorch', 'slurm' or
            'mpi'.

    Returns:
        mmengine.Config: the config.
    """
    cfg = load_config(config, options)
    cfg.launcher = launcher
    cfg.work_dir = work_dir or cfg.get('work_dir') or f'work_dirs/{Path(config).stem}'
    expand_user(cfg)
    return cfg


def toolbox_of(cfg) -> str:
    """The toolbox of a config: 'mmdet' or 'mmseg'.

    It is the default scope. Pure-Python configs, and those that write scopes out, can do
    without: there it is where the model comes from, else the data sets and hooks.

    Raises:
        UserError: if it is neither.
    """
    scope = cfg.get('default_scope')
    if scope in _TOOLBOX_SCOPES:
        return scope
    if scope in (None, 'mmengine'):
        content = cfg.to_dict()  # with names in place of what is imported on first use
        for node in (content.get('model'), content):
            for kind in _types(node):
                origin = kind.split('.')[0]
                if origin in _TOOLBOX_SCOPES:
                    return origin
    raise UserError(
        f'{cfg.filename} has default_scope={scope!r}, and these tools know mmdet and '
        "mmseg; write default_scope = 'mmdet' or 'mmseg' into it"
    )


def _types(node) -> Iterator[str]:
    """The names of all types in a config, with their scope or module."""
    if isinstance(node, dict):
        kind = node.get('type')
        if isinstance(kind, type):
            yield f'{kind.__module__}.{kind.__name__}'
        elif isinstance(kind, str):
            yield kind
        node = node.values()
    if isinstance(node, list | tuple | type({}.values())):
        for value in node:
            yield from _types(value)


def _require_working(toolbox: str) -> None:
    """Import the toolbox, and name what it lacks."""
    build = (
        'MMCV_WITH_OPS=1 pip install --no-build-isolation --no-cache-dir --no-deps '
        f'--force-reinstall {_package("mmcv")}'
    )
    no_ops = UserError(
        'mmcv is installed without its compiled ops, which '
        f'{_TOOLBOXES[toolbox][0]} needs; build them against the installed torch: {build}'
    )
    if toolbox == 'mmdet' and importlib.util.find_spec('mmcv._ext') is None:
        raise no_ops
    try:
        importlib.import_module(f'{toolbox}.utils')
    except ModuleNotFoundError as error:
        if error.name == 'mmcv._ext':
            raise no_ops from error
        raise UserError(
            f'{_TOOLBOXES[toolbox][0]} needs {error.name}, which is not installed; run: '
            f'pip install {error.name}'
        ) from error
    except AssertionError as error:  # it checks the versions of mmcv and mmengine
        raise UserError(' '.join(str(error).split())) from error
    if toolbox != 'mmdet':
        return
    import torch
    from mmcv.ops import get_compiling_cuda_version

    if torch.cuda.is_available() and get_compiling_cuda_version() == 'not available':
        raise UserError(
            "mmcv's ops were compiled without CUDA, and this machine has a GPU; build "
            f'them again with nvcc on the PATH: {build}; or use the CPU: '
            'CUDA_VISIBLE_DEVICES='
        )


def build_model(cfg):
    """The detector or segmentor of a config."""
    if 'model' not in cfg:
        raise UserError(f'{cfg.filename} has no model; give the config of one')
    register_modules(toolbox_of(cfg))
    return MODELS.build(cfg.model)


def register_modules(toolbox: str) -> None:
    """Register the modules of a toolbox, and look names up in it by default."""
    _require('mmcv')
    _require(toolbox)
    _require_working(toolbox)
    utils = importlib.import_module(f'{toolbox}.utils')
    utils.register_all_modules(init_default_scope=False)
    init_default_scope(toolbox)


def build_runner(cfg):
    """The runner of a config, with weights that must fit."""
    loading_options(cfg)
    if cfg.get('visualizer'):
        # mmengine hands out one visualizer for a name: with the fixed name of the stock
        # configs, a second run in a process would log into the first one's folder
        cfg.visualizer.pop('name', None)
        cfg.visualizer.setdefault('type', 'Visualizer')
    try:
        return RUNNERS.build(cfg)
    except ImportError as error:
        # mmengine's visualizers have messages of their own for what is not installed
        if isinstance(error.__context__, ModuleNotFoundError):
            raise error.__context__ from error
        raise
