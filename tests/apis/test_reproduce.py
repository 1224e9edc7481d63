"""Evaluating and training rows of the tables, on small data in the real layouts."""

import argparse
import functools
import http.server
import importlib
import json
import re
import shlex
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import CHANNELS, ROOT, TINY, randomised
from mmengine.config import DictAction
from mmengine.fileio import load
from mmengine.optim import OptimWrapper
from mmengine.registry import PARAM_SCHEDULERS
from PIL import Image

from overlock_mm import cli
from overlock_mm.apis import reproduce as module
from overlock_mm.apis.reproduce import (
    divide,
    read_rows,
    reproduce,
    select_rows,
    training_options,
    written_options,
)
from overlock_mm.config.edit import without_pretrained
from overlock_mm.config.load import build_model, load_config
from overlock_mm.errors import UserError

SEGMENTOR, DETECTOR = 'upernet_overlock_t', 'mask_rcnn_overlock_t_1x'
EXECUTE = module.execute
CLASS = 12  # what the models of the checkpoints see everywhere
SHARE = 0.62  # of an image that the mask of its only object covers
SMALL = {'model.backbone.arch': dict(_delete_=True, **TINY)}
SMALL_SEGMENTOR = {
    **SMALL,
    'model.decode_head.in_channels': CHANNELS,
    'model.decode_head.channels': 8,
    'model.auxiliary_head.in_channels': CHANNELS[2],
    'model.auxiliary_head.channels': 8,
    'model.data_preprocessor.size': (32, 32),
    'train_dataloader.dataset.pipeline.2.scale': (128, 32),
    'train_dataloader.dataset.pipeline.3.crop_size': (32, 32),
    'test_dataloader.dataset.pipeline.1.scale': (256, 64),
    'val_dataloader.dataset.pipeline.1.scale': (256, 64),
    **{f'{part}_dataloader.num_workers': 0 for part in ('train', 'val', 'test')},
}
SMALL_DETECTOR = {
    **SMALL,
    'model.neck.in_channels': CHANNELS,
    'model.neck.out_channels': 16,
    'model.rpn_head.in_channels': 16,
    'model.rpn_head.feat_channels': 16,
    'model.roi_head.bbox_roi_extractor.out_channels': 16,
    'model.roi_head.mask_roi_extractor.out_channels': 16,
    'model.roi_head.bbox_head.in_channels': 16,
    'model.roi_head.bbox_head.fc_out_channels': 16,
    'model.roi_head.mask_head.in_channels': 16,
    'model.roi_head.mask_head.conv_out_channels': 16,
    'test_dataloader.dataset.pipeline.1.scale': (96, 96),
    'test_dataloader.num_workers': 0,
}


@pytest.fixture(scope='module', autouse=True)
def _quick_configs():
    """MMDetection's metafiles are read once, and not for each config, which takes 1 s."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('mmengine.config.utils.load', functools.cache(load))
        yield


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Two images in each part of ADE20K and COCO."""
    from mmdet.datasets import CocoDataset

    root, rng = tmp_path_factory.mktemp('sets'), np.random.RandomState(0)
    ade, coco = root / 'ade/ADEChallengeData2016', root / 'coco'

    def save(array, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)

    for part in ('training', 'validation'):
        for i in range(2):
            image = rng.randint(0, 256, (64, 96, 3), np.uint8)
            labels = rng.randint(0, 40, (8, 12), np.uint8).repeat(8, 0).repeat(8, 1)
            save(image, ade / f'images/{part}/{i}.jpg')
            save(labels, ade / f'annotations/{part}/{i}.png')
    names = CocoDataset.METAINFO['classes']
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(names)]
    images, objects = [], []
    for i in range(2):
        save(rng.randint(0, 256, (64, 96, 3), np.uint8), coco / f'val2017/{i}.jpg')
        images.append(dict(id=i, file_name=f'{i}.jpg', width=96, height=64))
        right = SHARE * 96
        objects.append(
            dict(
                id=i + 1,
                image_id=i,
                category_id=CLASS + 1,
                bbox=[0, 0, 96, 64],
                area=96 * 64,
                iscrowd=0,
                segmentation=[[0, 0, right, 0, right, 64, 0, 64]],
            )
        )
    (coco / 'annotations').mkdir()
    content = dict(images=images, annotations=objects, categories=categories)
    (coco / 'annotations/instances_val2017.json').write_text(json.dumps(content))
    return root


