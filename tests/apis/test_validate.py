"""The accuracy of a classifier, against predictions that are computed without it."""

import urllib.request
from urllib.error import URLError

import numpy as np
import pytest
import timm
import torch
from helpers import filled
from PIL import Image
from torch.nn.modules.batchnorm import _BatchNorm

from overlock_mm.apis import validate as module
from overlock_mm.apis.validate import validate
from overlock_mm.errors import CheckpointError, UserError

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


@pytest.mark.parametrize(
    'weights, options, taken',
    [
        ('weights.pth', dict(batch_size=5), slice(None)),
        ('deploy.pth', dict(subset=6, fold=True, device='cpu'), slice(0, None, 2)),
    ],
    ids=['all', 'subset, folded'],
)
def test_accuracy(classified, weights, options, taken):
    folder, ranks = classified
    ranks = ranks[taken]
    top1, top5 = (sum(r < k for r in ranks) for k in (1, 5))
    assert 0 < top1 < top5 < len(ranks), 'the case must tell the numbers apart'
    options = dict(checkpoint=str(folder / weights), workers=0, **options)
    found = validate(str(folder / 'val'), 'overlock_xt', **options)
    assert (found.top1, found.top5, found.total) == (top1, top5, len(ranks))
    first, five = (f'{100 * hits / len(ranks):.3f}' for hits in (top1, top5))
    assert str(found) == (
        f'overlock_xt: top-1 {first} ({top1} of {len(ranks)}), top-5 {five} ({top5} of '
        f'{len(ranks)}); crop ratio 0.925, bicubic, 224x224'
    )


@pytest.mark.parametrize('fold', [False, True])
def test_fold(classified, monkeypatch, fold):
    folder, _ = classified
    evaluated = []

    def evaluate(model, *others):
        evaluated.append(model)
        return 0, 0

    monkeypatch.setattr(module, 'evaluate', evaluate)
    weights = str(folder / 'weights.pth')
    # the folder above val will do
    validate(str(folder), 'overlock_xt', weights, fold=fold, workers=0)
    (model,) = evaluated
    norms = [m for m in model.blocks1.modules() if isinstance(m, _BatchNorm)]
    assert (norms == []) == fold


@pytest.mark.parametrize('workers', [0, 1])
def test_an_image_that_cannot_be_read(classified, tmp_path, workers):
    """It is an error: timm would count its neighbour twice."""
    for i in range(CLASSES):
        (tmp_path / f'class_{i}').mkdir()
        Image.new('RGB', (64, 64)).save(tmp_path / f'class_{i}' / 'image.png')
    path = tmp_path / 'class_3' / 'image.png'
    path.write_bytes(b'no picture')
    weights = str(classified[0] / 'weights.pth')
    with pytest.raises(UserError) as error:
        validate(str(tmp_path), 'overlock_xt', weights, batch_size=1, workers=workers)
    assert str(error.value) == f'image {path} cannot be read; repair or remove it'


def test_errors(classified, tmp_path, monkeypatch):
    folder, _ = classified
    val, weights = folder / 'val', folder / 'weights.pth'
    (tmp_path / 'empty').mkdir()
    deep = tmp_path / 'deep' / 'more' / 'class_0'
    deep.mkdir(parents=True)
    Image.new('RGB', (64, 64)).save(deep / 'image.png')
    torch.save({'weight': torch.ones(2)}, tmp_path / 'other.pth')
    (tmp_path / 'text.pth').write_text('weights')
    torch.save({'model': {}, 'path': tmp_path}, tmp_path / 'path.pth')

    def no_network(*args, **kwargs):
        raise URLError('no network')

    monkeypatch.setattr(urllib.request, 'urlopen', no_network)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    cases = [
        ((tmp_path / 'none', weights), {}, 'is not a folder'),
        ((tmp_path / 'empty', weights), {}, 'has no images'),
        ((tmp_path / 'deep', weights), {}, 'not in a folder of its class'),
        ((deep.parent, weights), {}, 'has 1 classes with images, the model has 8'),
        ((val, tmp_path / 'text.pth'), {}, 'is not a checkpoint'),
        ((val, tmp_path / 'other.pth'), {}, 'no classifier'),
        ((val, weights), dict(model='overlock_t'), 'does not fit this model'),
        ((val, weights), dict(device='tpu'), 'device tpu cannot be used'),
        ((val, tmp_path / 'path.pth'), {}, 'trust=True'),
        ((val, tmp_path / 'path.pth'), dict(trust=True), 'no state dict'),
        ((val, None), {}, 'xt_in1k_224.pth cannot be downloaded'),
    ]
    for (images, checkpoint), options, message in cases:
        options = dict(dict(model='overlock_xt', workers=0), **options)
        checkpoint = checkpoint and str(checkpoint)
        with pytest.raises((UserError, CheckpointError)) as error:
            validate(str(images), checkpoint=checkpoint, **options)
        assert message in str(error.value), error.value
