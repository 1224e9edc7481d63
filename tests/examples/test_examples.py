"""The programs of examples/: without torch they predict what overlock infer does."""

import base64
import functools
import io
import json
import re
import shutil
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np
import onnx
import pytest
import torch
from helpers import DETECTION, ROOT
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageOps

from overlock_mm import OverLoCK, Predictor
from overlock_mm.apis.export import export
from overlock_mm.config.load import build_model, load_config

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
    assert agreement(np.asarray(Image.open(tmp_path / 'out.png')), expected) >= 0.985


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
    expected = np.asarray(Image.fromarray(expected.astype(np.uint8)).resize((500, 250), 0))
    assert agreement(np.asarray(Image.open(tmp_path / 'out.png')), expected) >= 0.995


def test_a_narrow_image_is_enlarged(run_program, model, photo, tmp_path):
    Image.fromarray(photo(50, 320)).save(tmp_path / 'photo.png')
    run_program(SEGMENT, model, tmp_path / 'photo.png', tmp_path / 'out.png')
    assert Image.open(tmp_path / 'out.png').size == (320, 50)


@pytest.mark.parametrize(
    'resizing, inner',
    [
        (dict(keep_ratio=False, scale=[200, 320]), (320, 200)),
        (dict(size_divisor=32), (320, 192)),
        (dict(size_divisor=32, keep_ratio=False, scale=[200, 300]), (320, 224)),
        (dict(scale=None, size_divisor=64), (384, 256)),
    ],
)
def test_other_ways_to_resize(run_program, tmp_path, resizing, inner):
    """The labels of this model are the pixels that it sees."""
    image = np.random.default_rng(0).integers(0, 256, (350, 200, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / 'photo.png')
    model = edited(red_model(tmp_path / 'm.onnx'), tmp_path / 'model.onnx', **resizing)
    run_program(SEGMENT, model, tmp_path / 'photo.png', tmp_path / 'out.png')
    expected = Image.fromarray(cv2.resize(image[..., 0], inner[::-1]))
    expected = np.array(expected.resize((200, 350), Image.NEAREST)).astype(int)
    assert np.abs(np.asarray(Image.open(tmp_path / 'out.png')) - expected).max() <= 1


def test_without_a_scale_images_stay_as_they_are(
    run_program, model, predictor, photo, tmp_path
):
    Image.fromarray(photo(200, 280)).save(tmp_path / 'photo.png')
    other = edited(model, tmp_path / 'other.onnx', scale=None)
    run_program(SEGMENT, other, tmp_path / 'photo.png', tmp_path / 'out.png')
    steps = predictor.steps
    try:
        predictor.steps = [s for s in steps if type(s).__name__ != 'Resize']
        expected = labels_of(predictor(tmp_path / 'photo.png'))
    finally:
        predictor.steps = steps
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


def red_model(path):
    """An ONNX file whose labels are the values of the red channel, with colours in grey."""
    nodes = [
        helper.make_node('Slice', ['image', 'first', 'second', 'axes'], ['red']),
        helper.make_node('Squeeze', ['red', 'axes'], ['values']),
        helper.make_node('Cast', ['values'], ['labels'], to=TensorProto.UINT8),
    ]
    constants = dict(first=np.int64([0]), second=np.int64([1]), axes=np.int64([1]))
    metadata = dict(
        classes=[f'class_{i}' for i in range(256)], palette=[[i, i, i] for i in range(256)]
    )
    metadata |= dict(mean=[0] * 3, std=[1] * 3)
    save_model(path, nodes, constants, dict(labels=TensorProto.UINT8), **metadata)
    return path


def test_the_resize_is_that_of_opencv(run_program, tmp_path):
    model, path = red_model(tmp_path / 'model.onnx'), tmp_path / 'photo.png'
    for size, inner in (((600, 700), (240, 280)), ((90, 60), (320, 213))):
        image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(image).save(path)
        run_program(SEGMENT, model, path, tmp_path / 'out.png')
        expected = Image.fromarray(cv2.resize(image[..., 0], inner[::-1]))
        expected = np.array(expected.resize(size[::-1], Image.NEAREST)).astype(int)
        found = np.asarray(Image.open(tmp_path / 'out.png'))
        assert np.abs(found - expected).max() <= 1  # rounded down, or to the nearest


def test_classes_that_were_not_found_are_not_listed(run_program, tmp_path):
    image = np.full((240, 320, 3), 5, np.uint8)
    image[:60] = 200
    Image.fromarray(image).save(tmp_path / 'photo.png')
    model = red_model(tmp_path / 'model.onnx')
    printed = run_program(SEGMENT, model, tmp_path / 'photo.png', tmp_path / 'out.png')
    assert printed.split() == ['75.0%', 'class_5', '25.0%', 'class_200']


def save_model(path, nodes, constants, outputs, shape=None, **metadata):
    """Write an ONNX file of some nodes, with the metadata of ``overlock export``."""
    results = [
        helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()
    ]
    sides = shape or ('height', 'width')
    image = helper.make_tensor_value_info('image', TensorProto.FLOAT, (1, 3, *sides))
    constants = [numpy_helper.from_array(v, name) for name, v in constants.items()]
    graph = helper.make_graph(nodes, 'graph', [image], results, constants)
    opset = [helper.make_opsetid('', 20)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    usual = dict(outputs=list(outputs), channels='rgb', shape=shape, scale=[320, 240])
    usual |= dict(smallest_side=None if shape else 129, keep_ratio=True, size_divisor=1)
    for key, value in (usual | metadata).items():
        model.metadata_props.add(key=key, value=json.dumps(value))
    onnx.save(model, path)


BOXES = np.float32([[10, 5, 150, 80], [10, 95, 70, 230], [85, 95, 155, 235]])
MEAN, STD = [60.0, 50.0, 40.0], [60.0, 50.0, 40.0]
CLASSES, PALETTE = ['cat', 'dog', 'cow'], [[250, 0, 0], [0, 250, 0], [0, 0, 250]]


def masks():
    """A disk, all, and a triangle, with soft edges."""
    y, x = np.mgrid[:28, :28] + 0.5
    disk, triangle = 12 - np.hypot(y - 14, x - 14), x - y
    return np.stack([1 / (1 + np.exp(-v)) for v in (disk, y, triangle)]).astype(np.float32)


def detector(path, shape=None, with_masks=True, **info):
    """An ONNX file that finds ``BOXES``; scores are mean squares of the channels."""
    found = dict(boxes=BOXES, labels=np.int64([0, 1, 2]), masks=masks())
    kinds = dict.fromkeys(['boxes', 'scores', 'labels', 'masks'], TensorProto.FLOAT)
    kinds['labels'] = TensorProto.INT64
    if not with_masks:
        del found['masks'], kinds['masks']
    nodes = [
        helper.make_node('Mul', ['image', 'image'], ['squares']),
        helper.make_node('ReduceMean', ['squares', 'axes'], ['scores'], keepdims=0),
    ]
    nodes += [helper.make_node('Identity', [f'all_{name}'], [name]) for name in found]
    constants = {f'all_{name}': value for name, value in found.items()}
    constants['axes'] = np.int64([0, 2, 3])
    usual = dict(classes=CLASSES, palette=PALETTE, mean=MEAN, std=STD)
    save_model(path, nodes, constants, kinds, shape, **(usual | info))
    return path


def noise(height, width):
    return np.random.default_rng(0).integers(100, 210, (height, width, 3), np.uint8)


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
def test_objects(run_program, tmp_path, order, size, shape, factor):
    image = noise(*size)
    Image.fromarray(image).save(tmp_path / 'photo.png')
    model = detector(tmp_path / 'model.onnx', shape, channels=order)
    printed = run_program(DETECT, model, tmp_path / 'photo.png', tmp_path / 'out.png')
    found = objects_in(printed)
    seen = cv2.resize(image, None, fx=1 / factor, fy=1 / factor)
    height, width = shape or seen.shape[:2]
    padding = 0, height - seen.shape[0], 0, width - seen.shape[1]
    grey = 124, 116, 104  # that is almost 0 when normalised as usual
    seen = cv2.copyMakeBorder(seen, *padding, cv2.BORDER_CONSTANT, value=grey)
    seen = seen[..., :: -1 if order == 'bgr' else 1]
    scores = (((seen - np.array(MEAN)) / STD) ** 2).mean((0, 1))
    assert list(found) == CLASSES
    for i, (score, box) in enumerate(found.values()):
        assert score == pytest.approx(scores[i], abs=0.1)
        np.testing.assert_allclose(box, BOXES[i] * factor, atol=1)
    check_picture(image, np.asarray(Image.open(tmp_path / 'out.png')), factor)


def check_picture(image, picture, factor, kept=(0, 1, 2)):
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
        assert image[y0 : y0 + 20, x0 : x0 + 60].min(2).max() < 220
        assert picture[y0 : y0 + 20, x0 : x0 + 60].min(2).max() > 220  # its name
        part = np.s_[y0 + 25 : y1 - 4, x0 + 4 : x1 - 4]
        same = np.abs(picture[part] - expected[part]).max(2) <= 2
        assert same.mean() > 0.99


def test_low_scores_and_no_masks(run_program, tmp_path):
    image = noise(256, 320)  # neither resized nor padded
    image[..., 1] = 0.25**0.5 * STD[1] + MEAN[1]
    image[..., 2] = 0.35**0.5 * STD[2] + MEAN[2]
    Image.fromarray(image).save(tmp_path / 'photo.png')
    for with_masks in (True, False):
        model = detector(tmp_path / 'model.onnx', with_masks=with_masks, scale=[320, 256])
        printed = run_program(DETECT, model, tmp_path / 'photo.png', tmp_path / 'out.png')
        assert list(objects_in(printed)) == ['cat', 'cow']
        picture = np.asarray(Image.open(tmp_path / 'out.png'))
        if with_masks:
            check_picture(image, picture, 1, [0, 2])
        else:
            assert (picture[30:75, 20:140] == image[30:75, 20:140]).all()
            assert (picture[80, 10:150] == PALETTE[0]).all()


def test_boxes_if_proportions_change(run_program, tmp_path):
    Image.fromarray(noise(512, 320)).save(tmp_path / 'photo.png')
    model = detector(tmp_path / 'model.onnx', scale=[320, 256], keep_ratio=False)
    printed = run_program(DETECT, model, tmp_path / 'photo.png', tmp_path / 'out.png')
    expected = BOXES[0] * [1, 2, 1, 2]
    np.testing.assert_allclose(objects_in(printed)['cat'][1], expected, atol=1)


def test_a_small_image_is_enlarged_for_the_detector(run_program, tmp_path):
    Image.fromarray(noise(100, 120)).save(tmp_path / 'photo.png')
    model = detector(tmp_path / 'model.onnx', scale=None)
    printed = run_program(DETECT, model, tmp_path / 'photo.png', tmp_path / 'out.png')
    expected = BOXES[0] * 100 / 129
    np.testing.assert_allclose(objects_in(printed)['cat'][1], expected, atol=1)


@pytest.mark.slow  # an export of a minute
def test_objects_are_those_of_infer(run_here, photo, arch, tmp_path):
    """At a size that is neither resized nor padded, and so no rounding adds up."""
    config, checkpoint, path = (tmp_path / f'model.{end}' for end in ('py', 'pth', 'onnx'))
    config.write_text(f"""
_base_ = {str(DETECTION)!r}
model = dict(
    backbone=dict(arch=dict(_delete_=True, **{arch})),
    neck=dict(in_channels={list(OverLoCK.channels_of(arch))}),
    test_cfg=dict(rpn=dict(nms_pre=50, max_per_img=20)))
test_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=(320, 256), keep_ratio=True),
    dict(type='PackDetInputs')]
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
""")
    cfg = load_config(config)
    torch.manual_seed(0)
    model = build_model(cfg)
    model.init_weights()
    for head in model.roi_head.bbox_head:
        torch.nn.init.normal_(head.fc_cls.weight, std=0.3)  # so that scores are high
    meta = dict(dataset_meta=dict(cfg.metainfo))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), checkpoint)
    export(config, checkpoint, str(path), dynamic='hw', verify=False)

    Image.fromarray(photo(256, 320)).save(tmp_path / 'photo.png')
    predictor = Predictor(config, checkpoint, 'cpu')
    found = predictor(tmp_path / 'photo.png').pred_instances
    found = found[found.scores >= 0.3]
    printed = run_here(DETECT, path, tmp_path / 'photo.png', tmp_path / 'out.png')
    lines = printed.splitlines()
    assert len(lines) == len(found) > 3
    for line, label, score, box in zip(
        lines, found.labels, found.scores, found.bboxes.tolist(), strict=True
    ):
        [(name, (printed_score, printed_box))] = objects_in(line).items()
        assert name == predictor.classes[label]
        assert printed_score == pytest.approx(score.item(), abs=0.01)
        np.testing.assert_allclose(printed_box, box, atol=1)
    picture = np.asarray(Image.open(tmp_path / 'out.png')).astype(int)
    masked = found.masks.numpy().any(0)
    colored = (picture != photo(256, 320)).any(2)
    assert colored[masked].mean() > 0.95 and masked.mean() > 0.01


