"""Reading a file of weights: from a path or a URL, without running what is in it."""

import argparse
import codecs
import hashlib
import json
import os
import pickle
import re
import tempfile
import urllib.request
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlparse

import numpy as np
import torch
from filelock import FileLock
from mmengine.logging import HistoryBuffer
from tqdm import tqdm

# From torch 2.6 on, torch.load itself reads what is on a list, and nothing else.
_HAS_LIST = tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 6)
# Seconds without a byte after which a download has stalled.
_TIMEOUT = 30
# The begin of a file's SHA-256 in its name, as torch.hub has it.
_CHECKSUM = re.compile(r'-([0-9a-f]{8,64})\.')
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


class CheckpointError(RuntimeError):
    """A checkpoint cannot be had, read or fitted; the message says why and what to do."""


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
        FileNotFoundError: if there is no such file.
        CheckpointError: if it cannot be downloaded, is no file of weights, or holds
            types that are not read without trust; these are named, never run.
    """
    source = str(source)
    path = (
        download(source) if urlparse(source).scheme in ('http', 'https') else Path(source)
    )
    if not path.exists():
        raise FileNotFoundError(
            f'{path} does not exist; give the path or URL of a checkpoint'
        )
    if path.is_dir():
        raise CheckpointError(f'{path} is a folder; give the path of a checkpoint file')
    with path.open('rb') as file:
        begin = file.read(512)
    if not begin:
        raise CheckpointError(f'{path} is empty; download or save it again')
    if begin.lstrip()[:1] == b'<':
        raise CheckpointError(
            f'{path} is a web page (it begins with {begin.lstrip()[:15]!r}), as is saved '
            'in place of a file that was not found; download the file itself'
        )
    if path.suffix == '.safetensors':
        return _read_safetensors(path, map_location)
    try:
        if not trust and not _HAS_LIST:
            return torch.load(path, map_location, _PlainPickle, weights_only=False)
        with nullcontext() if trust else plain_data_allowed():
            return torch.load(path, map_location, weights_only=not trust)
    except (pickle.UnpicklingError, _Refused) as error:
        found = _UNTRUSTED.search(str(error))
        if not found and not isinstance(error, _Refused):
            raise CheckpointError(_unreadable(path, error)) from error
        name = found[1] if found else error
        raise CheckpointError(
            f'{path} holds {name}, which files of weights have no need for and which '
            'may run code; nothing of it was run or loaded. If you know where the file is '
            'from and trust it, say trust=True'
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, UnicodeDecodeError) as error:
        raise CheckpointError(_unreadable(path, error)) from error


def plain_data_allowed():
    """A context in which ``torch.load`` reads the plain data that checkpoints hold.

    Before torch 2.6 it changes nothing.
    """
    if not _HAS_LIST:
        return nullcontext()
    return torch.serialization.safe_globals(_allowed())


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
        raise CheckpointError(f'{path} is damaged: {error}; get it again') from error
    return dict(meta=json.loads(meta), state_dict=tensors) if meta else tensors


def write_weights(content: dict, path: str | Path) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        content: a dict with ``meta`` and ``state_dict`` (and more, in a ``.pth`` file).
        path: what to write; ending in ``.safetensors``, it holds the tensors, and
            ``meta`` as JSON among its metadata.
    """
    path = Path(path)
    partial = path.with_name(f'{path.stem}.partial{path.suffix}')
    try:
        if path.suffix == '.safetensors':
            from safetensors.torch import save

            # a copy each: the format knows no shared storage
            tensors = {k: v.detach().clone() for k, v in content['state_dict'].items()}
            tensors = {k: v.contiguous() for k, v in tensors.items()}
            meta = json.dumps(content.get('meta', {}), default=str)
            partial.write_bytes(save(tensors, dict(format='pt', meta=meta)))
        else:
            torch.save(content, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _unreadable(path, error):
    reason = str(error).rpartition('WeightsUnpickler error: ')[2].strip()
    lines = reason.splitlines() or [type(error).__name__]
    return (
        f'{path} ({path.stat().st_size} bytes) is no checkpoint, or a truncated one '
        f'({lines[0][:120]}); get it again'
    )


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
        raise _Refused(f'builtins.getattr({owner.__name__}, {name!r})')
    return getattr(HistoryBuffer, name)


def download(url: str) -> Path:
    """Download a file to torch hub's cache, unless it is there, and return its path.

    It gets its name only when it is complete, so an interrupted download leaves
    nothing that a later run could take for the file. Of several processes one
    downloads. Where the name of the file ends in the begin of its SHA-256, as in
    ``resnet50-0676ba61.pth``, that is checked.

    Raises:
        CheckpointError: if it cannot be downloaded whole, with the path at which a
            file that was fetched elsewhere is found.
    """
    target = Path(torch.hub.get_dir()) / 'checkpoints' / Path(urlparse(url).path).name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f'.{target.name}.lock')):
        if not target.exists():
            _download(url, target)
    return target


def _download(url, target):
    handle, partial = tempfile.mkstemp(dir=target.parent, suffix='.partial')
    digest, done = hashlib.sha256(), 0
    try:
        with (
            os.fdopen(handle, 'wb') as file,
            urllib.request.urlopen(url, timeout=_TIMEOUT) as response,
        ):
            size = int(response.headers.get('Content-Length') or 0)
            bar = tqdm(total=size or None, unit='B', unit_scale=True, desc=target.name)
            with bar:
                while block := response.read(1 << 20):
                    file.write(block)
                    digest.update(block)
                    done += len(block)
                    bar.update(len(block))
        if size and done != size:
            raise URLError(f'it ended after {done} of {size} bytes')
        known = _CHECKSUM.search(target.name)
        if known and not digest.hexdigest().startswith(known[1]):
            raise URLError(
                f'its SHA-256 is {digest.hexdigest()[:16]}... and not {known[1]}...'
            )
        os.replace(partial, target)
    except (OSError, URLError) as error:
        reason = getattr(error, 'reason', None) or error
        raise CheckpointError(
            f'{url} cannot be downloaded ({reason}); fetch it elsewhere and place it at '
            f'{target}, or give its path in place of the URL'
        ) from error
    finally:
        if os.path.exists(partial):
            os.remove(partial)
