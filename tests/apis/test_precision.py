"""Half precision on the CPU: in prediction, in tests and in training."""

import copy

import numpy as np
import pytest
import torch
from helpers import run, tiny, tool
from mmengine.config import Config

from overlock_mm import OverLoCK, Predictor
from overlock_mm.apis.infer import infer
from overlock_mm.apis.test import test
from overlock_mm.apis.train import train
from overlock_mm.errors import UserError
from overlock_mm.hooks import AutocastHook
from overlock_mm.hooks.precision import autocast

IMAGE = np.random.default_rng(0).integers(0, 256, (96, 80, 3), np.uint8)


@pytest.fixture(autouse=True)
def cwd(demo_data, monkeypatch):
    monkeypatch.chdir(demo_data)


def dtypes_of(model):
    """Records the dtypes that the convolutions compute in, by the part they are in."""
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            part = name.split('.')[0]
            module.register_forward_hook(
                lambda m, i, out, part=part: seen.setdefault(part, set()).add(out.dtype)
            )
    return seen


@pytest.mark.parametrize('fold', [True, False])
@pytest.mark.parametrize('name', ['segmentor', 'detector'])
def test_prediction(models, name, fold):
    expected = Predictor(*models[name], 'cpu', fold=fold)(IMAGE)
    predictor = Predictor(*models[name], 'cpu', fold=fold, dtype='bfloat16')
    autocast(predictor.model, 'bfloat16')  # again: it changes nothing
    seen = {} if fold else dtypes_of(predictor.model)
    result = predictor(IMAGE)
    if name == 'segmentor':
        found, wanted = result.seg_logits.data, expected.seg_logits.data
        assert found.dtype == torch.float32 and not torch.equal(found, wanted)
        assert (found - wanted).norm() < 0.05 * wanted.norm()
    else:
        assert result.pred_instances.bboxes.dtype == torch.float32
    half = {'backbone', 'neck', 'decode_head', 'auxiliary_head'}
    for part, dtypes in seen.items():
        assert (torch.bfloat16 in dtypes) == (part in half), part
    weight = next(predictor.model.backbone.parameters())
    assert weight.dtype == (torch.bfloat16 if fold else torch.float32)


@pytest.mark.parametrize('with_fold', [False, True])
@pytest.mark.parametrize('name', ['segmentor', 'detector'])
def test_a_test(models, name, with_fold, tmp_path):
    config, checkpoint = models[name]
    options = dict(fold=with_fold, work_dir=str(tmp_path))
    expected = test(config, checkpoint, **options)
    found = test(config, checkpoint, **options, dtype='bfloat16')
    assert found.keys() == expected.keys()


def test_labels_of_infer(models, tmp_path, capsys):
    with pytest.raises(UserError, match='dtype half is not one of float32, bfloat16'):
        infer(*models['segmentor'], ['data/demo/images/validation'], tmp_path, dtype='half')
    command = [*tool('infer.py'), *models['segmentor'], 'data/demo/images/validation']
    run([*command, '--out', tmp_path / 'half', '--dtype', 'bfloat16'], '.')
    assert list((tmp_path / 'half/label_maps').iterdir())
    error = run([*command, '--dtype', 'int8'], '.', status=2).stderr
    assert "invalid choice: 'int8'" in error


@pytest.mark.parametrize('supported', [True, False])
def test_a_cpu_without_it_is_named(models, monkeypatch, capsys, supported):
    name = 'torch.cpu._is_avx512_bf16_supported'
    monkeypatch.setattr(name, lambda: supported, raising=False)
    Predictor(*models['segmentor'], 'cpu', dtype='bfloat16')
    assert ('bfloat16 will not pay' in capsys.readouterr().out) == (not supported)


@pytest.mark.parametrize(
    'toolbox, wrapper, usual',
    [
        ('mmseg', {}, True),
        ('mmseg', dict(type='AmpOptimWrapper', dtype='bfloat16'), True),
        ('mmdet', dict(type='mmengine.AmpOptimWrapper', loss_scale=512.0), False),
    ],
)
def test_training(stock, toolbox, wrapper, usual, tmp_path, capsys):
    """Of stock configs, with --amp or with mmengine's wrapper in the config."""
    options = {f'optim_wrapper.{key}': value for key, value in wrapper.items()}
    if toolbox == 'mmseg':
        options['train_cfg.max_iters'] = 1
    work_dir = str(tmp_path)
    runner = train(stock(toolbox), work_dir=work_dir, cfg_options=options, amp=not wrapper)
    said = capsys.readouterr().out
    assert 'are in bfloat16, and losses are not scaled' in said
    assert ('are for a GPU' in said) == (not usual)
    assert runner.model.backbone.forward.args[1] == torch.bfloat16
    assert runner.model.backbone.patch_embed1[0].weight.dtype == torch.float32
    # what the run dumped trains in the same way
    cfg = Config.fromfile(next(tmp_path.glob('*.py')))
    assert cfg.custom_hooks[-1].type == 'AutocastHook'
    assert cfg.optim_wrapper.type == 'OptimWrapper'


def test_gradients_are_near_those_of_float32():
    grads = []
    for dtype in (None, 'bfloat16'):
        model = torch.nn.ModuleDict(dict(backbone=tiny(norm_eval=True).train()))
        if dtype:
            autocast(model, dtype)
        maps = model['backbone'](torch.rand(2, 3, 64, 64))
        assert all(m.dtype == torch.float32 for m in maps)
        sum(m.square().mean() for m in maps).backward()
        grads.append(model['backbone'].patch_embed1[0].weight.grad)
    assert grads[1].dtype == torch.float32
    assert (grads[0] - grads[1]).norm() < 0.3 * grads[0].norm()


def test_a_copy_of_a_model_has_its_own_weights():
    model = torch.nn.ModuleDict(dict(backbone=tiny().eval()))
    autocast(model, 'bfloat16')
    other, x = copy.deepcopy(model), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before = model['backbone'](x)
        for parameter in model.parameters():
            parameter.zero_()
        after = other['backbone'](x)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


def test_what_cannot_be():
    with pytest.raises(UserError, match="AutocastHook: dtype='int8' is not one of"):
        AutocastHook('int8')
    with pytest.raises(UserError, match='this Conv2d has none; use float32'):
        autocast(torch.nn.Conv2d(1, 1, 1), 'bfloat16')


def test_models_in_models():
    """Of a teacher and a student, and the heads of a cascade."""
    heads = torch.nn.ModuleList([torch.nn.Conv2d(1, 1, 1), torch.nn.Conv2d(1, 1, 1)])
    student = torch.nn.ModuleDict(dict(backbone=OverLoCK('xt'), decode_head=heads))
    autocast(torch.nn.ModuleDict(dict(student=student)), 'bfloat16')
    for part in (student['backbone'], *heads):
        assert part.forward.args[1] == torch.bfloat16


def test_maps_for_roi_align_are_float32(models):
    """mmcv's knows no other on the CPU."""
    predictor = Predictor(*models['detector'], 'cpu', dtype='bfloat16')
    assert predictor.model.extract_feat(torch.rand(1, 3, 64, 64))[0].dtype == torch.float32
