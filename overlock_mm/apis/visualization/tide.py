"""What a detector's errors cost, by kind.

The kinds and what it means to fix one are those of TIDE (section 2 of
https://arxiv.org/abs/2008.08115), with its thresholds: an IoU of at least 0.5 matches, one
up to 0.1 is background. Where the paper leaves a choice, it is that of its code: of several
detections that a fix would make right for one object, over both kinds of fixes, the one
with the highest score counts. Average precision is that of COCO: detections of crowds are
ignored, classes without objects do not count.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as coco_mask

# What each kind means for a detection, but for the last one, which is of objects.
KINDS = dict(
    classification='IoU >= 0.5 with an object of another class',
    localisation='0.1 <= IoU < 0.5 with an object of its class',
    both='0.1 < IoU < 0.5 with an object of another class',
    duplicate='a better detection has matched its object',
    background='IoU <= 0.1 with all objects',
    missed='an object that no detection has, not even a wrong one above',
)
_CLASS, _PLACE, _BOTH, _DUPLICATE, _BACKGROUND = range(5)
_RIGHT, _IGNORED = -1, -2
_MATCH, _NOTHING = 0.5, 0.1


@dataclass
class Objects:
    """The objects of an image, or what was detected in it.

    Attributes:
        labels: indices of classes, int array ``(N,)``.
        shapes: boxes ``(N, 4)`` as x, y, width and height, or a list of compressed RLEs.
        values: scores of detections ``(N,)``; of objects whether they are crowds.
    """

    labels: np.ndarray
    shapes: np.ndarray | list[dict]
    values: np.ndarray


@dataclass
class Errors:
    """What :func:`find_errors` returns. AP is the mean over classes at an IoU of 0.5.

    Attributes:
        ap: AP of the detections as they are.
        class_aps: the same for each class; NaN for one without objects.
        gains: by how much the AP grows when one kind of error is fixed, at least 0.
        false_positives: the same when all wrong detections are removed.
        false_negatives: the same when all objects that were not detected are removed.
        counts: int array ``(classes, kinds)`` in the order of ``KINDS``, by the class that
            was detected; for missed objects by theirs.
        objects: number of objects of each class, without crowds.
        right: number of right detections of each class.
    """

    ap: float
    class_aps: np.ndarray
    gains: dict[str, float]
    false_positives: float
    false_negatives: float
    counts: np.ndarray
    objects: np.ndarray
    right: np.ndarray


def find_errors(
    objects: Sequence[Objects], detections: Sequence[Objects], num_classes: int
) -> Errors:
    """Find and count errors, and compute what each kind costs.

    Args:
        objects: the objects of every image.
        detections: what was detected in the same images.
        num_classes: number of classes.

    Returns:
        Errors: AP, counts and gains.
    """
    images = [_judge(*pair) for pair in zip(objects, detections, strict=True)]
    kinds, fixed, missed = (
        np.concatenate([i[n] for i in images] or [[]]).astype(int) for n in range(3)
    )
    labels = np.concatenate([d.labels for d in detections] or [[]]).astype(int)
    scores = np.concatenate([d.values for d in detections] or [[]])
    real = [o.labels[~o.values.astype(bool)] for o in objects]
    totals = np.bincount(np.concatenate(real or [[]]).astype(int), minlength=num_classes)
    missed = np.bincount(missed, minlength=num_classes)
    right = np.bincount(labels[kinds == _RIGHT], minlength=num_classes)

    def aps(kept, hits, classes=labels, totals=totals) -> np.ndarray:
        return np.array(
            [
                _average_precision(scores[chosen], hits[chosen], totals[c])
                for c in range(num_classes)
                for chosen in [kept & (classes == c)]
            ]
        )

    counted, hits = kinds != _IGNORED, kinds == _RIGHT
    class_aps = aps(counted, hits)
    base = _mean(class_aps)

    def gain(*args, **kwargs) -> float:
        return max(_mean(aps(*args, **kwargs)) - base, 0.0)

    gains = {}
    for kind, name in enumerate(KINDS):
        if name == 'missed':
            gains[name] = gain(counted, hits, totals=totals - missed)
            continue
        # what can be fixed becomes right, the rest of the kind is removed
        chosen = (kinds == kind) & (fixed >= 0)
        kept = counted & ((kinds != kind) | chosen)
        gains[name] = gain(kept, hits | chosen, classes=np.where(chosen, fixed, labels))
    counts = np.zeros((num_classes, len(KINDS)), int)
    for kind in range(_BACKGROUND + 1):
        counts[:, kind] = np.bincount(labels[kinds == kind], minlength=num_classes)
    counts[:, -1] = missed
    return Errors(
        ap=base,
        class_aps=class_aps,
        gains=gains,
        false_positives=gain(hits, hits),
        false_negatives=gain(counted, hits, totals=right),
        counts=counts,
        objects=totals,
        right=right,
    )


def _judge(objects: Objects, detections: Objects) -> tuple[np.ndarray, ...]:
    """Match the detections of one image, and find the kinds of the wrong ones.

    Returns:
        The kind of each detection; the class that a fix gives it, -1 if a fix removes it;
        the classes of the missed objects.
    """
    crowd = objects.values.astype(bool)
    found, real = len(detections.labels), ~crowd
    kinds, fixed = np.full(found, _BACKGROUND), np.full(found, -1)
    if not found or not len(crowd):
        return kinds, fixed, objects.labels[real]
    iou = coco_mask.iou(detections.shapes, objects.shapes, crowd.astype(np.uint8).tolist())
    iou = np.asarray(iou).reshape(found, len(crowd))
    same = detections.labels[:, None] == objects.labels
    taken = np.zeros(len(crowd), bool)
    order = np.argsort(-detections.values, kind='stable')
    for i in order:
        match = iou[i] * (same[i] & real & ~taken)
        if match.max() >= _MATCH:
            taken[match.argmax()], kinds[i] = True, _RIGHT
        elif (iou[i] * (same[i] & crowd)).max() >= _MATCH:
            kinds[i] = _IGNORED
    own, other = iou * (same & real), iou * (~same & real)
    best, fixable = {}, taken.copy()
    for i in order[kinds[order] == _BACKGROUND]:
        target = None
        if _NOTHING <= own[i].max() < _MATCH:
            kinds[i], target = _PLACE, own[i].argmax()
        elif other[i].max() >= _MATCH:
            kinds[i], target = _CLASS, other[i].argmax()
        elif own[i].max() >= _MATCH:
            kinds[i] = _DUPLICATE
        elif other[i].max() > _NOTHING:
            kinds[i] = _BOTH
        if target is not None and not taken[target]:
            fixable[target] = True
            if best.setdefault(target, i) == i:  # in the order of scores
                fixed[i] = objects.labels[target]
    return kinds, fixed, objects.labels[real & ~fixable]


def _average_precision(scores: np.ndarray, hits: np.ndarray, total: int) -> float:
    """AP of one class as COCO computes it: the mean over 101 recalls."""
    if not total:
        return np.nan
    if not len(scores):
        return 0.0
    hits = hits[np.argsort(-scores, kind='stable')].cumsum()
    precision = hits / np.arange(1, len(hits) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    # 0 for recalls that are not reached
    index = np.searchsorted(hits / total, np.linspace(0, 1, 101))
    return float(np.append(precision, 0.0)[index].mean())


def _mean(aps: np.ndarray) -> float:
    """The mean over the classes that count; 0 if none does."""
    counted = aps[~np.isnan(aps)]
    return float(counted.mean()) if len(counted) else 0.0
