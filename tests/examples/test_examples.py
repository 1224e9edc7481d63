"""The programs of examples/: without torch they predict what overlock infer does."""

import json

import cv2
import numpy as np
import onnx
import pytest
import torch
from helpers import ROOT
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

SEGMENT, DETECT = (
    ROOT / f'examples/onnx_{task}.py' for task in ('segmentation', 'detection')
)
NATIVE = (
    240,
    320,
)  # the size that the model resizes images to, so that they stay as they are


def labels_of(result):
    return result.pred_sem_seg.data[0].numpy()


def edited(path, out, **metadata):
    """A copy of an ONNX file with other metadata."""
    model = onnx.load(path)
    found = {p.key: p.value for p in model.metadata_props}
    found |= {key: json.dumps(value) for key, value in metadata.items()}
    helper.set_model_props(model, found)
    onnx.save(model, out)
    return out


def agreement(labels, expected):
    """The share of the pixels that have the same label, of maps with several classes."""
    shares = np.bincount(expected.ravel()) / expected.size
    assert (shares > 0.01).sum() >= 3, shares
    assert labels.shape == expected.shape
    return (labels == expected).mean()


@pytest.mark.parametrize('program', [SEGMENT, DETECT], ids=lambda path: path.stem)
def test_they_are_short(program):
    assert len(program.read_text().splitlines()) <= 40


def test_there_is_no_torch(run_program, tmp_path):
    program = tmp_path / 'program.py'
    for package in ('torch', 'overlock_mm', 'mmcv', 'cv2'):
        program.write_text(f'import {package}')
        run_program(program, error='ModuleNotFoundError')


def test_a_label_map(run_program, model, predictor, photo, tmp_path):
    Image.fromarray(photo(*NATIVE)).save(tmp_path / 'photo.png')
    expected = labels_of(predictor(tmp_path / 'photo.png'))
    printed = run_program(SEGMENT, model, tmp_path / 'photo.png', tmp_path / 'out.png')
    picture = Image.open(tmp_path / 'out.png')
    assert picture.mode == 'P'
    palette = [part for color in predictor.palette for part in color]
    assert picture.getpalette()[: len(palette)] == palette
    labels = np.asarray(picture)
    assert agreement(labels, expected) >= 0.999
    shares = np.bincount(labels.ravel(), minlength=10) / labels.size
    lines = [line.split() for line in printed.splitlines()]
    assert [name for _, name in lines] == [
        predictor.classes[i] for i in np.argsort(-shares) if shares[i]
    ]
    for share, name in lines:
        expected = 100 * shares[predictor.classes.index(name)]
        assert float(share.rstrip('%')) == pytest.approx(expected, abs=0.051)


@pytest.mark.parametrize('size', [(450, 300), (130, 170), (600, 640)])
def test_a_label_map_of_a_resized_image(
    run_program, model, predictor, photo, tmp_path, size
):
    """Labels are resized to the image, where MMSegmentation resizes the logits.

    So edges differ by a pixel or two of those that the model sees.
    """
    Image.fromarray(photo(*size)).save(tmp_path / 'photo.png')
    run_program(SEGMENT, model, tmp_path / 'photo.png', tmp_path / 'out.png')
    expected = labels_of(predictor(tmp_path / 'photo.png'))
    assert agreement(np.asarray(Image.open(tmp_path / 'out.png')), expected) >= 0.97


@pytest.mark.parametrize('kind', ['grey', 'RGBA', 'palette', 'turned'])
def test_kinds_of_images(run_program, model, predictor, photo, tmp_path, kind):
    image = Image.fromarray(photo(*NATIVE))
    path, options = tmp_path / 'photo.png', {}
    if kind == 'grey':
        image = image.convert('L')
    elif kind == 'RGBA':
        image.putalpha(Image.fromarray(photo(*NATIVE)[..., 0]))
    elif kind == 'palette':
        image = image.quantize(64)
    else:
        path, options = tmp_path / 'photo.jpg', dict(exif=Image.Exif())
        options['exif'][0x0112] = 6
        image = image.transpose(Image.ROTATE_90)
    image.save(path, **options)
    run_program(SEGMENT, model, path, tmp_path / 'out.png')
    expected = labels_of(predictor(path))
    assert expected.shape == NATIVE
    assert agreement(np.asarray(Image.open(tmp_path / 'out.png')), expected) >= 0.999


