"""What runs on a GPU, against the CPU or float64: `make gpu`.

These tests need torch, triton, timm and this package alone. With TRITON_INTERPRET=1 and
OVERLOCK_MM_TEST_DEVICE=cpu, those that are not about CUDA itself run on the CPU, slowly.
"""

import copy
import os

import pytest
import torch
import torch.nn.functional as F
from helpers import CASES, check_outputs, relative_error, run_case, tiny
from torch import nn

from overlock_mm import OverLoCK, fold, switch_to_deploy
from overlock_mm.models import layers
from overlock_mm.ops import contmix, contmix_reference, depthwise_triton

HAS_CUDA = torch.cuda.is_available()
DEVICE = os.environ.get('OVERLOCK_MM_TEST_DEVICE') or 'cuda'
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == 'cuda' and not HAS_CUDA, reason='needs a GPU'),
]
needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason='is about CUDA')
HALF = [torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(autouse=True)
def _exact_products():
    """TF32 rounds the inputs of products to ten bits."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def rand(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


# (N, heads, channels of a query, channels of a head, H, W)
SHAPES = {
    'small': (1, 2, 4, 6, 13, 14),
    'odd': (2, 1, 9, 5, 17, 29),
    'stage 3': (2, 8, 16, 16, 50, 84),
    'stage 4': (1, 16, 20, 20, 25, 42),
}


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'strided'])
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('shape', SHAPES)
def test_contmix(shape, dtype, layout):
    """The Triton kernels, forward and backward, against the definition in float64."""
    if DEVICE == 'cpu' and (shape.startswith('stage') or dtype == torch.bfloat16):
        pytest.skip("slow in Triton's interpreter, or wrong: bfloat16 is bits")
    n, heads, c, d, h, w = SHAPES[shape]
    kernels, regions = (5, 13), 49
    taps = sum(k * k for k in kernels)
    value = rand(n, 2 * heads * d, h, w, dtype=dtype)
    if layout == 'channels_last':
        value = value.contiguous(memory_format=torch.channels_last)
    elif layout == 'strided':
        value = rand(n, 2 * heads * d, h, 2 * w, dtype=dtype)[..., ::2]
    tensors = [
        rand(n, heads, c, h, w, dtype=dtype) * c**-0.5,
        rand(n, heads, c, regions, dtype=dtype),
        value,
        rand(taps, regions, dtype=dtype) * regions**-0.5,
        rand(taps, dtype=dtype),
        *(rand(heads, 2 * k - 1, 2 * k - 1, dtype=dtype) for k in kernels),
    ]
    grad = rand(*value.shape, dtype=dtype)

    def run(op, tensors, **options):
        tensors = [t.detach().requires_grad_() for t in tensors]
        out = op(*tensors[:5], tensors[5:], kernels, **options)
        return [out, *torch.autograd.grad(out, tensors, grad.to(out.dtype))]

    found = run(contmix, tensors, backend='triton')
    exact = run(contmix_reference.contmix, [t.double() for t in tensors])
    for a, b in zip(found, exact, strict=True):
        assert relative_error(a.double(), b) < TOLERANCE[dtype]


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize(
    'channels, size, kernel, dilation',
    [(64, (33, 47), 17, 1), (40, (20, 21), 9, 2), (96, (16, 9), 3, 7), (8, (5, 3), 7, 1)],
)
def test_depthwise(channels, size, kernel, dilation, dtype):
    """The Triton kernels against torch in float64."""
    if DEVICE == 'cpu':
        channels = 4
    x, grad = (rand(2, channels, *size, dtype=dtype) for _ in range(2))
    weight = rand(channels, 1, kernel, kernel, dtype=dtype) / kernel
    inputs = [t.double().requires_grad_() for t in (x, weight)]
    padding = dilation * (kernel // 2)
    exact = F.conv2d(*inputs, None, 1, padding, dilation, channels)
    exact = [exact, *torch.autograd.grad(exact, inputs, grad.double())]
    found = [
        depthwise_triton.forward(x, weight, dilation),
        depthwise_triton.input_grad(grad, weight, dilation),
        depthwise_triton.weight_grad(x, grad, kernel, dilation),
    ]
    for a, b in zip(found, exact, strict=True):
        assert relative_error(a.double(), b) < TOLERANCE[dtype]


@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('name', ['det_xt_1x64x64_eval', 'seg_t_1x64x64_eval'])
def test_numbers_of_the_released_code(name, memory_format):
    model, image, case = run_case(CASES / f'{name}.npz', torch.float32)
    model = model.to(DEVICE, memory_format=memory_format)
    with torch.no_grad():
        maps = model(image.to(DEVICE).contiguous(memory_format=memory_format))
    check_outputs(tuple(m.cpu() for m in maps), case, 2e-3)


def small(**kwargs):
    return tiny(**kwargs).to(DEVICE)


def train(model, steps=5, dtype=None):
    """Losses of some steps on the same images."""
    images = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(1))
    images = images.to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(DEVICE, enabled=dtype == torch.float16)
    losses = []
    for _ in range(steps):
        with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
            maps = model(images)
        loss = sum(m.float().square().mean() for m in maps)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize('dtype', HALF, ids=str)
def test_training_in_mixed_precision(dtype):
    exact = train(small(norm_eval=True).train())
    losses = train(small(norm_eval=True).train(), dtype=dtype)
    assert losses == pytest.approx(exact, rel=0.1) and losses[-1] < losses[0]


@pytest.mark.parametrize('form', ['deploy', 'fold'])
def test_compiled_inference(form):
    model, x = small().eval(), rand(1, 3, 224, 256)
    model = switch_to_deploy(model) if form == 'deploy' else fold(model)
    with torch.no_grad():
        expected = model(x)
        torch.compiler.reset()
        found = torch.compile(model, dynamic=False)(x)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-3


def test_a_compiled_training_step():
    torch.compiler.reset()
    model = small(norm_eval=True).train()
    compiled = torch.compile(copy.deepcopy(model), dynamic=False)
    assert train(compiled, 2) == pytest.approx(train(model, 2), rel=1e-2)


@needs_cuda
def test_a_cuda_graph():
    model, x = fold(small().eval()), rand(1, 3, 224, 256)
    stream = torch.cuda.Stream()
    with torch.no_grad():
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            maps = model(x)
        x.copy_(rand(*x.shape))
        graph.replay()
        for a, b in zip(maps, model(x), strict=True):
            assert relative_error(a, b) < 1e-4


@needs_cuda
def test_sync_batch_norm():
    """In one process it is a batch norm; its input is made again, too."""
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT='29531')
    torch.distributed.init_process_group('nccl', rank=0, world_size=1)
    try:
        model = small().train()
        synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
        assert train(synced, 3) == pytest.approx(train(model, 3), rel=1e-3)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('memory_format', FORMATS)
def test_fold(memory_format, dtype):
    model, x = small().eval(), rand(2, 3, 224, 256)
    x = x.contiguous(memory_format=memory_format)
    with torch.no_grad():
        expected = model(x)
        folded = fold(model).to(dtype=dtype, memory_format=memory_format)
        for a, b in zip(folded(x.to(dtype)), expected, strict=True):
            assert relative_error(a.float(), b) < TOLERANCE[dtype]


@needs_cuda
def test_memory_of_a_training_step(monkeypatch):
    """It is about half of what plain layers take."""

    def peak():
        model = OverLoCK('xt').cuda().train()
        x = rand(2, 3, 512, 512)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        sum(m.square().mean() for m in model(x)).backward()
        return torch.cuda.max_memory_allocated() - before

    peak()  # timing the kernels takes memory, too
    lean = peak()
    for name in ('_is_plain_mlp', '_can_make_again'):
        monkeypatch.setattr(layers, name, lambda *_: False)
    assert lean < 0.75 * peak()
