"""Predictor: the toolboxes' results, strict loading, names from the checkpoint."""

import os

import numpy as np
import pytest
import torch
from helpers import tiny
from mmengine.config import Config
from PIL import Image

import overlock_mm
from overlock_mm import Predictor
from overlock_mm.apis.deploy import deploy
from overlock_mm.config.load import build_model, load_config
from overlock_mm.errors import CheckpointError, UserError

IMAGE = np.random.default_rng(0).integers(0, 256, (96, 80, 3), np.uint8)
TASKS = dict(mmseg='segmentor', mmdet='detector')
STOCK_SEGMENTOR = '.mim/configs/fcn/fcn_r18-d8_4xb2-80k_cityscapes-512x1024.py'


class Code:
    """What reads as code when it is unpickled."""

    def __reduce__(self):
        return os.getenv, ('HOME',)


@pytest.fixture(scope='module')
def trained(configs, tmp_path_factory):
    """Config and checkpoint by toolbox; the classes are renamed in the checkpoint."""
    folder, found = tmp_path_factory.mktemp('trained'), {}
    for toolbox, name in TASKS.items():
        cfg = load_config(configs / f'{name}.py')
        torch.manual_seed(0)
        model = build_model(cfg)
        model.init_weights()
        metainfo = dict(cfg.metainfo)
        metainfo['classes'] = [f'my {name}' for name in metainfo['classes']]
        path = folder / f'{toolbox}.pth'
        content = dict(state_dict=model.state_dict(), meta=dict(dataset_meta=metainfo))
        torch.save(content, path)
        found[toolbox] = configs / f'{name}.py', path
    return found


@pytest.fixture(params=TASKS)
def toolbox(request):
    return request.param


