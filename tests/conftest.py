"""Small inputs that several test files share."""

import logging
import os
import sys
from pathlib import Path

import pytest
import torch
from mmengine.logging import MMLogger

if not torch.cuda.is_available():
    # before anything imports triton: its kernels then run on the CPU
    os.environ['TRITON_INTERPRET'] = '1'

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='session')
def demo_data(tmp_path_factory):
    """A small demo data set: (a folder to run in, with data/demo below it)."""
    from overlock_mm.demo_data import make_demo_data

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


def tool(name):
    """The command line of a tool, to extend with its arguments; it runs on the CPU."""
    hidden = ['env', 'CUDA_VISIBLE_DEVICES=']
    return [*hidden, sys.executable, str(ROOT / 'tools' / name)]
