"""Loading weights into a model, with a report of what fitted, or saying why not."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from .weights_file import CheckpointError, read_weights

_WRAPPERS = ('state_dict', 'model', 'state_dict_ema', 'model_ema', 'ema')
# What an ImageNet classifier holds beside the backbone, and what the dense form adds.
_CLASSIFIER = ('head.', 'aux_head.')
_DENSE_ONLY = ('extra_norm.', 'h_proj.')
# The option of OverLoCK that makes a form.
_OPTION = {
    'classification': '',
    'segmentation': ' (context_skip=False)',
    'detection': ' (context_skip=True)',
}
_SHOWN = 5


class Form(NamedTuple):
    """What kind of OverLoCK a state dict is of."""

    arch: str  # 'xt', 't', 's', 'b', or sizes; empty if it is no OverLoCK at all
    task: str  # 'classification', 'segmentation' or 'detection'
    deploy: bool

    def __str__(self):
        if not self.arch:
            return 'no OverLoCK'
        form = 'deploy' if self.deploy else 'training'
        return f'OverLoCK {self.arch}, {self.task} form{_OPTION[self.task]}, {form} form'


@dataclass
class LoadReport:
    """Names of the entries of a file and of a model, by what became of them."""

    source: str
    file_form: Form
    model_form: Form
    loaded: list[str] = field(default_factory=list)
    absent: dict[str, list[str]] = field(default_factory=dict)  # by the reason
    ignored: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return not (self.unexpected or self.missing or self.mismatched)

    def __str__(self) -> str:
        rows = [('loaded', self.loaded)]
        rows += [
            (f'absent as expected: {why}', names) for why, names in self.absent.items()
        ]
        rows += [
            ('left out, as ignore_mismatched says', self.ignored),
            ('unexpected: not in the model', self.unexpected),
            ('missing from the file', self.missing),
            ('of another shape', self.mismatched),
        ]
        lines = [
            f'Weights of {self.source}',
            f'  file:  {self.file_form}',
            f'  model: {self.model_form}',
        ]
        for what, names in rows:
            if names or what == 'loaded':
                shown = '' if what == 'loaded' else f'  {_first(names)}'
                lines.append(f'  {len(names):5d} {what}{shown}')
        return '\n'.join(lines)


def load_checkpoint(
    model: nn.Module,
    source: str,
    prefix: str | None = None,
    strict: bool = True,
    ignore_mismatched: Sequence[str] = (),
    ignore_unexpected: Sequence[str] = (),
    trust: bool = False,
    map_location: str = 'cpu',
) -> LoadReport:
    """Load a checkpoint into a model with OverLoCK, and report what fitted.

    Wrappers (``state_dict``, ``model``, ``state_dict_ema``, ``ema``; ``module.``;
    ``backbone.`` for a bare backbone) are taken off. A file in training form is merged
    on its way into a model in deploy form. Absent may be: an ImageNet file's
    classifier heads from the model and the output norms of the dense form from such a
    file, the heads of a detector or segmentor from a bare backbone, and what
    ``out_indices`` leaves out. The report is printed.

    Args:
        model: an OverLoCK, or a detector or segmentor whose ``backbone`` is one.
        source: path or URL, see ``overlock_mm.weights_file.read_weights``.
        prefix: load the entries of the file whose names start with it; found by itself
            where it is ``'backbone.'``.
        strict: fail, and load nothing, if anything else is missing, unexpected or of
            another shape. Otherwise what fits is loaded.
        ignore_mismatched: begins of names, for instance ``'decode_head.conv_seg'``, of
            entries to leave as they are where their shapes differ.
        ignore_unexpected: begins of names of entries of the file to pass over.
        trust: read files that hold more than weights and plain data.
        map_location: where the tensors of the file go first.

    Raises:
        CheckpointError: if the file does not fit, or cannot be had or read.
        FileNotFoundError: if there is no such file.
        ValueError: if the model has no OverLoCK, or a folded one.
    """
    backbone = getattr(model, 'backbone', model)
    if not hasattr(backbone, 'absent_parts'):
        raise ValueError(
            f'{type(model).__name__} is no OverLoCK, and its backbone is none; '
            'load_checkpoint loads into models with one'
        )
    if backbone.folded:
        raise ValueError('a folded OverLoCK takes no checkpoint: load first, then fold')
    state = unwrap(read_weights(source, map_location, trust), source)
    own = {k: v for k, v in model.state_dict().items()}
    at = '' if model is backbone else 'backbone.'
    state, others = _select(state, prefix, at)
    report = LoadReport(str(source), _form(state, at), _form(own, at))
    if others:
        report.absent['parts of another model around the backbone'] = others
    if _is_deploy(own, at) and not _is_deploy(state, at):
        state = _merged(state)

    passed_over = {
        'classifier heads': [
            k
            for k in state
            if k not in own and k.startswith(tuple(at + p for p in _CLASSIFIER))
        ],
        'as ignore_unexpected says': [
            k for k in state if k not in own and k.startswith(tuple(ignore_unexpected))
        ],
        'what out_indices leaves out': [
            k for k in state if k.startswith(tuple(at + p for p in backbone.absent_parts()))
        ],
    }
    for why, names in passed_over.items():
        if names:
            report.absent[why] = names
            state = {k: v for k, v in state.items() if k not in set(names)}
    dense = tuple(at + p for p in _DENSE_ONLY)
    fresh = [k for k in own if k.startswith(dense) and k not in state]
    if fresh and not any(k.startswith(dense) for k in state):  # a dense file has them all
        report.absent['the output norms of the dense form start fresh'] = fresh
        own = {k: v for k, v in own.items() if k not in set(fresh)}

    for name, tensor in own.items():
        if name not in state:
            report.missing.append(name)
        elif state[name].shape == tensor.shape:
            report.loaded.append(name)
        elif name.startswith(tuple(ignore_mismatched)):
            report.ignored.append(name)
        else:
            shapes = f'file {tuple(state[name].shape)}, model {tuple(tensor.shape)}'
            report.mismatched.append(f'{name} ({shapes})')
    report.unexpected += [k for k in state if k not in own]
    print_log(str(report), logger='current')
    if strict and not report.complete:
        raise CheckpointError(_complaint(report, at))
    model.load_state_dict({k: state[k] for k in report.loaded}, strict=False)
    return report


def unwrap(content, source: str = 'the checkpoint') -> dict[str, Tensor]:
    """The tensors of a checkpoint, bare or under a usual key, by their names in a model.

    Raises:
        CheckpointError: if there is no state dict in it.
    """
    for key in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not any(map(torch.is_tensor, content.values())):
        held = f'a {type(content).__name__}'
        if isinstance(content, dict):
            held = f'a dict with {_first(list(map(str, content)))}'
        raise CheckpointError(
            f'{source} holds {held}, no state dict; weights are looked for at the top and '
            f'under {", ".join(_WRAPPERS)}'
        )
    return {k.removeprefix('module.'): v for k, v in content.items() if torch.is_tensor(v)}


def _select(state, prefix, at):
    """Entries under the model's names, and the names of the others."""
    if prefix is None:
        inside = any(k.startswith('backbone.patch_embed1.') for k in state)
        prefix = 'backbone.' if inside and not at else ''
    prefix = f'{prefix.rstrip(".")}.' if prefix else ''
    # a file of a bare backbone, for a model around one
    add = at if any(k.startswith(f'{prefix}patch_embed1.') for k in state) else ''
    others = [k for k in state if not k.startswith(prefix)]
    return {
        add + k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)
    }, others


