"""ContMix: dynamic convolution whose kernels come from affinities to context regions."""

import os
from collections.abc import Sequence

from torch import Tensor

from . import contmix_export, contmix_reference, contmix_torch
from .flops import counted_contmix
from .modes import leaves_python, without_autocast

BACKENDS = ('auto', 'torch', 'triton', 'export', 'reference')
_VARIABLE = 'OVERLOCK_MM_CONTMIX'
_override = None


def contmix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    rpbs: Sequence[Tensor],
    kernel_sizes: Sequence[int],
    backend: str = 'auto',
) -> Tensor:
    """Mix ``value`` with a kernel for each position, computed from its context.

    The affinities of a position to the L regions of the key are projected to the
    logits of one k x k kernel for each of ``kernel_sizes``. A relative position bias
    is added, and a softmax over the taps gives the weights of the k x k window of
    values around the position. Windows move inward at the border instead of being
    padded, so every window is full (the rule of neighborhood attention,
    https://arxiv.org/abs/2204.07143). See section 3.3 of
    https://arxiv.org/abs/2502.20087.

    Differentiable in every tensor, any number of times. Tensors may be float64,
    float32, bfloat16 or float16; logits and softmax are float32 at least.

    Args:
        query: queries of G heads, already scaled, ``(N, G, c, H, W)``.
        key: keys of the L regions, ``(N, G, c, L)``.
        value: values, ``(N, C, H, W)``; channels are ordered (kernel, head,
            channel), so C is a multiple of ``len(kernel_sizes) * G``.
        proj_weight: projection of affinities to taps, ``(sum of k*k, L)``; rows are
            ordered by kernel, then by tap, row-major.
        proj_bias: bias of the projection, ``(sum of k*k,)``.
        rpbs: relative position bias of each kernel, ``(G, 2k-1, 2k-1)``.
        kernel_sizes: odd kernel sizes, none larger than H or W.
        backend: ``'torch'`` (banded matrix products, any device), ``'triton'``
            (fused kernels for CUDA), ``'export'`` (operators that every runtime has),
            ``'reference'`` (the plain definition, slow) or ``'auto'``: the one of
            ``set_contmix_backend``, else the one of the environment variable
            ``OVERLOCK_MM_CONTMIX``, else ``'export'`` while the model is exported or
            traced, else ``'triton'`` where it can run, else ``'torch'``.

    Returns:
        The mixed values, ``(N, C, H, W)``, in the dtype of ``value``.

    Raises:
        ValueError: if the backend is unknown or the arguments do not fit together.
        RuntimeError: if the chosen backend cannot run, with the reason.
    """
    _check(query, key, value, proj_weight, proj_bias, rpbs, kernel_sizes)
    arguments = query, key, value, proj_weight, proj_bias, tuple(rpbs), tuple(kernel_sizes)
    run = counted_contmix(_backend(backend, arguments))
    with without_autocast(value.device.type):
        return run(*arguments)


def set_contmix_backend(backend: str | None) -> str | None:
    """Set the backend that ``'auto'`` means, for the whole process.

    Args:
        backend: one of ``BACKENDS``; None removes the setting.

    Returns:
        The previous setting, which can be passed here again to restore it.

    Raises:
        ValueError: if the backend is unknown.
    """
    global _override
    if backend is not None:
        _known(backend, 'set_contmix_backend')
    before, _override = _override, backend
    return before


def _backend(name, arguments):
    source = 'backend'
    if _known(name, source) == 'auto' and _override is not None:
        name, source = _override, 'set_contmix_backend'
    elif name == 'auto' and os.environ.get(_VARIABLE):
        name, source = _known(os.environ[_VARIABLE], _VARIABLE), _VARIABLE
    if name in ('auto', 'triton'):
        reason = _why_not_triton(name, arguments)
        if name == 'auto':
            name = 'export' if leaves_python() else 'torch' if reason else 'triton'
        elif reason:
            raise RuntimeError(
                f"ContMix's backend 'triton' ({source}) cannot run: {reason}; "
                "use 'torch', which runs anywhere, or 'auto', which chooses"
            )
    if name == 'triton':
        from .contmix_triton import contmix as run  # triton is imported only when used

        return run
    backends = dict(torch=contmix_torch, export=contmix_export, reference=contmix_reference)
    return backends[name].contmix


def _known(name, source):
    if name not in BACKENDS:
        raise ValueError(
            f'{source}={name!r} is not a backend of ContMix; use one of {BACKENDS}'
        )
    return name


def _why_not_triton(name, arguments):
    """Return why triton cannot run on these arguments, or None if it can."""
    device = arguments[0].device.type
    if name == 'auto' and device != 'cuda':
        return 'the tensors are not on a GPU'  # without importing triton
    try:
        from . import contmix_triton
    except ImportError as e:
        return f'triton cannot be imported ({e})'
    return contmix_triton.unsupported(*arguments)


def _check(query, key, value, proj_weight, proj_bias, rpbs, kernel_sizes):
    shapes = {
        'query': (query, 5, '(N, G, c, H, W)'),
        'key': (key, 4, '(N, G, c, L)'),
        'value': (value, 4, '(N, C, H, W)'),
        'proj_weight': (proj_weight, 2, '(taps, L)'),
    }
    for name, (tensor, ndim, shape) in shapes.items():
        if tensor.ndim != ndim:
            raise ValueError(
                f'{name} must have the shape {shape}, got {tuple(tensor.shape)}'
            )
    n, heads, width = query.shape[:3]
    regions, (h, w) = key.shape[3], value.shape[-2:]
    for k in kernel_sizes:
        if k % 2 == 0 or not 0 < k <= min(h, w):
            raise ValueError(
                f'kernel_sizes={tuple(kernel_sizes)}: every kernel must be odd and at '
                f'most the shorter side of the {h}x{w} map; resize the map or '
                'choose a smaller kernel'
            )
    taps = sum(k * k for k in kernel_sizes)
    expected = {
        'query': (query.shape, (value.shape[0], heads, width, h, w)),
        'key': (key.shape, (n, heads, width, regions)),
        'proj_weight': (proj_weight.shape, (taps, regions)),
        'proj_bias': (proj_bias.shape, (taps,)),
        'rpbs': (
            [tuple(r.shape) for r in rpbs],
            [(heads, 2 * k - 1, 2 * k - 1) for k in kernel_sizes],
        ),
    }
    for name, (given, needed) in expected.items():
        if list(given) != list(needed):
            raise ValueError(
                f'{name} must have the shape {needed}, got {tuple(given)}, for '
                f'kernel_sizes={tuple(kernel_sizes)}, a query {tuple(query.shape)}, a key '
                f'{tuple(key.shape)} and a value {tuple(value.shape)}'
            )
    if not kernel_sizes or value.shape[1] % (heads * len(kernel_sizes)):
        raise ValueError(
            f'value has {value.shape[1]} channels, which must be a multiple of '
            f'{heads} heads x {len(kernel_sizes)} kernels'
        )
    devices = {t.device for t in (query, key, value, proj_weight, proj_bias, *rpbs)}
    if len(devices) > 1:
        raise ValueError(
            f'all tensors must be on one device, got {sorted(map(str, devices))}'
        )