def test_a_turned_photo_has_its_objects_where_they_are(run_program, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(noise(*NATIVE)).transpose(Image.ROTATE_90)
    image.convert('L').save(tmp_path / 'photo.jpg', exif=exif)
    model = detector(tmp_path / 'model.onnx')
    printed = run_program(DETECT, model, tmp_path / 'photo.jpg', tmp_path / 'out.png')
    assert Image.open(tmp_path / 'out.png').size == NATIVE[::-1]
    assert objects_in(printed)['cat'][1] == BOXES[0].tolist()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope='module')
def address(tmp_path_factory):
    """Where the page is served, after ``npm install``."""
    folder = tmp_path_factory.mktemp('site') / 'browser'
    ignored = shutil.ignore_patterns('node_modules')
    shutil.copytree(ROOT / 'examples/browser', folder, ignore=ignored)
    npm = ['npm', 'install', '--no-audit', '--no-fund']
    subprocess.run(npm, cwd=folder, check=True, capture_output=True)
    handler = functools.partial(Quiet, directory=folder)
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}/'
        server.shutdown()


@pytest.fixture(scope='module')
def browser():
    from playwright.sync_api import sync_playwright

    path = shutil.which('chromium')
    assert path, 'chromium is not installed; run: apt-get install chromium'
    with sync_playwright() as playwright:
        options = ['--no-sandbox']  # which Chromium wants where tests run as root
        browser = playwright.chromium.launch(executable_path=path, args=options)
        yield browser
        browser.close()


