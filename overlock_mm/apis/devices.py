"""The device that a command runs on."""

import torch

from ..errors import UserError
from ..hooks.precision import DTYPES, why_slow
from .messages import say


def usable_device(device: str | torch.device | None = None) -> torch.device:
    """A device that was tried; by default the GPU if there is one, else the CPU.

    Raises:
        UserError: if it cannot be used.
    """
    if device is None:
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        device = torch.device(device)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f'device {device} cannot be used: {reason}; try cpu') from error
    return device


def usable_dtype(dtype: str | None, device: torch.device) -> str | None:
    """The half precision to compute in; None for float32.

    On a CPU without instructions for it, a line says that it will not pay.

    Raises:
        UserError: if it is not known.
    """
    if dtype in (None, 'float32'):
        return None
    if dtype not in DTYPES:
        raise UserError(f'dtype {dtype} is not one of float32, {", ".join(DTYPES)}')
    reason = why_slow(dtype) if device.type == 'cpu' else None
    if reason:
        say(reason)
    return dtype
