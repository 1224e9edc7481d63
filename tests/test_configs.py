"""The recipes are those that were published; every config builds, trains and predicts."""

import copy
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers import DETECTION as DETECTION_DEMO
from helpers import ROOT, TINY
from helpers import SEGMENTATION as SEGMENTATION_DEMO
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.dataset import pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, PARAM_SCHEDULERS, init_default_scope

from overlock_mm import OverLoCK
from overlock_mm.config import load as load_module
from overlock_mm.config.load import load_config
from overlock_mm.datasets.demo import CLASSES, PALETTE
from overlock_mm.errors import UserError

RECIPES = json.loads((ROOT / 'tests/recipes.json').read_text())
DEMOS = [SEGMENTATION_DEMO, DETECTION_DEMO]
NAMES = ('xt', 't', 's', 'b')
CONFIGS = sorted(
    path
    for task in ('segmentation', 'detection')
    for path in (ROOT / 'configs' / task).glob('*.py')
)
PAPER = [path for path in CONFIGS if path not in DEMOS]
DETECTION = [path for path in PAPER if path.parent.name == 'detection']


def name(path):
    return path.stem


def arch_of(path):
    return next(part for part in path.stem.split('_') if part in NAMES)


# One config of each kind; the others differ in the arch and what follows from it.
KINDS = [path for path in PAPER if arch_of(path) == 't']
SHRINK = 8


@cache
def read(path):
    return Config.fromfile(path)


def load(path):
    cfg = copy.deepcopy(read(path))
    init_default_scope(cfg.default_scope)
    return cfg


def recipe_of(path):
    """What the config must say: values by their dotted keys."""
    task, arch = path.parent.name, arch_of(path)
    parts = ['every', 'upernet']
    if task == 'detection':
        parts = ['every', 'coco', '1x' if path.stem.endswith('1x') else '3x']
    recipe = {key: value for part in parts for key, value in RECIPES[part].items()}
    recipe['model.backbone.drop_path_rate'] = RECIPES['drop_path_rate'][task][arch]
    weights = RECIPES['weights'].format(arch=arch)
    recipe['model.backbone.init_cfg'] = dict(type='Pretrained', checkpoint=weights)
    if path.stem.endswith('layer_decay'):
        recipe |= RECIPES['layer_decay']
    return recipe


def value_at(node, dotted_key):
    for key in dotted_key.split('.'):
        node = node.get(key) if node else None
    return node


def plain(node):
    """Without tuples, keys that are None, and the scope that mmengine adds."""
    if isinstance(node, dict):
        items = ((key, plain(value)) for key, value in node.items() if key != '_scope_')
        return {key: value for key, value in items if value is not None}
    return [plain(value) for value in node] if isinstance(node, list | tuple) else node


@pytest.mark.parametrize('path', PAPER, ids=name)
def test_recipe(path):
    cfg, expected = load(path), recipe_of(path)
    assert {key: plain(value_at(cfg, key)) for key in expected} == expected


def test_there_is_a_config_for_every_row():
    """Four archs for UperNet and the cascade, two schedules for Mask R-CNN, and others."""
    assert {p.stem for p in CONFIGS} == {
        *(f'upernet_overlock_{a}' for a in NAMES),
        *(f'cascade_mask_rcnn_overlock_{a}' for a in NAMES),
        *(f'mask_rcnn_overlock_{a}_{s}' for a in NAMES for s in ('1x', '3x')),
        'upernet_overlock_xt_demo',
        'cascade_mask_rcnn_overlock_xt_demo',
        'upernet_overlock_b_layer_decay',
        'cascade_mask_rcnn_overlock_b_layer_decay',
    }


@pytest.mark.parametrize('path', CONFIGS, ids=name)
def test_parts_fit_together(path):
    """The arch is the one of the file's name, and neck and heads take its channels."""
    cfg, arch = load(path), arch_of(path)
    backbone = cfg.model.backbone
    assert (backbone.type, backbone.arch) == ('OverLoCK', arch)
    assert backbone.context_skip == (path.parent.name == 'detection')
    assert cfg.custom_imports.imports == [
        'overlock_mm',
        'overlock_mm.hooks',
        'overlock_mm.datasets',
    ]
    assert cfg.default_hooks.loading.type == 'StrictLoadingHook'
    # one block a stage, and no numbers: the channels stay those of the arch
    sizes = OverLoCK.arch_settings[arch]
    backbone.arch = dict(sizes, depths=(1, 1, 1, 1), focus_depths=(1, 1))
    with torch.device('meta'):
        model = build_model(cfg).eval()
    with torch.no_grad():
        maps = model.extract_feat(torch.empty(1, 3, 64, 64, device='meta'))
        if path.parent.name == 'segmentation':
            classes = cfg.model.decode_head.num_classes
            assert [m.shape[1] for m in maps] == list(OverLoCK.channels_of(arch))
            assert model.decode_head(maps).shape == (1, classes, 16, 16)
            assert model.auxiliary_head(maps).shape == (1, classes, 4, 4)
        else:
            assert [tuple(m.shape) for m in maps] == [
                (1, 256, side, side) for side in (16, 8, 4, 2, 1)
            ]


