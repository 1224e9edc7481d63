"""The Triton kernels of ContMix against its definition, and whether they compile.

Without a GPU they run in Triton's interpreter (``conftest`` turns it on), which is
slow: few programs. Compiling for GPUs needs none; it is done in a fresh process,
where the interpreter is off.
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

from overlock_mm.ops import contmix, contmix_reference

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
TESTS = Path(__file__).parent

# (N, G, c, channels of a head and kernel, H, W, kernel sizes); tiles are 16 wide
CASES = {
    'height equals k': (2, 1, 3, 2, 3, 18, (3,)),
    'width equals k': (2, 1, 2, 5, 9, 5, (3, 5)),
    'both equal k': (1, 1, 8, 8, 7, 7, (5, 7)),
    'stage 4': (1, 1, 10, 8, 8, 9, (5, 7)),
    'wider than a tile': (1, 1, 14, 10, 7, 17, (5, 7)),
    'last tile of one column': (1, 1, 8, 14, 5, 33, (5,)),
    'three kernels': (2, 2, 1, 1, 5, 5, (3, 1, 5)),
    'wide heads': (1, 1, 33, 40, 3, 3, (3,)),
}


def make_inputs(case, dtype=torch.float32, seed=0):
    """(query, key, value, proj_weight, proj_bias, *rpbs), and the kernel sizes."""
    n, g, c, d, h, w, kernels = case
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    regions, taps = 4, sum(k * k for k in kernels)
    return [
        rand(n, g, c, h, w),
        rand(n, g, c, regions) * c**-0.5,
        rand(n, len(kernels) * g * d, h, w),
        rand(taps, regions),
        rand(taps),
        *(rand(g, 2 * k - 1, 2 * k - 1) for k in kernels),
    ], kernels


def results(op, tensors, kernels, **options):
    """The output and, for a fixed gradient of it, the gradients of all tensors."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    out = op(*tensors[:5], tensors[5:], kernels, **options)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=generator).to(out)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad)]


def fused(tensors, kernels):
    return results(contmix, tensors, kernels, backend='triton')


def exact(tensors, kernels):
    """The definition in float64, of the same numbers."""
    return results(contmix_reference.contmix, [t.double() for t in tensors], kernels)


def assert_near(actual, expected, tolerance):
    """Relative to the whole tensor: gradients cancel in single elements."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape
        error = (a.double() - e).norm() / e.norm().clamp(min=0.1)
        assert error < tolerance, f'result {i} is off by {error:.1e}'


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Fix two things in Triton's interpreter."""
    if DEVICE == 'cuda':
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    dot = interpreter.InterpreterBuilder.create_dot

    def floats(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        data = (x.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    # it multiplies the bits of bfloat16 as if they were integers
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        'create_dot',
        lambda self, a, b, *rest: dot(self, floats(a), floats(b), *rest),
    )
    # it prepares triton.language anew for every call within a kernel: half of its time
    call = interpreter.InterpretedFunction.__call__

    def quick_call(self, *args, **kwargs):
        ours = self.fn.__module__.endswith('contmix_triton')
        return self.rewrite()(*args, **kwargs) if ours else call(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, '__call__', quick_call)


LONG = ('wider than a tile', 'three kernels')


@pytest.mark.parametrize(
    'case',
    [
        pytest.param(case, id=name, marks=[pytest.mark.slow] if name in LONG else [])
        for name, case in CASES.items()
    ],
)
def test_equals_the_definition(case):
    inputs = make_inputs(case)
    assert_near(fused(*inputs), exact(*inputs), 3e-6)


@pytest.mark.parametrize(
    'dtype, tolerance', [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)], ids=str
)
def test_half_precision(dtype, tolerance):
    """Twice the rounding of the type: weights and results, but no logits, are rounded."""
    inputs = make_inputs((1, 1, 16, 8, 5, 7, (3, 5)), dtype)
    actual = fused(*inputs)
    assert all(a.dtype == dtype for a in actual)
    assert_near(actual, exact(*inputs), tolerance)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_large_logits(dtype):
    """Logits of 1e4 do not overflow."""
    (query, *rest), kernels = make_inputs((1, 1, 8, 4, 4, 5, (3,)), dtype)
    inputs = [query * 4096, *rest], kernels
    actual, expected = fused(*inputs), exact(*inputs)
    assert all(a.isfinite().all() for a in actual)
    assert_near(actual[:1], expected[:1], 8e-3 if dtype == torch.bfloat16 else 1e-3)


