"""mmengine's runners with weights that must fit, read without running code."""

import logging
from pathlib import Path

import pytest
import torch
from helpers import Segmentor, changed
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import HOOKS
from mmengine.runner import CheckpointLoader, Runner
from mmengine.runner._flexible_runner import FlexibleRunner
from torch import nn

from overlock_mm.errors import CheckpointError
from overlock_mm.hooks import StrictLoadingHook


class Untouched:
    """Nothing that a file of weights needs, and not on any list."""


def runner(folder, model, load_from, hooks=None, **options):
    loading = dict(type='StrictLoadingHook', **options)
    return Runner(
        model,
        str(folder),
        load_from=str(load_from),
        default_hooks=dict(loading=loading),
        custom_hooks=hooks,
        cfg=Config(),
    )


def load(folder, model, load_from, resume=False, **options):
    loading = runner(folder, model, load_from, **options)
    loading._resume = resume
    loading.call_hook('before_run')
    loading.load_or_resume()
    return loading


@pytest.fixture
def file(tmp_path):
    source = changed(Segmentor())
    torch.save(dict(meta={}, state_dict=source.state_dict()), tmp_path / 'w.pth')
    return source, tmp_path / 'w.pth'


def test_it_is_registered():
    assert HOOKS.get('StrictLoadingHook') is StrictLoadingHook


def test_load_from(file, tmp_path):
    source, path = file
    model = Segmentor()
    load(tmp_path, model, path)
    torch.testing.assert_close(model.state_dict(), source.state_dict(), rtol=0, atol=0)


def test_what_does_not_fit(file, tmp_path):
    """Where mmengine's runner goes on."""
    _, path = file
    model = Segmentor(context_skip=True)
    with pytest.raises(
        CheckpointError, match='h_proj.*context_skip=False.*default_hooks.loading'
    ):
        load(tmp_path, model, path)
    Runner(model, str(tmp_path), load_from=str(path), cfg=Config()).load_or_resume()


def test_options(file, tmp_path):
    _, path = file
    model = Segmentor(classes=7)
    before = model.decode_head.weight.clone()
    with pytest.raises(CheckpointError, match='ignore_mismatched'):
        load(tmp_path, model, path)
    options = dict(ignore_mismatched=['decode_head'])
    load(tmp_path, model, path, **options)
    assert torch.equal(model.decode_head.weight, before)
    # a training that is resumed has the same model, whatever it started from
    with pytest.raises(CheckpointError, match='have another shape: decode_head'):
        load(tmp_path, model, path, resume=True, **options)


def test_trust(file, tmp_path):
    source, path = file
    torch.save(dict(state_dict=source.state_dict(), extra=Untouched()), path)
    with pytest.raises(
        CheckpointError, match='Untouched.*trust=True.*default_hooks.loading'
    ):
        load(tmp_path, Segmentor(), path)
    load(tmp_path, Segmentor(), path, trust=True)


def test_weights_alone_cannot_be_resumed(file, tmp_path):
    source, path = file
    torch.save(source.state_dict(), path)
    with pytest.raises(CheckpointError, match='has no state of a training by mmengine'):
        load(tmp_path, Segmentor(), path, resume=True)


def test_averaged_weights_start_from_the_file(file, tmp_path):
    source, path = file
    model = Segmentor()
    loaded = load(tmp_path, model, path, hooks=[dict(type='EMAHook')])
    (ema,) = (h for h in loaded.hooks if type(h).__name__ == 'EMAHook')
    averaged = ema.ema_model.module.state_dict()
    torch.testing.assert_close(averaged, source.state_dict(), rtol=0, atol=0)


def test_augmented_models(file, tmp_path):
    """The model to load is inside another."""
    source, path = file
    model = nn.Module()
    model.module = Segmentor()
    load(tmp_path, model, path)
    assert torch.equal(model.module.decode_head.weight, source.decode_head.weight)
    with pytest.raises(CheckpointError, match='h_proj'):
        model.module = Segmentor(context_skip=True)
        load(tmp_path, model, path)


