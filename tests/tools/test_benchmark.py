"""The command line of the benchmark, and the figures that were recorded with it."""

import dataclasses
import importlib.util
import json
import sys
from statistics import median

import pytest
import torch
from helpers import ROOT, run, tool

from overlock_mm.apis.benchmark.report import number

SMALL = {
    'op': ['--shape', '1x16x14x15', '--heads', '2', '--kernel', '7'],
    'backbone': ['--arch', 'xt', '--size', '64', '--form', 'deploy'],
    'train-step': ['--arch', 'xt', '--size', '32'],
}
RECORDED = sorted((ROOT / 'benchmarks').glob('*.json'))


def test_run(tmp_path):
    options = [*SMALL['op'], '--rounds', '2', '--warmup', '1', '--threads', '1']
    outputs = ['--json', 'out.json', '--plot', 'out.png']
    stdout = run([*tool('benchmark.py'), 'op', *options, *outputs], tmp_path).stdout
    result = json.loads((tmp_path / 'out.json').read_text())
    assert (tmp_path / 'out.png').stat().st_size > 1000
    assert stdout.splitlines()[0] == result['what']
    assert 'over 2 rounds' in stdout.splitlines()[-1]
    # the files to write are not part of the command
    command = ['python', 'tools/benchmark.py', 'op', *options]
    assert result['command'] == ' '.join(command)
    assert result['options']['shape'] == [1, 16, 14, 15]


@pytest.fixture(scope='module')
def benchmark():
    """The tool as a module."""
    path = ROOT / 'tools/benchmark.py'
    spec = importlib.util.spec_from_file_location('benchmark_tool', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize('file', RECORDED, ids=lambda path: path.stem)
def test_recorded_commands_still_mean_the_same(benchmark, monkeypatch, file):
    recorded = json.loads(file.read_text())
    results = []

    def measure(options):
        results.append(options)
        return dict(recorded)

    monkeypatch.setattr(benchmark.benchmark, 'run_benchmark', measure)
    monkeypatch.setattr(sys, 'argv', recorded['command'].split()[1:])
    benchmark.main()
    (options,) = results
    found = json.loads(json.dumps(dataclasses.asdict(options)))
    known = dataclasses.asdict(type(options)())  # older files lack newer options
    expected = {k: v for k, v in {**known, **recorded['options']}.items() if k in found}
    assert options.command == recorded['options']['command']
    for key in ('device', 'threads', 'layout', 'against_layout'):
        if found.get(key) in (None, 'best') or key in ('device', 'threads'):
            # the machine decided
            found.pop(key, None)
            expected.pop(key, None)
    assert found == expected


@pytest.mark.parametrize(
    'command, options, words',
    [
        ('op', ['--shape', '1x16x14'], ['--shape', '1x256x50x84']),
        ('op', ['--backend', 'tritn'], ['--backend', "'tritn'", 'triton']),
        ('op', ['--json', 'none/out.json'], ['none/out.json', 'folder']),
        ('op', ['--plot', 'out.jpg'], ['out.jpg', '.png']),
        ('op', ['--rounds', '0'], ['--rounds', 'at least 1']),
        ('op', ['--device', 'cuda'], ['no GPU', '--device cpu']),
        ('backbone', ['--size', 'big'], ['--size', '480x640']),
        ('backbone', ['--against', 'resnet19'], ['resnet19', 'resnet18', 'self:SIZE']),
        ('backbone', ['--against', 'self:x'], ['--against', '480x640']),
        ('train-step', ['--amp'], ['--amp', 'bfloat16']),
    ],
)
def test_errors(benchmark, monkeypatch, tmp_path, capsys, command, options, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', command, *SMALL[command], *options])
    with pytest.raises(SystemExit) as stopped, benchmark.cli.plain_errors():
        benchmark.main()
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out and not list(tmp_path.iterdir())
    assert err.startswith('error: ') and err.count('\n') == 1
    assert all(word in err for word in words), err


def test_plot_without_matplotlib(benchmark, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', 'op', '--plot', 'out.png'])
    args = benchmark.parse_args()
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(benchmark.UserError, match='pip install matplotlib'):
        benchmark.check_outputs(args)


def test_the_documented_figures():
    """Every row of benchmarks/README.md says what its JSON file and command say."""
    text = (ROOT / 'benchmarks/README.md').read_text()
    assert RECORDED
    for file in RECORDED:
        result = json.loads(file.read_text())
        (row,) = (line for line in text.splitlines() if f']({file.name})' in line)
        command = result['command'].removeprefix('python tools/benchmark.py ')
        assert f'`{command}`' in row
        assert f'| {number(result["median_ratio"])} (' in row
        assert result['median_ratio'] == pytest.approx(median(result['ratios']))
