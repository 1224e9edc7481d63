"""Backbone and classifier reproduce what the released code computes (parity/README.md)."""

import numpy as np
import pytest
import torch
from helpers import (
    CASES,
    MANIFEST,
    build,
    case_id,
    check_outputs,
    listing,
    probed,
    run_case,
)


@pytest.mark.parametrize(
    'path',
    sorted(p for p in CASES.glob('*.npz') if not p.stem.endswith('_train')),
    ids=case_id,
)
@pytest.mark.parametrize(
    'dtype, tolerance',
    [(torch.float64, 1e-5), (torch.float32, 1e-3)],
    ids=['float64', 'float32'],
)
def test_eval_outputs(path, dtype, tolerance):
    model, image, case = run_case(path, dtype)
    with torch.no_grad():
        check_outputs(model(image), case, tolerance)
        if 'reparam0.shape' in case:
            model.switch_to_deploy()
            check_outputs(model(image), case, tolerance, name='reparam')


@pytest.mark.parametrize('path', sorted(CASES.glob('*_train.npz')), ids=case_id)
@pytest.mark.parametrize(
    'dtype, tolerance',
    [(torch.float64, 1e-5), (torch.float32, 1e-3)],
    ids=['float64', 'float32'],
)
def test_training_step(path, dtype, tolerance):
    model, image, case = run_case(path, dtype)
    outputs = model(image)
    check_outputs(outputs, case, tolerance)
    loss = sum(
        (
            out
            * torch.from_numpy(
                np.random.RandomState(100 + i).standard_normal(out.shape)
            ).to(dtype)
        ).sum()
        / out.numel() ** 0.5
        for i, out in enumerate(outputs)
    )
    buffers = dict(model.named_buffers())
    for name, value in zip(case['buf.names'], case['buf.absmean'], strict=True):
        assert buffers[name].abs().mean().item() == pytest.approx(value, rel=tolerance), (
            name
        )
    assert loss.item() == pytest.approx(case['loss'].item(), rel=tolerance)
    if dtype == torch.float32:
        return  # gradients are compared where rounding does not blur them
    loss.backward()
    params = dict(model.named_parameters())
    assert set(case['grad.names']) == set(params)
    # a bias in front of a batch norm has no gradient but rounding errors
    noise = 1e-12 * case['grad.norms'].max()
    for name, norm, values in zip(
        case['grad.names'], case['grad.norms'], case['grad.values'], strict=True
    ):
        grad = params[name].grad
        assert grad.norm().item() == pytest.approx(norm, rel=tolerance, abs=noise), name
        ours = probed(grad, 8)
        error = np.linalg.norm(ours - values[: ours.size])
        assert error <= tolerance * np.linalg.norm(values[: ours.size]) + noise, name


@pytest.mark.parametrize('key', MANIFEST)
def test_state_dict_names_and_shapes(key):
    task, arch, form = key.split('_')
    with torch.device('meta'):
        model = build(task, arch, deploy=form == 'deploy')
    entries = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    params = sum(p.numel() for p in model.parameters())
    assert listing(entries) == (MANIFEST[key]['entries'], MANIFEST[key]['sha256'])
    assert params == MANIFEST[key]['parameters']
