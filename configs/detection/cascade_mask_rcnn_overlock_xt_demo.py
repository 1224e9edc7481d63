# 12 minutes on a CPU core, from random weights: shows that everything works. The heads
# are those of the real config, made smaller.
_base_ = [
    '../_base_/models/cascade_mask_rcnn_overlock.py',
    '../_base_/datasets/demo_detection.py',
    '../_base_/schedules/coco_1x.py',
    '../_base_/detection_runtime.py',
]
bbox_heads = _base_.model.roi_head.bbox_head
for head in bbox_heads:
    head.update(num_classes=9, fc_out_channels=256)
stages = _base_.model.train_cfg.rcnn
for stage in stages:
    stage.sampler.num = 32
del head, stage
model = dict(
    backbone=dict(arch='xt', drop_path_rate=0.0),
    # a few hundred iterations from random weights need a norm in the neck
    neck=dict(in_channels=[56, 112, 340, 420], norm_cfg=dict(type='BN')),
    roi_head=dict(
        bbox_head=bbox_heads,
        mask_head=dict(num_classes=9, num_convs=2, conv_out_channels=64),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=500, max_per_img=500), rcnn=stages),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=200), rcnn=dict(max_per_img=30)),
)
optim_wrapper = dict(optimizer=dict(lr=2.5e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=30),
    dict(
        type='MultiStepLR', by_epoch=True, begin=0, end=14, milestones=[11, 13], gamma=0.1
    ),
]
# --auto-scale-lr: the learning rate is for one process with 2 images
auto_scale_lr = dict(base_batch_size=2)
train_cfg = dict(max_epochs=14, val_interval=7)
default_hooks = dict(logger=dict(interval=8), checkpoint=dict(interval=1, max_keep_ckpts=2))
log_processor = dict(window_size=8)
randomness = dict(seed=0)