def expected_miou(data):
    """When the model sees one class everywhere."""
    paths = data.glob('ade/ADEChallengeData2016/annotations/validation/*.png')
    labels = np.concatenate([np.array(Image.open(p)).ravel() for p in paths])
    labels = labels[labels > 0]  # 0 is no class
    right = (labels == CLASS + 1).sum()
    assert right
    return 100 * right / labels.size / len(np.unique(labels))


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """A folder with small checkpoints in the layout of the released ones.

    The segmentor sees one class everywhere, the detector one object of it that is as large
    as the image, with a mask as large as its box.
    """
    folder = tmp_path_factory.mktemp('weights')
    for row, options in ((SEGMENTOR, SMALL_SEGMENTOR), (DETECTOR, SMALL_DETECTOR)):
        row = read_rows()[row]
        cfg = load_config(row.config, options)
        without_pretrained(cfg.model)
        torch.manual_seed(0)
        state = randomised(build_model(cfg)).state_dict()
        if 'decode_head.conv_seg.bias' in state:
            constant = {'decode_head.conv_seg': one_hot(150)}
        else:
            box = 'roi_head.bbox_head'
            constant = {
                f'{box}.fc_cls': one_hot(81),
                f'{box}.fc_reg': torch.zeros(320),
                'rpn_head.rpn_reg': torch.tensor([0.0, 0.0, 4.0, 4.0] * 3),
                'roi_head.mask_head.conv_logits': torch.full((80,), 10.0),
            }
        for name, bias in constant.items():
            state[f'{name}.weight'].zero_()
            state[f'{name}.bias'].copy_(bias)
        meta = dict(epoch=12, iter=9, config='model = 1', CLASSES=('a', 'b'), PALETTE=None)
        optimizer = dict(state={}, param_groups=[dict(lr=1e-4, params=[0])])
        content = dict(meta=meta, state_dict=state, optimizer=optimizer)
        torch.save(content, folder / row.weights.rpartition('/')[2])
    return folder


def one_hot(count):
    return 10.0 * (torch.arange(count) == CLASS)


@pytest.fixture(autouse=True)
def commands(monkeypatch, tmp_path):
    """Run commands in this process, which is quicker; the fixture lists them."""
    listed = []

    def execute(command, gpus):
        listed.append(command)
        assert command[0] == 'overlock' and gpus == 0
        cli._run(command[1], command[2:])
        return 0

    monkeypatch.setattr(module, 'execute', execute)
    monkeypatch.chdir(tmp_path)
    return listed


def call(monkeypatch, capsys, *arguments):
    """Exit status and output of ``overlock reproduce``, in this process."""
    monkeypatch.setattr(sys, 'argv', ['overlock', 'reproduce', *map(str, arguments)])
    status = 0
    try:
        cli.main()
    except SystemExit as ended:
        status = ended.code
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def words(commands):
    return [command[1] for command in commands]


def test_rows():
    rows = read_rows()
    published = [v for row in rows.values() for v in row.published.values() if v]
    assert len(published) == 4 + 2 * 6 + 3  # of the three tables of the paper
    assert rows[DETECTOR].published == {'box AP': 48.3, 'mask AP': 43.3}
    assert rows['overlock_b'].published == {'Top 1 Accuracy': 85.1}
    unknown = {n for n, row in rows.items() if not any(row.published.values())}
    assert {n.replace('_layer_decay', '') for n in unknown} == {
        *(f'cascade_mask_rcnn_overlock_{arch}' for arch in ('xt', 't', 's', 'b')),
        'mask_rcnn_overlock_xt_1x',
        'mask_rcnn_overlock_xt_3x',
        'upernet_overlock_xt',
        'upernet_overlock_b',
    }
    assert len(select_rows(['all'])) == 4 + 6 + 3
    assert len(select_rows(['all'], train=True)) == 6 + 3
    assert len(select_rows(['cascade*', 'upernet_overlock_t', 'upernet*'])) == 5 + 5


