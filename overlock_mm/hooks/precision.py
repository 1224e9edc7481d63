"""Half precision on the CPU, for what gains by it."""

from functools import partial

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..checkpoint import unwrapped
from ..errors import UserError
from ..models import OverLoCK

DTYPES = dict(bfloat16=torch.bfloat16, float16=torch.float16)
# Parts of a model that consist of torch's own layers; the heads of detectors have
# operators that know float32 alone.
_PARTS = ('backbone', 'neck', 'decode_head', 'auxiliary_head')


@HOOKS.register_module()
class AutocastHook(Hook):
    """Run backbones, necks and the heads of segmentors in half precision.

    Their results are float32 again: losses and all other parts are in float32. Unlike
    mmengine's ``AmpOptimWrapper`` it works without a GPU, and in tests, too. In a config::

        custom_imports = dict(imports=['overlock_mm', 'overlock_mm.hooks'])
        custom_hooks = [dict(type='AutocastHook')]

    Args:
        dtype: 'bfloat16' or 'float16'. float16 is for inference: losses are not scaled.
    """

    # behind the loading and the folding of weights
    priority = 'LOWEST'

    def __init__(self, dtype: str = 'bfloat16'):
        if dtype not in DTYPES:
            raise UserError(f'AutocastHook: dtype={dtype!r} is not one of {list(DTYPES)}')
        self.dtype = dtype

    def before_train(self, runner: Runner) -> None:
        """Change the model of the runner, in place."""
        autocast(unwrapped(runner.model), self.dtype)

    def before_test(self, runner: Runner) -> None:
        """Change the model of the runner, in place."""
        autocast(unwrapped(runner.model), self.dtype)


def autocast(model: nn.Module, dtype: str) -> None:
    """Run parts of a model in half precision from now on: see :class:`AutocastHook`.

    Args:
        model: a model of MMDetection or MMSegmentation, or one around it. What was
            changed before stays as it is.
        dtype: 'bfloat16' or 'float16'.

    Raises:
        UserError: if the model has no such part.
    """
    parts = list(_parts(model))
    if not parts:
        raise UserError(
            f'{dtype} is for models with a backbone, and this {type(model).__name__} '
            'has none; use float32'
        )
    for part in parts:
        if isinstance(part.forward, partial):  # it was done before
            continue
        run = _autocast
        if isinstance(part, OverLoCK) and part.folded:
            part.to(DTYPES[dtype])  # once, and not in every call
            run = _cast
        # of a bound method, so that a copy of the model calls the copy
        part.forward = partial(run, part.forward, DTYPES[dtype])


def _parts(module: nn.Module):
    for name, child in module.named_children():
        if name in _PARTS:
            # the heads of a cascade are a list
            yield from child if isinstance(child, nn.ModuleList) else [child]
        else:
            yield from _parts(child)


def _cast(forward, dtype, images):
    return tree_map_only(Tensor, Tensor.float, forward(images.to(dtype)))


def _autocast(forward, dtype, *args, **kwargs):
    devices = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
    with torch.autocast(next(iter(devices), 'cpu'), dtype):
        results = forward(*args, **kwargs)
    return tree_map_only(Tensor, _in_float32, results)


def _in_float32(value: Tensor) -> Tensor:
    return value.float() if value.dtype in DTYPES.values() else value


def why_slow(dtype: str) -> str | None:
    """Why half precision gains nothing on this CPU; None if it may."""
    name = 'amx_fp16' if dtype == 'float16' else 'avx512_bf16'
    has = getattr(torch.cpu, f'_is_{name}_supported', None)
    if has is None or has():
        return None
    return (
        f'{dtype} will not pay: this CPU has no instructions for it, and computes it with '
        'those of float32'
    )
