"""The maps of a backbone in colours, and where in them the evidence for a class is."""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from ...errors import UserError
from ...models import OverLoCK
from . import figures
from .networks import Seen, backbone_of, look, open_model

CAMS = dict(gradcam='GradCAM', hirescam='HiResCAM', layercam='LayerCAM')
_REGION = '#00e5ff'


class Colours(NamedTuple):
    """A map in colours.

    Attributes:
        picture: ``(h, w, 3)``, 0 to 1.
        explained: share of the variance over the positions that the colours show.
    """

    picture: np.ndarray
    explained: float


class _Question(NamedTuple):
    """What evidence is looked for.

    Attributes:
        title: in words.
        score: the number to explain, of the model's output.
        region: where it is: a mask ``(H, W)`` or a box ``(x1, y1, x2, y2)``, of what the
            backbone takes; None for everywhere.
    """

    title: str
    score: Callable
    region: np.ndarray | None


def maps(
    config: str,
    checkpoint: str,
    image: str,
    out: str,
    *,
    class_name: str | None = None,
    box: int | None = None,
    cam: str | None = None,
    device: str | None = None,
    cfg_options: dict | None = None,
    trust: bool = False,
) -> str:
    """Draw what a backbone makes of an image: its maps, and the context of OverLoCK.

    The first three principal components over the positions of a map are red, green and
    blue. With a class or a box, class activation maps of the same maps are drawn, too, by
    the library pytorch-grad-cam (https://github.com/jacobgil/pytorch-grad-cam).

    Args:
        config: config of a detector or segmentor.
        checkpoint: file or URL of its weights.
        image: path of the image.
        out: picture to write.
        class_name: class whose evidence is drawn: of a segmentor for all pixels that it is
            predicted at, of a detector for the best box.
        box: box of a detector whose evidence is drawn; 0 is the one of the highest score.
        cam: how evidence is computed, one of ``CAMS``; by default 'gradcam' for a
            segmentor. For a detector it is 'hirescam', as the mean of the gradient, which
            the other takes, also finds other objects of the class.
        device: by default cuda where there is one, else cpu.
        cfg_options: values of the config to override, by key.
        trust: read the checkpoint even if that runs code in it.

    Returns:
        A table of the maps.

    Raises:
        UserError: if an argument cannot be used, or there is no such class or box.
        CheckpointError: if the checkpoint cannot be read, or does not fit.
    """
    path = figures.check_picture(out)
    if class_name is not None or box is not None:
        _library()  # before a long computation
    predictor = open_model(config, checkpoint, device, cfg_options, trust)
    backbone = backbone_of(predictor.model, config)
    if box is not None and predictor.toolbox != 'mmdet':
        raise UserError('--box is for detectors, and this is a segmentor; use --class')
    label = _label(predictor, class_name)
    seen = look(predictor, backbone, image)
    context, found = _run(backbone, seen.inputs)
    shown = dict(context) | {f'map {i + 1}': m for i, m in enumerate(found)}
    colours = {k: principal_colours(_inside(m, seen)[0]) for k, m in shown.items()}
    question, evidence = None, []
    if label is not None or box is not None:
        scores = _Scores(predictor, seen)
        cam = cam or ('gradcam' if predictor.toolbox == 'mmseg' else 'hirescam')
        with _fed(backbone, found) as taps:
            question = _ask(scores, seen, label, box, predictor.classes)
            evidence = [_evidence(scores, seen, tap, question, cam) for tap in taps]
    figures.save(_draw(seen, shown, colours, question, evidence, cam), path)
    notes = [_table(shown, colours)]
    if evidence and not np.any(evidence):
        what = question.title.replace('\n', ' ')
        notes.append(
            f'no evidence was found for {what}: its score has no gradient (as one that is '
            'exactly 1), or all of it speaks against; try another --cam'
        )
    return '\n'.join([*notes, f'wrote {path}'])


def _library():
    try:
        import pytorch_grad_cam
    except ModuleNotFoundError as error:
        raise UserError(
            'evidence is computed by pytorch-grad-cam, which is not installed; run: '
            'pip install grad-cam'
        ) from error
    return pytorch_grad_cam


def _label(predictor, name: str | None) -> int | None:
    if name is None:
        return None
    names = list(predictor.classes)
    if name in names:
        return names.index(name)
    near = get_close_matches(name, names)
    hint = f'is it {near[0]}?' if near else f'it has {", ".join(names)}'
    raise UserError(f'--class {name} is not a class of the model; {hint}')


