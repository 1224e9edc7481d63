"""OverLoCK, a ConvNet backbone for dense prediction, as an OpenMMLab plugin."""

from .checkpoint import load_checkpoint
from .models import ContMix, ContMixBlock, OverLoCK, fold, switch_to_deploy
from .version import __version__

__all__ = [
    'ContMix',
    'ContMixBlock',
    'OverLoCK',
    '__version__',
    'fold',
    'load_checkpoint',
    'switch_to_deploy',
]
