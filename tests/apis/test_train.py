"""Training as a function, on configs that are not ours."""

import json
import sys

import pytest
import torch
from helpers import SEGMENTATION, TINY, run
from mmengine.config import Config

from overlock_mm import OverLoCK
from overlock_mm.apis.train import train
from overlock_mm.errors import CheckpointError, UserError


@pytest.fixture(autouse=True)
def cwd(demo_data, monkeypatch):
    monkeypatch.chdir(demo_data)


def weights(path):
    return torch.load(path, weights_only=False)['state_dict']


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
    """A file of backbone weights that no initialisation would give."""
    path = tmp_path_factory.mktemp('pretrained') / 'backbone.pth'
    state = OverLoCK(TINY).state_dict()
    torch.save({k: torch.full_like(v, 0.01) for k, v in state.items()}, path)
    return path


def starts(model):
    """Whether the first weights are still the pretrained ones, after a step or two."""
    weight = model.backbone.patch_embed1[0].weight
    return bool((weight - 0.01).abs().max() < 0.009)


RESUME = """
resume = True
model = dict(backbone=dict(init_cfg=dict(type={}, checkpoint={!r})))
"""


@pytest.mark.parametrize('toolbox', ['mmdet', 'mmseg'])
def test_stock_configs(toolbox, stock, tmp_path):
    """With nothing that mmengine can do without."""
    drop = ['default_hooks', 'resume', 'load_from', 'visualizer', 'vis_backends']
    drop += ['log_processor', 'log_level', 'env_cfg', 'custom_imports']
    config = stock(toolbox, drop=drop)
    assert not set(drop) & set(Config.fromfile(config))
    work_dir = tmp_path / 'runs'
    runner = train(config, work_dir=str(work_dir))
    assert isinstance(runner.model.backbone, OverLoCK)
    assert any(type(hook).__name__ == 'StrictLoadingHook' for hook in runner.hooks)
    # what the run dumped is read by a process that knows nothing of this package
    code = 'import sys, mmengine; cfg = mmengine.Config.fromfile(sys.argv[1]); '
    code += "print('overlock_mm.hooks' in sys.modules, cfg.default_hooks.loading.type)"
    if toolbox == 'mmseg':
        dumped = work_dir / config.name
        printed = run([sys.executable, '-c', code, dumped], tmp_path).stdout
        assert printed.split() == ['True', 'StrictLoadingHook']


def test_resume_in_a_config(stock, pretrained, tmp_path, capsys):
    """The first run of a job that is queued again starts from the pretrained weights."""
    config = stock('mmseg', RESUME.format("'mmengine.Pretrained'", str(pretrained)))
    options = {'optim_wrapper.optimizer.lr': 0.0, 'train_cfg.max_iters': 1}
    options['optim_wrapper.optimizer.weight_decay'] = 0.0
    first = train(config, work_dir=str(tmp_path), cfg_options=options)
    assert 'resume=True, and no checkpoint in' in capsys.readouterr().out
    assert starts(first.model)
    # the next one goes on, and needs them no more
    gone = {'model.backbone.init_cfg.checkpoint': 'none.pth'}
    second = train(config, work_dir=str(tmp_path), cfg_options=gone)
    assert second.iter == 2 and (tmp_path / 'iter_2.pth').exists()


def test_pretrained_weights_that_are_not_there(stock, tmp_path):
    """Also with resume, where nothing is there to be resumed."""
    config = stock('mmseg', RESUME.format("'Pretrained'", 'none.pth'))
    with pytest.raises(UserError, match='none.pth.*start without: --no-pretrained'):
        train(config, work_dir=str(tmp_path))
    options = {'train_cfg.max_iters': 1}
    train(config, work_dir=str(tmp_path), cfg_options=options, pretrained=False)
    assert (tmp_path / 'iter_1.pth').exists()


