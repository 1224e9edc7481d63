# Written out, as are the other base files for segmentation: mmengine does not find
# 'mmseg::' base files where MMSegmentation is installed as onedl-mmsegmentation.
_base_ = './default_runtime.py'
default_scope = 'mmseg'
default_hooks = dict(
    # load_from must fit the model; options of load_checkpoint go here
    loading=dict(type='StrictLoadingHook'),
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(
        type='CheckpointHook',
        by_epoch=False,
        interval=8000,
        max_keep_ckpts=3,
        save_best='mIoU',
    ),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'),
)
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
visualizer = dict(
    type='SegLocalVisualizer',
    vis_backends=[dict(type='LocalVisBackend')],
    name='visualizer',
    alpha=0.6,
)
log_processor = dict(by_epoch=False)
log_level = 'INFO'
load_from = None
resume = False
# for --tta, with the tta_pipeline of the data set
tta_model = dict(type='SegTTAModel')
