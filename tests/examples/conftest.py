"""An exported model with what it should predict, and Python without torch."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, SEGMENTATION, randomised

from overlock_mm import OverLoCK, Predictor
from overlock_mm.apis.export import export
from overlock_mm.config.load import build_model, load_config

SCALE = 320, 240  # images of this size are not resized
_BLOCKED = 'torch', 'torchvision', 'cv2', 'onnx', 'mmcv', 'mmengine', 'overlock_mm'
_WITHOUT_THEM = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({_BLOCKED}))
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.fixture(scope='session')
def arch():
    """As small as it can be: most of the time of an export is the number of layers."""
    return dict(
        depths=(1, 1, 1, 1),
        focus_depths=(1, 1),
        embed_dims=(8, 16, 32, 32),
        kernel_sizes=(5, 5, 5, 5),
        focus_heads=(2, 2),
    )


@pytest.fixture(scope='session')
def segmentor(arch, tmp_path_factory):
    """Config and checkpoint of a segmentor that resizes images to ``SCALE``."""
    folder = tmp_path_factory.mktemp('segmentor')
    config, checkpoint = folder / 'segmentor.py', folder / 'segmentor.pth'
    config.write_text(f"""
_base_ = {str(SEGMENTATION)!r}
model = dict(
    backbone=dict(arch=dict(_delete_=True, **{arch})),
    decode_head=dict(in_channels={list(OverLoCK.channels_of(arch))}, channels=16),
    auxiliary_head=None)
test_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='Resize', scale={SCALE}, keep_ratio=True),
    dict(type='PackSegInputs')]
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
""")
    cfg = load_config(config)
    torch.manual_seed(0)
    model = build_model(cfg)
    model.init_weights()
    meta = dict(dataset_meta=dict(cfg.metainfo))
    state = randomised(model).state_dict()
    torch.save(dict(state_dict=state, meta=meta), checkpoint)
    return config, checkpoint


@pytest.fixture(scope='session')
def predictor(segmentor):
    return Predictor(*segmentor, 'cpu')


@pytest.fixture(scope='session')
def model(segmentor, tmp_path_factory):
    """An ONNX file for images of any size."""
    path = tmp_path_factory.mktemp('model') / 'model.onnx'
    export(*segmentor, str(path), dynamic='hw', verify=False)
    return path


@pytest.fixture(scope='session')
def fixed_model(segmentor, tmp_path_factory):
    """An ONNX file for one size, that normalises the images."""
    path = tmp_path_factory.mktemp('model') / 'fixed.onnx'
    export(*segmentor, str(path), shape=SCALE[::-1], with_preprocess=True, verify=False)
    return path


def _runner(*python):
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}

    def run(program, *args, error=''):
        done = subprocess.run(
            [*python, program, *args], env=env, cwd=ROOT, capture_output=True, text=True
        )
        assert bool(done.returncode) == bool(error), done.stderr
        assert error in done.stderr
        return done.stdout

    return run


@pytest.fixture(scope='session')
def run_here():
    """Runs a program with torch and others hidden, and returns what it prints."""
    return _runner(sys.executable, '-c', _WITHOUT_THEM)


@pytest.fixture(
    scope='session', params=['here', pytest.param('venv', marks=pytest.mark.slow)]
)
def run_program(request, run_here, tmp_path_factory):
    """The same, and once more in a new environment with what docs/deployment.md names."""
    if request.param == 'here':
        return run_here
    folder = tmp_path_factory.mktemp('venv')
    subprocess.run([sys.executable, '-m', 'venv', folder], check=True)
    pip = [folder / 'bin/pip', '--disable-pip-version-check', 'install']
    packages = ['onnxruntime', 'numpy', 'pillow']
    subprocess.run([*pip, *packages], check=True, capture_output=True)
    return _runner(folder / 'bin/python')


@pytest.fixture(scope='session')
def photo():
    """Makes images with large and small things in them: (H, W, 3), uint8."""

    def make(height, width):
        random = np.random.default_rng(0)
        image = np.zeros((height, width, 3), np.float64)
        for cells in (2, 6, 20):
            side = -(-max(height, width) // cells)
            values = random.uniform(0, 255, (cells, cells, 3))
            image += values.repeat(side, 0).repeat(side, 1)[:height, :width] / 3
        return image.astype(np.uint8)

    return make
