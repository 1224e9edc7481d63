"""Transforms for data that the toolboxes' own do not read."""

from collections.abc import Sequence

import numpy as np

from ..openmmlab import TRANSFORMS
from .survey.images import LARGEST


@TRANSFORMS.register_module()
class MapLabels:
    """Turn the values of a label map into indices of classes.

    It comes behind MMSegmentation's ``LoadAnnotations``, which loads values as they are.

    Args:
        values (Sequence): for each class the value that its pixels have, an int in 0..255
            or, in a label map of colours, a tuple (red, green, blue).
        ignore_index (int): the index of pixels with any other value. Defaults to 255.

    Raises:
        ValueError: if a label map has one channel and the values are colours, or the other
            way round.
    """

    def __init__(self, values: Sequence[int | Sequence[int]], ignore_index: int = 255):
        self.values = [tuple(v) if isinstance(v, Sequence) else v for v in values]
        self.ignore_index = ignore_index
        self.colors = isinstance(self.values[0], tuple)
        self.table = np.full(256, ignore_index, np.uint8)
        if not self.colors:
            self.table[self.values] = np.arange(len(values))

    def __call__(self, results: dict) -> dict:
        """Replace ``results['gt_seg_map']``, ``(H, W)`` or ``(H, W, 3 or 4)`` in BGR."""
        labels = results['gt_seg_map']
        if (labels.ndim == 3) != self.colors:
            raise ValueError(
                f'{results.get("seg_map_path")} has shape {labels.shape}, and '
                f'MapLabels(values={self.values}) is for '
                f'{"colours" if self.colors else "one channel"}; convert the file'
            )
        if self.colors:
            found = np.full(labels.shape[:2], self.ignore_index, np.uint8)
            for index, color in enumerate(self.values):
                found[(labels[..., 2::-1] == color).all(axis=-1)] = index
        else:
            found = self.table[labels]
        results['gt_seg_map'] = found
        return results


@TRANSFORMS.register_module()
class ChannelsLast:
    """Turn an image ``(C, H, W)``, as TIFF files may store it, into ``(H, W, C)``."""

    def __call__(self, results: dict) -> dict:
        """Replace ``results['img']``, and its ``img_shape`` and ``ori_shape``."""
        image = np.ascontiguousarray(results['img'].transpose(1, 2, 0))
        shape = image.shape[:2]
        return dict(results, img=image, img_shape=shape, ori_shape=shape)


@TRANSFORMS.register_module()
class Standardize:
    """Subtract a mean and divide by a standard deviation, for any number of channels.

    MMDetection's preprocessor takes 1 or 3 channels. Give it no mean and std then. Values
    that are not finite, or of 1e30 and more, become the mean.

    Args:
        mean (Sequence[float]): one value for each channel.
        std (Sequence[float]): likewise.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self.mean, self.std = np.float32(mean), np.float32(std)

    def __call__(self, results: dict) -> dict:
        """Replace ``results['img']``, ``(H, W)`` or ``(H, W, C)``, by one in float32."""
        image = results['img']
        image = image[..., None] if image.ndim == 2 else image
        image = image.astype(np.float32)
        usable = np.abs(image) < LARGEST
        image = np.where(usable, (image - self.mean) / self.std, np.float32(0))
        return dict(results, img=image)
