# What both tasks share; default_scope and the visualizer come with the task's runtime.
custom_imports = dict(
    imports=['overlock_mm', 'overlock_mm.hooks'], allow_failed_imports=False
)
# load_from must fit the model; options of load_checkpoint go here
default_hooks = dict(loading=dict(type='StrictLoadingHook'))
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
log_level = 'INFO'
load_from = None
resume = False
# batch norms, those of the backbone too, share statistics in distributed training
sync_bn = 'torch'
# --auto-scale-lr: learning rates are for 8 GPUs x 2 images
auto_scale_lr = dict(enable=False, base_batch_size=16)
