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
    'swap_backbone',
    'switch_to_deploy',
]


def __getattr__(name: str):
    # it needs OpenCV, through mmengine's hooks, which the backbone does not
    if name == 'swap_backbone':
        from .config.swap import swap_backbone

        return swap_backbone
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
