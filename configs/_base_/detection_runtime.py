_base_ = ['./default_runtime.py', 'mmdet::_base_/default_runtime.py']
default_hooks = dict(
    # load_from must fit the model; options of load_checkpoint go here
    loading=dict(type='StrictLoadingHook'),
    # auto: the first metric of the evaluator, which is box AP for COCO
    checkpoint=dict(max_keep_ckpts=3, save_best='auto'),
)
# for --tta, with the tta_pipeline of the data set
tta_model = dict(
    type='DetTTAModel',
    tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
)
