"""The whole demo, with a tiny backbone and a few iterations."""

import importlib.util
import shutil
import sys

import pytest
from helpers import ROOT
from PIL import Image


@pytest.mark.parametrize(
    'task, config, result',
    [('segmentation', 'segmentor.py', 'mIoU'), ('detection', 'detector.py', 'bbox AP')],
)
def test_demo(task, config, result, configs, tmp_path, monkeypatch, capsys):  # noqa: F811
    spec = importlib.util.spec_from_file_location('run_demo', ROOT / 'tools/run_demo.py')
    run_demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run_demo)
    shutil.copytree(ROOT / 'tools', tmp_path / 'tools')
    monkeypatch.setattr(run_demo, 'ROOT', tmp_path)
    monkeypatch.setitem(run_demo.CONFIGS, task, configs / config)
    monkeypatch.setattr(sys, 'argv', ['run_demo.py', task])
    stale = tmp_path / 'work_dirs' / f'demo_{task}' / 'last_checkpoint'
    stale.parent.mkdir(parents=True)
    stale.write_text('of another config')

    run_demo.main()

    work_dir = stale.parent
    printed = capsys.readouterr().out
    assert 'starting afresh' in printed and f'Validation {result}: ' in printed
    assert 'untrained' in printed and 'loss: ' in printed
    for picture in ('curve.png', 'predictions.png'):
        Image.open(work_dir / picture).verify()
    assert len(list((work_dir / 'predictions').rglob('*scene*.png'))) == 16
    if task == 'segmentation':
        # the share of background, as in no other file, over the ten classes
        labels = list((tmp_path / 'data/demo/annotations/validation').glob('*.png'))
        shares = [Image.open(p).histogram()[0] / 256**2 for p in labels]
        assert run_demo.background_miou() == pytest.approx(sum(shares) / 16 / 10)
