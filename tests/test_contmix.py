"""ContMix against its definition, written as a slow loop over positions and taps."""

import numpy as np
import pytest
import torch

from overlock_mm.ops import contmix

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
    'a last tile of one column': (1, 1, 1, 4, 1, 13, 25, (5, 13)),
}


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
    heads = value.reshape(n, len(kernels), g, -1, h, w)
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


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_equals_slow_loop(case):
    inputs = make_inputs(case)
    torch.testing.assert_close(
        contmix(*inputs), slow_contmix(*inputs), rtol=1e-10, atol=1e-10
    )


def test_random_sizes():
    rng = np.random.RandomState(0)
    for seed in range(20):
        kernels = tuple(rng.choice([3, 5, 7, 13], 2).tolist())
        size = [int(rng.randint(max(kernels), max(kernels) + 9)) for _ in range(2)]
        n, g, c, regions, d = rng.randint(1, 4, 5).tolist()
        inputs = make_inputs((n, g, c, regions, d, *size, kernels), seed=seed)
        torch.testing.assert_close(
            contmix(*inputs), slow_contmix(*inputs), rtol=1e-10, atol=1e-10
        )


@pytest.mark.parametrize(
    'case',
    [
        (1, 2, 1, 2, 1, 5, 6, (3, 5)),
        (1, 1, 1, 2, 1, 7, 7, (3, 7)),
        (1, 1, 1, 2, 1, 13, 26, (5, 13)),
    ],
    ids=str,
)
def test_gradients(case):
    *tensors, rpbs, kernels = make_inputs(case)
    tensors = [t.requires_grad_() for t in (*tensors, *rpbs)]

    def op(query, key, value, weight, bias, *rpbs):
        return contmix(query, key, value, weight, bias, rpbs, kernels)

    assert torch.autograd.gradcheck(op, tensors, fast_mode=True)


@pytest.mark.parametrize(
    'dtype, tolerance',
    [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)],
)
def test_low_precision(dtype, tolerance):
    case = CASES['wider than a tile, k=13']
    *tensors, rpbs, kernels = make_inputs(case, dtype)
    exact = contmix(*(t.double() for t in tensors), [r.double() for r in rpbs], kernels)
    out = contmix(*tensors, rpbs, kernels)
    assert out.dtype == dtype
    assert (out.double() - exact).norm() / exact.norm() < tolerance


def test_non_contiguous_inputs():
    *tensors, rpbs, kernels = make_inputs(CASES['small'])
    query, key, value, weight, bias = tensors
    value = value.to(memory_format=torch.channels_last)
    query = query.transpose(-1, -2).contiguous().transpose(-1, -2)
    out = contmix(query, key, value, weight.t().contiguous().t(), bias, rpbs, kernels)
    torch.testing.assert_close(out, contmix(*tensors, rpbs, kernels))


def test_does_not_copy_the_values_per_tap():
    """No tensor that autograd keeps is as large as an unfolded copy of the values."""
    n, g, c, regions, d, h, w, kernels = case = (1, 2, 4, 49, 16, 26, 48, (5, 13))
    *tensors, rpbs, _ = make_inputs(case, torch.float32)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel()) or t, lambda t: t
    ):
        contmix(*(t.requires_grad_() for t in tensors), rpbs, kernels)
    assert max(sizes) < n * g * d * h * w * 13 * 13 / 4


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(kernels=(3, 11)), 'at most the shorter side of the 7x9 map'),
        (dict(kernels=(4, 5)), 'must be odd'),
        (dict(rpbs=1), 'rpbs must have the shapes'),
        (dict(weight=5), 'proj_weight has 5 rows'),
        (dict(value=7), 'value has 7 channels'),
    ],
)
def test_bad_arguments(change, message):
    query, key, value, weight, bias, rpbs, kernels = make_inputs(CASES['small'])
    with pytest.raises(ValueError, match=message):
        contmix(
            query,
            key,
            value[:, : change.get('value')],
            weight[: change.get('weight')],
            bias,
            rpbs[: change.get('rpbs')],
            change.get('kernels', kernels),
        )