def build_model(cfg):
    if cfg.default_scope == 'mmseg':
        from mmseg.utils import register_all_modules
    else:
        from mmdet.utils import register_all_modules
    register_all_modules(init_default_scope=True)
    torch.manual_seed(0)
    return revert_sync_batchnorm(MODELS.build(cfg.model))


def tiny_model(cfg):
    """The model of a config with a tiny backbone, for small images."""
    channels = OverLoCK.channels_of(TINY)
    cfg.model.backbone.update(arch=TINY, init_cfg=None)
    if cfg.default_scope == 'mmseg':
        cfg.model.decode_head.in_channels = list(channels)
        cfg.model.auxiliary_head.in_channels = channels[2]
        size = cfg.model.data_preprocessor.size
        cfg.model.data_preprocessor.size = shrink_sizes(size)
    else:
        cfg.model.neck.in_channels = list(channels)
    return build_model(cfg)


def shrink(node):
    """Divide every size in a pipeline, so that it fits the small scenes."""
    if isinstance(node, dict):
        return {
            k: shrink_sizes(v) if k in ('scale', 'scales', 'crop_size') else shrink(v)
            for k, v in node.items()
        }
    return [shrink(v) for v in node] if isinstance(node, list) else node


def shrink_sizes(value):
    if isinstance(value, list | tuple):
        return type(value)(shrink_sizes(v) for v in value)
    return max(64, value // SHRINK)


def samples(cfg, loader, folder, count):
    """Demo scenes through the config's own pipeline."""
    segmentation = cfg.default_scope == 'mmseg'
    demo = load(SEGMENTATION_DEMO if segmentation else DETECTION_DEMO)[loader].dataset
    dataset = cfg[loader].dataset
    own = dict(pipeline=shrink(dataset.to_dict()['pipeline']))
    if dataset.type == 'ADE20KDataset':  # it checks its classes, and takes no others
        own.update(type=dataset.type, metainfo=None)
    demo.update(data_root=str(folder / 'data/demo'), **own)
    dataset = DATASETS.build(demo)
    return pseudo_collate([dataset[i] for i in range(count)])


# the cascade stands for 3x: it has the data of Mask R-CNN 3x
BUILT = [
    pytest.param(path, marks=pytest.mark.slow) if 'cascade' in path.stem else path
    for path in KINDS
    if path.stem != 'mask_rcnn_overlock_t_3x'
]


@pytest.mark.parametrize('path', [*BUILT, *DEMOS], ids=name)
def test_loss_and_prediction(path, demo_data):
    cfg = load(path)
    model = tiny_model(cfg).train()
    batch = model.data_preprocessor(samples(cfg, 'train_dataloader', demo_data, 2), True)
    loss, log = model.parse_losses(model(**batch, mode='loss'))
    loss.backward()
    assert loss.isfinite() and loss > 0
    assert ('loss_rpn_cls' in log) == (cfg.default_scope == 'mmdet')
    no_grad = [n for n, p in model.backbone.named_parameters() if p.grad is None]
    assert no_grad == []

    model.eval()
    with torch.no_grad():
        (sample,) = model.test_step(samples(cfg, 'test_dataloader', demo_data, 1))
    if cfg.default_scope == 'mmseg':
        labels = sample.pred_sem_seg.data
        assert labels.shape == (1, 96, 96) == sample.gt_sem_seg.data.shape
        assert labels.max() < cfg.model.decode_head.num_classes
    else:
        instances = sample.pred_instances
        assert instances.masks.shape == (len(instances.bboxes), 96, 96)


@pytest.mark.parametrize('path', KINDS, ids=name)
def test_weight_decay(path):
    """By name, as in the released code: a batch norm inside a Sequential does decay."""
    cfg = load(path)
    model = tiny_model(cfg)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    assert type(wrapper.optimizer) is torch.optim.AdamW and not wrapper.clip_grad_kwargs
    decays = {
        id(param): group['weight_decay']
        for group in wrapper.optimizer.param_groups
        for param in group['params']
    }
    decay = recipe_of(path)['optim_wrapper.optimizer']['weight_decay']
    for param_name, param in model.named_parameters():
        expected = 0.0 if 'norm' in param_name else decay
        assert decays[id(param)] == expected, param_name
    undecayed = [n for n, p in model.named_parameters() if decays[id(p)] == 0]
    assert 'backbone.extra_norm.2.weight' in undecayed
    assert 'backbone.sub_blocks3.0.norm1.weight' in undecayed
    assert 'backbone.patch_embed1.1.weight' not in undecayed


def learning_rates(path, iterations, epoch_length=None):
    """The rate at every iteration, stepping as mmengine's hook does."""
    cfg = load(path)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=cfg.optim_wrapper.optimizer.lr)
    schedulers = [
        PARAM_SCHEDULERS.build(s, default_args=dict(optimizer=optimizer))
        for s in cfg.param_scheduler
    ]
    rates = []
    for iteration in range(iterations):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        epoch_ends = epoch_length and (iteration + 1) % epoch_length == 0
        for scheduler in schedulers:
            if not scheduler.by_epoch or epoch_ends:
                scheduler.step()
    return rates


