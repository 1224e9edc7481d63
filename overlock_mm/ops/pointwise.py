"""Pointwise (1x1) convolution with oneDNN on a single CPU thread, too."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .depthwise import onednn_takes
from .flops import counters
from .modes import autocast_dtype, needs_plain_ops


class PointwiseConv2d(nn.Conv2d):
    """``nn.Conv2d`` with 1x1 filters and stride 1, by :func:`pointwise_conv2d`.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return pointwise_conv2d(x, self.weight, self.bias)


def pointwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a 1x1 convolution; ``F.conv2d(x, weight, bias)``.

    With one thread, torch leaves oneDNN for a matrix product of the BLAS library, which
    took more than twice as long on AMD's CPUs. Here it is oneDNN with any number of
    threads where gradients are not recorded.

    Args:
        x: ``(N, C, H, W)``.
        weight: ``(O, C, 1, 1)``.
        bias: ``(O,)``, or None.

    Returns:
        ``(N, O, H, W)``.
    """
    if (
        not (needs_plain_ops() or counters())
        and x.device.type == 'cpu'
        and x.dtype == weight.dtype == torch.float32
        and torch.get_num_threads() == 1
        and x.numel()
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and autocast_dtype('cpu') is None
        and onednn_takes(x)
    ):
        return torch.mkldnn_convolution(x, weight, bias, (0, 0), (1, 1), (1, 1), 1)
    return F.conv2d(x, weight, bias)
