"""The depth-wise kernels against torch's convolution in float64, and its gradients."""

import os
import subprocess
import sys
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT

from overlock_mm.ops import depthwise_triton
from overlock_mm.ops.depthwise_triton import forward, input_grad, unsupported, weight_grad

# Without a GPU the kernels run in Triton's interpreter: TRITON_INTERPRET=1.
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'

# (N, C, H, W, kernel size, dilation)
CASES = {
    '3': (2, 5, 6, 7, 3, 1),
    '5, two blocks of channels': (1, 34, 3, 9, 5, 1),
    '7, two segments': (2, 3, 4, 18, 7, 1),
    '7, two bands': (1, 2, 10, 3, 7, 1),
    '13': (1, 3, 5, 17, 13, 1),
    '17': (1, 3, 10, 19, 17, 1),
    '17, smaller map': (2, 3, 4, 5, 17, 1),
    '17, one position': (2, 33, 1, 1, 17, 1),
    '9, dilation 2': (1, 3, 10, 13, 9, 2),
    '3, dilation 7': (2, 3, 9, 17, 3, 7),
    '3, dilation 7, smaller map': (1, 3, 5, 4, 3, 7),
    '5, dilation 3': (1, 2, 7, 40, 5, 3),
    '1': (1, 3, 2, 3, 1, 1),
}
each_case = pytest.mark.parametrize(
    'case',
    [
        pytest.param(case, id=name, marks=[pytest.mark.slow] if name == '17' else [])
        for name, case in CASES.items()
    ],
)


def make_inputs(case, dtype=torch.float32, weight_dtype=None, seed=0):
    """x, weight and the gradient by the output."""
    n, c, h, w, k, _ = case
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    return rand(n, c, h, w), rand(c, 1, k, k, dtype=weight_dtype or dtype), rand(n, c, h, w)


@cache
def expected(case, dtype=torch.float32, weight_dtype=None):
    """Output and gradients by input and weight of ``make_inputs``, in float64."""
    return torch_convolution(*make_inputs(case, dtype, weight_dtype), case[-1])


def torch_convolution(x, weight, grad, r):
    x, weight = (t.double().requires_grad_() for t in (x, weight))
    padding = r * (weight.shape[-1] // 2)
    out = F.conv2d(x, weight, padding=padding, dilation=r, groups=x.shape[1])
    return out.detach(), *torch.autograd.grad(out, (x, weight), grad.double())


def check(given, exact, dtype=torch.float32, rtol=0.0):
    assert given.dtype == dtype and given.shape == exact.shape
    # float32 sums of at most 600 products of about 1
    torch.testing.assert_close(given.double(), exact, rtol=rtol, atol=5e-5)


@each_case
def test_forward(case):
    x, weight, _ = make_inputs(case)
    check(forward(x, weight, case[-1]), expected(case)[0])


@each_case
def test_input_grad(case):
    _, weight, grad = make_inputs(case)
    check(input_grad(grad, weight, case[-1]), expected(case)[1])


@each_case
def test_weight_grad(case):
    x, _, grad = make_inputs(case)
    check(weight_grad(x, grad, *case[-2:]), expected(case)[2])


def test_cases_cover_all_lengths_of_segments():
    lengths = {depthwise_triton._segments(*case[-3:])[0] for case in CASES.values()}
    assert lengths == {4, 8, 16}


@pytest.mark.parametrize('programs', [1, 5])
def test_weight_grad_with_few_programs(monkeypatch, programs):
    """A program goes over several units of the map, as it does on large maps."""
    case = (3, 3, 10, 20, 3, 1)  # 3 images of 2 segments and 2 bands: 12 units
    monkeypatch.setattr(depthwise_triton, '_PROGRAMS', programs)
    x, _, grad = make_inputs(case)
    check(weight_grad(x, grad, 3), expected(case)[2])


@pytest.mark.parametrize('channels', [6, 7, 66], ids='{} channels'.format)
@pytest.mark.parametrize('weight_dtype', [None, torch.float32], ids=['same', 'float32'])
@pytest.mark.parametrize(
    'dtype, unit', [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)], ids=str
)
def test_half_precision(dtype, unit, weight_dtype, channels):
    """Only the output is rounded: products and sums are float32.

    A GPU rounds to the nearest, the interpreter to the next towards zero: the
    tolerance is one unit in the last place.
    """
    case = (1, channels, 3, 11, 7, 1)
    x, weight, grad = make_inputs(case, dtype, weight_dtype)
    out, by_input, by_weight = expected(case, dtype, weight_dtype)
    check(forward(x, weight), out, dtype, rtol=unit)
    check(input_grad(grad, weight), by_input, dtype, rtol=unit)
    check(weight_grad(x, grad, 7), by_weight)


