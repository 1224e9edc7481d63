"""The benchmark in miniature; nothing here depends on how fast it is."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from statistics import median

import pytest
import torch
from helpers import ROOT, tool
from PIL import Image

from overlock_mm.ops import set_contmix_backend

SMALL = {
    'op': ['--shape', '1x16x14x15', '--heads', '2', '--kernel', '7'],
    'backbone': ['--arch', 'xt', '--size', '64', '--form', 'deploy'],
    'train-step': ['--arch', 'xt', '--size', '32'],
}


def run(cwd, command, *options):
    arguments = [*tool('benchmark.py'), command, *SMALL[command], *options]
    result = subprocess.run(arguments, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def measured(cwd, command, *options):
    """The lines and the JSON that a short benchmark writes, checked for what all have."""
    short = ['--rounds', '2', '--warmup', '1', '--threads', '1', '--json', 'out.json']
    lines = run(cwd, command, *options, *short).stdout.splitlines()
    text = (cwd / 'out.json').read_text()
    assert not any(s in text for s in (str(cwd), str(ROOT), os.uname().nodename + '"'))
    result = json.loads(text)
    check_arithmetic(result)
    check_table(lines[-5:], result)
    return lines, result


def check_arithmetic(result):
    ours, theirs = result['sides']
    for side in (ours, theirs):
        assert len(side['seconds']) == 2 and min(side['seconds']) > 0
        assert side['median_seconds'] == median(side['seconds'])
    scale = (ours['pixels'] or 1) / (theirs['pixels'] or 1)
    pairs = zip(ours['seconds'], theirs['seconds'], strict=True)
    assert result['ratios'] == pytest.approx([b / a * scale for a, b in pairs])
    assert result['median_ratio'] == median(result['ratios'])
    memory = ours['peak_extra_bytes'] / theirs['peak_extra_bytes'] / scale
    assert result['memory_ratio'] == pytest.approx(memory)


def check_table(lines, result):
    title, head, *rows, summary = lines
    assert title == result['what']
    columns = ['side', 'time (median)', 'spread', 'peak extra memory']
    assert re.split(' {2,}', head) == columns
    scales = {'ms': 1e3, 'MiB': 2**-20, 'ns/pixel': 1e9, 'B/pixel': 1}
    for row, side in zip(rows, result['sides'], strict=True):
        name, time, spread, memory = re.split(' {2,}', row)
        assert name == side['name']
        for text, value in (
            (time, side['median_seconds']),
            (spread.split(' to ')[1], max(side['seconds'])),
            (memory, side['peak_extra_bytes']),
        ):
            number, unit = text.split()
            expected = value * scales[unit] / (side['pixels'] or 1)
            assert float(number) == pytest.approx(expected, rel=6e-3)
    numbers = r'ours is (\S+) times (\w+) \((\S+) to (\S+) over 2 rounds\), with (\S+) of'
    ratio, word, low, high, memory = re.search(numbers, summary).groups()
    middle, *ratios = (
        r if word == 'faster' else 1 / r
        for r in (result['median_ratio'], *result['ratios'])
    )
    expected = [middle, min(ratios), max(ratios), result['memory_ratio']]
    assert [float(n) for n in (ratio, low, high, memory)] == pytest.approx(
        expected, rel=6e-3
    )
    assert word == ('faster' if result['median_ratio'] >= 1 else 'slower')


def test_op(tmp_path):
    shape, options = ['--shape', '1x64x40x40'], ['--kernel', '13', '--backend', 'torch']
    _, result = measured(tmp_path, 'op', *shape, *options, '--plot', 'out.png')
    assert [s['name'] for s in result['sides']] == ['ours: torch', 'theirs: reference']
    # The reference copies the windows of the channels, half of which have the large
    # kernel. That is seen, and nothing of the size of a library or of a step before.
    windows = 32 * 40 * 40 * 13 * 13 * 4
    assert windows < result['sides'][1]['peak_extra_bytes'] < 2.5 * windows

    assert result['command'].startswith('python tools/benchmark.py op --shape 1x16x14x15')
    assert 'out.' not in result['command']
    assert re.fullmatch(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ', result['date'])
    assert result['versions']['torch'] == torch.__version__
    assert set(result['versions']) == {'torch', 'cuda', 'triton', 'timm', 'overlock_mm'}
    assert result['hardware']['cpu'] and result['hardware']['threads'] == 1
    assert result['options']['shape'] == [1, 64, 40, 40]
    with Image.open(tmp_path / 'out.png') as image:
        image.load()
        assert image.size > (500, 300)


def test_backbone_per_pixel(tmp_path):
    lines, result = measured(
        tmp_path, 'backbone', '--against', 'self:64x96', '--batch', '2'
    )
    layout = result['options']['layout']
    assert lines[0] == f'ours: {layout} is the faster layout'
    assert [side['pixels'] for side in result['sides']] == [2 * 64 * 64, 2 * 64 * 96]
    names = [side['name'] for side in result['sides']]
    assert names[0] == f'ours: deploy, auto, 64x64, {layout}'
    assert names[1] == f'theirs: self:64x96, 64x96, {layout}'
    assert lines[-1].startswith('per pixel, ours') and 'ns/pixel' in lines[-2]


def test_train_step(tmp_path):
    options = ['--layout', 'channels_last', '--with-cp', '0', '4', '--drop-path', '0.1']
    _, result = measured(tmp_path, 'train-step', *options, '--amp', '--dtype', 'bfloat16')
    names = [side['name'] for side in result['sides']]
    assert names[0] == 'ours: train, auto, with_cp 0 4, 32x32, channels_last'
    assert names[1] == 'theirs: reference, 32x32, contiguous'
    assert result['memory_ratio'] < 1  # of recomputing, and of another op


@pytest.fixture(scope='module')
def benchmark():
    """The tool as a module: what needs no process of its own is quicker without."""
    path = ROOT / 'tools/benchmark.py'
    spec = importlib.util.spec_from_file_location('benchmark', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    set_contmix_backend(None)


@pytest.fixture
def arguments(benchmark, monkeypatch):
    def parse(command, *options):
        monkeypatch.setattr(
            sys, 'argv', ['benchmark.py', command, *SMALL[command], *options]
        )
        return benchmark.parse_args()

    return parse


@pytest.mark.parametrize('form', ['train', 'deploy', 'fold'])
def test_forms_compute_the_same(benchmark, arguments, form):
    args = arguments('backbone', '--form', form)
    images = torch.rand(1, 3, 64, 64)
    torch.manual_seed(0)
    ours = benchmark.our_model(args).eval()
    torch.manual_seed(0)
    theirs = benchmark.plain_model(args).eval()
    parameters = [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)]
    assert (parameters[0] == parameters[1]) == (form == 'train')
    with torch.no_grad():
        for a, b in zip(ours(images), theirs(images), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('against', ['resnet18', 'swin_tiny_patch4_window7_224'])
@pytest.mark.parametrize('command', ['backbone', 'train-step'])
def test_models_of_timm(benchmark, arguments, command, against):
    layouts = ['--layout', 'contiguous', '--against-layout', 'channels_last']
    size = '64x64' if command == 'backbone' else '32x32'
    args = arguments(command, '--against', against, '--batch', '2', *layouts)
    _, ours, theirs = benchmark.compare_models(args)
    assert theirs.name == f'theirs: {against}, {size}, channels_last'
    benchmark.prepare(theirs)()


@pytest.mark.parametrize('options', [[], ['--backward'], ['--dtype', 'float64']])
@pytest.mark.parametrize('against', ['torch', 'reference'])
def test_op_options(benchmark, arguments, monkeypatch, options, against):
    calls = []

    def spy(query, *others, backend):
        calls.append((query.dtype, query.requires_grad, tuple(query.shape), backend))
        return contmix(query, *others, backend=backend)

    contmix = benchmark.contmix
    monkeypatch.setattr(benchmark, 'contmix', spy)
    _, ours, theirs = benchmark.compare_op(arguments('op', '--against', against, *options))
    for side in (ours, theirs):
        side.build()()
    dtype = torch.float64 if 'float64' in options else torch.float32
    expected = (dtype, '--backward' in options, (1, 2, 4, 14, 15))
    assert calls == [(*expected, 'auto'), (*expected, against)]


@pytest.mark.parametrize(
    'command, options, words',
    [
        ('op', ['--shape', '1x16x14'], ['--shape', '1x256x50x84']),
        ('op', ['--kernel', '15'], ['kernel_sizes=(5, 15)', '14x15 map']),
        ('op', ['--heads', '3'], ['16 channels', '3 heads']),
        ('op', ['--backend', 'triton', '--dtype', 'float64'], ['triton', "use 'torch'"]),
        ('op', ['--backend', 'tritn'], ['--backend', "'tritn'", 'triton']),
        ('op', ['--json', 'none/out.json'], ['none/out.json', 'folder']),
        ('op', ['--plot', 'out.jpg'], ['out.jpg', '.png']),
        ('op', ['--rounds', '0'], ['--rounds', 'at least 1']),
        ('op', ['--device', 'cuda'], ['no GPU', '--device cpu']),
        ('backbone', ['--size', '16'], ['at least 32', '16, 16']),
        ('backbone', ['--size', 'big'], ['--size', '480x640']),
        ('backbone', ['--against', 'resnet19'], ['resnet19', 'resnet18', 'self:SIZE']),
        ('backbone', ['--against', 'self:x'], ['--against', '480x640']),
        ('train-step', ['--amp'], ['--amp', 'bfloat16']),
        ('train-step', ['--with-cp', '7'], ['with_cp', '0..4']),
    ],
)
def test_what_cannot_be_measured(
    benchmark, monkeypatch, tmp_path, capsys, command, options, words
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', command, *SMALL[command], *options])
    with pytest.raises(SystemExit) as stopped, benchmark.cli.plain_errors():
        benchmark.main()
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out and not list(tmp_path.iterdir())
    assert err.startswith('error: ') and err.count('\n') == 1
    assert all(word in err for word in words), err


def test_plot_without_matplotlib(benchmark, arguments, monkeypatch):
    args = arguments('op', '--plot', 'out.png')
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(benchmark.cli.UserError, match='pip install matplotlib'):
        benchmark.check(args)


def test_the_documented_figures(benchmark):
    """Every row of benchmarks/README.md says what its JSON file and command say."""
    text = (ROOT / 'benchmarks/README.md').read_text()
    files = sorted((ROOT / 'benchmarks').glob('*.json'))
    assert files
    for file in files:
        result = json.loads(file.read_text())
        (row,) = (line for line in text.splitlines() if f']({file.name})' in line)
        command = result['command'].removeprefix('python tools/benchmark.py ')
        assert f'`{command}`' in row
        assert f'| {benchmark.number(result["median_ratio"])} (' in row
        assert result['median_ratio'] == pytest.approx(median(result['ratios']))