def _is_deploy(state, at) -> bool:
    return f'{at}blocks1.0.proj.1.lk_origin.bias' in state


def _form(state, at) -> Form:
    from .models import OverLoCK

    names = [k.removeprefix(at) for k in state if k.startswith(at)]
    stems = ('patch_embed1.6.weight', *(f'patch_embed{i}.0.weight' for i in (2, 3, 4)))
    dims = [len(state[at + name]) if name in names else None for name in stems]
    if dims[0] is None:
        return Form('', '', False)
    parts = ('blocks1', 'blocks2', 'blocks3', 'blocks4', 'sub_blocks3', 'sub_blocks4')
    depths = [
        len({k.split('.')[1] for k in names if k.startswith(f'{part}.')}) for part in parts
    ]
    sizes = [s or None for s in (*dims, *depths)]  # None: not in this state dict
    arch = f'of embed_dims {dims} and depths {depths}'
    for name in ('xt', 't', 's', 'b'):
        known = OverLoCK.arch_settings[name]
        known = known['embed_dims'] + known['depths'] + known['focus_depths']
        if all(s in (None, k) for s, k in zip(sizes, known, strict=True)):
            arch = name
            break
    task = 'classification'
    if any(k.startswith(('h_proj.', 'extra_norm.4.')) for k in names):
        task = 'detection'
    elif any(k.startswith('extra_norm.') for k in names):
        task = 'segmentation'
    return Form(arch, task, _is_deploy(state, at))


def _merged(state):
    """A state dict in training form, with the dilated branches merged."""
    from .models.layers import DilatedReparamBlock

    merged = dict(state)
    for name, kernel in state.items():
        if not name.endswith('.lk_origin.weight'):
            continue
        place = name.removesuffix('lk_origin.weight')
        block = DilatedReparamBlock(len(kernel), kernel.shape[-1]).to(kernel.dtype)
        if all(place + k in state for k in block.state_dict()):  # else: told as missing
            names = [k for k in state if k.startswith(place)]
            block.load_state_dict({k.removeprefix(place): merged.pop(k) for k in names})
            block.switch_to_deploy()
            merged.update({place + k: v for k, v in block.state_dict().items()})
    return merged


def _complaint(report, at) -> str:
    problems = {
        'missing from the file': report.missing,
        'not in the model': report.unexpected,
        'of another shape': report.mismatched,
    }
    return (
        f'{report.source} does not fit this model, nothing was loaded. {listed(problems)}. '
        f'The file is {report.file_form}; the model is {report.model_form}. '
        f'{_advice(report, at)}'
    )


def listed(problems: dict[str, list[str]]) -> str:
    """One line that says which entries have which problem."""
    return '; '.join(
        f'{len(v)} entries are {what}: {_first(v)}' for what, v in problems.items() if v
    )


def _advice(report, at) -> str:
    """The options that reconcile file and model, if there are any."""
    file, model = report.file_form, report.model_form
    if not file.arch:
        return 'Give a file of OverLoCK, or prefix= if its entries have one.'
    advice = []
    if file.arch != model.arch:
        advice.append(f'arch={file.arch!r}')
    if file.task != model.task and file.task != 'classification':
        advice.append(f'{_OPTION[file.task].strip(" ()")}, for a {file.task} file')
    if file.deploy and not model.deploy:
        advice.append('deploy=True, for merged branches cannot be taken apart again')
    heads = {n.split()[0].rpartition('.')[0] for n in report.mismatched if at}
    heads = sorted(n for n in heads if not n.startswith(at))
    if heads:
        advice.append(f'ignore_mismatched={heads}, to keep those of the model')
    if not advice:
        return 'strict=False loads what fits and leaves the rest as it is.'
    return f'What reconciles them: {"; ".join(advice)}.'


def _first(names) -> str:
    return ', '.join(names[:_SHOWN]) + (', ...' if len(names) > _SHOWN else '')