def test_evaluation_of_released_checkpoints(
    data, weights, commands, monkeypatch, capsys, tmp_path
):
    arguments = ('--data-root', data, '--weights', weights, '--gpus', 0)
    files = ('--json', tmp_path / 'r.json', '--markdown', tmp_path / 'r.md')
    small = written_options(SMALL_DETECTOR)
    status, out, err = call(
        monkeypatch, capsys, DETECTOR, *arguments, *files, '--cfg-options', *small
    )
    assert not status, err
    assert words(commands) == ['convert', 'test']
    # boxes are right; masks overlap by 0.62, which is enough at 0.5, 0.55 and 0.6
    box, mask = json.loads((tmp_path / 'r.json').read_text())
    assert (box['obtained'], box['published'], box['difference']) == (100.0, 48.3, 51.7)
    assert (mask['obtained'], mask['published'], mask['difference']) == (30.0, 43.3, -13.3)
    assert box['origin']['checkpoint'].endswith('maskrcnn1x_overlock_tiny_coco.pth')
    assert f'{DETECTOR}  OverLoCK-T  released  box AP   48.3       100.00    +51.70' in out
    table = (tmp_path / 'r.md').read_text()
    assert (
        f'| {DETECTOR} | OverLoCK-T | released | mask AP | 43.3 | 30.00 | -13.30 |' in table
    )
    assert 'Verified: all' in out

    small = written_options(SMALL_SEGMENTOR)
    run = functools.partial(call, monkeypatch, capsys, SEGMENTOR, *arguments)
    status, out, err = run('--cfg-options', *small)
    assert not status, err
    obtained = expected_miou(data)
    assert f'mIoU    50.3       {obtained:.2f}' in out

    # what is done is not done again, until something has changed
    commands.clear()
    status, out, _ = run('--cfg-options', *small)
    assert not status and not commands and 'evaluated already' in out
    assert f'mIoU    50.3       {obtained:.2f}' in out
    _, out, _ = call(monkeypatch, capsys, '--list')
    assert f'{obtained:.2f}' in out and '+51.70' in out and not commands
    status, *_ = run('--cfg-options', *small, 'model.test_cfg.mode=whole', 'x=1')
    assert not status and words(commands) == ['convert', 'test']


def test_a_changed_checkpoint(data, weights, commands, monkeypatch, tmp_path):
    """It is evaluated again; if that fails, the old number is not that of the new file."""
    path = weights / 'upernet_overlock_tiny_ade20k.pth'
    mine = tmp_path / 'mine'
    mine.mkdir()
    content = torch.load(path)
    results = []
    for label in (CLASS, 200):
        if label == 200:  # another class, which the label maps do not have
            content['state_dict']['decode_head.conv_seg.bias'] = torch.arange(150.0)
        torch.save(content, mine / path.name)
        (found,), failures = reproduce(
            [SEGMENTOR],
            data_root=data,
            weights=mine,
            gpus=0,
            cfg_options=SMALL_SEGMENTOR,
        )
        assert not failures
        results.append(found.obtained)
    assert results == [round(expected_miou(data), 2), 0.0]
    assert words(commands) == ['convert', 'test'] * 2
    monkeypatch.setattr(module, 'execute', lambda command, gpus: 1)
    torch.save(dict(content, meta={}), mine / path.name)
    (found,), failures = reproduce(
        [SEGMENTOR], data_root=data, weights=mine, gpus=0, cfg_options=SMALL_SEGMENTOR
    )
    assert found.obtained is None and failures.keys() == {SEGMENTOR}


