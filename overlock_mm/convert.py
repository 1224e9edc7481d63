"""Checkpoints of the released code for this project's models, and back."""

from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import Form, fit, form_of, unwrap
from .errors import CheckpointError
from .models import OverLoCK
from .version import __version__

TARGETS = ('overlock_mm', 'released', 'segmentation', 'detection')
# Entries of whole models that have a config here, with their rows, and these configs.
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
) -> dict:
    """Convert what a checkpoint file holds; no weight changes its value.

    The weights of detectors and segmentors have the same names and values in MMDetection
    2.x, MMSegmentation 0.x and their successors; what describes them has not.

    Args:
        content: what ``overlock_mm.checkpoint.read_weights`` returns.
        to: ``'overlock_mm'``, for mmengine and this project's configs; ``'released'``,
            for the toolboxes' former generation; or, of an ImageNet file, the bare
            backbone in ``'segmentation'`` or ``'detection'`` form, with fresh output
            norms, which loads strictly.
        source: where the content is from, as recorded in it.
        config: config of the model, as recorded; by default one of this project's, if
            there is one.
        keep_optimizer: keep all else that the file holds: the optimizer's state, and
            what mmengine resumes a training of its own from.
        half: floating-point tensors as float16.

    Returns:
        A dict with ``state_dict`` and ``meta``: what the file's had; ``dataset_meta``
        with ``classes`` and ``palette`` (released: ``CLASSES`` and ``PALETTE``); and,
        but in released ones, ``overlock_mm`` with ``version``, ``source`` and ``config``.

    Raises:
        CheckpointError: if the content is no whole OverLoCK of the kind that ``to``
            takes, or a value is too large for float16.
    """
    if to not in TARGETS:
        raise ValueError(f'to={to!r} is none of {TARGETS}')
    key, state = unwrap(content, source)
    at = 'backbone.' if any(k.startswith('backbone.') for k in state) else ''
    form = form_of(state, at)
    dense = to in ('segmentation', 'detection')
    if not form.arch:
        raise CheckpointError(f'{source} holds no OverLoCK; nothing was written')
    if dense and (at or form.task != 'classification'):
        raise CheckpointError(
            f'{source} is {form}; only an ImageNet file can become a bare backbone in '
            f"{to} form. Other files convert to 'overlock_mm' or 'released'"
        )
    if not dense and (not at or form.task == 'classification'):
        raise CheckpointError(
            f'{source} is {form}, and no whole detector or segmentor; an ImageNet file '
            "converts to a bare backbone in 'segmentation' or 'detection' form"
        )
    if isinstance(form.arch, dict) and None in sum(form.arch.values(), ()):
        raise CheckpointError(f'{source} holds only a part of {form}; nothing was written')
    task = to if dense else form.task
    with torch.random.fork_rng(devices=[]), torch.device('cpu' if dense else 'meta'):
        torch.manual_seed(0)
        try:
            model = OverLoCK(
                form.arch,
                in_channels=state[f'{at}patch_embed1.0.weight'].shape[1],
                context_skip=task == 'detection',
                deploy=form.deploy,
            )
        except (ValueError, KeyError, IndexError) as error:
            raise CheckpointError(
                f'{source} holds no possible OverLoCK: {error}'
            ) from error
    _, fitting = fit(model, content, source, logger='silent')
    if dense:
        model.load_state_dict(fitting, strict=False)
        state = model.state_dict()
    meta = content.get('meta') if key else None
    meta = dict(meta) if isinstance(meta, dict) else {}
    meta.pop('overlock_mm', None)
    meta = _former_meta(meta) if to == 'released' else _meta(meta)
    if to != 'released':
        if config is None and not dense:
            config = _config_of(state, form, source, meta)
        meta['overlock_mm'] = origin(source, config)
    kept = {}
    if keep_optimizer and key:
        kept = {k: v for k, v in content.items() if k not in ('meta', key)}
    return dict(kept, meta=meta, state_dict=_halved(state) if half else state)


def origin(source: str, config: str | None) -> dict:
    """What a written checkpoint says of where it is from."""
    return dict(version=__version__, source=Path(source).name, config=config)


def _meta(meta: dict) -> dict:
    """``meta`` with the classes where mmengine has them."""
    names = {k: meta.pop(k.upper()) for k in ('classes', 'palette') if k.upper() in meta}
    if names:
        meta['dataset_meta'] = {**names, **(meta.get('dataset_meta') or {})}
    return meta


def _former_meta(meta: dict) -> dict:
    """``meta`` with the classes where mmcv 1.x has them."""
    rest = dict(meta.pop('dataset_meta', None) or {})
    for key in ('classes', 'palette'):
        if key in rest:
            meta[key.upper()] = rest.pop(key)
    return dict(meta, dataset_meta=rest) if rest else meta


def _config_of(state, form: Form, source: str, meta: dict) -> str | None:
    """The config here that builds the model, if one does as it is."""
    if not isinstance(form.arch, str) or form.deploy:
        return None
    long = '3x' in Path(source).name or (meta.get('epoch') or 0) > _EPOCHS_1X
    schedule = '3x' if long else '1x'
    for (part, classifier), (rows, name) in _CONFIGS.items():
        if part in state and classifier in state and len(state[classifier]) == rows:
            return f'configs/{name.format(arch=form.arch, schedule=schedule)}.py'
    return None


def _halved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    halved = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    for name, value in halved.items():
        if not value.isfinite().all() and state[name].isfinite().all():
            raise CheckpointError(f'{name} has values too large for float16; leave it out')
    return halved
