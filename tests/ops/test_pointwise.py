"""Pointwise convolutions: oneDNN's results are torch's, and where it is used."""

import pytest
import torch
import torch.nn.functional as F
from helpers import image

from overlock_mm.ops import pointwise
from overlock_mm.ops.pointwise import PointwiseConv2d, pointwise_conv2d


@pytest.fixture
def calls(monkeypatch):
    """Calls of oneDNN, with one thread."""
    found, threads = [], torch.get_num_threads()

    def convolve(*args):
        found.append(args)
        return onednn(*args)

    onednn = torch.mkldnn_convolution
    monkeypatch.setattr(torch, 'mkldnn_convolution', convolve)
    torch.set_num_threads(1)
    yield found
    torch.set_num_threads(threads)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('images', [0, 1, 3])
def test_results_are_those_of_torch(calls, images, bias, memory_format):
    x = image(images, 6, 5, 7).contiguous(memory_format=memory_format)
    weight, bias = image(4, 6, 1, 1), image(4) if bias else None
    expected = F.conv2d(x, weight, bias)
    found = pointwise_conv2d(x, weight, bias)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.stride() == expected.stride()
    if pointwise.onednn_takes(x):
        assert len(calls) == (images > 0)


def test_where_torch_is_asked(calls):
    """For gradients, other dtypes, autocast, several threads and programs."""
    conv, x = PointwiseConv2d(6, 4), image(1, 6, 5, 7)
    conv(x).sum().backward()
    assert conv.weight.grad is not None
    with torch.no_grad():
        conv(x.double().float())
        used = len(calls)
        conv.double()(x.double())
        conv.float()
        with torch.autocast('cpu', torch.bfloat16):
            assert conv(x).dtype == torch.bfloat16
        torch.jit.trace(conv, x, check_trace=False)
        torch.export.export(conv, (x,))
        torch.set_num_threads(2)
        conv(x)
    assert len(calls) == used == (1 if pointwise.onednn_takes(x) else 0)
