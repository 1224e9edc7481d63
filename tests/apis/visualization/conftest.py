"""Checkpoints of the small configs, and the command in this process."""

import sys

import pytest
import torch
from helpers import randomised
from mmengine.config import Config

from overlock_mm import cli
from overlock_mm.config.load import build_model, load_config


@pytest.fixture(scope='session')
def weights(configs, tmp_path_factory):
    """The file of random weights for one of the fixture ``configs``."""
    folder, made = tmp_path_factory.mktemp('weights'), {}

    def weights(name):
        if name not in made:
            torch.manual_seed(0)
            cfg = load_config(configs / f'{name}.py')
            model = randomised(build_model(cfg))
            made[name] = folder / f'{name}.pth'
            torch.save(dict(state_dict=model.state_dict()), made[name])
        return made[name]

    return weights


@pytest.fixture
def photo(demo_data):
    return min((demo_data / 'data/demo/images/validation').iterdir())


@pytest.fixture
def draw(monkeypatch, capsys, tmp_path):
    """Run ``overlock visualize`` in an empty folder: what it printed.

    Of a command that fails, it is the message.
    """
    monkeypatch.chdir(tmp_path)

    def draw(*arguments, status=0):
        monkeypatch.setattr(sys, 'argv', ['overlock', 'visualize', *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code
        printed = capsys.readouterr()
        assert code == status, printed.out[-2000:] + printed.err[-2000:]
        if not status:
            return printed.out
        assert 'Traceback' not in printed.err
        return printed.err.rpartition('error: ')[2]

    return draw


@pytest.fixture
def other_backbone(configs, tmp_path):
    """A small segmentor with a backbone of timm, and its weights."""
    path = tmp_path / 'other.py'
    channels = [64, 128, 256, 512]
    Config.fromfile(configs / 'segmentor.py').dump(path)
    path.write_text(
        path.read_text()
        + f"""
model['backbone'] = dict(type='TimmBackbone', model_name='resnet18')
model['decode_head']['in_channels'] = {channels}
model['auxiliary_head']['in_channels'] = {channels[2]}
"""
    )
    torch.manual_seed(0)
    model = build_model(load_config(path))
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'other.pth')
    return path, tmp_path / 'other.pth'
