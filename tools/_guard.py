"""What all tools need before they import anything: settings, and a message without it.

Python puts the folder of a script on its path, so every tool can import this module.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

os.environ['OVERLOCK_MM_TOOL'] = '1'  # see overlock_mm/__init__.py


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