def test_download(data, weights, commands, monkeypatch, tmp_path):
    """From a server on this machine, after the data is known to be there."""
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            super().do_GET()

        def log_message(self, *arguments):
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(
        ('127.0.0.1', 0), functools.partial(Handler, directory=weights)
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        row = read_rows()[SEGMENTOR]
        name = row.weights.rpartition('/')[2]
        url = f'http://127.0.0.1:{server.server_port}/{name}'
        monkeypatch.setattr(
            module, 'read_rows', lambda: {row.name: replace(row, weights=url)}
        )
        monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'hub'))
        run = functools.partial(reproduce, [row.name], gpus=0, cfg_options=SMALL_SEGMENTOR)
        with pytest.raises(UserError, match='Get ADE20K: unpack http'):
            run(data_root=tmp_path)
        assert not requests
        (found,), failures = run(data_root=data)
        assert not failures and found.obtained == round(expected_miou(data), 2)
        assert requests == [f'/{name}'] and commands[0][2] == url
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    # without the server, from the cache; and then not even there
    (found,), failures = run(data_root=data)
    assert not failures and found.obtained and len(commands) == 2
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'empty'))
    (found,), failures = run(data_root=data, out='other')
    assert found.obtained is None and 'cannot be downloaded' in failures[row.name]


def test_classifier(commands, tmp_path):
    from timm import create_model

    model = create_model('overlock_xt', num_classes=2)
    (tmp_path / 'w').mkdir()
    torch.save(model.state_dict(), tmp_path / 'w/overlock_xt_in1k_224.pth')
    for i, name in enumerate(('a', 'b', 'b')):
        folder = tmp_path / 'sets/imagenet/val' / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (64, 48), (i * 90, 30, 30)).save(folder / f'{i}.png')
    # the last bias decides: class b for every image
    model.head[4].weight.data.zero_()
    model.head[4].bias.data.copy_(torch.tensor([0.0, 1.0]))
    torch.save(model.state_dict(), tmp_path / 'w/overlock_xt_in1k_224.pth')
    run = functools.partial(
        reproduce,
        ['overlock_xt'],
        data_root=tmp_path / 'sets',
        weights=tmp_path / 'w',
        gpus=0,
    )
    (found,), failures = run()
    assert not failures and found.obtained == 66.67 and found.difference == -16.03


@pytest.mark.parametrize('name', [SEGMENTOR, DETECTOR])
@pytest.mark.parametrize(
    'gpus, images, accumulated, total',
    [(1, 2, 8, 16), (2, 2, 4, 16), (3, 1, 5, 15), (4, 2, 2, 16), (8, 2, 1, 16)]
    + [(16, 1, 1, 16), (0, 2, 8, 16), (32, 1, 1, 32)],
)
def test_division(recipes, name, gpus, images, accumulated, total):
    """Images of an update, of the warm-up and of the training are those of the recipe."""
    cfg = recipes[name]
    assert divide(16, gpus, 2) == (gpus, images, accumulated)
    options, notes = training_options(cfg, gpus, 2)
    changed = cfg._to_lazy_dict()
    changed = type(cfg)(changed)
    changed.merge_from_dict(options)
    wrapper = changed.optim_wrapper
    steps = wrapper.get('accumulative_counts', 1)
    per_iteration = changed.train_dataloader.batch_size * max(gpus, 1)
    assert (per_iteration * steps, steps) == (total, accumulated)
    rate = dict(upernet_overlock_t=6e-5, mask_rcnn_overlock_t_1x=2e-4)[name]
    assert wrapper.optimizer.lr == pytest.approx(rate * total / 16)
    assert any('learning rate' in note for note in notes) == (total != 16)

    def seen(iterations, recipe):
        """Images of so many iterations: those of the recipe, rounded up to updates."""
        assert iterations % steps == 0
        assert 0 <= iterations * per_iteration - recipe < total
        if total == 16:
            assert iterations * per_iteration == recipe

    warm_up, decay = changed.param_scheduler
    assert warm_up.begin == 0
    if name == DETECTOR:
        seen(warm_up.end, 8_000)  # 500 x 16
        assert changed.train_cfg.max_epochs == 12 and decay.milestones == [8, 11]
        assert (decay.begin, decay.end) == (0, 12)
        assert changed.default_hooks.checkpoint.interval == 1
        return
    seen(warm_up.end, 24_000)
    assert decay.begin == warm_up.end and decay.end == changed.train_cfg.max_iters
    seen(changed.train_cfg.max_iters, 2_560_000)
    seen(changed.train_cfg.val_interval, 128_000)
    assert changed.default_hooks.checkpoint.interval == changed.train_cfg.val_interval
    assert changed.train_cfg.max_iters // changed.train_cfg.val_interval in (19, 20)


