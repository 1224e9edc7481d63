"""Reading a file of weights: from a path or a URL, without running what is in it."""

import argparse
import codecs
import json
import os
import pickle
import re
import tempfile
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from ..errors import CheckpointError, CheckpointNotFoundError
from .download import download, no_weights

# From torch 2.6 on, torch.load itself reads what is on a list, and nothing else.
_HAS_LIST = tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 6)
# What pickled tensors are made of; storages torch finds by itself.
_TENSOR_PARTS = (
    OrderedDict,
    torch.Size,
    torch.device,
    torch.nn.Parameter,
    torch._utils._rebuild_tensor_v2,
    torch._utils._rebuild_parameter,
    codecs.encode,
)
_UNTRUSTED = re.compile(r'(?:GLOBAL|global|class) (\S+?),? (?:was not|is not|whose)')


class _Refused(Exception):
    """A file asks for something that is not read without trust; the message names it."""


def read_weights(source: str, map_location: str = 'cpu', trust: bool = False):
    """What a checkpoint file holds.

    Args:
        source: path or URL of a file of ``torch.save``, or of a ``.safetensors`` file.
        map_location: where tensors go.
        trust: unpickle whatever the file holds, which can run any code. Without it,
            tensors are read, and the plain data that released and mmengine
            checkpoints have beside them: numpy scalars and arrays,
            ``argparse.Namespace`` and mmengine's history buffers.

    Returns:
        The object that was saved; for safetensors a dict of tensors, or, from a file of
        :func:`write_weights`, one of ``meta`` and ``state_dict``.

    Raises:
        CheckpointNotFoundError: if there is no such file; a FileNotFoundError, too.
        CheckpointError: if it cannot be downloaded, is no file of weights, or holds
            types that are not read without trust; these are named, never run.
    """
    source = str(source)
    path = (
        download(source) if urlparse(source).scheme in ('http', 'https') else Path(source)
    )
    if not path.exists():
        raise CheckpointNotFoundError(
            f'{path} does not exist; give the path or URL of a checkpoint'
        )
    if path.is_dir():
        raise CheckpointError(f'{path} is a folder; give the path of a checkpoint file')
    problem = no_weights(path)
    if problem:
        raise CheckpointError(f'{path} is {problem}; remove it and get it again')
    if path.suffix == '.safetensors':
        return _read_safetensors(path, map_location)
    try:
        if not trust and not _HAS_LIST:
            content = torch.load(path, map_location, _PlainPickle, weights_only=False)
        else:
            with nullcontext() if trust else plain_data_allowed():
                content = torch.load(path, map_location, weights_only=not trust)
        if isinstance(content, torch.jit.ScriptModule):
            raise ValueError('TorchScript')
        return content
    except MemoryError:
        raise
    except Exception as error:  # damaged files end in any of them
        raise CheckpointError(f'{path} {_reason(path, error, trust)}') from error


def _reason(path, error, trust) -> str:
    """What is wrong with a file that cannot be read, and what to do."""
    found = _UNTRUSTED.search(str(error))
    if isinstance(error, _Refused) or found and not trust:
        return (
            f'holds {found[1] if found else error}, which files of weights have no need '
            'for and which may run code; nothing of it was run or loaded. If you know '
            'where the file is from and trust it, say trust=True'
        )
    if trust and isinstance(error, ImportError | AttributeError):
        return f'holds what this Python has not ({error}); install where that is from'
    reason = str(error).rpartition('WeightsUnpickler error: ')[2].strip()
    reason = (reason.splitlines() or [type(error).__name__])[0][:120]
    if 'TorchScript' in reason:
        return 'is a TorchScript archive; give the checkpoint that it was made of'
    if 'deserialize object on' in reason:
        return f'cannot be put where map_location says ({reason})'
    return (
        f'({path.stat().st_size} bytes) is no checkpoint, or a truncated one ({reason}); '
        'get it again'
    )


def plain_data_allowed():
    """A context in which ``torch.load`` reads the plain data that checkpoints hold.

    Before torch 2.6 it changes nothing.
    """
    if not _HAS_LIST:
        return nullcontext()
    return torch.serialization.safe_globals(_allowed())


def _plain(value):
    """What JSON has in place of a value that it does not know."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


class _PlainPickle:
    """In place of the module ``pickle``, for torch before 2.6: reads plain data alone."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            module = module.replace('__builtin__', 'builtins')
            allowed = {f'{o.__module__}.{o.__qualname__}': o for o in _TENSOR_PARTS}
            for item in _allowed():
                item, full = item if isinstance(item, tuple) else (item, None)
                allowed[full or f'{item.__module__}.{item.__qualname__}'] = item
            if module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype):
                return getattr(torch, name)
            if f'{module}.{name}' not in allowed:
                raise _Refused(f'{module}.{name}')
            return allowed[f'{module}.{name}']

    @classmethod
    def load(cls, file, **kwargs):
        return cls.Unpickler(file, **kwargs).load()


def _read_safetensors(path, map_location):
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework='pt', device=str(map_location)) as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            meta = (file.metadata() or {}).get('meta')
    except SafetensorError as error:
        raise CheckpointError(
            f'{path} is damaged, or no safetensors file: {error}; get it again'
        ) from error
    try:
        meta = json.loads(meta or 'null')
    except ValueError:  # of another program
        meta = None
    return dict(meta=meta, state_dict=tensors) if isinstance(meta, dict) else tensors


def write_weights(content: dict, path: str | Path) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        content: a dict with ``meta`` and ``state_dict`` (and more, in a ``.pth`` file).
        path: what to write; ending in ``.safetensors``, it holds the tensors, and
            ``meta`` as JSON among its metadata.
    """
    path = Path(path)
    handle, partial = tempfile.mkstemp('.partial', path.name, path.parent)
    os.close(handle)
    partial = Path(partial)
    mask = os.umask(0)
    os.umask(mask)
    partial.chmod(0o666 & ~mask)  # mkstemp's files are for their owner alone
    try:
        if path.suffix == '.safetensors':
            from safetensors.torch import save

            # a copy each: the format knows no shared storage
            tensors = {k: v.detach().clone() for k, v in content['state_dict'].items()}
            tensors = {k: v.contiguous() for k, v in tensors.items()}
            meta = json.dumps(content.get('meta', {}), default=_plain)
            partial.write_bytes(save(tensors, dict(format='pt', meta=meta)))
        else:
            torch.save(content, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _allowed() -> list:
    """What checkpoints hold beside tensors and is only data."""
    multiarray = getattr(np, '_core', None) or np.core
    functions = multiarray.multiarray._reconstruct, multiarray.multiarray.scalar
    names = [
        (f, f'numpy.{c}.multiarray.{f.__name__}')
        for f in functions
        for c in ('core', '_core')
    ]
    dtypes = {type(np.dtype(c)) for c in np.typecodes['All']}
    return [
        *names,
        np.ndarray,
        np.dtype,
        *dtypes,
        argparse.Namespace,
        HistoryBuffer,
        (_statistic, 'builtins.getattr'),
    ]


def _statistic(owner, name: str):
    """In place of ``getattr``, with which history buffers save their methods."""
    if owner is not HistoryBuffer or name not in ('mean', 'max', 'min', 'current'):
        raise _Refused(f'builtins.getattr({owner!r}, {name!r})')
    return getattr(HistoryBuffer, name)
