"""Files that a command reads and writes."""

import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError


def check_file(path: str, what: str) -> str:
    """Check that a file is there, and return its path with ``~`` expanded.

    Args:
        path: path of a file, or a URL, which is returned as it is.
        what: what it is, for the message.

    Raises:
        UserError: if there is no such file.
    """
    path = str(path)
    if '://' in path:
        return path
    found = os.path.expanduser(path)
    if not os.path.isfile(found):
        raise UserError(
            f'{what} {path} does not exist; give the path of a file, or a URL that begins '
            'with http:// or https://'
        )
    return found


def check_output(path: str, suffixes: Sequence[str], force: bool) -> Path:
    """Check that a file can be written.

    Args:
        path: path of the file.
        suffixes: how it may end.
        force: whether it may exist already.

    Raises:
        UserError: if it cannot be written, or exists.
    """
    path = Path(path)
    writable = path.parent.is_dir() and os.access(path.parent, os.W_OK)
    if path.suffix not in suffixes or not writable or path.is_dir():
        raise UserError(
            f'{path} must end in {" or ".join(suffixes)} and be in a folder that exists '
            'and can be written to'
        )
    if path.exists() and not force:
        raise UserError(f'{path} exists; give another name, or --force')
    return path
