# What both tasks share.
custom_imports = dict(
    imports=['overlock_mm', 'overlock_mm.hooks', 'overlock_mm.datasets'],
    allow_failed_imports=False,
)
# in distributed training, batch norms (the backbone's too) share their statistics
sync_bn = 'torch'
