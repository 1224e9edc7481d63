from .blocks import ContMixBlock
from .contmix import ContMix
from .folded import fold, switch_to_deploy
from .overlock import OverLoCK
from .timm_backbone import TimmBackbone

__all__ = [
    'ContMix',
    'ContMixBlock',
    'OverLoCK',
    'TimmBackbone',
    'fold',
    'switch_to_deploy',
]