def test_an_image_in_bgr(run_program, model, predictor, photo, tmp_path):
    """A model that sees BGR gets it: here the model of RGB, and an image in BGR."""
    other = edited(model, tmp_path / 'bgr.onnx', channels='bgr')
    Image.fromarray(photo(*NATIVE)[..., ::-1]).save(tmp_path / 'photo.png')
    run_program(SEGMENT, other, tmp_path / 'photo.png', tmp_path / 'out.png')
    expected = labels_of(predictor(photo(*NATIVE)))
    assert agreement(np.asarray(Image.open(tmp_path / 'out.png')), expected) >= 0.999


def test_a_file_for_one_size(run_program, fixed_model, predictor, photo, tmp_path):
    """It also normalises the image. The image is resized without keeping its ratio."""
    image, size = photo(250, 500), NATIVE[::-1]
    Image.fromarray(image).save(tmp_path / 'photo.png')
    run_program(SEGMENT, fixed_model, tmp_path / 'photo.png', tmp_path / 'out.png')
    expected = labels_of(predictor(cv2.resize(image, size)))
    expected = cv2.resize(expected.astype(np.uint8), (500, 250), interpolation=0)
    assert agreement(np.asarray(Image.open(tmp_path / 'out.png')), expected) >= 0.98


def test_a_narrow_image_is_enlarged(run_program, model, photo, tmp_path):
    Image.fromarray(photo(50, 320)).save(tmp_path / 'photo.png')
    run_program(SEGMENT, model, tmp_path / 'photo.png', tmp_path / 'out.png')
    assert Image.open(tmp_path / 'out.png').size == (320, 50)


def test_without_a_scale_images_stay_as_they_are(
    run_program, model, predictor, photo, tmp_path
):
    Image.fromarray(photo(200, 280)).save(tmp_path / 'photo.png')
    other = edited(model, tmp_path / 'other.onnx', scale=None)
    run_program(SEGMENT, other, tmp_path / 'photo.png', tmp_path / 'out.png')
    steps = predictor._steps
    try:
        predictor._steps = [s for s in steps if type(s).__name__ != 'Resize']
        expected = labels_of(predictor(tmp_path / 'photo.png'))
    finally:
        predictor._steps = steps
    assert agreement(np.asarray(Image.open(tmp_path / 'out.png')), expected) >= 0.999


def test_what_cannot_be_done(run_program, model, photo, tmp_path):
    deep, plain, out = (tmp_path / name for name in ('deep.png', 'photo.png', 'out.png'))
    Image.fromarray(photo(*NATIVE)).save(plain)
    Image.fromarray(photo(*NATIVE)[..., 0].astype(np.uint16) * 256).save(deep)
    run_program(SEGMENT, model, deep, out, error='deep.png has more than 8 bits')
    run_program(DETECT, model, plain, out, error="has the outputs ['labels'], not boxes")
    logits = edited(model, tmp_path / 'logits.onnx', outputs=['logits'])
    run_program(SEGMENT, logits, plain, out, error="outputs ['logits'], not label maps")
    assert not out.exists()


BOXES = np.float32([[10, 20, 130, 110], [200, 60, 290, 225], [60, 120, 170, 230]])
MEAN, STD = [120.0, 110.0, 100.0], [60.0, 50.0, 40.0]
CLASSES, PALETTE = ['cat', 'dog', 'cow'], [[250, 0, 0], [0, 250, 0], [0, 0, 250]]


def masks():
    """A disk, all, and a triangle, with soft edges."""
    y, x = np.mgrid[:28, :28] + 0.5
    disk, triangle = 12 - np.hypot(y - 14, x - 14), x - y
    return np.stack([1 / (1 + np.exp(-v)) for v in (disk, y, triangle)]).astype(np.float32)


