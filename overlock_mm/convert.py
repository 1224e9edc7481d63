"""Conversion of checkpoints: the released code's for this project's models, and back."""

from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import Kind, dataset_meta_of, fit, form_of, unwrap
from .errors import CheckpointError
from .models import OverLoCK
from .version import __version__

TARGETS = ('overlock_mm', 'released', 'segmentation', 'detection')
# Whole models that have a config here: keys, the rows of the second one, the config.
_CONFIGS = {
    ('decode_head.psp_modules.0.1.conv.weight', 'decode_head.conv_seg.weight'): (
        150,
        'segmentation/upernet_overlock_{arch}',
    ),
    ('roi_head.mask_head.0.conv_logits.weight', 'roi_head.bbox_head.0.fc_cls.weight'): (
        81,
        'detection/cascade_mask_rcnn_overlock_{arch}',
    ),
    ('roi_head.mask_head.conv_logits.weight', 'roi_head.bbox_head.fc_cls.weight'): (
        81,
        'detection/mask_rcnn_overlock_{arch}_{schedule}',
    ),
}
_EPOCHS_1X = 12


def convert_checkpoint(
    content,
    to: str = 'overlock_mm',
    source: str = 'the checkpoint',
    config: str | None = None,
    keep_optimizer: bool = False,
    half: bool = False,
    cfg: str | None = None,
) -> dict:
    """Convert the content of a checkpoint file; no weight changes its value.

    Detectors and segmentors have the same names and values of weights in MMDetection 2.x,
    MMSegmentation 0.x and their successors. What describes them differs.

    Args:
        content: what ``overlock_mm.checkpoint.read_weights`` returns.
        to: ``'overlock_mm'``, for mmengine and the configs of this project;
            ``'released'``, for MMDetection 2.x and MMSegmentation 0.x; or, from an
            ImageNet file, a bare backbone in ``'segmentation'`` or ``'detection'`` layout
            with initial output norms, which loads strictly.
        source: where the content comes from, which is recorded.
        config: path of the model's config, which is recorded. By default one of this
            project's configs, if there is one for the model.
        keep_optimizer: keep the optimizer's state and everything else in the file.
        half: convert floating-point tensors to float16.
        cfg: text of the model's config, if it is known to fit. mmengine's inferencers
            build a model from it.

    Returns:
        A dict with ``state_dict`` and ``meta``: the file's meta, with ``dataset_meta``
        that has ``classes`` and ``palette`` (released: ``CLASSES`` and ``PALETTE``) and,
        except in released ones, ``overlock_mm`` with ``version``, ``source``, ``config``.

    Raises:
        ValueError: if ``to`` is unknown.
        CheckpointError: if the content is not a complete OverLoCK of the kind that ``to``
            needs, or a value is too large for float16.
    """
    if to not in TARGETS:
        raise ValueError(f'to={to!r} must be one of {TARGETS}')
    key, state = unwrap(content, source)
    at = 'backbone.' if any(k.startswith('backbone.') for k in state) else ''
    kind = form_of(state, at)
    _check_kind(kind, at, to, source)
    dense = to in ('segmentation', 'detection')
    if dense:
        state = _dense_backbone(content, state, kind, to, source)
    else:
        with torch.device('meta'):
            fit(
                _backbone(kind, kind.layout, state, at, source),
                content,
                source,
                logger='silent',
            )
    meta = content.get('meta') if key else None
    meta = dict(meta) if isinstance(meta, dict) else {}
    if to == 'released':
        meta = _released_meta(meta)
    else:
        if config is None and not dense:
            config = _config_of(state, kind, source, meta)
        meta = described(meta, source, config, cfg)
    kept = {}
    if keep_optimizer and key:
        kept = {k: v for k, v in content.items() if k not in ('meta', key)}
    return dict(kept, meta=meta, state_dict=_halved(state) if half else state)


