"""The whole demo, with a tiny backbone and a few iterations."""

import importlib.util
import shutil
import sys

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

from overlock_mm.apis import demo
from overlock_mm.checkpoint import read_weights


@pytest.mark.slow
@pytest.mark.parametrize(
    'task, config, result',
    [('segmentation', 'segmentor.py', 'mIoU'), ('detection', 'detector.py', 'bbox AP')],
)
def test_demo(task, config, result, configs, tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location('run_demo', ROOT / 'tools/run_demo.py')
    run_demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run_demo)
    shutil.copytree(ROOT / 'tools', tmp_path / 'tools')
    drawn = []

    def draw(scenes, *arguments):
        drawn.extend(scenes)
        draw_scenes(scenes, *arguments)

    draw_scenes = demo.draw_scenes
    monkeypatch.setattr(demo, 'draw_scenes', draw)
    monkeypatch.setattr(run_demo, 'ROOT', tmp_path)
    monkeypatch.setitem(run_demo.CONFIGS, task, configs / config)
    monkeypatch.setattr(sys, 'argv', ['run_demo.py', task])
    monkeypatch.chdir(tmp_path)  # and back, after the tool has changed it
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
    (best,) = work_dir.glob('best_*.pth')
    assert 'best_score' in read_weights(str(best))['message_hub']['runtime_info']
    assert len(drawn) == 6 and all(scene.truth for scene in drawn)
    if task == 'segmentation':
        # what is drawn is what test.py wrote
        for i, scene in enumerate(drawn):
            (path,) = (work_dir / 'labels').rglob(f'scene_{i:04}.png')
            labels = np.array(Image.open(path))
            for region in scene.predicted:
                assert np.array_equal(region.mask, labels == region.label)
            assert (labels[~sum(r.mask for r in scene.predicted) > 0] == 0).all()
