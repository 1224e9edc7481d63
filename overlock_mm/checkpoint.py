"""Loading weights into a model, with a report of what fitted, or saying why not."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from .weights_file import CheckpointError, read_weights

# Where a checkpoint has its weights; of averaged and last ones, the averaged ones.
_WRAPPERS = ('state_dict_ema', 'model_ema', 'ema', 'state_dict', 'model')
# Parts of names that distributed and compiled models add.
_MODULE = re.compile(r'(?:^|(?<=backbone\.))(?:module\.|_orig_mod\.)+')
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
        return f'OverLoCK {arch}, {self.task} form{_OPTION[self.task]}, {form} form'


@dataclass
class LoadReport:
    """Names of the entries of a file and of a model, by what became of them."""

    source: str
    key: str  # under which the file has its weights
    file_form: Form
    model_form: Form
    loaded: list[str] = field(default_factory=list)
    absent: dict[str, list[str]] = field(default_factory=dict)  # by the reason
    ignored: dict[str, Tensor] = field(default_factory=dict)  # as in the file
    ignored_for: str = 'left out, as ignore_mismatched says'
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
            (f'of another shape: {self.ignored_for}', list(self.ignored)),
            ('unexpected: not in the model', self.unexpected),
            ('missing from the file', self.missing),
            ('of another shape', self.mismatched),
        ]
        key = f', under {self.key!r}' if self.key else ''
        lines = [
            f'Weights of {self.source}{key}',
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

    Wrappers (``state_dict_ema``, ``ema``, ``state_dict``, ``model``; ``module.``;
    ``backbone.`` for a bare backbone) are taken off. A file in training form is merged
    on its way into a model in deploy form. Absent may be: an ImageNet file's
    classifier heads from the model and the output norms of the dense form from such a
    file, the heads of a detector or segmentor from a bare backbone, and what
    ``out_indices`` leaves out. The report is printed.

    ``init_cfg=dict(type='Pretrained', checkpoint=source, ...)`` of :class:`OverLoCK`
    takes the same options, and so does :class:`overlock_mm.hooks.StrictLoadingHook`,
    for ``load_from`` of a config.

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
        CheckpointError: if the file does not fit, or cannot be had or read, or the model
            has no OverLoCK, or one that is folded or compiled.
    """
    model = unwrapped(model)
    content = read_weights(source, map_location, trust)
    report, state = fit(
        model, content, source, prefix, strict, ignore_mismatched, ignore_unexpected
    )
    model.load_state_dict(state, strict=False)
    return report


def fit(
    model: nn.Module,
    content,
    source: str = 'the checkpoint',
    prefix: str | None = None,
    strict: bool = True,
    ignore_mismatched: Sequence[str] = (),
    ignore_unexpected: Sequence[str] = (),
    logger: str = 'current',
) -> tuple[LoadReport, dict[str, Tensor]]:
    """Find what a model can load of a checkpoint; the model stays as it is.

    ``content`` is what the file of name ``source`` holds; else arguments and errors are
    those of :func:`load_checkpoint`. The report goes to ``logger``, which may be
    ``'silent'``.

    Returns:
        The report, and the entries that fit, by the model's names.
    """
    backbone = getattr(model, 'backbone', model)
    if not hasattr(backbone, 'absent_parts'):
        raise CheckpointError(
            f'{type(model).__name__} is no OverLoCK, and its backbone is none; '
            'load_checkpoint loads into models with one'
        )
    if backbone.folded:
        raise CheckpointError('a folded OverLoCK takes no weights: load first, then fold')
    if isinstance(getattr(backbone, '_orig_mod', None), nn.Module):
        raise CheckpointError('a compiled backbone takes no weights: load, then compile')
    ignore_mismatched = _begins('ignore_mismatched', ignore_mismatched)
    ignore_unexpected = _begins('ignore_unexpected', ignore_unexpected)
    key, state = unwrap(content, source)
    own = dict(model.state_dict())
    at = '' if model is backbone else 'backbone.'
    state, others, bare = _select(state, prefix, at, source)
    report = LoadReport(str(source), key, form_of(state, at), form_of(own, at))
    if others:
        report.absent['parts of another model around the backbone'] = others
    if _is_deploy(own, at) and not _is_deploy(state, at):
        state = _merged(state)

    heads, left_out, dense = (
        tuple(at + part for part in parts)
        for parts in (_CLASSIFIER, backbone.absent_parts(), _DENSE_ONLY)
    )
    state = _set_apart(
        report,
        state,
        {
            'classifier heads': lambda k: k.startswith(heads) and k not in own,
            'as ignore_unexpected says': lambda k: (
                k.startswith(ignore_unexpected) and k not in own
            ),
            'what out_indices leaves out': lambda k: k.startswith(left_out),
        },
    )
    reasons = {
        'counters of batches, which old files lack': lambda k: (
            k.endswith('.num_batches_tracked') and k not in state
        )
    }
    # a file of a whole model, or with some of the output norms, should have them all
    if (not at or bare) and not any(k.startswith(dense) for k in state):
        fresh = 'the output norms of the dense form start fresh'
        reasons[fresh] = lambda k: k.startswith(dense)
    own = _set_apart(report, own, reasons)

    for name, tensor in own.items():
        if name not in state:
            report.missing.append(name)
        elif state[name].shape == tensor.shape:
            report.loaded.append(name)
        elif name.startswith(ignore_mismatched):
            report.ignored[name] = state[name]
        else:
            shapes = f'file {tuple(state[name].shape)}, model {tuple(tensor.shape)}'
            report.mismatched.append(f'{name} ({shapes})')
    report.unexpected += [k for k in state if k not in own]
    print_log(str(report), logger=logger)
    if strict and not report.complete or not report.loaded:
        raise CheckpointError(_complaint(report, at, bare))
    return report, {k: state[k] for k in report.loaded}


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
        what = f'a dict with {_first(list(map(str, content))) or "nothing in it"}'
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


