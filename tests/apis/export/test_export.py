"""overlock export: files that give what the model gives, and errors that say why not."""

import json
import os

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from helpers import TINY, run, tool
from mmcv.transforms import Resize
from mmengine.config import Config

from overlock_mm import OverLoCK, Predictor, fold
from overlock_mm.apis import benchmark
from overlock_mm.apis.benchmark import report, runtimes
from overlock_mm.apis.export import export, formats, graphs, metadata, verification
from overlock_mm.config.load import load_config
from overlock_mm.errors import UserError

SIZE = (64, 96)
# The small kernels of the tiny model need maps of five.
MEAN, STD = (
    np.float32(values)[:, None, None]
    for values in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
)
SIZES = [(129, 130), (161, 301), (300, 150), (131, 650)]


def example(size, batch=1):
    rng = np.random.default_rng(size[0])
    return rng.standard_normal((batch, 3, *size)).astype(np.float32)


@pytest.fixture(scope='module')
def expected(models):
    """The logits of a segmentor, or the maps of its backbone."""
    predictor = Predictor(*models['segmentor'], 'cpu', fold=False)

    @torch.no_grad()
    def of(images, maps=False):
        images = torch.from_numpy(images)
        if maps:
            return [m.numpy() for m in predictor.model.backbone(images)]
        meta = dict(img_shape=images.shape[2:])
        return predictor.model.encode_decode(images, [meta]).numpy()

    return of


