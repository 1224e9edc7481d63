# Smaller learning rates near the image. The rate of 0.9 over 12 layers is that of
# MMSegmentation's ConvNeXt-B, not from the recipe of OverLoCK's paper; tune it.
_base_ = './cascade_mask_rcnn_overlock_b.py'
optim_wrapper = dict(
    constructor='OverLoCKLayerDecayConstructor',
    paramwise_cfg=dict(decay_rate=0.9, num_layers=12),
)
