"""Backbone and classifier reproduce what the released code computes (parity/README.md).

Depth-wise convolutions in float64 are slow: images of 224 pixels and more run in float32,
and in float64 with the slow tests.
"""

import numpy as np
import pytest
import torch
from helpers import (
    CASES,
    MANIFEST,
    build,
    check_outputs,
    check_training_step,
    listing,
    run_case,
)

ARCHS = ('xt', 't', 's', 'b')
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
# the two dense forms of every arch on the same small image share a model below
SHARED = [f'{task}_{arch}_1x64x64_eval' for arch in ARCHS for task in ('det', 'seg')]


def cases(mode, smaller_than):
    """Names of cases with their dtypes; those in float64 are slow from a size on."""
    for path in sorted(CASES.glob('*.npz')):
        task, *_, size, kind = path.stem.split('_')
        if task == 'block' or path.stem in SHARED or (kind == 'train') != (mode == 'train'):
            continue
        _, height, width = map(int, size.split('x'))
        slow = [pytest.mark.slow] if height * width >= smaller_than else []
        yield pytest.param(path.stem, torch.float64, marks=slow, id=f'{path.stem}-float64')
        yield pytest.param(path.stem, torch.float32, id=f'{path.stem}-float32')


@pytest.mark.parametrize(
    'arch', ['xt', 't', *(pytest.param(a, marks=pytest.mark.slow) for a in 'sb')]
)
def test_dense_outputs_of_every_arch(arch):
    """Detection and segmentation differ in ``context_skip`` alone."""
    detection, segmentation = (
        CASES / f'{task}_{arch}_1x64x64_eval.npz' for task in ('det', 'seg')
    )
    model, image, expected = run_case(detection, torch.float64)
    for dtype, tolerance in TOLERANCE.items():
        model, image = model.to(dtype), image.to(dtype)
        for context_skip, case in ((True, expected), (False, np.load(segmentation))):
            model.context_skip = context_skip
            with torch.no_grad():
                check_outputs(model(image), case, tolerance)


@pytest.mark.parametrize('name, dtype', cases('eval', smaller_than=200 * 200))
def test_eval_outputs(name, dtype):
    model, image, case = run_case(CASES / f'{name}.npz', dtype)
    with torch.no_grad():
        check_outputs(model(image), case, TOLERANCE[dtype])
        if 'reparam0.shape' in case:
            model.switch_to_deploy()
            check_outputs(model(image), case, TOLERANCE[dtype], name='reparam')


@pytest.mark.parametrize('name, dtype', cases('train', smaller_than=200 * 200))
def test_training_step(name, dtype):
    model, image, case = run_case(CASES / f'{name}.npz', dtype)
    check_training_step(model, model(image), case, TOLERANCE[dtype])


def test_every_case_is_used():
    names = SHARED + [p.values[0] for mode in ('eval', 'train') for p in cases(mode, 1)]
    assert set(names) == {p.stem for p in CASES.glob('*.npz') if 'block' not in p.stem}


@pytest.mark.parametrize('key', MANIFEST)
def test_state_dict_names_and_shapes(key):
    task, arch, form = key.split('_')
    with torch.device('meta'):
        model = build(task, arch, deploy=form == 'deploy')
    entries = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    params = sum(p.numel() for p in model.parameters())
    assert listing(entries) == (MANIFEST[key]['entries'], MANIFEST[key]['sha256'])
    assert params == MANIFEST[key]['parameters']
