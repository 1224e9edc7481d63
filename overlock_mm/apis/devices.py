"""The device that a command runs on."""

import torch

from ..errors import UserError


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
