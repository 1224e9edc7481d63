"""How torch is running at the moment, for torch 2.1 and later."""

import torch


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast casts to on devices of this type, or None if it is off."""
    if device == 'meta':
        return None
    if hasattr(torch, 'get_autocast_dtype'):  # torch 2.4
        return (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        )
    if device == 'cpu':
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None


def is_compiling() -> bool:
    """Whether torch.compile or torch.export is tracing."""
    if hasattr(torch.compiler, 'is_compiling'):  # torch 2.3
        return torch.compiler.is_compiling()
    return torch._dynamo.is_compiling()
