"""Hooks of mmengine's Runner; not imported by the package itself, as they need OpenCV."""

from .folding import FoldHook
from .loading import StrictLoadingHook

__all__ = ['FoldHook', 'StrictLoadingHook']
