"""Downloading a checkpoint into torch hub's cache, whole or not at all."""

import hashlib
import os
import re
import tempfile
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from filelock import FileLock
from tqdm import tqdm

from ..errors import CheckpointError

# Folder of the released files.
RELEASE = 'https://github.com/LMMMEng/OverLoCK/releases/download/v1/'
# Seconds without a byte after which a download has stalled.
_TIMEOUT = 30
# torch.hub's convention: a name may end in the first digits of the file's SHA-256.
_CHECKSUM = re.compile(r'-([0-9a-f]{8,64})\.')


def download(url: str) -> Path:
    """Download a file to the cache of torch.hub, unless it is there.

    The file gets its name only when it is complete, so an interrupted download leaves
    nothing that a later run could use by mistake. Of several processes, one downloads. If
    the name ends in the first digits of the SHA-256, as ``resnet50-0676ba61.pth``, the
    file must have it.

    Returns:
        The path of the file.

    Raises:
        CheckpointError: if the file cannot be downloaded completely. The message has the
            path at which to place a copy.
    """
    target = cached(url)
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f'.{target.name}.lock')):
            if not target.exists():
                _download(url, target)
    except (OSError, HTTPException, ValueError) as error:
        raise cannot_download(url, error) from error
    return target


def cached(url: str) -> Path:
    """The path of a downloaded file in the cache."""
    name = Path(urlparse(url).path).name
    if not url.startswith(RELEASE):  # two URLs may end in the same name
        stem, suffix = os.path.splitext(name)
        name = f'{stem}.{hashlib.sha256(url.encode()).hexdigest()[:12]}{suffix}'
    return Path(torch.hub.get_dir()) / 'checkpoints' / name


def cannot_download(url: str, error: Exception) -> CheckpointError:
    """The error to raise when a download has failed with another one."""
    reason = getattr(error, 'reason', None) or str(error) or type(error).__name__
    return CheckpointError(
        f'{url} cannot be downloaded ({reason}); get it in another way and place it at '
        f'{cached(url)}, or give its path instead of the URL'
    )


def _download(url, target):
    # torch.hub.download_url_to_file neither times out nor notices a truncated file
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
        known = _CHECKSUM.search(urlparse(url).path)
        if known and not digest.hexdigest().startswith(known[1]):
            raise URLError(
                f'its SHA-256 is {digest.hexdigest()[:16]}... and not {known[1]}...'
            )
        problem = not_weights(Path(partial))
        if problem:
            raise URLError(f'it is {problem}')
        os.replace(partial, target)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def not_weights(path: Path) -> str | None:
    """Name what is clearly not a checkpoint, by its first bytes; None otherwise."""
    with path.open('rb') as file:
        start = file.read(512).lstrip()
    if not start:
        return 'empty'
    if re.match(rb'<[a-zA-Z!?]', start):
        return (
            f'a web page (it starts with {start[:15]!r}), as servers send it when a file '
            'is not there'
        )
    return None
