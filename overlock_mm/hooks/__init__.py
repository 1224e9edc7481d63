"""Hooks of mmengine's Runner; not imported by the package itself, as they need OpenCV."""

from .loading import StrictLoadingHook

__all__ = ['StrictLoadingHook']
