_base_ = [
    '../_base_/models/mask_rcnn_overlock.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/coco_1x.py',
    '../_base_/detection_runtime.py',
]
model = dict(
    backbone=dict(
        arch='b',
        drop_path_rate=0.6,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://github.com/LMMMEng/OverLoCK/releases/download/v1/'
            'overlock_b_in1k_224.pth',
        ),
    ),
    neck=dict(in_channels=[80, 160, 528, 720]),
)
