# MMDetection's COCO, with what --tta needs.
_base_ = 'mmdet::_base_/datasets/coco_instance.py'
# shown by the tools if the folder is missing
data_source = (
    'COCO 2017: unpack train2017.zip, val2017.zip and '
    'annotations_trainval2017.zip, from https://cocodataset.org/#download, in '
    'data/coco'
)
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(type='Resize', scale=(1333, short), keep_ratio=True)
                for short in (640, 800, 960)
            ],
            [dict(type='RandomFlip', prob=p) for p in (0.0, 1.0)],
            [dict(type='LoadAnnotations', with_bbox=True)],
            [
                dict(
                    type='PackDetInputs',
                    meta_keys=(
                        'img_id',
                        'img_path',
                        'ori_shape',
                        'img_shape',
                        'scale_factor',
                        'flip',
                        'flip_direction',
                    ),
                )
            ],
        ],
    ),
]
