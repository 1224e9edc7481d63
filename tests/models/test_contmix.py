"""ContMix as a module, and what users put in place of its projection."""

import copy

import pytest
import torch
from helpers import TINY, filled, image, randomised, relative_error
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from overlock_mm import OverLoCK, fold
from overlock_mm.models.blocks import DynamicConvBlock
from overlock_mm.models.contmix import ContMix

NAMES = ['sub_blocks3.0', 'sub_blocks3.1', 'sub_blocks4.0', 'sub_blocks4.1']


class Lora(nn.Module):
    """A low-rank update beside a frozen 1x1 convolution."""

    def __init__(self, base, rank=2, dropout=0.0):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Conv2d(base.in_channels, rank, 1, bias=False)
        self.up = nn.Conv2d(rank, base.out_channels, 1, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(self.dropout(x)))

    def merged(self):
        conv = copy.deepcopy(self.base)
        update = self.up.weight.flatten(1) @ self.down.weight.flatten(1)
        conv.weight.data += update[:, :, None, None]
        return conv


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def mixer(**kwargs):
    torch.manual_seed(0)
    return randomised(ContMix(16, 8, 7, 4, **kwargs)).eval()


def inputs(height=9, width=12):
    return image(2, 16, height, width), image(2, 8, height, width), image(2, 16, 5, 5)


