"""Predicting a large image tile by tile, and joining what was predicted."""

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from torchvision.ops import box_iou

from ..errors import UserError

# Boxes in the part that two tiles share are one object if their IoU is at least this.
_SAME_OBJECT = 0.5
_SMALLEST = 64
Box = tuple[int, int, int, int]  # top, left, bottom, right


class Tiling(NamedTuple):
    """How images are divided.

    Args:
        size: side of a tile in pixels.
        overlap: pixels that two neighbours share, at least.
    """

    size: int
    overlap: int

    @classmethod
    def of(cls, size: int, overlap: int | None = None) -> 'Tiling':
        """Check the sizes; ``overlap`` defaults to an eighth of ``size``."""
        if size < _SMALLEST:
            raise UserError(f'tile={size} must be at least {_SMALLEST} pixels')
        overlap = size // 8 if overlap is None else overlap
        if not 0 <= overlap <= size // 2:
            raise UserError(
                f'overlap={overlap} must be within 0..{size // 2}, half of tile={size}'
            )
        return cls(size, overlap)

    def spans(self, length: int) -> list[tuple[int, int]]:
        """First and last + 1 pixel of the tiles along an axis, evenly spread."""
        if length <= self.size:
            return [(0, length)]
        count = -(-(length - self.overlap) // (self.size - self.overlap))
        starts = np.linspace(0, length - self.size, count).round().astype(int)
        return [(int(start), int(start) + self.size) for start in starts]


def _ramps(spans: list[tuple[int, int]]) -> list[torch.Tensor]:
    """Weights of each tile along an axis; those of all tiles sum to 1 everywhere.

    They are proportional to the distance to the tile's nearest edge inside the image.
    """
    length = spans[-1][1]
    total, distances = torch.zeros(length), []
    for start, stop in spans:
        place = torch.arange(start, stop) + 0.5
        distance = torch.full_like(place, length)
        if start > 0:
            distance = torch.minimum(distance, place - start)
        if stop < length:
            distance = torch.minimum(distance, stop - place)
        total[start:stop] += distance
        distances.append(distance)
    return [
        distance / total[start:stop]
        for distance, (start, stop) in zip(distances, spans, strict=True)
    ]


def join_labels(
    tiling: Tiling,
    shape: tuple[int, int],
    predict: Callable,
    batch_size: int = 1,
    threshold: float | None = None,
):
    """The label map of an image from the logits of its tiles.

    Where tiles overlap, their logits fade into each other linearly. Tiles are predicted in
    rows; only the logits of a tile, and of the strips that the next tiles share, are kept:
    ``classes * (tile**2 + overlap * width)`` numbers.

    Args:
        tiling: how the image is divided.
        shape: height and width of the image.
        predict: returns data samples with ``seg_logits`` for a list of boxes.
        batch_size: tiles of a row that are predicted at once.
        threshold: for a model with one channel, the probability above which a pixel is of
            class 1.

    Returns:
        SegDataSample: with ``pred_sem_seg``, ``(1, H, W)`` in int16.
    """
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    height, width = shape
    labels = torch.zeros(1, height, width, dtype=torch.int16)
    rows, columns = tiling.spans(height), tiling.spans(width)
    row_ramps, column_ramps = _ramps(rows), _ramps(columns)
    above = None  # what the row before adds to this one, (classes, shared, W)
    for i, (top, bottom) in enumerate(rows):
        next_top = rows[i + 1][0] if i + 1 < len(rows) else bottom
        below = beside = None
        for j, sample in enumerate(
            _in_batches([(top, x0, bottom, x1) for x0, x1 in columns], predict, batch_size)
        ):
            left, right = columns[j]
            next_left = columns[j + 1][0] if j + 1 < len(columns) else right
            weight = torch.outer(row_ramps[i], column_ramps[j])
            logits = sample.seg_logits.data.float() * weight
            if beside is not None:
                logits[:, :, : beside.shape[2]] += beside
            beside = logits[:, :, next_left - left :].clone()
            done = logits[:, :, : next_left - left]
            if above is not None:
                done[:, : above.shape[1]] += above[:, :, left:next_left]
            if next_top < bottom:
                if below is None:
                    below = logits.new_empty(len(logits), bottom - next_top, width)
                below[:, :, left:next_left] = done[:, next_top - top :]
            done = done[:, : next_top - top]
            found = done.argmax(dim=0) if len(done) > 1 else done[0] > threshold
            labels[0, top:next_top, left:next_left] = found
        above = below
    return SegDataSample(pred_sem_seg=PixelData(data=labels))


def join_objects(
    tiling: Tiling, shape: tuple[int, int], predict: Callable, batch_size: int = 1
):
    """The objects of an image from those of its tiles.

    Two objects of one class are the same if, cut to the part of the image that both tiles
    see, their boxes have an IoU of at least 0.5. The box of the joined object is the
    smallest that holds both, its mask both masks, its score the higher one.

    Args:
        tiling: how the image is divided.
        shape: height and width of the image.
        predict: returns data samples with ``pred_instances`` for a list of boxes.
        batch_size: tiles that are predicted at once.

    Returns:
        DetDataSample: with ``pred_instances``, best scores first. Masks are a list of
        COCO's run-length codes, as masks of the whole image would need too much memory.
    """
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    tiles = [
        (top, left, bottom, right)
        for top, bottom in tiling.spans(shape[0])
        for left, right in tiling.spans(shape[1])
    ]
    boxes, scores, labels, owners, masks = [], [], [], [], []
    has_masks = False
    for owner, sample in enumerate(_in_batches(tiles, predict, batch_size)):
        found, (top, left, _, _) = objects_of(sample), tiles[owner]
        boxes.append(found.bboxes.float() + found.bboxes.new_tensor([left, top, left, top]))
        scores.append(found.scores)
        labels.append(found.labels)
        owners += [owner] * len(found)
        if 'masks' in found:
            has_masks = True
            masks += [_encoded(m.numpy(), tiles[owner], shape) for m in found.masks]
    boxes, scores, labels = (torch.cat(parts) for parts in (boxes, scores, labels))
    groups = _groups(boxes, labels, owners, tiles)
    groups.sort(key=lambda group: -scores[group].max().item())
    joined = InstanceData(
        bboxes=torch.stack(
            [torch.cat((boxes[g, :2].amin(0), boxes[g, 2:].amax(0))) for g in groups]
        )
        if groups
        else boxes,
        scores=torch.stack([scores[g].max() for g in groups]) if groups else scores,
        labels=labels[[g[0] for g in groups]] if groups else labels,
    )
    if has_masks:
        from pycocotools import mask as coco_mask

        joined.masks = [coco_mask.merge([masks[i] for i in group]) for group in groups]
    return DetDataSample(pred_instances=joined)


def objects_of(result):
    """The objects in a data sample of a detector.

    Raises:
        UserError: if there are none, or they are only a part of what was predicted.
    """
    if 'pred_panoptic_seg' in result:
        raise UserError(
            'the model predicts panoptic segments, which are not drawn or saved here; '
            "use MMDetection's DetInferencer"
        )
    if 'pred_instances' not in result:
        raise UserError(
            f'a prediction has pred_sem_seg or pred_instances; this one: '
            f'{", ".join(result.keys())}'
        )
    return result.pred_instances


def _in_batches(boxes: list[Box], predict: Callable, batch_size: int) -> Iterator:
    for i in range(0, len(boxes), batch_size):
        yield from predict(boxes[i : i + batch_size])


def _encoded(mask: np.ndarray, tile: Box, shape: tuple[int, int]) -> dict:
    """COCO's run-length code, in the whole image, of a mask in a tile."""
    from pycocotools import mask as coco_mask

    top, left, bottom, _ = tile
    used = np.flatnonzero(mask.any(axis=0))
    if len(used):
        left, mask = left + used[0], mask[:, used[0] : used[-1] + 1]
    right = left + mask.shape[1]
    # COCO counts down the columns: those with the mask in full height
    columns = np.zeros((mask.shape[1], shape[0]), bool)
    columns[:, top:bottom] = mask.T
    changes = np.flatnonzero(np.diff(columns.ravel())) + 1
    edges = np.concatenate(([0], changes, [columns.size]))
    counts = np.diff(edges).tolist()
    before, after = int(left) * shape[0], int(shape[1] - right) * shape[0]
    if columns[0, 0]:
        counts = [before, *counts]
    else:
        counts[0] += before
    if len(counts) % 2:  # runs of zeros and ones take turns: the last one is of zeros
        counts[-1] += after
    elif after:
        counts.append(after)
    return coco_mask.frPyObjects(dict(size=list(shape), counts=counts), *shape)


def _groups(boxes, labels, owners: list[int], tiles: list[Box]) -> list[list[int]]:
    """Indices of the objects that are one, in groups with at most one of each tile."""
    by_tile = [[i for i, o in enumerate(owners) if o == t] for t in range(len(tiles))]
    pairs = []
    for a, b in combinations(range(len(tiles)), 2):
        shared = _shared(tiles[a], tiles[b])
        if shared is None or not by_tile[a] or not by_tile[b]:
            continue
        one, other = (_cut(boxes[by_tile[t]], shared) for t in (a, b))
        ious = box_iou(one, other)
        same = (labels[by_tile[a]][:, None] == labels[by_tile[b]]) & (ious >= _SAME_OBJECT)
        pairs += [
            (ious[i, j].item(), by_tile[a][i], by_tile[b][j])
            for i, j in same.nonzero().tolist()
        ]
    group_of = {i: [i] for i in range(len(owners))}
    for _, i, j in sorted(pairs, reverse=True):
        one, other = group_of[i], group_of[j]
        if {owners[k] for k in one} & {owners[k] for k in other}:
            continue  # already one, or two that a tile tells apart
        one += other
        for k in other:
            group_of[k] = one
    return list({id(group): group for group in group_of.values()}.values())


def _shared(a: Box, b: Box) -> Box | None:
    top, left = max(a[0], b[0]), max(a[1], b[1])
    bottom, right = min(a[2], b[2]), min(a[3], b[3])
    return (top, left, bottom, right) if top < bottom and left < right else None


def _cut(boxes: torch.Tensor, part: Box) -> torch.Tensor:
    top, left, bottom, right = part
    x, y = boxes[:, ::2].clamp(left, right), boxes[:, 1::2].clamp(top, bottom)
    return torch.stack((x[:, 0], y[:, 0], x[:, 1], y[:, 1]), dim=1)
