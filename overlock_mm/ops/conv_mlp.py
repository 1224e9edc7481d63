"""The MLP of OverLoCK's blocks for training: it keeps one of its hidden maps, not four."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .grn import channel_norms, plain_grn, relative_norms, scale_gradients
from .modes import autocast_dtype, differentiable_gradients, without_autocast
from .pointwise import pointwise_conv2d

_convolution_backward = torch.ops.aten.convolution_backward


def conv_mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    depthwise: Tensor,
    depthwise_bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
    approximate: str = 'none',
) -> Tensor:
    """Pointwise convolution, GELU, residual depth-wise convolution, GRN and a second one.

    For the backward pass the input and the map in front of GELU are kept; the maps behind
    it are made again. GRN's scale goes through the weight of the second convolution, whose
    gradient has all that the gradient of the scale needs: GRN has no pass of its own over
    the map but that of its norms.

    Args:
        x: ``(N, C, H, W)``.
        weight1: ``(I, C, 1, 1)`` with I hidden channels.
        bias1: ``(I,)``.
        depthwise: kernel of the depth-wise convolution, ``(I, 1, 3, 3)``.
        depthwise_bias: ``(I,)``.
        gamma: of GRN, ``(1, I, 1, 1)``.
        beta: of GRN, ``(1, I, 1, 1)``.
        weight2: ``(O, I, 1, 1)``.
        bias2: ``(O,)``.
        eps: of GRN.
        approximate: of GELU.

    Returns:
        ``(N, O, H, W)``, in the dtype of ``x`` or, under autocast, in that of autocast.
    """
    tensors = x, weight1, bias1, depthwise, depthwise_bias, gamma, beta, weight2, bias2
    device = x.device.type
    dtype = autocast_dtype(device)
    if dtype is None:
        return _ConvMlp.apply(*tensors, eps, approximate)
    tensors = [t if t is gamma or t is beta else t.to(dtype) for t in tensors]
    with without_autocast(device):
        return _ConvMlp.apply(*tensors, eps, approximate)


def _plain(x, w1, b1, wd, bd, gamma, beta, w2, b2, eps, approximate):
    """:func:`conv_mlp` in differentiable operations."""
    hidden = F.gelu(F.conv2d(x, w1, b1), approximate=approximate)
    hidden = hidden + F.conv2d(hidden, wd, bd, padding=1, groups=len(wd))
    return F.conv2d(plain_grn(hidden, gamma, beta, eps), w2, b2)


class _ConvMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, b1, wd, bd, gamma, beta, w2, b2, eps, approximate):
        hidden = pointwise_conv2d(x, w1, b1)
        mixed = _mixed(F.gelu(hidden, approximate=approximate), wd, bd)
        norms = channel_norms(mixed)
        ratio, mean = relative_norms(norms, eps)
        scale = gamma * ratio + 1
        ctx.save_for_backward(
            x, w1, b1, wd, bd, gamma, beta, w2, b2, hidden, scale, norms, mean
        )
        ctx.eps, ctx.approximate = eps, approximate
        if len(x) == 1:  # scale the weight, not the map
            shift = F.conv2d(beta.to(w2.dtype), w2, b2).flatten()
            return pointwise_conv2d(mixed, w2 * scale.to(w2.dtype), shift)
        scale, beta = scale.to(mixed.dtype), beta.to(mixed.dtype)
        return pointwise_conv2d(torch.addcmul(beta, mixed, scale, out=mixed), w2, b2)

    @staticmethod
    def backward(ctx, grad):
        *inputs, hidden, scale, norms, mean = ctx.saved_tensors
        x, w1, _, wd, bd, gamma, beta, w2, b2 = inputs
        if torch.is_grad_enabled():
            mlp = partial(_plain, eps=ctx.eps, approximate=ctx.approximate)
            return *differentiable_gradients(mlp, tuple(inputs), grad), None, None
        active = F.gelu(hidden, approximate=ctx.approximate)
        mixed = _mixed(active, wd, bd)

        # second convolution: the products of its input, without GRN, with its gradient
        products = [_weight_gradient(m, g, w2) for m, g in _images(mixed, grad)]
        sums = grad.sum((2, 3), dtype=norms.dtype)[:, :, None, None]  # (N, O, 1, 1)
        grad_b2 = sums.sum(0).flatten()
        products = torch.stack(products).to(norms.dtype)  # (N, O, I, 1, 1)
        grad_w2 = (products * scale[:, None]).sum(0) + sums.sum(0)[:, None] * beta

        # GRN
        wide = w2.to(norms.dtype)
        grad_scale = (products * wide).sum(1)
        grad_beta = (sums.sum(0)[:, None] * wide).sum(0)[None]
        grad_gamma, per_mixed = scale_gradients(grad_scale, gamma, norms, mean)
        scale, per_mixed = scale.to(grad.dtype), per_mixed.to(grad.dtype)
        if len(x) == 1:
            grad = pointwise_conv2d(grad, (w2 * scale.to(w2.dtype)).transpose(0, 1))
        else:
            grad = pointwise_conv2d(grad, w2.transpose(0, 1)).mul_(scale)
        grad.addcmul_(mixed, per_mixed)
        del mixed

        grad, grad_wd, grad_bd = _backward(grad, active, _with_shortcut(wd), len(wd))
        del active
        grad = torch.ops.aten.gelu_backward(grad, hidden, approximate=ctx.approximate)
        needs_x = ctx.needs_input_grad[0]
        grad_x, grad_w1, grad_b1 = _backward(grad, x, w1, 1, needs_x)
        of_grn = grad_gamma.to(gamma.dtype), grad_beta.to(beta.dtype)
        last = grad_w2.to(w2.dtype), grad_b2.to(b2.dtype)
        return grad_x, grad_w1, grad_b1, grad_wd, grad_bd, *of_grn, *last, None, None


def _mixed(x, weight, bias):
    return F.conv2d(x, _with_shortcut(weight), bias, padding=1, groups=len(weight))


def _with_shortcut(weight):
    """The depth-wise kernel, 3x3, that also adds its input."""
    weight = weight.clone()
    weight[:, :, 1, 1] += 1
    return weight


def _images(*maps):
    return zip(*(m.split(1) for m in maps), strict=True)


def _weight_gradient(x, grad, weight):
    nothing = [0, 0]
    mask = False, True, False
    return _convolution_backward(
        grad, x, weight, None, [1, 1], nothing, [1, 1], False, nothing, 1, mask
    )[1]


def _backward(grad, x, weight, groups, needs_x=True):
    """Gradients of the input, the weight and the bias of a "same" convolution."""
    padding = [weight.shape[-1] // 2] * 2
    bias, mask = [len(weight)], (needs_x, True, True)
    return _convolution_backward(
        grad, x, weight, bias, [1, 1], padding, [1, 1], False, [0, 0], groups, mask
    )
