"""Conversion keeps weights, moves what describes them, and comes back."""

import numpy as np
import pytest
import torch
from helpers import TINY, changed, classifier_state, tiny

from overlock_mm import OverLoCK, load_checkpoint
from overlock_mm.checkpoint import read_weights, write_weights
from overlock_mm.convert import convert_checkpoint
from overlock_mm.errors import CheckpointError
from overlock_mm.version import __version__

CLASSES, PALETTE = ('wall', 'sky'), [[0, 0, 0], [9, 9, 9]]


def released(context_skip=False, head='decode_head.conv_seg', **meta):
    """A whole model as the former toolboxes save it."""
    state = changed(tiny(context_skip=context_skip)).state_dict()
    state = {f'backbone.{k}': v for k, v in state.items()}
    state[f'{head}.weight'] = torch.rand(2, 4, 1, 1)
    meta = dict(dict(epoch=3, iter=90, CLASSES=CLASSES, PALETTE=PALETTE), **meta)
    return dict(meta=meta, state_dict=state, optimizer=dict(state={}, param_groups=[]))


def same_weights(a, b):
    assert set(a['state_dict']) == set(b['state_dict'])
    for name, value in a['state_dict'].items():
        assert torch.equal(value, b['state_dict'][name]), name


@pytest.mark.parametrize('context_skip', [False, True])
def test_there(context_skip):
    source = released(context_skip)
    ours = convert_checkpoint(source, source='folder/upernet.pth')
    same_weights(ours, source)
    assert ours['meta'] == dict(
        epoch=3,
        iter=90,
        dataset_meta=dict(classes=CLASSES, palette=PALETTE),
        overlock_mm=dict(version=__version__, source='upernet.pth', config=None),
    )
    assert 'optimizer' not in ours and 'CLASSES' in source['meta']


@pytest.mark.parametrize(
    'extension, keep', [('pth', False), ('pth', True), ('safetensors', False)]
)
def test_there_and_back(tmp_path, extension, keep):
    source, path = released(), tmp_path / f'ours.{extension}'
    write_weights(convert_checkpoint(source, keep_optimizer=keep), path)
    back = convert_checkpoint(read_weights(path), 'released', keep_optimizer=keep)
    same_weights(back, source)
    assert set(back) == ({*source} if keep else {'meta', 'state_dict'})
    if keep:
        assert back['optimizer'] == source['optimizer']
    back['meta']['CLASSES'] = tuple(back['meta']['CLASSES'])  # JSON has lists alone
    assert back['meta'] == source['meta']
    assert list(tmp_path.iterdir()) == [path]


def test_back_and_there():
    """Of a model trained here, the former toolboxes know only some of the facts."""
    dataset = dict(classes=CLASSES, palette=PALETTE, reduce_zero_label=True)
    ours = released()
    ours['meta'] = dict(epoch=3, dataset_meta=dataset)
    there = convert_checkpoint(ours, 'released')
    assert there['meta']['CLASSES'] == CLASSES and there['meta']['PALETTE'] == PALETTE
    back = convert_checkpoint(there)
    same_weights(back, ours)
    assert back['meta'].pop('overlock_mm') and back['meta'] == ours['meta']


def test_what_is_not_known_is_not_written():
    source = released()
    for key in ('CLASSES', 'PALETTE'):
        del source['meta'][key]
    assert 'dataset_meta' not in convert_checkpoint(source)['meta']
    bare = convert_checkpoint(source['state_dict'])
    assert set(bare['meta']) == {'overlock_mm'}
    assert (
        convert_checkpoint(source, config='my.py')['meta']['overlock_mm']['config']
        == 'my.py'
    )


