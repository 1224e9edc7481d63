"""Detectors as one program: what MMDetection predicts, in PyTorch and in an ONNX file."""

from pathlib import Path

import mmdet
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers import image
from mmdet.models.roi_heads import SingleRoIExtractor, StandardRoIHead
from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask
from mmdet.registry import MODELS as MMDET
from mmdet.structures import DetDataSample
from mmengine.config import Config

from overlock_mm.apis.export import detectors
from overlock_mm.apis.export.detectors import Detector
from overlock_mm.apis.export.onnx import write_onnx
from overlock_mm.apis.export.program import capture
from overlock_mm.config.load import build_model
from overlock_mm.errors import UserError

MODELS = Path(mmdet.__file__).parent / '.mim/configs/_base_/models'
SIZES = [(161, 161), (97, 331), (480, 128)]  # odd sides, landscape, portrait
DIMS = {2: ('height', 64, 1024), 3: ('width', 64, 1024)}
MASK, FASTER = 'mask-rcnn_r50_fpn', 'faster-rcnn_r50_fpn'
CASCADE, C4 = 'cascade-mask-rcnn_r50_fpn', 'faster-rcnn_r50-caffe-c4'
# Standard deviation of what layers give, around 0: objects of all classes and levels are
# found, and there is something to clip and to suppress.
SPREAD = dict(rpn_cls=0.7, rpn_reg=0.7, fc_cls=2.0, fc_reg=2.0, conv_logits=2.0)


def build(name, changes=None):
    """A small detector of MMDetection."""
    cfg = Config.fromfile(MODELS / f'{name}.py')
    cfg.default_scope = 'mmdet'
    keys = dict(backbone=dict(depth=18, init_cfg=None), rpn_head=dict(feat_channels=16))
    keys['test_cfg'] = dict(
        rpn=dict(nms_pre=60, max_per_img=100), rcnn=dict(score_thr=0.2, max_per_img=60)
    )
    head = dict(num_classes=5)
    if 'neck' in cfg.model:
        keys['backbone'].update(stem_channels=8, base_channels=8)
        keys['neck'] = dict(in_channels=[8, 16, 32, 64], out_channels=16)
        keys['rpn_head'].update(in_channels=16)
        head.update(in_channels=16, fc_out_channels=32)
        layer = dict(out_channels=16)
    else:
        keys['backbone'].update(style='pytorch')
        keys['rpn_head'].update(in_channels=256)
        head.update(in_channels=512)
        layer = dict(out_channels=256)
    heads = cfg.model.roi_head.bbox_head
    many = isinstance(heads, list)
    keys['roi_head'] = dict(bbox_head={str(i): head for i in range(3)} if many else head)
    keys['roi_head']['bbox_roi_extractor'] = dict(layer, finest_scale=14)
    if 'mask_head' in cfg.model.roi_head:
        masks = dict(num_convs=1, conv_out_channels=16, num_classes=5, in_channels=16)
        keys['roi_head'].update(
            mask_head=masks, mask_roi_extractor=dict(layer, finest_scale=20)
        )
    if 'shared_head' in cfg.model.roi_head:
        keys['roi_head']['shared_head'] = dict(depth=18, style='pytorch', init_cfg=None)
    cfg.merge_from_dict(dict(model=keys))
    cfg.merge_from_dict({f'model.{key}': value for key, value in (changes or {}).items()})
    torch.manual_seed(0)
    return build_model(cfg).eval()


def make(name, changes=None):
    """The same with weights that find objects."""
    model = build(name, changes)
    model.init_weights()
    for part, layer in model.named_modules():
        if (spread := SPREAD.get(part.split('.')[-1])) is not None:
            _spread(layer, spread)
    predict(model, image(1, 3, 128, 128))
    return model


def _spread(layer, spread):
    """Scale and shift what a layer gives when it is first run."""

    def fit(layer, inputs, output):
        channels = output.transpose(0, 1).flatten(1)
        factor = spread / channels.std(1)
        layer.weight.data *= factor.view(-1, *(1,) * (layer.weight.dim() - 1))
        layer.bias.data = (layer.bias - channels.mean(1)) * factor
        hook.remove()
        return layer(*inputs)

    torch.nn.init.normal_(layer.weight)
    hook = layer.register_forward_hook(fit)


