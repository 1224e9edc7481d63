"""What the command lines share: arguments, and errors as plain messages."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .config.load import load_config
from .errors import CheckpointError, UserError


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn errors that the caller can mend into one line on stderr and exit status 2."""
    try:
        yield
    except (UserError, CheckpointError) as error:
        if is_main_process():
            sys.stderr.write(f'error: {error}\n')
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)  # the status of an interrupted command; where it was says nothing


def is_main_process() -> bool:
    """Whether this is the only or the first process, whatever started it."""
    ranks = ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK')
    return next((os.environ[r] for r in ranks if r in os.environ), '0') == '0'


def add_config_options(parser) -> None:
    """Add ``--cfg-options``."""
    from mmengine.config import DictAction

    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override config entries, e.g. train_dataloader.batch_size=4',
    )


def add_run_arguments(parser) -> None:
    """Add the options that training and testing have in common."""
    parser.add_argument(
        '--work-dir',
        help='where logs and results go; default: work_dirs/ and the name of the config',
    )
    add_config_options(parser)
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how distributed processes were started',
    )
    parser.add_argument(
        '--local-rank', '--local_rank', type=int, default=0, help='set by the launcher'
    )


def load_run_config(args):
    """Read ``args.config`` and apply the options of :func:`add_run_arguments`."""
    cfg = load_config(args.config, args.cfg_options)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg.launcher = args.launcher
    name = Path(args.config).stem
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or f'work_dirs/{name}'
    return cfg


def check_output(path: str, suffixes: Sequence[str], force: bool) -> Path:
    """Raise :class:`UserError` if a file cannot be written, or exists without ``force``."""
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


def check_file(path: str, what: str) -> None:
    """Raise :class:`UserError` if ``path`` is neither a file nor a URL."""
    if not path.startswith(('http://', 'https://')) and not os.path.isfile(path):
        raise UserError(
            f'{what} {path} does not exist; give the path of a file, or a URL that begins '
            'with http:// or https://'
        )