def slow(module, x, context, value):
    """What the docstring says, position by position, with the projection called."""
    query, key = module.weight_query(x), module.weight_key(context).flatten(2)
    n, dim, height, width = value.shape
    heads, depth = module.num_heads, dim // (2 * module.num_heads)
    query = query.unflatten(1, (heads, -1)) * (dim // heads) ** -0.5
    affinity = torch.einsum('ngchw,ngcr->ngrhw', query, key.unflatten(1, (heads, -1)))
    logits = module.weight_proj(affinity.flatten(0, 1)).unflatten(0, (n, heads))
    out = torch.empty_like(value)
    first = 0
    for i, (k, rpb) in enumerate([(5, module.rpb1), (7, module.rpb2)]):
        part = value[:, i * dim // 2 : (i + 1) * dim // 2].unflatten(1, (heads, depth))
        for y in range(height):
            for x in range(width):
                top = min(max(y - k // 2, 0), height - k)
                left = min(max(x - k // 2, 0), width - k)
                bias = rpb[:, top - y + k - 1 : top - y + 2 * k - 1, left - x + k - 1 :][
                    ..., :k
                ]
                taps = logits[:, :, first : first + k * k, y, x] + bias.flatten(1)
                window = part[..., top : top + k, left : left + k].flatten(3)
                mixed = torch.einsum('ngt,ngdt->ngd', taps.softmax(-1), window)
                out[:, i * dim // 2 : (i + 1) * dim // 2, y, x] = mixed.flatten(1)
        first += k * k
    return out


def test_it_is_what_its_docstring_says():
    module = mixer().double()
    x, context, value = image(2, 16, 9, 12), image(2, 8, 9, 12), image(2, 16, 9, 12) + 1
    arguments = x.double(), context.double(), value.double()
    with torch.no_grad():
        torch.testing.assert_close(module(*arguments), slow(module, *arguments))


def test_small_maps_are_resized():
    """To the large kernel's size; and the result back to the size of the map."""
    module, parts = mixer(), [image(1, c, 3, 6) for c in (16, 8, 16)]
    grown = [
        nn.functional.interpolate(t, (7, 14), mode='bilinear', align_corners=False)
        for t in parts
    ]
    with torch.no_grad():
        expected = nn.functional.adaptive_avg_pool2d(slow(module, *grown), (3, 6))
        torch.testing.assert_close(module(*parts), expected)


def test_the_block_is_a_contmix_with_the_released_names():
    block = DynamicConvBlock(16, 8, 7, 2)
    assert isinstance(block, ContMix) and block.num_heads == 4
    names = set(ContMix(16, 8, 7, 4).state_dict())
    assert names <= set(block.state_dict())
    assert {'weight_query.0.weight', 'weight_key.1.weight', 'weight_proj.bias'} <= names


def replaced(kind):
    """A model with something in place of weight_proj, and a plain one that equals it."""
    model, plain = filled(OverLoCK(TINY)).eval(), filled(OverLoCK(TINY)).eval()
    for name in NAMES:
        block, own = model.get_submodule(name), plain.get_submodule(name)
        proj = block.weight_proj
        if kind == 'lora':
            block.weight_proj = randomised(Lora(proj, dropout=0.5)).double().eval()
            own.weight_proj = block.weight_proj.merged()
        elif kind == 'parametrization':
            parametrize.register_parametrization(proj, 'weight', Doubled())
            own.weight_proj.weight.data *= 2
        elif kind == 'weight norm':
            parametrizations.weight_norm(proj)
            proj.parametrizations.weight.original0.data *= 2
            own.weight_proj.weight.data *= 2
        elif kind == 'pruning':
            prune.l1_unstructured(proj, 'weight', amount=0.5)
            own.weight_proj.weight.data *= proj.weight_mask
        elif kind == 'hook':
            proj.register_forward_hook(lambda module, inputs, out: 2 * out)
            own.weight_proj.weight.data *= 2
            own.weight_proj.bias.data *= 2
        elif kind == 'forward of one layer':
            proj.forward = lambda x, call=proj.forward: 2 * call(x)
            own.weight_proj.weight.data *= 2
            own.weight_proj.bias.data *= 2
        elif kind == 'no bias':
            block.weight_proj = nn.Conv2d(49, proj.out_channels, 1, bias=False)
            block.weight_proj.weight = proj.weight
            own.weight_proj.bias.data.zero_()
    return model, plain


@pytest.mark.parametrize(
    'kind',
    [
        'lora',
        'parametrization',
        'weight norm',
        'pruning',
        'hook',
        'forward of one layer',
        'no bias',
    ],
)
def test_what_replaces_the_projection_takes_effect(kind):
    """Also after folding, which merges it."""
    model, plain = replaced(kind)
    x = image(2, 3, 64, 96).double()
    with torch.no_grad():
        before = filled(OverLoCK(TINY)).eval()(x)[3]
        expected = plain(x)[3]
        assert relative_error(model(x)[3], expected) < 1e-9
        assert relative_error(fold(model)(x)[3], expected) < 1e-9
    assert relative_error(before, expected) > 1e-5


@pytest.mark.parametrize('autocast', [False, True])
def test_an_adapter_learns(autocast):
    """Its gradients are those of the merged weights; under autocast it stays in float32."""
    module = mixer()
    module.weight_proj = lora = randomised(Lora(module.weight_proj))
    plain = mixer()
    plain.weight_proj = lora.merged().requires_grad_()
    x, context, value = image(1, 16, 8, 8), image(1, 8, 8, 8), image(1, 16, 8, 8)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        module(x, context, value).square().sum().backward()
        plain(x, context, value).square().sum().backward()
    assert lora.base.weight.grad is None
    grad = plain.weight_proj.weight.grad.flatten(1)
    tolerance = 1e-2 if autocast else 1e-4
    down, up = lora.down.weight.flatten(1), lora.up.weight.flatten(1)
    assert relative_error(lora.up.weight.grad.flatten(1), grad @ down.T) < tolerance
    assert relative_error(lora.down.weight.grad.flatten(1), up.T @ grad) < tolerance


def test_dropout_of_an_adapter_acts_in_training_only():
    module = mixer()
    module.weight_proj = randomised(Lora(module.weight_proj, dropout=0.5)).train()
    parts = image(1, 16, 8, 8), image(1, 8, 8, 8), image(1, 16, 8, 8)
    with torch.no_grad():
        assert not torch.equal(module(*parts), module(*parts))
        assert module.weight_proj.dropout.training
        module.eval()
        assert torch.equal(module(*parts), module(*parts))


@pytest.mark.parametrize('training', [False, True])
def test_a_projection_that_is_not_affine(training):
    module = mixer().train(training)
    module.weight_proj = nn.Sequential(module.weight_proj, nn.GELU())
    parts = image(1, 16, 8, 8), image(1, 8, 8, 8), image(1, 16, 8, 8)
    with pytest.raises(TypeError, match='weight_proj was replaced by a Sequential that is'):
        module(*parts)
    assert module.weight_proj.training or not training


@pytest.mark.dev_stack
def test_an_adapter_compiles():
    module = mixer()
    module.weight_proj = randomised(Lora(module.weight_proj)).eval()
    parts = image(1, 16, 8, 8), image(1, 8, 8, 8), image(1, 16, 8, 8)
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend='eager')
        assert relative_error(compiled(*parts), module(*parts)) < 1e-5


def test_order_of_parameters():
    """Optimizers store their state by the order, so that it is part of the file format."""
    names = [n.split('.')[0] for n, _ in DynamicConvBlock(32, 8, 5, 2).named_parameters()]
    expected = (
        'rpb1 rpb2 x_scale h_scale dwconv1 norm1 fusion weight_query weight_key '
        'weight_proj dyconv_proj lepe se_layer gate proj dwconv2 norm2 mlp ls1 ls2'
    )
    assert list(dict.fromkeys(names)) == expected.split()
    backbone = OverLoCK(TINY, context_skip=True)
    parts = dict.fromkeys(n.split('.')[0] for n, _ in backbone.named_parameters())
    assert list(parts)[-2:] == ['extra_norm', 'h_proj']
