# About 10 minutes on a CPU, from random weights: shows that everything works.
_base_ = [
    '../_base_/models/upernet_overlock.py',
    '../_base_/datasets/demo_segmentation.py',
    '../_base_/segmentation_runtime.py',
]
model = dict(
    data_preprocessor=dict(size=(160, 160)),
    backbone=dict(arch='xt', drop_path_rate=0.0),
    decode_head=dict(in_channels=[56, 112, 340, 420], channels=128, num_classes=10),
    auxiliary_head=dict(in_channels=340, channels=64, num_classes=10),
)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=8e-4, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=dict(custom_keys={'norm': dict(decay_mult=0.0)}),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=20),
    dict(type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False, begin=20, end=300),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=300, val_interval=100)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
# --auto-scale-lr: the learning rate is for one process with 4 images
auto_scale_lr = dict(enable=False, base_batch_size=4)
default_hooks = dict(
    logger=dict(interval=10), checkpoint=dict(interval=50, max_keep_ckpts=2)
)
randomness = dict(seed=0)
