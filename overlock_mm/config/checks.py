"""Checks before a run, so that a mistake is reported before hours of work."""

import inspect
import logging
import os
from collections.abc import Callable

from .data_checks import (
    DataSet,
    Findings,
    annotations_of,
    check_class_names,
    check_coco,
    check_masks,
    check_paths,
    check_segmentation,
    find_datasets,
    is_remote,
    nodes,
    plain,
    resolve,
    type_name,
)

# Parts of a model whose num_classes counts something else than the data set's classes.
_OTHER_PARTS = (
    'backbone',
    'data_preprocessor',
    'language_model',
    'neck',
    'reid',
    'rpn_head',
    'test_cfg',
    'train_cfg',
)
# Heads of which the same holds: COCO-Stuff's classes, edges, lengths of a text.
_OTHER_HEADS = {
    'ATSSVLFusionHead',
    'FusedSemanticHead',
    'GroundingDINOHead',
    'STDCHead',
    'SCNetSemanticHead',
}
_COUNTS = ('num_classes', 'num_things_classes', 'num_stuff_classes')
# Heads that pool the whole image to one pixel and normalise that, and where it is said.
_POOLING_HEADS = {
    'APCHead': 'pool_scales',
    'ASPPHead': None,
    'PSPHead': 'pool_scales',
    'UPerHead': 'pool_scales',
}


def check_run(cfg, *loaders: str) -> None:
    """Check the data of a run, and whether the model and its evaluators fit that data.

    The checks read metadata and a sample of files, which takes seconds. Not checked are:
    files behind a remote backend; COCO files above 50 MB, except for their category
    names; images listed by other annotation files than COCO's (XML, for one), except
    that there are label maps; data sets whose class does not come from mmengine's
    ``BaseDataset``, except for their paths and the number of classes.

    Args:
        cfg (mmengine.Config): the config, which stays as it is. Its ``data_source``, if
            there is one, says where the data comes from.
        *loaders: keys of the config: ``'train_dataloader'``, ``'val_dataloader'`` or
            ``'test_dataloader'``.

    Raises:
        UserError: if something is wrong; the message names all that was found. What may
            be intended is printed as a warning.
    """
    from mmengine.logging import print_log

    config, found = plain(cfg), Findings()
    model = config.get('model')
    model = model if isinstance(model, dict) else {}
    datasets = [d for loader in loaders for d in find_datasets(config, loader)]
    evaluators = [e for loader in loaders for e in _evaluators(config, loader)]
    heads = _heads(model, config.get('default_scope'))

    _run(check_paths, config, datasets, evaluators, found)
    _run(_check_heads, heads, datasets, found)
    for dataset in datasets:
        ranges = (
            _head_ranges(model, heads)
            if dataset.loader.startswith('train')
            else _evaluator_ranges(dataset, evaluators)
        )
        _run(check_class_names, dataset, found)
        _run(check_coco, dataset, found)
        _run(check_segmentation, dataset, ranges, found)
        _run(_check_mask_heads, model, dataset, found)
    _run(_check_evaluators, model, datasets, evaluators, found)
    if 'train_dataloader' in loaders:
        _run(_check_padding, model, _head_ranges(model, heads), found)
        _run(_check_batch_norm, config, model, datasets, found)
    for warning in found.warnings:
        print_log(warning, logger='current', level=logging.WARNING)
    found.raise_errors()


def check_dataset(cfg, *loaders: str) -> None:
    """Raise :class:`UserError` if a folder or file that a data loader reads is missing.

    Args:
        cfg (mmengine.Config): the config; its ``data_source`` says where the data
            comes from.
        *loaders: keys of the config such as ``'train_dataloader'``.
    """
    config, found = plain(cfg), Findings()
    datasets = [d for loader in loaders for d in find_datasets(config, loader)]
    evaluators = [e for loader in loaders for e in _evaluators(config, loader)]
    check_paths(config, datasets, evaluators, found)
    found.raise_errors()


def _run(check: Callable, *args) -> None:
    """Run one check. What it does not understand is no reason to refuse a run."""
    try:
        check(*args)
    except Exception as error:  # noqa: BLE001  configs may hold anything
        args[-1].warnings.append(
            f'{check.__name__.strip("_").replace("_", " ")}: could not be done '
            f'({type(error).__name__}: {error}); the run goes on without it'
        )


