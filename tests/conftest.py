"""Small inputs that several test files share."""

import logging
import os
import sys

import pytest
import torch
from mmengine.logging import MMLogger

if not torch.cuda.is_available():
    # before anything imports triton: its kernels then run on the CPU
    os.environ['TRITON_INTERPRET'] = '1'

from helpers import CHANNELS, DETECTION, SEGMENTATION, TINY  # noqa: E402


@pytest.fixture(autouse=True, scope='session')
def _dumps_as_they_are():
    """Do not format configs: it is most of the time of a small run, five times in each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            'yapf.yapflib.yapf_api.FormatCode', lambda text, **options: (text, True)
        )
        yield


class _Stdout:
    """The stdout of the test that runs, not of an earlier one, which may be closed."""

    def write(self, text):
        return sys.stdout.write(text)

    def flush(self):
        sys.stdout.flush()


@pytest.fixture(autouse=True)
def _loggers_outlive_their_test():
    """mmengine's loggers go on writing after the test that made them."""
    yield
    for logger in MMLogger._instance_dict.values():
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler:
                handler.stream = _Stdout()


@pytest.fixture(scope='session')
def demo_data(tmp_path_factory):
    """A small demo data set: (a folder to run in, with data/demo below it)."""
    from overlock_mm.datasets.demo import make_demo_data

    folder = tmp_path_factory.mktemp('demo')
    make_demo_data(folder / 'data' / 'demo', train=6, val=2, size=96)
    return folder


@pytest.fixture
def log(request):
    """What mmengine's logger has printed, as a list of messages."""
    messages, handler = [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = MMLogger.get_instance(request.node.nodeid)  # the current one from here on
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


@pytest.fixture(scope='session')
def configs(tmp_path_factory):
    """The demo configs with a tiny backbone, and nothing random in the segmentor's.

    What is random would differ after resuming: generators are not in a checkpoint.
    """
    folder = tmp_path_factory.mktemp('configs')
    (folder / 'segmentor.py').write_text(f"""
_base_ = {str(SEGMENTATION)!r}
model = dict(
    data_preprocessor=dict(size=(64, 64)),
    backbone=dict(arch=dict(_delete_=True, **{TINY})),
    decode_head=dict(in_channels={CHANNELS}, channels=16, dropout_ratio=0.0),
    auxiliary_head=dict(in_channels={CHANNELS[2]}, channels=16, dropout_ratio=0.0))
train_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),
    dict(type='Resize', scale=(64, 64)), dict(type='PackSegInputs')]
train_dataloader = dict(batch_size=2, dataset=dict(pipeline=train_pipeline))
train_cfg = dict(max_iters=6, val_interval=6)
default_hooks = dict(logger=dict(interval=1),
                     checkpoint=dict(interval=3, max_keep_ckpts=-1))
""")
    (folder / 'averaged.py').write_text(f"""
_base_ = {str(folder / 'segmentor.py')!r}
custom_hooks = [dict(type='EMAHook')]
""")
    (folder / 'detector.py').write_text(f"""
_base_ = {str(DETECTION)!r}
model = dict(
    backbone=dict(arch=dict(_delete_=True, **{TINY})), neck=dict(in_channels={CHANNELS}),
    train_cfg=dict(rpn_proposal=dict(nms_pre=50, max_per_img=50)),
    test_cfg=dict(rpn=dict(nms_pre=50, max_per_img=20), rcnn=dict(score_thr=0.0)))
train_cfg = dict(max_epochs=1, val_interval=1)
""")
    return folder


@pytest.fixture(scope='session')
def models(configs, tmp_path_factory):
    """Config and checkpoint of a tiny segmentor and a tiny detector, by these names."""
    import torch

    from overlock_mm.config.load import build_model, load_config

    folder, found = tmp_path_factory.mktemp('models'), {}
    for name in ('segmentor', 'detector'):
        cfg = load_config(configs / f'{name}.py')
        torch.manual_seed(0)
        model = build_model(cfg)
        model.init_weights()
        meta = dict(dataset_meta=dict(cfg.metainfo))
        torch.save(dict(state_dict=model.state_dict(), meta=meta), folder / f'{name}.pth')
        found[name] = configs / f'{name}.py', folder / f'{name}.pth'
    return found