def test_the_table_of_divisions():
    """Of docs/reproduction.md."""
    text = (ROOT / 'docs/reproduction.md').read_text()
    rows = re.findall(r'^\| (\d+)[^|]* \| (\d+) \| (\d+) \| (\d+) \|$', text, re.M)
    assert len(rows) == 6
    for gpus, *numbers in (map(int, row) for row in rows):
        division = divide(16, gpus, 2)
        assert numbers == [division.images, division.accumulated, division.total]


@pytest.fixture(scope='module')
def recipes():
    return {name: load_config(read_rows()[name].config) for name in (SEGMENTOR, DETECTOR)}


def trained(cfg, batches):
    """Learning rate and gradient of every update, as mmengine's training loop does them."""
    weight = torch.nn.Parameter(torch.zeros(()))
    model = torch.nn.Module()
    model.weight = weight
    optimizer = torch.optim.SGD([weight], lr=cfg.optim_wrapper.optimizer.lr)
    updates = []
    original = optimizer.step

    def step():
        updates.append((optimizer.param_groups[0]['lr'], weight.grad.item()))
        original()

    optimizer.step = step
    steps = cfg.optim_wrapper.get('accumulative_counts', 1)
    wrapper = OptimWrapper(optimizer, accumulative_counts=steps)
    wrapper.initialize_count_status(model, 0, cfg.train_cfg.max_iters)
    schedulers = [
        PARAM_SCHEDULERS.build(dict(scheduler, optimizer=wrapper))
        for scheduler in cfg.param_scheduler
    ]
    for i in range(cfg.train_cfg.max_iters):
        with wrapper.optim_context(model):
            loss = (weight * batches[i]).mean()
        wrapper.update_params(loss)
        for scheduler in schedulers:
            scheduler.step()
    return np.array(updates)


@pytest.mark.parametrize('gpus', [1, 2, 3, 4, 16])
def test_updates_are_those_of_the_recipe(recipes, gpus):
    """With mmengine's own wrapper and schedulers, for 30 updates in place of 160000."""
    cfg = type(recipes[SEGMENTOR])(recipes[SEGMENTOR]._to_lazy_dict())
    short = {'train_cfg.max_iters': 30, 'train_cfg.val_interval': 10}
    short |= {'param_scheduler.0.end': 6, 'param_scheduler.1.begin': 6}
    cfg.merge_from_dict({**short, 'param_scheduler.1.end': 30})
    images = torch.arange(600.0)
    recipe = trained(cfg, images.split(16))
    changed = type(cfg)(cfg._to_lazy_dict())
    changed.merge_from_dict(training_options(changed, gpus, 2)[0])
    ours = trained(changed, images.split(changed.train_dataloader.batch_size * gpus))
    rates, gradients = ours.T
    if gpus == 3:  # 15 images in an update
        assert len(ours) == 32 and 15 * 32 == 16 * 30
        assert gradients[1] == np.arange(15, 30).mean()
        assert rates.max() == pytest.approx(6e-5 * 15 / 16, rel=0.05)
        return
    assert len(ours) == len(recipe) == 30
    assert np.array_equal(gradients, recipe[:, 1])
    # schedulers move between updates, too: by less than a step of the warm-up
    assert np.abs(rates - recipe[:, 0]).max() < 6e-5 / 5
    assert rates[6:] == pytest.approx(recipe[6:, 0], abs=6e-5 / 23)
    assert np.argmax(rates) in (5, 6) and rates[-1] < 6e-5 / 10


