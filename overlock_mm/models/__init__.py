from .folded import fold
from .overlock import OverLoCK

__all__ = ['OverLoCK', 'fold']
