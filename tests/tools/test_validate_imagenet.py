"""tools/validate_imagenet.py against predictions that are computed without it."""

import re
import runpy
import subprocess
import sys
import urllib.request
from urllib.error import URLError

import numpy as np
import pytest
import timm
import torch
from helpers import ROOT, filled, tool
from PIL import Image

import overlock_mm.timm  # noqa: F401 (registers the models)

CLASSES = 8


@pytest.fixture(scope='module')
def classified(tmp_path_factory):
    """A folder of images, a classifier's file, and the rank of every image's class.

    Half of the images are in the folder of the class that the model sees in them.
    """
    folder = tmp_path_factory.mktemp('imagenet')
    torch.manual_seed(0)
    model = filled(timm.create_model('overlock_xt', num_classes=CLASSES), torch.float32)
    model.eval()
    rng, images, orders = np.random.RandomState(0), [], []
    for i in range(12):
        # coarse noise, taller or wider than it is large, so that the crop matters
        noise = rng.randint(0, 256, (6 + i % 3, 8, 3), np.uint8)
        size = (300, 260) if i % 2 else (250, 330)
        images.append(Image.fromarray(noise).resize(size, Image.Resampling.NEAREST))
        with torch.no_grad():
            orders.append(model(prepared(images[-1]))[0].argsort(descending=True).tolist())
    labels = [order[0] for order in orders[:4]] + list(range(CLASSES))
    for i, (picture, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / 'val' / f'class_{label}'
        path.mkdir(parents=True, exist_ok=True)
        picture.save(path / f'{i:02}.png')
    torch.save({'state_dict': model.state_dict()}, folder / 'weights.pth')
    model.switch_to_deploy()
    torch.save(model.state_dict(), folder / 'deploy.pth')
    # in the order of the files: by class, then by name
    ranks = [
        order.index(label)
        for label, _, order in sorted(zip(labels, range(12), orders, strict=True))
    ]
    return folder, ranks


def prepared(picture):
    """Resize to 224 / 0.925 at the short side, crop the middle, and normalise."""
    w, h = picture.size
    short = int(224 / 0.925)
    scaled = picture.resize(
        (short if w <= h else int(short * w / h), short if h <= w else int(short * h / w)),
        Image.Resampling.BICUBIC,
    )
    left, top = (round((s - 224) / 2) for s in scaled.size)
    pixels = np.asarray(scaled.crop((left, top, left + 224, top + 224))) / 255
    pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return torch.from_numpy(pixels).float().permute(2, 0, 1)[None]


def validate(*args, status=0):
    command = [*tool('validate_imagenet.py'), *map(str, args), '--workers', '0']
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == status, result.stdout + result.stderr
    return result


@pytest.mark.parametrize(
    'weights, options, taken',
    [
        ('weights.pth', ['--batch-size', 5], slice(None)),
        ('deploy.pth', ['--subset', 6, '--fold', '--device', 'cpu'], slice(0, None, 2)),
    ],
    ids=['all', 'subset, folded'],
)
def test_accuracy(classified, weights, options, taken):
    folder, ranks = classified
    ranks = ranks[taken]
    top1, top5 = (sum(r < k for r in ranks) for k in (1, 5))
    assert 0 < top1 < top5 < len(ranks), 'the case must tell the numbers apart'
    out = validate(
        folder / 'val',
        *('--model', 'overlock_xt', '--checkpoint', folder / weights),
        *options,
    ).stdout
    found = re.search(r'top-1 ([\d.]+) \((\d+) of (\d+)\), top-5 ([\d.]+) \((\d+) of', out)
    percent1, hits1, total, percent5, hits5 = map(float, found.groups())
    assert (hits1, hits5, total) == (top1, top5, len(ranks))
    assert percent1 == pytest.approx(100 * top1 / total, abs=1e-3)
    assert percent5 == pytest.approx(100 * top5 / total, abs=1e-3)
    assert 'crop ratio 0.925, bicubic, 224x224' in out


def test_an_image_that_cannot_be_read(classified, tmp_path):
    """It is an error: timm would count its neighbour twice."""
    for i in range(CLASSES):
        (tmp_path / f'class_{i}').mkdir()
        Image.new('RGB', (64, 64)).save(tmp_path / f'class_{i}' / 'image.png')
    (tmp_path / 'class_3' / 'image.png').write_bytes(b'no picture')
    weights = classified[0] / 'weights.pth'
    options = ['--model', 'overlock_xt', '--checkpoint', weights, '--batch-size', 1]
    error = validate(tmp_path, *options, status=2).stderr
    assert 'class_3' in error and error.splitlines()[-1].startswith('error: an image of')


def test_errors(classified, tmp_path, monkeypatch, capsys):
    folder, _ = classified
    val, weights = folder / 'val', folder / 'weights.pth'
    good = ['--model', 'overlock_xt', '--checkpoint', weights]
    (tmp_path / 'empty').mkdir()
    deep = tmp_path / 'deep' / 'more' / 'class_0'
    deep.mkdir(parents=True)
    Image.new('RGB', (64, 64)).save(deep / 'image.png')
    torch.save({'weight': torch.ones(2)}, tmp_path / 'other.pth')
    (tmp_path / 'text.pth').write_text('weights')
    cases = [
        ([tmp_path / 'none', *good], 'is not a folder'),
        ([tmp_path / 'empty', *good], 'has no images'),
        ([tmp_path / 'deep', *good], 'not in a folder of its class'),
        ([deep.parent, *good], 'has 1 classes with images, the model has 8'),
        ([val, '--checkpoint', folder / 'none.pth'], 'none.pth does not exist'),
        ([val, '--checkpoint', tmp_path / 'text.pth'], 'is no checkpoint'),
        ([val, '--checkpoint', tmp_path / 'other.pth'], 'no classifier'),
        ([val, '--checkpoint', weights], 'does not fit this model'),
        ([val, *good, '--device', 'tpu'], '--device tpu cannot be used'),
        ([val, *good, '--batch-size', '0'], '0 must be at least 1'),
        ([val, *good, '--subset', '-1'], '-1 must be at least 1'),
    ]

    torch.save({'model': {}, 'path': tmp_path}, tmp_path / 'path.pth')
    cases.append(([val, '--checkpoint', tmp_path / 'path.pth'], 'trust=True'))
    trusted = [val, '--checkpoint', tmp_path / 'path.pth', '--trust']
    cases.append((trusted, 'no state dict'))

    def no_network(*args, **kwargs):
        raise URLError('no network')

    monkeypatch.setattr(urllib.request, 'urlopen', no_network)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    cases.append(([val, '--model', 'overlock_xt'], 'xt_in1k_224.pth cannot be downloaded'))
    script = str(ROOT / 'tools' / 'validate_imagenet.py')
    for args, message in cases:
        monkeypatch.setattr(sys, 'argv', [script, *map(str, args), '--workers', '0'])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(script, run_name='__main__')
        error = capsys.readouterr().err
        assert stopped.value.code == 2
        assert 'error: ' in error.splitlines()[-1] and message in error, error