@pytest.fixture(params=[(1100, 800), (390, 844)], ids=['desktop', 'phone'])
def page(request, address, browser):
    """The open page; it must ask no other server, and have no error in its console."""
    foreign, errors = [], []
    width, height = request.param
    page = browser.new_page(viewport=dict(width=width, height=height))
    page.set_default_timeout(60_000)
    page.on('console', lambda m: m.type == 'error' and errors.append(m.text))
    page.on('pageerror', lambda error: errors.append(str(error)))
    page.on(
        'request',
        lambda r: r.url.startswith((address, 'data:', 'blob:')) or foreign.append(r.url),
    )
    page.goto(address)
    page.get_by_text('Choose a model and an image.').wait_for()
    yield page
    assert page.evaluate('document.documentElement.scrollWidth <= window.innerWidth')
    page.close()
    assert not foreign and not errors


def canvas(page):
    """The pixels that the page shows."""
    url = page.evaluate("document.querySelector('canvas').toDataURL()")
    content = io.BytesIO(base64.b64decode(url.partition(',')[2]))
    return np.asarray(Image.open(content).convert('RGB'))


def predict(page, model, image):
    page.set_input_files('#model', model)
    page.set_input_files('#image', image)
    page.get_by_text(re.compile('^Predicted in')).wait_for()


