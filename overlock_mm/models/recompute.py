"""Activation checkpointing: recompute activations in the backward pass to save memory."""

from collections.abc import Callable
from contextlib import nullcontext

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..ops.modes import is_compiling


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
