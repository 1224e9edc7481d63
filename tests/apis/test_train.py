"""Training as a function, on configs that are not ours."""

import pytest
import torch
from mmengine.config import Config

from overlock_mm import OverLoCK
from overlock_mm.apis.train import train


@pytest.fixture
def cwd(demo_data, monkeypatch):
    monkeypatch.chdir(demo_data)
    return demo_data


@pytest.mark.parametrize('toolbox', ['mmdet', 'mmseg'])
def test_stock_configs(toolbox, stock, cwd, tmp_path):
    runner = train(stock(toolbox), work_dir=str(tmp_path))
    assert isinstance(runner.model.backbone, OverLoCK)
    assert list(tmp_path.glob('*_[12].pth'))
    assert any(type(hook).__name__ == 'StrictLoadingHook' for hook in runner.hooks)