def test_sharp_weights_in_half_precision():
    """Logits of 1e2: rounded to bfloat16 they would be off by 0.5, and gradients that
    nearly cancel would be lost in the rounding of the output."""
    (query, *rest), kernels = make_inputs((1, 1, 8, 4, 4, 5, (3,)), torch.bfloat16)
    inputs = [query * 64, *rest], kernels
    assert_near(fused(*inputs), exact(*inputs), 8e-3)


@pytest.mark.slow
def test_strides():
    """Inputs of any memory format; results in the format of the inputs."""
    tensors, kernels = make_inputs((2, 2, 2, 3, 4, 5, (3, 1)))
    expected = fused(tensors, kernels)
    query, key, value, *rest = tensors
    query = query.transpose(-1, -2).contiguous().transpose(-1, -2)
    value = value.to(memory_format=torch.channels_last)
    key, rest[0] = (t.mT.contiguous().mT for t in (key, rest[0]))
    actual = fused([query, key, value, *rest], kernels)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
    for i in (0, 3):
        assert actual[i].is_contiguous(memory_format=torch.channels_last)
    # a part of a larger tensor, and a gradient that is one number for all
    larger = torch.cat([value, value], dim=1)[:, :12]
    out = contmix(query, key, larger, *rest[:2], rest[2:], kernels, backend='triton')
    torch.testing.assert_close(out, expected[0])
    tensors = [t.detach().requires_grad_() for t in tensors]
    contmix(*tensors[:5], tensors[5:], kernels, backend='triton').sum().backward()
    assert tensors[2].grad.sum().item() == pytest.approx(value.numel(), rel=1e-5)


@pytest.mark.parametrize('case', [(0, 2, 4, 4, 5, 6, (3, 5))], ids=str)
def test_empty_batch(case):
    tensors, kernels = make_inputs(case)
    out, *grads = fused(tensors, kernels)
    assert out.shape == tensors[2].shape
    for grad, tensor in zip(grads, tensors, strict=True):
        assert grad.shape == tensor.shape
        assert not grad.any()


@pytest.mark.slow
def test_deterministic():
    inputs = make_inputs((2, 1, 4, 4, 9, 5, (3,)))
    for a, b in zip(fused(*inputs), fused(*inputs), strict=True):
        assert torch.equal(a, b)


def test_second_derivatives():
    """Of the gradients, which come from the kernels no more if differentiated."""

    def second(op, dtype, **options):
        tensors, kernels = make_inputs((2, 2, 3, 2, 5, 6, (3, 5)))
        tensors = [t.to(dtype).requires_grad_() for t in tensors]
        out = op(*tensors[:5], tensors[5:], kernels, **options).square().sum()
        grads = torch.autograd.grad(out, tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)

    expected = second(contmix_reference.contmix, torch.float64)
    assert_near(second(contmix, torch.float32, backend='triton'), expected, 1e-5)


def test_torch_func_is_an_error():
    tensors, kernels = make_inputs((1, 1, 2, 2, 3, 3, (3,)))

    def loss(query):
        rest = tensors[1:5]
        return contmix(query, *rest, tensors[5:], kernels, backend='triton').sum()

    with pytest.raises(RuntimeError, match="'triton' .* torch.func .*; use 'torch'"):
        torch.func.grad(loss)(tensors[0])


