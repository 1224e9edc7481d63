"""Recognising what a checkpoint holds: where its weights are, and of which OverLoCK."""

import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..archs import ARCHS
from ..errors import CheckpointError

# Keys under which checkpoints have their weights; averaged weights come first.
_WRAPPERS = ('state_dict_ema', 'model_ema', 'ema', 'state_dict', 'model')
# Prefixes that distributed and compiled models add to names.
_MODULE = re.compile(r'(?:^|(?<=backbone\.))(?:module\.|_orig_mod\.)+')
# The option of OverLoCK that gives a layout.
OPTION = {
    'classification': '',
    'segmentation': ' (context_skip=False)',
    'detection': ' (context_skip=True)',
}
_SHOWN = 5


class Kind(NamedTuple):
    """The kind of OverLoCK that a state dict belongs to."""

    # 'xt', 't', 's' or 'b'; or a dict of sizes, None for absent parts; '' if the state
    # dict has no OverLoCK
    arch: str | dict
    layout: str  # 'classification', 'segmentation' or 'detection'
    deploy: bool

    @property
    def partial(self) -> bool:
        """Whether some of the backbone's parts are absent."""
        return isinstance(self.arch, dict) and None in sum(self.arch.values(), ())

    def __str__(self):
        if not self.arch:
            return 'not an OverLoCK'
        name = f'OverLoCK-{self.arch.upper()}' if isinstance(self.arch, str) else 'OverLoCK'
        if isinstance(self.arch, dict):
            dims, depths = self.arch['embed_dims'], self.arch['depths']
            name += f' with embed_dims={dims} and depths={depths}'
        form = 'deploy' if self.deploy else 'training'
        return f'{name}, {self.layout} layout{OPTION[self.layout]}, {form} form'


def unwrap(content, source: str) -> tuple[str, dict[str, Tensor]]:
    """Find the state dict in the content of a checkpoint.

    Args:
        content: what ``read_weights`` returns.
        source: the name of the checkpoint, for errors.

    Returns:
        The key that the state dict is under ('' if the content is one itself), and its
        tensors by name, without the prefixes of distributed and compiled models.

    Raises:
        CheckpointError: if there is no state dict.
    """
    held = content if isinstance(content, dict) else {}
    found = []
    for key, inner in (*((k, held.get(k)) for k in _WRAPPERS), ('', held)):
        if not isinstance(inner, dict):
            continue
        tensors = {
            _MODULE.sub('', k): v
            for k, v in inner.items()
            if isinstance(k, str) and torch.is_tensor(v)
        }
        if tensors:
            found.append((key, tensors))
    if found:  # a key such as 'ema' may hold tensors that are not the weights
        ours = (f for f in found if any('patch_embed1.' in k for k in f[1]))
        return next(ours, found[0])
    what = f'a {type(content).__name__}'
    if isinstance(content, dict):
        keys = shown([str(k) for k in content])
        what = f'a dict with the keys {keys}' if keys else 'an empty dict'
    raise CheckpointError(
        f'{source} contains {what}, but no state dict; a checkpoint is a state dict, or '
        f'has one under {", ".join(_WRAPPERS)}'
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of distributed, compiled or test-time augmentation wrappers."""
    for name in ('_orig_mod', 'module'):
        inner = model._modules.get(name)
        if inner is not None:
            return unwrapped(inner)
    return model


def is_deploy(state: dict[str, Tensor], at: str) -> bool:
    """Whether the backbone with the prefix ``at`` is in deploy form."""
    return f'{at}blocks1.0.proj.1.lk_origin.bias' in state


def form_of(state: dict[str, Tensor], at: str = '') -> Kind:
    """Find the kind of OverLoCK of a state dict by its names and shapes.

    Args:
        state: tensors by name.
        at: prefix of the backbone's names.
    """
    own = {k.removeprefix(at): v for k, v in state.items() if k.startswith(at)}

    def sizes(axis, *names):
        held = (own.get(n) for n in names)
        return tuple(
            None if v is None or not v.ndim else v.shape[axis] or None for v in held
        )

    def depths(*parts):
        found = ({k.split('.')[1] for k in own if k.startswith(f'{p}.')} for p in parts)
        return tuple(len(blocks) or None for blocks in found)

    stems = ('patch_embed1.6.weight', *(f'patch_embed{i}.0.weight' for i in (2, 3, 4)))
    kernels = (f'blocks{i}.0.proj.1.lk_origin.weight' for i in (1, 2, 3, 4))
    heads = sizes(0, 'sub_blocks3.0.rpb1', 'sub_blocks4.0.rpb1')
    arch = dict(
        embed_dims=sizes(0, *stems),
        depths=depths('blocks1', 'blocks2', 'blocks3', 'blocks4'),
        focus_depths=depths('sub_blocks3', 'sub_blocks4'),
        kernel_sizes=sizes(-1, *kernels),
        focus_heads=tuple(h and h // 2 for h in heads),
    )
    if arch['embed_dims'][0] is None:
        return Kind('', '', False)
    for name, known in ARCHS.items():
        if all(
            v in (None, w) for k in arch for v, w in zip(arch[k], known[k], strict=True)
        ):
            arch = name
            break
    layout = 'classification'
    if any(k.startswith(('h_proj.', 'extra_norm.4.')) for k in own):
        layout = 'detection'
    elif any(k.startswith('extra_norm.') for k in own):
        layout = 'segmentation'
    return Kind(arch, layout, is_deploy(state, at))


def shown(names) -> str:
    """The first names of many."""
    return ', '.join(names[:_SHOWN]) + (', ...' if len(names) > _SHOWN else '')
