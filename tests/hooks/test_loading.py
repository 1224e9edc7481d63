"""mmengine's Runner with weights that must fit."""

import logging

import pytest
import torch
from helpers import Segmentor, changed
from mmengine.config import Config
from mmengine.registry import HOOKS
from mmengine.runner import Runner
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