def check_near(result, wanted, tolerance=1e-4):
    assert result.shape == wanted.shape
    assert np.abs(result - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.fixture(scope='module')
def dynamic(models, tmp_path_factory):
    """A file for images of any size and number."""
    out = tmp_path_factory.mktemp('onnx') / 'any.onnx'
    said = export(
        *models['segmentor'], out, dynamic='all', logits=True, with_preprocess=True
    )
    assert 'input   image (N, 3, H, W), float32, sides of 129 and more' in said
    return out


def test_any_size_and_number_of_images(dynamic, expected):
    session = onnxruntime.InferenceSession(dynamic)
    for i, size in enumerate(SIZES):
        images = example(size, 1 + i)
        check_near(session.run(None, {'image': images * STD + MEAN})[0], expected(images))


def test_standard_operators_alone(dynamic):
    model = onnx.load(dynamic)
    assert [(o.domain, o.version) for o in model.opset_import] == [('', 20)]
    assert {node.domain for node in model.graph.node} == {''} and not model.functions
    onnx.checker.check_model(model, full_check=True)


def test_operators_that_tensorrt_documents(dynamic):
    """The list of its parser for TensorRT 10.1, opsets 9 to 20; those that are not in it
    would be custom layers."""
    listed = """Abs Add And ArgMax Cast Clip Concat Constant Conv Div Equal Expand Floor
        Gather Gelu Greater GreaterOrEqual LayerNormalization Less MatMul Mod Mul Pad
        Range ReduceL2 ReduceMean Relu Reshape Resize Shape Sigmoid Sign Slice Softmax
        Split Squeeze Sub Transpose Unsqueeze Where"""
    used = {node.op_type for node in onnx.load(dynamic).graph.node}
    assert used <= set(listed.split())


def test_tables_are_shared_by_the_blocks(dynamic):
    """They depend on the size alone, and would be most of the nodes."""
    nodes = [node.op_type for node in onnx.load(dynamic).graph.node]
    assert nodes.count('Softmax') == 8  # of four blocks with two kernels
    assert nodes.count('Range') <= 12


def test_no_reshape_of_a_reshape(dynamic):
    nodes = onnx.load(dynamic).graph.node
    made_by = {output: node.op_type for node in nodes for output in node.output}
    reshapes = [node for node in nodes if node.op_type == 'Reshape']
    assert len(reshapes) > 50
    assert not [n.input[0] for n in reshapes if made_by.get(n.input[0]) == 'Reshape']


def onnx_metadata(path):
    return onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map


def openvino_metadata(path):
    info = openvino.Core().read_model(path).get_rt_info()['overlock_mm']
    return {key: value.astype(str) for key, value in info.items()}


def pt2_metadata(path):
    extra = {'metadata.json': ''}
    torch.export.load(path, extra_files=extra)
    return json.loads(extra['metadata.json'])


def torchscript_metadata(path):
    extra = {'metadata.json': ''}
    torch.jit.load(path, _extra_files=extra)
    return json.loads(extra['metadata.json'])


METADATA = dict(
    onnx=onnx_metadata,
    openvino=openvino_metadata,
    pt2=pt2_metadata,
    torchscript=torchscript_metadata,
)


@pytest.mark.parametrize('format', formats.FORMATS)
def test_every_format(format, models, expected, tmp_path):
    chosen = formats.FORMATS[format]
    out = tmp_path / f'model{chosen.suffix}'
    said = export(*models['segmentor'], out, format=format, shape=SIZE, logits=True)
    assert str(out) in said and 'checked against PyTorch at 64x96' in said
    check_near(chosen.load(out)(example(SIZE))[0], expected(example(SIZE)))
    found = {key: json.loads(value) for key, value in METADATA[format](out).items()}
    cfg = Config.fromfile(models['segmentor'][0])
    assert found['classes'] == list(cfg.metainfo.classes)
    assert np.allclose(found['mean'], MEAN.flatten())
    assert np.allclose(found['std'], STD.flatten())
    assert found['shape'] == list(SIZE) and found['channels'] == 'rgb'
    assert found['outputs'] == ['logits'] and found['task'] == 'segmentation'
    extra = ['model.bin'] if format == 'openvino' else []
    assert sorted(os.listdir(tmp_path)) == sorted([out.name, *extra])


@pytest.mark.slow
@pytest.mark.parametrize('format', ['pt2', 'openvino'])
def test_other_formats_take_any_size(format, models, expected, tmp_path):
    chosen = formats.FORMATS[format]
    out = tmp_path / f'model{chosen.suffix}'
    export(
        *models['segmentor'], out, format=format, dynamic='hw', logits=True, verify=False
    )
    for size in SIZES[1:3]:
        check_near(chosen.load(out)(example(size))[0], expected(example(size)))


def test_label_maps(models, expected, tmp_path):
    out = tmp_path / 'labels.onnx'
    export(*models['segmentor'], out, shape=SIZE, dynamic='batch')
    images = example(SIZE, 3)
    (labels,) = onnxruntime.InferenceSession(out).run(None, {'image': images})
    assert labels.dtype == np.uint8 and labels.shape == (3, *SIZE)
    assert (labels == expected(images).argmax(1)).mean() > 0.999
    assert len(np.unique(labels)) > 1


@pytest.mark.parametrize('opset', [18, pytest.param(23, marks=pytest.mark.slow)])
def test_maps_of_the_backbone_in_other_opsets(opset, models, expected, tmp_path):
    out = tmp_path / 'backbone.onnx'
    export(*models['segmentor'], out, backbone_only=True, shape=SIZE, opset=opset)
    assert [o.version for o in onnx.load(out).opset_import] == [opset]
    session = onnxruntime.InferenceSession(out)
    names = [o.name for o in session.get_outputs()]
    assert names == ['stride_4', 'stride_8', 'stride_16', 'stride_32']
    maps = session.run(names, {'image': example(SIZE)})
    for result, wanted in zip(maps, expected(example(SIZE), maps=True), strict=True):
        check_near(result, wanted)


@pytest.mark.parametrize('order', [pytest.param('rgb', marks=pytest.mark.slow), 'bgr'])
def test_with_preprocess(order, models, tmp_path):
    """The file takes what an image file holds; the result is that of the predictor."""
    config, checkpoint = models['segmentor']
    options = {'model.data_preprocessor.bgr_to_rgb': order == 'rgb'}
    photo = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    predictor = Predictor(config, checkpoint, 'cpu', cfg_options=options)
    wanted = predictor(photo).pred_sem_seg.data.numpy()
    out = tmp_path / 'model.onnx'
    export(config, checkpoint, out, shape=SIZE, with_preprocess=True, cfg_options=options)
    pixels = photo.transpose(2, 0, 1)[None].astype(np.float32)
    (labels,) = onnxruntime.InferenceSession(out).run(None, {'image': pixels})
    assert (labels == wanted).mean() > 0.999 and len(np.unique(wanted)) > 1


@pytest.mark.slow
@pytest.mark.parametrize('format', ['onnx', 'pt2'])
def test_half(format, models, expected, tmp_path):
    chosen = formats.FORMATS[format]
    sizes = []
    for half in (False, True):
        out = tmp_path / f'{half}{chosen.suffix}'
        export(*models['segmentor'], out, format=format, shape=SIZE, logits=True, half=half)
        sizes.append(out.stat().st_size)
    assert sizes[1] < 1.1 * sizes[0]  # the graph takes most of so small a file
    result = chosen.load(out)(example(SIZE))[0]
    assert result.dtype == np.float32
    check_near(result, expected(example(SIZE)), 3e-2)


def test_photos_as_the_predictor_sees_them(dynamic, models):
    """On real photos of two sizes."""
    from skimage import data

    predictor = Predictor(*models['segmentor'], 'cpu')
    session = onnxruntime.InferenceSession(dynamic)
    for photo in (data.astronaut()[:301, :401], data.coffee()[:400, :303]):
        pixels = photo.transpose(2, 0, 1)[None].astype(np.float32)
        (logits,) = session.run(None, {'image': pixels})
        wanted = predictor(photo).pred_sem_seg.data.numpy()
        assert (logits.argmax(1) == wanted).mean() > 0.999


BAD = {
    'format': (dict(format='tensorrt'), '--format tensorrt is not one of onnx, openvino'),
    'dynamic': (
        dict(dynamic='width'),
        '--dynamic width is not one of none, batch, hw, all',
    ),
    'opset': (dict(opset=17), r'--opset 17 must be within 18\.\.23'),
    'opset of torch': (dict(format='pt2', opset=20), '--opset is for ONNX operators'),
    'shape': (dict(shape=(64, 16)), '--shape 64 16 must be height and width, at least 32'),
    'both': (dict(shape=SIZE, dynamic='hw'), '--shape and --dynamic hw'),
    'trace': (dict(format='torchscript', dynamic='hw'), 'use --dynamic none, or --format'),
}


@pytest.mark.parametrize('case', BAD)
def test_options_that_cannot_be(case, models, tmp_path):
    options, message = BAD[case]
    suffix = dict(pt2='.pt2', torchscript='.pt').get(options.get('format'), '.onnx')
    with pytest.raises(UserError, match=message):
        export(*models['segmentor'], tmp_path / f'model{suffix}', **options)
    assert not os.listdir(tmp_path)


def test_paths_that_cannot_be_written(models, tmp_path):
    for out in ('no_folder/model.onnx', 'model.pth', 'model.xml'):
        with pytest.raises(UserError, match=r'must end in \.onnx and be in a folder'):
            export(*models['segmentor'], tmp_path / out)
    out = tmp_path / 'model.onnx'
    out.write_text('mine')
    with pytest.raises(UserError, match='exists; give another name, or --force'):
        export(*models['segmentor'], out)
    assert out.read_text() == 'mine'


def test_a_missing_package(models, tmp_path, monkeypatch):
    find = formats.importlib.util.find_spec
    monkeypatch.setattr(
        formats.importlib.util, 'find_spec', lambda n: None if n == 'onnx' else find(n)
    )
    with pytest.raises(
        UserError, match=r"needs onnx, .*pip install 'overlock_mm\[export\]'"
    ):
        export(*models['segmentor'], tmp_path / 'model.onnx')


def test_an_older_torch(models, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.export, 'export', lambda model, args, strict: None)
    with pytest.raises(UserError, match=r'is too old to export this; torch 2\.11 works'):
        export(*models['segmentor'], tmp_path / 'model.onnx', shape=SIZE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'steps, expected',
    [
        ([], dict(scale=None, keep_ratio=True, size_divisor=1)),
        ([dict(type='Resize', scale=(96, 64))], dict(scale=[96, 64], keep_ratio=False)),
        (
            [
                dict(type=Resize, scale=(64, 96), keep_ratio=True),
                dict(type='mmseg.ResizeToMultiple'),
            ],
            dict(scale=[64, 96], keep_ratio=True, size_divisor=32),
        ),
        ([dict(type='Resize', scale=64), dict(type='RGB2Gray')], dict(scale=[64, 64])),
        ([dict(type='Resize', scale_factor=0.5)], dict(scale=None)),
    ],
)
def test_how_programs_resize(steps, expected, models, capsys):
    config, checkpoint = models['segmentor']
    cfg = load_config(config)
    steps = [dict(type='LoadImageFromFile'), *steps, dict(type='PackSegInputs')]
    cfg.test_dataloader.dataset.pipeline = steps
    predictor = Predictor(cfg, checkpoint, 'cpu', fold=False)
    capsys.readouterr()
    found = metadata._resizing(predictor)
    assert {key: found[key] for key in expected} == expected
    unknown = 'RGB2Gray' in str(steps) or 'scale_factor' in str(steps)
    assert ('of the test pipeline: a program that' in capsys.readouterr().out) == unknown


def test_another_backbone(models, tmp_path):
    config = tmp_path / 'resnet.py'
    config.write_text(f"""
_base_ = {str(models['segmentor'][0])!r}
model = dict(
    backbone=dict(_delete_=True, type='ResNetV1c', depth=18),
    decode_head=dict(in_channels=[64, 128, 256, 512]), auxiliary_head=None)
""")
    from overlock_mm.config.load import build_model, load_config

    checkpoint = tmp_path / 'resnet.pth'
    torch.save(build_model(load_config(config)).state_dict(), checkpoint)
    with pytest.raises(UserError, match='is a ResNetV1c, and only models with OverLoCK'):
        export(config, checkpoint, tmp_path / 'model.onnx')


def test_a_wrong_file_is_not_left(models, tmp_path, monkeypatch):
    def wrong(job, path):
        with torch.no_grad():
            next(iter(job.graph.parameters())).add_(1)
        return formats._write_onnx(job, path)

    chosen = formats.FORMATS['onnx']._replace(write=wrong)
    monkeypatch.setitem(formats.FORMATS, 'onnx', chosen)
    arguments = *models['segmentor'], tmp_path / 'model.onnx'
    with pytest.raises(UserError, match='differs from PyTorch by .*nothing was written'):
        export(*arguments, shape=SIZE, logits=True)
    assert not os.listdir(tmp_path)
    assert 'not checked' in export(*arguments, shape=SIZE, verify=False)


def test_what_does_not_run_is_not_left(models, tmp_path, monkeypatch):
    chosen = formats.FORMATS['onnx']
    monkeypatch.setitem(
        formats.FORMATS, 'onnx', chosen._replace(load=lambda path: lambda images: 1 / 0)
    )
    with pytest.raises(UserError, match='does not run on an image of 1x3x64x96.*ZeroDiv'):
        export(*models['segmentor'], tmp_path / 'model.onnx', shape=SIZE)
    monkeypatch.setitem(formats.FORMATS, 'onnx', chosen._replace(write=lambda *a: 1 / 0))
    with pytest.raises(UserError, match='cannot be exported as .onnx.*--backbone-only'):
        export(*models['segmentor'], tmp_path / 'model.onnx', shape=SIZE)
    assert not os.listdir(tmp_path)


def test_labels_may_differ_only_where_two_are_as_good():
    class Model(torch.nn.Module):
        decode_head = torch.nn.Module()

    compare = verification.compare_labels(graphs.Segmentor(Model()))
    logits = torch.zeros(1, 3, 2, 2)
    logits[0, 1, 0, 0], logits[0, 2, 0, 0] = 10, 9.9
    best = logits.argmax(1).to(torch.uint8).numpy()
    assert compare([logits], [best]) == 0
    other = best.copy()
    other[0, 0, 0] = 2
    assert compare([logits], [other]) == pytest.approx(0.01, rel=1e-4)
    other[0, 0, 0] = 0
    assert compare([logits], [other]) == pytest.approx(1)
    assert compare([logits], [best[:, :1]]) == compare([logits], [best + 3]) == np.inf


def test_values_that_are_not_finite_or_of_other_shapes():
    values = torch.ones(2, 3)
    assert verification.compare_values([values], [np.full((2, 3), 1.5)]) == 0.5
    for wrong in (np.full((2, 3), np.nan), np.ones((3, 2))):
        assert verification.compare_values([values], [wrong]) == np.inf
    assert verification.compare_values([values, values], [np.ones((2, 3))]) == np.inf


def test_the_smallest_side():
    predictor_sides = {'b': 193, 't': 193}

    for arch, side in predictor_sides.items():
        with torch.device('meta'):
            backbone = OverLoCK(arch)
        assert graphs.smallest_side(backbone) == side
    backbone = OverLoCK(TINY)
    assert graphs.smallest_side(backbone) == graphs.smallest_side(fold(backbone)) == 129
    assert graphs.smallest_side(OverLoCK(TINY, out_indices=(0, 1))) == 32


def test_the_command(models, tmp_path):
    out = tmp_path / 'model.onnx'
    command = [*tool('export.py'), *models['segmentor'], out]
    said = run([*command, '--shape', *map(str, SIZE)], tmp_path).stdout
    assert 'outputs labels' in said and out.exists()
    said = run(command, tmp_path, status=2).stderr
    assert 'exists; give another name, or --force' in said and 'Traceback' not in said


@pytest.mark.parametrize('runtime', ['onnxruntime', 'openvino'])
def test_benchmarks_of_a_runtime(runtime, monkeypatch, capsys):
    monkeypatch.setattr(runtimes, 'our_model', lambda options: fold(OverLoCK(TINY)))
    few = dict(rounds=2, warmup=0, threads=1, device='cpu')
    options = benchmark.RuntimeOptions(**few, runtime=runtime, size=SIZE)
    result = benchmark.run_benchmark(options)
    names = [side['name'] for side in result['sides']]
    assert names[0] == f'ours: {runtime}, 64x96' and names[1].startswith('theirs: PyTorch')
    assert len(result['ratios']) == 2 and result['memory_ratio'] is None
    assert ' nodes, ready in' in capsys.readouterr().out
    assert 'times' in report.table(result)


def test_benchmarks_of_a_compiled_segmentor(models, monkeypatch):
    compiled = []

    def compile(model, dynamic):
        compiled.append(dynamic)
        return model

    monkeypatch.setattr(torch, 'compile', compile)
    few = dict(rounds=2, warmup=0, threads=1, device='cpu', against_layout='contiguous')
    kinds = dict(runtime='compile', size=SIZE, config=models['segmentor'][0])
    options = benchmark.RuntimeOptions(**few, **kinds, dynamic=True)
    ours, theirs = benchmark.run_benchmark(options)['sides']
    assert compiled == [True] and ours['name'] == 'ours: compile, for any size, 64x96'
    assert ours['ready_seconds'] > 0 and theirs['name'] == 'theirs: PyTorch, contiguous'


@pytest.mark.slow
@pytest.mark.parametrize('runtime', ['compile', 'aotinductor'])
def test_what_is_compiled_gives_the_same(runtime):
    model = graphs.Backbone(fold(OverLoCK(TINY).eval()))
    options = benchmark.RuntimeOptions(runtime=runtime, device='cpu')
    image = torch.rand(1, 3, *SIZE)
    with torch.no_grad():
        expected = model(image)
    step, _ = runtimes._compiled(options, model, image, False)
    for a, b in zip(step(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_benchmarks_of_files(dynamic):
    few = dict(rounds=2, warmup=0, threads=1, device='cpu')
    options = benchmark.FileOptions(
        **few, file=dynamic, against=str(dynamic), size=SIZES[0]
    )
    result = benchmark.run_benchmark(options)
    assert [len(side['seconds']) for side in result['sides']] == [2, 2]
    assert result['sides'][0]['name'].startswith('ours: any.onnx, ')
    with pytest.raises(UserError, match=r'no\.onnx must be an exported file'):
        benchmark.run_benchmark(benchmark.FileOptions(**few, file='no.onnx'))


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(dtype='bfloat16'), 'it is measured in float32; use --runtime openvino'),
        (dict(runtime='compile', dtype='bfloat16'), '--runtime compile with --dtype'),
        (dict(runtime='aotinductor', dynamic=True), 'compiles for one size'),
        (dict(compile=True), 'use --runtime compile'),
        (dict(config='a.py', against='resnet18'), 'leave --against out'),
        (dict(against='self:64'), '--against self:64 is for backbone and train-step'),
    ],
)
def test_benchmarks_that_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        benchmark.run_benchmark(benchmark.RuntimeOptions(device='cpu', **options))


