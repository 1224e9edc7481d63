"""OverLoCK, a ConvNet backbone for dense prediction, as an OpenMMLab plugin."""

from .checkpoint import load_checkpoint
from .models import OverLoCK, fold
from .version import __version__

__all__ = ['OverLoCK', '__version__', 'fold', 'load_checkpoint']
