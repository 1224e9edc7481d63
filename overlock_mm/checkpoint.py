"""Loading pretrained weights into the backbone, or saying why not."""

from mmengine.logging import print_log
from torch import nn

_WRAPPERS = ('state_dict', 'model', 'state_dict_ema')
# What an ImageNet classifier holds beside the backbone, and what the dense form
# adds to it.
_CLASSIFIER = ('head.', 'aux_head.')
_DENSE_ONLY = ('extra_norm.', 'h_proj.')
_SHOWN = 5


def load_pretrained(
    backbone: nn.Module, checkpoint: str, prefix: str = '', map_location: str = 'cpu'
) -> None:
    """Load a classifier's or a backbone's weights into ``backbone``.

    Only these may differ: classifier heads may be in the file, and the output norms
    of the dense form may be absent from it (all of them together). Parts that
    ``out_indices`` leaves out of the model are passed over.

    Args:
        backbone: an :class:`OverLoCK`.
        checkpoint: path or URL of a state dict, bare or under one of the keys
            ``state_dict``, ``model`` and ``state_dict_ema``.
        prefix: load the entries whose names start with it, e.g. ``'backbone.'``.
        map_location: where the tensors of the file go first.

    Raises:
        RuntimeError: if any other entry is missing, unexpected or of another shape;
            nothing is loaded then.
    """
    # the runner package pulls in OpenCV, which the bare backbone does without
    from mmengine.runner.checkpoint import CheckpointLoader

    state_dict = CheckpointLoader.load_checkpoint(
        checkpoint, map_location, logger='current'
    )
    if not isinstance(state_dict, dict):
        raise RuntimeError(
            f'{checkpoint} holds a {type(state_dict).__name__}, no state dict'
        )
    state_dict = unwrap(state_dict)
    prefix = f'{prefix.rstrip(".")}.' if prefix else ''
    passed_over = _CLASSIFIER + backbone.absent_parts()
    state_dict = {
        k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)
    }
    state_dict = {k: v for k, v in state_dict.items() if not k.startswith(passed_over)}

    own = backbone.state_dict()
    fresh = {k for k in own if k.startswith(_DENSE_ONLY)}
    if fresh & set(state_dict):  # a dense file: then it holds all of them
        fresh = set()
    problems = {
        'missing from the file': [k for k in own if k not in state_dict and k not in fresh],
        'not in the model': [k for k in state_dict if k not in own],
        'of another shape': [
            f'{k} (file {tuple(state_dict[k].shape)}, model {tuple(v.shape)})'
            for k, v in own.items()
            if k in state_dict and state_dict[k].shape != v.shape
        ],
    }
    if any(problems.values()):
        raise RuntimeError(
            f'{checkpoint} does not hold the weights of this backbone, nothing was '
            f'loaded. {listed(problems)}. Check arch, deploy and context_skip of the '
            'backbone and the prefix in the file.'
        )
    backbone.load_state_dict(state_dict, strict=not fresh)
    news = f'; the {len(fresh)} of the output norms start fresh' if fresh else ''
    print_log(f'Loaded {len(state_dict)} entries from {checkpoint}{news}', logger='current')


def unwrap(checkpoint: dict) -> dict:
    """The state dict in a checkpoint, bare or under a usual key, as of a bare model."""
    for key in _WRAPPERS:
        if isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
            break
    return {k.removeprefix('module.'): v for k, v in checkpoint.items()}


def listed(problems: dict[str, list[str]]) -> str:
    """One line that says which entries have which problem."""
    return '; '.join(
        f'{len(v)} entries are {what}: {", ".join(v[:_SHOWN])}'
        f'{", ..." if len(v) > _SHOWN else ""}'
        for what, v in problems.items()
        if v
    )
