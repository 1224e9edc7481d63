"""Principal components and evidence, against numpy and hand-worked cases."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import CHANNELS, image
from mmengine.structures import InstanceData
from PIL import Image
from torch import nn

from overlock_mm.apis.visualization import maps as module
from overlock_mm.apis.visualization.maps import principal_colours
from overlock_mm.apis.visualization.networks import Seen, backbone_of, look, open_model
from overlock_mm.config.load import build_model, load_config
from overlock_mm.errors import UserError


def test_principal_components_against_a_decomposition_in_numpy():
    features = image(6, 9, 11)
    found = principal_colours(features)
    x = features.double().numpy().reshape(6, -1).T
    x = x - x.mean(0)
    left, values, right = np.linalg.svd(x, full_matrices=False)
    signs = np.sign(right[np.arange(6), np.abs(right).argmax(1)])
    scores = (left * values * signs)[:, :3]
    low, high = np.quantile(scores, [0.01, 0.99], axis=0)
    expected = ((scores - low) / (high - low)).clip(0, 1).reshape(9, 11, 3)
    assert np.allclose(found.picture, expected, atol=1e-6)
    assert found.explained == pytest.approx((values[:3] ** 2).sum() / (values**2).sum())


def test_components_worked_by_hand():
    """One component, along (1, -2): its colour grows with the second channel."""
    ramp = torch.linspace(0, 1, 101).view(1, 101)
    found = principal_colours(torch.stack([ramp, -2 * ramp]))
    expected = ((1 - ramp[0] - 0.01) / 0.98).clamp(0, 1).numpy()
    assert np.allclose(found.picture[0, :, 0], expected, atol=1e-6)
    assert (found.picture[..., 1:] == 0.5).all() and found.explained == pytest.approx(1)
    single = principal_colours(image(5, 1, 1))  # an image of one position has no variance
    assert (single.picture == 0.5).all()


class _Segmentor(nn.Module):
    """Logits are a 1x1 convolution of the second of two maps."""

    def __init__(self, classes):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Identity()
        self.head = nn.Conv2d(4, classes, 1)

    def encode_decode(self, inputs, metas):
        return self.head(self.backbone(inputs)[1])


def evidence_of(model, found, label, cam, names=('sky', 'tree', 'road')):
    sample = InstanceData(metainfo=dict(img_shape=(8, 8)))
    seen = Seen(torch.zeros(1, 3, 8, 8), np.zeros((8, 8, 3), np.uint8), (8, 8), sample)
    scores = module._Scores(SimpleNamespace(model=model, toolbox='mmseg'), seen)
    with module._fed(model.backbone, found) as taps:
        question = module._ask(scores, seen, label, None, names)
        heats = [module._evidence(scores, seen, tap, question, cam) for tap in taps]
    assert model.backbone(1) == 1  # it runs again
    return question, heats


def relative(heat):
    heat = heat.clip(0) - heat.clip(0).min()
    return heat / heat.max()


@pytest.mark.parametrize('classes', [3, 1])
def test_evidence_of_a_linear_head(classes):
    model = _Segmentor(classes).requires_grad_(False)
    found = [image(1, 4, 8, 8), image(1, 4, 8, 8) + 0.3]
    f = found[1][0].double().numpy()
    weight = model.head.weight[:, :, 0, 0].double().numpy()
    logits = np.einsum('kc,chw->khw', weight, f) + model.head.bias.numpy()[:, None, None]
    if classes == 1:  # below 0 it is the class 0
        weight, logits = (
            np.concatenate([-weight, weight]),
            np.concatenate([-logits, logits]),
        )
    for label in (0, 1):
        mask = logits.argmax(0) == label
        question, (unused, heat) = evidence_of(model, found, label, 'hirescam')
        assert mask.any() and (question.region == mask).all()
        assert not unused.any()
        expected = np.einsum('c,chw->hw', weight[label], f) * mask
        assert np.allclose(heat, relative(expected), atol=1e-4)
        _, (_, heat) = evidence_of(model, found, label, 'gradcam')
        expected = np.einsum('c,chw->hw', weight[label], f)  # also outside of the mask
        assert np.allclose(heat, relative(expected), atol=1e-4)


def test_evidence_of_a_class_that_is_predicted_nowhere():
    model = _Segmentor(3).requires_grad_(False)
    model.head.bias[1] = -100
    found = [image(1, 4, 8, 8), image(1, 4, 8, 8)]
    question, (_, heat) = evidence_of(model, found, 1, 'hirescam')
    assert question.region is None and question.title == 'tree,\nwhich is predicted nowhere'
    f, weight = found[1][0].numpy(), model.head.weight[1, :, 0, 0].numpy()
    assert np.allclose(heat, relative(np.einsum('c,chw->hw', weight, f)), atol=1e-4)


def test_a_box_of_a_detector(configs, weights, photo):
    """The box that is asked about is the one that the detector predicts."""
    predictor = open_model(configs / 'detector.py', weights('detector'), 'cpu')
    backbone = backbone_of(predictor.model, 'it')
    seen = look(predictor, backbone, photo)
    height, width = seen.picture.shape[:2]
    assert seen.size == (96, 96) and height == width != 96
    # the first pixel and the last one are as far from the borders as they were
    expected = 0.5 * width / 96 - 0.5, width - 0.5 * width / 96 - 0.5
    assert seen.scaled(0, 95) == pytest.approx(expected)
    found = seen.result.pred_instances
    _, features = module._run(backbone, seen.inputs)
    scores = module._Scores(predictor, seen)
    order = found.scores.argsort(descending=True, stable=True)
    with module._fed(backbone, features) as taps:
        for n in (0, 3):
            question = module._ask(scores, seen, None, n, predictor.classes)
            expected = found.bboxes[order[n]].numpy() * width / 96
            assert np.allclose(question.region, expected, atol=0.01)
            assert predictor.classes[found.labels[order[n]]] in question.title
        heat = module._evidence(scores, seen, taps[1], question, 'hirescam')
        label = found.labels[order[5]].item()
        question = module._ask(scores, seen, label, None, predictor.classes)
        best = next(i for i in order if found.labels[i] == label)
        expected = found.bboxes[best].numpy() * width / 96
        assert np.allclose(question.region, expected, atol=0.01)
        with pytest.raises(UserError, match='boxes that were detected are 0 to'):
            module._ask(scores, seen, None, 99, predictor.classes)
    assert heat.shape == (height, width) and heat.max() == pytest.approx(1, abs=0.01)


def test_a_box_of_a_one_stage_detector(configs, photo, tmp_path):
    """Its heads cut gradients off. The score of a box is that of one position."""
    config = tmp_path / 'retina.py'
    config.write_text(f"""