@pytest.mark.browser
@pytest.mark.parametrize('kind', ['as it is', 'resized', 'bgr', 'one size', 'turned'])
def test_the_page(page, run_here, model, fixed_model, photo, tmp_path, kind):
    """It shows and lists what onnx_segmentation.py writes and prints."""
    path, options = tmp_path / 'photo.png', {}
    sizes = {'resized': (450, 300), 'one size': (250, 500)}
    image = Image.fromarray(photo(*sizes.get(kind, NATIVE)))
    if kind == 'turned':
        path, options = tmp_path / 'photo.jpg', dict(exif=Image.Exif(), quality=95)
        options['exif'][0x0112] = 6
    image.save(path, **options)
    if kind == 'bgr':
        model = edited(model, tmp_path / 'bgr.onnx', channels='bgr')
    if kind == 'one size':
        model = fixed_model
    predict(page, model, path)
    assert page.workers  # the model does not block the page
    printed = run_here(SEGMENT, model, path, tmp_path / 'out.png')
    labels = Image.open(tmp_path / 'out.png')
    colors = np.asarray(labels.convert('RGB')).astype(int)
    pixels = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    mixed = canvas(page)
    assert mixed.shape == colors.shape
    assert (np.abs(mixed - (pixels + colors) / 2).max(2) <= 3).mean() >= 0.99
    page.locator('#opacity').fill('1')
    assert agreement(canvas(page)[..., 0], colors[..., 0]) >= 0.99
    assert (canvas(page) == colors).all(2).mean() >= 0.99
    page.locator('#opacity').fill('0')
    np.testing.assert_allclose(canvas(page), pixels, atol=1)

    listed = page.locator('li').all_inner_texts()
    expected = [line.split() for line in printed.splitlines()]
    listed = {text.split('\n')[0]: float(text.split('\n')[1].split()[0]) for text in listed}
    expected = {name: float(share.rstrip('%')) for share, name in expected}
    for name in listed | expected:
        assert listed.get(name, 0) == pytest.approx(expected.get(name, 0), abs=0.5), name
    assert list(listed.values()) == sorted(listed.values(), reverse=True)
    (first, *_) = listed
    color = page.locator('li i').first.evaluate('e => e.style.background')
    index = json.loads(onnx_metadata(model)['classes']).index(first)
    palette = json.loads(onnx_metadata(model)['palette'])
    assert color == f'rgb({", ".join(map(str, palette[index]))})'


