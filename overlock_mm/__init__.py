"""OverLoCK, a ConvNet backbone for dense prediction, as an OpenMMLab plugin."""

from .models import OverLoCK, fold
from .version import __version__

__all__ = ['OverLoCK', '__version__', 'fold']
