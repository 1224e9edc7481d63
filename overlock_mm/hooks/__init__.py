"""Hooks and optimizer constructors of mmengine.

The package itself does not import them, as they need OpenCV.
"""

from .folding import FoldHook
from .layer_decay import OverLoCKLayerDecayConstructor
from .loading import StrictLoadingHook
from .precision import AutocastHook

__all__ = ['AutocastHook', 'FoldHook', 'OverLoCKLayerDecayConstructor', 'StrictLoadingHook']
