"""Files that are written here describe themselves: models built from them are right."""

import warnings

import numpy as np
import pytest
import torch
from helpers import randomised
from mmengine.config import Config

from overlock_mm import load_checkpoint
from overlock_mm.apis.convert import convert
from overlock_mm.apis.deploy import deploy
from overlock_mm.checkpoint import read_weights
from overlock_mm.config.load import build_model, load_config
from overlock_mm.errors import CheckpointError, UserError

IMAGE = np.random.default_rng(0).integers(0, 256, (96, 80, 3), np.uint8)
# What a run writes, and a file of weights has no use for.
PRETRAINED = (
    "model = dict(backbone=dict(init_cfg=dict(type='mmengine.Pretrained', "
    "checkpoint='absent.pth')))\nload_from = 'absent.pth'\nresume = True"
)


@pytest.fixture
def trained(stock, tmp_path, demo_data, monkeypatch):
    """A config, and a checkpoint as mmengine writes it, by toolbox."""
    monkeypatch.chdir(demo_data)  # the configs have relative paths

    def make(toolbox):
        config = stock(toolbox, PRETRAINED)
        cfg = load_config(config)
        text, metainfo = cfg.pretty_text, dict(cfg.metainfo)
        torch.manual_seed(0)
        model = randomised(build_model(cfg))
        content = dict(
            meta=dict(cfg=text, epoch=1, iter=2, dataset_meta=metainfo),
            state_dict=model.state_dict(),
            message_hub=dict(runtime_info=dict(cfg=text)),
            optimizer=dict(state={}, param_groups=[]),
        )
        path = tmp_path / f'{toolbox}.pth'
        torch.save(content, path)
        return config, path

    return make


def detector(config, path):
    """As the README has it; the model that the predictions are compared with."""
    from mmdet.apis import init_detector

    model = init_detector(str(config), device='cpu')
    load_checkpoint(model, path)
    return model


def segmentor(config, path):
    from mmseg.apis import init_model

    model = init_model(str(config), device='cpu')
    load_checkpoint(model, path)
    return model


def detections(model):
    from mmdet.apis import inference_detector

    found = inference_detector(model, IMAGE).pred_instances
    assert len(found) > 5
    return found.bboxes, found.scores, found.labels


