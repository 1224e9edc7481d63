"""Transforms for label maps with other values, and for images with other channels."""

import numpy as np
import pytest
from mmengine.registry import TRANSFORMS

from overlock_mm.datasets import ChannelsLast, MapLabels, Standardize


def test_values():
    labels = np.array([[0, 50], [100, 7]], np.uint8)
    transform = TRANSFORMS.build(dict(type='MapLabels', values=[50, 0, 100]))
    out = transform(dict(gt_seg_map=labels, kept=1))
    assert out['gt_seg_map'].tolist() == [[1, 0], [2, 255]] and out['kept'] == 1
    assert out['gt_seg_map'].dtype == np.uint8
    out = MapLabels([50, 100], ignore_index=9)(dict(gt_seg_map=labels))
    assert out['gt_seg_map'].tolist() == [[9, 0], [1, 9]]


@pytest.mark.parametrize('channels', [3, 4])
def test_colours(channels):
    """OpenCV's order, blue first, with or without an alpha channel."""
    colors = np.array([[(0, 64, 128, 9), (1, 2, 3, 9)], [(3, 2, 1, 9), (0, 0, 0, 0)]])
    labels = colors.astype(np.uint8)[..., :channels]
    transform = MapLabels([[128, 64, 0], (1, 2, 3)])  # from a config, tuples may be lists
    out = transform(dict(gt_seg_map=labels))['gt_seg_map']
    assert out.tolist() == [[0, 255], [1, 255]]


def test_values_and_colours_are_not_mixed_up():
    with pytest.raises(ValueError, match=r'a.png has shape \(2, 2, 3\).* one channel'):
        MapLabels([0, 1])(dict(gt_seg_map=np.zeros((2, 2, 3)), seg_map_path='a.png'))
    with pytest.raises(ValueError, match=r'has shape \(2, 2\).* is for colours'):
        MapLabels([(0, 0, 0)])(dict(gt_seg_map=np.zeros((2, 2))))


def test_channels_last():
    image = np.arange(24).reshape(2, 3, 4)
    out = ChannelsLast()(dict(img=image, img_shape=(2, 3), ori_shape=(2, 3)))
    assert out['img'].shape == (3, 4, 2) and out['img_shape'] == out['ori_shape'] == (3, 4)
    assert (out['img'][..., 1] == image[1]).all()


def test_standardize():
    image = np.arange(10, dtype=np.uint16).reshape(1, 2, 5)
    out = Standardize([1, 2, 3, 4, 5], [1, 1, 1, 1, 2])(dict(img=image))['img']
    assert out.dtype == np.float32
    assert out.tolist() == [[[-1, -1, -1, -1, -0.5], [4, 4, 4, 4, 2]]]
    grey = np.array([[1, np.nan], [np.inf, 5]], np.float32)
    out = Standardize([3], [2])(dict(img=grey))['img']
    assert out[..., 0].tolist() == [[-1, 0], [0, 1]]
