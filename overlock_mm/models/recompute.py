"""Activation checkpointing: recompute activations in the backward pass to save memory."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..ops.modes import autocast_dtype, is_compiling


def checkpointed(function: Callable, module: nn.Module, *inputs):
    """Call ``function`` and keep only its inputs for the backward pass.

    Args:
        function: what to call.
        module: its module. The recomputation leaves the running statistics of its batch
            norms as they are.
        *inputs: arguments of ``function``.
    """
    if is_compiling():
        # the compiler updates the running statistics once by itself, and takes no
        # context_fn
        return checkpoint(function, *inputs, use_reentrant=False)
    return checkpoint(
        function,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _StatisticsKept(module)),
    )


class _StatisticsKept:
    """Let a recomputation update copies of the running statistics, not them again.

    A context that can be entered again, for a second backward pass.
    """

    def __init__(self, module: nn.Module):
        self.norms = [
            m for m in module.modules() if isinstance(m, _BatchNorm) and m.training
        ]

    def __enter__(self):
        self.kept = [dict(norm._buffers) for norm in self.norms]
        for norm, buffers in zip(self.norms, self.kept, strict=True):
            norm._buffers.update(
                {k: v.clone() for k, v in buffers.items() if v is not None}
            )

    def __exit__(self, *error):
        for norm, buffers in zip(self.norms, self.kept, strict=True):
            norm._buffers.update(buffers)


def without_input(layer: nn.Module, after: nn.Module, x: Tensor) -> Tensor:
    """``after(layer(x))``, where ``after`` does not keep its input for the backward pass.

    The backward pass makes it again of ``x``, which is kept once, for all layers that take
    it. Results are the same, also of second derivatives and under checkpointing.

    Args:
        layer: what makes its output of its parameters and ``x`` alone, without hooks.
        after: what takes it.
        x: the map.
    """
    kept = _Kept.apply(x)
    made = layer(kept)
    node, place = kept.grad_fn, _place(made)
    device, dtype = x.device.type, autocast_dtype(x.device.type)

    def make_again():
        # the node gives x as it was saved: checkpointing may have made it again
        saved = kept if node is None else node.saved_tensors[0]
        with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype is not None):
            return layer(saved)

    def pack(tensor):
        return make_again if _place(tensor) == place else tensor

    def unpack(packed):
        return packed() if packed is make_again else packed

    with saved_tensors_hooks(pack, unpack):
        return after(made)


def _place(x):
    return x.data_ptr(), x.shape, x.stride(), x.dtype


class _Kept(torch.autograd.Function):
    """The identity, with a node that keeps its input."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.detach()  # a view of a single image may have strides that oneDNN avoids

    @staticmethod
    def backward(ctx, grad):
        return grad
