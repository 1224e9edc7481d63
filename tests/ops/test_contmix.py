"""ContMix against its definition, written as a slow loop over positions and taps."""

from functools import partial

import numpy as np
import pytest
import torch
from helpers import compiled
from torch import nn

from overlock_mm.ops import contmix, contmix_torch, modes, set_contmix_backend

# (N, G, c, L, channels of a head and kernel, H, W, kernel sizes)
CASES = {
    'small': (2, 3, 2, 4, 2, 7, 9, (3, 5)),
    'one kernel': (1, 2, 2, 4, 3, 6, 5, (3,)),
    'three kernels': (1, 2, 1, 3, 1, 8, 11, (3, 7, 5)),
    'height equals k': (1, 2, 2, 4, 1, 7, 12, (5, 7)),
    'width equals k': (1, 1, 2, 4, 2, 10, 7, (3, 7)),
    'both equal k': (2, 1, 2, 4, 2, 13, 13, (5, 13)),
    'wider than a tile': (1, 1, 2, 9, 1, 5, 51, (3, 5)),
    'wider than a tile, k=13': (1, 2, 2, 9, 1, 14, 30, (5, 13)),
    'two tiles of unequal width': (1, 1, 1, 4, 1, 13, 49, (5, 13)),
    'taps of one': (1, 2, 2, 4, 2, 4, 5, (1, 3)),
    'empty batch': (0, 2, 2, 4, 2, 8, 9, (3, 5)),
}
# (G, c, channels of a head and kernel, K) of the Focus-Net's two stages
ARCHS = {
    'xt, stage 3': (8, 16, 16, 13),
    'xt, stage 4': (12, 14, 14, 7),
    't, stage 3': (8, 16, 16, 13),
    't, stage 4': (16, 16, 16, 7),
    's, stage 3': (16, 10, 10, 13),
    's, stage 4': (32, 8, 8, 7),
    'b, stage 3': (12, 16, 16, 13),
    'b, stage 4': (18, 16, 16, 7),
}
# small enough for finite differences
DIFFERENTIATED = [
    (1, 2, 1, 2, 1, 5, 6, (3, 5)),
    (1, 1, 1, 2, 1, 7, 7, (3, 7)),
    (1, 1, 1, 2, 1, 13, 26, (5, 13)),
]
BACKENDS = ('torch', 'export', 'reference')


def make_inputs(case, dtype=torch.float64, seed=0):
    n, g, c, regions, d, h, w, kernels = case
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    taps = sum(k * k for k in kernels)
    return (
        rand(n, g, c, h, w),
        rand(n, g, c, regions),
        rand(n, len(kernels) * g * d, h, w),
        rand(taps, regions),
        rand(taps),
        [rand(g, 2 * k - 1, 2 * k - 1) for k in kernels],
        kernels,
    )


