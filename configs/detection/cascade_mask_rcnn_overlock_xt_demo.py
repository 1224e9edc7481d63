# A few minutes on two CPU cores, from scratch: a check that everything works.
_base_ = [
    '../_base_/models/cascade_mask_rcnn_overlock.py',
    '../_base_/datasets/demo_detection.py', '../_base_/schedules/coco_1x.py',
    '../_base_/detection_runtime.py'
]
classes = 9
_base_.model.roi_head.mask_head.num_classes = classes
for head in _base_.model.roi_head.bbox_head:
    head.num_classes = classes
    head.fc_out_channels = 256
for stage in _base_.model.train_cfg.rcnn:
    stage.sampler.num = 64
del head, stage
model = dict(
    backbone=dict(arch='xt', drop_path_rate=0.0),
    neck=dict(in_channels=[56, 112, 340, 420]),
    roi_head=dict(bbox_head=_base_.model.roi_head.bbox_head),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=500), rcnn=_base_.model.train_cfg.rcnn))
optim_wrapper = dict(optimizer=dict(lr=4e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=30),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=12, milestones=[9, 11], gamma=0.1),
]
train_cfg = dict(val_interval=4)
default_hooks = dict(
    logger=dict(interval=8), checkpoint=dict(interval=1, max_keep_ckpts=1))
log_processor = dict(window_size=8)
randomness = dict(seed=0)
