"""The lines of docs/training.md by which a training is followed elsewhere."""

import json
import re
import shlex
import sys

import pytest
from helpers import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from overlock_mm import cli
from overlock_mm.config.load import build_runner, load_config


def option(backend):
    """What the page gives as ``--cfg-options`` for one of mmengine's backends."""
    text = (ROOT / 'docs/training.md').read_text().replace('\\\n', ' ')
    (line,) = re.findall(rf'^overlock train .*{backend}.*$', text, re.M)
    return shlex.split(line, comments=True)[3:]


def test_tensorboard(stock, demo_data, tmp_path, monkeypatch):
    """A stock config; what is written equals mmengine's own log."""
    monkeypatch.chdir(demo_data)
    lines = "default_hooks = dict(logger=dict(interval=1))\nvisualizer = dict(name='x')"
    arguments = [str(stock('mmseg', lines)), *option('TensorboardVisBackend')]
    arguments += ['--work-dir', str(tmp_path), '--no-pretrained']
    monkeypatch.setattr(sys, 'argv', ['overlock', 'train', *map(str, arguments)])
    cli.main()
    (log,) = tmp_path.glob('*/vis_data/scalars.json')
    records = [json.loads(line) for line in log.read_text().splitlines()]
    events = EventAccumulator(str(log.parent)).Reload()
    for name in ('loss', 'decode.loss_ce', 'lr', 'mIoU'):
        written = {event.step: event.value for event in events.Scalars(name)}
        expected = {r['step']: pytest.approx(r[name]) for r in records if name in r}
        assert written == expected and len(written) == (1 if name == 'mIoU' else 2), name


@pytest.mark.parametrize('name', ['mmdet', 'mmseg', 'no visualizer'])
def test_a_package_that_is_missing(stock, demo_data, tmp_path, monkeypatch, name, capsys):
    """It is named before the training, in any config."""
    monkeypatch.chdir(demo_data)
    monkeypatch.setitem(sys.modules, 'wandb', None)
    drop = ['visualizer', 'vis_backends'] if name == 'no visualizer' else []
    toolbox = 'mmdet' if name == 'mmdet' else 'mmseg'
    arguments = [str(stock(toolbox, '', drop)), *option('WandbVisBackend')]
    arguments += ['--work-dir', str(tmp_path)]
    monkeypatch.setattr(sys, 'argv', ['overlock', 'train', *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.endswith('error: wandb is not installed; run: pip install wandb\n')


def test_other_import_errors_stay(stock, demo_data, tmp_path, monkeypatch):
    monkeypatch.chdir(demo_data)
    (tmp_path / 'broken_hook.py').write_text('from mmengine import nothing_of_this_name\n')
    cfg = load_config(stock('mmseg'), {'work_dir': str(tmp_path)})
    monkeypatch.setattr(
        'overlock_mm.config.load.RUNNERS.build', lambda cfg: __import__('broken_hook')
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match='nothing_of_this_name'):
        build_runner(cfg)
