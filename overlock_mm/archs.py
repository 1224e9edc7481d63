"""The architectures and what follows from their sizes. Imports nothing of the package."""

from collections.abc import Mapping

# Strides of the four output maps.
STRIDES = (4, 8, 16, 32)
# The architectures of the paper. Base-Net: stages 1 to 3; Overview-Net: stage 4;
# Focus-Net: two stages, on the maps of strides 16 and 32.
#   depths: blocks of stages 1 to 4
#   focus_depths: blocks of the two stages of the Focus-Net
#   embed_dims: channels of stages 1 to 4; the Focus-Net has those of stages 3 and 4
#   kernel_sizes: large kernels, likewise
#   focus_heads: in each stage of the Focus-Net, ContMix has twice as many heads a kernel
ARCHS = dict(
    xt=dict(
        depths=(2, 2, 3, 2),
        focus_depths=(6, 2),
        embed_dims=(56, 112, 256, 336),
        kernel_sizes=(17, 15, 13, 7),
        focus_heads=(4, 6),
    ),
    t=dict(
        depths=(4, 4, 6, 2),
        focus_depths=(12, 2),
        embed_dims=(64, 128, 256, 512),
        kernel_sizes=(17, 15, 13, 7),
        focus_heads=(4, 8),
    ),
    s=dict(
        depths=(6, 6, 8, 3),
        focus_depths=(16, 3),
        embed_dims=(64, 128, 320, 512),
        kernel_sizes=(17, 15, 13, 7),
        focus_heads=(8, 16),
    ),
    b=dict(
        depths=(8, 8, 10, 4),
        focus_depths=(20, 4),
        embed_dims=(80, 160, 384, 576),
        kernel_sizes=(17, 15, 13, 7),
        focus_heads=(6, 9),
    ),
)
ARCHS |= {
    'extreme-tiny': ARCHS['xt'],
    'tiny': ARCHS['t'],
    'small': ARCHS['s'],
    'base': ARCHS['b'],
}
# Stochastic depth rates of the released segmentation and detection models; for xt, of which
# there are none, that of its classifier.
DENSE_DROP_PATH = dict(
    mmseg=dict(xt=0.1, t=0.2, s=0.3, b=0.5), mmdet=dict(xt=0.1, t=0.2, s=0.4, b=0.6)
)
_FIELDS = dict(depths=4, focus_depths=2, embed_dims=4, kernel_sizes=4, focus_heads=2)
# The children of the backbone that are built only if a map of this index or a later one
# is returned.
PARTS_FROM = {
    1: ('patch_embed2', 'blocks2'),
    2: (
        'patch_embed3',
        'blocks3',
        'patch_embed4',
        'blocks4',
        'high_level_proj',
        'sub_blocks3',
    ),
    3: ('patch_embedx', 'sub_blocks4'),
}
# Kernel size and dilation of the branches beside each large kernel, as in UniRepLKNet
# (https://arxiv.org/abs/2311.15599).
DILATED_BRANCHES = {
    19: ((5, 1), (7, 1), (9, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    5: ((3, 1), (3, 2)),
}


def settings_of(
    arch: str | dict, archs: Mapping[str, dict] = ARCHS
) -> dict[str, tuple[int, ...]]:
    """The sizes of an architecture.

    Args:
        arch: a name in ``archs`` ('xt', 't', 's', 'b', or in full 'extreme-tiny',
            'tiny', 'small', 'base'), or a dict with the fields of ``ARCHS``.
        archs: the named architectures.

    Returns:
        A dict with the fields of ``ARCHS``.

    Raises:
        ValueError: if the name is unknown, if fields are missing or unknown, or if the
            sizes do not fit together.
    """
    if isinstance(arch, str):
        if arch not in archs:
            raise ValueError(
                f'arch={arch!r} is unknown; choose one of {sorted(archs)}, or give a dict '
                f'with the fields {sorted(_FIELDS)}'
            )
        arch = archs[arch]
    settings = {k: (v,) if isinstance(v, int) else tuple(v) for k, v in arch.items()}
    lengths = {k: len(v) for k, v in settings.items()}
    if lengths != _FIELDS:
        raise ValueError(
            f'an arch dict must have exactly these fields and lengths: {_FIELDS}, got '
            f'{lengths}'
        )
    if min(v for values in settings.values() for v in values) < 1:
        raise ValueError(f'every number in an arch dict must be at least 1, got {arch}')
    dims, heads = settings['embed_dims'], settings['focus_heads']
    if (
        dims[0] % 2
        or dims[3] % 4
        or any(d % (4 * h) for d, h in zip(dims[2:], heads, strict=True))
    ):
        raise ValueError(
            f'embed_dims={dims} must be even in stage 1, a multiple of 4 in stage 4, and a '
            f'multiple of 4 * focus_heads in stages 3 and 4, with focus_heads={heads}'
        )
    return settings


def context_channels(settings: Mapping[str, tuple[int, ...]]) -> int:
    """Channels of the context that the Overview-Net gives to the Focus-Net."""
    return settings['embed_dims'][3] // 4


def map_channels(settings: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int, int]:
    """Channels of the four output maps, in the order of ``STRIDES``."""
    dims, context = settings['embed_dims'], context_channels(settings)
    return dims[0], dims[1], dims[2] + context, dims[3] + context