def test_detectors_have_other_options(models, tmp_path):
    arguments = *models['detector'], tmp_path / 'model.onnx'
    for options, message in (
        (dict(logits=True), '--logits is for segmentors'),
        (dict(dynamic='all'), '--dynamic all: the file of a detector takes one image'),
        (dict(half=True), '--half is for segmentors and backbones'),
    ):
        with pytest.raises(UserError, match=message):
            export(*arguments, **options)


def test_a_detector(models, tmp_path):
    """The file is compared with PyTorch; here are its outputs."""
    out = tmp_path / 'model.onnx'
    said = export(*models['detector'], out, shape=SIZE, with_preprocess=True)
    assert 'outputs boxes, scores, labels, masks' in said
    pixels = np.random.default_rng(0).uniform(0, 255, (1, 3, *SIZE)).astype(np.float32)
    outputs = onnxruntime.InferenceSession(out).run(None, {'image': pixels})
    shapes = [output.shape for output in outputs]
    n = shapes[0][0]
    assert n > 0 and shapes == [(n, 4), (n,), (n,), (n, 28, 28)]


def test_objects_are_compared_with_the_most_similar_ones():
    boxes = torch.rand(100, 4) * 50
    objects = [boxes, torch.rand(100), torch.arange(100) % 3, torch.rand(100, 4, 4)]
    compare = verification.compare_objects

    def found(change=None):
        order = np.random.default_rng(0).permutation(100)
        arrays = [values.numpy()[order].copy() for values in objects]
        if change:
            change(arrays)
        return arrays

    assert compare(objects, found()) == 0
    changes = dict(
        moved=lambda arrays: arrays[0].__iadd__(1),
        scores=lambda arrays: arrays[1].__isub__(0.1),
        labels=lambda arrays: arrays[2].__setitem__(slice(None), 7),
        masks=lambda arrays: arrays[3].__isub__(0.5),
    )
    for change in changes.values():
        assert compare(objects, found(change)) > 0.01
    assert compare(objects, [array[:50] for array in found()]) > 0.01
    assert compare(objects, [np.concatenate((a, a)) for a in found()]) == np.inf
    assert compare(objects, found(lambda arrays: arrays[0][:1].__iadd__(1))) == 0
