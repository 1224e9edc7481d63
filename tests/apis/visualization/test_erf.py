"""Effective receptive fields: hand-worked ones, and the command."""

import json
import re

import numpy as np
import pytest
import torch
from helpers import TINY, tiny
from PIL import Image
from torch import nn

from overlock_mm import OverLoCK
from overlock_mm.apis.visualization import networks
from overlock_mm.apis.visualization.erf import field_of, fields_of
from overlock_mm.archs import ARCHS


@pytest.fixture
def small(monkeypatch):
    """'xt' is a small arch, which is quicker."""
    monkeypatch.setitem(ARCHS, 'xt', TINY)


def box(kernel, stride=1, padding=None, channels=1):
    """A convolution that sums up kernel x kernel pixels."""
    padding = kernel // 2 if padding is None else padding
    conv = nn.Conv2d(channels, 1, kernel, stride, padding, bias=False)
    nn.init.ones_(conv.weight)
    return conv


def ones(size=32, channels=1):
    return torch.ones(1, channels, size, size)


@pytest.mark.parametrize(
    'layers, centre, sides',
    [
        # 25 equal amounts: 1, 9 and 25 of them are 4, 36 and 100%
        ([box(5)], 16, (3, 5, 5)),
        # 1 2 3 2 1 in both directions: 9, 49 and 81 of 81 are 11, 60 and 100%
        ([box(3), box(3)], 16, (3, 3, 5)),
        # 16 equal amounts, from pixel 16 to 19: 4 and 16 of them are 25 and 100%
        ([box(4, stride=4, padding=0)], 17.5, (2, 4, 4)),
    ],
    ids=['one box', 'two boxes', 'an even box'],
)
def test_squares_worked_by_hand(layers, centre, sides):
    (field,) = fields_of(nn.Sequential(*layers), [ones()])
    assert field.centre == (centre, centre)
    assert tuple(field.sides.values()) == sides and tuple(field.sides) == (20, 50, 90)
    assert field.amounts.sum() == pytest.approx(1)
    rows, columns = np.nonzero(field.amounts)
    reach = (sides[2] - 1) / 2
    for index in (rows, columns):
        assert (index.min(), index.max()) == (centre - reach, centre + reach)


def test_the_square_is_around_the_centre_not_around_the_image():
    amounts = np.zeros((20, 30))
    amounts[3:6, 20:23] = 1  # 9 pixels around row 4 and column 21
    amounts[4, 21] = 4  # 4 of 12, a third
    field = field_of(8, amounts)
    assert field.centre == (4, 21) and field.sides == {20: 1, 50: 3, 90: 3}


def test_absolute_values_over_channels_and_images():
    """The derivative of a square is twice the pixel, whatever its sign."""

    class Squares(nn.Module):
        def forward(self, x):
            return (box(3, channels=2)(x.square()),)

    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(1, 2, 8, 8, generator=generator) for _ in range(3)]
    (field,) = fields_of(Squares(), images)
    expected = np.zeros((8, 8))
    pixels = torch.cat(images).double().numpy()[:, :, 3:6, 3:6]
    expected[3:6, 3:6] = np.abs(2 * pixels).sum(1).mean(0)
    assert np.allclose(field.amounts, expected / expected.sum(), rtol=1e-5)


def test_a_map_behind_a_layer_norm_and_maps_of_one_stride():
    """The plain sum over the channels would be constant, and its gradient zero."""
    torch.manual_seed(0)
    stem, last = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 4, 5, padding=2)

    class Two(nn.Module):
        def forward(self, x):
            x = stem(x)
            normed = nn.functional.layer_norm(x.movedim(1, 3), (8,)).movedim(3, 1)
            return x[:, :, ::2, ::2], normed, last(normed), normed[:, :, ::4, ::4]

    images = torch.randn(2, 1, 16, 16)
    fields = fields_of(Two(), [images])
    assert [field.stride for field in fields] == [1, 2, 4]
    extents = [np.ptp(np.nonzero(field.amounts)[0]) + 1 for field in fields]
    assert extents == [7, 3, 3]  # of stride 1 that of the last map, 5 x 5 of 3 x 3
    stem.double()
    expected = np.zeros((3, 3))
    for x in images.double():
        for i, j in np.ndindex(3, 3):
            step = torch.zeros_like(x)
            step[0, 7 + i, 7 + j] = 1e-5
            ends = (stem((x + s)[None])[0, :, 8, 8] for s in (step, -step))
            up, down = (nn.functional.layer_norm(end, (8,)).relu().sum() for end in ends)
            expected[i, j] += abs((up - down).item())
    assert np.allclose(fields[2].amounts[7:10, 7:10], expected / expected.sum(), atol=1e-4)


def test_strides_of_an_odd_size():
    odd = torch.rand(1, 3, 33, 47)  # maps of 9 x 12, 5 x 6, 3 x 3 and 2 x 2
    assert [field.stride for field in fields_of(tiny().eval(), [odd])] == [4, 8, 16, 32]
    layers = nn.Sequential(box(3, 2, channels=3), box(3, 2))
    assert [field.stride for field in fields_of(layers, [odd])] == [4]