@torch.no_grad()
def _run(backbone: nn.Module, inputs: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The context, by its name, of an OverLoCK that has one, and the maps."""
    kept = {}
    hooks = []
    if isinstance(backbone, OverLoCK) and hasattr(backbone, 'high_level_proj'):
        hooks.append(
            backbone.high_level_proj.register_forward_hook(
                lambda module, given, out: kept.update(context=out)
            )
        )
    try:
        out = backbone(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    out = [out] if torch.is_tensor(out) else list(out)
    if not all(torch.is_tensor(m) and m.ndim == 4 for m in out):
        raise UserError(f'the backbone {type(backbone).__name__} does not return maps')
    return kept, out


def _inside(features: Tensor, seen: Seen) -> Tensor:
    """The part of a map that is the image, without padding."""
    (h, w), (height, width) = seen.picture.shape[:2], seen.inputs.shape[-2:]
    rows, columns = features.shape[-2:]
    return features[..., : -(-h * rows // height), : -(-w * columns // width)]


def principal_colours(features: Tensor) -> Colours:
    """The first three principal components over all positions as red, green and blue.

    Each is scaled so that 98% of the positions are between 0 and 1. Its sign is fixed: the
    channel with the largest weight has a positive one.

    Args:
        features: a map, ``(C, h, w)``.
    """
    x = features.flatten(1).T.double().cpu()
    x = x - x.mean(0)
    variances, directions = torch.linalg.eigh(x.T @ x)
    directions = directions[:, -3:].flip(1)
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    scores = x @ (directions * largest.sign())
    low, high = torch.quantile(scores, torch.tensor([0.01, 0.99]).double(), dim=0)
    spread = high - low
    # what is left to components that are zero is rounding
    real = spread > 1e-9 * x.abs().max()
    scaled = torch.where(real, (scores - low) / spread, 0.5).clamp(0, 1)
    colours = torch.full((len(x), 3), 0.5).double()
    colours[:, : scaled.shape[1]] = scaled
    total = variances.clamp_min(0).sum().item()
    explained = variances[-3:].clamp_min(0).sum().item() / total if total else 1.0
    return Colours(colours.view(*features.shape[1:], 3).numpy(), explained)


class _Scores(nn.Module):
    """What a model predicts of what its backbone takes, differentiable."""

    def __init__(self, predictor, seen: Seen):
        super().__init__()
        self.model, self.toolbox = predictor.model, predictor.toolbox
        self.sample = copy.deepcopy(seen.result)
        for key in list(self.sample.keys()):
            delattr(self.sample, key)  # predictions

    def forward(self, inputs: Tensor):
        if self.toolbox == 'mmseg':
            return self.model.encode_decode(inputs, [self.sample.metainfo])
        sample = copy.deepcopy(self.sample)
        with _attached():
            return self.model.predict(inputs, [sample], rescale=False)


@contextmanager
def _attached() -> Iterator[None]:
    """Keep the gradients of what MMDetection's one-stage heads select.

    They cut them off, because proposals need none.
    """
    from mmdet.models.utils import misc

    select = misc.select_single_mlvl
    users = [
        module
        for name, module in sys.modules.items()
        if name.startswith('mmdet.') and vars(module).get(select.__name__) is select
    ]
    for module in users:
        module.select_single_mlvl = lambda maps, i, detach=False: select(maps, i, False)
    try:
        yield
    finally:
        for module in users:
            module.select_single_mlvl = select


class _Tap(nn.Module):
    """Gives a map of its own that gradients end at."""

    def __init__(self, features: Tensor):
        super().__init__()
        self.features = features

    def forward(self) -> Tensor:
        # a copy, which a neck may change in place
        self.out = self.features.detach().requires_grad_().clone()
        return self.out


@contextmanager
def _fed(backbone: nn.Module, found: list[Tensor]) -> Iterator[list[_Tap]]:
    """Have a backbone return maps that it has computed already."""
    taps = [_Tap(m) for m in found]
    backbone.forward = lambda *given, **options: tuple(tap() for tap in taps)
    try:
        yield taps
    finally:
        del backbone.forward


def _ask(
    scores: _Scores, seen: Seen, label: int | None, box: int | None, classes
) -> _Question:
    with torch.no_grad():
        out = scores(seen.inputs)[0]
    if scores.toolbox == 'mmseg':
        return _about_class(out, label, classes[label])
    return _about_box(out.pred_instances, label, box, classes)


def _about_class(logits: Tensor, label: int, name: str) -> _Question:
    single = len(logits) == 1  # it tells two classes apart
    if single:
        logits = torch.cat((-logits, logits))
    region = (logits.argmax(0) == label).cpu().numpy()
    title = f'{name},\nwhere it is predicted'
    if not region.any():
        region, title = None, f'{name},\nwhich is predicted nowhere'

    def score(out: Tensor) -> Tensor:
        chosen = out[0] * (1 if label else -1) if single else out[label]
        return (chosen if region is None else chosen[torch.from_numpy(region)]).sum()

    return _Question(title, score, region)


def _about_box(found, label: int | None, box: int | None, classes) -> _Question:
    order = found.scores.argsort(descending=True, stable=True)
    if label is not None:
        order = order[found.labels[order] == label]
        if not len(order):
            raise UserError(f'no {classes[label]} was detected in this image')
    if not len(order):
        raise UserError('no box was detected in this image; give another one')
    if (box or 0) not in range(len(order)):
        raise UserError(
            f'--box {box}: the boxes that were detected are 0 to {len(order) - 1}'
        )
    n = order[box or 0].item()
    title = f'{classes[found.labels[n]]},\nscore {found.scores[n]:.2f}'
    corners = found.bboxes[n]
    corners = getattr(corners, 'tensor', corners).flatten().cpu().numpy()

    def score(out) -> Tensor:
        # unlike the score, its logarithm has a gradient if the score is almost 1
        chosen = out.pred_instances.scores[n]
        if not chosen.requires_grad:
            raise UserError('the scores of this detector cannot be differentiated')
        return chosen.clamp_min(1e-12).log()

    return _Question(title, score, corners)


def _evidence(
    scores: _Scores, seen: Seen, tap: _Tap, question: _Question, cam: str
) -> np.ndarray:
    """Evidence in one map, enlarged to the image: 0 to 1, and all 0 if there is none."""
    found = getattr(_library(), CAMS[cam])(scores, [tap])
    try:
        with torch.enable_grad():
            # a map that the heads do not use gets a gradient, too: zero
            target = [lambda out: question.score(out) + 0 * tap.out.sum()]
            heat = found(seen.inputs, target)[0]
    finally:
        found.activations_and_grads.release()
    height, width = seen.picture.shape[:2]
    return heat[:height, :width]


def _table(shown: dict[str, Tensor], colours: dict[str, Colours]) -> str:
    rows = [
        [name, m.shape[1], f'{m.shape[2]} x {m.shape[3]}', f'{found.explained:.0%}']
        for (name, m), found in zip(shown.items(), colours.values(), strict=True)
    ]
    header = ['', 'channels', 'size', 'variance in colours']
    return figures.table(header, rows)


@figures.styled()
def _draw(
    seen: Seen,
    shown: dict[str, Tensor],
    colours: dict[str, Colours],
    question: _Question | None,
    evidence: list[np.ndarray],
    cam: str | None,
) -> figures.Figure:
    height, width = seen.picture.shape[:2]
    columns = 1 + len(shown)
    rows = 1 if question is None else 2
    figure, grid = figures.panels(
        rows, columns, aspect=height / width + 0.25, extra=0.25 + 0.2 * (rows - 1)
    )
    figure.suptitle('Principal components of the maps as red, green and blue')
    _show(grid[0, 0], seen, seen.picture, 'image')
    for axes, (name, m) in zip(grid[0, 1:], shown.items(), strict=True):
        found = colours[name]
        _show(
            axes, seen, found.picture, f'{name}\n{m.shape[1]} x {m.shape[2]} x {m.shape[3]}'
        )
        axes.set_xlabel(f'{found.explained:.0%} of variance')
    if question is None:
        return figure
    first = columns - len(evidence)
    titles = [f'map {i + 1}' for i in range(len(evidence))]
    for axes in grid[1, :first]:
        axes.set_axis_off()
    _show(grid[1, 0], seen, seen.picture, 'what is explained').set_axis_on()
    if first > 1:
        evidence, titles = (
            [np.mean(evidence, axis=0), *evidence],
            ['mean of the maps', *titles],
        )
        first = 1
    for axes, heat, title in zip(grid[1, first:], evidence, titles, strict=True):
        axes.set_axis_on()
        _show(axes, seen, seen.picture.mean(2), title if heat.any() else f'{title}: none')
        drawn = axes.imshow(heat, figures.AMOUNTS, vmin=0, vmax=1, alpha=0.6)
    for axes in grid[1]:
        _outline(axes, question.region, seen)
    bar = figure.colorbar(drawn, ax=grid[1], pad=0.01, aspect=15)
    bar.set_label(f'evidence ({CAMS[cam]})')
    grid[1, 0].set_xlabel(question.title, loc='left')
    return figure


def _show(axes, seen: Seen, picture: np.ndarray, title: str):
    """Show a picture in the place of the image, of whatever size it is."""
    height, width = seen.picture.shape[:2]
    axes.imshow(picture, 'gray', extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    axes.set_title(title)
    return figures.without_ticks(axes)


def _outline(axes, region: np.ndarray | None, seen: Seen) -> None:
    """Draw the border of a mask or a box."""
    height, width = seen.picture.shape[:2]
    if region is None:
        return
    if region.ndim == 1:
        (x1, y1), (x2, y2) = region[:2], region[2:]
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=_REGION))
    elif not region.all():
        axes.contour(region[:height, :width], [0.5], colors=_REGION, linewidths=0.6)
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
