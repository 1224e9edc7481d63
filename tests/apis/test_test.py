"""Evaluating as a function, on configs that are not ours."""

import pickle

import mmcv
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from PIL import Image

from overlock_mm import OverLoCK
from overlock_mm.apis.test import output_names, test
from overlock_mm.config.load import build_model, load_config
from overlock_mm.errors import CheckpointError, UserError


@pytest.fixture(autouse=True)
def cwd(demo_data, monkeypatch):
    monkeypatch.chdir(demo_data)


@pytest.fixture(scope='module')
def checkpoints(stock, tmp_path_factory):
    """Weights for the stock configs, by toolbox; some predictions are right by chance."""
    folder, paths = tmp_path_factory.mktemp('weights'), {}
    for toolbox in ('mmdet', 'mmseg'):
        torch.manual_seed(0)
        model = build_model(load_config(stock(toolbox)))
        paths[toolbox] = folder / f'{toolbox}.pth'
        torch.save(dict(state_dict=model.state_dict()), paths[toolbox])
    return paths


def maps(folder):
    return {p.name: np.array(Image.open(p)) for p in sorted(folder.rglob('*.png'))}


@pytest.fixture(scope='module')
def label_maps(stock, checkpoints, tmp_path_factory, demo_data):
    """What the segmentor predicts, computed without the tool."""
    from mmseg.apis import inference_model

    cfg = load_config(stock('mmseg'))
    cfg.test_pipeline = [s for s in cfg.test_pipeline if s.type != 'LoadAnnotations']
    model = build_model(cfg).eval()
    model.load_state_dict(torch.load(checkpoints['mmseg'])['state_dict'])
    model.cfg = cfg
    images = sorted((demo_data / 'data/demo/images/validation').glob('*.png'))
    return {
        path.name: inference_model(model, str(path)).pred_sem_seg.data[0].numpy()
        for path in images
    }


def same_labels(found, expected, share=1.0):
    assert set(found) == set(expected) and len({m.tobytes() for m in expected.values()}) > 1
    equal = [np.mean(found[name] == expected[name]) for name in expected]
    assert min(equal) >= share, equal


BARE = ['default_hooks', 'visualizer', 'vis_backends', 'load_from', 'resume', 'test_cfg']
BARE += ['tta_model', 'log_processor', 'env_cfg', 'custom_imports']


def test_segmentor(stock, checkpoints, label_maps, tmp_path):
    """From a stock config without all that mmengine can do without."""
    config = stock('mmseg', drop=[*BARE, 'tta_pipeline'])
    metrics = test(
        config,
        checkpoints['mmseg'],
        work_dir=str(tmp_path / 'runs'),
        out=str(tmp_path / 'out'),
        show_dir=str(tmp_path / 'pictures'),
    )
    found = maps(tmp_path / 'out')
    same_labels(found, label_maps)
    # a hand count over the files of the data set
    folder = 'data/demo/annotations/validation'
    truth = {name: np.array(Image.open(f'{folder}/{name}')) for name in found}
    both = sum((found[n] == truth[n]).sum() for n in found)
    total = sum(truth[n].size for n in found)
    assert metrics['aAcc'] == pytest.approx(100 * both / total, abs=0.01)
    pictures = maps(tmp_path / 'pictures')
    assert {p.shape[1] for p in pictures.values()} == {192}  # labels beside predictions
    assert set(pictures) == set(found)


@pytest.mark.parametrize(
    'hook',
    [
        "dict(type='EMAHook')",
        "dict(type='mmengine.EMAHook')",
        "dict(type='mmengine.hooks.EMAHook')",
    ],
)
def test_folded_backbone(stock, checkpoints, label_maps, tmp_path, monkeypatch, hook):
    """Also where training averages weights, and a hook swaps them for testing."""
    folded = []
    original = Runner.test

    def observed(runner):
        metrics = original(runner)
        folded.append(runner.model.backbone.folded)
        return metrics

    monkeypatch.setattr(Runner, 'test', observed)
    out = tmp_path / 'out'
    config = stock('mmseg', f'custom_hooks = [{hook}]')
    options = dict(work_dir=str(tmp_path), out=str(out))
    test(config, checkpoints['mmseg'], fold=True, **options)
    assert folded == [True]
    same_labels(maps(out), label_maps, 0.999)


def test_hooks_given_by_class(stock, checkpoints, tmp_path):
    """A pure-Python config, in which types are classes."""
    body = Config.fromfile(stock('mmseg')).pretty_text
    for name in ('IoUMetric', 'LoadAnnotations', 'PackSegInputs', 'OverLoCK'):
        body = body.replace(f"'{name}'", name)
    path = tmp_path / 'pure.py'
    path.write_text(f"""
from mmengine.hooks import EMAHook
from mmseg.datasets.transforms import LoadAnnotations, PackSegInputs
from mmseg.evaluation import IoUMetric
from overlock_mm import OverLoCK
{body}
custom_hooks = [dict(type=EMAHook)]
tta_model = tta_pipeline = None
""")
    options = dict(work_dir=str(tmp_path / 'runs'), out=str(tmp_path / 'out'))
    metrics = test(path, checkpoints['mmseg'], fold=True, tta=True, **options)
    assert 'mIoU' in metrics and len(maps(tmp_path / 'out')) == 2
    dumped = load_config(tmp_path / 'runs' / 'pure.py')
    assert dumped.model.type.endswith('.SegTTAModel')
    assert isinstance(build_model(dumped).module.backbone, OverLoCK)


