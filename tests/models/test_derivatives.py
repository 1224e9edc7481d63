"""Second derivatives, forward mode and torch.func, against plain torch in float64."""

import pytest
import torch
from helpers import TINY, image, randomised, relative_error

from overlock_mm import OverLoCK
from overlock_mm.models import layers
from overlock_mm.models.layers import GlobalResponseNorm
from overlock_mm.ops import depthwise, set_contmix_backend


def small():
    torch.manual_seed(0)
    return randomised(OverLoCK(dict(TINY, focus_depths=(1, 1)))).eval()


@pytest.fixture
def plain_torch(monkeypatch):
    """A function that leaves nothing but torch's own differentiable operations."""

    def switch():
        set_contmix_backend('reference')
        monkeypatch.setattr(layers, 'needs_plain_ops', lambda: True)
        monkeypatch.setattr(depthwise, 'needs_plain_ops', lambda: True)

    yield switch
    set_contmix_backend(None)


def gradient_penalty(critic, x):
    """The gradients of the penalty of WGAN-GP (https://arxiv.org/abs/1704.00028)."""
    x = x.clone().requires_grad_()
    score = sum(m.mean() for m in critic(x))
    (grad,) = torch.autograd.grad(score, x, create_graph=True)
    penalty = (grad.flatten(1).norm(dim=1) - 1).square().mean()
    parameters = dict(critic.named_parameters())
    grads = torch.autograd.grad(penalty, parameters.values(), allow_unused=True)
    return {k: g for k, g in zip(parameters, grads, strict=True) if g is not None}


@pytest.mark.parametrize(
    'dtype, tolerance', [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=str
)
def test_gradient_penalty(dtype, tolerance, plain_torch):
    model, x = small().to(dtype), image(2, 3, 64, 64).to(dtype)
    grads = gradient_penalty(model, x)
    plain_torch()
    exact = gradient_penalty(model.double(), x.double())
    assert set(grads) == set(exact) and len(grads) > 200
    largest = max(g.norm() for g in exact.values())
    for name, needed in exact.items():
        error = (grads[name].double() - needed).norm()
        assert error < tolerance * (needed.norm() + 1e-6 * largest), name


def test_func_grad_and_jvp(plain_torch):
    """By the image, in one direction: both derivatives are the same number."""
    model, x = small().double(), image(2, 3, 64, 64).double()
    direction = image(2, 3, 64, 64).double().flip(2)

    def score(x):
        return sum(m.square().mean() for m in model(x))

    by_reverse = (torch.func.grad(score)(x) * direction).sum()
    _, by_forward = torch.func.jvp(score, (x,), (direction,))
    plain_torch()
    leaf = x.clone().requires_grad_()
    exact = (torch.autograd.grad(score(leaf), leaf)[0] * direction).sum()
    torch.testing.assert_close(by_reverse, exact)
    torch.testing.assert_close(by_forward, exact)


def test_gradients_of_every_image():
    """vmap over grad, as for differential privacy."""
    model, x = small(), image(2, 3, 64, 64)
    parameters = {k: v.detach() for k, v in model.named_parameters()}

    def loss(parameters, image):
        maps = torch.func.functional_call(model, parameters, (image[None],))
        return sum(m.square().sum() for m in maps)

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i in range(2):
        model.zero_grad()
        sum(m.square().sum() for m in model(x[i : i + 1])).backward()
        for name, parameter in model.named_parameters():
            assert relative_error(grads[name][i], parameter.grad) < 1e-3, name


class TestGlobalResponseNorm:
    @staticmethod
    def inputs():
        x = image(2, 3, 4, 5).double()
        x[:, 1] = 0  # a channel of zeros, whose norm has no derivative
        return x, image(1, 3, 1, 1).double(), image(1, 3, 1, 1).double() + 1

    @staticmethod
    def norm(x, gamma, beta):
        parameters = dict(gamma=gamma, beta=beta)
        return torch.func.functional_call(GlobalResponseNorm(3), parameters, (x,))

    def test_all_derivatives(self):
        x, *parameters = (t.requires_grad_() for t in self.inputs())
        x = x.detach()[:, [0, 2, 2]].requires_grad_()  # numbers of differences need slopes
        options = dict(check_forward_ad=True, fast_mode=True)
        assert torch.autograd.gradcheck(self.norm, (x, *parameters), **options)
        assert torch.autograd.gradgradcheck(self.norm, (x, *parameters), fast_mode=True)

    def test_a_channel_of_zeros(self):
        tensors = [t.requires_grad_() for t in self.inputs()]
        out = self.norm(*tensors).square().sum()
        first = torch.autograd.grad(out, tensors, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), tensors)
        assert all(g.isfinite().all() for g in second)
        tangents = tuple(torch.ones_like(t) for t in tensors)
        _, tangent = torch.func.jvp(self.norm, tuple(t.detach() for t in tensors), tangents)
        assert tangent.isfinite().all()


def test_scale_of_a_folded_norm_by_the_image():
    """Not through batch norm's statistics, which have no derivative."""
    norm = randomised(GlobalResponseNorm(3)).double()
    x = image(2, 3, 4, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(norm.scale, x)