def detector(path, shape=None, with_masks=True, **info):
    """An ONNX file that finds ``BOXES``; their scores are the means of the channels."""
    outputs = dict(boxes=BOXES, labels=np.int64([0, 1, 2]), masks=masks())
    if not with_masks:
        del outputs['masks']
    nodes = [helper.make_node('ReduceMean', ['image', 'axes'], ['scores'], keepdims=0)]
    constants = [numpy_helper.from_array(np.int64([0, 2, 3]), 'axes')]
    for name, value in outputs.items():
        nodes.append(helper.make_node('Identity', [f'all_{name}'], [name]))
        constants.append(numpy_helper.from_array(value, f'all_{name}'))
    names = ['boxes', 'scores', 'labels', 'masks'][: 3 + with_masks]
    types = dict(labels=TensorProto.INT64)
    results = [
        helper.make_tensor_value_info(name, types.get(name, TensorProto.FLOAT), None)
        for name in names
    ]
    sides = shape or ('height', 'width')
    image = helper.make_tensor_value_info('image', TensorProto.FLOAT, (1, 3, *sides))
    graph = helper.make_graph(nodes, 'detector', [image], results, constants)
    opset = [helper.make_opsetid('', 20)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    metadata = dict(
        dict(task='detection', outputs=names, classes=CLASSES, palette=PALETTE),
        **dict(mean=MEAN, std=STD, channels='rgb', shape=shape, scale=[320, 240]),
        smallest_side=None if shape else 129,
    )
    for key, value in (metadata | info).items():
        model.metadata_props.add(key=key, value=json.dumps(value))
    onnx.save(model, path)
    return path


def bright(photo, *size):
    """An image whose channels all have a mean above that of the model."""
    return (photo(*size) // 3 + np.uint8([150, 160, 170])).astype(np.uint8)


def objects_in(printed):
    """Lines such as 'cat 0.63  x 5..50  y 10..45': {name: (score, box)}."""
    lines = [line.replace('..', ' ').split() for line in printed.splitlines()]
    return {
        line[0]: (float(line[1]), [int(line[i]) for i in (3, 6, 4, 7)]) for line in lines
    }


@pytest.mark.parametrize('order', ['rgb', 'bgr'])
@pytest.mark.parametrize(
    'size, shape, factor',
    [
        ((240, 320), None, 1),
        ((480, 640), None, 2),
        ((640, 480), None, 2),
        ((480, 640), (240, 320), 2),
        ((480, 320), (240, 320), 2),
    ],
    ids=['as it is', 'smaller', 'portrait', 'one size', 'portrait in one size'],
)
def test_objects(run_program, photo, tmp_path, order, size, shape, factor):
    image = bright(photo, *size)
    Image.fromarray(image).save(tmp_path / 'photo.png')
    model = detector(tmp_path / 'model.onnx', shape, channels=order)
    printed = run_program(DETECT, model, tmp_path / 'photo.png', tmp_path / 'out.png')
    found = objects_in(printed)
    seen = image[..., :: -1 if order == 'bgr' else 1]
    scores = ((seen - np.array(MEAN)) / STD).mean((0, 1))
    if shape and size[1] != 640:  # black on the right
        scores = (scores + -np.array(MEAN) / STD) / 2
    kept = [i for i in range(3) if scores[i] >= 0.3]
    assert list(found) == [CLASSES[i] for i in kept]
    for i in kept:
        score, box = found[CLASSES[i]]
        assert score == pytest.approx(scores[i], abs=0.02)
        np.testing.assert_allclose(box, BOXES[i] * factor, atol=1)
    check_picture(image, np.asarray(Image.open(tmp_path / 'out.png')), factor, kept)


def check_picture(image, picture, factor, kept):
    """Masks as MMDetection pastes them, outlines, and nothing elsewhere."""
    from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask

    assert picture.shape == image.shape
    boxes = torch.from_numpy(BOXES * factor)
    pasted = torch.from_numpy(masks())[:, None]
    pasted, _ = _do_paste_mask(pasted, boxes, *image.shape[:2], skip_empty=False)
    expected, untouched = image.astype(float), np.ones(image.shape[:2], bool)
    for i in kept:
        inside = pasted[i].numpy() >= 0.5
        expected[inside] = (expected[inside] + PALETTE[i]) / 2
        x0, y0, x1, y1 = (BOXES[i] * factor).astype(int)
        untouched[max(y0 - 3, 0) : y1 + 4, max(x0 - 3, 0) : x1 + 4] = False
        untouched[y0 : y0 + 40, x0 : x0 + 150] = False  # its name
    assert (picture == image)[untouched].all() and untouched.any()
    for i in kept:
        x0, y0, x1, y1 = (BOXES[i] * factor).astype(int)
        assert (picture[y1, x0:x1] == PALETTE[i]).all()
        assert (picture[y0 : y0 + 20, x0 : x0 + 60] == 255).all(2).any()  # its name
        part = np.s_[y0 + 25 : y1 - 4, x0 + 4 : x1 - 4]
        same = np.abs(picture[part] - expected[part]).max(2) <= 2
        assert same.mean() > 0.97
