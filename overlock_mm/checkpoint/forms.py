"""Recognising what a checkpoint holds: where its weights are, and of what form they are."""

import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..archs import ARCHS
from ..errors import CheckpointError

# Where a checkpoint has its weights; of averaged and last ones, the averaged ones.
_WRAPPERS = ('state_dict_ema', 'model_ema', 'ema', 'state_dict', 'model')
# Parts of names that distributed and compiled models add.
_MODULE = re.compile(r'(?:^|(?<=backbone\.))(?:module\.|_orig_mod\.)+')
# The option of OverLoCK that makes a form.
OPTION = {
    'classification': '',
    'segmentation': ' (context_skip=False)',
    'detection': ' (context_skip=True)',
}
_SHOWN = 5


class Form(NamedTuple):
    """What kind of OverLoCK a state dict is of."""

    # 'xt', 't', 's', 'b', or a dict of sizes, None where parts are absent; '' if it is
    # no OverLoCK at all
    arch: str | dict
    task: str  # 'classification', 'segmentation' or 'detection'
    deploy: bool

    def __str__(self):
        if not self.arch:
            return 'no OverLoCK'
        form = 'deploy' if self.deploy else 'training'
        arch = self.arch
        if isinstance(arch, dict):
            arch = f'of embed_dims {arch["embed_dims"]} and depths {arch["depths"]}'
        return f'OverLoCK {arch}, {self.task} form{OPTION[self.task]}, {form} form'


def unwrap(content, source: str) -> tuple[str, dict[str, Tensor]]:
    """The key that a checkpoint has its tensors under ('' if bare), and the tensors.

    Raises:
        CheckpointError: if there is no state dict in it.
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
    if found:  # beside averaged weights there may be tensors that are none
        ours = (f for f in found if any('patch_embed1.' in k for k in f[1]))
        return next(ours, found[0])
    what = f'a {type(content).__name__}'
    if isinstance(content, dict):
        what = f'a dict with {first(list(map(str, content))) or "nothing in it"}'
    raise CheckpointError(
        f'{source} holds {what}, no state dict; weights are looked for at the top and '
        f'under {", ".join(_WRAPPERS)}'
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model in distributed, compiled, or augmented ones."""
    for name in ('_orig_mod', 'module'):
        inner = model._modules.get(name)
        if inner is not None:
            return unwrapped(inner)
    return model


def is_deploy(state, at) -> bool:
    return f'{at}blocks1.0.proj.1.lk_origin.bias' in state


def form_of(state: dict[str, Tensor], at: str = '') -> Form:
    """What a state dict is of, by its entries.

    Args:
        state: tensors by their names.
        at: what the names of the backbone's entries begin with.
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
        return Form('', '', False)
    for name, known in ARCHS.items():
        if all(
            v in (None, w) for k in arch for v, w in zip(arch[k], known[k], strict=True)
        ):
            arch = name
            break
    task = 'classification'
    if any(k.startswith(('h_proj.', 'extra_norm.4.')) for k in own):
        task = 'detection'
    elif any(k.startswith('extra_norm.') for k in own):
        task = 'segmentation'
    return Form(arch, task, is_deploy(state, at))


def first(names) -> str:
    return ', '.join(names[:_SHOWN]) + (', ...' if len(names) > _SHOWN else '')
