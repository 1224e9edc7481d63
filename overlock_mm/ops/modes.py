"""Whether torch is compiling, exporting, tracing or casting, for torch 2.1 and later."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad


def autocast_dtype(device: str) -> torch.dtype | None:
    """Return the dtype that autocast casts to, or None if autocast is off.

    Args:
        device: device type, such as ``'cuda'``.
    """
    if device == 'meta':
        return None
    if hasattr(torch, 'get_autocast_dtype'):  # torch 2.4
        return (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        )
    if device == 'cpu':
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None


def without_autocast(device: str) -> AbstractContextManager:
    """Return a context in which autocast is off.

    Args:
        device: device type, such as ``'cuda'``.
    """
    if autocast_dtype(device) is None:
        return nullcontext()
    return torch.autocast(device, enabled=False)


def is_compiling() -> bool:
    """Return whether torch.compile or torch.export is tracing."""
    if hasattr(torch.compiler, 'is_compiling'):  # torch 2.3
        return torch.compiler.is_compiling()
    return torch._dynamo.is_compiling()


def is_exporting() -> bool:
    """Return whether torch.export, torch.onnx.export or torch.jit.trace is running.

    Before torch 2.7 it is also true for torch.compile.
    """
    # torch.compiler.is_exporting() is also true inside of torch.compile
    flag = getattr(torch.compiler, '_is_exporting_flag', None)
    return torch.jit.is_tracing() or (is_compiling() if flag is None else flag)


def leaves_python() -> bool:
    """Return whether it is certain that the program is for use outside of this process.

    Unlike :func:`is_exporting` it is never true for ``torch.compile``.
    """
    return torch.jit.is_tracing() or getattr(torch.compiler, '_is_exporting_flag', False)


def needs_plain_ops() -> bool:
    """Return whether only PyTorch's own differentiable functions may be called.

    Autograd functions written in Python cannot be saved by ``torch.jit.trace``, and
    ``torch.func`` and forward-mode AD do not differentiate them. ``torch.compile`` and
    ``torch.export`` make better use of the single operations.
    """
    return (
        is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def differentiable_gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor
) -> tuple[Tensor, ...]:
    """Compute gradients that can be differentiated again, for ``create_graph=True``.

    An autograd function calls it in its backward pass if gradients are enabled there.
    (torch's ``once_differentiable`` does not help: it raises only if ``grad`` itself
    requires a gradient, and otherwise the second derivative is wrong in silence.)

    Args:
        function: what the autograd function computes, in differentiable operations.
        inputs: tensors that ``function`` takes, as they were saved.
        grad: gradient of its output.

    Returns:
        The gradient of each input.
    """
    with without_autocast(grad.device.type):
        return torch.func.vjp(function, *inputs)[1](grad)