_base_ = {str(configs / 'detector.py')!r}
backbone = {{{{_base_.model.backbone}}}}
model = dict(
    _delete_=True, type='RetinaNet', backbone=backbone,
    data_preprocessor=dict(type='DetDataPreprocessor', pad_size_divisor=32),
    neck=dict(type='FPN', in_channels={CHANNELS}, out_channels=16, num_outs=4),
    bbox_head=dict(
        type='RetinaHead', num_classes=9, in_channels=16, stacked_convs=1, feat_channels=16,
        anchor_generator=dict(
            type='AnchorGenerator', octave_base_scale=4, scales_per_octave=1,
            ratios=[1.0], strides=[4, 8, 16, 32]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder')),
    test_cfg=dict(
        nms_pre=10, score_thr=0.0, nms=dict(type='nms', iou_threshold=0.5), max_per_img=5))
""")
    torch.manual_seed(0)
    model = build_model(load_config(config))
    model.init_weights()
    torch.save(model.state_dict(), tmp_path / 'retina.pth')
    predictor = open_model(config, tmp_path / 'retina.pth', 'cpu')
    backbone = backbone_of(predictor.model, 'it')
    seen = look(predictor, backbone, photo)
    _, features = module._run(backbone, seen.inputs)
    scores = module._Scores(predictor, seen)
    with module._fed(backbone, features) as taps:
        question = module._ask(scores, seen, None, 0, predictor.classes)
        heats = [module._evidence(scores, seen, tap, question, 'hirescam') for tap in taps]
    assert max(heat.max() for heat in heats) == pytest.approx(1, abs=0.01)
    from mmdet.models.dense_heads import base_dense_head

    kept = base_dense_head.select_single_mlvl([torch.ones(1, 2, requires_grad=True)], 0)
    assert not kept[0].requires_grad  # as before


def test_the_picture_is_the_image(configs, weights, photo, tmp_path):
    predictor = open_model(configs / 'detector.py', weights('detector'), 'cpu')
    pixels = np.asarray(Image.open(photo).convert('RGB'))[:70, :90]
    Image.fromarray(pixels).save(tmp_path / 'odd.png')
    seen = look(predictor, backbone_of(predictor.model, 'it'), tmp_path / 'odd.png')
    height, width = seen.picture.shape[:2]
    assert seen.size == (70, 90) and seen.inputs.shape[2] > height  # padded
    bilinear = Image.Resampling.BILINEAR
    expected = np.asarray(Image.fromarray(pixels).resize((width, height), bilinear))
    assert np.abs(expected.astype(int) - seen.picture).mean() < 1


def test_the_command(draw, tmp_path, configs, weights, photo):
    files = configs / 'segmentor.py', weights('segmentor'), photo
    printed = draw('maps', *files, '--class', 'background', '--out', 'maps.svg')
    for line in ('context +8 +3 x 3 ', 'map 1 +8 +24 x 24 ', 'map 4 +40 +3 x 3 '):
        assert re.search(f'^{line}', printed, re.M)
    text = (tmp_path / 'maps.svg').read_text()
    assert 'evidence (GradCAM)' in text and 'background' in text
    draw('maps', *files, '--out', 'plain.svg')
    assert 'evidence' not in (tmp_path / 'plain.svg').read_text()
    files = configs / 'detector.py', weights('detector'), photo
    draw('maps', *files, '--box', 0, '--out', 'box.svg')
    assert 'evidence (HiResCAM)' in (tmp_path / 'box.svg').read_text()


def test_another_backbone(draw, tmp_path, other_backbone, photo):
    printed = draw('maps', *other_backbone, photo, '--out', 'maps.png')
    assert 'context' not in printed and re.search('^map 4 +512 +3 x 3 ', printed, re.M)


@pytest.mark.parametrize(
    'arguments, words',
    [
        (
            ['--class', 'backgrounds'],
            '--class backgrounds is not a class of the model; is it background?',
        ),
        (['--class', 'xyz'], 'it has background, '),
        (['--box', '0'], '--box is for detectors'),
        (['--out', 'maps.txt'], 'maps.txt must end in .png'),
        (['--cam', 'none'], "invalid choice: 'none'"),
    ],
)
def test_wrong_arguments(draw, configs, weights, photo, arguments, words):
    files = configs / 'segmentor.py', weights('segmentor'), photo
    assert words in draw('maps', *files, '--out', 'a.png', *arguments, status=2)


def test_without_the_library(draw, monkeypatch, configs, weights, photo):
    monkeypatch.setitem(__import__('sys').modules, 'pytorch_grad_cam', None)
    files = configs / 'segmentor.py', weights('segmentor'), photo
    error = draw('maps', *files, '--class', 'background', '--out', 'a.png', status=2)
    assert error.endswith('run: pip install grad-cam\n')
    draw('maps', *files, '--out', 'a.png')
