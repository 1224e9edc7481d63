"""Checks before a run, so that what is missing is reported before hours of work."""

import os
from collections.abc import Iterator

from ..errors import UserError


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
