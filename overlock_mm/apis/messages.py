"""Messages of a command that may run as several processes."""

import os

DEBUG = 'OVERLOCK_MM_DEBUG'


def rank() -> int:
    """The number of this process, whatever started it; 0 if it is the only one."""
    names = ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK')
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


def debugging() -> bool:
    """Whether tracebacks are wanted: ``--debug``, or the environment variable."""
    return os.environ.get(DEBUG, '0') not in ('', '0')


def say(message: str) -> None:
    """Print a line, in the first process only."""
    if rank() == 0:
        print(message, flush=True)
