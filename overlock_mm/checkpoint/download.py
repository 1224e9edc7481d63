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

# Where the released files are.
RELEASE = 'https://github.com/LMMMEng/OverLoCK/releases/download/v1/'
# Seconds without a byte after which a download has stalled.
_TIMEOUT = 30
# The begin of a file's SHA-256 in its name, as torch.hub has it.
_CHECKSUM = re.compile(r'-([0-9a-f]{8,64})\.')


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
    """Where a download is kept: by its name, and other than released files by its URL."""
    name = Path(urlparse(url).path).name
    if not url.startswith(RELEASE):  # files of one name may be different ones
        stem, suffix = os.path.splitext(name)
        name = f'{stem}.{hashlib.sha256(url.encode()).hexdigest()[:12]}{suffix}'
    return Path(torch.hub.get_dir()) / 'checkpoints' / name


def cannot_download(url: str, error: Exception) -> CheckpointError:
    """The error to raise when a download has ended in another."""
    reason = getattr(error, 'reason', None) or str(error) or type(error).__name__
    return CheckpointError(
        f'{url} cannot be downloaded ({reason}); fetch it elsewhere and place it at '
        f'{cached(url)}, or give its path in place of the URL'
    )


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
        known = _CHECKSUM.search(urlparse(url).path)
        if known and not digest.hexdigest().startswith(known[1]):
            raise URLError(
                f'its SHA-256 is {digest.hexdigest()[:16]}... and not {known[1]}...'
            )
        problem = no_weights(Path(partial))
        if problem:
            raise URLError(f'it is {problem}')
        os.replace(partial, target)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def no_weights(path) -> str | None:
    """What a file is that begins as no file of weights does."""
    with path.open('rb') as file:
        begin = file.read(512).lstrip()
    if not begin:
        return 'empty'
    if re.match(rb'<[a-zA-Z!?]', begin):
        return (
            f'a web page (it begins with {begin[:15]!r}), as is saved in place of a file '
            'that was not found'
        )
    return None