def test_the_command(small, draw, tmp_path, configs, weights, photo):
    config = f'{configs / "segmentor.py"}={weights("segmentor")}'
    models = ['xt', 'timm/resnet18=random', config]
    options = '--size', 64, '--num', 2, '--device', 'cpu', '--json', 'erf.json'
    printed = draw('erf', *models, *options, '--out', 'erf.svg')
    content = json.loads((tmp_path / 'erf.json').read_text())
    assert [m['name'] for m in content['models']] == [
        'OverLoCK-XT',
        'resnet18',
        'segmentor',
    ]
    assert [[m['stride'] for m in model['maps']] for model in content['models']] == [
        [4, 8, 16, 32]
    ] * 3
    for model in content['models']:
        for found in model['maps']:
            sides = list(found['sides'].values())
            assert sides == sorted(sides) and 0 < sides[0] <= 64
            line = rf'{model["name"]} +.* {found["stride"]} +' + ' +'.join(map(str, sides))
            assert re.search(line, printed)
    text = (tmp_path / 'erf.svg').read_text()
    for words in (
        '2 images of noise (seed 0) of 64 x 64',
        'random weights',
        'segmentor.pth',
    ):
        assert words in text
    for name in ('one.svg', 'again.svg'):
        draw('erf', *models[1:], *options, '--out', name)
    one, again = ((tmp_path / name).read_text() for name in ('one.svg', 'again.svg'))
    assert one == again != text
    assert (
        json.loads((tmp_path / 'erf.json').read_text())['models'] == content['models'][1:]
    )
    draw(
        'erf',
        *models[2:],
        *options,
        '--images',
        photo.parent,
        '--out',
        'images.png',
        '--dpi',
        100,
    )
    found = json.loads((tmp_path / 'erf.json').read_text())
    assert not found['noise'] and found['images'] == 2
    assert found['models'][0]['maps'] != content['models'][2]['maps']
    picture = Image.open(tmp_path / 'images.png').convert('L')
    assert picture.width == 690 and np.asarray(picture).std() > 20


def test_the_backbone_has_the_weights_and_the_images_its_normalisation(
    small, configs, weights, tmp_path
):
    network = networks.build_network(f'{configs / "segmentor.py"}={weights("segmentor")}')
    state = torch.load(weights('segmentor'))['state_dict']
    for name, value in network.backbone.state_dict().items():
        assert torch.equal(value, state[f'backbone.{name}'])
    picture = np.array([[[255, 0, 128]]], np.uint8)
    seen = network.normalisation.apply(picture)
    expected = [(255 - 123.675) / 58.395, -116.28 / 57.12, (128 - 103.53) / 57.375]
    assert seen.flatten().tolist() == pytest.approx(expected)
    assert (network.normalisation.undo(seen[0]) == picture).all()
    other = networks.Normalisation((1.0, 2.0, 3.0), (1.0, 1.0, 1.0), bgr=True)
    assert other.apply(picture).flatten().tolist() == [127, -2, 252]
    assert (other.undo(other.apply(picture)[0]) == picture).all()
    torch.manual_seed(0)
    backbone = OverLoCK('xt', context_skip=True, deploy=True)
    torch.save(backbone.state_dict(), tmp_path / 'deploy.pth')
    given = networks.build_network('xt', str(tmp_path / 'deploy.pth'), seed=1)
    assert given.weights == 'deploy.pth'
    for name, value in given.backbone.state_dict().items():
        assert torch.equal(value, backbone.state_dict()[name])
    config = str(configs / 'segmentor.py')
    seeds = [networks.build_network(config, seed=seed).backbone for seed in (1, 1, 2)]
    first, same, other = (b.patch_embed1[0].weight for b in seeds)
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_images(tmp_path):
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:60, 1] = 200  # the middle
    for name in ('c.png', 'a.png', 'sub/b.PNG'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / 'notes.txt').write_text('')
    found = networks.image_files(str(tmp_path), 2)
    assert [file.name for file in found] == ['a.png', 'c.png']
    assert len(networks.image_files(str(tmp_path), 9)) == 3
    square = networks.read_square(found[0], 32)
    assert square.shape == (32, 32, 3) and (square[:, 2:-2, 1] == 200).all()


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['xt', '--out', 'a.jpg'], 'a.jpg must end in .png or .svg or .pdf'),
        (['xt', '--out', 'none/a.png'], 'folder that exists'),
        (['xxl', '--out', 'a.png'], 'xxl is not a model; give xt, t, s or b, timm/NAME'),
        (['none.py', '--out', 'a.png'], 'config none.py does not exist'),
        (['timm/none', '--out', 'a.png'], 'timm/none cannot be built'),
        (['timm/resnet18=a.pth', '--out', 'a.png'], 'checkpoint a.pth does not exist'),
        (['xt=none.pth', '--out', 'a.png'], 'checkpoint none.pth does not exist'),
        (['xt', 't', '--checkpoint', 'a.pth', '--out', 'a.png'], 'exactly one arch'),
        (['xt', '--images', 'none', '--out', 'a.png'], 'none does not exist; give a'),
        (['xt', '--images', '.', '--out', 'a.png'], '. has no images'),
        (['xt', '--size', '16', '--out', 'a.png'], '--size 16 must be at least 32'),
        (['xt', '--dpi', '0', '--out', 'a.png'], '--dpi 0 must be within'),
        (['xt', '--num', '0', '--out', 'a.png'], '--num 0 at least 1'),
        (['xt', '--device', 'cuda:99', '--out', 'a.png'], 'device cuda:99 cannot be used'),
        (['xt', '--json', 'a.txt', '--out', 'a.png'], 'a.txt must end in .json'),
    ],
)
def test_wrong_arguments(draw, tmp_path, arguments, words):
    assert words in draw('erf', *arguments, status=2)
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_run(draw, tmp_path):
    (tmp_path / 'broken.png').write_text('')
    error = draw('erf', 'xt', '--images', '.', '--out', 'a.png', status=2)
    assert 'broken.png cannot be read' in error
    with pytest.raises(Exception, match='is zero everywhere'):
        field_of(4, np.zeros((8, 8)))
    with pytest.raises(Exception, match='is not finite'):
        field_of(4, np.full((8, 8), np.nan))