def test_training(data, commands, monkeypatch, capsys):
    """Two updates of 16 images, in iterations of 4, after one that fails."""
    updates = []
    original = torch.optim.AdamW.step

    def step(self, *arguments, **options):
        updates.append(self.param_groups[0]['lr'])
        return original(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, 'step', step)
    small = {**SMALL_SEGMENTOR, 'train_cfg.max_iters': 2}
    run = functools.partial(
        reproduce,
        [SEGMENTOR],
        data_root=data,
        gpus=0,
        train=True,
        pretrained=False,
        images_per_gpu=4,
        cfg_options=small,
    )
    with monkeypatch.context() as patch:
        patch.setattr(module, 'execute', lambda command, gpus: 3)
        (found,), failures = run()
    assert found.obtained is None and 'exit status 3' in failures[SEGMENTOR]
    (found,), failures = run()
    assert not failures, failures
    assert words(commands) == ['train', 'test'] and len(updates) == 2
    assert (found.weights, found.published) == ('trained here', 50.3)
    assert 0 <= found.obtained < 20
    assert found.origin['checkpoint'].endswith('_trained/training/iter_8.pth')
    assert found.origin['training']['optim_wrapper.accumulative_counts'] == 4
    commands.clear()
    (again,), _ = run()
    assert not commands and again.obtained == found.obtained
    _, failures = run(images_per_gpu=2)
    assert 'another number of GPUs; delete it' in failures[SEGMENTOR] and not commands


def test_baseline(data, commands):
    """A model of timm in the same recipe: no published number, and its own folder."""
    small = {
        k: v
        for k, v in SMALL_SEGMENTOR.items()
        if 'backbone' not in k and 'in_channels' not in k
    }
    results, failures = reproduce(
        [SEGMENTOR],
        data_root=data,
        gpus=0,
        train=True,
        baseline='timm/convnext_atto',
        pretrained=False,
        images_per_gpu=16,
        cfg_options={**small, 'train_cfg.max_iters': 1},
    )
    assert not failures, failures
    assert words(commands) == ['swap', 'train', 'test']
    (found,) = results
    assert found.backbone == 'timm/convnext_atto' and found.published is None
    assert found.obtained is not None and found.cells()[4] == '-'
    cfg = load_config(f'work_dirs/reproduce/{SEGMENTOR}_timm_convnext_atto/config.py')
    backbone = cfg.model.backbone
    assert backbone.model_name == 'convnext_atto' and not backbone.pretrained
    assert backbone.drop_path_rate == 0.2  # the row's
    assert (
        cfg.optim_wrapper.optimizer
        == load_config(read_rows()[SEGMENTOR].config).optim_wrapper.optimizer
    )


def test_baseline_without_stochastic_depth():
    row = read_rows()[SEGMENTOR]
    common = module._Common(
        'data', 0, True, 'timm/vgg11', module.Path('out'), None, 2, True, {}
    )
    job = module._Job(row, common)
    assert '--drop-path-rate' not in job._swap()


def test_dry_run(monkeypatch, capsys, commands, tmp_path):
    """Every published row, in commands that are read as they were meant; nothing is run."""
    status, out, err = call(monkeypatch, capsys, 'all', '--dry-run', '--gpus', 8)
    assert not status and not commands and not list(tmp_path.iterdir())
    published = {n for n, row in read_rows().items() if any(row.published.values())}
    shown = [line for line in out.splitlines() if line and line[0] != '#']
    titles = [line for line in out.splitlines() if ', released (published: ' in line]
    assert {line[2:].partition(',')[0] for line in titles} == published
    assert (
        '# mask_rcnn_overlock_s_3x, OverLoCK-S, released (published: box AP 51.0, ' in out
    )
    parsed = [command_of(line) for line in shown]
    kinds = [p.command for p in parsed if p]
    assert (kinds.count('convert'), kinds.count('test')) == (9, 9)
    assert kinds.count('validate') == 4
    assert all(p.launcher == 'pytorch' for p in parsed if p and p.command == 'test')
    assert '# data/imagenet/val does not exist. Get ImageNet-1K' in out
    assert 'in data/coco, or link it there' in out

    arguments = ('--train', '--dry-run', '--gpus', 1, '--data-root', '/sets')
    status, out, _ = call(
        monkeypatch, capsys, DETECTOR, SEGMENTOR, *arguments, '--baseline', 'timm/resnet18'
    )
    assert not status and 'in /sets/coco, or link it there' in out
    parsed = [command_of(line) for line in out.splitlines() if line and line[0] != '#']
    kinds = [p.command for p in parsed if p]
    assert kinds == ['swap', 'train', 'test'] * 2
    detector, segmentor = (p for p in parsed if p and p.command == 'train')
    for name, options in ((DETECTOR, detector), (SEGMENTOR, segmentor)):
        cfg = load_config(read_rows()[name].config, options.cfg_options)
        assert cfg.optim_wrapper.accumulative_counts == 8
        own = {k: cfg[k].to_dict() for k in ('train_dataloader', 'val_dataloader')}
        assert "'/sets/" in str(own) and "'data/" not in str(own)
        assert "'data/" not in str(cfg.val_evaluator)
    assert cfg.train_cfg.max_iters == 1_280_000 and options.resume is True


