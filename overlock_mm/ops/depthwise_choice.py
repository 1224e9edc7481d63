"""Which implementation of depth-wise convolutions runs on a GPU: cuDNN's or Triton's."""

import logging
import os
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

BACKENDS = ('auto', 'cudnn', 'triton')
_VARIABLE = 'OVERLOCK_MM_DEPTHWISE'
# Cases that are timed at most. A network has about 75 for each octave of sizes.
_LIMIT = 1000
_override: str | None = None
# Whether Triton was the faster one, by case.
_triton_is_faster: dict[tuple, bool] = {}
_logger = logging.getLogger(__name__)


def set_depthwise_backend(backend: str | None) -> str | None:
    """Set what computes depth-wise convolutions on GPUs, for the whole process.

    The environment variable ``OVERLOCK_MM_DEPTHWISE`` does the same.

    Args:
        backend: 'cudnn'; 'triton', an error where it cannot run; or 'auto', which times
            both once for each kind of convolution: by operation, channels, kernel, dtype
            and the octave of the number of positions. None removes the setting.

    Returns:
        The previous setting, which can be passed here again to restore it.

    Raises:
        ValueError: if the backend is unknown.
    """
    global _override
    if backend is not None:
        _known(backend, 'set_depthwise_backend')
    before, _override = _override, backend
    return before


def choose(
    name: str, by_torch: Callable, args: tuple, weight: Tensor, dilation: int
) -> Callable:
    """The function that computes an operation: ``by_torch``, or Triton's of this name.

    Args:
        name: 'forward', 'input_grad' or 'weight_grad'.
        by_torch: torch's function, with cuDNN.
        args: what the functions take; the map or its gradient comes first.
        weight: kernels of the convolution.
        dilation: distance between taps.

    Raises:
        RuntimeError: if 'triton' was asked for, and cannot run.
    """
    backend, source = _backend()
    if backend == 'cudnn':
        return by_torch
    try:
        from . import depthwise_triton

        reason = depthwise_triton.unsupported(args[0], weight)
    except ImportError as error:
        reason = f'triton cannot be imported ({error})'
    if reason:
        if backend == 'triton':
            raise RuntimeError(
                f"depth-wise backend 'triton' ({source}) cannot run: {reason}; use 'auto'"
            )
        return by_torch
    by_triton = getattr(depthwise_triton, name)
    if backend == 'triton':
        return by_triton
    case = _case(name, args[0], weight, dilation)
    if case not in _triton_is_faster:
        # nothing can be timed while a CUDA graph is captured
        if len(_triton_is_faster) >= _LIMIT or torch.cuda.is_current_stream_capturing():
            return by_torch
        _triton_is_faster[case] = _compare(case, by_torch, by_triton, args)
    return by_triton if _triton_is_faster[case] else by_torch


def _backend() -> tuple[str, str]:
    if _override is not None:
        return _override, 'set_depthwise_backend'
    return _known(os.environ.get(_VARIABLE) or 'auto', _VARIABLE), _VARIABLE


def _known(backend, source):
    if backend not in BACKENDS:
        raise ValueError(f'{source}: {backend!r} is not one of {", ".join(BACKENDS)}')
    return backend


def _case(name, x, weight, dilation):
    """What the faster implementation depends on."""
    n, channels, height, width = x.shape
    octave = (n * height * width).bit_length()
    layout = x.is_contiguous(memory_format=torch.channels_last)
    kinds = x.dtype, weight.dtype, x.device
    return name, channels, weight.shape[-1], dilation, octave, layout, *kinds


def _compare(case, by_torch, by_triton, args) -> bool:
    from triton.errors import TritonError

    if not _triton_is_faster:
        _logger.info(
            'cuDNN and Triton are timed for each kind of depth-wise convolution; '
            '%s=cudnn or triton fixes the choice',
            _VARIABLE,
        )
    try:
        triton = _seconds(by_triton, args)
    except (RuntimeError, TritonError) as error:  # of the compiler or the driver
        warnings.warn(
            f'Triton failed for the depth-wise convolution {case}, and cuDNN is used: '
            f'{error}',
            stacklevel=2,
        )
        return False
    cudnn = _seconds(by_torch, args)
    _logger.debug('%s: Triton %.3g s, cuDNN %.3g s', case, triton, cudnn)
    return triton < cudnn


def _seconds(run, args) -> float:
    times = []
    for _ in range(4):  # the first compiles or plans
        torch.cuda.synchronize()
        start = time.perf_counter()
        run(*args)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])
