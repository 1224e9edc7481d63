from .contmix import contmix, set_contmix_backend
from .depthwise_choice import set_depthwise_backend

__all__ = ['contmix', 'set_contmix_backend', 'set_depthwise_backend']
