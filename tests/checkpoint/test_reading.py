"""Files are read without running code that may be in them, and written completely."""

import argparse
import codecs
import collections
import functools
import os
import pickle
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import changed, tiny
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler import OneCycleLR
from torch import nn

from overlock_mm import load_checkpoint
from overlock_mm.checkpoint import read_weights
from overlock_mm.errors import CheckpointError


def test_what_checkpoints_hold_beside_weights(tmp_path, monkeypatch):
    """Read without trust, and whole."""
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    content = dict(
        state_dict=tiny().state_dict(),
        args=argparse.Namespace(lr=1e-3, path='somewhere'),
        best=np.float64(0.5),
        message_hub=dict(log_scalars=dict(loss=history), array=np.arange(3)),
    )
    torch.save(content, tmp_path / 'w.pth')
    # as in a process that has made no buffer yet
    monkeypatch.setattr(HistoryBuffer, '_statistics_methods', {})
    read = read_weights(tmp_path / 'w.pth')
    assert read['args'] == content['args'] and read['best'] == 0.5
    buffer = read['message_hub']['log_scalars']['loss']
    assert buffer.mean() == history.mean() and buffer.statistics('mean') == 1.5
    assert (read['message_hub']['array'] == np.arange(3)).all()
    assert load_checkpoint(tiny(), tmp_path / 'w.pth').complete


class Call:
    """Pickled as a call."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args, state) if state is not None else (function, args)

    def __reduce__(self):
        return self.reduced


class Filled:
    """Pickled as a call whose result is then filled."""

    def __init__(self, function, args, items=None, pairs=None):
        self.reduced = function, args, None, items and iter(items), pairs and iter(pairs)

    def __reduce__(self):
        return self.reduced


def touched(mark):
    return Call(Path.touch, mark)


# How files have been known to run code, each with the name that the error has.
HOSTILE = {
    'a method': (lambda mark: touched(mark), 'pathlib'),
    'os.system': (lambda mark: Call(os.system, f'touch {mark}'), 'system'),
    'eval': (lambda mark: Call(eval, f'open({str(mark)!r}, "w")'), 'eval'),
    'exec': (lambda mark: Call(exec, f'open({str(mark)!r}, "w")'), 'exec'),
    'inside of data': (lambda mark: dict(a=[(1, {2: touched(mark)})]), 'pathlib'),
    'as a key': (lambda mark: {Call(os.system, f'touch {mark}'): 1}, 'system'),
    'imported': (lambda mark: Call(__import__, 'antigravity'), '__import__'),
    'a partial': (lambda mark: Call(functools.partial, os.system, 'x'), 'partial'),
    'globals of a method': (
        lambda mark: Call(getattr, HistoryBuffer.__init__, '__globals__'),
        'HistoryBuffer.__init__',
    ),
    'dunder of a scheduler': (
        lambda mark: Call(getattr, OneCycleLR, '__init__'),
        'OneCycleLR.__init__',
    ),
    'a call of a scheduler': (
        lambda mark: Call(OneCycleLR._annealing_cos, 0, 1, 0.5),
        'a call of .*_annealing_cos',
    ),
    'state of a class': (
        lambda mark: Call(HistoryBuffer, [], [], state=(None, {'mean': len})),
        'HistoryBuffer',
    ),
    'an encoding': (lambda mark: Call(codecs.encode, 'a', 'rot13'), 'rot13'),
    'a factory': (
        lambda mark: Call(collections.defaultdict, torch.Size),
        'defaultdict of torch.Size',
    ),
    'a filled namespace': (
        lambda mark: Filled(types.SimpleNamespace, (), items=[1]),
        'an addition to types.SimpleNamespace',
    ),
    'a set item': (
        lambda mark: Filled(torch.Size, ([1],), pairs=[('a', 1)]),
        'an addition to torch.Size',
    ),
    'pointers as an array': (
        lambda mark: Call(np.dtype, 'O8', state=(3, '|', None, None, None, -1, -1, 0)),
        'a numpy.dtype with the state',
    ),
    'a structured array': (
        lambda mark: np.zeros(1, [('a', 'O')]),
        'numpy.dtype',
    ),
    'a subclass of arrays': (
        lambda mark: np.array([1]).view(np.matrix),
        'matrix',
    ),
}


@pytest.mark.parametrize('protocol', [2, 4])
@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('name', HOSTILE)
def test_code_in_a_file_does_not_run(tmp_path, name, zipped, protocol):
    path, mark = tmp_path / 'w.pth', tmp_path / 'written'
    make, words = HOSTILE[name]
    torch.save(
        dict(state_dict={}, extra=make(mark)),
        path,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=zipped,
    )
    statistics = dict(HistoryBuffer._statistics_methods), vars(HistoryBuffer).copy()
    with pytest.raises(CheckpointError, match=f'holds .*{words}.*trust=True'):
        read_weights(path)
    assert not mark.exists() and 'antigravity' not in sys.modules
    assert statistics == (HistoryBuffer._statistics_methods, dict(vars(HistoryBuffer)))
    assert np.dtype('f8').isnative and np.dtype('O').hasobject


@pytest.mark.parametrize('zipped', [True, False])
def test_code_runs_with_trust(tmp_path, zipped):
    path, mark = tmp_path / 'w.pth', tmp_path / 'written'
    state = dict(state_dict=tiny().state_dict(), extra=touched(mark))
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match='holds pathlib'):
        load_checkpoint(tiny(), path)
    assert not mark.exists()
    load_checkpoint(tiny(), path, trust=True)
    assert mark.exists()


# Instructions that torch.save does not write, as bytes between PROTO and STOP.
@pytest.mark.parametrize(
    'code',
    [
        b'(S"touch written"\nios\nsystem\n',  # INST
        b'(cos\nsystem\nS"touch written"\no',  # OBJ
        b'\x82\x01',  # EXT1
        b'cos\nsystem\n(S"touch written"\ntR',
        b'ccollections\nOrderedDict\n)}\x92',  # NEWOBJ_EX
        b'ccollections\nOrderedDict\n}b',  # BUILD of a class
        b'ccollections\nOrderedDict\nK\x01a',  # APPEND to a class
        b'cmmengine.optim.scheduler.param_scheduler\nmath.cos\n',  # not a scheduler's
        b'cmmengine.optim.scheduler.absent\nrun\n',
        b'cargparse\nArgumentParser\n)\x81',  # NEWOBJ of something else
        b'cargparse\nNamespace\n)\x81(N}tb',  # a state for slots
        b'c__builtin__\ngetattr\n(K\x01S"real"\ntR',  # getattr of an instance
    ],
)
def test_raw_instructions(tmp_path, monkeypatch, code):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile('w.pth', 'w') as archive:
        archive.writestr('w/data.pkl', b'\x80\x02' + code + b'.')
        archive.writestr('w/version', b'3\n')
    with pytest.raises(CheckpointError, match='holds '):
        read_weights('w.pth')
    assert not Path('written').exists()


def test_numpy_keeps_its_own_dtypes(tmp_path):
    """A state is for a copy: numpy's own dtype of this name stays as it is."""
    swapped = Call(np.dtype, 'f8', state=(3, '>', None, None, None, -1, -1, 0))
    torch.save(dict(dtype=swapped), tmp_path / 'w.pth')
    assert not read_weights(tmp_path / 'w.pth')['dtype'].isnative
    assert np.dtype('f8').isnative and np.arange(2.0).dtype.isnative