def command_of(line):
    """A printed command as its parser reads it; None for another program."""
    command = shlex.split(line)
    if command[0] == 'mkdir':
        return None
    at = command.index('overlock_mm') if '-m' in command else 0
    name, *arguments = command[at + 1 :]
    parser = module_parser(name)
    options = parser.parse_args(arguments)
    options.command = name
    return options


def module_parser(name):
    parser = argparse.ArgumentParser()
    importlib.import_module(f'overlock_mm.cli.{name}').add_arguments(parser)
    return parser


def test_programs(monkeypatch):
    """The launcher starts the package, whether or not its scripts are on the PATH."""
    command = module._command(['test', 'c.py'], 4, dict(a=1))
    tail = '--standalone --nproc_per_node=4 -m overlock_mm test c.py --launcher pytorch'
    tail += ' --cfg-options a=1'
    beside = module.Path(sys.executable).parent
    monkeypatch.setattr('shutil.which', lambda name: str(beside / name))
    assert module.shown(command, 4) == f'torchrun {tail}'
    for other in (None, '/of/another/environment'):
        monkeypatch.setattr('shutil.which', lambda name, other=other: other)
        assert module.shown(command, 4) == (
            f'{shlex.quote(sys.executable)} -m torch.distributed.run {tail}'
        )
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    assert module.shown(['overlock', 'test'], 0).startswith('CUDA_VISIBLE_DEVICES= ')


def test_a_command_in_a_process_of_its_own(monkeypatch, tmp_path):
    """What Python is called with, and that its exit status comes back."""
    python = tmp_path / 'python'
    python.write_text('#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES|$@" > called\nexit 7\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, 'executable', str(python))
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '1,2')
    called = tmp_path / 'called'
    assert EXECUTE(['overlock', 'test', 'a b'], 0) == 7
    assert called.read_text() == '|-m overlock_mm test a b\n'
    assert EXECUTE(module._command(['train', 'c.py'], 2), 2) == 7
    assert called.read_text() == (
        '1,2|-m torch.distributed.run --standalone --nproc_per_node=2 -m overlock_mm '
        'train c.py --launcher pytorch\n'
    )


@pytest.mark.slow
def test_in_processes_of_their_own(data, weights, monkeypatch):
    """As users run it."""
    monkeypatch.setattr(module, 'execute', EXECUTE)
    (found,), failures = reproduce(
        [SEGMENTOR], data_root=data, weights=weights, gpus=0, cfg_options=SMALL_SEGMENTOR
    )
    assert not failures and found.obtained == round(expected_miou(data), 2)


def test_options_survive_the_command_line():
    options = {
        'a': dict(b=(1, 2), _delete_=True),
        'c': [0.1, 'x', [(1, 2)]],
        'd': None,
        'e': '/some/path/',
    }
    read = {}
    for word in written_options(options):
        key, _, text = word.partition('=')
        read[key] = DictAction._parse_iterable(text)
    flat = {'a.b': (1, 2), 'a._delete_': True, 'c': [0.1, 'x', [(1, 2)]]}
    assert read == {**flat, 'd': None, 'e': '/some/path/'}
    for name in ('/with space', 'a,b', '12', '(a,b', "'a'"):
        with pytest.raises(UserError, match='cannot be given to --cfg-options'):
            written_options(dict(root=name))


