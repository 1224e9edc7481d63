"""OverLoCK, a ConvNet backbone for dense prediction, as an OpenMMLab plugin."""

import os
import sys
from pathlib import Path

from .version import __version__

__all__ = [
    'ContMix',
    'ContMixBlock',
    'OverLoCK',
    'Predictor',
    '__version__',
    'fold',
    'load_checkpoint',
    'swap_backbone',
    'switch_to_deploy',
]
# What the command line reports; anywhere else it is raised.
import_error: Exception | None = None

_script, *_arguments = sys.argv or ['']
_is_command = _script == '-m' or Path(_script).stem == 'overlock'
if _is_command or 'OVERLOCK_MM_TOOL' in os.environ:
    # read when torch is loaded: threads that wait leave the core to other processes soon,
    # and large blocks of memory come in large pages
    os.environ.setdefault('GOMP_SPINCOUNT', '1000')
    os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')
# `overlock doctor` must run where an import crashes the process
if not _is_command or _arguments[:1] != ['doctor']:
    try:
        from .checkpoint import load_checkpoint
        from .models import ContMix, ContMixBlock, OverLoCK, fold, switch_to_deploy
    except Exception as error:  # libraries that do not fit each other raise what they like
        if not _is_command:
            raise
        import_error = error


def __getattr__(name: str):
    # they need OpenCV, through mmengine's hooks, which the backbone does not
    if name == 'swap_backbone':
        from .config.swap import swap_backbone

        return swap_backbone
    if name == 'Predictor':
        from .apis.inference import Predictor

        return Predictor
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