def same(found, expected):
    """Whether two data samples predict the same, up to rounding."""
    if 'pred_sem_seg' in expected:
        a, b = found.seg_logits.data, expected.seg_logits.data
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        assert (found.pred_sem_seg.data == expected.pred_sem_seg.data).float().mean() > 0.99
    else:
        a, b = found.pred_instances, expected.pred_instances
        assert len(a) == len(b) > 0
        torch.testing.assert_close(a.scores, b.scores, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(a.bboxes, b.bboxes, rtol=1e-3, atol=1e-2)


def toolbox_result(toolbox, config, checkpoint, image):
    if toolbox == 'mmseg':
        from mmseg.apis import inference_model, init_model

        return inference_model(init_model(str(config), str(checkpoint), 'cpu'), image)
    from mmdet.apis import inference_detector, init_detector

    return inference_detector(
        init_detector(str(config), str(checkpoint), device='cpu'), image
    )


@pytest.mark.parametrize('fold', [True, False])
def test_it_is_what_the_toolbox_predicts(trained, toolbox, tmp_path, fold):
    config, checkpoint = trained[toolbox]
    predictor = Predictor(config, checkpoint, fold=fold)
    assert predictor.toolbox == toolbox and predictor.model.backbone.folded == fold
    expected = toolbox_result(toolbox, config, checkpoint, IMAGE[..., ::-1].copy())
    same(predictor(IMAGE), expected)
    Image.fromarray(IMAGE).save(tmp_path / 'a.png')
    same(predictor(tmp_path / 'a.png'), expected)
    # of a list, with different sizes, in batches
    others = [IMAGE[:64], IMAGE, str(tmp_path / 'a.png')]
    results = predictor(others, batch_size=3)
    assert len(results) == 3 and results[0].ori_shape == (64, 80)
    same(results[1], expected)
    same(results[2], expected)
    assert predictor([]) == []
    if toolbox == 'mmseg':  # where nothing is resized, which rounds
        same(predictor(IMAGE.astype(np.float32)), expected)  # RGB, whatever the dtype
    grey = IMAGE[..., 0].copy()
    same(predictor(grey), predictor(np.stack([grey] * 3, axis=-1)))


def test_names_and_colours_are_those_of_the_checkpoint(trained, toolbox):
    config, checkpoint = trained[toolbox]
    predictor = Predictor(config, checkpoint)
    metainfo = Config.fromfile(config).metainfo
    assert predictor.classes == tuple(f'my {name}' for name in metainfo.classes)
    assert predictor.palette == [tuple(color) for color in metainfo.palette]
    assert predictor.model.dataset_meta['classes'] == predictor.classes


def test_names_where_the_checkpoint_has_none(trained, toolbox, tmp_path, capsys):
    config, checkpoint = trained[toolbox]
    content = torch.load(checkpoint, weights_only=True)
    content['meta'] = {}
    torch.save(content, tmp_path / 'a.pth')
    predictor = Predictor(config, tmp_path / 'a.pth')
    assert predictor.classes == tuple(Config.fromfile(config).metainfo.classes)
    content['meta'] = dict(CLASSES=['a', 'b'])  # of an older version, and not of this model
    torch.save(content, tmp_path / 'b.pth')
    data = {'test_dataloader.dataset.metainfo': dict(_delete_=True)}
    kind = dict(mmseg='BaseSegDataset', mmdet='CocoDataset')[toolbox]
    predictor = Predictor(
        config,
        tmp_path / 'b.pth',
        cfg_options={**data, 'test_dataloader.dataset.type': kind},
    )
    count = len(Config.fromfile(config).metainfo.classes)
    assert predictor.classes == tuple(f'class {i}' for i in range(count))
    assert len(set(predictor.palette)) == count
    assert f'names 2 classes, and the model predicts {count}' in capsys.readouterr().out


def test_draw(trained, toolbox, tmp_path):
    config, checkpoint = trained[toolbox]
    predictor = Predictor(config, checkpoint)
    result = predictor(IMAGE)
    drawn = predictor.draw(IMAGE, result, score_thr=0.0)
    assert drawn.dtype == np.uint8 and drawn.shape[1] == 80 * 5 and drawn.shape[0] > 96 * 5
    plain = predictor.draw(IMAGE, result, hidden=predictor.classes, legend=False)
    assert (drawn[: 96 * 5] != plain).any()
    Image.fromarray(IMAGE).save(tmp_path / 'a.png')
    by_path = predictor.draw(tmp_path / 'a.png', result, score_thr=0.0)
    np.testing.assert_array_equal(by_path, drawn)
    for hidden in ('cat', ['cat']):
        with pytest.raises(UserError, match=r"hidden=\['cat'\] are not among the"):
            predictor.draw(IMAGE, result, hidden=hidden)
    with pytest.raises(UserError, match='of an image of 80x96 pixels'):
        predictor.draw(IMAGE[:50], result)
    with pytest.raises(UserError, match='opacity=5 must be within 0..1'):
        predictor.draw(IMAGE, result, opacity=5)
    if toolbox == 'mmdet':
        found = result.pred_instances.scores
        few = predictor.draw(IMAGE, result, score_thr=found[1].item(), legend=False)
        none = predictor.draw(IMAGE, result, score_thr=1.0, legend=False)
        assert (few != none).any() and (drawn[: 96 * 5] != few).any()
        np.testing.assert_array_equal(none, plain)


def test_a_checkpoint_in_deploy_form(trained, toolbox, tmp_path):
    config, checkpoint = trained[toolbox]
    deploy(str(config), str(checkpoint), str(tmp_path / 'd.pth'))
    expected = Predictor(config, checkpoint)(IMAGE)
    same(Predictor(tmp_path / 'd.py', tmp_path / 'd.pth')(IMAGE), expected)
    with pytest.raises(CheckpointError, match='deploy=True'):
        Predictor(config, tmp_path / 'd.pth')


def test_weights_that_do_not_fit(trained, toolbox, tmp_path):
    config, checkpoint = trained[toolbox]
    other = trained[dict(mmseg='mmdet', mmdet='mmseg')[toolbox]][1]
    with pytest.raises(CheckpointError, match='does not fit'):
        Predictor(config, other)
    torch.save(tiny().state_dict(), tmp_path / 'backbone.pth')
    with pytest.raises(CheckpointError, match='backbone alone'):
        Predictor(config, tmp_path / 'backbone.pth')
    torch.save(dict(state_dict={}, x=Code()), tmp_path / 'code.pth')
    with pytest.raises(CheckpointError, match='trust'):
        Predictor(config, tmp_path / 'code.pth')
    with pytest.raises(UserError, match='does not exist'):
        Predictor(config, tmp_path / 'absent.pth')


def test_another_backbone(tmp_path):
    """A stock config as it is: no fold, strict and safe all the same."""
    import mmseg

    config = os.path.join(os.path.dirname(mmseg.__file__), STOCK_SEGMENTOR)
    options = {'model.pretrained': None}
    model = build_model(load_config(config, options))
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'a.pth')
    predictor = Predictor(config, tmp_path / 'a.pth')
    assert predictor.classes[0] == 'road' and len(predictor.classes) == 19
    assert predictor(IMAGE).pred_sem_seg.data.shape == (1, 96, 80)
    with pytest.raises(UserError, match='no OverLoCK'):
        Predictor(config, tmp_path / 'a.pth', fold=True)
    state = model.state_dict()
    del state['decode_head.conv_seg.weight']
    torch.save(dict(state_dict=state), tmp_path / 'b.pth')
    with pytest.raises(CheckpointError, match='1 keys are missing.*conv_seg.weight. Give'):
        Predictor(config, tmp_path / 'b.pth')


