# MMDetection's Cascade Mask R-CNN with another backbone. The neck's in_channels follow from
# the arch, so a config that sets one sets the other.
_base_ = 'mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py'
model = dict(backbone=dict(_delete_=True, type='OverLoCK', context_skip=True))
