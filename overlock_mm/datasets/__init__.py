"""Demo scenes, a look at other people's data, and transforms that read it."""

from .transforms import ChannelsLast, MapLabels, Standardize

__all__ = ['ChannelsLast', 'MapLabels', 'Standardize']
