"""Two-stage detectors of MMDetection as one program of plain operations.

MMDetection's own code for predictions does not export: it takes sizes from data in Python,
and its NMS and RoIAlign are operators of MMCV. Here is the same arithmetic for one image.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms, roi_align

from ...errors import UserError

# The score of what is no candidate; those of candidates are within 0..1.
_NONE = -1.0


class Detector(nn.Module):
    """A trained two-stage detector whose predictions can be exported.

    It predicts what the model's ``predict`` does with ``rescale=False``, with the model's
    test config. The image is one image as the network takes it, normalised and not padded;
    boxes are clipped to it.

    Supported are Faster R-CNN, Mask R-CNN and Cascade (Mask) R-CNN of MMDetection: the
    heads ``RPNHead``, ``StandardRoIHead`` and ``CascadeRoIHead`` with any ``BBoxHead``
    that regresses deltas, ``FCNMaskHead`` and ``SingleRoIExtractor``; backbone and neck
    are any that export.

    Args:
        model: the detector, in evaluation mode.
        divisor: the image is padded with zeros, at the right and below, until its sides
            are multiples of this.

    Attributes:
        outputs (tuple[str, ...]): names of the outputs.

    Raises:
        UserError: if a part of the model is another, or its test config asks for something
            else, such as Soft-NMS.
    """

    def __init__(self, model: nn.Module, divisor: int = 1):
        super().__init__()
        _check(model)
        self.model = model
        self.divisor = divisor
        self.outputs = ('boxes', 'scores', 'labels')
        self.outputs += ('masks',) * model.roi_head.with_mask

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Detect the objects of one image.

        Args:
            image: ``(1, C, H, W)``, float32.

        Returns:
            ``boxes``, ``(n, 4)``: x1, y1, x2, y2 in pixels of the image. ``scores``,
            ``(n,)``, from the highest to the lowest. ``labels``, ``(n,)``, int64. From a
            model with a mask head, ``masks``, ``(n, h, w)``, mostly 28 x 28: probabilities
            of the object inside of its box, to be resized to the box. ``n`` differs from
            image to image: it is the number of objects with a score above the
            ``score_thr`` of the test config, from 0 to its ``max_per_img``.
        """
        size = image.shape[2:]
        if self.divisor > 1:
            below, right = (
                (side + self.divisor - 1) // self.divisor * self.divisor - side
                for side in size
            )
            image = F.pad(image, (0, right, 0, below))
        maps = self.model.extract_feat(image)
        boxes, is_box = self._propose(maps, size)
        boxes, scores, labels = self._detect(maps, boxes, is_box, size)
        if not self.model.roi_head.with_mask:
            return boxes, scores, labels
        return boxes, scores, labels, self._masks(maps, boxes, labels)

    def _propose(self, maps, size) -> tuple[Tensor, Tensor]:
        """Boxes (k, 4), and which of them are proposals: k is the same for all images."""
        head = self.model.rpn_head
        cfg = head.test_cfg
        boxes, scores, levels = [], [], []
        for level, outputs in enumerate(zip(*head(maps), strict=True)):
            score, delta = (o[0].permute(1, 2, 0).float() for o in outputs)
            score = score.reshape(-1, head.cls_out_channels)
            if head.use_sigmoid_cls:
                score = score.sigmoid()[:, 0]
            else:
                score = score.softmax(-1)[:, 0]
            score, place = _best(score, cfg.nms_pre)
            anchor = self._anchors(level, place, outputs[0].shape[3])
            delta = delta.reshape(-1, 4).index_select(0, place)
            boxes.append(_decode(head.bbox_coder, anchor, delta, size))
            scores.append(score)
            levels.append(torch.full_like(place, level))
        boxes, scores, levels = torch.cat(boxes), torch.cat(scores), torch.cat(levels)
        if (least := cfg.get('min_bbox_size', -1)) >= 0:
            large = (boxes[:, 2:] - boxes[:, :2] > least).all(1)
            scores = torch.where(large, scores, _NONE)
        scores, place = _without_overlap(boxes, scores, levels, cfg.nms, cfg.max_per_img)
        return boxes.index_select(0, place), scores > _NONE

    def _anchors(self, level: int, place: Tensor, width) -> Tensor:
        """Anchors at some places of a map, without those of the others."""
        generator = self.model.rpn_head.prior_generator
        anchors = generator.base_anchors[level].to(place.device)
        stride = generator.strides[level]
        cell = place // len(anchors)
        y = cell // width
        xy = torch.stack([(cell - y * width) * stride[0], y * stride[1]], dim=1)
        return anchors.index_select(0, place - cell * len(anchors)) + xy.repeat(1, 2)

    def _detect(self, maps, boxes, is_box, size) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes, scores and labels of the objects, by score."""
        roi_head, logits = self.model.roi_head, []
        cfg = roi_head.test_cfg
        stages = _stages(roi_head.bbox_roi_extractor, roi_head.bbox_head)
        for extractor, head in stages:
            features = self._shared(_extract(extractor, maps, boxes))
            logit, delta = (output.float() for output in head(features))
            logits.append(logit)
            delta = delta.unflatten(1, (-1, 4))
            if len(logits) == len(stages):
                break
            if not head.reg_class_agnostic:
                label = logit[:, :-1].argmax(1)
                delta = delta.gather(1, label[:, None, None].expand(-1, 1, 4))
            boxes = _decode(head.bbox_coder, boxes, delta[:, 0], size)
        scores = (sum(logits) / len(logits)).softmax(-1)[:, :-1]
        scores = torch.where(is_box[:, None], scores, _NONE)
        count, classes = scores.shape
        boxes = _decode(head.bbox_coder, boxes[:, None], delta, size)
        boxes = boxes.expand(count, classes, 4).reshape(-1, 4)
        labels = torch.arange(classes, device=boxes.device).repeat(count)
        # scores below 0 stand for no candidate, whatever the threshold is
        scores = torch.where(scores > cfg.score_thr, scores, _NONE).flatten()
        most = cfg.max_per_img if cfg.max_per_img > 0 else count * classes
        scores, place = _without_overlap(boxes, scores, labels, cfg.nms, most)
        found = _places(scores > _NONE)
        place = place.index_select(0, found)
        return (
            boxes.index_select(0, place),
            scores.index_select(0, found),
            labels.index_select(0, place),
        )

    def _masks(self, maps, boxes, labels) -> Tensor:
        """Masks of objects, (n, h, w): the average of those of the stages."""
        roi_head, masks = self.model.roi_head, []
        for extractor, head in _stages(roi_head.mask_roi_extractor, roi_head.mask_head):
            logits = head(self._shared(_extract(extractor, maps, boxes)))
            if head.class_agnostic:
                logits = logits[:, 0]
            else:
                place = labels[:, None, None, None].expand(-1, 1, *logits.shape[2:])
                logits = logits.gather(1, place)[:, 0]
            masks.append(logits.sigmoid())
        return sum(masks) / len(masks)

    def _shared(self, features: Tensor) -> Tensor:
        roi_head = self.model.roi_head
        return roi_head.shared_head(features) if roi_head.with_shared_head else features


def _stages(extractors, heads) -> list[tuple[nn.Module, nn.Module]]:
    """The stages of a cascade, or the only one."""
    if isinstance(heads, nn.ModuleList):
        return list(zip(extractors, heads, strict=True))
    return [(extractors, heads)]


def _places(mask: Tensor) -> Tensor:
    """Where a mask (n,) is true."""
    return mask.nonzero()[:, 0]


def _best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The highest scores and their places, always as many: what is missing has no score."""
    number = scores.shape[0]
    if isinstance(number, torch.SymInt) or number < count:
        scores = F.pad(scores, (0, count), value=_NONE)
    scores, place = scores.topk(count)
    return scores, place.clamp(max=number - 1)


