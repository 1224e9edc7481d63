"""What the command lines share: configs, checks before a long run, and plain errors."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.metadata import distributions
from pathlib import Path

from .weights_file import CheckpointError

# name, and its packages in the two families that own the same import names
_TOOLBOXES = {
    'mmseg': ('MMSegmentation', 'onedl-mmsegmentation', 'mmsegmentation'),
    'mmdet': ('MMDetection', 'onedl-mmdetection', 'mmdet'),
    'mmcv': ('mmcv', 'onedl-mmcv', 'mmcv'),
}


class UserError(Exception):
    """Something that the caller can mend; its text is one line that says how."""


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


def build_model(cfg):
    """The detector or segmentor of a config."""
    from mmengine.registry import MODELS, init_default_scope

    if 'model' not in cfg:
        raise UserError(f'{cfg.filename} has no model; give the config of one')
    toolbox = importlib.import_module(f'{cfg.default_scope}.utils')
    toolbox.register_all_modules(init_default_scope=False)
    init_default_scope(cfg.default_scope)
    return MODELS.build(cfg.model)


def build_runner(cfg):
    """The runner of a config, with weights that must fit."""
    from mmengine.registry import RUNNERS

    importlib.import_module('overlock_mm.hooks')
    loading_options(cfg)
    return RUNNERS.build(cfg)


def loading_options(cfg) -> dict:
    """The config's entry for loading, as it is or as it is by default."""
    loading = cfg.setdefault('default_hooks', {}).setdefault('loading', {})
    loading.setdefault('type', 'StrictLoadingHook')
    return loading


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


def _package(name: str) -> str:
    """The distribution of ``name`` in the family of which something is installed."""
    _, onedl, openmmlab = _TOOLBOXES[name]
    installed = {d.metadata['Name'] for d in distributions()}
    return openmmlab if installed & {'mmengine', 'mmdet', 'mmsegmentation'} else onedl


def _require(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise UserError(
            f'{_TOOLBOXES[name][0]} is not installed; run: pip install '
            f'--no-build-isolation {_package(name)}'
        )


def load_config(config: str, options: dict | None = None):
    """Read a config and override entries of it.

    Returns:
        mmengine.Config: the config.

    Raises:
        UserError: if the file is missing or not a config of a known toolbox, or if the
            toolbox or what it needs (mmcv's compiled ops, for one) is not installed.
    """
    from mmengine.config import Config

    path = Path(config)
    if not path.is_file():
        near = get_close_matches(path.name, [p.name for p in path.parent.glob('*.py')])
        hint = f'{path.parent} has {", ".join(near)}' if near else 'give another path'
        raise UserError(f'config {path} does not exist; {hint}')
    if path.suffix not in ('.py', '.yml', '.yaml', '.json'):
        raise UserError(f'{path} is no config; configs end in .py')
    cfg = Config.fromfile(path)
    cfg.merge_from_dict(options or {})
    scope = cfg.get('default_scope')
    if scope not in ('mmseg', 'mmdet'):
        raise UserError(
            f'{path} has default_scope={scope!r}; these tools know mmseg and mmdet'
        )
    _require('mmcv')
    _require(scope)
    _require_working(scope)
    return cfg


def _require_working(toolbox: str) -> None:
    """Import the toolbox, and name what it lacks."""
    build = (
        'MMCV_WITH_OPS=1 pip install --no-build-isolation --no-cache-dir --no-deps '
        f'--force-reinstall {_package("mmcv")}'
    )
    no_ops = UserError(
        'mmcv is installed without its compiled ops, which '
        f'{_TOOLBOXES[toolbox][0]} needs; build them against the installed torch: {build}'
    )
    if toolbox == 'mmdet' and importlib.util.find_spec('mmcv._ext') is None:
        raise no_ops
    try:
        importlib.import_module(f'{toolbox}.utils')
    except ModuleNotFoundError as error:
        if error.name == 'mmcv._ext':
            raise no_ops from error
        raise UserError(
            f'{_TOOLBOXES[toolbox][0]} needs {error.name}, which is not installed; run: '
            f'pip install {error.name}'
        ) from error
    except AssertionError as error:  # it checks the versions of mmcv and mmengine
        raise UserError(' '.join(str(error).split())) from error
    if toolbox != 'mmdet':
        return
    import torch
    from mmcv.ops import get_compiling_cuda_version

    if torch.cuda.is_available() and get_compiling_cuda_version() == 'not available':
        raise UserError(
            "mmcv's ops were compiled without CUDA, and this machine has a GPU; build "
            f'them again with nvcc on the PATH: {build}; or use the CPU: '
            'CUDA_VISIBLE_DEVICES='
        )


def without_pretrained(node) -> None:
    """Remove every ``init_cfg`` that loads a file from a model config, in place."""
    if isinstance(node, dict):
        init_cfg = node.get('init_cfg')
        if isinstance(init_cfg, list):
            node['init_cfg'] = [c for c in init_cfg if not _is_pretrained(c)]
        elif _is_pretrained(init_cfg):
            node['init_cfg'] = None
        for value in node.values():
            without_pretrained(value)
    elif isinstance(node, list):
        for value in node:
            without_pretrained(value)


def _is_pretrained(init_cfg) -> bool:
    kind = init_cfg.get('type') if isinstance(init_cfg, dict) else None
    return getattr(kind, '__name__', str(kind)).split('.')[-1] in (
        'Pretrained',
        'PretrainedInit',
    )


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
        evaluators = cfg.get(loader.replace('dataloader', 'evaluator')) or []
        for evaluator in evaluators if isinstance(evaluators, list) else [evaluators]:
            if evaluator.get('ann_file'):
                wanted.setdefault(
                    evaluator['ann_file'], loader.split('_')[0] + '_evaluator'
                )
    missing = [path for path in wanted if '://' not in path and not os.path.exists(path)]
    if missing:
        source = cfg.get('data_source')
        raise UserError(
            f'{missing[0]} does not exist, which {wanted[missing[0]]} reads; expected: '
            f'{" ".join(sorted(wanted))}; '
            + (
                f'get {source}, or link it there'
                if source
                else 'mend the paths in the config'
            )
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
