"""What the package takes from mmengine, and what stands in where that is not installed.

Both families of OpenMMLab packages bring a ``mmengine``, so neither can be a dependency.
The backbone, its weights and its models in timm work without; everything else needs it.
"""

from importlib.util import find_spec
from pathlib import Path

from torch import nn

# The configs of this package: a copy in a wheel, links in an editable installation.
CONFIGS = Path(__file__).parent / '.mim/configs'


def config_path(config: str | Path) -> Path:
    """The file of a config, which may be given as ``'overlock_mm::NAME.py'``.

    Packages are ``overlock_mm``, and ``mmdet`` and ``mmseg`` where they are installed.
    """
    package, mark, name = str(config).partition('::')
    if mark and package == 'overlock_mm':
        return CONFIGS / name
    spec = find_spec(package) if mark and package in ('mmdet', 'mmseg') else None
    return Path(spec.origin).parent / '.mim/configs' / name if spec else Path(config)


try:
    from mmengine.config import Config, ConfigDict
    from mmengine.config.utils import MODULE2PACKAGE
    from mmengine.logging import HistoryBuffer, print_log
    from mmengine.model import BaseModule
    from mmengine.model.weight_init import PretrainedInit, update_init_info
    from mmengine.registry import MODELS, TRANSFORMS, WEIGHT_INITIALIZERS
except ModuleNotFoundError as error:
    if error.name != 'mmengine':  # installed, and something that it needs is not
        raise

    class BaseModule(nn.Module):
        def __init__(self, init_cfg=None):
            if init_cfg:
                raise ModuleNotFoundError(
                    'init_cfg needs mmengine, which is not installed; load weights with '
                    'overlock_mm.load_checkpoint(backbone, file) instead',
                    name='mmengine',
                ) from None
            super().__init__()
            self.init_cfg = init_cfg

        def init_weights(self) -> None:
            """Do nothing: the constructor has initialised all weights."""

    class _Registry:
        def register_module(self):
            return lambda cls: cls

        def get(self, name: str) -> None:
            return None

    MODELS = TRANSFORMS = WEIGHT_INITIALIZERS = _Registry()

    class PretrainedInit:
        """No initializer is one."""

    def update_init_info(module: nn.Module, init_info: str) -> None:
        """Do nothing: only mmengine keeps a record."""

    def print_log(message: str, logger: str | None = None, level: int | None = None):
        if logger != 'silent':
            print(message)

    # What checkpoints of mmengine hold beside weights, with its names.
    class ConfigDict(dict):
        __module__, __qualname__ = 'mmengine.config.config', 'ConfigDict'

    class Config:
        __module__, __qualname__ = 'mmengine.config.config', 'Config'

        def __setstate__(self, state):
            self.state = state

    class HistoryBuffer:
        __module__, __qualname__ = 'mmengine.logging.history_buffer', 'HistoryBuffer'

        def _set_default_statistics(self) -> None:
            """Nothing is computed of it."""

        def mean(self): ...
        def max(self): ...
        def min(self): ...
        def current(self): ...

    for _statistic in ('mean', 'max', 'min', 'current'):
        getattr(HistoryBuffer, _statistic).__module__ = HistoryBuffer.__module__
else:
    _find_config = Config._get_cfg_path

    def _get_cfg_path(cfg_path: str, filename: str) -> tuple[str, str | None]:
        """Find ``_base_ = 'overlock_mm::...'``; mmengine finds those of toolboxes.

        The second value is None: the base gets no scope of its own, as it needs the
        toolbox's.
        """
        if cfg_path.startswith('overlock_mm::'):
            return str(config_path(cfg_path)), None
        return _find_config(cfg_path, filename)

    Config._get_cfg_path = staticmethod(_get_cfg_path)
    MODULE2PACKAGE['overlock_mm'] = 'overlock_mm'  # for mmengine.hub


__all__ = [
    'CONFIGS',
    'MODELS',
    'TRANSFORMS',
    'WEIGHT_INITIALIZERS',
    'BaseModule',
    'Config',
    'ConfigDict',
    'HistoryBuffer',
    'PretrainedInit',
    'config_path',
    'print_log',
    'update_init_info',
]