def test_fold_without_an_overlock(stock, checkpoints, tmp_path):
    lines = "model = dict(backbone=dict(_delete_=True, type='mmseg.ResNetV1c', depth=18), "
    lines += 'decode_head=dict(in_channels=[64, 128, 256, 512]), '
    lines += 'auxiliary_head=dict(in_channels=256))'
    with pytest.raises(UserError, match='has no OverLoCK; leave it out'):
        test(stock('mmseg', lines), checkpoints['mmseg'], work_dir=str(tmp_path), fold=True)


EVALUATORS = [
    "test_evaluator = [dict(type='DumpResults', out_file_path='d.pkl'), "
    "dict(type='IoUMetric', iou_metrics=['mIoU'])]",
    "test_evaluator = dict(_delete_=True, metrics=[dict(type='IoUMetric')])",
]


@pytest.mark.parametrize('lines', EVALUATORS)
def test_label_maps_with_other_evaluators(
    stock, checkpoints, label_maps, demo_data, tmp_path, monkeypatch, lines
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'data').symlink_to(demo_data / 'data')
    metrics = test(stock('mmseg', lines), checkpoints['mmseg'], out='out')
    assert 'mIoU' in metrics
    same_labels(maps(tmp_path / 'out'), label_maps)


UNLABELLED = """
pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64)),
            dict(type='PackSegInputs')]
one = dict(type='BaseSegDataset', metainfo=metainfo, img_suffix='.png', pipeline=pipeline,
           data_prefix=dict(img_path={!r}))
test_dataloader = dict(dataset=dict(_delete_=True, type='ConcatDataset', datasets=[
    one, dict(one, data_prefix=dict(img_path={!r}))]))
test_evaluator = None
"""


@pytest.fixture
def scenes(demo_data, tmp_path):
    """Two folders with images of the same names, and no labels."""
    images = sorted((demo_data / 'data/demo/images/validation').glob('*.png'))
    for folder, path in zip(('a', 'b'), images, strict=True):
        (tmp_path / 'scenes' / folder).mkdir(parents=True)
        Image.open(path).save(tmp_path / 'scenes' / folder / '1.png')
    return tmp_path / 'scenes'


def test_unlabelled_images_of_one_name(stock, checkpoints, label_maps, scenes, tmp_path):
    """Folders are kept, with several data sets and without an evaluator too."""
    lines = UNLABELLED.format(str(scenes / 'a'), str(scenes / 'b'))
    base = str(stock('mmseg'))
    config = tmp_path / 'unlabelled.py'
    metainfo = dict(Config.fromfile(base).metainfo)
    config.write_text(f'_base_ = {base!r}\nmetainfo = {metainfo}\n{lines}')
    options = dict(work_dir=str(tmp_path / 'runs'), show_dir=str(tmp_path / 'pictures'))
    out = tmp_path / 'out'
    assert test(config, checkpoints['mmseg'], out=str(out), **options) == {}
    expected = list(label_maps.values())
    for folder, labels in zip(('a', 'b'), expected, strict=True):
        assert np.array_equal(np.array(Image.open(out / folder / '1.png')), labels)
        assert (tmp_path / 'pictures' / folder / '1.png').exists()
    # the config's tta_pipeline reads labels, and there are none
    test(config, checkpoints['mmseg'], out=str(tmp_path / 'tta'), tta=True, **options)
    assert len(maps(tmp_path / 'tta' / 'a')) == len(maps(tmp_path / 'tta' / 'b')) == 1
    with pytest.raises(UserError, match='has no test_evaluator, so there is nothing'):
        test(config, checkpoints['mmseg'])


