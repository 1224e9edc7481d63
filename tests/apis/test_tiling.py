"""Tiles: how an image is divided, and that joined predictions are those of the whole."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample
from pycocotools import mask as coco_mask

from overlock_mm.apis.tiling import (
    Tiling,
    _encoded,
    _ramps,
    join_labels,
    join_objects,
    objects_of,
)
from overlock_mm.errors import UserError

SIZES = [(64, 8), (64, 0), (64, 32), (65, 31), (100, 12)]


@pytest.mark.parametrize('size, overlap', SIZES)
@pytest.mark.parametrize('length', [1, 63, 64, 65, 97, 128, 161, 500, 1023])
def test_tiles_cover_everything(size, overlap, length):
    spans = Tiling.of(size, overlap).spans(length)
    assert spans[0][0] == 0 and spans[-1][1] == length
    assert all(stop - start == min(size, length) for start, stop in spans)
    shared = [spans[i][1] - spans[i + 1][0] for i in range(len(spans) - 1)]
    assert all(pixels >= overlap for pixels in shared)
    # no more tiles than needed
    assert len(spans) == max(1, -(-(length - overlap) // (size - overlap)))
    total = torch.zeros(length)
    for (start, stop), ramp in zip(spans, _ramps(spans), strict=True):
        assert ramp.min() >= 0
        total[start:stop] += ramp
    torch.testing.assert_close(total, torch.ones(length))


@pytest.mark.parametrize('size, overlap', [(63, 0), (64, 33), (64, -1)])
def test_sizes_that_cannot_be(size, overlap):
    with pytest.raises(UserError, match='must be'):
        Tiling.of(size, overlap)


def crops(image, boxes):
    return [image[:, y0:y1, x0:x1] for y0, x0, y1, x1 in boxes]


def segmentor(image, weight, threshold=None):
    """A network that sees 2 pixels in each direction, as a function of boxes."""

    def predict(boxes):
        samples = []
        for crop in crops(image, boxes):
            logits = F.conv2d(crop[None], weight, padding=2)[0]
            logits = logits if threshold is None else logits.sigmoid()
            samples.append(SegDataSample(seg_logits=PixelData(data=logits)))
        return samples

    return predict


@pytest.mark.parametrize('size, overlap', SIZES)
@pytest.mark.parametrize('classes, threshold', [(5, None), (1, 0.4)])
def test_labels_are_those_of_the_whole_away_from_seams(size, overlap, classes, threshold):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(3, 150, 207, generator=generator)
    weight = torch.randn(classes, 3, 5, 5, generator=generator)
    predict = segmentor(image, weight, threshold)
    tiling = Tiling.of(size, overlap)
    found = join_labels(tiling, (150, 207), predict, batch_size=2, threshold=threshold)
    labels = found.pred_sem_seg.data[0].long()
    [whole] = predict([(0, 0, 150, 207)])
    logits = whole.seg_logits.data
    expected = logits.argmax(0) if classes > 1 else (logits[0] > threshold).long()
    away = torch.ones(150, 207, dtype=torch.bool)
    for start, stop in tiling.spans(150):
        for edge in {start, stop} - {0, 150}:
            away[max(edge - 2, 0) : edge + 2] = False
    for start, stop in tiling.spans(207):
        for edge in {start, stop} - {0, 207}:
            away[:, max(edge - 2, 0) : edge + 2] = False
    assert 0.5 < away.float().mean() < 1
    assert (labels == expected)[away].float().mean() > 0.9999  # ties, by rounding
    assert (labels == expected).float().mean() > 0.95


OBJECTS = [  # left, top, right, bottom, label, score
    (5, 5, 40, 30, 0, 0.9),  # in one tile
    (50, 50, 90, 90, 1, 0.8),  # in four
    (60, 10, 70, 20, 0, 0.7),  # in the part that two tiles share
    (10, 100, 180, 120, 0, 0.6),  # across three, longer than a tile
    (92, 40, 98, 60, 2, 0.5),
    (98, 40, 104, 60, 2, 0.4),  # a neighbour of the same class
]


def detector(boxes):
    """Sees the objects cut to the tile, most of all where it sees all of them."""
    samples = []
    for y0, x0, y1, x1 in boxes:
        found = []
        for left, top, right, bottom, label, score in OBJECTS:
            cut = max(left, x0), max(top, y0), min(right, x1), min(bottom, y1)
            if cut[0] < cut[2] and cut[1] < cut[3]:
                area = (cut[2] - cut[0]) * (cut[3] - cut[1])
                share = area / ((right - left) * (bottom - top))
                mask = torch.zeros(y1 - y0, x1 - x0, dtype=torch.bool)
                mask[cut[1] - y0 : cut[3] - y0, cut[0] - x0 : cut[2] - x0] = True
                box = [cut[0] - x0, cut[1] - y0, cut[2] - x0, cut[3] - y0]
                found.append((box, label, score * share, mask))
        instances = InstanceData(
            bboxes=torch.tensor([f[0] for f in found]).reshape(-1, 4).float(),
            labels=torch.tensor([f[1] for f in found]).long(),
            scores=torch.tensor([f[2] for f in found]).float(),
            masks=torch.stack([f[3] for f in found])
            if found
            else torch.zeros(0, y1 - y0, x1 - x0, dtype=torch.bool),
        )
        samples.append(DetDataSample(pred_instances=instances))
    return samples


@pytest.mark.parametrize('batch_size', [1, 4])
def test_objects_are_joined(batch_size):
    tiling = Tiling.of(72, 16)
    found = join_objects(tiling, (130, 200), detector, batch_size).pred_instances
    assert len(found) == len(OBJECTS)
    got = {
        (*map(int, box), int(label)): mask
        for box, label, mask in zip(
            found.bboxes.tolist(), found.labels, found.masks, strict=True
        )
    }
    for left, top, right, bottom, label, _ in OBJECTS:
        mask = np.zeros((130, 200), np.uint8)
        mask[top:bottom, left:right] = 1
        decoded = coco_mask.decode(got[left, top, right, bottom, label])
        np.testing.assert_array_equal(decoded, mask)
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    assert found.scores[0] == pytest.approx(0.9)


@pytest.mark.parametrize(
    'boxes, labels, number',
    [
        # two of the first tile look like one of the second
        ([[60, 10, 70, 20], [60, 12, 70, 22], [60, 11, 70, 21]], [0, 0, 0], 2),
        ([[60, 10, 70, 20], [10, 10, 20, 20], [60, 10, 70, 20]], [0, 0, 1], 3),
        ([[60, 10, 70, 20], [10, 10, 20, 20], [64, 10, 70, 20]], [0, 0, 0], 2),
    ],
)
def test_what_is_one_object(boxes, labels, number):
    """The first tile finds the first two objects, the second one the third."""

    def predict(tiles):
        samples = []
        for _, left, _, _ in tiles:
            part = slice(0, 2) if left == 0 else slice(2, 3)
            found = torch.tensor(boxes[part]).float()
            found[:, ::2] -= left
            instances = InstanceData(
                bboxes=found,
                labels=torch.tensor(labels[part]),
                scores=torch.linspace(0.9, 0.8, len(found)),
            )
            samples.append(DetDataSample(pred_instances=instances))
        return samples

    found = join_objects(Tiling.of(72, 16), (72, 128), predict).pred_instances
    assert len(found) == number and 'masks' not in found


def test_panoptic_segments_are_not_dropped_in_silence():
    sample = DetDataSample(pred_instances=InstanceData())
    assert objects_of(sample) is sample.pred_instances
    sample.pred_panoptic_seg = PixelData()
    with pytest.raises(UserError, match='panoptic segments'):
        objects_of(sample)
    with pytest.raises(UserError, match='this one: gt_instances'):
        objects_of(DetDataSample(gt_instances=InstanceData()))


def test_an_image_without_objects():
    def nothing(boxes):
        samples = detector(boxes)
        for sample in samples:
            sample.pred_instances = sample.pred_instances[:0]
        return samples

    found = join_objects(Tiling.of(64), (100, 100), nothing).pred_instances
    assert len(found) == 0 and found.bboxes.shape == (0, 4) and found.masks == []


@pytest.mark.parametrize('seed', range(7))
def test_run_lengths(seed):
    rng = np.random.default_rng(seed)
    shape, tile = (40, 50), (0, 0, 40, 50) if seed == 0 else (3, 7, 33, 47)
    mask = rng.random((tile[2] - tile[0], tile[3] - tile[1])) < rng.random() * (seed < 6)
    if seed < 6:
        mask[0, 0], mask[-1, -1] = seed % 2, seed % 3 == 0
    if seed == 5:
        mask[:, :20] = mask[:, 30:] = False
    whole = np.zeros(shape, np.uint8)
    whole[tile[0] : tile[2], tile[1] : tile[3]] = mask
    found = _encoded(mask, tile, shape)
    assert found == coco_mask.encode(np.asfortranarray(whole))
