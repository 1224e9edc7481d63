"""Test-time augmentation of configs that are written in different ways."""

import pytest
from mmdet.datasets.transforms import PackDetInputs
from mmengine.config import Config
from mmseg.datasets.transforms import RandomFlip

from overlock_mm.config.tta import use_tta
from overlock_mm.errors import UserError

LOAD, RESIZE = dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64))
LABELS, PACK = dict(type='LoadAnnotations'), dict(type='PackSegInputs')
GIVEN = [
    LOAD,
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='RandomFlip', prob=p) for p in (0.0, 1.0)],
            [LABELS],
            [PACK],
        ],
    ),
]
FLIP = f'{RandomFlip.__module__}.RandomFlip'
FLIPS = [dict(type=FLIP, prob=p, direction='horizontal') for p in (0.0, 1.0)]


def config(dataset, scope='mmseg', **entries):
    entries.setdefault('model', dict(type='EncoderDecoder'))
    return Config(
        dict(default_scope=scope, test_dataloader=dict(dataset=dataset), **entries)
    )


def test_what_the_config_says():
    """Where labels are read without it, and where there are none."""
    labelled = dict(type='A', pipeline=[LOAD, LABELS, PACK])
    unlabelled = dict(type='B', pipeline=[LOAD, PACK])
    repeated = dict(type='RepeatDataset', times=1, dataset=unlabelled)
    both = dict(type='ConcatDataset', datasets=[labelled, repeated])
    cfg = config(both, tta_pipeline=GIVEN, tta_model=dict(type='MyTTAModel'))
    assert use_tta(cfg, 'mmseg') == []
    one, other = cfg.test_dataloader.dataset.datasets
    assert one.pipeline == GIVEN
    flips, _, pack = GIVEN[1]['transforms']
    assert other.dataset.pipeline[1].transforms == [flips, pack]
    assert cfg.model == dict(type='MyTTAModel', module=dict(type='EncoderDecoder'))
    assert cfg.tta_pipeline == GIVEN and 'module' not in cfg.tta_model


def test_the_usual_way():
    """Nothing but the test pipeline is given; labels are read after the flip."""
    cfg = config(dict(pipeline=[LOAD, LABELS, RESIZE, PACK]), data_preprocessor=dict(a=1))
    (note,) = use_tta(cfg, 'mmseg')
    assert 'as is and flipped' in note
    assert cfg.test_dataloader.dataset.pipeline == [
        LOAD,
        RESIZE,
        dict(type='TestTimeAug', transforms=[FLIPS, [LABELS], [PACK]]),
    ]
    assert cfg.model == dict(
        type='mmseg.models.segmentors.seg_tta.SegTTAModel',
        module=dict(type='EncoderDecoder', data_preprocessor=dict(a=1)),
    )
    assert 'data_preprocessor' not in cfg, 'the wrapper would take it before its own'


def test_what_changes_labels_stays_behind_them():
    mapped = dict(type='MapLabels', values=[0, 9])
    cfg = config(dict(pipeline=[LOAD, RESIZE, LABELS, mapped, PACK]))
    use_tta(cfg, 'mmseg')
    (_, _, augment) = cfg.test_dataloader.dataset.pipeline
    assert augment.transforms == [FLIPS, [LABELS], [mapped], [PACK]]


def test_the_usual_way_without_labels():
    cfg = config(dict(pipeline=[LOAD, PACK]))
    use_tta(cfg, 'mmseg')
    (_, augment) = cfg.test_dataloader.dataset.pipeline
    assert augment.transforms == [FLIPS, [PACK]]


def test_a_pipeline_that_is_augmented_already():
    cfg = config(dict(pipeline=GIVEN), tta_pipeline=[LOAD])
    use_tta(cfg, 'mmseg')
    assert cfg.test_dataloader.dataset.pipeline == GIVEN


@pytest.mark.parametrize('pack', ['PackDetInputs', 'mmdet.PackDetInputs', PackDetInputs])
def test_boxes(pack):
    """Masks go from the model, from every evaluator, and from what must be loaded."""
    pack = dict(type=pack, meta_keys=('img_id', 'flip'))
    coco = dict(type='CocoMetric', metric=['bbox', 'segm'])
    evaluators = [dict(type='VOCMetric', metric='mAP'), coco, dict(coco, metric='segm')]
    heads = dict(bbox_head=dict(a=1), mask_head=dict(b=1), mask_roi_extractor=dict(c=1))
    cfg = config(
        dict(pipeline=[LOAD, pack]),
        'mmdet',
        model=dict(type='MaskRCNN', roi_head=heads),
        test_evaluator=evaluators,
        default_hooks=dict(loading=dict(ignore_unexpected='auxiliary.')),
    )
    notes = use_tta(cfg, 'mmdet')
    assert 'masks are left out' in notes[0] and len(notes) == 2
    assert [e.metric for e in cfg.test_evaluator] == ['mAP', ['bbox'], ['bbox']]
    assert cfg.model.type.endswith('.det_tta.DetTTAModel')
    roi_head = cfg.model.module.roi_head
    assert roi_head == dict(heads, mask_head=None, mask_roi_extractor=None)
    assert cfg.default_hooks.loading == dict(
        type='StrictLoadingHook', ignore_unexpected=['auxiliary.', 'roi_head.mask_head.']
    )
    (last,) = cfg.test_dataloader.dataset.pipeline[-1].transforms[-1]
    assert last.meta_keys == ('img_id', 'flip', 'flip_direction')


def test_what_cannot_be_merged_or_augmented():
    masks = config(
        dict(pipeline=[LOAD, PACK]), 'mmdet', model=dict(type='SOLO', mask_head=dict(a=1))
    )
    with pytest.raises(UserError, match='predicts masks with its mask_head'):
        use_tta(masks, 'mmdet')
    for pipeline in ([LOAD, RESIZE], []):
        with pytest.raises(UserError, match='does not end in a step that packs'):
            use_tta(config(dict(pipeline=pipeline)), 'mmseg')