@pytest.mark.parametrize('pipeline', [True, False], ids=['given', 'flip'])
def test_augmented_segmentor(stock, checkpoints, label_maps, tmp_path, pipeline):
    """The mean of the probabilities of all views, here computed by hand."""
    config = stock('mmseg', '', [] if pipeline else ['tta_pipeline', 'tta_model'])
    lines = """
tta_pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64)), dict(
    type='TestTimeAug', transforms=[
        [dict(type='RandomFlip', prob=p, direction='horizontal') for p in (0., 1.)],
        [dict(type='LoadAnnotations')], [dict(type='PackSegInputs')]])]
"""
    if pipeline:
        config = stock('mmseg', lines)
    out = tmp_path / 'out'
    metrics = test(
        config, checkpoints['mmseg'], work_dir=str(tmp_path), out=str(out), tta=True
    )
    assert 'mIoU' in metrics
    cfg = load_config(stock('mmseg'))
    model = build_model(cfg).eval()
    model.load_state_dict(torch.load(checkpoints['mmseg'])['state_dict'])
    mean, std = (model.data_preprocessor.mean, model.data_preprocessor.std)
    found = maps(out)
    assert not all(np.array_equal(found[n], label_maps[n]) for n in found)
    for name, labels in found.items():
        image = mmcv.imread(f'data/demo/images/validation/{name}', channel_order='rgb')
        image = mmcv.imresize(image, (64, 64))
        tensor = (torch.from_numpy(image.copy()).permute(2, 0, 1).float() - mean) / std
        views = []
        for flip in (False, True):
            view = tensor.flip(-1) if flip else tensor
            with torch.no_grad():
                logits = model.encode_decode(view[None], [dict(img_shape=(64, 64))])
            logits = logits.flip(-1) if flip else logits
            size = labels.shape
            logits = torch.nn.functional.interpolate(logits, size, mode='bilinear')
            views.append(logits.softmax(1))
        by_hand = sum(views).argmax(1)[0].numpy()
        assert np.mean(by_hand == labels) > 0.995


def test_detector(stock, checkpoints, tmp_path):
    config = stock('mmdet', drop=[k for k in BARE if k != 'tta_model'])
    metrics = test(
        config,
        checkpoints['mmdet'],
        work_dir=str(tmp_path / 'runs'),
        out=str(tmp_path / 'det.pkl'),
        show_dir=str(tmp_path / 'pictures'),
    )
    assert {'coco/bbox_mAP', 'coco/segm_mAP'} <= set(metrics)
    assert len(maps(tmp_path / 'pictures')) == 2
    predictions = pickle.loads((tmp_path / 'det.pkl').read_bytes())
    assert len(predictions) == 2 and 'masks' in predictions[0]['pred_instances']


def test_augmented_detector(stock, checkpoints, tmp_path, capsys):
    """A stock config says nothing of it; several evaluators, wrapped data."""
    lines = """
coco = dict(type='CocoMetric', metric=['bbox', 'segm'],
            ann_file='data/demo/annotations/instances_validation.json')
test_evaluator = [coco, dict(coco, prefix='again', metric='segm')]
test_dataloader = dict(dataset=dict(
    _delete_=True, type='RepeatDataset', times=1, dataset=inner))
"""
    inner = Config.fromfile(stock('mmdet')).test_dataloader.dataset.to_dict()
    config = stock('mmdet', f'inner = {inner}\n{lines}')
    metrics = test(config, checkpoints['mmdet'], work_dir=str(tmp_path), tta=True)
    assert 'masks are left out' in capsys.readouterr().out
    assert {'coco/bbox_mAP', 'again/bbox_mAP'} <= set(metrics)
    assert not any('segm' in name for name in metrics)


def test_show(stock, checkpoints, tmp_path, monkeypatch):
    """In a window, with the time to look; nothing is saved."""
    config, checkpoint = stock('mmseg'), checkpoints['mmseg']
    monkeypatch.setattr('matplotlib.pyplot.get_backend', lambda: 'agg')
    with pytest.raises(UserError, match='--show needs a display.*--show-dir instead'):
        test(config, checkpoint, show=True)
    shown = []
    monkeypatch.setattr('matplotlib.pyplot.get_backend', lambda: 'qtagg')
    monkeypatch.setattr(
        Visualizer,
        'show',
        lambda self, image, win_name, wait_time: shown.append((win_name, wait_time)),
    )
    test(config, checkpoint, work_dir=str(tmp_path), show=True, wait_time=0.5)
    assert len(shown) == 2 and {seconds for _, seconds in shown} == {0.5}
    assert not list(tmp_path.rglob('*.png'))


def test_a_checkpoint_that_does_not_fit(stock, checkpoints, tmp_path):
    config = stock('mmseg', 'model = dict(backbone=dict(context_skip=True))')
    with pytest.raises(CheckpointError, match='missing from the file: backbone.'):
        test(config, checkpoints['mmseg'], work_dir=str(tmp_path))


def test_arguments(stock, checkpoints):
    with pytest.raises(UserError, match='none.pth does not exist'):
        test(stock('mmseg'), 'none.pth')
    with pytest.raises(UserError, match='--out d.json must end in .pkl for a detector'):
        test(stock('mmdet'), checkpoints['mmdet'], out='d.json')
    with pytest.raises(UserError, match='has no test_dataloader; add'):
        test(stock('mmseg', drop=['test_dataloader']), checkpoints['mmseg'])


def test_output_names():
    assert output_names(['d/a/1.png', './d//b/1.png']) == {
        'd/a/1.png': 'a/1',
        'd/b/1.png': 'b/1',
    }
    assert output_names(['/x/1.v2.jpg', '/x/2.jpg']) == {
        '/x/1.v2.jpg': '1.v2',
        '/x/2.jpg': '2',
    }
    assert output_names([]) == {}
    with pytest.raises(UserError, match='x/1.png and x/1.jpg would both be saved as 1'):
        output_names(['x/1.png', 'x/1.jpg', 'x/1.png'])