def test_keeps_nothing_of_the_size_of_the_taps():
    tensors, kernels = make_inputs((1, 1, 4, 4, 5, 6, (3, 5)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        tensors = [t.requires_grad_() for t in tensors]
        contmix(*tensors[:5], tensors[5:], kernels, backend='triton')
    assert max(kept) <= tensors[2].numel()


def reason(tensors, kernels):
    from overlock_mm.ops import contmix_triton

    return contmix_triton.unsupported(*tensors[:5], tensors[5:], kernels)


@pytest.mark.parametrize(
    'case, dtype, why',
    [
        ((1, 1, 4, 4, 5, 5, (3, 5)), torch.float32, None),
        ((1, 1, 64, 64, 31, 31, (3, 5, 31)), torch.float16, None),
        ((1, 1, 4, 4, 5, 5, (3,)), torch.float64, 'torch.float64 is not one of float32'),
        ((1, 1, 65, 4, 5, 5, (3,)), torch.float32, 'head of the query has 65 channels'),
        ((1, 1, 4, 65, 5, 5, (3,)), torch.float32, 'head of the value has 65 channels'),
        ((1, 1, 4, 4, 33, 33, (33,)), torch.float32, 'larger than 31'),
        ((1, 1, 4, 4, 5, 5, (3, 3, 3, 3)), torch.float32, 'more than 3 kernels'),
    ],
)
def test_unsupported(case, dtype, why):
    given = reason(*make_inputs(case, dtype))
    assert given is None if why is None else why in given


def test_unsupported_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (7, 5))
    query = SimpleNamespace(is_cuda=True, device='cuda:0')
    assert 'older than compute capability 8.0' in reason([query] + [None] * 5, (3,))
    monkeypatch.setattr(torch.version, 'hip', '6.0')
    assert 'NVIDIA' in reason([query] + [None] * 5, (3,))


# compute capability, dtype, memory format, case: xt and t at 800x1333, and corners
COMPILED = [
    (90, 'bfloat16', 'channels_last', (2, 8, 16, 16, 50, 84, (5, 13))),
    (80, 'float32', 'contiguous_format', (1, 12, 14, 14, 25, 42, (5, 7))),
    (90, 'float32', 'contiguous_format', (1, 1, 1, 1, 1, 1, (1,))),
]


KERNELS = ('_forward', '_backward_query', '_backward_taps', '_backward_value')


def compile_kernels():
    """Compile what every launch of forward and backward would run; print as JSON."""
    import triton
    from triton.backends.compiler import GPUTarget

    from overlock_mm.ops import contmix_triton

    compiled = []

    class Compiler:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                code = self.kernel.warmup(*args, grid=grid, **kwargs)
                compiled.append((self.kernel.__name__, len(code.asm['cubin'])))

            return launch

    for name in KERNELS:
        setattr(contmix_triton, name, Compiler(getattr(contmix_triton, name)))
    for capability, dtype, layout, case in COMPILED:
        driver = SimpleNamespace(
            get_current_device=partial(int, capability),
            get_current_stream=lambda device: 0,
            get_current_target=partial(GPUTarget, 'cuda', capability, 32),
        )
        triton.runtime.driver.set_active(driver)
        tensors, sizes = make_inputs(case, getattr(torch, dtype))
        tensors[2] = tensors[2].to(memory_format=getattr(torch, layout))
        results(contmix_triton.contmix, tensors, sizes)
    print(json.dumps(compiled))


def in_new_process(code, **variables):
    """The output of Python code in a process without the interpreter."""
    env = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'}
    env |= {'CUDA_VISIBLE_DEVICES': '', 'PYTHONPATH': f'{TESTS}:{ROOT}/tests:{ROOT}'}
    run = subprocess.run(
        [sys.executable, '-c', code], env=env | variables, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
def test_compiles_for_gpus(tmp_path):
    code = 'import test_contmix_triton as t; t.compile_kernels()'
    compiled = json.loads(in_new_process(code, TRITON_CACHE_DIR=str(tmp_path)))
    launches = [
        name
        for *_, case in COMPILED
        for name in (*KERNELS[:2], *KERNELS[2:] * len(case[-1]))
    ]
    assert [name for name, _ in compiled] == launches
    assert all(size > 0 for _, size in compiled)


def test_unsupported_without_gpu():
    code = (
        'import test_contmix_triton as t;'
        'print(t.reason(*t.make_inputs((1, 1, 1, 1, 3, 3, (3,)))))'
    )
    assert "on 'cpu', not on a GPU" in in_new_process(code)
