"""The kernels that are drawn are those that ContMix uses, by its definition."""

import re

import numpy as np
import pytest
import torch
from helpers import TINY, image, randomised

from overlock_mm import OverLoCK
from overlock_mm.apis.visualization.kernels import affinities_of, kernels_at, window
from overlock_mm.models import contmix as module
from overlock_mm.ops import contmix_reference

HEADS = 4


def net():
    """A small network in which the two kernels of stage 3 have 5 x 5 and 7 x 7 taps."""
    torch.manual_seed(0)
    return randomised(OverLoCK(TINY | dict(kernel_sizes=(7, 7, 7, 5)))).eval()


@pytest.fixture
def given(monkeypatch):
    """What blocks give to the operation, in the order in which they run."""
    calls, operation = [], module.contmix

    def recorded(*arguments):
        calls.append(arguments)
        return operation(*arguments)

    monkeypatch.setattr(module, 'contmix', recorded)
    return calls


def by_definition(query, key, value, proj_weight, proj_bias, rpbs, kernel_sizes):
    """Weights ``(2, heads, H, W, H, W)`` of every position by mixing one-hot values."""
    height, width = query.shape[-2:]
    count = height * width
    one_hot = torch.eye(count).view(count, height, width).repeat(2 * HEADS, 1, 1)[None]
    rest = proj_weight, proj_bias, rpbs, kernel_sizes
    doubles = [t.double() for t in (query, key, one_hot, *rest[:2])]
    out = contmix_reference.contmix(*doubles, [r.double() for r in rpbs], kernel_sizes)
    weights = out.view(2, HEADS, height, width, height, width)
    return weights.permute(0, 1, 4, 5, 2, 3).detach().numpy()


# the second one is enlarged: its map, of 4 x 6, is smaller than the large kernel
@pytest.mark.parametrize('size, grid', [((112, 130), (7, 9)), ((64, 96), (7, 10))])
@pytest.mark.parametrize('context', [True, False])
def test_weights_are_those_of_the_operation(size, grid, context, given):
    backbone, inputs = net(), image(1, 3, *size)
    if not context:
        with torch.no_grad():
            backbone.high_level_proj.weight.zero_()
            backbone.high_level_proj.bias.zero_()
    with torch.no_grad():
        backbone(inputs)
    expected = by_definition(*given[1])  # of block 3.1
    mixer = backbone.sub_blocks3[1]
    if not context:
        backbone = net()
        mixer = backbone.sub_blocks3[1]
    query, key = affinities_of(backbone, mixer, inputs, context)
    assert tuple(query.shape[-2:]) == grid
    for cell in [(0, 0), (grid[0] - 1, 2), (3, grid[1] - 1), (3, 3)]:
        found = kernels_at(mixer, query, key, cell)
        for i, k in enumerate(mixer.kernel_sizes):
            weights = found.weights[i]
            assert weights.shape == (HEADS, *grid)
            assert np.allclose(weights, expected[i, :, *cell], atol=1e-5)
            assert np.allclose(weights.sum((1, 2)), 1, atol=1e-5)
            # every tap has a weight, and they are inside of the map
            row, column = window(cell, grid, k)
            assert 0 <= row <= grid[0] - k and 0 <= column <= grid[1] - k
            used = weights > 0
            assert used[:, row : row + k, column : column + k].all()
            assert used.sum() == HEADS * k * k
        q, keys = (t.double() for t in (given[1][0][0, ..., *cell], given[1][1][0]))
        affinity = (q[:, :, None] * keys).sum(1).view(HEADS, 7, 7)
        assert np.allclose(found.affinity, affinity.detach(), atol=1e-5)


def test_windows_move_inward():
    assert window((0, 6), (7, 7), 5) == (0, 2)
    assert window((3, 3), (7, 7), 5) == (1, 1)
    assert window((1, 5), (8, 8), 5) == (0, 3)


def test_the_context_changes_the_kernels():
    backbone, inputs = net(), image(1, 3, 96, 96)
    before = [m.clone() for m in backbone(inputs)]
    for mixer in (backbone.sub_blocks3[0], backbone.sub_blocks4[1]):
        with_it, without = (
            kernels_at(mixer, *affinities_of(backbone, mixer, inputs, c), (1, 2))
            for c in (True, False)
        )
        for a, b in zip(with_it.weights, without.weights, strict=True):
            assert np.abs(a - b).sum() > 1e-3
    after = backbone(inputs)  # nothing is left behind
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_command(draw, tmp_path, configs, weights, photo):
    files = configs / 'segmentor.py', weights('segmentor'), photo
    options = '--points', '10,12', '95,95', '--block', '4.1', '--heads', '0,3'
    printed = draw('kernels', *files, *options, '--out', 'kernels.svg')
    lines = re.findall(r'^(\d+,\d+) +(\d) +(0\.\d+) +(0\.\d+)$', printed, re.MULTILINE)
    expected = [(point, head) for point in ('10,12', '95,95') for head in '03']
    assert [line[:2] for line in lines] == expected
    text = (tmp_path / 'kernels.svg').read_text()
    for words in ('block 4.1: 5 x 5 and 5 x 5', 'point 10, 12', 'point 95, 95', 'head 3'):
        assert words in text
    assert 'head 1' not in text
    printed = draw('kernels', *files, '--heads', 'all', '--out', 'kernels.png')
    assert len(re.findall('^48,48 ', printed, re.MULTILINE)) == HEADS  # the centre


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['--block', '3.7'], '--block 3.7 is not one of the Focus-Net'),
        (['--heads', '0,4'], '--heads 0,4: block 3.0 has the heads 0 to 3'),
        (['--points', '96,0'], '--points 96,0 is outside'),
        (['--points', '10'], '10 is not X,Y, as in 120,80'),
        (['--heads', 'one'], 'one is not all, or as in 0,1'),
        (['--out', 'kernels.gif'], 'kernels.gif must end in .png'),
    ],
)
def test_wrong_arguments(draw, configs, weights, photo, arguments, words):
    files = configs / 'segmentor.py', weights('segmentor'), photo
    assert words in draw('kernels', *files, '--out', 'a.png', *arguments, status=2)


def test_wrong_files(draw, configs, weights, other_backbone, photo):
    config, checkpoint = configs / 'segmentor.py', weights('segmentor')
    error = draw('kernels', config, checkpoint, 'none.png', '--out', 'a.png', status=2)
    assert 'none.png does not exist' in error
    error = draw('kernels', config, 'none.pth', photo, '--out', 'a.png', status=2)
    assert 'checkpoint none.pth does not exist' in error
    error = draw('kernels', *other_backbone, photo, '--out', 'a.png', status=2)
    assert 'is a TimmBackbone, and only OverLoCK' in error