@pytest.mark.browser
@pytest.mark.parametrize(
    'size, resizing',
    [
        ((608, 704), {}),
        ((128, 96), {}),
        ((288, 240), dict(keep_ratio=False, scale=[180, 324])),
        ((512, 256), dict(size_divisor=32, scale=[200, 500])),
    ],
)
def test_the_resize_of_the_page(page, run_here, tmp_path, size, resizing):
    """Of sizes where no new pixel is in the middle between two old ones."""
    model, path = red_model(tmp_path / 'red.onnx'), tmp_path / 'photo.png'
    model = edited(model, tmp_path / 'model.onnx', **resizing)
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(image).save(path)
    predict(page, model, path)
    page.locator('#opacity').fill('1')
    run_here(SEGMENT, model, path, tmp_path / 'out.png')
    expected = np.array(Image.open(tmp_path / 'out.png')).astype(int)
    assert np.abs(canvas(page)[..., 0] - expected).max() <= 1


def onnx_metadata(path):
    return {p.key: p.value for p in onnx.load(path).metadata_props}


@pytest.mark.browser
def test_the_page_says_what_is_wrong(page, model, photo, tmp_path):
    (tmp_path / 'notes.txt').write_text('Dear diary')
    Image.fromarray(photo(*NATIVE)).save(tmp_path / 'photo.png')
    cut = tmp_path / 'cut.onnx'
    cut.write_bytes(model.read_bytes()[:5000])
    logits = edited(model, tmp_path / 'logits.onnx', outputs=['logits'])
    page.set_input_files('#image', tmp_path / 'photo.png')
    for path, message in (
        (tmp_path / 'notes.txt', 'This is not an ONNX file'),
        (cut, 'This is not all of the ONNX file'),
        (logits, 'logits.onnx is no segmentor'),
    ):
        page.set_input_files('#model', path)
        page.get_by_text(message).wait_for()
    page.set_input_files('#model', model)
    page.get_by_text(re.compile('^Predicted in')).wait_for()
    page.set_input_files('#image', tmp_path / 'notes.txt')
    page.get_by_text('notes.txt is not an image').wait_for()
    assert page.locator('main').is_hidden()
    predict(page, model, tmp_path / 'photo.png')  # the same file again
