"""A test with folded weights gives the same predictions."""

import pytest
import torch
from helpers import Segmentor, image
from mmengine.config import Config
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseModel
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from overlock_mm.errors import UserError
from overlock_mm.hooks import FoldHook


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.segmentor = Segmentor()

    def forward(self, inputs, mode='predict'):
        return [self.segmentor.decode_head(self.segmentor.backbone(inputs)[3])]


class Augmented(BaseModel):
    """As mmengine's BaseTTAModel, which holds the model in `module`."""

    def __init__(self):
        super().__init__()
        self.module = Model()

    def forward(self, inputs, mode='predict'):
        return self.module(inputs)


class Keeps:
    """An evaluator that keeps the predictions."""

    dataset_meta = None

    def process(self, data_samples, data_batch=None):
        self.predictions = data_samples

    def evaluate(self, size):
        return {}


class Images(torch.utils.data.Dataset):
    metainfo = {}

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return image(3, 64, 64)


def predict(folder, model, hooks, load_from=None):
    loader = dict(dataset=Images(), sampler=dict(type='DefaultSampler'), batch_size=1)
    loader['collate_fn'] = lambda batch: dict(inputs=torch.stack(batch))
    loop = dict(type='TestLoop', evaluator=Keeps())
    runner = Runner(
        model,
        str(folder),
        test_dataloader=loader,
        test_cfg=loop,
        test_evaluator=[],
        custom_hooks=hooks,
        load_from=load_from and str(load_from),
        cfg=Config(),
    )
    runner.test()
    return runner, runner.test_loop.evaluator.predictions[0]


@pytest.mark.parametrize('make', [Model, Augmented])
def test_fold(tmp_path, make):
    assert HOOKS.get('FoldHook') is FoldHook
    model = make()
    _, expected = predict(tmp_path, model, [])
    names = set(model.state_dict())
    _, found = predict(tmp_path, model, [dict(type='FoldHook')])
    assert any(getattr(m, 'folded', False) for m in model.modules())
    assert set(model.state_dict()) != names
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def scaled(model):
    """The model with other values."""
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            value.mul_(1.1 if value.is_floating_point() else 1)
    return model


class Trained(Hook):
    """Makes the averaged weights differ from the model's, as in a training."""

    priority = 'LOWEST'  # after the EMAHook has copied the model

    def before_run(self, runner):
        (ema,) = (hook for hook in runner.hooks if isinstance(hook, EMAHook))
        scaled(ema.ema_model.module)


@pytest.mark.parametrize('order', [1, -1])
def test_averaged_weights_are_folded(tmp_path, order):
    """Wherever the EMAHook stands in the list."""
    _, expected = predict(tmp_path, scaled(Model()), [])
    hooks = [dict(type='EMAHook', update_buffers=True), dict(type='FoldHook')][::order]
    model = Model()
    _, found = predict(tmp_path, model, [Trained(), *hooks])
    assert model.segmentor.backbone.folded
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    _, plain = predict(tmp_path, Model(), [])
    assert not torch.allclose(plain, expected, rtol=1e-3, atol=1e-3)


def test_a_model_without_overlock(tmp_path):
    class Plain(BaseModel):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 1, 1)

        def forward(self, inputs, mode='predict'):
            return [self.conv(inputs)]

    with pytest.raises(UserError, match='no OverLoCK or ContMixBlock in this Plain'):
        predict(tmp_path, Plain(), [dict(type='FoldHook')])
