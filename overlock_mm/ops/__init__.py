from .contmix import contmix, set_contmix_backend

__all__ = ['contmix', 'set_contmix_backend']