def _evaluators(config: dict, loader: str) -> list[tuple[str, dict]]:
    """The evaluators of a loader with their keys, those inside others too."""
    key = loader.replace('dataloader', 'evaluator')
    if key == loader or loader.startswith('train'):
        return []
    return [(path, node) for path, node in nodes(config.get(key), key) if 'type' in node]


def _heads(model: dict, scope: str | None) -> list[tuple[str, dict, dict[str, int]]]:
    """The heads of a model: their keys, configs and numbers of classes."""
    from mmengine.registry import MODELS

    heads = []
    for key, node in nodes(model, 'model', skip=_OTHER_PARTS):
        cls = resolve(MODELS, node.get('type'), scope)
        names = {c.__name__ for c in cls.__mro__} if cls else {type_name(node)}
        if names & _OTHER_HEADS or node.get('class_agnostic'):
            continue
        counts = {name: node.get(name) for name in _COUNTS}
        if not any(counts.values()):
            counts['num_classes'] = _default(cls, 'num_classes')
        counts = {name: n for name, n in counts.items() if type(n) is int}
        if counts:
            heads.append((key, node, counts))
    return heads


def _default(cls: type | None, name: str):
    """The default of an argument of a class, wherever its constructors define it."""
    for base in cls.__mro__ if cls else ():
        init = base.__dict__.get('__init__')
        if init is None:
            continue
        try:
            parameters = inspect.signature(init).parameters
        except ValueError:  # not written in Python
            return None
        if name in parameters:
            default = parameters[name].default
            return None if default is inspect.Parameter.empty else default
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return None
    return None


def _check_heads(heads, datasets: list[DataSet], found: Findings) -> None:
    """Heads must have as many classes as the data set."""
    by_numbers = {}
    for dataset in datasets:
        if dataset.classes and not dataset.is_a('BaseVideoDataset'):
            key = tuple(dataset.numbers.items())
            by_numbers.setdefault(key, []).append(dataset)
    for own in by_numbers.values():
        numbers = own[0].numbers
        wrong = {
            f'{key}.{name}={count}': (name, numbers[name])
            for key, node, counts in heads
            for name, count in counts.items()
            if numbers.get(name) not in (None, count)
        }
        if not wrong:
            continue
        fix = ' and '.join(f'{name}={number}' for name, number in set(wrong.values()))
        found.errors.append(
            f'{own[0].describe_classes()} in {" and ".join(d.key for d in own)}, but '
            f'{", ".join(wrong)}. Set {fix} there, or metainfo.classes in the data set'
        )


def _head_ranges(model: dict, heads) -> dict[str, tuple[int, int]]:
    """Number of classes and ignored label of each head of a segmentor."""
    ranges = {}
    for key, node in nodes(model, 'model', skip=_OTHER_PARTS):
        if key.split('.')[-1].split('[')[0] in ('decode_head', 'auxiliary_head'):
            counts = [
                own['num_classes']
                for path, _, own in heads
                if f'{path}.'.startswith(f'{key}.') and 'num_classes' in own
            ]
            if counts:
                ranges[key] = (min(counts), node.get('ignore_index', 255))
    return ranges


def _evaluator_ranges(dataset: DataSet, evaluators) -> dict[str, tuple[int, int]]:
    """Number of classes and ignored label of each evaluator of label maps."""
    own = dataset.loader.replace('dataloader', 'evaluator')
    return {
        key: (len(dataset.classes), node.get('ignore_index', 255))
        for key, node in evaluators
        if key.startswith(own) and type_name(node) == 'IoUMetric' and dataset.classes
    }


def _check_padding(model: dict, ranges, found: Findings) -> None:
    """Check that label maps are padded with a label that heads know."""
    preprocessor = model.get('data_preprocessor') or {}
    if not preprocessor.get('size') and not preprocessor.get('size_divisor'):
        return
    pad = preprocessor.get('seg_pad_val', 255)
    for key, (count, ignored) in ranges.items():
        if pad >= count and pad != ignored:
            found.warnings.append(
                f'model.data_preprocessor.seg_pad_val={pad} is neither a class of {key} '
                f'nor its ignore_index={ignored}: padded images will fail. Set it to '
                f'{ignored}'
            )
            return


def _check_mask_heads(model: dict, dataset: DataSet, found: Findings) -> None:
    """A mask head learns from masks, so the pipeline must load them."""
    if not dataset.loader.startswith('train'):
        return
    loaders = [t for t in dataset.pipeline if type_name(t) == 'LoadAnnotations']
    if not loaders or any(t.get('with_mask') for t in loaders):
        return
    for key, node in nodes(model, 'model', skip=_OTHER_PARTS):
        if isinstance(node.get('mask_head'), dict | list) and key.endswith('roi_head'):
            found.errors.append(
                f'{key}.mask_head needs masks, and LoadAnnotations in the pipeline of '
                f'{dataset.key} has no with_mask=True. Set it, or mask_head=None'
            )


