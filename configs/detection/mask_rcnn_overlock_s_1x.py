_base_ = [
    '../_base_/models/mask_rcnn_overlock.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/coco_1x.py',
    '../_base_/detection_runtime.py',
]
model = dict(
    backbone=dict(
        arch='s',
        drop_path_rate=0.4,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://github.com/LMMMEng/OverLoCK/releases/download/v1/'
            'overlock_s_in1k_224.pth',
        ),
    ),
    neck=dict(in_channels=[64, 128, 448, 640]),
)