def _set_apart(report, entries, reasons):
    """Entries without those that are expected to be in the file or the model alone."""
    for why, expected in reasons.items():
        names = [k for k in entries if expected(k)]
        if names:
            report.absent[why] = names
            entries = {k: v for k, v in entries.items() if not expected(k)}
    return entries


def _begins(option, names):
    names = (names,) if isinstance(names, str) else tuple(names)
    if not all(names):
        raise CheckpointError(f'{option}={names} has an empty name, which is in any other')
    return names


def _select(state, prefix, at, source):
    """Entries under the model's names, names of the others, whether the file has no more.

    The last is about a model around a backbone, and a file of a backbone alone.
    """
    if prefix is None:
        inside = any(k.startswith('backbone.patch_embed1.') for k in state)
        prefix = 'backbone.' if inside and not at else ''
    prefix = f'{prefix.rstrip(".")}.' if prefix else ''
    others = [k for k in state if not k.startswith(prefix)]
    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if not state:
        begins = sorted({k.partition('.')[0] for k in others})
        raise CheckpointError(
            f'{source} has no entry that begins with prefix={prefix!r}; its entries begin '
            f'with {_first(begins)}'
        )
    bare = at != '' and any(k.startswith('patch_embed1.') for k in state)
    return {(at if bare else '') + k: v for k, v in state.items()}, others, bare


def _is_deploy(state, at) -> bool:
    return f'{at}blocks1.0.proj.1.lk_origin.bias' in state


def form_of(state: dict[str, Tensor], at: str = '') -> Form:
    """What a state dict is of, by its entries.

    Args:
        state: tensors by their names.
        at: what the names of the backbone's entries begin with.
    """
    from .models import OverLoCK

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
    for name in ('xt', 't', 's', 'b'):
        known = OverLoCK.arch_settings[name]
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
    return Form(arch, task, _is_deploy(state, at))


def _merged(state):
    """A state dict in training form, with the dilated branches merged."""
    from .models.layers import DILATED_BRANCHES, DilatedReparamBlock

    merged = dict(state)
    for name, kernel in state.items():
        if not name.endswith('.lk_origin.weight'):
            continue
        if kernel.ndim != 4 or kernel.shape[-1] not in DILATED_BRANCHES:
            continue  # told as of another shape
        place = name.removesuffix('lk_origin.weight')
        block = DilatedReparamBlock(len(kernel), kernel.shape[-1])
        # half precision would be rounded twice
        block.to(torch.promote_types(kernel.dtype, torch.float32))
        shapes = {place + k: v.shape for k, v in block.state_dict().items()}
        if all(k in state and state[k].shape == v for k, v in shapes.items()):
            block.load_state_dict({k.removeprefix(place): merged.pop(k) for k in shapes})
            block.switch_to_deploy()
            merged.update({place + k: v for k, v in block.state_dict().items()})
    return merged


def _complaint(report, at, bare) -> str:
    problems = {
        'missing from the file': report.missing,
        'not in the model': report.unexpected,
        'of another shape': report.mismatched,
    }
    return (
        f'{report.source} does not fit this model, nothing was loaded. '
        f'{_listed(problems)}. The file is {report.file_form}; '
        f'the model is {report.model_form}. {_advice(report, at, bare)}'
    )


def _listed(problems: dict[str, list[str]]) -> str:
    """One line that says which entries have which problem."""
    return '; '.join(
        f'{len(v)} entries are {what}: {_first(v)}' for what, v in problems.items() if v
    )


def _advice(report, at, bare) -> str:
    """The options that reconcile file and model, if there are any."""
    file, model = report.file_form, report.model_form
    if not file.arch:
        return 'Give a file of OverLoCK, or prefix= if its entries have one.'
    heads = [n for n in report.missing if at and not n.startswith(at)]
    if bare and heads:
        return (
            'It is a backbone alone, which goes into init_cfg=dict(type="Pretrained", '
            'checkpoint=...) of the backbone.'
        )
    if heads and any(not n.startswith(at) for n in report.unexpected):
        return (
            'It is of a model with other heads. Its backbone alone goes into '
            'init_cfg=dict(type="Pretrained", checkpoint=..., prefix="backbone.") of the '
            f'backbone{_OPTION[file.task]}.'
        )
    advice = []
    partial = isinstance(file.arch, dict) and None in sum(file.arch.values(), ())
    if file.arch != model.arch and not partial:
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
