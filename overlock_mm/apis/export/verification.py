"""Checking that an exported file gives what the model gives in PyTorch."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import UserError
from .graphs import Segmentor

Compare = Callable[[Sequence[Tensor], Sequence[np.ndarray]], float]
# Largest difference, as a part of the largest value, that rounding explains.
TOLERANCES = dict(float32=1e-4, float16=3e-2)


class Case(NamedTuple):
    """Images, and what PyTorch makes of them.

    Attributes:
        image: ``(N, 3, H, W)``.
        expected: the values of each output; logits in place of label maps.
    """

    image: Tensor
    expected: tuple[Tensor, ...]


def random_images(
    size: tuple[int, int], batch: int = 1, low: float = -2.0, high: float = 2.0
) -> Tensor:
    """Smooth random images, (N, 3, *size), with values within ``low`` and ``high``."""
    generator = torch.Generator().manual_seed(size[0] * 10_000 + size[1])
    images = torch.zeros(batch, 3, *size)
    for cells in (3, 17, max(size)):  # regions, edges and noise
        noise = torch.rand(batch, 3, cells, cells, generator=generator)
        images += F.interpolate(noise, size, mode='bilinear') / 3
    return low + (high - low) * images


def compare_values(expected: Sequence[Tensor], results: Sequence[np.ndarray]) -> float:
    """The largest difference of results, as a part of the largest value of each.

    It is infinite if shapes differ, or a value is not finite.
    """
    if len(results) != len(expected):
        return float('inf')
    return max(
        _difference(values, torch.from_numpy(result))
        for values, result in zip(expected, results, strict=True)
    )


def _difference(expected: Tensor, result: Tensor) -> float:
    if result.shape != expected.shape:
        return float('inf')
    found = ((result.float() - expected).abs().max() / expected.abs().max()).item()
    return found if math.isfinite(found) else float('inf')


def compare_labels(segmentor: Segmentor) -> Compare:
    """Compare label maps with logits.

    The difference is how much lower the logit of a chosen label is than the highest one,
    as a part of the largest logit: labels may differ where two are as good.
    """

    def compare(expected: Sequence[Tensor], results: Sequence[np.ndarray]) -> float:
        (logits,), chosen = expected, torch.from_numpy(results[0])
        labels = segmentor.labels(logits)
        if chosen.shape != labels.shape or chosen.dtype != labels.dtype:
            return float('inf')
        if logits.shape[1] == 1:  # where the labels differ, the logit is at the threshold
            threshold = math.log(segmentor.threshold / (1 - segmentor.threshold))
            lost = (logits[:, 0] - threshold).abs() * (chosen != labels)
        elif int(chosen.max()) >= logits.shape[1]:
            return float('inf')
        else:
            lost = logits.amax(1) - logits.gather(1, chosen.long()[:, None]).squeeze(1)
        return (lost.max() / logits.abs().max()).item()

    return compare


def compare_objects(expected: Sequence[Tensor], results: Sequence[np.ndarray]) -> float:
    """Compare boxes, scores, labels and, if there are some, masks of objects.

    The difference of an object is that to the most similar one of its label that was
    found: of the coordinates, as a part of the largest one, of the scores or of the masks.
    The result leaves out two objects of a hundred: thresholds of scores and of overlaps
    decide on objects, and rounding on some of these decisions.
    """
    if len(results) != len(expected) or len(results[0]) > 1.02 * len(expected[0]) + 1:
        return float('inf')
    found = [torch.from_numpy(result) for result in results]
    scale = max(expected[0].abs().max().item(), 1) if len(expected[0]) else 1
    differences = [0.0]
    for wanted in zip(*expected, strict=True):
        alike = found[2] == wanted[2]
        if not alike.any():
            differences.append(float('inf'))
            continue
        far = torch.maximum(
            (found[0][alike] - wanted[0]).abs().amax(1) / scale,
            (found[1][alike] - wanted[1]).abs(),
        )
        if len(wanted) == 4:
            far = torch.maximum(far, (found[3][alike] - wanted[3]).abs().amax((1, 2)))
        differences.append(far.min().item())
    differences.sort()
    return differences[int(0.98 * (len(differences) - 1))]


def verify(
    cases: Sequence[Case],
    run: Callable[[np.ndarray], list[np.ndarray]],
    compare: Compare,
    tolerance: float,
) -> float:
    """Compare a file with PyTorch; the largest difference.

    Args:
        cases: what is expected.
        run: runs the file.
        compare: the difference of what is expected and what the file gave.
        tolerance: the largest difference that is allowed.

    Raises:
        UserError: if it differs by more, or does not run.
    """
    largest = 0.0
    for case in cases:
        size = 'x'.join(map(str, case.image.shape))
        try:
            results = run(case.image.numpy())
        except Exception as error:  # of any runtime
            raise UserError(
                f'the exported file does not run on an image of {size} '
                f'({first_line(error)}); nothing was written. --no-verify writes it'
            ) from error
        largest = max(largest, compare(case.expected, results))
        if largest > tolerance:
            raise UserError(
                f'the exported file differs from PyTorch by {largest:.1e} of the largest '
                f'value on an image of {size}, and {tolerance:.0e} is allowed; nothing was '
                'written. Check that the weights are finite; --no-verify writes it'
            )
    return largest


def first_line(error: Exception) -> str:
    """Type and first line of an error."""
    lines = str(error).strip().splitlines()
    return f'{type(error).__name__}: {lines[0][:200]}' if lines else type(error).__name__
