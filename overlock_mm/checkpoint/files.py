"""Reading and writing files of weights."""

import argparse
import json
import os
import tarfile
import tempfile
from contextlib import nullcontext
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch

from ..errors import CheckpointError, CheckpointNotFoundError
from . import unpickling
from .downloading import download, not_weights


def read_weights(source: str | Path, map_location: str = 'cpu', trust: bool = False):
    """Read a checkpoint file, without running code that may be in it.

    Beside tensors it may hold plain data, such as mmengine's runner, hooks, schedulers and
    optimizer wrappers save, and released files: numbers, text, containers, numpy arrays,
    configs, histories of logged values, ``argparse.Namespace`` and the like.

    Args:
        source: path or URL of a file of ``torch.save``, or of a ``.safetensors`` file.
        map_location: where tensors go.
        trust: unpickle whatever the file holds, which can run any code.

    Returns:
        The object that was saved; for safetensors a dict of tensors, or a dict with
        ``meta`` and ``state_dict`` if :func:`write_weights` wrote the file.

    Raises:
        CheckpointNotFoundError: if there is no such file. It is a FileNotFoundError, too.
        CheckpointError: if the file cannot be downloaded, is not a checkpoint, or holds
            more than plain data. The message names what it holds; none of it is run.
    """
    source = str(source)
    is_url = urlparse(source).scheme in ('http', 'https')
    path = download(source) if is_url else Path(source).expanduser()
    if not path.exists():
        raise CheckpointNotFoundError(
            f'{path} does not exist; give the path or URL of a checkpoint'
        )
    if path.is_dir():
        raise CheckpointError(f'{path} is a folder; give the path of a checkpoint file')
    problem = not_weights(path)
    if problem:
        raise CheckpointError(f'{path} is {problem}; delete it and get the file again')
    if path.suffix == '.safetensors':
        return _read_safetensors(path, map_location)
    try:
        return _read_pickled(path, map_location, trust)
    except (MemoryError, CheckpointError):
        raise
    except unpickling.Refused as error:
        raise CheckpointError(
            f'{path} holds {error}, which weights do not need and which may run code. '
            'Nothing was run or loaded. If you know where the file comes from and trust '
            'it, use trust=True (--trust on the command line)'
        ) from error
    except Exception as error:  # a damaged file can raise any
        raise CheckpointError(f'{path} {_reason(path, error, trust)}') from error


def plain_data_allowed():
    """A context in which other readers, such as timm's, read files as released.

    It is for ``torch.load(weights_only=True)``, and does nothing before torch 2.5, where
    that cannot be extended.
    """
    if not hasattr(torch.serialization, 'safe_globals'):
        return nullcontext()
    scalar = (getattr(np, '_core', None) or np.core).multiarray.scalar
    dtypes = {type(np.dtype(code)) for code in 'bBhHiIlLqQfd?'}
    names = [(scalar, f'numpy.{core}.multiarray.scalar') for core in ('core', '_core')]
    return torch.serialization.safe_globals([argparse.Namespace, np.dtype, *dtypes, *names])


def _read_pickled(path, map_location, trust):
    with path.open('rb') as file:
        is_zip = file.read(4) == b'PK\x03\x04'
    # torch.load would run the code of a TorchScript archive
    if (
        is_zip
        and 'constants.pkl' in torch._C.PyTorchFileReader(str(path)).get_all_records()
    ):
        raise CheckpointError(
            f'{path} is a TorchScript archive; give the checkpoint that it was made from'
        )
    if trust:
        return torch.load(path, map_location, weights_only=False)
    if tarfile.is_tarfile(path):  # which torch.load would unpack into a folder
        raise unpickling.Refused('a tar archive')
    # weights_only=True of torch has another list in each version; this one has ours
    return torch.load(path, map_location, pickle_module=unpickling, weights_only=False)


def _reason(path, error, trust) -> str:
    """Explain why a file cannot be read, and what to do."""
    reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
    if 'pickle_module is specified' in reason or 'weights_only' in reason:
        return (
            'cannot be read while TORCH_FORCE_WEIGHTS_ONLY_LOAD is set; unset it: without '
            'trust=True, files are read here without running code'
        )
    if trust and isinstance(error, ImportError | AttributeError):
        return f'needs something that is not installed ({error}); install it'
    if 'deserialize object on' in reason:
        return f'cannot be put on the device that map_location names ({reason})'
    return (
        f'({path.stat().st_size} bytes) is not a checkpoint, or is truncated ({reason}); '
        'get the file again'
    )


def _read_safetensors(path, map_location):
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework='pt', device=str(map_location or 'cpu')) as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            meta = (file.metadata() or {}).get('meta')
    except SafetensorError as error:
        raise CheckpointError(
            f'{path} is damaged, or not a safetensors file ({error}); get the file again'
        ) from error
    try:
        meta = json.loads(meta or 'null')
    except ValueError:  # another program has written it
        meta = None
    return dict(meta=meta, state_dict=tensors) if isinstance(meta, dict) else tensors


def write_weights(content: dict, path: str | Path) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        content: a dict with ``meta`` and ``state_dict`` (and more, in a ``.pth`` file).
        path: the file to write; one that ends in ``.safetensors`` gets the tensors, and
            ``meta`` as JSON in its metadata.
    """
    path = Path(path)
    handle, partial = tempfile.mkstemp('.partial', path.name, path.parent)
    os.close(handle)
    partial = Path(partial)
    mask = os.umask(0)
    os.umask(mask)
    partial.chmod(0o666 & ~mask)  # only the owner can read the files of mkstemp
    try:
        if path.suffix == '.safetensors':
            from safetensors.torch import save

            # copies: the format has no shared storage
            tensors = {k: v.detach().clone() for k, v in content['state_dict'].items()}
            tensors = {k: v.contiguous() for k, v in tensors.items()}
            meta = json.dumps(content.get('meta', {}), default=_plain)
            partial.write_bytes(save(tensors, dict(format='pt', meta=meta)))
        else:
            torch.save(content, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _plain(value):
    """Replace a value that JSON cannot represent."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)