def test_learning_rate_of_segmentation():
    (path,) = (p for p in KINDS if p.parent.name == 'segmentation')
    rates = learning_rates(path, 10000)
    assert rates[0] == pytest.approx(6e-5 * 1e-6)
    assert rates[1] == pytest.approx(6e-5 / 1499, rel=1e-2)
    assert rates[1499] == rates[1500] == pytest.approx(6e-5)
    # linear, and zero after 160000
    for iteration in (2000, 9999):
        left = (160000 - iteration) / (160000 - 1500)
        assert rates[iteration] == pytest.approx(6e-5 * left, rel=1e-4)


@pytest.mark.parametrize(
    'kind, epochs, steps, lr', [('1x', 12, (8, 11), 2e-4), ('3x', 36, (27, 33), 1e-4)]
)
def test_learning_rate_of_detection(kind, epochs, steps, lr):
    length = 600
    path = ROOT / f'configs/detection/mask_rcnn_overlock_t_{kind}.py'
    rates = learning_rates(path, epochs * length, length)
    assert rates[0] == pytest.approx(lr * 0.001)
    assert rates[1] == pytest.approx(lr * (0.001 + 0.999 / 499))
    assert rates[499] == rates[500] == pytest.approx(lr)
    for epoch in range(1, epochs):
        expected = lr * 0.1 ** sum(epoch >= step for step in steps)
        assert rates[epoch * length] == pytest.approx(expected)
    assert rates[-1] == pytest.approx(lr * 0.01)


@pytest.mark.parametrize('path', DETECTION, ids=name)
def test_detector_is_the_stock_one(path):
    """But for the backbone and its channels, it is MMDetection's own R50-FPN model."""
    import mmdet

    kind = 'cascade-mask-rcnn' if path.stem.startswith('cascade') else 'mask-rcnn'
    folder = Path(mmdet.__file__).parent / '.mim/configs/_base_/models'
    stock = Config.fromfile(folder / f'{kind}_r50_fpn.py').model.to_dict()
    ours = load(path).model.to_dict()
    for model in (stock, ours):
        model.pop('_scope_', None)
        del model['backbone'], model['neck']['in_channels']
    assert ours == stock


def test_demo_classes(demo_data, tmp_path):
    """Those of the data, in child configs and in their dumps, read by a fresh process."""
    for path in DEMOS:
        child = tmp_path / f'{path.parent.name}.py'
        child.write_text(f'_base_ = {str(path)!r}\ntrain_dataloader = dict(batch_size=1)\n')
        Config.fromfile(child).dump(tmp_path / f'dumped_{child.name}')
    code = """
import json
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
for task in ('segmentation', 'detection'):
    cfg = Config.fromfile(f'dumped_{task}.py')
    init_default_scope(cfg.default_scope)
    found = [cfg[f'{s}_dataloader'].dataset.metainfo for s in ('train', 'val', 'test')]
    found.append(DATASETS.build(cfg.val_dataloader.dataset).metainfo)
    print(json.dumps([(info['classes'], info['palette']) for info in found]))
"""
    (tmp_path / 'data').symlink_to(demo_data / 'data')
    command = [sys.executable, '-W', 'ignore', '-c', code]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stdout.splitlines() if line.startswith('[[')]
    for first, line in zip((0, 1), lines, strict=True):
        expected = [list(CLASSES[first:]), [list(color) for color in PALETTE[first:]]]
        assert json.loads(line) == [expected] * 4


@pytest.mark.parametrize(
    'base, words',
    [
        ('mmdet::_base_/default_runtime.py', ['MMDetection is not installed', 'pip']),
        # where its package has another name than mmengine and this project know
        pytest.param(
            'mmseg::_base_/default_runtime.py',
            ["'mmseg::...'", 'write the path'],
            marks=pytest.mark.dev_stack,
        ),
    ],
)
def test_base_files_of_a_toolbox_that_is_not_found(tmp_path, monkeypatch, base, words):
    path = tmp_path / 'config.py'
    path.write_text(f'_base_ = {base!r}\n')
    if base.startswith('mmdet'):
        monkeypatch.setitem(sys.modules, 'mmdet', None)  # as if it were not installed
    else:
        monkeypatch.setitem(MODULE2PACKAGE, 'mmseg', 'mmsegmentation')
        monkeypatch.setattr(load_module, '_find_packages', lambda: None)
    with pytest.raises(UserError) as error:
        load_config(path)
    assert all(word in str(error.value) for word in words)
