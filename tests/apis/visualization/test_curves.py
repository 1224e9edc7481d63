"""Curves of trainings, from hand-written and from real logs."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from overlock_mm.apis.train import train
from overlock_mm.apis.visualization.curves import curves, read_run
from overlock_mm.cli import main
from overlock_mm.errors import UserError

NAN = float('nan')


def trained(iteration, loss, **more):
    more = {'time': 0.5, 'data_time': 0.1, **more}
    record = dict(base_lr=1e-3, lr=1e-4, loss=loss, iter=iteration, step=iteration)
    return {**record, **more}


def validated(step, **metrics):
    return dict(**metrics, data_time=0.1, time=9.0, step=step)


def write_log(work_dir, records, stamp='20260101_000000', resume=None):
    """Write a log as mmengine does, with the line of the config that counts."""
    folder = work_dir / stamp / 'vis_data'
    folder.mkdir(parents=True)
    file = folder / 'scalars.json'
    file.write_text(''.join(json.dumps(record) + '\n' for record in records))
    if resume is not None:
        (folder / 'config.py').write_text(f'work_dir = "x"\nresume = {resume}\n')
    return file


def test_resumed_runs_are_joined(tmp_path):
    """The run was stopped after 60; it went on from the checkpoint of 40, twice."""
    first = [trained(20, 5.0), validated(20, mIoU=1.0), trained(40, 4.0)]
    first += [validated(40, mIoU=2.0), trained(60, 3.0), validated(60, mIoU=3.0)]
    write_log(tmp_path, first, '20260101_000000', False)
    write_log(tmp_path, [], '20260102_000000', False)  # broke off at once
    write_log(tmp_path, [trained(60, 3.3)], '20260103_000000', True)
    write_log(tmp_path, [trained(60, 3.5), trained(80, 2.5)], '20260104_000000', True)
    run = read_run(tmp_path)
    assert run.training['loss'] == {20: 5.0, 40: 4.0, 60: 3.5, 80: 2.5}
    assert run.metrics == {'mIoU': {20: 1.0, 40: 2.0}}
    assert [file.parts[-3][:8] for file in run.files] == [
        '20260101',
        '20260103',
        '20260104',
    ]


@pytest.mark.parametrize(
    'resume, start, kept',
    [(False, 60, False), (True, 60, True), (None, 60, True), (None, 20, False)],
    ids=['config', 'resumed', 'goes on', 'from the start'],
)
def test_runs_started_anew(tmp_path, capsys, resume, start, kept):
    """They replace what was there before, which is said."""
    write_log(tmp_path, [trained(20, 5.0), validated(20, mIoU=1.0)])
    write_log(tmp_path, [trained(start, 4.0)], '20260102_000000', resume)
    run = read_run(tmp_path)
    assert run.training['loss'] == ({20: 5.0} if kept else {}) | {start: 4.0}
    assert ('mIoU' in run.metrics) == kept
    printed = capsys.readouterr().out
    assert ('started anew; 1 earlier log is left out' in printed) == (not kept)
    # each can be had by its folder
    assert read_run(tmp_path / '20260101_000000').training['loss'] == {20: 5.0}


@pytest.mark.parametrize('epochs', [(1, 2, 3), (4, 5)])
def test_validations_after_epochs(tmp_path, epochs):
    """Epochs of 7 iterations, of which every second one is logged and the last is not."""
    records = []
    for epoch in epochs:
        start = 7 * (epoch - 1)
        records += [trained(start + i, 1.0, epoch=epoch) for i in (2, 4, 6)]
        records.append(validated(epoch, **{'coco/bbox_mAP': epoch / 10}))
    run = read_run(write_log(tmp_path, records))
    assert run.metrics == {'coco/bbox_mAP': {7 * e: e / 10 for e in epochs}}


@pytest.mark.parametrize('step', [40, 0], ids=['iteration', 'epoch that is always 0'])
def test_validations_after_iterations(tmp_path, step):
    records = [
        trained(20, 1.0),
        trained(40, 1.0),
        validated(step, PQ=0.2),
        trained(60, 1.0),
    ]
    assert read_run(write_log(tmp_path, records)).metrics == {'PQ': {40: 0.2}}


def test_logs_with_hierarchy(tmp_path):
    record = {'train/loss': 2.0, 'train/lr': 0.1, 'iter': 10, 'step': 10}
    log = write_log(tmp_path, [record, {'val/mIoU': 4.0, 'val/time': 1.0, 'step': 10}])
    run = read_run(log)
    assert run.training == {'loss': {10: 2.0}, 'lr': {10: 0.1}}
    assert run.metrics == {'mIoU': {10: 4.0}}


def test_a_killed_run(tmp_path, capsys):
    log = write_log(tmp_path, [trained(10, 2.0), trained(20, NAN), dict(iter=30, note='x')])
    log.write_text(log.read_text() + '{"loss": 0.')
    curves([log], tmp_path / 'c.png', json_path=tmp_path / 'c.json')
    assert 'scalars.json: 1 broken line left out' in capsys.readouterr().out
    text = (tmp_path / 'c.json').read_text()
    assert 'NaN' not in text
    (run,) = json.loads(text).values()
    assert run['training']['loss'] == dict(iteration=[10, 20], value=[2.0, None])


def test_the_log_of_another_name(tmp_path):
    log = write_log(tmp_path, [trained(10, 2.0)])
    log.rename(log.with_name('20260101_000000.json'))
    assert read_run(tmp_path).training['loss'] == {10: 2.0}


def titles(path):
    return re.findall(r'<text[^>]*>([^<]+)</text>', path.read_text())


def test_what_is_drawn(tmp_path):
    """A panel for what there is; labels that tell runs of one name apart."""
    metrics = {'coco/bbox_mAP': 0.2, 'coco/bbox_mAP_50': 0.4, 'coco/segm_mAP': 0.1}
    records = [trained(2, 3.0, memory=512), validated(2, **metrics), trained(4, 2.0)]
    for folder in ('a', 'b'):
        write_log(tmp_path / folder / 'run', records)
    write_log(tmp_path / 'c', [trained(2, 3.0), validated(2, acc=70.0)])
    pair = [tmp_path / folder / 'run' for folder in ('a', 'b')]
    out = tmp_path / 'c.svg'
    text = curves(pair, out, json_path=tmp_path / 'c.json')
    shown = {'Loss', 'Learning rate', 'coco/bbox_mAP', 'coco/segm_mAP', 'GPU memory', 'MiB'}
    shown |= {'Time per iteration', 's', 'iteration', 'a/run', 'b/run'}
    assert shown <= set(titles(out)) and 'coco/bbox_mAP_50' not in titles(out)
    assert re.search(r'a/run +4 +2 +0.2 \(2\) +0.1 \(2\) +0.5 +512\n', text)
    assert (
        json.loads((tmp_path / 'c.json').read_text())['b/run']['metrics'].keys()
        == metrics.keys()
    )
    # given names; metrics by the ends of their names
    options = dict(labels=['one', 'two', 'three'], metrics=['bbox_mAP_50', 'acc'])
    curves([*pair, tmp_path / 'c'], out, **options)
    assert {'one', 'two', 'three', 'coco/bbox_mAP_50', 'acc'} <= set(titles(out))
    assert 'coco/segm_mAP' not in titles(out)
    # without a main one, the first
    curves([tmp_path / 'c'], out)
    assert {'acc', 'c'} <= set(titles(out)) and 'GPU memory' not in titles(out)
    # base_lr is what the config says, lr that of the first group of parameters
    assert any(t.startswith('1.0') for t in titles(out)) and '1e\N{MINUS SIGN}3' in titles(
        out
    )


def test_the_lines(tmp_path):
    """A loss that falls in a straight line; its running mean does, too, and is not NaN."""
    records = [trained(i, 10 - i / 100) for i in range(1, 1001)]
    records[500]['loss'] = NAN
    log = write_log(tmp_path, records)
    curves([log], tmp_path / 'c.png', labels=['x'])
    picture = np.array(Image.open(tmp_path / 'c.png').convert('RGB')).astype(int)
    blue = (abs(picture - (31, 119, 180)).sum(-1) < 60)[:, : picture.shape[1] // 3]
    rows, columns = np.nonzero(blue)
    assert np.ptp(columns) > 250 and np.corrcoef(rows, columns)[0, 1] > 0.98


@pytest.mark.parametrize(
    'given, message',
    [
        (['none'], 'none does not exist; give a work dir'),
        (['.'], 'has no logs of a training; there are some in .*run: give these'),
        (['empty'], 'empty has no logs of a training; give the folder in which'),
        (['blank'], 'blank: nothing was logged in .*scalars.json; a run logs its first'),
        (['note.json'], 'note.json is not a log of mmengine'),
        (['other'], 'the logs have no loss and no metrics, but acc, depth'),
        (['run', 'run/../run'], 'run is given 2 times; give it once'),
    ],
)
def test_nothing_to_draw(tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'note.json').write_text('a note\n')
    write_log(tmp_path / 'run', [trained(1, 1.0)])
    write_log(tmp_path / 'blank', [])
    write_log(tmp_path / 'other', [dict(iter=1, step=1, depth=1.0, acc=2.0)])
    with pytest.raises(UserError, match=message):
        curves(given, 'c.png')
    assert not (tmp_path / 'c.png').exists()


def test_options_that_do_not_fit(tmp_path):
    log = write_log(tmp_path, [trained(1, 1.0), validated(1, mIoU=1.0)])
    with pytest.raises(UserError, match='mAP is not in the logs; they have mIoU'):
        curves([log], tmp_path / 'c.png', metrics=['mAP'])
    with pytest.raises(UserError, match='1 different names are needed.*there are 2: a, b'):
        curves([log], tmp_path / 'c.png', labels=['a', 'b'])
    with pytest.raises(UserError, match='c.jpg must end in .png or .svg or .pdf'):
        curves([log], tmp_path / 'c.jpg')


def drawn(monkeypatch, folder, *arguments):
    """What the command line writes as JSON."""
    out = ['--out', str(folder / 'c.pdf'), '--json', str(folder / 'c.json')]
    monkeypatch.setattr('sys.argv', ['overlock', 'visualize', 'curves', *arguments, *out])
    main()
    assert (folder / 'c.pdf').read_bytes().startswith(b'%PDF')
    return json.loads((folder / 'c.json').read_text())


def test_a_real_segmentor(configs, demo_data, tmp_path, monkeypatch):
    """Stopped after 5 iterations, and resumed from the checkpoint of the third."""
    monkeypatch.chdir(demo_data)
    options = dict(work_dir=str(tmp_path / 'work'), pretrained=False)
    stop = {'train_cfg.max_iters': 5, 'train_cfg.val_interval': 5}
    train(configs / 'segmentor.py', cfg_options=stop, **options)
    train(configs / 'segmentor.py', resume=str(tmp_path / 'work/iter_3.pth'), **options)
    (run,) = drawn(monkeypatch, tmp_path, str(tmp_path / 'work')).values()
    assert len(run['files']) == 2
    assert run['training']['loss']['iteration'] == [1, 2, 3, 4, 5, 6]
    assert run['metrics']['mIoU']['iteration'] == [6]
    logged = [
        [
            r['loss']
            for r in map(json.loads, Path(file).read_text().splitlines())
            if 'loss' in r
        ]
        for file in run['files']
    ]
    assert run['training']['loss']['value'] == logged[0][:3] + logged[1]


@pytest.mark.slow
def test_a_real_detector(configs, demo_data, tmp_path, monkeypatch):
    """Three iterations an epoch; the second one is logged."""
    monkeypatch.chdir(demo_data)
    options = {'train_cfg.max_epochs': 2, 'default_hooks.logger.interval': 2}
    train(
        configs / 'detector.py',
        work_dir=str(tmp_path / 'work'),
        pretrained=False,
        cfg_options=options,
    )
    (run,) = drawn(monkeypatch, tmp_path, str(tmp_path / 'work')).values()
    assert run['training']['loss']['iteration'] == [2, 5]
    assert run['metrics']['coco/bbox_mAP']['iteration'] == [3, 6]