@pytest.mark.parametrize('task', ['segmentation', 'detection'])
@pytest.mark.parametrize('deploy', [False, True])
def test_imagenet_file_in_dense_layout(tmp_path, task, deploy):
    source = changed(tiny(deploy=deploy))
    state = classifier_state(source)
    dense = convert_checkpoint(dict(model=state), task)
    model = OverLoCK(TINY, context_skip=task == 'detection', deploy=deploy)
    model.load_state_dict(dense['state_dict'], strict=True)
    for name, value in model.state_dict().items():
        if name.startswith(('extra_norm.', 'h_proj.')):
            assert name not in state
            if 'norm' in name:
                assert (value == (1 if name.endswith('weight') else 0)).all()
        else:
            assert torch.equal(value, state[name]), name
    again = convert_checkpoint(dict(model=state), task)
    same_weights(again, dense)  # what is fresh is the same each time


def test_other_channels_and_meta():
    model = tiny(in_channels=4)
    state = {f'backbone.{k}': v for k, v in model.state_dict().items()}
    for meta in (None, [1], dict(dataset_meta=None, epoch=None)):
        converted = convert_checkpoint(dict(state_dict=state, meta=meta))
        same_weights(converted, dict(state_dict=state))
        convert_checkpoint(converted, 'released')


def test_shared_storage_and_arrays_in_safetensors(tmp_path):
    whole = torch.arange(6.0).reshape(2, 3)
    content = dict(meta=dict(palette=np.eye(2, dtype=int)))
    content['state_dict'] = dict(a=whole, b=whole, c=whole.T, d=whole[:, 1])
    write_weights(content, tmp_path / 'w.safetensors')
    read = read_weights(tmp_path / 'w.safetensors')
    assert read['meta'] == dict(palette=[[1, 0], [0, 1]])
    same_weights(read, content)


def test_half(tmp_path):
    source = released()
    half = convert_checkpoint(source, half=True)['state_dict']
    for name, value in source['state_dict'].items():
        if value.is_floating_point():
            value = value.half()
        assert half[name].dtype == value.dtype and torch.equal(half[name], value)
    source['state_dict']['decode_head.conv_seg.weight'][0] = 1e6
    with pytest.raises(CheckpointError, match='has values that are too large'):
        convert_checkpoint(source, half=True)


@pytest.mark.parametrize(
    'make, to, message',
    [
        (lambda: dict(a=torch.ones(1)), 'overlock_mm', 'has no OverLoCK'),
        (
            lambda: dict(a=1),
            'overlock_mm',
            'with the keys a, but no state dict',
        ),
        (lambda: tiny().state_dict(), 'overlock_mm', 'not a whole detector or segmentor'),
        (
            lambda: classifier_state(tiny()),
            'released',
            "converted to .* 'segmentation'",
        ),
        (lambda: released(), 'detection', 'only an ImageNet file'),
        (lambda: tiny().state_dict(), 'segmentation', 'only an ImageNet file'),
        (
            lambda: {
                k: v for k, v in released()['state_dict'].items() if 'blocks4' not in k
            },
            'overlock_mm',
            'has only a part of',
        ),
        (
            lambda: {
                k: v for k, v in released()['state_dict'].items() if 'mlp.0.bias' not in k
            },
            'overlock_mm',
            'missing from the file: sub_blocks3.0.mlp.0.bias',
        ),
    ],
)
def test_what_cannot_be_converted(make, to, message):
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(make(), to)
    with pytest.raises(ValueError, match="to='timm' must be one of"):
        convert_checkpoint(make(), 'timm')


def test_a_converted_file_loads(tmp_path):
    path = tmp_path / 'ours.safetensors'
    source = released()
    write_weights(convert_checkpoint(source), path)
    model = tiny()
    assert load_checkpoint(model, path).complete
    assert torch.equal(
        model.patch_embed1[0].weight, source['state_dict']['backbone.patch_embed1.0.weight']
    )


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / 'w.pth'
    write_weights(dict(state_dict={}), path)
    before = path.read_bytes()
    with pytest.raises(AttributeError, match='local object'):
        write_weights(dict(state_dict={}, bad=lambda: 0), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