def test_images_that_cannot_be_used(trained, toolbox, tmp_path):
    predictor = Predictor(*trained[toolbox])
    (tmp_path / 'text.jpg').write_text('no image')
    (tmp_path / 'empty.png').write_bytes(b'')
    for name in ('text.jpg', 'empty.png'):
        with pytest.raises(UserError, match=f'{name} cannot be read as an image'):
            predictor(tmp_path / name)
    with pytest.raises(UserError, match=r'absent.jpg does not exist'):
        predictor(tmp_path / 'absent.jpg')
    with pytest.raises(UserError, match='is a folder'):
        predictor(tmp_path)
    for image, what in (
        (IMAGE / 255, 'within 0..1'),
        (IMAGE.astype(np.uint16) * 200, 'within 0..51000'),
        (IMAGE.astype(np.float32) * np.nan, 'within nan..nan'),
        (IMAGE.astype(np.int64), 'this one int64'),
        (IMAGE.transpose(2, 0, 1), r'this one is \(3, 96, 80\)'),
    ):
        with pytest.raises(UserError, match=what):
            predictor(image)
    with pytest.raises(UserError, match='not a Tensor'):
        predictor(torch.zeros(3, 8, 8))
    with pytest.raises(UserError, match='has the shape'):
        predictor(np.zeros(5))
    with pytest.raises(UserError, match='batch_size=0'):
        predictor(IMAGE, batch_size=0)


def test_configs_that_cannot_be_used(trained, toolbox):
    config, checkpoint = trained[toolbox]
    key = 'test_dataloader.dataset.pipeline'
    with pytest.raises(UserError, match='no test_dataloader'):
        Predictor(config, checkpoint, cfg_options={key: [], 'test_pipeline': []})
    pipeline = Config.fromfile(config).test_dataloader.dataset.pipeline
    with pytest.raises(UserError, match='end with one that packs'):
        Predictor(config, checkpoint, cfg_options={key: pipeline[:-1]})
    needs = [pipeline[0], dict(type='RandomCrop', crop_size=(8, 8)), pipeline[-1]]
    if toolbox == 'mmseg':
        needs[1]['cat_max_ratio'] = 0.75
        with pytest.raises(UserError, match="RandomCrop .* needs 'gt_seg_map'"):
            Predictor(config, checkpoint, cfg_options={key: needs})(IMAGE)
    for device in ('cuda:77', 'nonsense'):
        with pytest.raises(UserError, match=f'{device} cannot be used'):
            Predictor(config, checkpoint, device)
    with pytest.raises(UserError, match='no tile size'):
        Predictor(config, checkpoint, overlap=3)
    for arguments, what in (
        ((None, checkpoint), 'not a NoneType'),
        ((config, {}), 'checkpoint must be a path'),
    ):
        with pytest.raises(UserError, match=what):
            Predictor(*arguments)
    for options, what in (
        (dict(tile='x'), "tile='x' must be a whole number"),
        (dict(cfg_options='model.x=1'), 'must be a dict'),
        (dict(device=3.5), 'cannot be used'),
        (dict(cfg_options={'model.backbone.type': 'Nope'}), 'the model .*cannot be built'),
        (dict(cfg_options={f'{key}.0.type': 'Nope'}), 'the test pipeline'),
    ):
        with pytest.raises(UserError, match=what):
            Predictor(config, checkpoint, **options)