def _decode(coder, boxes: Tensor, deltas: Tensor, size) -> Tensor:
    """Boxes (..., 4) moved by deltas, as DeltaXYWHBBoxCoder does."""
    deltas = deltas * deltas.new_tensor(coder.stds) + deltas.new_tensor(coder.means)
    shift, scale = deltas.split(2, dim=-1)
    low, high = boxes.split(2, dim=-1)
    extent = high - low
    shift, limit = extent * shift, abs(math.log(16 / 1000))
    if coder.add_ctr_clamp:
        shift = shift.clamp(min=-coder.ctr_clamp, max=coder.ctr_clamp)
        scale = scale.clamp(max=limit)
    else:
        scale = scale.clamp(min=-limit, max=limit)
    centre, half = (low + high) * 0.5 + shift, extent * scale.exp() * 0.5
    x, y = torch.stack([centre - half, centre + half], dim=-2).unbind(-1)
    if coder.clip_border:
        x, y = x.clamp(min=0, max=size[1]), y.clamp(min=0, max=size[0])
    return torch.stack([x, y], dim=-1).flatten(-2)


def _without_overlap(boxes, scores, groups, cfg, count) -> tuple[Tensor, Tensor]:
    """NMS among boxes of the same group, as batched_nms of MMCV does.

    Args:
        boxes: ``(n, 4)``.
        scores: ``(n,)``.
        groups: ``(n,)``, whole numbers.
        cfg: arguments of the NMS.
        count: how many are kept at most.

    Returns:
        Scores of those that are kept and their places, ``(count,)``, as of :func:`_best`.
    """
    candidates = _places(scores > _NONE)
    moved, of = (t.index_select(0, candidates) for t in (boxes, scores))
    if not cfg.get('class_agnostic', False):
        # far enough apart that those of two groups do not overlap; with as much rounding
        # as in MMCV, so that the same are kept
        largest = F.pad(moved, (0, 0, 0, 1)).max()  # of no boxes too
        group = groups.index_select(0, candidates).to(boxes.dtype)
        moved = moved + (group * (largest + 1))[:, None]
    kept = candidates.index_select(0, nms(moved, of, _threshold(cfg)))
    scores = F.pad(scores.index_select(0, kept), (0, count), value=_NONE)
    scores, order = scores.topk(count)
    return scores, F.pad(kept, (0, count)).index_select(0, order)