@torch.no_grad()
def predict(model, images, size=None):
    """What MMDetection predicts; ``size`` is that of the image without its padding."""
    size = size or tuple(images.shape[2:])
    meta = dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0))
    [sample] = model.predict(images, [DetDataSample(metainfo=meta)], rescale=False)
    return sample.pred_instances


def check(model, images, results):
    """Compare with what MMDetection predicts."""
    expected = predict(model, images)
    boxes, scores, labels, *masks = map(torch.as_tensor, results)
    assert labels.dtype == torch.int64 and labels.tolist() == expected.labels.tolist()
    torch.testing.assert_close(scores, expected.scores, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(boxes, expected.bboxes, rtol=1e-4, atol=1e-3)
    for mask, box, wanted in zip(*masks, boxes, expected.get('masks', []), strict=False):
        found = _do_paste_mask(mask[None, None], box[None], *images.shape[2:], False)[0]
        # pixels at the threshold may differ
        assert ((found[0] >= 0.5) != wanted).float().mean() < 1e-3
    assert len(masks) == ('masks' in expected)
    return expected


def run_torch(detector, images):
    with torch.no_grad():
        return detector(images)


COARSE = {f'roi_head.bbox_head.{i}.reg_class_agnostic': False for i in range(3)}


@pytest.mark.parametrize(
    ('name', 'changes'),
    [
        (MASK, {}),
        (FASTER, {}),
        (CASCADE, {}),
        (C4, {}),  # one level, with a shared head
        (CASCADE, COARSE),
        (CASCADE, {'roi_head.mask_head.class_agnostic': True}),
        (MASK, {'roi_head.bbox_head.reg_class_agnostic': True}),
        (MASK, {'rpn_head.loss_cls.use_sigmoid': False}),
        (FASTER, {'roi_head.bbox_head.bbox_coder.clip_border': False}),
        (MASK, {'rpn_head.bbox_coder.target_stds': [0.5, 2.0, 1.5, 0.7]}),
        (MASK, {'roi_head.bbox_head.bbox_coder.target_means': [0.1, -0.2, 0.3, -0.1]}),
        (MASK, {'rpn_head.bbox_coder.add_ctr_clamp': True}),
        (MASK, {'rpn_head.bbox_coder.target_stds': [1.0, 1.0, 9.0, 9.0]}),  # sides clipped
        (MASK, {'rpn_head.anchor_generator.center_offset': 0.5}),
        (MASK, {'roi_head.bbox_roi_extractor.roi_layer.sampling_ratio': 2}),
        (MASK, {'roi_head.bbox_roi_extractor.roi_layer.aligned': False}),
        (MASK, {'roi_head.mask_roi_extractor.roi_layer.output_size': 7}),
        (FASTER, {'test_cfg.rpn.nms.iou_threshold': 0.5}),
        (FASTER, {'test_cfg.rcnn.nms.iou_threshold': 0.1}),
        (FASTER, {'test_cfg.rcnn.nms.class_agnostic': True}),
        (FASTER, {'test_cfg.rcnn.score_thr': 0.6}),
        (FASTER, {'test_cfg.rcnn.score_thr': 0.0, 'test_cfg.rcnn.max_per_img': -1}),
        (FASTER, {'test_cfg.rpn.min_bbox_size': 40}),
        (FASTER, {'test_cfg.rpn.max_per_img': 10}),
        (FASTER, {'test_cfg.rpn.nms_pre': 1000, 'test_cfg.rpn.max_per_img': 2000}),
    ],
)
def test_what_the_model_predicts(name, changes):
    model = make(name, changes)
    detector = Detector(model)
    for size in [*SIZES, (64, 64)]:
        images = image(1, 3, *size)
        check(model, images, run_torch(detector, images))


@pytest.mark.parametrize('name', [MASK, FASTER, CASCADE])
def test_onnx(name, tmp_path):
    """A file for images of any size, in operators of the standard."""
    model = make(name)
    detector = Detector(model).eval()
    file = tmp_path / 'detector.onnx'
    # no level of the example is short of anchors, and those of the images below are
    program = capture(detector, image(1, 3, 320, 352), DIMS)
    write_onnx(program, file, detector.outputs, 20)
    run = session(file)
    for size in SIZES:
        images = image(1, 3, *size)
        results = run(images)
        assert len(check(model, images, results)) > 30
        for found, expected in zip(results, run_torch(detector, images), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


def test_onnx_of_one_size(tmp_path):
    """With fewer anchors on each level than may be taken, and the smallest opset."""
    model = make(MASK, {'test_cfg.rpn.nms_pre': 1000, 'test_cfg.rpn.max_per_img': 300})
    images = image(1, 3, 72, 104)
    detector = Detector(model).eval()
    file = tmp_path / 'detector.onnx'
    write_onnx(capture(detector, images), file, detector.outputs, 18)
    assert len(check(model, images, session(file)(images))) > 30


def test_the_image_is_padded_as_in_mmdetection():
    model, images = make(MASK), image(1, 3, 97, 130)
    padded = torch.nn.functional.pad(images, (0, 30, 0, 31))
    expected = predict(model, padded, (97, 130))
    with torch.no_grad():
        boxes, scores, labels, _ = Detector(model, divisor=32)(images)
        other = Detector(model)(images)[1]
    torch.testing.assert_close(boxes, expected.bboxes, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(scores, expected.scores, rtol=1e-5, atol=1e-6)
    assert (labels == expected.labels).all() and len(labels) > 5
    assert boxes[:, 2].max() <= 130 and boxes[:, 3].max() <= 97
    assert other.shape != scores.shape or (other - scores).abs().max() > 1e-4


def test_onnx_that_finds_one_or_none(tmp_path):
    model = make(MASK)
    images = [image(1, 3, 96, 96) * scale for scale in (0.5, 1.0, 2.0)]
    best = [predict(model, i).scores.max().item() for i in images]
    model.roi_head.test_cfg.score_thr = max(best) - 1e-5
    detector = Detector(model).eval()
    file = tmp_path / 'detector.onnx'
    write_onnx(capture(detector, images[0]), file, detector.outputs, 20)
    run = session(file)
    for example, score in zip(images, best, strict=True):
        n = int(score == max(best))
        assert len(check(model, example, run(example))) == n
        check(model, example, run_torch(detector, example))
        assert [len(r) for r in run(example)] == [n] * 4
    assert run(example)[-1].shape[1:] == (28, 28)


def session(file):
    """Run a file that is of the standard operators alone."""
    model = onnx.load(file)
    assert {node.domain for node in model.graph.node} == {''} and not model.functions
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    runtime = onnxruntime.InferenceSession(
        file, options, providers=['CPUExecutionProvider']
    )
    return lambda images: runtime.run(None, {'image': images.numpy()})


def test_levels_of_boxes():
    """Also at the sides where the level changes, as those of whole images often are."""
    layer = dict(type='RoIAlign', output_size=7, sampling_ratio=0)
    extractor = SingleRoIExtractor(layer, 2, [4, 8, 16, 32])
    maps = [image(1, 2, 1024 // stride, 1024 // stride) for stride in (4, 8, 16, 32)]
    sides = [0.0, 1, 111.99, 111.99998, 112, 112.01, 223.99, 224, 447.99, 448, 896, 1024]
    sides = torch.tensor(sides)
    boxes = torch.stack([sides * 0, sides * 0, sides, sides], dim=1)
    rois = torch.cat([sides[:, None] * 0, boxes], dim=1)
    assert extractor.map_roi_levels(rois, 4).unique().tolist() == [0, 1, 2, 3]
    found = detectors._extract(extractor, maps, boxes)
    torch.testing.assert_close(found, extractor(maps, rois))


def test_places_of_boxes_in_half_precision():
    """Pixels of a large image are not rounded, where float16 knows even ones alone."""
    layer = dict(type='RoIAlign', output_size=7, sampling_ratio=0)
    extractor = SingleRoIExtractor(layer, 2, [4, 8])
    maps = [image(1, 2, 4, 4096 // stride).half() for stride in (4, 8)]
    boxes = torch.tensor([[3001.0, 0.0, 3015.0, 12.0], [2001.0, 0.0, 2601.0, 16.0]])
    found = detectors._extract(extractor, maps, boxes)
    assert found.dtype == torch.float16
    rois = torch.nn.functional.pad(boxes, (1, 0))
    expected = extractor([level.float() for level in maps], rois)
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-3)


def test_subclasses_that_differ_in_training_alone():
    model = make(FASTER, {'roi_head.type': 'PISARoIHead'})
    assert type(model.roi_head) is not StandardRoIHead
    images = image(1, 3, 161, 161)
    check(model, images, run_torch(Detector(model), images))


GENERIC = dict(
    _delete_=True,
    type='GenericRoIExtractor',
    roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0),
    out_channels=16,
    featmap_strides=[4, 8, 16, 32],
)
POOL = dict(_delete_=True, type='RoIPool', output_size=7)
SEESAW = dict(_delete_=True, type='SeesawLoss', num_classes=5)
CARAFE = dict(
    type='carafe',
    scale_factor=2,
    up_kernel=3,
    up_group=1,
    encoder_kernel=3,
    encoder_dilation=1,
    compressed_channels=8,
)


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        ('test_cfg.rcnn.nms.type', 'soft_nms', 'rcnn.nms is .*soft_nms.*supported: .*nms'),
        ('test_cfg.rcnn.nms', None, 'test_cfg.rcnn.nms is None'),
        ('test_cfg.rpn.nms.max_num', 5, 'test_cfg.rpn.nms is .*max_num'),
        ('test_cfg.rpn.nms_pre', -1, 'test_cfg.rpn.nms_pre is -1.*numbers from 1'),
        ('rpn_head.bbox_coder.type', 'DeltaXYWHBBoxCoderForGLIP', 'is a DeltaXYWHB.*GLIP'),
        (
            'roi_head.bbox_head.bbox_coder.type',
            'LegacyDeltaXYWHBBoxCoder',
            'its bbox_coder is a LegacyDelta.*supported: DeltaXYWHBBoxCoder',
        ),
        (
            'roi_head.bbox_roi_extractor',
            GENERIC,
            'a GenericRoIExtractor.*SingleRoIExtractor',
        ),
        ('roi_head.bbox_head.loss_cls', SEESAW, 'its SeesawLoss; supported: softmax'),
        (
            'roi_head.bbox_roi_extractor.roi_layer.pool_mode',
            'max',
            "pool_mode='max'.*'avg'",
        ),
        ('roi_head.bbox_roi_extractor.roi_layer', POOL, 'a RoIPool; supported: RoIAlign'),
        ('roi_head.mask_head.upsample_cfg', CARAFE, 'mask_head.upsample is a CARAFEPack'),
    ],
)
def test_options_that_are_refused(key, value, message):
    with pytest.raises(UserError, match=f'{message}.*--backbone-only'):
        Detector(build(MASK, {key: value}))


@pytest.mark.parametrize(
    ('part', 'kind'),
    [
        ('', 'RetinaNet'),
        ('', 'PanopticFPN'),
        ('', 'TridentFasterRCNN'),
        ('rpn_head', 'RetinaHead'),
        ('rpn_head', 'StageCascadeRPNHead'),
        ('roi_head', 'DoubleHeadRoIHead'),
        ('roi_head', 'GridRoIHead'),
        ('roi_head', 'HybridTaskCascadeRoIHead'),
        ('roi_head', 'MaskScoringRoIHead'),
        ('roi_head', 'PointRendRoIHead'),
        ('roi_head.bbox_head', 'SABLHead'),
        ('roi_head.mask_head', 'MaskPointHead'),
    ],
)
def test_parts_that_are_refused(part, kind):
    model = build(MASK)
    model.get_submodule(part).__class__ = MMDET.get(kind)
    with pytest.raises(UserError, match=f' is a {kind}; supported: .*--backbone-only'):
        Detector(model)


def test_a_subclass_with_another_prediction_is_refused():
    class Mine(StandardRoIHead):
        def predict_bbox(self, *args, **kwargs):
            return []

    model = build(FASTER)
    model.roi_head.__class__ = Mine
    with pytest.raises(UserError, match='its roi_head is a Mine; supported: Standard'):
        Detector(model)
    model = build(FASTER)
    model.rpn_head = None
    with pytest.raises(UserError, match='its rpn_head is missing; supported: RPNHead'):
        Detector(model)