def check_detections(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def inferred(weights):
    """What MMDetection's inferencer predicts with a file alone, and its model."""
    from mmdet.apis import DetInferencer

    inferencer = DetInferencer(weights=str(weights), device='cpu', show_progress=False)
    found = inferencer(IMAGE, return_datasamples=True, no_save_vis=True)
    found = found['predictions'][0].pred_instances
    return (found.bboxes, found.scores, found.labels), inferencer


def test_a_detector_of_a_deploy_checkpoint_alone(trained, tmp_path):
    config, path = trained('mmdet')
    expected = detections(detector(config, path))
    printed = deploy(str(config), str(path), str(tmp_path / 'deploy.pth'))
    assert 'agree to' in printed and 'deploy.py' in printed
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*(COCO|random).*')
        found, inferencer = inferred(tmp_path / 'deploy.pth')
    check_detections(found, expected)
    assert inferencer.model.backbone.deploy
    assert (
        inferencer.visualizer.dataset_meta['classes']
        == load_config(config).metainfo['classes']
    )
    # and with the config beside it
    check_detections(
        detections(detector(tmp_path / 'deploy.py', tmp_path / 'deploy.pth')), expected
    )


def test_a_segmentor_of_a_deploy_checkpoint_alone(trained, tmp_path):
    from mmseg.apis import MMSegInferencer, inference_model, init_model

    config, path = trained('mmseg')
    expected = inference_model(segmentor(config, path), IMAGE).seg_logits.data
    out = tmp_path / 'deploy.pth'
    deploy(str(config), str(path), str(out))
    text = torch.load(out)['meta']['cfg']  # plain data, for torch too
    for cfg in (Config.fromstring(text, '.py'), str(tmp_path / 'deploy.py')):
        model = init_model(cfg, str(out), device='cpu')
        assert model.backbone.deploy and len(model.dataset_meta['classes']) == 10
        found = inference_model(model, IMAGE).seg_logits.data
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    beside = str(tmp_path / 'deploy.py')
    model = MMSegInferencer(beside, weights=str(out), device='cpu').model
    assert model.backbone.deploy
    found = inference_model(model, IMAGE).seg_logits.data
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('toolbox', ['mmdet', 'mmseg'])
def test_what_a_deploy_checkpoint_says(trained, tmp_path, toolbox):
    config, path = trained(toolbox)
    deploy(str(config), str(path), str(tmp_path / 'deploy.pth'))
    content = read_weights(tmp_path / 'deploy.pth')
    assert set(content) == {'meta', 'state_dict'}  # nothing of the training form
    meta = content['meta']
    assert meta['epoch'] == 1 and meta['overlock_mm']['source'] == path.name
    assert list(meta['dataset_meta']['classes']) == list(
        load_config(config).metainfo.classes
    )
    cfg = Config.fromstring(meta['cfg'], '.py')
    assert cfg.model.backbone.deploy is True
    assert not cfg.model.backbone.get('init_cfg')
    assert cfg.load_from is None and cfg.resume is False
    beside = Config.fromfile(tmp_path / 'deploy.py')
    assert beside.model.backbone.deploy is True and beside.resume is False
    assert beside.load_from == str(tmp_path / 'deploy.pth')
    build_model(cfg).load_state_dict(content['state_dict'], strict=True)


def test_what_cannot_be_deployed(trained, tmp_path):
    config, path = trained('mmseg')
    arguments = str(config), str(path), str(tmp_path / 'deploy.pth')
    deploy(*arguments)
    with pytest.raises(UserError, match='deploy.pth exists'):
        deploy(*arguments)
    deploy(*arguments, force=True)
    again = str(tmp_path / 'deploy.py'), str(tmp_path / 'deploy.pth')
    with pytest.raises(UserError, match='not an OverLoCK in training form'):
        deploy(*again, str(tmp_path / 'more.pth'))
    with pytest.raises(UserError, match='would be overwritten'):
        deploy(*again, str(tmp_path / 'deploy.pth'), force=True)
    content = read_weights(path)
    content['state_dict']['backbone.blocks1.0.dwconv.bias'].fill_(float('nan'))
    torch.save(content, path)
    with pytest.raises(UserError, match='nothing was written'):
        deploy(str(config), str(path), str(tmp_path / 'nan.pth'))
    del content['state_dict']['decode_head.conv_seg.bias']
    torch.save(content, path)
    with pytest.raises(CheckpointError, match='1 key is missing'):
        deploy(str(config), str(path), str(tmp_path / 'nan.pth'))
    assert not list(tmp_path.glob('nan*'))


def test_a_converted_detector_alone(trained, tmp_path):
    """A file of the former toolboxes has the config with which it was verified."""
    config, path = trained('mmdet')
    expected = detections(detector(config, path))
    former, ours = str(tmp_path / 'former.pth'), tmp_path / 'ours.pth'
    convert(str(path), former, 'released')
    content = read_weights(former)
    assert set(content) == {'meta', 'state_dict'} and len(content['meta']['CLASSES']) == 9
    content['meta'].pop('cfg')
    content['meta']['config'] = 'raise SystemExit  # of the former toolbox'
    torch.save(content, former)
    printed = convert(former, str(ours), verify=str(config)).splitlines()
    assert printed[0].startswith('Verified: all') and 'objects' in printed[0]
    assert printed[1].startswith('Wrote') and '9 class names' in printed[1]
    assert printed[1].endswith(f'its config is {config}')
    meta = read_weights(ours)['meta']
    assert 'config' not in meta and 'CLASSES' not in meta
    found, inferencer = inferred(ours)
    check_detections(found, expected)
    assert not inferencer.model.backbone.deploy
    convert(former, str(tmp_path / 'unverified.pth'))
    assert 'cfg' not in read_weights(tmp_path / 'unverified.pth')['meta']


def test_options_of_convert(trained, tmp_path):
    config, path = trained('mmseg')
    kept = tmp_path / 'kept.pth'
    convert(str(path), str(kept), keep_optimizer=True)
    assert {'optimizer', 'message_hub'} <= set(read_weights(kept))
    with pytest.raises(UserError, match='kept.pth exists'):
        convert(str(path), str(kept))
    convert(str(path), str(kept), half=True, force=True)
    content = read_weights(kept)
    assert content['state_dict']['decode_head.conv_seg.weight'].dtype == torch.half
    assert 'optimizer' not in content
    with pytest.raises(UserError, match='no place for --keep-optimizer'):
        convert(str(path), str(tmp_path / 'w.safetensors'), keep_optimizer=True)
    with pytest.raises(UserError, match='absent.pth does not exist'):
        convert('absent.pth', str(tmp_path / 'w.pth'))
    content['state_dict']['decode_head.conv_seg.bias'].fill_(float('nan'))
    torch.save(content, kept)
    with pytest.raises(UserError, match='not finite; not written'):
        convert(str(kept), str(tmp_path / 'nan.pth'), verify=str(config))
    assert not (tmp_path / 'nan.pth').exists()
