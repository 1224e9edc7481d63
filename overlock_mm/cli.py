"""What the command lines share: configs, checks before a long run, and plain errors."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TOOLBOXES = {'mmseg': 'MMSegmentation', 'mmdet': 'MMDetection'}
_INSTALL = (
    "pip install 'overlock_mm[onedl]' (maintained) or 'overlock_mm[openmmlab]', never both"
)


class UserError(Exception):
    """Something that the caller can mend; its text is one line that says how."""


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn a :class:`UserError` into one line on stderr and exit status 2."""
    try:
        yield
    except UserError as error:
        sys.stderr.write(f'error: {error}\n')
        sys.exit(2)


def add_shared_arguments(parser) -> None:
    """Add the options that training and testing have in common."""
    from mmengine.config import DictAction

    parser.add_argument(
        '--work-dir',
        help='where logs and results go; default: work_dirs/ and the name of the config',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override config entries, e.g. train_dataloader.batch_size=4',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how distributed processes were started',
    )
    parser.add_argument(
        '--local-rank', '--local_rank', type=int, default=0, help='set by the launcher'
    )


def require_toolbox_packages(*packages: str) -> None:
    """Raise :class:`UserError` if a package that the tools import is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            name = _TOOLBOXES.get(package, package)
            raise UserError(f'{name} is not installed; {_INSTALL}')


def load_config(args):
    """Read ``args.config`` and apply the shared options.

    Returns:
        mmengine.Config: with ``work_dir`` and ``launcher`` set.

    Raises:
        UserError: if the file is missing or not a config of a known toolbox, if the
            toolbox is not installed, or if a detector meets an mmcv without its ops.
    """
    from mmengine.config import Config

    path = Path(args.config)
    if not path.is_file():
        near = (
            sorted(p.name for p in path.parent.glob('*.py')) if path.parent.is_dir() else []
        )
        hint = (
            f'{path.parent} has {", ".join(near)}' if near else 'give the path of a config'
        )
        raise UserError(f'config {path} does not exist; {hint}')
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = Config.fromfile(path)
    cfg.merge_from_dict(args.cfg_options or {})
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or f'work_dirs/{path.stem}'
    scope = cfg.get('default_scope')
    if scope not in _TOOLBOXES:
        raise UserError(
            f'{path} has default_scope={scope!r}; these tools run configs of '
            f'{" and ".join(_TOOLBOXES)}'
        )
    require_toolbox_packages('mmcv', scope)
    if scope == 'mmdet' and importlib.util.find_spec('mmcv._ext') is None:
        raise UserError(
            'mmcv is installed without its compiled ops, which detectors need; run make '
            'demo-detection, or build them against the installed torch: MMCV_WITH_OPS=1 '
            'pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps '
            'onedl-mmcv'
        )
    return cfg


def check_dataset(cfg, *loaders: str) -> None:
    """Raise :class:`UserError` if a folder or file that a data loader reads is missing.

    Args:
        cfg (mmengine.Config): the config; its ``data_source`` says where the data
            comes from.
        *loaders: keys of the config such as ``'train_dataloader'``.
    """
    wanted = {}
    for loader in loaders:
        for dataset in _datasets(cfg.get(loader) or {}):
            root = dataset.get('data_root') or ''
            parts = [dataset.get('ann_file'), *(dataset.get('data_prefix') or {}).values()]
            for part in filter(None, parts):
                wanted.setdefault(os.path.join(root, part), loader)
    missing = [path for path in wanted if '://' not in path and not os.path.exists(path)]
    if missing:
        source = cfg.get('data_source')
        raise UserError(
            f'{missing[0]} does not exist, which {wanted[missing[0]]} reads; expected: '
            f'{" ".join(sorted(wanted))}; {f"get {source}; or " if source else ""}set '
            f'data_root of the datasets in the config'
        )


def _datasets(node) -> Iterator[dict]:
    """The innermost data set configs below a data loader's."""
    if isinstance(node, list | tuple):
        for item in node:
            yield from _datasets(item)
    elif isinstance(node, dict):
        if 'data_prefix' in node or 'ann_file' in node:
            yield node
        else:
            yield from _datasets(node.get('dataset'))
            yield from _datasets(node.get('datasets'))


def check_file(path: str, what: str) -> None:
    """Raise :class:`UserError` if ``path`` is neither a file nor a URL."""
    if '://' not in path and not os.path.isfile(path):
        raise UserError(
            f'{what} {path} does not exist; give the path or URL of a .pth file'
        )