@pytest.mark.parametrize(
    'arguments, message',
    [
        ([], 'give a row, or all; overlock reproduce --list'),
        (['upernet_overlock_q'], 'did you mean upernet_overlock_'),
        (['upernet_overlock_xt'], 'no checkpoint was released; --train trains it'),
        (['overlock_t', '--train'], 'trained with the train.py of timm'),
        (['overlock_t'], 'data/imagenet/val does not exist. Get ImageNet-1K'),
        ([SEGMENTOR], 'data/ade/ADEChallengeData2016/images/validation does not exist'),
        ([SEGMENTOR, '--baseline', 'timm/resnet18'], 'add --train'),
        ([SEGMENTOR, '--train', '--baseline', 'resnet18'], 'such as timm/resnet18'),
        ([SEGMENTOR, '--train', '--baseline', 'timm/rsnet18'], 'such as timm/resnet18'),
        ([SEGMENTOR, '--gpus', '99'], 'or --dry-run'),
        ([SEGMENTOR, '--gpus', '-1'], 'give 0 (the CPU)'),
        ([SEGMENTOR, '--weights', 'nowhere'], 'nowhere is not a folder'),
        ([SEGMENTOR, '--train', '--images-per-gpu', '0'], 'must be at least 1'),
        ([SEGMENTOR, '--dry-run', '--json', 'a.json'], 'no results to write to a.json'),
        ([SEGMENTOR, '--json', 'no/a.json'], 'the folder of no/a.json does not exist'),
        ([SEGMENTOR, '--json', '.'], '. cannot be written: give the name of a file'),
        ([SEGMENTOR, '--no-pretrained'], '--no-pretrained is for --train'),
        ([SEGMENTOR, '--images-per-gpu', '4'], '--images-per-gpu is for --train'),
        (
            [SEGMENTOR, '--train', '--cfg-options', 'train_dataloader.batch_size=4'],
            'train_dataloader.batch_size follows from --gpus',
        ),
        ([SEGMENTOR, '--cfg-options', 'param_scheduler.9.end=1'], 'cannot be read'),
    ],
)
def test_errors(arguments, message, monkeypatch, capsys, commands):
    status, _, err = call(monkeypatch, capsys, *arguments)
    assert status == 2 and message in err and err.startswith('error: ')
    assert err.count('\n') == 1 and not commands


def test_all_without_data(monkeypatch, capsys):
    """What is missing is named once; few have ImageNet, so that it may be missing."""
    status, out, err = call(monkeypatch, capsys, 'all')
    assert status == 2 and 'ImageNet' not in err and err.count('Get COCO 2017') == 1
    assert err.count('Get ADE20K') == 1 and err.count('\n') == 1
    assert 'without the rows of ImageNet: data/imagenet/val does not exist' in out


def test_list(monkeypatch, capsys, commands, tmp_path):
    status, out, _ = call(monkeypatch, capsys, '--list', '--json', 'rows.json')
    assert not status and not commands and 'upernet_overlock_b_layer_decay' in out
    listed = json.loads((tmp_path / 'rows.json').read_text())
    assert {r['row'] for r in listed} == set(read_rows())
    assert {r['obtained'] for r in listed} == {None}
    _, out, _ = call(monkeypatch, capsys, '--list', 'overlock_?')
    assert [line.split()[0] for line in out.splitlines()[1:]] == [
        'overlock_t',
        'overlock_s',
        'overlock_b',
    ]


def test_a_damaged_state_is_named(monkeypatch, capsys, tmp_path):
    path = tmp_path / 'work_dirs/reproduce' / SEGMENTOR / 'state.json'
    path.parent.mkdir(parents=True)
    path.write_text('{')
    status, _, err = call(monkeypatch, capsys, '--list')
    assert status == 2 and 'state.json is damaged' in err and 'delete it' in err
