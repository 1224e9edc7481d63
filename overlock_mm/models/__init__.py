from .blocks import ContMixBlock
from .contmix import ContMix
from .folded import fold, switch_to_deploy
from .overlock import OverLoCK

__all__ = ['ContMix', 'ContMixBlock', 'OverLoCK', 'fold', 'switch_to_deploy']
