"""Reading a config, and whether what it needs is installed."""

import importlib
import importlib.util
from difflib import get_close_matches
from importlib.metadata import distributions
from pathlib import Path

from ..errors import UserError
from .edit import loading_options

# name, and its packages in the two families that own the same import names
_TOOLBOXES = {
    'mmseg': ('MMSegmentation', 'onedl-mmsegmentation', 'mmsegmentation'),
    'mmdet': ('MMDetection', 'onedl-mmdetection', 'mmdet'),
    'mmcv': ('mmcv', 'onedl-mmcv', 'mmcv'),
}


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
    from mmengine.config import Config

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


def load_config(config: str, options: dict | None = None):
    """Read a config and override entries of it.

    Returns:
        mmengine.Config: the config.

    Raises:
        UserError: if the file is missing or not a config of a known toolbox, or if the
            toolbox or what it needs (mmcv's compiled ops, for one) is not installed.
    """
    path = Path(config)
    if not path.is_file():
        near = get_close_matches(path.name, [p.name for p in path.parent.glob('*.py')])
        hint = f'{path.parent} has {", ".join(near)}' if near else 'give another path'
        raise UserError(f'config {path} does not exist; {hint}')
    if path.suffix not in ('.py', '.yml', '.yaml', '.json'):
        raise UserError(f'{path} is no config; configs end in .py')
    cfg = _read(path)
    cfg.merge_from_dict(options or {})
    scope = cfg.get('default_scope')
    if scope not in ('mmseg', 'mmdet'):
        raise UserError(
            f'{path} has default_scope={scope!r}; these tools know mmseg and mmdet'
        )
    _require('mmcv')
    _require(scope)
    _require_working(scope)
    return cfg


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
    from mmengine.registry import MODELS, init_default_scope

    if 'model' not in cfg:
        raise UserError(f'{cfg.filename} has no model; give the config of one')
    toolbox = importlib.import_module(f'{cfg.default_scope}.utils')
    toolbox.register_all_modules(init_default_scope=False)
    init_default_scope(cfg.default_scope)
    return MODELS.build(cfg.model)


def build_runner(cfg):
    """The runner of a config, with weights that must fit."""
    from mmengine.registry import RUNNERS

    importlib.import_module('overlock_mm.hooks')
    loading_options(cfg)
    return RUNNERS.build(cfg)
