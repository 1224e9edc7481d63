"""The toolboxes' own functions for inference load our models strictly, or say it."""

import numpy as np
import pytest
import torch

from overlock_mm.apis.deploy import deploy
from overlock_mm.config.load import build_model, load_config
from overlock_mm.errors import CheckpointError

IMAGE = np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8)


def with_function(toolbox, config, checkpoint):
    """``init_model`` or ``init_detector``; a function from an image to its result."""
    if toolbox == 'mmseg':
        from mmseg.apis import inference_model, init_model

        model = init_model(config, checkpoint, device='cpu')
        return lambda image: inference_model(model, image)
    from mmdet.apis import inference_detector, init_detector

    model = init_detector(config, checkpoint, device='cpu')
    return lambda image: inference_detector(model, image)


def with_inferencer(toolbox, config, checkpoint):
    """``MMSegInferencer`` or ``DetInferencer``."""
    if toolbox == 'mmseg':
        from mmseg.apis import MMSegInferencer

        inferencer = MMSegInferencer(config, checkpoint, device='cpu')
        return lambda image: inferencer(image, return_datasamples=True)
    from mmdet.apis import DetInferencer

    inferencer = DetInferencer(config, checkpoint, device='cpu')
    return lambda image: inferencer(image, return_datasamples=True)['predictions'][0]


def numbers(sample):
    if 'seg_logits' in sample:
        return sample.seg_logits.data
    return sample.pred_instances.scores


@pytest.fixture(scope='module', params=['mmseg', 'mmdet'])
def files(request, configs, tmp_path_factory):
    """Toolbox, config, checkpoints of both forms, and what the training form predicts."""
    toolbox, folder = request.param, tmp_path_factory.mktemp('files')
    config = configs / dict(mmseg='segmentor.py', mmdet='detector.py')[toolbox]
    cfg = load_config(config)
    torch.manual_seed(0)
    model = build_model(cfg)
    model.init_weights()
    meta = dict(dataset_meta=dict(cfg.metainfo), cfg=cfg.pretty_text)
    torch.save(dict(state_dict=model.state_dict(), meta=meta), folder / 'training.pth')
    deploy(str(config), str(folder / 'training.pth'), str(folder / 'deploy.pth'))
    expected = with_function(toolbox, str(config), str(folder / 'training.pth'))(IMAGE)
    return toolbox, str(config), folder, numbers(expected)


@pytest.mark.parametrize('load', [with_function, with_inferencer])
def test_both_forms(files, load):
    toolbox, config, folder, expected = files
    for cfg, name in ((config, 'training.pth'), (str(folder / 'deploy.py'), 'deploy.pth')):
        found = numbers(load(toolbox, cfg, str(folder / name))(IMAGE))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['training.pth', 'deploy.pth'])
def test_a_checkpoint_alone(files, name):
    """The inferencers build the model from the config inside."""
    toolbox, _, folder, expected = files
    found = numbers(with_inferencer(toolbox, None, str(folder / name))(IMAGE))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('load', [with_function, with_inferencer])
def test_the_other_form_is_refused(files, load):
    """Before, the merged kernels were loaded without what was merged into them."""
    toolbox, config, folder, _ = files
    with pytest.raises(CheckpointError, match='deploy form.*backbone.deploy=True'):
        load(toolbox, config, str(folder / 'deploy.pth'))
    with pytest.raises(CheckpointError, match='load_checkpoint merges'):
        load(toolbox, str(folder / 'deploy.py'), str(folder / 'training.pth'))


@pytest.mark.parametrize('load', [with_function, with_inferencer])
def test_other_sizes_are_refused(files, load, tmp_path):
    toolbox, config, folder, _ = files
    other = torch.load(folder / 'training.pth', weights_only=False)
    name = 'backbone.patch_embed2.0.weight'
    other['state_dict'][name] = other['state_dict'][name][:-1]
    torch.save(other, tmp_path / 'other.pth')
    with pytest.raises(CheckpointError, match='patch_embed2.0.weight'):
        load(toolbox, config, str(tmp_path / 'other.pth'))


@pytest.mark.parametrize('load', [with_function, with_inferencer])
def test_what_is_missing_is_said(files, load, tmp_path, capsys):
    toolbox, config, folder, _ = files
    part = torch.load(folder / 'training.pth', weights_only=False)
    name = 'backbone.blocks2.0.proj.4.weight'
    del part['state_dict'][name]
    torch.save(part, tmp_path / 'part.pth')
    load(toolbox, config, str(tmp_path / 'part.pth'))
    printed = capsys.readouterr()
    assert f'missing keys in source state_dict: {name}' in printed.out + printed.err


def test_parts_are_loaded_as_ever(files):
    """Adapters, for one, are loaded by torch as a part of the weights."""
    _, config, folder, _ = files
    model = build_model(load_config(config))
    state = torch.load(folder / 'training.pth', weights_only=False)['state_dict']
    part = {k: v for k, v in state.items() if 'blocks2' in k}
    found = model.load_state_dict(part, strict=False)
    assert found.missing_keys and not found.unexpected_keys
    torch.testing.assert_close(
        model.backbone.blocks2[0].proj[4].weight, part['backbone.blocks2.0.proj.4.weight']
    )