def slow_contmix(query, key, value, weight, bias, rpbs, kernels):
    query, key, value, weight, bias = (t.numpy() for t in (query, key, value, weight, bias))
    n, g, _, h, w = query.shape
    d = value.shape[1] // len(kernels) // g
    heads = value.reshape(n, len(kernels), g, d, h, w)
    out = np.zeros_like(heads)
    for b, head, y, x in np.ndindex(n, g, h, w):
        affinity = query[b, head, :, y, x] @ key[b, head]
        logits = weight @ affinity + bias
        for i, k in enumerate(kernels):
            mine, logits = logits[: k * k], logits[k * k :]
            top = min(max(y - k // 2, 0), h - k)
            left = min(max(x - k // 2, 0), w - k)
            window = (slice(top, top + k), slice(left, left + k))
            # a tap that reads position s for a query at p has the bias of s - p
            bias_rows = slice(top - y + k - 1, top - y + 2 * k - 1)
            bias_cols = slice(left - x + k - 1, left - x + 2 * k - 1)
            scores = mine.reshape(k, k) + rpbs[i][head, bias_rows, bias_cols].numpy()
            kernel = np.exp(scores - scores.max())
            kernel /= kernel.sum()
            for channel in range(heads.shape[3]):
                out[b, i, head, channel, y, x] = (
                    kernel * heads[b, i, head, channel][window]
                ).sum()
    return torch.from_numpy(out.reshape(value.shape))


def gradients(inputs, backend, seed=1):
    """Output, and the gradients of a random function of it by every tensor."""
    *tensors, rpbs, kernels = inputs
    tensors = [t.detach().requires_grad_() for t in (*tensors, *rpbs)]
    out = contmix(*tensors[:5], tensors[5:], kernels, backend=backend)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    return out, torch.autograd.grad((out * weights.to(out.dtype)).sum(), tensors)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_equals_slow_loop(case, backend):
    inputs = make_inputs(case)
    torch.testing.assert_close(
        contmix(*inputs, backend=backend), slow_contmix(*inputs), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize('backend', BACKENDS)
def test_random_sizes(backend):
    rng = np.random.RandomState(0)
    for seed in range(20):
        kernels = tuple(rng.choice([3, 5, 7, 13], 2).tolist())
        size = [int(rng.randint(max(kernels), max(kernels) + 9)) for _ in range(2)]
        n, g, c, regions, d = rng.randint(1, 4, 5).tolist()
        inputs = make_inputs((n, g, c, regions, d, *size, kernels), seed=seed)
        torch.testing.assert_close(
            contmix(*inputs, backend=backend), slow_contmix(*inputs), rtol=1e-10, atol=1e-10
        )


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_gradients_equal_the_reference(case):
    inputs = make_inputs(case)
    expected = gradients(inputs, 'reference')
    torch.testing.assert_close(gradients(inputs, 'torch'), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('arch', ARCHS.values(), ids=ARCHS)
def test_heads_of_every_arch(arch):
    heads, c, d, k = arch
    inputs = make_inputs((1, heads, c, 49, d, k + 1, k + 3, (5, k)))
    expected = gradients(inputs, 'reference')
    torch.testing.assert_close(gradients(inputs, 'torch'), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize('rows, tile', [(1, 24), (3, 5), (100, 7)])
def test_gradients_by_any_tiling(rows, tile, monkeypatch):
    case = CASES['wider than a tile, k=13']
    n, heads, *_, width, kernels = case
    monkeypatch.setattr(contmix_torch, '_CHUNK', rows * n * heads * width * kernels[1] ** 2)
    monkeypatch.setattr(contmix_torch, '_TILE', tile)
    inputs = make_inputs(case)
    expected = gradients(inputs, 'reference')
    torch.testing.assert_close(gradients(inputs, 'torch'), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize(
    'dtype, tolerance',
    [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)],
)
def test_low_precision(dtype, tolerance, backend):
    """Outputs and gradients, as a part of their norm, against float64."""
    *tensors, rpbs, kernels = make_inputs(CASES['wider than a tile, k=13'], dtype)
    exact = [t.double() for t in tensors], [r.double() for r in rpbs], kernels
    out, grads = gradients((*tensors, rpbs, kernels), backend)
    expected, expected_grads = gradients((*exact[0], *exact[1:]), 'reference')
    assert out.dtype == dtype
    for got, needed in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert got.dtype == dtype
        assert (got.double() - needed).norm() / needed.norm() < tolerance


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_large_logits(dtype, backend):
    """Logits of some 1e5, beyond the range of float16, pick one tap each."""
    query, key, value, weight, bias, rpbs, kernels = make_inputs(CASES['small'], dtype)
    inputs = query * 300, key * 300, value, weight, bias, rpbs, kernels
    out, grads = gradients(inputs, backend)
    exact, _ = gradients(
        [t.double() for t in inputs[:5]] + [[r.double() for r in rpbs], kernels],
        'reference',
    )
    assert all(t.isfinite().all() for t in (out, *grads))
    assert (out.double() - exact).norm() / exact.norm() < 0.02


def test_autocast_changes_nothing():
    """The op takes what it is given: autocast decides for the layers around it."""
    inputs = make_inputs(CASES['small'], torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        out = contmix(*inputs)
    assert torch.equal(out, contmix(*inputs))


@pytest.mark.parametrize('backend', BACKENDS)
def test_non_contiguous_inputs(backend):
    *tensors, rpbs, kernels = make_inputs(CASES['small'])
    query, key, value, weight, bias = tensors
    value = value.to(memory_format=torch.channels_last)
    query = query.transpose(-1, -2).contiguous().transpose(-1, -2)
    inputs = query, key, value, weight.t().contiguous().t(), bias, rpbs, kernels
    expected = gradients((*tensors, rpbs, kernels), backend)
    torch.testing.assert_close(gradients(inputs, backend), expected)


def test_keeps_the_memory_format():
    query, key, value, *rest = make_inputs(CASES['small'])
    for memory_format in (torch.contiguous_format, torch.channels_last):
        out = contmix(query, key, value.contiguous(memory_format=memory_format), *rest)
        assert out.is_contiguous(memory_format=memory_format)


def op(query, key, value, weight, bias, *rpbs, backend='auto'):
    """ContMix of tensors alone, with the kernel sizes that their biases have."""
    kernels = [int(rpb.shape[-1] + 1) // 2 for rpb in rpbs]  # tensors in a trace
    return contmix(query, key, value, weight, bias, rpbs, kernels, backend=backend)


class Op(nn.Module):
    def forward(self, *tensors):
        return op(*tensors)


def flat(inputs):
    return (*inputs[:5], *inputs[5])


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('case', DIFFERENTIATED, ids=str)
def test_derivatives(case, backend):
    """First and second derivatives, in reverse and forward mode, by every tensor."""
    tensors = [t.requires_grad_() for t in flat(make_inputs(case))]
    run = partial(op, backend=backend)
    assert torch.autograd.gradcheck(run, tensors, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_second_derivatives_equal_the_reference(case):
    def second(backend):
        tensors = [t.detach().requires_grad_() for t in flat(make_inputs(case))]
        out = op(*tensors, backend=backend).square().sum()
        grads = torch.autograd.grad(out, tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)

    torch.testing.assert_close(second('torch'), second('reference'), rtol=1e-9, atol=1e-9)


def test_torch_func():
    tensors = flat(make_inputs(CASES['small']))

    def loss(*tensors):
        return op(*tensors).square().sum()

    numbers = tuple(range(len(tensors)))
    leaves = [t.clone().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(loss, numbers)(*tensors), expected)
    _, slope = torch.func.jvp(loss, tensors, tensors)
    exact = sum((g * t).sum() for g, t in zip(expected, tensors, strict=True))
    torch.testing.assert_close(slope, exact)


@pytest.mark.parametrize('batched', ['all', 'maps', 'parameters'])
def test_vmap(batched):
    several = [flat(make_inputs(CASES['small'], seed=i)) for i in range(3)]
    dims = [
        0 if batched == 'all' or (i < 3) == (batched == 'maps') else None
        for i in range(len(several[0]))
    ]
    several = [
        [t if d == 0 else same for t, same, d in zip(ts, several[0], dims, strict=True)]
        for ts in several
    ]
    stacked = [
        torch.stack(ts) if d == 0 else ts[0]
        for ts, d in zip(zip(*several, strict=True), dims, strict=True)
    ]
    out = torch.func.vmap(op, tuple(dims))(*stacked)
    torch.testing.assert_close(out, torch.stack([op(*ts) for ts in several]))


def test_compiles_without_graph_breaks():
    inputs = flat(make_inputs(CASES['one kernel']))  # each adds to the tracing time
    results = []
    for run in (Op(), compiled(Op())):
        tensors = [t.clone().requires_grad_() for t in inputs]
        out = run(*tensors)
        results.append((out, torch.autograd.grad(out.square().sum(), tensors)))
    torch.testing.assert_close(*results)


def test_compiled_training_keeps_the_inputs_alone():
    """Neither kernels nor bands of a matrix are kept for the backward pass."""
    n, g, _, _, _, h, w, kernels = case = (1, 2, 4, 49, 4, 26, 24, (13,))
    tensors = [t.requires_grad_() for t in flat(make_inputs(case, torch.float32))]
    run, sizes = compiled(Op()), []
    run(*tensors)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel()) or t, lambda t: t
    ):
        run(*tensors)
    assert sum(sizes) < n * g * h * w * kernels[0] ** 2


def test_compiling_is_not_exporting(monkeypatch):
    """Also with a torch that does not tell them apart, before 2.7."""
    monkeypatch.delattr(torch.compiler, '_is_exporting_flag')
    monkeypatch.setattr(modes, 'is_compiling', lambda: True)
    assert modes.is_exporting() and not modes.leaves_python()


def dynamic(*dims):
    return {i: torch.export.Dim.AUTO for i in dims}


def test_exports_for_any_size():
    inputs = flat(make_inputs((2, 2, 2, 4, 2, 9, 12, (3,))))
    sizes = (dynamic(0, 3, 4), dynamic(0), dynamic(0, 2, 3), *[None] * 3)
    program = torch.export.export(Op(), inputs, dynamic_shapes=(sizes,))
    code = program.graph_module.code
    assert 'checkpoint' not in code  # not even with gradients enabled
    assert 'index_select' in code and 'as_strided' not in code  # the backend 'export'
    for n, h, w in ((1, 7, 53), (3, 15, 6)):
        others = flat(make_inputs((n, 2, 2, 4, 2, h, w, (3,)), seed=1))
        torch.testing.assert_close(program.module()(*others), op(*others))


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')  # the size is fixed
@pytest.mark.parametrize('backend', BACKENDS)
def test_traces_and_saves(backend, tmp_path):
    inputs = flat(make_inputs(CASES['wider than a tile']))
    previous = set_contmix_backend(backend)
    try:
        torch.jit.trace(Op(), inputs).save(tmp_path / 'op.pt')
    finally:
        set_contmix_backend(previous)
    traced = torch.jit.load(tmp_path / 'op.pt')
    torch.testing.assert_close(traced(*inputs), op(*inputs))


def test_training_keeps_the_inputs_alone():
    n, g, c, regions, d, h, w, kernels = case = (1, 2, 4, 49, 16, 26, 48, (5, 13))
    *tensors, rpbs, _ = make_inputs(case, torch.float32)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel()) or t, lambda t: t
    ):
        contmix(*(t.requires_grad_() for t in tensors), rpbs, kernels)
    taps = sum(k * k for k in kernels)
    inputs = sum(t.numel() for t in tensors) + n * g * c * taps
    assert sum(sizes) < 3 * inputs + g * sum(k**4 for k in kernels)
    assert max(sizes) < n * g * h * w * taps  # neither logits nor kernels


def test_choosing_a_backend(monkeypatch):
    calls = []
    inputs = make_inputs(CASES['small'])

    def used(**kwargs):
        calls.clear()
        contmix(*inputs, **kwargs)
        return calls

    for name in BACKENDS:
        module = __import__(f'overlock_mm.ops.contmix_{name}', fromlist=['contmix'])
        original = module.contmix
        monkeypatch.setattr(
            module,
            'contmix',
            lambda *args, name=name, run=original: calls.append(name) or run(*args),
        )
    assert used() == ['torch']
    monkeypatch.setenv('OVERLOCK_MM_CONTMIX', 'reference')
    assert used() == ['reference']
    assert used(backend='torch') == ['torch']
    try:
        assert set_contmix_backend('torch') is None  # stronger than the environment
        assert used() == ['torch']
        assert set_contmix_backend(None) == 'torch'
    finally:
        set_contmix_backend(None)
    assert used() == ['reference']
    monkeypatch.setenv('OVERLOCK_MM_CONTMIX', 'natten')
    with pytest.raises(ValueError, match="OVERLOCK_MM_CONTMIX='natten' is not a backend"):
        contmix(*inputs)
    with pytest.raises(ValueError, match="set_contmix_backend='cuda' is not a backend"):
        set_contmix_backend('cuda')


def test_a_backend_that_cannot_run_says_why():
    inputs = make_inputs(CASES['small'])
    with pytest.raises(RuntimeError, match=r"'triton' \(backend\) cannot run: .*float64"):
        contmix(*inputs, backend='triton')
    set_contmix_backend('triton')
    try:
        with pytest.raises(RuntimeError, match=r'\(set_contmix_backend\) cannot run'):
            contmix(*inputs)
    finally:
        set_contmix_backend(None)


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(kernels=(3, 11)), 'at most the shorter side of the 7x9 map'),
        (dict(kernels=(4, 5)), 'must be odd'),
        (dict(rpbs=1), 'rpbs must have the shape'),
        (dict(weight=5), r'proj_weight must have the shape \(34, 4\), got \(5, 4\)'),
        (dict(value=7), 'value has 7 channels'),
        (dict(key=1), r'key must have the shape \(2, 3, 2, 4\), got \(1, 3, 2, 4\)'),
        (dict(kernels=()), 'proj_weight must have the shape'),
    ],
)
def test_bad_arguments(change, message):
    query, key, value, weight, bias, rpbs, kernels = make_inputs(CASES['small'])
    with pytest.raises(ValueError, match=message):
        contmix(
            query,
            key[: change.get('key')],
            value[:, : change.get('value')],
            weight[: change.get('weight')],
            bias,
            rpbs[: change.get('rpbs')],
            change.get('kernels', kernels),
        )
