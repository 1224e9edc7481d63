"""Loading weights into a model, with a report of what fitted, or saying why not."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from ..archs import DILATED_BRANCHES
from ..errors import CheckpointError
from ..ops.reparam import branch_names, merge_branches
from .files import read_weights
from .forms import OPTION, Form, first, form_of, is_deploy, unwrap, unwrapped

# What an ImageNet classifier holds beside the backbone, and what the dense form adds.
_CLASSIFIER = ('head.', 'aux_head.')
_DENSE_ONLY = ('extra_norm.', 'h_proj.')


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
                shown = '' if what == 'loaded' else f'  {first(names)}'
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
        source: path or URL, see ``overlock_mm.checkpoint.read_weights``.
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
    if is_deploy(own, at) and not is_deploy(state, at):
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
            f'with {first(begins)}'
        )
    bare = at != '' and any(k.startswith('patch_embed1.') for k in state)
    return {(at if bare else '') + k: v for k, v in state.items()}, others, bare


def _merged(state):
    """A state dict in training form, with the dilated branches merged."""
    merged = dict(state)
    for name, kernel in state.items():
        place, is_large, _ = name.rpartition('lk_origin.weight')
        size = kernel.shape[-1] if kernel.ndim == 4 else None
        if not is_large or size not in DILATED_BRANCHES:
            continue  # reported as a shape mismatch
        own = {k.removeprefix(place): v for k, v in state.items() if k.startswith(place)}
        if not _has_branches(own, kernel):
            continue
        weight, bias = merge_branches(own, size)
        # half precision would be rounded twice
        dtype = torch.promote_types(kernel.dtype, torch.float32)
        for k in own:
            del merged[place + k]
        merged[f'{place}lk_origin.weight'] = weight.to(dtype)
        merged[f'{place}lk_origin.bias'] = bias.to(dtype)
    return merged


def _has_branches(own, kernel) -> bool:
    """Whether all branches of a large kernel are there, in the shapes that it needs."""
    channels, size = len(kernel), kernel.shape[-1]
    shapes = {}
    for conv, (bn, k, _) in branch_names(size).items():
        shapes[f'{conv}.weight'] = (channels, 1, k, k)
        for part in ('weight', 'bias', 'running_mean', 'running_var'):
            shapes[f'{bn}.{part}'] = (channels,)
    return all(k in own and own[k].shape == shape for k, shape in shapes.items())


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
        f'{len(v)} entries are {what}: {first(v)}' for what, v in problems.items() if v
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
            f'backbone{OPTION[file.task]}.'
        )
    advice = []
    partial = isinstance(file.arch, dict) and None in sum(file.arch.values(), ())
    if file.arch != model.arch and not partial:
        advice.append(f'arch={file.arch!r}')
    if file.task != model.task and file.task != 'classification':
        advice.append(f'{OPTION[file.task].strip(" ()")}, for a {file.task} file')
    if file.deploy and not model.deploy:
        advice.append('deploy=True, for merged branches cannot be taken apart again')
    heads = {n.split()[0].rpartition('.')[0] for n in report.mismatched if at}
    heads = sorted(n for n in heads if not n.startswith(at))
    if heads:
        advice.append(f'ignore_mismatched={heads}, to keep those of the model')
    if not advice:
        return 'strict=False loads what fits and leaves the rest as it is.'
    return f'What reconciles them: {"; ".join(advice)}.'