def _check_evaluators(model: dict, datasets, evaluators, found: Findings) -> None:
    """Evaluators must read the annotations of their data set, and what the model gives."""
    boxes_only = [
        key
        for key, node in nodes(model, 'model', skip=_OTHER_PARTS)
        if key.endswith('roi_head') and not node.get('mask_head')
    ]
    for key, node in evaluators:
        metrics = node.get('metric') or ()
        segm = 'segm' in ([metrics] if isinstance(metrics, str) else metrics)
        path = node.get('ann_file')
        loader = key.split('_evaluator')[0] + '_dataloader'
        own = [d for d in datasets if d.loader == loader]
        if segm and boxes_only and not node.get('format_only'):
            found.errors.append(
                f"{key}.metric has 'segm', and {boxes_only[0]} has no mask_head. "
                "Set metric='bbox'"
            )
            segm = False
        if not isinstance(path, str) or is_remote(node) or not os.path.isfile(path):
            continue
        if segm and type_name(node) == 'CocoMetric' and not node.get('format_only'):
            coco = found.read_coco(path)
            if coco and coco['annotations']:
                read = [a for d in own for a in annotations_of(coco, d.classes or ())]
                check_masks(read, path, f'{key}.ann_file', "metric='segm'", found)
        # panoptic sets have a second file with boxes
        own = [d.paths.get('ann_file') for d in own if not d.is_a('CocoPanopticDataset')]
        if own and all(own) and os.path.realpath(path) not in map(os.path.realpath, own):
            found.warnings.append(
                f'{key}.ann_file={path} is not the ann_file of {loader}, {own[0]}: '
                'images would be compared with annotations of others. Set both alike'
            )


def _check_batch_norm(config, model: dict, datasets, found: Findings) -> None:
    """One image per batch, pooled to one pixel, is a single value: no variance."""
    from mmengine.registry import MODELS

    loader = config.get('train_dataloader') or {}
    batch = loader.get('batch_size')
    distributed = config.get('launcher') not in (None, 'none')
    left = 0  # images in the last batch
    if batch and not loader.get('drop_last') and not distributed:
        sampler = type_name(loader.get('sampler') or {})
        own = [d for d in datasets if d.loader == 'train_dataloader']
        plain_order = sampler == 'DefaultSampler' and not loader.get('batch_sampler')
        if plain_order and len(own) == 1 and not own[0].wrappers and own[0].images:
            left = own[0].images % batch
    if 1 not in (batch, left):
        return
    norms, refused = [], []
    scope = config.get('default_scope')
    for key, node in nodes(model, 'model', skip=('data_preprocessor', 'init_cfg')):
        cls = resolve(MODELS, node.get('type'), scope)
        if node.get('norm_eval', _default(cls, 'norm_eval')):
            continue
        norm = type_name(node.get('norm_cfg') or {})
        if type_name(node) == 'OverLoCK':
            norm = 'BN'
        synchronised = distributed and ('Sync' in norm or config.get('sync_bn'))
        if ('BN' not in norm and 'BatchNorm' not in norm) or synchronised:
            continue
        norms.append(key)
        for base in cls.__mro__ if cls else ():
            if base.__name__ in _POOLING_HEADS:
                scales = _POOLING_HEADS[base.__name__]
                if scales is None or 1 in (node.get(scales) or _default(cls, scales)):
                    refused.append(key)
                break
    if refused:
        what = (
            'train_dataloader.batch_size=1'
            if batch == 1
            else f'the last batch of train_dataloader has 1 image ({own[0].images} in '
            f'batches of {batch})'
        )
        fix = (
            'batch_size=2 or more, or train in several processes with SyncBN'
            if batch == 1
            else 'drop_last=True'
        )
        found.errors.append(
            f'{what}, and {refused[0]} pools it to one value per channel, of which batch '
            f"norm has no variance. Use {fix}, or norm_cfg=dict(type='GN', "
            'num_groups=32)'
        )
    elif batch == 1 and norms:
        found.warnings.append(
            f'train_dataloader.batch_size=1: batch norms in {", ".join(norms[:3])} take '
            'their statistics from one image. Prefer 2 or more, or backbone.norm_eval=True'
        )