def test_a_checkpoint_replaces_pretrained_weights(stock, tmp_path, monkeypatch):
    """These need not be there; the path may start with the home folder."""
    once = {'train_cfg.max_iters': 1}
    start = train(stock('mmseg'), work_dir=str(tmp_path), cfg_options=once)
    monkeypatch.setenv('HOME', str(tmp_path))
    config = stock('mmseg', RESUME.format("'Pretrained'", 'none.pth'))
    once['optim_wrapper.optimizer.lr'] = 0.0
    once['optim_wrapper.optimizer.weight_decay'] = 0.0
    options = {**once, 'resume': False, 'load_from': '~/iter_1.pth'}
    loaded = train(config, work_dir=str(tmp_path / 'next'), cfg_options=options)
    expected = dict(start.model.named_parameters())
    for name, value in loaded.model.named_parameters():
        torch.testing.assert_close(value, expected[name])
    options['load_from'] = '~/iter_2.pth'
    with pytest.raises(UserError, match='~?/iter_2.pth does not exist'):
        train(config, work_dir=str(tmp_path / 'next'), cfg_options=options)


def test_resuming_equals_training_in_one_go(configs, tmp_path):
    config = configs / 'segmentor.py'
    train(config, work_dir=str(tmp_path / 'once'))
    three, six = (weights(tmp_path / f'once/iter_{i}.pth') for i in (3, 6))
    assert sum(not torch.equal(three[n], six[n]) for n in six) > 0.9 * len(six)
    again = tmp_path / 'again'
    # stop after 3 iterations, as an interruption does
    stop = {'train_cfg.max_iters': 3, 'train_cfg.val_interval': 3}
    train(config, work_dir=str(again), cfg_options=stop, resume=True)
    latest = again / 'last_checkpoint'
    for resume, recorded in (
        (True, again / 'iter_3.pth'),
        (str(again / 'iter_3.pth'), 'none.pth'),
    ):
        latest.write_text(str(recorded))
        train(config, work_dir=str(again), resume=resume)
        resumed = weights(again / 'iter_6.pth')
        assert set(resumed) == set(six)
        for name in six:
            torch.testing.assert_close(resumed[name], six[name], rtol=1e-4, atol=1e-6)
        (again / 'iter_6.pth').unlink()
    # the latest checkpoint, just deleted, is still recorded
    for options in (dict(resume=True), dict(cfg_options=dict(resume=True))):
        with pytest.raises(UserError, match='iter_6.pth does not exist'):
            train(config, work_dir=str(again), **options)


def test_a_checkpoint_that_does_not_fit(stock, pretrained, tmp_path):
    """Training does not go on with half of the weights."""
    options = {'load_from': str(pretrained)}
    with pytest.raises(CheckpointError, match='missing from the file: decode_head.'):
        train(stock('mmseg'), work_dir=str(tmp_path), cfg_options=options)


def test_auto_scaled_learning_rate(configs, tmp_path):
    options = {'train_cfg.max_iters': 1, 'train_cfg.val_interval': 1}
    train(
        configs / 'segmentor.py',
        work_dir=str(tmp_path),
        auto_scale_lr=True,
        cfg_options=options,
    )
    (log,) = tmp_path.glob('*/vis_data/scalars.json')
    first = json.loads(log.read_text().splitlines()[0])
    cfg = Config.fromfile(SEGMENTATION)
    # 2 images a step where the rates are for 16, at the start of the warm-up
    expected = cfg.optim_wrapper.optimizer.lr * cfg.param_scheduler[0].start_factor * 2 / 4
    assert first['lr'] == pytest.approx(expected)


@pytest.mark.parametrize('given', ['', 'auto_scale_lr = None'])
def test_a_learning_rate_without_a_batch_size(stock, given):
    with pytest.raises(UserError, match='needs auto_scale_lr.base_batch_size'):
        train(stock('mmseg', given), auto_scale_lr=True)


def test_loaders_without_workers(stock, tmp_path, capsys):
    lines = 'train_dataloader = dict(persistent_workers=True, prefetch_factor=2)'
    options = {'train_cfg.max_iters': 1}
    train(stock('mmseg', lines), work_dir=str(tmp_path), cfg_options=options)
    printed = capsys.readouterr().out
    assert 'train_dataloader has num_workers=0, so its persistent_workers and' in printed


def test_what_a_run_needs(stock):
    with pytest.raises(UserError, match='has no train_cfg, optim_wrapper; add'):
        train(stock('mmseg', drop=['optim_wrapper', 'train_cfg']))


def test_data_that_is_not_there(stock, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='images/training does not exist'):
        train(stock('mmseg'))
    with pytest.raises(FileNotFoundError):
        train(stock('mmseg'), skip_checks=True)