def test_a_config_object_and_a_pure_pipeline(trained, toolbox):
    """A config that was read already stays as it is; test_pipeline is enough."""
    config, checkpoint = trained[toolbox]
    cfg = load_config(config)
    cfg.test_pipeline = cfg.test_dataloader.dataset.pipeline
    cfg.pop('test_dataloader')
    before = cfg.to_dict()
    expected = Predictor(config, checkpoint)(IMAGE)
    same(Predictor(cfg, checkpoint)(IMAGE), expected)
    assert cfg.to_dict() == before


def test_more_channels(tmp_path, configs):
    """Images of five channels and 16 bits, as a config of overlock init reads them."""
    import tifffile

    options = {
        'model.data_preprocessor': dict(_delete_=True, type='SegDataPreProcessor'),
        'model.backbone.in_channels': 5,
        'test_dataloader.dataset.pipeline': [
            dict(
                type='LoadImageFromFile',
                color_type='unchanged',
                imdecode_backend='tifffile',
            ),
            dict(type='ChannelsLast'),
            dict(type='Standardize', mean=[100.0] * 5, std=[50.0] * 5),
            dict(type='LoadAnnotations'),
            dict(type='PackSegInputs'),
        ],
    }
    model = build_model(load_config(configs / 'segmentor.py', options))
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'a.pth')
    predictor = Predictor(configs / 'segmentor.py', tmp_path / 'a.pth', cfg_options=options)
    image = np.random.default_rng(0).integers(0, 999, (5, 64, 70)).astype(np.uint16)
    tifffile.imwrite(tmp_path / 'a.tif', image, planarconfig='separate')
    result = predictor(tmp_path / 'a.tif')
    assert result.pred_sem_seg.data.shape == (1, 64, 70)
    picture = predictor.draw(tmp_path / 'a.tif', result)
    assert picture.shape[1] == 70 * 7


def test_tiles(trained, toolbox):
    """A tile that holds the image is the image; smaller ones cover all of it."""
    config, checkpoint = trained[toolbox]
    image = np.tile(IMAGE, (2, 2, 1))
    pipeline = Config.fromfile(config).test_dataloader.dataset.pipeline
    plain = [step for step in pipeline if step.type != 'Resize']
    resized = [plain[0], dict(type='Resize', scale=(50, 50)), *plain[1:]]
    plain, resized = (
        {'test_dataloader.dataset.pipeline': steps} for steps in (plain, resized)
    )
    whole = Predictor(config, checkpoint, cfg_options=plain)(image)
    one = Predictor(config, checkpoint, tile=256, cfg_options=resized)(image)
    assert one.ori_shape == (192, 160)
    predictor = Predictor(config, checkpoint, tile=96, overlap=16)
    found = predictor(image)
    assert predictor.draw(image, found, score_thr=0.0, legend=False).shape == (576, 480, 3)
    if toolbox == 'mmseg':
        assert torch.equal(one.pred_sem_seg.data.long(), whole.pred_sem_seg.data)
        assert found.pred_sem_seg.data.shape == (1, 192, 160)
        agree = found.pred_sem_seg.data.long() == whole.pred_sem_seg.data
        assert agree.float().mean() > 0.5  # this network looks at the whole image
    else:
        torch.testing.assert_close(one.pred_instances.scores, whole.pred_instances.scores)
        assert len(found.pred_instances.masks) == len(found.pred_instances) > 0
        boxes = found.pred_instances.bboxes
        assert (boxes >= 0).all() and boxes[:, 2].max() > 130 and boxes[:, 3].max() > 150


def test_it_is_public():
    assert overlock_mm.Predictor is Predictor and 'Predictor' in overlock_mm.__all__
