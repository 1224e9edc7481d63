"""What all tools here say where a package is missing.

Python puts a script's own folder on its path, so every tool can import this file.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def installed(extras: str = 'onedl') -> Iterator[None]:
    """Turn a missing package into one line on stderr and exit status 2.

    Args:
        extras: extras of overlock_mm that bring what the tool imports.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or str(error)).partition('.')[0]
        sys.stderr.write(
            f'error: {name} is not installed; in the folder of '
            f"overlock_mm run: pip install -e '.[{extras}]'\n"
        )
        sys.exit(2)