def _threshold(cfg) -> float:
    return float(cfg.get('iou_threshold', cfg.get('iou_thr')))


def _extract(extractor, maps, boxes: Tensor) -> Tensor:
    """Features of boxes (n, 4), each from the map of its level, (n, C, h, w)."""
    layers = extractor.roi_layers
    rois = F.pad(boxes, (1, 0))  # all of image 0
    if len(layers) == 1:
        return _align(layers[0], maps[0], rois)
    width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
    scale = (width * height).sqrt() / extractor.finest_scale + 1e-6
    # the whole part of log2(scale), however a runtime rounds logarithms
    level = sum((scale >= 2**i).long() for i in range(1, len(layers)))
    order = [_places(level == i) for i in range(len(layers))]
    features = [
        _align(layer, level_map, rois.index_select(0, places))
        for layer, level_map, places in zip(layers, maps, order, strict=False)
    ]
    order = torch.cat(order)
    back = torch.zeros_like(level).scatter(
        0, order, torch.arange(order.shape[0], device=order.device)
    )
    return torch.cat(features).index_select(0, back)


def _align(layer, features: Tensor, rois: Tensor) -> Tensor:
    # float16 cannot tell the pixels of a large image apart
    return roi_align(
        features.float(),
        rois,
        layer.output_size,
        layer.spatial_scale,
        layer.sampling_ratio,
        layer.aligned,
    ).to(features.dtype)