@pytest.mark.parametrize('channels', [1, 6])
def test_memory_formats(channels):
    """Any strides in, channels_last out, inputs as they were."""
    n, _, h, w, k, r = case = (2, channels, 3, 4, 3, 2)
    x, weight, grad = make_inputs(case)
    wide = x.new_zeros(n, 2 * channels, h + 1, 2 * w)
    formats = {
        'NCHW': x.clone(),
        'NHWC': x.to(memory_format=torch.channels_last),
        'transposed': x.transpose(2, 3).contiguous().transpose(2, 3),
        'slice': wide[:, ::2, 1:, ::2].copy_(x),
        'channels of NHWC': wide.to(memory_format=torch.channels_last)[
            :, channels:, 1:, :w
        ].copy_(x),
    }
    exact = expected(case)
    for given in formats.values():
        out = forward(given, weight.to(memory_format=torch.channels_last), r)
        assert out.is_contiguous(memory_format=torch.channels_last)
        check(out, exact[0])
        check(weight_grad(given, grad, k, r), exact[2])
        assert torch.equal(given, x)
    by_input = input_grad(grad, weight.transpose(2, 3).contiguous().transpose(2, 3), r)
    assert by_input.is_contiguous(memory_format=torch.channels_last)
    check(by_input, exact[1])


def test_expanded_grad():
    """The gradient of a sum comes as one number with strides of 0."""
    case = (1, 3, 4, 5, 5, 1)
    x, weight, _ = make_inputs(case)
    grad = x.new_ones(()).expand_as(x)
    exact = torch_convolution(x, weight, grad, 1)
    check(input_grad(grad, weight), exact[1])
    check(weight_grad(x, grad, 5), exact[2])


