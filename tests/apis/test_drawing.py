"""Pictures of predictions: what is drawn where, in which colour."""

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData
from pycocotools import mask as coco_mask

from overlock_mm.apis.drawing import draw_objects, draw_regions, to_rgb

CLASSES = ('sky', 'tree', 'person')
PALETTE = [(0, 0, 255), (0, 200, 0), (255, 0, 0)]
NAMES = dict(classes=CLASSES, palette=PALETTE)


def halves(height=600, width=800):
    """A grey image whose left quarter is sky and whose rest is tree."""
    labels = np.ones((height, width), np.int64)
    labels[:, : width // 4] = 0
    return np.full((height, width, 3), 100, np.uint8), labels


def test_regions():
    image, labels = halves()
    drawn = draw_regions(image, labels, opacity=0.5, **NAMES)
    assert drawn.dtype == np.uint8 and drawn.shape[1] == 800 and drawn.shape[0] > 600
    np.testing.assert_allclose(drawn[300, 100], (50, 50, 178), atol=1)
    np.testing.assert_allclose(drawn[300, 500], (50, 150, 50), atol=1)
    assert (drawn[300, 200] == 255).all(), 'no line where regions meet'
    assert (image == 100).all(), 'the image was changed'
    opaque = draw_regions(image, labels, opacity=1.0, legend=False, **NAMES)
    assert opaque.shape == image.shape
    assert tuple(opaque[300, 500]) == PALETTE[1]


def test_the_legend_has_the_classes_that_are_there():
    image, labels = halves()
    strip = draw_regions(image, labels, **NAMES)[600:]
    colors = {tuple(c) for c in strip.reshape(-1, 3).tolist()}
    assert {PALETTE[0], PALETTE[1]} <= colors and PALETTE[2] not in colors
    # the larger share comes first
    first = {i: np.argwhere((strip == PALETTE[i]).all(-1))[:, 1].min() for i in (0, 1)}
    assert first[1] < first[0]
    assert (strip == 0).all(-1).any(), 'no text'


def test_classes_that_are_not_shown():
    image, labels = halves()
    labels[:10] = 255  # no class
    drawn = draw_regions(image, labels, shown=[True, False, True], **NAMES)
    assert (drawn[300, 500] == 100).all()
    assert (drawn[5, 100] == 100).all()
    assert (drawn[600:] == PALETTE[1]).all(-1).sum() == 0
    nothing = draw_regions(image, labels, shown=[False] * 3, **NAMES)
    assert (nothing[600:] < 100).all(-1).any(), 'nothing is said'


@pytest.mark.parametrize('size', [(1, 1), (20, 31), (479, 300), (480, 480), (3000, 4000)])
def test_any_size(size):
    """Small images are enlarged, so that lines and texts can be read."""
    image, labels = halves(*size)
    drawn = draw_regions(image, labels, legend=False, **NAMES)
    factor = drawn.shape[0] // size[0]
    assert drawn.shape[:2] == (size[0] * factor, size[1] * factor)
    assert max(drawn.shape[:2]) >= 480 and (factor == 1 or max(size) < 480)
    if size[0] == 3000:
        line = (drawn[1500] == 255).all(-1).sum()
        assert line >= 5, 'too thin for an image of this size'


def test_a_legend_of_many_classes_in_a_narrow_picture():
    names = [f'a class with a long name {i}' for i in range(150)]
    palette = [(i, 255 - i, 50) for i in range(150)]
    labels = np.arange(150).repeat(400).reshape(500, 120)
    image = np.zeros((500, 120, 3), np.uint8)
    drawn = draw_regions(image, labels, classes=names, palette=palette)
    assert drawn.shape[1] == 120
    rows = {i for i in range(150) if (drawn[500:] == palette[i]).all(-1).any()}
    assert len(rows) == 40
    two = draw_regions(image, labels, classes=names, palette=palette, legend_rows=2)
    assert two.shape[0] < drawn.shape[0]


def objects(masks=True, encoded=False):
    found = InstanceData(
        bboxes=torch.tensor([[100.0, 200, 300, 400], [500, 100, 700, 500]]),
        labels=torch.tensor([2, 1]),
        scores=torch.tensor([0.9, 0.5]),
    )
    if masks:
        found.masks = torch.zeros(2, 600, 800, dtype=torch.bool)
        found.masks[0, 250:350, 150:250] = True
        found.masks[1, 100:500, 600:700] = True
    if encoded:
        found.masks = [
            coco_mask.encode(np.asfortranarray(m.numpy(), np.uint8)) for m in found.masks
        ]
    return found


@pytest.mark.parametrize('encoded', [False, True])
def test_objects(encoded):
    image, _ = halves()
    drawn = draw_objects(image, objects(encoded=encoded), opacity=0.5, **NAMES)
    assert tuple(drawn[300, 100]) == PALETTE[2], 'no box'
    np.testing.assert_allclose(drawn[300, 200], (178, 50, 50), atol=1)
    assert (drawn[230, 120] == 100).all(), 'tinted outside of the mask'
    assert tuple(drawn[300, 249]) == PALETTE[2], 'no outline'
    # name and score stand above the box, on its colour
    label = drawn[170:200, 100:220]
    assert (label == PALETTE[2]).all(-1).mean() > 0.4
    assert (label == 255).all(-1).any()
    assert drawn.shape[0] > 600


def test_small_objects_are_above_large_ones():
    image, _ = halves()
    found = InstanceData(
        bboxes=torch.tensor([[300.0, 300, 320, 320], [0, 0, 800, 600]]),
        labels=torch.tensor([0, 1]),
        scores=torch.tensor([0.1, 0.9]),
        masks=torch.ones(2, 600, 800, dtype=torch.bool),
    )
    found.masks[0] = False
    found.masks[0, 300:320, 300:320] = True
    drawn = draw_objects(image, found, opacity=1.0, **NAMES)
    assert tuple(drawn[310, 310]) == PALETTE[0]


def test_objects_that_are_not_shown():
    image, _ = halves()
    drawn = draw_objects(image, objects(), shown=[True, True, False], **NAMES)
    assert (drawn[300, 50:290] == 100).all() and tuple(drawn[300, 500]) == PALETTE[1]
    assert not (drawn[600:] == PALETTE[2]).all(-1).any()


def test_boxes_alone_and_none_at_all():
    image, _ = halves()
    drawn = draw_objects(image, objects(masks=False), **NAMES)
    assert (drawn[300, 200] == 100).all() and tuple(drawn[300, 100]) == PALETTE[2]
    empty = draw_objects(image, objects()[:0], **NAMES)
    assert (empty[:600] == 100).all()


def test_a_name_at_the_border_stays_inside():
    image, _ = halves()
    found = objects(masks=False)
    found.bboxes = torch.tensor([[700.0, 0, 799, 50], [790, 590, 799, 599]])
    drawn = draw_objects(image, found, legend=False, **NAMES)
    assert drawn.shape == image.shape
    for color in PALETTE[1:]:
        assert (drawn == color).all(-1).sum() > 1000, 'the name is cut off'


def test_any_image_becomes_a_picture():
    bgr = np.zeros((4, 5, 3), np.uint8)
    bgr[..., 0] = 200
    assert tuple(to_rgb(bgr)[0, 0]) == (0, 0, 200)
    grey = to_rgb(np.full((4, 5), 7, np.uint8))
    assert grey.shape == (4, 5, 3) and (grey == 7).all()
    assert to_rgb(np.full((4, 5, 2), 7, np.uint8)).shape == (4, 5, 3)
    same = to_rgb(np.float32([[[10, 20, 30]]]))  # 0..255, as to_float32 reads
    assert tuple(same[0, 0]) == (30, 20, 10)
    deep = to_rgb(np.arange(100, dtype=np.uint16).reshape(10, 10) * 600)
    assert deep.min() == 0 and deep.max() == 255
    bands = np.zeros((10, 10, 5), np.float32)
    bands[..., 0], bands[0, 0, 3:] = np.linspace(-4, 4, 100).reshape(10, 10), np.nan
    picture = to_rgb(bands)
    assert picture[..., 0].max() == 255 and picture[-1, -1].tolist()[0] == 255