def described(meta: dict, source: str, config: str | None, cfg: str | None) -> dict:
    """The meta of a checkpoint for mmengine that is written here.

    Args:
        meta: the meta of the checkpoint that it is made from.
        source: where that comes from.
        config: path of the model's config.
        cfg: text of the model's config; by default the one in ``meta``, if any.

    Returns:
        A new dict, with the class names where mmengine has them.
    """
    classes = dataset_meta_of(dict(meta=meta))
    # 'config' is the text of a config in MMDetection 2.x, which mmengine would execute
    old = ('CLASSES', 'PALETTE', 'config', 'overlock_mm')
    meta = {k: v for k, v in meta.items() if k not in old}
    if classes:
        meta['dataset_meta'] = classes
    if cfg is not None:
        meta['cfg'] = cfg
    recorded = dict(version=__version__, source=Path(source).name, config=config)
    return dict(meta, overlock_mm=recorded)


def _check_kind(kind: Kind, at: str, to: str, source: str) -> None:
    """Raise an error if a checkpoint cannot be converted to what is asked for."""
    if not kind.arch:
        raise CheckpointError(f'{source} has no OverLoCK; nothing was written')
    imagenet = not at and kind.layout == 'classification'
    if to in ('segmentation', 'detection') and not imagenet:
        raise CheckpointError(
            f'{source} is {kind}; only an ImageNet file can be converted to a bare '
            f"backbone in {to} layout. Convert this one to 'overlock_mm' or 'released'"
        )
    if to in ('overlock_mm', 'released') and (not at or kind.layout == 'classification'):
        raise CheckpointError(
            f'{source} is {kind}, and not a whole detector or segmentor; an ImageNet file '
            "can be converted to a bare backbone in 'segmentation' or 'detection' layout"
        )
    if kind.partial:
        raise CheckpointError(
            f'{source} has only a part of an OverLoCK ({kind}); nothing was written'
        )


def _backbone(kind: Kind, layout: str, state, at: str, source: str) -> OverLoCK:
    """A backbone of the sizes of a checkpoint."""
    try:
        return OverLoCK(
            kind.arch,
            in_channels=state[f'{at}patch_embed1.0.weight'].shape[1],
            context_skip=layout == 'detection',
            deploy=kind.deploy,
        )
    except (ValueError, KeyError, IndexError) as error:
        raise CheckpointError(
            f'{source} has sizes that no OverLoCK can have: {error}'
        ) from error


def _dense_backbone(content, state, kind, layout, source) -> dict[str, Tensor]:
    """The backbone of an ImageNet file, with output norms, always the same ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _backbone(kind, layout, state, '', source)
    _, fitting = fit(model, content, source, logger='silent')
    model.load_state_dict(fitting, strict=False)
    return model.state_dict()


def _released_meta(meta: dict) -> dict:
    """``meta`` with the class names where mmcv 1.x has them."""
    meta.pop('overlock_mm', None)
    rest = dict(meta.pop('dataset_meta', None) or {})
    for key in ('classes', 'palette'):
        if key in rest:
            meta[key.upper()] = rest.pop(key)
    return dict(meta, dataset_meta=rest) if rest else meta


def _config_of(state, kind: Kind, source: str, meta: dict) -> str | None:
    """The config of this project that builds the model, if there is one."""
    if not isinstance(kind.arch, str) or kind.deploy:
        return None
    long = '3x' in Path(source).name or (meta.get('epoch') or 0) > _EPOCHS_1X
    schedule = '3x' if long else '1x'
    for (part, classifier), (rows, name) in _CONFIGS.items():
        if part in state and classifier in state and len(state[classifier]) == rows:
            return f'configs/{name.format(arch=kind.arch, schedule=schedule)}.py'
    return None


def _halved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in float16."""
    halved = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    for name, value in halved.items():
        if not value.isfinite().all() and state[name].isfinite().all():
            raise CheckpointError(
                f'{name} has values that are too large for float16; convert without half'
            )
    return halved