def test_an_overlock_elsewhere_is_reported(file, tmp_path):
    _, path = file
    model = nn.Module()
    model.student = Segmentor()
    started = runner(tmp_path, model, path)
    messages, handler = [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    started.logger.addHandler(handler)
    started.load_or_resume()
    assert any('not its backbone' in text for text in messages)


def test_other_models_load_as_in_mmengine(tmp_path):
    torch.save(dict(state_dict=dict(weight=torch.ones(1, 1))), tmp_path / 'w.pth')
    model = nn.Linear(1, 1)
    load(tmp_path, model, tmp_path / 'w.pth')
    assert model.weight.item() == 1


class Trained(BaseModel):
    """As a segmentor of the toolboxes, but with one image and a plain loss."""

    def __init__(self, **kwargs):
        super().__init__()
        inner = Segmentor(**kwargs)
        self.backbone, self.decode_head = inner.backbone, inner.decode_head

    def forward(self, inputs, mode='loss'):
        return dict(loss=self.decode_head(self.backbone(inputs)[3]).square().mean())


class Images(torch.utils.data.Dataset):
    metainfo = {}

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((3, 32, 32), index / 8)


def train(kind, folder, model, iters=1, **options):
    """Train for some iterations with one of mmengine's runners."""
    loader = dict(
        dataset=Images(),
        sampler=dict(type='DefaultSampler', shuffle=False),
        batch_size=2,
        collate_fn=lambda batch: dict(inputs=torch.stack(batch)),
    )
    hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1, by_epoch=False))
    loading = options.pop('loading', {})
    if loading is not None:
        hooks['loading'] = dict(type='StrictLoadingHook', **loading)
    started = kind(
        model,
        work_dir=str(folder),
        train_dataloader=loader,
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=iters),
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3)),
        param_scheduler=dict(type='OneCycleLR', eta_max=0.1, total_steps=4, by_epoch=False),
        default_hooks=hooks,
        cfg=Config(dict(a=1)),
        **options,
    )
    started.train()
    return started


RUNNERS = pytest.mark.parametrize('kind', [Runner, FlexibleRunner])


@RUNNERS
def test_both_runners_are_strict(tmp_path, kind):
    path, source = tmp_path / 'w.pth', changed(Trained())
    state = source.state_dict()
    torch.save(dict(state_dict=state), path)
    model = Trained()
    rest = dict(load_from=str(path))
    train(kind, tmp_path, model, iters=1, **rest)
    moved = (model.decode_head.weight - source.decode_head.weight).abs().max()
    assert moved < 0.2  # one small step from the file, which is 1 from the model
    missing = {k: v for k, v in state.items() if k != 'backbone.blocks3.0.dwconv.bias'}
    torch.save(dict(state_dict=missing), path)
    with pytest.raises(CheckpointError, match='1 key is missing.*default_hooks.loading'):
        train(kind, tmp_path, Trained(), **rest)
    loading = dict(ignore_mismatched=['decode_head'], strict=False)
    train(kind, tmp_path, Trained(classes=5), loading=loading, **rest)


class Touches:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@RUNNERS
@pytest.mark.parametrize('resume', [False, True])
def test_both_runners_read_safely(tmp_path, kind, resume):
    path, mark = tmp_path / 'w.pth', tmp_path / 'mark'
    content = dict(state_dict=Trained().state_dict(), extra=Touches(mark))
    content.update(meta=dict(epoch=0, iter=1), message_hub={})
    torch.save(content, path)
    rest = dict(load_from=str(path), resume=resume)
    with pytest.raises(CheckpointError, match='holds pathlib.*default_hooks.loading'):
        train(kind, tmp_path, Trained(), **rest)
    assert not mark.exists()
    if not resume:
        train(kind, tmp_path, Trained(), loading=dict(trust=True), **rest)
        assert mark.exists()


@RUNNERS
def test_both_runners_resume(tmp_path, kind):
    torch.manual_seed(0)
    whole = train(kind, tmp_path / 'whole', Trained(), iters=2)
    file = tmp_path / 'whole/iter_1.pth'
    content = torch.load(file, weights_only=False)
    # the text of a config, as MMDetection 2.x kept it, would be executed by mmengine
    mark = tmp_path / 'mark'
    content['meta']['config'] = f'import pathlib\npathlib.Path({str(mark)!r}).touch()\n'
    torch.save(content, file)
    rest = dict(load_from=str(file), resume=True)
    resumed = train(kind, tmp_path / 'resumed', changed(Trained()), iters=2, **rest)
    assert not mark.exists() and resumed.iter == 2
    torch.testing.assert_close(
        resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0
    )


def test_weights_that_mmengine_has_downloaded(file, tmp_path, monkeypatch):
    """They are used where there is no network; of another place, the error has the URL."""
    source, path = file
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    (tmp_path / 'hub/checkpoints').mkdir(parents=True)
    url = 'http://127.0.0.1:9/weights.pth'
    with pytest.raises(CheckpointError, match=f'{url} cannot be downloaded'):
        load(tmp_path, Segmentor(), url)
    path.rename(tmp_path / 'hub/checkpoints/weights.pth')
    model = Segmentor()
    load(tmp_path, model, url)
    assert torch.equal(model.decode_head.weight, source.decode_head.weight)


def test_other_storage_stays_with_mmengine():
    StrictLoadingHook()
    for path, ours in (('a.pth', True), ('https://a/b.pth', True), ('s3://a/b', False)):
        loader = CheckpointLoader._get_checkpoint_loader(path)
        assert (loader.__name__ == 'load_from_file') == ours
