"""overlock export --int8: what is in 8 bits, what the ranges come from, and errors."""

import json
import os
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from overlock_mm import Predictor
from overlock_mm.apis.export import _written, export, formats, quantization
from overlock_mm.apis.export.onnx import write_onnx
from overlock_mm.apis.export.program import capture
from overlock_mm.apis.export.quantization import CalibrationImages, changed, evenly
from overlock_mm.cli import main
from overlock_mm.errors import UserError

SIZE = (64, 96)
HW = {2: ('height', 129, 512), 3: ('width', 129, 512)}
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]  # of the config


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Smooth pictures of three sizes, and a file that is none."""
    folder = tmp_path_factory.mktemp('images')
    (folder / 'more').mkdir()
    rng = np.random.default_rng(0)
    for name, size in {'a.png': (80, 80), 'b.jpg': (50, 120), 'more/c.png': SIZE}.items():
        picture = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
        picture.resize(size[::-1], Image.Resampling.BICUBIC).save(folder / name)
    (folder / 'notes.txt').write_text('no image')
    return folder


@pytest.fixture(scope='module')
def int8(models, folder, tmp_path_factory):
    """A file that gives logits, and what was said of it."""
    out = tmp_path_factory.mktemp('int8') / 'model.onnx'
    return out, export(*models['segmentor'], out, shape=SIZE, logits=True, int8=folder)


def test_dense_convolutions_alone_are_in_8_bits(int8):
    model = onnx.load(int8[0])
    onnx.checker.check_model(model, full_check=True)
    types = {i.name: i.data_type for i in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    readers = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    kinds = {'dense': [], 'depthwise': [], 'QuantizeLinear': [], 'DequantizeLinear': []}
    for node in model.graph.node:
        kind = node.op_type
        if kind == 'Conv':
            groups = next((a.i for a in node.attribute if a.name == 'group'), 1)
            kind = 'dense' if groups == 1 else 'depthwise'
        kinds.setdefault(kind, []).append(node.name)
    assert len(kinds['dense']) > 30 and len(kinds['depthwise']) > 10
    assert {'MatMul', 'Softmax', 'LayerNormalization', 'ReduceL2'} < set(kinds)
    for name in kinds['dense']:
        [node] = [n for n in model.graph.node if n.name == name]
        weight = makers[node.input[1]]
        assert makers[node.input[0]].op_type == weight.op_type == 'DequantizeLinear'
        assert types[weight.input[0]] == onnx.TensorProto.INT8
    for node in model.graph.node:
        if node.op_type == 'DequantizeLinear':  # is there for a dense convolution
            near = [reader.name for reader in readers[node.output[0]]]
            quantize = makers.get(node.input[0])
            if quantize is not None and quantize.input[0] in makers:
                near.append(makers[quantize.input[0]].name)
            assert set(near) & set(kinds['dense']), near


@pytest.fixture(scope='module')
def example(models):
    """An image, and the logits of the model in float32."""
    predictor = Predictor(*models['segmentor'], 'cpu', fold=False)
    image = torch.from_numpy(np.random.default_rng(1).uniform(-2, 2, (1, 3, 8, 12)))
    image = torch.nn.functional.interpolate(image.float(), SIZE, mode='bilinear')
    with torch.no_grad():
        logits = predictor.model.encode_decode(image, [dict(img_shape=SIZE)])
    return image.numpy(), logits.numpy()


def check_near(logits, wanted):
    assert logits.shape == wanted.shape
    error = np.linalg.norm(logits - wanted) / np.linalg.norm(wanted)
    assert 1e-4 < error < 0.1, error


def test_results_are_near_those_of_float32(int8, example):
    image, wanted = example
    session = onnxruntime.InferenceSession(int8[0])
    check_near(session.run(None, {'image': image})[0], wanted)


def test_what_is_said_and_kept_in_the_file(int8):
    out, said = int8
    assert 'checked against PyTorch at 64x96' in said  # in float32
    assert 'calibrated with 3 of 3 images' in said
    assert 'compared with PyTorch: ' in said and 'on 3 of the images' in said
    kept = {p.key: p.value for p in onnx.load(out).metadata_props}
    assert json.loads(kept['int8_images']) == 3 and json.loads(kept['outputs']) == [
        'logits'
    ]
    assert not any(key.startswith('onnx') for key in kept)
    assert os.listdir(out.parent) == [out.name]


@pytest.mark.parametrize('order', ['rgb', 'bgr'])
@pytest.mark.parametrize('with_preprocess', [False, True])
def test_images_are_those_that_the_file_takes(order, with_preprocess, models, tmp_path):
    options = {'model.data_preprocessor.bgr_to_rgb': order == 'rgb'}
    predictor = Predictor(*models['segmentor'], 'cpu', cfg_options=options)
    Image.new('RGB', (50, 40), (10, 100, 200)).save(tmp_path / 'a.png')
    image = CalibrationImages(predictor, tmp_path, SIZE, {}, 129, with_preprocess)[0]
    assert image.shape == (1, 3, *SIZE) and image.dtype == torch.float32
    wanted = np.array([10, 100, 200.0])
    if not with_preprocess:
        wanted = (wanted if order == 'rgb' else wanted[::-1]) - MEAN
        wanted /= STD
    assert image.amin((0, 2, 3)).numpy() == pytest.approx(wanted, abs=1e-5)
    assert image.amax((0, 2, 3)).numpy() == pytest.approx(wanted, abs=1e-5)


def test_sizes_and_number_of_images(models, folder, tmp_path, monkeypatch):
    predictor = Predictor(*models['segmentor'], 'cpu')
    fixed = CalibrationImages(predictor, folder, SIZE, {}, 129, False)
    assert [tuple(i.shape[2:]) for i in fixed] == [SIZE] * 3
    free = CalibrationImages(predictor, folder, SIZE, HW, 60, False)
    assert [tuple(i.shape[2:]) for i in free] == [(80, 80), (60, 144), SIZE]
    monkeypatch.setattr(quantization, 'LARGEST_COUNT', 2)
    few = CalibrationImages(predictor, folder, SIZE, HW, 32, False)
    assert [tuple(i.shape[2:]) for i in few] == [(80, 80), SIZE]
    assert few.summary().endswith('2 of 3 images')
    assert evenly(range(100), 5) == [0, 25, 50, 74, 99] and evenly('ab', 5) == ['a', 'b']


def test_ranges_come_from_the_images(tmp_path):
    graph = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 2, 1)).eval()
    path = tmp_path / 'model.onnx'
    write_onnx(capture(graph, torch.zeros(1, 3, 4, 4)), path, ['out'], 20)
    images = [torch.full((1, 3, 4, 4), value) for value in (-1.5, 0.25, 3.6)]
    nodes = quantization.quantize(path, images)
    model = onnx.load(path)
    assert nodes == len(model.graph.node)
    values = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    [quantize] = [n for n in model.graph.node if n.input[0] == 'image']
    assert values[quantize.input[1]] == pytest.approx((3.6 + 1.5) / 255)
    assert values[quantize.input[2]].dtype == np.uint8
    weights = [v.astype(int) for v in values.values() if v.dtype == np.int8 and v.ndim == 4]
    for weight in weights:  # 7 bits, a scale for each channel
        assert abs(weight).max((1, 2, 3)).tolist() == [64] * len(weight)
    assert len(weights) == 2


def test_openvino_without_a_check(models, folder, example, tmp_path):
    out = tmp_path / 'model.xml'
    options = dict(format='openvino', logits=True, shape=SIZE, verify=False)
    said = export(*models['segmentor'], out, int8=folder, **options)
    assert 'calibrated with 3 of 3 images' in said
    assert 'not checked against PyTorch' in said and 'compared' not in said
    assert sorted(os.listdir(tmp_path)) == ['model.bin', 'model.xml']
    assert 'FakeQuantize' in out.read_text()
    image, wanted = example
    check_near(formats.load_openvino(out)(image)[0], wanted)


@pytest.mark.slow
def test_any_size(models, folder, tmp_path):
    out = tmp_path / 'model.onnx'
    export(*models['segmentor'], out, dynamic='all', logits=True, int8=folder)
    image = np.zeros((2, 3, 131, 200), np.float32)
    assert formats.load_onnx(out)(image)[0].shape == (2, 10, 131, 200)


@pytest.mark.slow
def test_the_backbone_of_a_detector(models, folder, tmp_path):
    out = tmp_path / 'model.onnx'
    said = export(*models['detector'], out, backbone_only=True, shape=SIZE, int8=folder)
    assert 'calibrated with 3 of 3 images' in said


def test_unreadable_images_are_left_out(models, folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / 'images')
    broken = tmp_path / 'images/b.png'
    broken.write_bytes(b'no image')
    predictor = Predictor(*models['segmentor'], 'cpu')
    images = CalibrationImages(predictor, tmp_path / 'images', SIZE, {}, 129, False)
    assert images.summary().endswith('3 of 4 images')
    assert f'left out: {broken} cannot be read' in capsys.readouterr().out


@pytest.mark.parametrize(
    'content, message',
    [
        (None, 'is not a folder'),
        ('', 'has no images'),
        ('a.txt', 'has no images'),
        ('a.png', 'none of its images can be read'),
    ],
)
def test_folders_without_images(content, message, models, tmp_path):
    images = tmp_path / 'images'
    if content is not None:
        images.mkdir()
    if content:
        (images / content).write_text('no image')
    with pytest.raises(UserError, match=f'--int8 {images}.* {message}|{images}: {message}'):
        export(*models['segmentor'], tmp_path / 'model.onnx', shape=SIZE, int8=images)
    assert not (tmp_path / 'model.onnx').exists()


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(half=True), '--int8 and --half exclude each other'),
        (dict(format='pt2'), '--int8 is for --format onnx and openvino, not for pt2'),
        (dict(format='torchscript'), 'not for torchscript'),
    ],
)
def test_options_that_do_not_go_together(options, message, models, folder, tmp_path):
    with pytest.raises(UserError, match=message):
        export(*models['segmentor'], tmp_path / 'model', int8=folder, **options)


def test_whole_detectors_are_refused(models, folder, tmp_path):
    with pytest.raises(UserError, match='--int8 is for segmentors and backbones'):
        export(*models['detector'], tmp_path / 'model.onnx', int8=folder)


def test_what_differs_too_much_is_not_written(models, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(quantization, 'VALUES_CHANGED', 1e-4)
    out = tmp_path / 'model.onnx'
    with pytest.raises(UserError, match=r'% of the norm is an error.*--no-verify') as error:
        export(*models['segmentor'], out, backbone_only=True, shape=SIZE, int8=folder)
    assert 'nothing was written' in str(error.value) and not os.listdir(tmp_path)


def test_errors_of_the_check_in_float32_are_kept(tmp_path):
    def write(job, path):
        raise UserError('the exported file differs')

    chosen = formats.FORMATS['onnx']._replace(write=write)
    with pytest.raises(UserError, match='^the exported file differs$'):
        _written(chosen, None, tmp_path / 'model.onnx', 'config.py')


def test_what_counts_as_changed():
    labels = torch.zeros(1, 2, 4, dtype=torch.uint8)
    other = labels.numpy().copy()
    other[0, 0, 0] = 3
    assert changed([labels], [labels.numpy()]) == 0
    assert changed([labels], [other]) == 1 / 8
    values = torch.tensor([3.0, 4.0])
    near, far = np.float32([3, 4.5]), np.float32([3, 5])
    assert changed([values, values], [near, far]) == pytest.approx(0.2)
    for wrong in (np.float32([3, np.nan]), np.float32([3]), np.float64([3, 4])):
        assert changed([values], [wrong]) == np.inf
    assert changed([values], []) == changed([labels], [other.astype(int)]) == np.inf


def test_label_maps_may_differ_in_some_pixels(folder):
    class Graph(torch.nn.Module):
        outputs = ('labels',)

        def forward(self, image):
            return torch.zeros(1, 10, 10, dtype=torch.uint8)

    def run(image):
        labels = np.zeros((1, 10, 10), np.uint8)
        labels[0].flat[: int(image)] = 1
        return [labels]

    images = [torch.tensor(n) for n in (2, 8)]  # 5 percent, the largest mean allowed
    said = quantization.verify_int8(Graph(), images, run)
    assert '5.00% of the pixels have another label, on 2 of the images' in said
    with pytest.raises(UserError, match='9.00% of the pixels .* and 5% is allowed'):
        quantization.verify_int8(Graph(), [torch.tensor(9)], run)
    with pytest.raises(UserError, match='does not run .*ZeroDivisionError'):
        quantization.verify_int8(Graph(), images, lambda image: 1 / 0)


def test_the_command(models, tmp_path, monkeypatch, capsys):
    arguments = *models['segmentor'], tmp_path / 'a.onnx', '--int8', tmp_path
    monkeypatch.setattr('sys.argv', ['overlock', 'export', *map(str, arguments)])
    with pytest.raises(SystemExit):
        main()
    assert f'--int8 {tmp_path} has no images' in capsys.readouterr().err
