# No OverLoCK-XT was released for this task; its stochastic depth is this project's choice.
_base_ = [
    '../_base_/models/upernet_overlock.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/ade20k_160k.py',
    '../_base_/segmentation_runtime.py',
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
    decode_head=dict(in_channels=[56, 112, 340, 420]),
    auxiliary_head=dict(in_channels=340),
)
