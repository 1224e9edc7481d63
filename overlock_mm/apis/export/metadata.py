"""What an exported file says of itself: text in JSON, by key, for programs that use it."""

import json
from collections.abc import Sequence

from torch import nn

from ...version import __version__
from ..inference import Predictor
from ..messages import say
from . import graphs
from .program import Dims


def describe(
    predictor: Predictor,
    graph: nn.Module,
    with_preprocess: bool,
    dims: Dims,
    shape: Sequence[int],
    smallest: int,
) -> dict[str, str]:
    """The metadata of a file.

    Args:
        predictor: the trained model.
        graph: what is exported of it.
        with_preprocess: whether it normalises images.
        dims: dims of the images that may change.
        shape: height and width of the images otherwise.
        smallest: smallest height and width where they may change.
    """
    preprocessor = predictor.model.data_preprocessor
    mean, std = graphs.mean_and_std(preprocessor)
    order = graphs.channel_order(preprocessor)
    if with_preprocess:
        mean, std, order = [0.0] * 3, [1.0] * 3, 'rgb'
    values = dict(
        task='segmentation' if predictor.toolbox == 'mmseg' else 'detection',
        classes=predictor.classes,
        palette=predictor.palette,
        outputs=graph.outputs,
        mean=mean,
        std=std,
        channels=order,
        shape=None if 2 in dims else shape,
        smallest_side=smallest if 2 in dims else None,
        **_resizing(predictor),
        overlock_mm=__version__,
    )
    return {key: json.dumps(value) for key, value in values.items()}


def _resizing(predictor: Predictor) -> dict:
    """How the test pipeline resizes: width and height, whether in proportion, multiples."""
    from mmcv.transforms import Resize

    found = dict(scale=None, keep_ratio=True, size_divisor=1)
    others = []
    for step in predictor.steps:
        name = type(step).__name__
        if isinstance(step, Resize) and step.scale and found['scale'] is None:
            found |= dict(scale=list(step.scale), keep_ratio=step.keep_ratio)
        elif name == 'ResizeToMultiple':
            found['size_divisor'] = step.size_divisor
        elif not name.startswith('Pack'):
            others.append(name)
    if others:
        say(
            f'{", ".join(others)} of the test pipeline: a program that uses the file must '
            'do this itself, and the metadata do not tell how'
        )
    return found
