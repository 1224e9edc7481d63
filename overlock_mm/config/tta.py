"""Test-time augmentation, for configs that say how and for those that do not."""

import copy
from functools import partial

from mmengine.config import ConfigDict
from mmengine.registry import MODELS, TRANSFORMS, Registry

from ..errors import UserError
from .edit import (
    class_of,
    evaluators,
    inner_datasets,
    is_a,
    loading_options,
    loads_labels,
    without_steps,
)

_TTA_MODELS = dict(
    mmdet=dict(
        type='DetTTAModel',
        tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
    ),
    mmseg=dict(type='SegTTAModel'),
)


def use_tta(cfg, toolbox: str) -> list[str]:
    """Wrap the model for test-time augmentation and replace the test pipelines.

    ``tta_model`` and ``tta_pipeline`` of the config say how. Without the first, the
    toolbox's usual one is taken; without the second, the test pipeline and its flip.

    Args:
        cfg (mmengine.Config): the config, changed in place.
        toolbox: 'mmdet' or 'mmseg'.

    Returns:
        What the user should know, a line each.

    Raises:
        UserError: if predictions cannot be merged, or a pipeline not be augmented.
    """
    notes, scope = [], cfg.get('default_scope')
    if toolbox == 'mmdet' and _without_masks(cfg):
        notes.append(
            'MMDetection cannot merge the masks of augmented images: with --tta, boxes '
            'are predicted and evaluated, masks are left out.'
        )
    for dataset in inner_datasets(cfg.test_dataloader['dataset']):
        dataset['pipeline'] = _tta_pipeline(
            dataset.get('pipeline') or [], cfg.get('tta_pipeline'), toolbox, scope
        )
    if not cfg.get('tta_pipeline'):
        notes.append('The config has no tta_pipeline: images are tested as is and flipped.')
    # the wrapper gets what the runner gives any model, and puts it over the model's own
    preprocessor = cfg.pop('data_preprocessor', None)
    if preprocessor is not None:
        cfg.model.setdefault('data_preprocessor', preprocessor)
    wrapper = copy.deepcopy(cfg.get('tta_model'))
    if not wrapper:
        wrapper = ConfigDict(_TTA_MODELS[toolbox])
        wrapper.type = _name_anywhere(wrapper.type, MODELS, toolbox)
    wrapper['module'] = cfg.model
    cfg.model = wrapper
    return notes


def _name_anywhere(kind: str, registry: Registry, toolbox: str) -> str:
    """The name with which a toolbox's class is found from every default scope."""
    found = class_of(dict(type=kind), registry, toolbox)
    return f'{found.__module__}.{found.__name__}'


def _without_masks(cfg) -> bool:
    """Remove the mask head of a two-stage detector and its metrics; whether it had one."""
    single = [key for key in ('mask_head', 'panoptic_head') if cfg.model.get(key)]
    if single:
        raise UserError(
            f'--tta merges boxes only, and the model predicts masks with its {single[0]}; '
            'test it without --tta'
        )
    roi_head = cfg.model.get('roi_head') or {}
    if not roi_head.get('mask_head'):
        return False
    roi_head.update(mask_head=None, mask_roi_extractor=None)
    loading = loading_options(cfg)
    ignored = loading.get('ignore_unexpected') or []
    ignored = [ignored] if isinstance(ignored, str) else list(ignored)
    loading.ignore_unexpected = [*ignored, 'roi_head.mask_head.']
    for evaluator in evaluators(cfg):
        metric = evaluator.get('metric')
        names = [metric] if isinstance(metric, str) else list(metric or [])
        if 'segm' in names:
            names = [name for name in names if name != 'segm']
            evaluator['metric'] = names or ['bbox']
    return True


def _tta_pipeline(pipeline, given, toolbox: str, scope: str | None) -> list:
    """``given``, or ``pipeline`` with a flip; labels are read only if ``pipeline`` does."""
    from mmcv.transforms import TestTimeAug

    is_label = partial(loads_labels, scope=scope)
    if any(is_a(step, TestTimeAug, TRANSFORMS, scope) for step in pipeline):
        return pipeline
    labels = [copy.deepcopy(step) for step in pipeline if is_label(step)]
    if given:
        steps = copy.deepcopy(list(given))
        return steps if labels else without_steps(steps, is_label)
    *steps, last = without_steps(pipeline, is_label) or [None]
    packed = class_of(last, TRANSFORMS, scope)
    if not getattr(packed, '__name__', '').startswith('Pack'):
        raise UserError(
            '--tta: the test pipeline does not end in a step that packs, such as '
            'PackDetInputs, so no flip can be put before it; give the config a tta_pipeline'
        )
    if 'meta_keys' in last:  # which merging reads
        more = [k for k in ('flip', 'flip_direction') if k not in last['meta_keys']]
        last['meta_keys'] = (*last['meta_keys'], *more)
    flip = _name_anywhere('RandomFlip', TRANSFORMS, toolbox)
    flips = [dict(type=flip, prob=p, direction='horizontal') for p in (0.0, 1.0)]
    # labels are read after the flip: they are compared as they are
    transforms = [flips, *([step] for step in labels), [last]]
    return [*steps, dict(type='TestTimeAug', transforms=transforms)]