def _check(model: nn.Module) -> None:
    """Raise UserError if a model predicts in another way than this module does."""
    from mmdet.models.dense_heads import RPNHead
    from mmdet.models.detectors import TwoStageDetector
    from mmdet.models.roi_heads import (
        BBoxHead,
        CascadeRoIHead,
        FCNMaskHead,
        SingleRoIExtractor,
        StandardRoIHead,
    )
    from mmdet.models.task_modules import AnchorGenerator, DeltaXYWHBBoxCoder

    _require(model, 'detector', {TwoStageDetector: 'predict extract_feat'})
    of_features = 'predict_by_feat _predict_by_feat_single'
    rpn_head, roi_head = getattr(model, 'rpn_head', None), getattr(model, 'roi_head', None)
    methods = f'predict {of_features} _bbox_post_process'
    _require(rpn_head, 'rpn_head', {RPNHead: methods})
    methods = 'grid_priors single_level_grid_priors'
    _require(rpn_head.prior_generator, 'anchor generator', {AnchorGenerator: methods})
    methods = 'predict predict_bbox predict_mask _bbox_forward _mask_forward'
    roi_heads = {StandardRoIHead: methods, CascadeRoIHead: f'{methods} _refine_roi'}
    _require(roi_head, 'roi_head', roi_heads)
    coders, extractors = [rpn_head.bbox_coder], []
    for extractor, head in _stages(roi_head.bbox_roi_extractor, roi_head.bbox_head):
        _require(head, 'bbox_head', {BBoxHead: f'{of_features} regress_by_class'})
        if not (head.with_cls and head.with_reg):
            raise _unsupported('a bbox_head gives no scores or no boxes', 'heads with both')
        if head.custom_cls_channels or head.custom_activation:
            loss = type(head.loss_cls).__name__
            raise _unsupported(f'a bbox_head has scores of its {loss}', 'softmax')
        coders.append(head.bbox_coder)
        extractors.append(extractor)
    for coder in coders:
        _require(coder, 'bbox_coder', {DeltaXYWHBBoxCoder: 'decode'})
    if roi_head.with_mask:
        for extractor, head in _stages(roi_head.mask_roi_extractor, roi_head.mask_head):
            _require(head, 'mask_head', {FCNMaskHead: of_features})
            extractors.append(extractor)
    layers = []
    for extractor in extractors:
        methods = 'forward map_roi_levels'
        _require(extractor, 'RoI extractor', {SingleRoIExtractor: methods})
        layers.extend(extractor.roi_layers)
    _check_operators(model, layers)
    _check_test_cfg(rpn_head.test_cfg, roi_head.test_cfg)


def _require(part, what: str, kinds: dict[type, str]) -> None:
    """Refuse a part that has not these methods of one of some classes."""
    for kind, methods in kinds.items():
        names = methods.split()
        if all(getattr(type(part), m, None) is getattr(kind, m) for m in names):
            return
    found = f'a {type(part).__name__}' if part is not None else 'missing'
    raise _unsupported(
        f'its {what} is {found}',
        f'{" and ".join(kind.__name__ for kind in kinds)}, and subclasses that predict in '
        'the same way',
    )


def _check_operators(model: nn.Module, replaced) -> None:
    """Refuse layers that are operators of MMCV alone."""
    from mmcv.ops import RoIAlign

    for layer in replaced:
        if type(layer) is not RoIAlign:
            raise _unsupported(f'a roi_layer is a {type(layer).__name__}', 'RoIAlign')
        if layer.pool_mode != 'avg':
            raise _unsupported(f'RoIAlign has pool_mode={layer.pool_mode!r}', "'avg'")
    for name, layer in model.named_modules():
        if type(layer).__module__.startswith('mmcv.ops.') and layer not in replaced:
            raise _unsupported(
                f'its {name} is a {type(layer).__name__}', 'layers of PyTorch, no mmcv.ops'
            )


def _check_test_cfg(rpn, rcnn) -> None:
    for key in ('nms_pre', 'max_per_img'):
        if rpn.get(key, -1) <= 0:
            raise _unsupported(f'test_cfg.rpn.{key} is {rpn.get(key)}', 'numbers from 1')
    known = {'type', 'iou_threshold', 'iou_thr', 'class_agnostic', 'split_thr'}
    for where, cfg in (('rpn', rpn.get('nms')), ('rcnn', rcnn.get('nms'))):
        plain = isinstance(cfg, dict) and cfg.get('type', 'nms') == 'nms'
        if not plain or set(cfg) - known or not {'iou_threshold', 'iou_thr'} & set(cfg):
            raise _unsupported(
                f'test_cfg.{where}.nms is {cfg}', "dict(type='nms', iou_threshold=...)"
            )


def _unsupported(found: str, supported: str) -> UserError:
    return UserError(
        f'this detector cannot be exported: {found}; supported: {supported}. '
        '--backbone-only exports the backbone alone'
    )
