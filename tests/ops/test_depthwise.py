"""Depth-wise convolutions against torch's own in float64."""

import pytest
import torch
import torch.nn.functional as F
from helpers import compiled
from torch import nn

from overlock_mm.models.layers import DILATED_BRANCHES
from overlock_mm.ops import depthwise
from overlock_mm.ops.depthwise import DepthwiseConv2d, depthwise_conv2d

CASES = [(k, 1) for k in (3, *DILATED_BRANCHES)] + sorted(
    {branch for branches in DILATED_BRANCHES.values() for branch in branches}
)


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def plain(x, weight, bias, dilation):
    padding = dilation * (weight.shape[-1] // 2)
    return F.conv2d(x, weight, bias, 1, padding, dilation, weight.shape[0])


def results(op, tensors, dilation, dtype):
    tensors = [t.to(dtype).requires_grad_() for t in tensors]
    out = op(*tensors, dilation)
    return out, *torch.autograd.grad(
        (out * rand(*out.shape, seed=9).to(dtype)).sum(), tensors
    )


def worst_error(got, exact):
    return max(
        ((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True)
    )


@pytest.mark.parametrize(
    'memory_format', [torch.contiguous_format, torch.channels_last], ids=['NCHW', 'NHWC']
)
@pytest.mark.parametrize('k, dilation', CASES)
def test_equals_torch(k, dilation, memory_format):
    x = rand(2, 20, 19, 23).contiguous(memory_format=memory_format)
    tensors = x, rand(20, 1, k, k, seed=1), rand(20, seed=2)
    exact = results(plain, tensors, dilation, torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        got = results(depthwise_conv2d, tensors, dilation, dtype)
        assert [t.shape for t in got] == [t.shape for t in exact]
        assert all(t.dtype == dtype for t in got)
        assert worst_error(got, exact) < tolerance


@pytest.mark.parametrize('k, dilation', [(17, 1), (9, 2), (3, 7)])
def test_bfloat16(k, dilation):
    tensors = rand(1, 16, 24, 24), rand(16, 1, k, k, seed=1), rand(16, seed=2)
    tensors = [t.bfloat16().double() for t in tensors]
    exact = results(plain, tensors, dilation, torch.float64)
    assert (
        worst_error(results(depthwise_conv2d, tensors, dilation, torch.bfloat16), exact)
        < 0.02
    )


def test_smaller_than_the_kernel_and_empty():
    weight = rand(4, 1, 17, 17, seed=1)
    for shape in ((1, 4, 3, 5), (0, 4, 9, 9)):
        tensors = rand(*shape), weight, rand(4, seed=2)
        exact = results(plain, tensors, 1, torch.float64)
        got = results(depthwise_conv2d, tensors, 1, torch.float32)
        torch.testing.assert_close(got, exact, check_dtype=False, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('positions', [1, 60, 100])
def test_weight_gradient_of_a_map_in_pieces(positions, monkeypatch):
    monkeypatch.setattr(depthwise, '_POSITIONS', positions)
    tensors = rand(2, 8, 21, 20), rand(8, 1, 7, 7, seed=1), rand(8, seed=2)
    for dilation in (1, 2):
        exact = results(plain, tensors, dilation, torch.float64)
        assert (
            worst_error(results(depthwise_conv2d, tensors, dilation, torch.float32), exact)
            < 1e-5
        )


def test_the_weight_gradient_is_a_convolution():
    """torch's weight gradient, which is slow, is not what runs."""
    x, conv = torch.randn(1, 8, 20, 20, requires_grad=True), DepthwiseConv2d(8, 13)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU]
    ) as profile:
        conv(x).sum().backward()
    assert 'aten::convolution_backward' not in {e.key for e in profile.key_averages()}


def test_autocast():
    conv, x = DepthwiseConv2d(8, 7), torch.randn(1, 8, 20, 20)
    with torch.autocast('cpu', torch.bfloat16):
        out, expected = conv(x), nn.Conv2d.forward(conv, x)
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)
    out.sum().backward()
    assert conv.weight.grad.dtype == torch.float32


def test_is_a_conv2d():
    conv, stock = (
        DepthwiseConv2d(6, 5, 2),
        nn.Conv2d(6, 6, 5, padding=4, dilation=2, groups=6),
    )
    stock.load_state_dict(conv.state_dict())
    x = torch.randn(2, 6, 13, 12)
    torch.testing.assert_close(conv(x), stock(x))


def test_compiles_without_graph_breaks():
    conv, x = DepthwiseConv2d(8, 9), torch.randn(1, 8, 16, 16)
    torch.testing.assert_close(compiled(conv)(x), conv(x))


@pytest.mark.parametrize('k, dilation', [(7, 1), (3, 3)])
def test_second_derivatives(k, dilation):
    """The fast kernels are for single precision: compare with torch in double."""

    def second(convolution, dtype):
        tensors = rand(2, 4, 9, 8), rand(4, 1, k, k, seed=1), rand(4, seed=2)
        tensors = [t.to(dtype).requires_grad_() for t in tensors]
        out = convolution(*tensors, dilation)
        grads = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)

    exact = second(plain, torch.float64)
    assert worst_error(second(depthwise_conv2d, torch.float32), exact) < 1e-5


def test_second_derivatives_under_autocast():
    """The backward pass computes in the dtypes of the forward pass."""
    conv, x = DepthwiseConv2d(4, 7), torch.randn(1, 4, 9, 9, requires_grad=True)
    with torch.autocast('cpu', torch.bfloat16):
        out = conv(x).square().sum()
        (grad,) = torch.autograd.grad(out, x, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), x)
    (needed,) = torch.autograd.grad(conv.double()(x.double()).square().sum(), x)
    assert (grad - needed).norm() / needed.norm() < 0.02
    assert second.isfinite().all() and second.any()


def test_torch_func():
    conv, x = DepthwiseConv2d(4, 7), torch.randn(3, 4, 9, 9)
    stock = nn.Conv2d(4, 4, 7, padding=3, groups=4)
    stock.load_state_dict(conv.state_dict())

    def gradients(module):
        def loss(parameters, x):
            out = torch.func.functional_call(module, parameters, (x[None],))
            return out.square().sum()

        parameters = dict(module.named_parameters())
        return torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)

    torch.testing.assert_close(gradients(conv), gradients(stock), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        torch.func.jvp(conv, (x,), (x,)), torch.func.jvp(stock, (x,), (x,))
    )


def test_traces_and_saves(tmp_path):
    conv, x = DepthwiseConv2d(4, 7), torch.randn(1, 4, 9, 9)
    torch.jit.trace(conv, x).save(tmp_path / 'conv.pt')
    torch.testing.assert_close(torch.jit.load(tmp_path / 'conv.pt')(x), conv(x))
