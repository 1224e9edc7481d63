"""torch.compile, torch.export and TorchScript of the backbone, folded and not."""

import pytest
import torch
from helpers import TINY, compiled, image, randomised, relative_error
from torch import nn
from torch.export import Dim

from overlock_mm import OverLoCK, fold

ARCH = dict(TINY, focus_depths=(1, 1))  # each block of a stage adds to the tracing time
FORMS = dict(unfolded=lambda model: model, folded=fold)
each_form = pytest.mark.parametrize('form', FORMS.values(), ids=FORMS)


def small(**kwargs):
    torch.manual_seed(0)
    return randomised(OverLoCK(ARCH, **kwargs))


def check_same(outputs, expected):
    for out, needed in zip(outputs, expected, strict=True):
        assert out.shape == needed.shape
        assert relative_error(out, needed) < 1e-5


@pytest.mark.parametrize(
    'form', [pytest.param(FORMS['unfolded'], marks=pytest.mark.slow), fold]
)
def test_compiles_without_graph_breaks(form):
    """Also with gradients enabled."""
    model, x = form(small().eval()), image(2, 3, 64, 96)
    check_same(compiled(model)(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize('with_cp', [False, True])
def test_compiled_training_step(with_cp):
    """Outputs, gradients and running statistics are those of the eager model."""
    x, results = image(2, 3, 64, 64).double(), []
    for run in (lambda model: model, compiled):
        model = small(with_cp=with_cp).double().train()
        maps = run(model)(x)
        sum(m.square().sum() for m in maps).backward()
        results.append((maps, [p.grad for p in model.parameters()], [*model.buffers()]))
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-7)


@pytest.mark.slow
@each_form
def test_exports_for_any_batch(form):
    """With images so small that the maps are enlarged for ContMix."""
    model = form(small().eval())
    program = torch.export.export(
        model, (image(2, 3, 64, 96),), dynamic_shapes=({0: Dim('batch', max=64)},)
    )
    for n in (1, 3):
        x = image(n, 3, 64, 96)
        check_same(program.module()(x), model(x))


@pytest.mark.parametrize(
    'form', [pytest.param(FORMS['unfolded'], marks=pytest.mark.slow), fold], ids=FORMS
)
def test_exports_for_any_size(form):
    model = form(small().eval())
    sizes = {i: Dim.AUTO for i in (0, 2, 3)}
    program = torch.export.export(model, (image(2, 3, 192, 224),), dynamic_shapes=(sizes,))
    for shape in ((1, 3, 200, 171), (3, 3, 161, 256)):
        x = image(*shape)
        check_same(program.module()(x), model(x))


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')  # the size is fixed
@each_form
def test_traces_and_saves(form, tmp_path):
    model, x = form(small().eval()), image(2, 3, 64, 96)
    torch.jit.trace(model, x).save(tmp_path / 'traced.pt')
    traced = torch.jit.load(tmp_path / 'traced.pt')
    check_same(traced(x), model(x))


@each_form
def test_scripting_says_what_to_do(form):
    whole = nn.Sequential(form(small().eval()))
    with pytest.raises(RuntimeError, match=r'cannot be scripted.*torch\.jit\.trace'):
        torch.jit.script(whole)


def test_a_folded_model_needs_no_gradient():
    """Its changes in place would otherwise be errors while compiling."""
    model = fold(small())
    assert not any(m.requires_grad for m in model(image(1, 3, 64, 64)))
