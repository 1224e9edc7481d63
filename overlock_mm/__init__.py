"""OverLoCK, a ConvNet backbone for dense prediction, as an OpenMMLab plugin."""

import sys
from pathlib import Path

from .version import __version__

__all__ = [
    'ContMix',
    'ContMixBlock',
    'OverLoCK',
    '__version__',
    'fold',
    'load_checkpoint',
    'swap_backbone',
    'switch_to_deploy',
]
# Set where only the command line runs, which explains it.
import_error: Exception | None = None

try:
    from .checkpoint import load_checkpoint
    from .models import ContMix, ContMixBlock, OverLoCK, fold, switch_to_deploy
except Exception as error:  # libraries that do not fit each other raise what they like
    if sys.argv[:1] != ['-m'] and Path(sys.argv[0]).stem != 'overlock':
        raise
    import_error = error


def __getattr__(name: str):
    # it needs OpenCV, through mmengine's hooks, which the backbone does not
    if name == 'swap_backbone':
        from .config.swap import swap_backbone

        return swap_backbone
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
