# A learning rate that decays from layer to layer. The rate of 0.9 is that of ConvNeXt; the
# recipe of the released models has no such decay.
_base_ = './upernet_overlock_b.py'
optim_wrapper = dict(
    constructor='OverLoCKLayerDecayConstructor',
    paramwise_cfg=dict(
        _delete_=True, decay_rate=0.9, decay_type='layer_wise', num_layers=12
    ),
)
