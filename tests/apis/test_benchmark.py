"""The benchmark in miniature; nothing here depends on how fast it is."""

import contextlib
import io
import json
import mmap
import os
import re
import subprocess
from statistics import median

import pytest
import torch
from helpers import ROOT
from PIL import Image

from overlock_mm.apis import benchmark
from overlock_mm.apis.benchmark import (
    BackboneOptions,
    OpOptions,
    TrainStepOptions,
    report,
    run_benchmark,
)
from overlock_mm.errors import UserError
from overlock_mm.ops import set_contmix_backend

SHORT = dict(rounds=2, warmup=1, threads=1, device='cpu')
OP = dict(shape=(1, 16, 14, 15), heads=2, kernel=7, **SHORT)
BACKBONE = dict(arch='xt', size=(64, 64), form='deploy', **SHORT)
TRAIN_STEP = dict(arch='xt', size=(32, 32), **SHORT)
OPTIONS = {BackboneOptions: BACKBONE, TrainStepOptions: TRAIN_STEP}


@pytest.fixture(autouse=True)
def settings_restored():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = False
    set_contmix_backend(None)


def measured(options):
    """The result and its table, checked for what all have."""
    result = run_benchmark(options)
    text = json.dumps(result)
    # nothing tells whose machine it is
    assert not any(s in text for s in (str(ROOT), os.uname().nodename + '"'))
    result, lines = json.loads(text), report.table(result).splitlines()
    check_arithmetic(result)
    check_table(lines, result)
    return result, lines


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
    head, *rows, summary = lines
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
    options = OpOptions(**{**OP, 'kernel': 13, 'shape': (1, 64, 40, 40)}, backend='torch')
    result, _ = measured(options)
    assert [s['name'] for s in result['sides']] == ['ours: torch', 'theirs: reference']
    # The reference copies the windows of the channels, half of which have the large
    # kernel: it cannot take less.
    windows = 32 * 40 * 40 * 13 * 13 * 4
    assert result['sides'][1]['peak_extra_bytes'] > windows

    assert re.fullmatch(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ', result['date'])
    assert result['versions']['torch'] == torch.__version__
    assert set(result['versions']) == {'torch', 'cuda', 'triton', 'timm', 'overlock_mm'}
    assert result['hardware']['cpu'] and result['hardware']['threads'] == 1
    assert result['options']['command'] == 'op'
    assert result['options']['shape'] == [1, 64, 40, 40]
    report.plot(result, tmp_path / 'out.png')
    with Image.open(tmp_path / 'out.png') as image:
        image.load()
        assert image.size > (500, 300)


@pytest.mark.slow
def test_backbone_per_pixel(capsys):
    options = BackboneOptions(**BACKBONE, batch=2, against='self:64x96')
    result, lines = measured(options)
    layout = result['options']['layout']
    assert f'ours: {layout} is the faster layout' in capsys.readouterr().out
    assert result['options']['against_layout'] == layout != 'best'
    assert [side['pixels'] for side in result['sides']] == [2 * 64 * 64, 2 * 64 * 96]
    names = [side['name'] for side in result['sides']]
    assert names[0] == f'ours: deploy, auto, 64x64, {layout}'
    assert names[1] == f'theirs: self:64x96, 64x96, {layout}'
    assert lines[-1].startswith('per pixel, ours') and 'ns/pixel' in lines[-2]


@pytest.mark.slow
def test_train_step():
    more = dict(layout='channels_last', with_cp=(0, 4), drop_path=0.1)
    options = TrainStepOptions(**TRAIN_STEP, **more)
    result, _ = measured(options)
    names = [side['name'] for side in result['sides']]
    assert names[0] == 'ours: train, auto, with_cp 0 4, 32x32, channels_last'
    assert names[1] == 'theirs: reference, 32x32, contiguous'


class Layer(torch.nn.Conv2d):
    """A model of one convolution, which records what it sees."""

    def __init__(self):
        super().__init__(3, 8, 3)
        self.seen = []

    def forward(self, images):
        out = super().forward(images)
        self.seen.append((self.weight.dtype, out.dtype, images.shape, out.requires_grad))
        return (out,)


@pytest.mark.parametrize(
    'options, dtypes',
    [
        (TrainStepOptions(**TRAIN_STEP), (torch.float32, torch.float32)),
        pytest.param(
            TrainStepOptions(**TRAIN_STEP, dtype='bfloat16'),
            (torch.bfloat16, torch.bfloat16),
            marks=pytest.mark.dev_stack,
        ),
        (
            TrainStepOptions(**TRAIN_STEP, dtype='bfloat16', amp=True),
            (torch.float32, torch.bfloat16),
        ),
        (BackboneOptions(**BACKBONE, batch=3), (torch.float32, torch.float32)),
    ],
)
def test_step(options, dtypes):
    """Precision, batch, and whether it trains."""
    model = Layer()
    before = model.weight.clone()
    step = benchmark.models.model_step(
        options, lambda _: model, None, (32, 48), 'contiguous'
    )
    step()
    train = options.command == 'train-step'
    assert model.seen == [(*dtypes, (options.batch, 3, 32, 48), train)]
    assert model.training == train
    assert (model.weight != before).any() == train


def test_peak_memory_is_that_of_one_step():
    size = 100 * 2**20
    held = []

    def fresh(size):  # from the system: the C library may have as much at hand
        memory = mmap.mmap(-1, size)
        for page in range(0, size, mmap.PAGESIZE):
            memory[page] = 1
        return memory

    def step():
        held[:] = [fresh(size)]  # what stays afterwards counts as what is freed

    assert benchmark.measuring.peak_on_cpu(step) == pytest.approx(size, rel=0.1)
    # a peak of before is forgotten
    assert benchmark.measuring.peak_on_cpu(lambda: fresh(size // 4)) < size / 2


def test_options_of_the_child_process(monkeypatch):
    """The child measures the same side with the same options."""
    found = []

    def measure_here(command, **kwargs):
        monkeypatch.setattr(benchmark, 'peak_on_cpu', lambda step: 5)
        monkeypatch.setattr(benchmark, 'prepare', found.append)
        monkeypatch.setattr('sys.stdin', io.StringIO(kwargs['input']))
        stdout = io.StringIO()
        with contextlib.redirect_stdout(stdout):
            benchmark._measure_memory()
        return subprocess.CompletedProcess(command, 0, stdout.getvalue())

    monkeypatch.setattr(subprocess, 'run', measure_here)
    options = TrainStepOptions(
        **TRAIN_STEP, layout='contiguous', against='self:64', with_cp=(1,)
    )
    options, _, sides = benchmark.compare(options)
    assert [benchmark.measuring._memory_of_child(options, side) for side in (0, 1)] == [
        5,
        5,
    ]
    assert [side.name for side in found] == [side.name for side in sides]
    assert 'with_cp 1' in found[0].name


@pytest.mark.parametrize('form', ['train', 'deploy', 'fold'])
def test_forms_compute_the_same(form):
    options = BackboneOptions(**{**BACKBONE, 'form': form})
    images = torch.rand(1, 3, 64, 64)
    torch.manual_seed(0)
    ours = benchmark.models.our_model(options).eval()
    torch.manual_seed(0)
    theirs = benchmark.models.plain_model(options).eval()
    parameters = [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)]
    assert (parameters[0] == parameters[1]) == (form == 'train')
    with torch.no_grad():
        for a, b in zip(ours(images), theirs(images), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('against', ['resnet18', 'swin_tiny_patch4_window7_224'])
@pytest.mark.parametrize('kind', [BackboneOptions, TrainStepOptions])
def test_models_of_timm(kind, against):
    layouts = dict(layout='contiguous', against_layout='channels_last')
    options = kind(**OPTIONS[kind], against=against, batch=2, **layouts)
    _, _, (_, theirs) = benchmark.compare_models(options)
    size = 'x'.join(map(str, options.size))
    assert theirs.name == f'theirs: {against}, {size}, channels_last'
    benchmark.prepare(theirs)()


@pytest.mark.parametrize('more', [{}, dict(backward=True), dict(dtype='float64')])
@pytest.mark.parametrize('against', ['torch', 'reference'])
def test_op_options(monkeypatch, more, against):
    calls = []

    def spy(query, *others, backend):
        calls.append((query.dtype, query.requires_grad, tuple(query.shape), backend))
        return contmix(query, *others, backend=backend)

    contmix = benchmark.models.contmix
    monkeypatch.setattr(benchmark.models, 'contmix', spy)
    _, sides = benchmark.compare_op(OpOptions(**OP, against=against, **more))
    for side in sides:
        side.build()()
    dtype = torch.float64 if 'dtype' in more else torch.float32
    expected = (dtype, 'backward' in more, (1, 2, 4, 14, 15))
    assert calls == [(*expected, 'auto'), (*expected, against)]


@pytest.mark.parametrize(
    'options, words',
    [
        (OpOptions(**{**OP, 'kernel': 15}), ['kernel_sizes=(5, 15)', '14x15 map']),
        (OpOptions(**{**OP, 'heads': 3}), ['16 channels', '3 heads']),
        (OpOptions(**OP, backend='triton', dtype='float64'), ['triton', "use 'torch'"]),
        (OpOptions(**{**OP, 'device': 'cuda'}), ['no GPU', 'device cpu']),
        (BackboneOptions(**{**BACKBONE, 'size': (16, 16)}), ['at least 32', '16, 16']),
        (TrainStepOptions(**TRAIN_STEP, amp=True), ['--amp', 'bfloat16']),
        (TrainStepOptions(**TRAIN_STEP, with_cp=(7,)), ['with_cp', '0..4']),
    ],
)
def test_what_cannot_be_measured(monkeypatch, options, words):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(UserError) as error:
        run_benchmark(options)
    assert '\n' not in str(error.value)
    assert all(word in str(error.value) for word in words), error.value
