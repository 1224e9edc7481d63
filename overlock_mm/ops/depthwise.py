"""Depth-wise convolution with fast gradients for large and dilated kernels."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from .depthwise_choice import choose
from .flops import counted_depthwise, counters
from .modes import (
    autocast_dtype,
    differentiable_gradients,
    needs_plain_ops,
    without_autocast,
)

# Positions whose products the CPU's weight gradient sums up at once.
_POSITIONS = 1 << 15


class DepthwiseConv2d(nn.Conv2d):
    """``nn.Conv2d`` with one filter per channel, stride 1 and "same" zero padding.

    Outputs, parameters and state dict are those of ``nn.Conv2d``; the output has the
    shape of the input, ``(N, C, H, W)``. ``depthwise_conv2d`` says what is faster.

    Args:
        dim: number of channels C.
        kernel_size: odd kernel size.
        dilation: distance between taps.
        bias: whether to add a bias.
    """

    def __init__(self, dim: int, kernel_size: int, dilation: int = 1, bias: bool = True):
        super().__init__(
            dim,
            dim,
            kernel_size,
            padding=dilation * (kernel_size // 2),
            dilation=dilation,
            groups=dim,
            bias=bias,
        )

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv2d(x, self.weight, self.bias, self.dilation[0])


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1
) -> Tensor:
    """Apply a depth-wise convolution with stride 1 and "same" zero padding.

    The result is that of ``F.conv2d(..., groups=C)`` up to rounding. Faster algorithms
    than torch's are used where they are known:

    - On the CPU with oneDNN, torch's weight gradient of a large kernel is an order of
      magnitude slower than its forward pass. Here it is one more depth-wise
      convolution: the map is convolved with the gradient as the kernel. The gradient of
      the input is a convolution with the flipped kernel.
    - On a GPU, Triton kernels and cuDNN are timed once for each kind of convolution, and
      the faster one is used from then on: see ``set_depthwise_backend``. With
      ``torch.use_deterministic_algorithms`` it is always cuDNN.

    Args:
        x: input, ``(N, C, H, W)``.
        weight: one kernel per channel, ``(C, 1, k, k)`` with odd k.
        bias: ``(C,)``, or None.
        dilation: distance between taps.

    Returns:
        ``(N, C, H, W)``, in the dtype of ``x`` or, under autocast, in that of autocast.
    """
    device = x.device.type
    dtype = autocast_dtype(device)
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        with without_autocast(device):
            return depthwise_conv2d(x, weight, bias, dilation)
    if needs_plain_ops():
        return _conv(x, weight, bias, dilation)
    if counters():
        tensors = (x, weight) if bias is None else (x, weight, bias)
        return counted_depthwise(partial(_conv, dilation=dilation), *tensors)
    if not _worthwhile(x, weight, dilation):
        return _conv(x, weight, bias, dilation)
    return _Depthwise.apply(x, weight, bias, dilation)


def _conv(x, weight, bias=None, dilation=1):
    padding = [dilation * (k // 2) for k in weight.shape[2:]]
    return F.conv2d(x, weight, bias, 1, padding, dilation, weight.shape[0])


def _worthwhile(x, weight, dilation) -> bool:
    """Return whether this module may have something faster than torch's convolution."""
    k = weight.shape[-1]
    if not x.numel() or (k < 5 and dilation == 1):
        return False
    if x.device.type == 'cpu':
        return onednn_takes(x) and (torch.is_grad_enabled() or _too_sparse(k, dilation))
    return x.device.type == 'cuda' and not torch.are_deterministic_algorithms_enabled()


def onednn_takes(x) -> bool:
    """Return whether oneDNN has fast kernels for ``x``: on x86 with AVX."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and 'AVX' in torch.backends.cpu.get_cpu_capability()
        and x.dtype in (torch.float32, torch.bfloat16)
    )


def _too_sparse(k, dilation) -> bool:
    """Return whether oneDNN is faster with a dense kernel, with zeros between the taps."""
    return dilation > 1 and dilation * (k - 1) >= 16


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, dilation):
        ctx.save_for_backward(x, weight)
        ctx.dilation = dilation
        out = _op('forward', weight, dilation, x, weight, dilation)
        return out if bias is None else out.add_(bias.view(-1, 1, 1))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias, _ = ctx.needs_input_grad
        grad_x = grad_weight = None
        grad_bias = grad.sum((0, 2, 3)) if for_bias else None
        if torch.is_grad_enabled():
            conv = partial(_conv, dilation=ctx.dilation)
            grad_x, grad_weight = differentiable_gradients(conv, (x, weight), grad)
            return grad_x, grad_weight, grad_bias, None
        if for_x:
            grad_x = _op('input_grad', weight, ctx.dilation, grad, weight, ctx.dilation)
        if for_weight:
            k = weight.shape[-1]
            args = x, grad, k, ctx.dilation
            grad_weight = _op('weight_grad', weight, ctx.dilation, *args)
            grad_weight = grad_weight.to(weight.dtype)
        return grad_x, grad_weight, grad_bias, None


def _op(name, weight, dilation, *args):
    if weight.device.type == 'cpu':
        return _ON_CPU[name](*args)
    return choose(name, _BY_TORCH[name], args, weight, dilation)(*args)


def _forward_on_cpu(x, weight, dilation):
    k = weight.shape[-1]
    if _too_sparse(k, dilation):
        dense = weight.new_zeros(*weight.shape[:2], *[dilation * (k - 1) + 1] * 2)
        dense[:, :, ::dilation, ::dilation] = weight
        weight, dilation = dense, 1
    return _conv(x, weight, None, dilation)


def _input_grad_on_cpu(grad, weight, dilation):
    return _forward_on_cpu(grad, weight.flip(2, 3), dilation)


def _weight_grad_on_cpu(x, grad, k, dilation):
    """Convolve the map with the gradient as the kernel; the dilation becomes the stride."""
    channels, height, width = x.shape[1:]
    reach = dilation * (k // 2)
    x = x.contiguous(memory_format=torch.channels_last)
    rows = max(1, _POSITIONS // width)
    pad_rows = reach
    if rows < height:
        x, pad_rows = F.pad(x, (0, 0, reach, reach)), 0
    total = x.new_zeros(channels, 1, k, k, dtype=torch.float32)
    for image, kernel in zip(x.split(1), grad.unsqueeze(2), strict=True):
        for start in range(0, height, rows):
            part = kernel[:, :, start : start + rows]
            halo = (
                image
                if pad_rows
                else image[:, :, start : start + part.shape[2] + 2 * reach]
            )
            taps = F.conv2d(halo, part, None, dilation, (pad_rows, reach), 1, channels)
            total += taps.transpose(0, 1)
    return total


_ON_CPU = {
    'forward': _forward_on_cpu,
    'input_grad': _input_grad_on_cpu,
    'weight_grad': _weight_grad_on_cpu,
}


def _input_grad_by_torch(grad, weight, dilation):
    padding = dilation * (weight.shape[-1] // 2)
    shape, groups = grad.shape, weight.shape[0]
    return conv2d_input(shape, weight, grad, 1, padding, dilation, groups)


def _weight_grad_by_torch(x, grad, k, dilation):
    channels, padding = x.shape[1], dilation * (k // 2)
    return conv2d_weight(x, (channels, 1, k, k), grad, 1, padding, dilation, channels)


_BY_TORCH = {
    'forward': lambda x, weight, dilation: _conv(x, weight, None, dilation),
    'input_grad': _input_grad_by_torch,
    'weight_grad': _weight_grad_by_torch,
}
