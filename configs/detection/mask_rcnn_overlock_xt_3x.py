# No OverLoCK-XT was released for this task; its stochastic depth is this project's choice.
_base_ = [
    '../_base_/models/mask_rcnn_overlock.py',
    '../_base_/datasets/coco_instance_multiscale.py',
    '../_base_/schedules/coco_3x.py',
    '../_base_/detection_runtime.py',
]
model = dict(
    backbone=dict(
        arch='xt',
        drop_path_rate=0.1,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://github.com/LMMMEng/OverLoCK/releases/download/v1/'
            'overlock_xt_in1k_224.pth',
        ),
    ),
    neck=dict(in_channels=[56, 112, 340, 420]),
)