def test_a_tar_archive(tmp_path):
    """torch.load would unpack it."""
    path = tmp_path / 'w.pth'
    (tmp_path / 'storages').write_bytes(pickle.dumps(0))
    with tarfile.open(path, 'w') as archive:
        archive.add(tmp_path / 'storages', 'storages')
    with pytest.raises(CheckpointError, match='holds a tar archive'):
        read_weights(path)


def test_where_torch_forbids_other_readers(tmp_path, monkeypatch):
    torch.save(tiny().state_dict(), tmp_path / 'w.pth')
    monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '1')
    with pytest.raises(CheckpointError, match='TORCH_FORCE_WEIGHTS_ONLY_LOAD.*unset it'):
        read_weights(tmp_path / 'w.pth')


def test_a_path_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    torch.save(tiny().state_dict(), tmp_path / 'w.pth')
    assert load_checkpoint(tiny(), '~/w.pth').complete


@pytest.mark.parametrize(
    'content, message',
    [
        (b'', 'is empty'),
        (b'\n<!DOCTYPE html><html>Not Found</html>', 'is a web page'),
        (b'PK\x03\x04 truncated', 'not a checkpoint, or is truncated'),
        (b'\x89PNG something else entirely', 'not a checkpoint, or is truncated'),
    ],
)
def test_files_of_something_else(tmp_path, content, message):
    (tmp_path / 'w.pth').write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        read_weights(tmp_path / 'w.pth')
    assert '\n' not in str(error.value)


def test_a_truncated_checkpoint(tmp_path):
    path = tmp_path / 'w.pth'
    torch.save(tiny().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match='truncated'):
        read_weights(path)
    with pytest.raises(CheckpointError, match='is a folder'):
        read_weights(tmp_path)


def test_damage_anywhere(tmp_path):
    """One kind of error and one line, wherever a file ends or is wrong."""
    path, rng = tmp_path / 'w.pth', np.random.default_rng(0)
    for legacy in (False, True):
        torch.save(tiny().state_dict(), path, _use_new_zipfile_serialization=not legacy)
        whole = path.read_bytes()
        cuts = [*range(1, 60), *rng.integers(60, len(whole), 40)]
        for cut in cuts:
            path.write_bytes(whole[:cut])
            with pytest.raises(CheckpointError) as error:
                read_weights(path)
            assert '\n' not in str(error.value) and 'w.pth' in str(error.value)
    for text in (b'bad request', b'error code: 1015', b'Rate limit exceeded', b'\x80'):
        path.write_bytes(text)
        with pytest.raises(CheckpointError, match='not a checkpoint, or is truncated'):
            read_weights(path)


def test_files_that_are_good_for_something_else(tmp_path):
    path = tmp_path / 'w.pth'
    torch.jit.script(nn.Linear(1, 1)).save(path)
    for trust in (False, True):
        with pytest.raises(CheckpointError, match='is a TorchScript archive'):
            read_weights(path, trust=trust)
    torch.save(tiny().state_dict(), tmp_path / 'w.safetensors')
    with pytest.raises(CheckpointError, match='damaged, or not a safetensors file'):
        read_weights(tmp_path / 'w.safetensors')


def test_safetensors(tmp_path):
    from safetensors.torch import save_file

    source, path = changed(tiny()), tmp_path / 'w.safetensors'
    save_file({k: v.contiguous() for k, v in source.state_dict().items()}, path)
    model = tiny()
    assert load_checkpoint(model, path).complete
    torch.testing.assert_close(model.state_dict(), source.state_dict(), rtol=0, atol=0)
    path.write_bytes(b'damaged')
    with pytest.raises(CheckpointError, match='is damaged'):
        load_checkpoint(model, path)
