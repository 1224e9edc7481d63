"""What counters of multiply-adds see of this package's operators.

``torch.utils.flop_counter.FlopCounterMode`` sees the operations that torch runs. The fast
paths run others than those of the definition: ContMix's banded matrices are partly zeros,
and the projection is applied to the keys. So while a counter is on, an operator counts as
one operation of its own (``torch.ops.overlock_mm.contmix``, ``.depthwise_conv2d``) with
the multiply-adds of its definition, and what it runs inside is not counted. The gradient
counts each product once for every operand that needs a gradient.

fvcore and mmengine count the operations of a trace, and can only be given other ones
before it. There ContMix runs by its definition, in matrix products, which they count.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from . import contmix_reference, contmix_torch
from .modes import differentiable_gradients, is_compiling, needs_plain_ops

# Modules of which a function on the stack means that a trace is made to be counted.
_TRACING_COUNTERS = {'fvcore.nn.jit_analysis', 'mmengine.analysis.jit_analysis'}

_library = torch.library.Library('overlock_mm', 'FRAGMENT')
for _name in ('contmix', 'depthwise_conv2d'):
    # They do nothing: a counter that is on sees their argument.
    _library.define(f'{_name}(int multiply_adds) -> ()')
    _library.impl(_name, lambda multiply_adds: None, 'CompositeExplicitAutograd')


class Product(NamedTuple):
    """A product of two tensors that depend on arguments of an operator.

    Attributes:
        multiply_adds: number of multiply-adds.
        left, right: indices of the arguments that its operands are computed from.
    """

    multiply_adds: int
    left: tuple[int, ...]
    right: tuple[int, ...]


def _contmix_products(query, key, value, proj_weight, proj_bias, *rpbs) -> list[Product]:
    """The products of ContMix (section 3.3 of https://arxiv.org/abs/2502.20087).

    For every position of N images and every head they are the affinities of its query,
    of c channels, to L keys; their projection to the taps of all kernels; and for every
    channel of the values the weighted sum over the taps of its kernel. The tensors have
    the shapes of those of :func:`overlock_mm.ops.contmix`.
    """
    n, heads, width, height, columns = query.shape
    taps, regions = proj_weight.shape
    positions = n * heads * height * columns
    kernels = (0, 1, *range(3, 5 + len(rpbs)))  # all but the values
    return [
        Product(positions * width * regions, (0,), (1,)),
        Product(positions * regions * taps, (0, 1), (3,)),
        # each kernel mixes an equal share of the channels
        Product(value.numel() // len(rpbs) * taps, kernels, (2,)),
    ]


def _depthwise_products(x, weight, bias=None) -> list[Product]:
    """The products of a depth-wise convolution: every tap of every output.

    Taps on the padding count too, as torch counts convolutions.
    """
    return [Product(x.numel() * prod(weight.shape[2:]), (0,), (1,))]


def counters() -> list[dict]:
    """The tables, from operation to formula, of the counters that are on."""
    if not torch._C._len_torch_dispatch_stack():
        return []
    tables = []
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, 'counter', mode)  # torch 2.6 and later, or before
        # torch 2.2 and later, or before
        table = getattr(counter, 'flop_registry', getattr(counter, 'flop_mapping', None))
        if isinstance(table, dict):
            tables.append(table)
    return tables


def counted_contmix(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A backend of ContMix, in a form that counters see as its definition.

    It is ``run`` itself if there is no counter, and in ``torch.compile``.
    """
    if is_compiling():
        return run
    if needs_plain_ops():  # autograd functions cannot be used
        counted = is_counted_trace() or counters()
        return contmix_reference.contmix if counted else run
    return partial(_counted_contmix, run) if counters() else run


def counted_depthwise(run: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Call ``run``, a depth-wise convolution in plain torch, and count it as one.

    Args:
        run: takes ``tensors``.
        *tensors: input, weight and, if there is one, bias.
    """
    op = torch.ops.overlock_mm.depthwise_conv2d
    return _Counted.apply(op, _depthwise_products(*tensors), run, run, *tensors)


def _counted_contmix(run, query, key, value, weight, bias, rpbs, kernel_sizes):
    tensors = query, key, value, weight, bias, *rpbs
    # differentiable_gradients() takes the one in plain torch only
    run, plain = (
        lambda *tensors, run=run: run(*tensors[:5], tensors[5:], kernel_sizes)
        for run in (run, contmix_torch.contmix)
    )
    op = torch.ops.overlock_mm.contmix
    return _Counted.apply(op, _contmix_products(*tensors), run, plain, *tensors)


class _Counted(torch.autograd.Function):
    """An operator that counters see as ``op``, in the backward pass, too."""

    @staticmethod
    def forward(ctx, op, products, run, plain, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.op, ctx.products, ctx.plain = op, products, plain
        with _hidden(op):
            out = run(*tensors)
        op(sum(p.multiply_adds for p in products))
        return out

    @staticmethod
    def backward(ctx, grad):
        needed = ctx.needs_input_grad[4:]
        with _hidden(ctx.op):
            grads = differentiable_gradients(ctx.plain, ctx.saved_tensors, grad)
        ctx.op(
            sum(
                product.multiply_adds
                for product in ctx.products
                for operand in (product.left, product.right)
                if any(needed[i] for i in operand)
            )
        )
        return None, None, None, None, *grads


def uncounted() -> AbstractContextManager:
    """Return a context in which no counter sees what is run."""
    if is_compiling() or not (counters() or is_counted_trace()):
        return nullcontext()
    return _hidden()


@contextmanager
def _hidden(op=None) -> Iterator[None]:
    """Hide what is run from the counters, which know ``op`` from then on."""
    tables, trace = counters(), torch._C._get_tracing_state()
    kept = [dict(table) for table in tables]
    for table in tables:
        table.clear()
    torch._C._set_tracing_state(None)
    # the trace takes the results as constants, which need no gradient
    grad = torch.is_grad_enabled() and trace is None
    try:
        with torch.set_grad_enabled(grad):
            yield
    finally:
        torch._C._set_tracing_state(trace)
        for table, formulas in zip(tables, kept, strict=True):
            table.update(formulas if op is None else {op: _flops, **formulas})


def _flops(multiply_adds: int, **output) -> int:
    """The formula of the operations; torch counts a multiply-add as two."""
    return 2 * multiply_adds


def is_counted_trace() -> bool:
    """Whether fvcore or mmengine trace a model to count its operations."""
    if not torch.jit.is_tracing() or not _TRACING_COUNTERS & sys.modules.keys():
        return False
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get('__name__') in _TRACING_COUNTERS:
            return True
        frame = frame.f_back
    return False
