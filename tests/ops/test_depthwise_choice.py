"""The choice between cuDNN and Triton on a GPU, with timings that are made up."""

import logging

import pytest
import torch

from overlock_mm.ops import depthwise_choice, depthwise_triton, set_depthwise_backend
from overlock_mm.ops.depthwise_choice import choose


@pytest.fixture
def gpu(monkeypatch):
    """As on a GPU; what is timed is recorded, and its seconds can be set by name."""
    seconds, timed = dict(cudnn=2.0, forward=1.0, weight_grad=3.0), []

    def measure(run, args):
        timed.append(run.__name__)
        if isinstance(seconds[run.__name__], Exception):
            raise seconds[run.__name__]
        return seconds[run.__name__]

    monkeypatch.setattr(depthwise_choice, '_triton_is_faster', {})
    monkeypatch.setattr(depthwise_choice, '_seconds', measure)
    monkeypatch.setattr(depthwise_triton, 'unsupported', lambda *_: None)
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    monkeypatch.delenv('OVERLOCK_MM_DEPTHWISE', raising=False)
    yield seconds, timed
    set_depthwise_backend(None)


def cudnn():
    pass


def chosen(*shape, name='forward', kernel=7, dilation=1, dtype=torch.float32):
    x = torch.empty(*(shape or (1, 8, 32, 32)), dtype=dtype, device='meta')
    weight = torch.empty(x.shape[1], 1, kernel, kernel, dtype=dtype, device='meta')
    found = choose(name, cudnn, (x, weight, dilation), weight, dilation)
    return 'cudnn' if found is cudnn else 'triton'


def test_the_faster_one_is_chosen_and_timed_once(gpu):
    _, timed = gpu
    assert [chosen(), chosen()] == ['triton', 'triton']
    assert timed == ['forward', 'cudnn']
    assert chosen(name='weight_grad') == 'cudnn' and len(timed) == 4


def test_sizes_of_an_octave_are_one_kind(gpu):
    """Multi-scale training has hundreds of sizes, and few kinds."""
    _, timed = gpu
    sizes = [(2, 8, h, w) for h in range(100, 168, 4) for w in range(100, 168, 4)]
    for size in sizes:
        chosen(*size)
    assert len(timed) == 2 * 2  # 20000 to 55778 positions: two octaves
    for other in (
        dict(kernel=9),
        dict(dilation=2),
        dict(dtype=torch.float16),
        dict(name='weight_grad'),
    ):
        chosen(*sizes[0], **other)
    chosen(2, 16, 100, 100)
    assert len(timed) == 2 * (2 + 5)


def test_what_is_asked_for_is_not_timed(gpu, monkeypatch):
    _, timed = gpu
    assert set_depthwise_backend('cudnn') is None and chosen() == 'cudnn'
    assert set_depthwise_backend('triton') == 'cudnn' and chosen() == 'triton'
    set_depthwise_backend(None)
    monkeypatch.setenv('OVERLOCK_MM_DEPTHWISE', 'cudnn')
    assert chosen() == 'cudnn' and not timed
    set_depthwise_backend('auto')  # before the variable
    assert chosen() == 'triton' and timed


def test_backends_that_are_unknown_or_cannot_run(gpu, monkeypatch):
    with pytest.raises(ValueError, match="'cuda' is not one of auto, cudnn, triton"):
        set_depthwise_backend('cuda')
    monkeypatch.setenv('OVERLOCK_MM_DEPTHWISE', 'cuda')
    with pytest.raises(ValueError, match="OVERLOCK_MM_DEPTHWISE: 'cuda' is not one of"):
        chosen()
    monkeypatch.setattr(depthwise_triton, 'unsupported', lambda *_: 'too old')
    set_depthwise_backend('triton')
    with pytest.raises(RuntimeError, match=r"'triton' \(set_.*\) cannot run: too old"):
        chosen()
    set_depthwise_backend('auto')
    assert chosen() == 'cudnn'


def test_a_kernel_that_fails(gpu):
    """What a compiler or a driver raises is a warning, and what a bug raises an error."""
    seconds, timed = gpu
    seconds['forward'] = RuntimeError('out of shared memory')
    with pytest.warns(UserWarning, match='Triton failed.*forward.*out of shared memory'):
        assert chosen() == 'cudnn'
    assert chosen() == 'cudnn' and timed == ['forward']
    seconds['weight_grad'] = TypeError('a bug')
    with pytest.raises(TypeError, match='a bug'):
        chosen(name='weight_grad')


def test_nothing_is_timed_in_a_cuda_graph_or_beyond_the_limit(gpu, monkeypatch):
    _, timed = gpu
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
    assert chosen() == 'cudnn' and not timed
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    monkeypatch.setattr(depthwise_choice, '_LIMIT', 1)
    assert chosen() == 'triton'
    assert chosen(1, 16, 8, 8) == 'cudnn' and len(timed) == 2
    assert chosen() == 'triton'


def test_it_is_logged_once(gpu, caplog):
    with caplog.at_level(logging.INFO, 'overlock_mm'):
        chosen()
        chosen(1, 16, 8, 8)
    (record,) = caplog.records
    assert 'OVERLOCK_MM_DEPTHWISE=cudnn or triton fixes the choice' in record.getMessage()