@pytest.mark.parametrize('shape', [(0, 3, 4, 5), (2, 3, 0, 5), (2, 0, 4, 5)], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_empty(shape, dtype):
    x = torch.empty(shape, device=DEVICE, dtype=dtype)
    weight = torch.ones(shape[1], 1, 5, 5, device=DEVICE, dtype=dtype)
    for out in (forward(x, weight), input_grad(x, weight)):
        assert out.shape == shape and out.dtype == dtype
    check(weight_grad(x, x, 5), torch.zeros_like(weight, dtype=torch.float64))


@pytest.fixture
def nan_memory():
    """New tensors hold NaN until they are written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_deterministic(nan_memory):
    """Every element is written, and does not depend on what was there before.

    That no program adds to what others wrote is asserted on the compiled code below.
    """
    assert torch.empty(9, device=DEVICE).isnan().all()
    x, weight, grad = make_inputs(CASES['5, two blocks of channels'])
    for function, arguments in (
        (forward, (x, weight)),
        (input_grad, (grad, weight)),
        (weight_grad, (x, grad, 5)),
    ):
        out = function(*arguments)
        assert out.isfinite().all()
        assert torch.equal(function(*arguments), out)


@pytest.mark.parametrize(
    'x, weight, reason',
    [
        (
            torch.ones(1, 2, 3, 3, dtype=torch.float64),
            torch.ones(2, 1, 3, 3),
            'x is torch.f',
        ),
        (torch.ones(1, 2, 3, 3), torch.ones(2, 1, 3, 3).half(), 'weight is torch.float16'),
        (torch.ones(1, 2, 3, 3).half(), torch.ones(2, 1, 3, 3).bfloat16(), 'neither'),
        (torch.ones(1, 2, 3, 3), torch.ones(2, 1, 4, 4), '4x4 kernel is not odd'),
        (
            torch.ones(1, 2, 3, 3),
            torch.ones(2, 1, 3, 5),
            '3x5 kernel is not odd and square',
        ),
        (torch.ones(1, 2, 3, 3), torch.ones(3, 1, 3, 3), 'are not'),
        (torch.ones(1, 2, 3, 3), torch.ones(2, 2, 3, 3), 'are not'),
        (torch.ones(2, 3, 3), torch.ones(2, 1, 3, 3), 'are not'),
        (torch.ones(1, 2, 3, 3), torch.ones(2, 3, 3), 'are not'),
    ],
)
def test_unsupported(x, weight, reason):
    assert reason in unsupported(x.to(DEVICE), weight.to(DEVICE))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_supported(dtype):
    x, weight, _ = make_inputs(CASES['3'], dtype)
    assert unsupported(x, weight) is None
    assert unsupported(x, weight.float()) is None


def test_unsupported_devices(monkeypatch):
    x, weight, _ = (t.cpu() for t in make_inputs(CASES['3']))
    assert 'x is on cpu and weight on meta' in unsupported(x, weight.to('meta'))
    assert 'on meta, and Triton needs' in unsupported(x.to('meta'), weight.to('meta'))
    monkeypatch.setattr(depthwise_triton, '_INTERPRETED', False)
    assert 'on cpu, and Triton needs a CUDA device' in unsupported(x, weight)


COMPILE = r"""
import re, subprocess, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from overlock_mm.ops import depthwise_triton

for config in sys.argv[1:]:
    kernel, dtype, k, capability = config.split()
    kernel = getattr(depthwise_triton, kernel)
    vec, channels = (1, 32) if dtype == 'fp32' else (2, 64)
    constants = dict(
        KERNEL=int(k), COLUMNS=16, VEC=vec, CHANNELS=channels, ROWS=4, TAPS=4, BAND=8
    )
    types = dict(x=dtype, weight='fp32', out=dtype, grad=dtype, partial='fp32')
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], constexprs[i,] = 'constexpr', constants[name]
        elif name in types:
            signature[name] = f'*{types[name]}'
            attributes[i,] = [['tt.divisibility', 16]]
        else:
            signature[name] = 'i32'
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs, attributes),
        target=GPUTarget('cuda', int(capability), 32),
        options=dict(num_warps=4),
    )
    assert compiled.asm['cubin'].startswith(b'\x7fELF'), config
    ptx = compiled.asm['ptx']
    assert not re.search(r'\b(atom|red)\.', ptx), f'{config}: programs share a sum'
    loads = set(re.findall(r'ld\.global\.(\S+)', ptx))
    assert loads <= {'b32', 'v2.b32'}, f'{config}: loads {loads} are not of VEC channels'
    with open('kernel.ptx', 'w') as f:
        f.write(ptx)
    arch = re.search(r'\.target (\w+)', ptx)[1]
    report = subprocess.run(
        [triton.knobs.nvidia.ptxas.path, '-v', f'--gpu-name={arch}', 'kernel.ptx'],
        capture_output=True, text=True, check=True,
    ).stderr
    assert ' 0 bytes spill stores, 0 bytes spill loads' in report, (config, report)
    registers = int(re.search(r'Used (\d+) registers', report)[1])
    # three programs of 128 threads on a multiprocessor
    assert registers <= 168, f'{config}: {registers} registers'
"""


def test_compiles_for_gpus(tmp_path):
    """To machine code, which needs no GPU, with all that a lane holds in registers."""
    environment = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'}
    environment |= {'TRITON_CACHE_DIR': str(tmp_path), 'PYTHONPATH': str(ROOT)}
    configs = (
        '_conv_kernel bf16 17 90',
        '_weight_grad_kernel bf16 17 90',
        '_conv_kernel fp32 7 80',
        '_weight_grad_kernel fp16 7 80',
    )
    done = subprocess.run(
        [sys.executable, '-c', COMPILE, *configs],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
