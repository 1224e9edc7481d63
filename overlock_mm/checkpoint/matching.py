"""Loading weights into a model: what fits is reported, and what does not is an error."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from ..archs import DILATED_BRANCHES
from ..errors import CheckpointError
from ..openmmlab import print_log
from ..ops.reparam import branch_names, merge_branches
from .files import read_weights
from .kinds import form_of, is_deploy, shown, unwrap, unwrapped
from .report import LoadOptions, LoadReport, dataset_meta_of

# What an ImageNet classifier has beside the backbone, and what dense prediction adds.
_CLASSIFIER = ('head.', 'aux_head.')
_DENSE_ONLY = ('extra_norm.', 'h_proj.')


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
    """Load a checkpoint into a model with OverLoCK, strictly, and print a report.

    The weights may be under ``state_dict_ema``, ``model_ema``, ``ema``, ``state_dict`` or
    ``model``, and names may have the prefix ``module.``, or ``backbone.`` for a bare
    backbone. A file in training form is merged for a model in deploy form. These keys may
    be absent without an error: the classifier heads of an ImageNet file, the output norms
    of dense prediction that it does not have, the heads of a detector or segmentor around
    a bare backbone, and what ``out_indices`` leaves out.

    A whole detector or segmentor also gets ``model.dataset_meta``, the class names and
    palette, from the file.

    ``init_cfg=dict(type='Pretrained', checkpoint=source, ...)`` of :class:`OverLoCK`
    has the same options, and :class:`overlock_mm.hooks.StrictLoadingHook` has them for
    ``load_from`` of a config.

    Args:
        model: an OverLoCK, or a detector or segmentor whose ``backbone`` is one.
        source: path or URL, see ``overlock_mm.checkpoint.read_weights``.
        prefix: load only the keys of the file that start with this prefix, without it.
        strict: raise an error, and load nothing, if another key is missing or unexpected
            or has another shape. If False, load what fits.
        ignore_mismatched: prefixes of keys, such as ``'decode_head.conv_seg'``, that keep
            the model's values if the shape in the file is another.
        ignore_unexpected: prefixes of keys of the file that are skipped.
        trust: read files that hold more than weights and plain data, which can run code.
        map_location: where the tensors of the file go first.

    Returns:
        The report, which has the keys by what became of them.

    Raises:
        CheckpointError: if the file does not fit, or cannot be found, downloaded or read,
            or if the model has no OverLoCK, or one that is folded or compiled.
    """
    options = LoadOptions(prefix, strict, ignore_mismatched, ignore_unexpected, trust)
    model = unwrapped(model)
    content = read_weights(source, map_location, trust)
    report, state = fit(model, content, source, options)
    model.load_state_dict(state, strict=False)
    if report.dataset_meta:
        model.dataset_meta = report.dataset_meta
    return report


def fit(
    model: nn.Module,
    content,
    source: str = 'the checkpoint',
    options: LoadOptions | None = None,
    logger: str = 'current',
) -> tuple[LoadReport, dict[str, Tensor]]:
    """Find what a model can load from a checkpoint. The model stays as it is.

    Args:
        model: as in :func:`load_checkpoint`.
        content: what ``read_weights`` returns.
        source: the name of the checkpoint, for the report and errors.
        options: what may differ.
        logger: mmengine's name of the logger for the report; ``'silent'`` for none.

    Returns:
        The report, and the tensors that fit, by the model's names.

    Raises:
        CheckpointError: as in :func:`load_checkpoint`.
    """
    options = options or LoadOptions()
    backbone = _backbone_of(model)
    at = '' if model is backbone else 'backbone.'
    key, tensors = unwrap(content, source)
    selected = _select(tensors, options.prefix, at, source)
    own = model.state_dict()
    report = LoadReport(str(source), key, form_of(selected.state, at), form_of(own, at))
    state = selected.state
    if is_deploy(own, at) and not is_deploy(state, at):
        state = _merge(state)

    report.skipped, state = _split(state, _only_in_file(backbone, own, at, options))
    if selected.others:
        report.skipped['parts around the backbone'] = selected.others
    whole = at != '' and not selected.bare
    report.kept, own = _split(own, _only_in_model(state, at, whole))
    first = f'{at}patch_embed1.0.weight'
    if not whole and not first.startswith(options.ignore_mismatched):
        state = _adapt_channels(report, state, own, first)
    _compare(report, state, own, options.ignore_mismatched)
    if whole:
        report.dataset_meta = dataset_meta_of(content)

    print_log(str(report), logger=logger)
    if not report.loaded or options.strict and not report.complete:
        raise CheckpointError(report.complaint(at, selected.bare))
    return report, {name: state[name] for name in report.loaded}


def check_form(backbone: nn.Module, state: dict[str, Tensor], at: str) -> None:
    """Raise an error if a state dict is of another form than a backbone, or other sizes.

    Keys may be missing: a state dict may hold a part of the weights.

    Args:
        backbone: the OverLoCK.
        state: the state dict of it or of a model around it.
        at: prefix of the backbone's keys.

    Raises:
        CheckpointError: if it is.
    """
    own = {at + name: p for name, p in backbone.named_parameters()}
    merged = is_deploy(state, at)
    branches = f'{at}blocks1.0.proj.1.origin_bn.weight' in state
    others = [k for k, p in own.items() if k in state and _other_shape(p, state[k])]
    if (merged and not backbone.deploy) or (branches and backbone.deploy) or others:
        advice = ''
        if branches and backbone.deploy:
            advice = 'overlock_mm.load_checkpoint merges the branches while it loads. '
        elif merged and not backbone.deploy:
            advice = 'Build the model with backbone.deploy=True. '
        shown_keys = f'; the shapes differ of {shown(others)}' if others else ''
        raise CheckpointError(
            f'these weights do not fit the backbone. They are of {form_of(state, at)}; the '
            f'model is {form_of(backbone.state_dict(prefix=at), at)}{shown_keys}. '
            f'{advice}Nothing was loaded into the backbone'
        )


def _other_shape(own: Tensor, given) -> bool:
    # a parameter without elements is one that is kept elsewhere (ZeRO)
    return torch.is_tensor(given) and own.numel() > 0 and own.shape != given.shape


def _backbone_of(model):
    """The OverLoCK that is the model or its backbone."""
    backbone = getattr(model, 'backbone', model)
    if isinstance(getattr(backbone, '_orig_mod', None), nn.Module):
        raise CheckpointError('a compiled backbone cannot load weights: load, then compile')
    if not hasattr(backbone, 'absent_parts'):
        raise CheckpointError(
            f'{type(model).__name__} is not an OverLoCK, and neither is its backbone; '
            'load_checkpoint is for models with an OverLoCK'
        )
    if backbone.folded:
        raise CheckpointError(
            'a folded backbone cannot load weights: load first, then fold'
        )
    return backbone


class _Selected(NamedTuple):
    state: dict[str, Tensor]  # by the names of the model
    others: list[str]  # keys without the prefix
    bare: bool  # whether it is a backbone alone, for a model around one


def _select(tensors, prefix, at, source) -> _Selected:
    """The tensors that have the prefix, under the names that the model has."""
    if prefix is None:
        inside = any(name.startswith('backbone.patch_embed1.') for name in tensors)
        prefix = 'backbone.' if inside and not at else ''
    prefix = f'{prefix.rstrip(".")}.' if prefix else ''
    others = [name for name in tensors if not name.startswith(prefix)]
    state = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
    if not state:
        starts = sorted({name.partition('.')[0] for name in others})
        raise CheckpointError(
            f'{source} has no key that starts with prefix={prefix!r}; its keys start with '
            f'{shown(starts)}'
        )
    bare = at != '' and any(name.startswith('patch_embed1.') for name in state)
    if bare:
        state = {at + name: value for name, value in state.items()}
    return _Selected(state, others, bare)


_Reasons = dict[str, Callable[[str], bool]]


def _only_in_file(backbone, own: Iterable[str], at: str, options) -> _Reasons:
    """Keys that the model need not have, by the reason."""
    heads = tuple(at + part for part in _CLASSIFIER)
    left_out = tuple(at + part for part in backbone.absent_parts())
    own = set(own)
    return {
        'classifier heads': lambda k: k.startswith(heads) and k not in own,
        'ignore_unexpected': lambda k: (
            k.startswith(options.ignore_unexpected) and k not in own
        ),
        'out_indices does not need them': lambda k: k.startswith(left_out),
    }


def _only_in_model(state: Iterable[str], at: str, whole: bool) -> _Reasons:
    """Keys that the file need not have, by the reason."""
    dense = tuple(at + part for part in _DENSE_ONLY)
    state = set(state)
    reasons = {
        'batch counters, which old files do not have': lambda k: (
            k.endswith('.num_batches_tracked') and k not in state
        )
    }
    # a whole model has them, and so does a file with some of them
    if not whole and not any(k.startswith(dense) for k in state):
        reasons['output norms, which ImageNet files do not have'] = lambda k: k.startswith(
            dense
        )
    return reasons


def _split(state: dict, reasons: _Reasons) -> tuple[dict[str, list[str]], dict]:
    """The keys for which there is a reason, by the reason, and the state without them."""
    found = {}
    for why, applies in reasons.items():
        names = [name for name in state if applies(name)]
        if names:
            found[why] = names
            state = {name: value for name, value in state.items() if not applies(name)}
    return found, state


def _compare(report: LoadReport, state, own, ignore_mismatched) -> None:
    """Enter the keys of file and model into the report."""
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
    report.unexpected = [name for name in state if name not in own]


def _adapt_channels(
    report: LoadReport, state: dict[str, Tensor], own: dict[str, Tensor], name: str
) -> dict[str, Tensor]:
    """Adapt the first convolution of an RGB image to other channels, as timm does."""
    if name not in state or name not in own:
        return state
    theirs, ours = state[name], own[name]
    if theirs.shape[1] != 3 or ours.shape[1] == 3 or theirs.shape[2:] != ours.shape[2:]:
        return state
    report.adapted[ours.shape[1]] = [name]
    return {**state, name: adapt_input_conv(ours.shape[1], theirs)}


def _merge(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Merge the dilated branches of a state dict in training form."""
    merged = dict(state)
    for name, kernel in state.items():
        place, is_large, _ = name.rpartition('lk_origin.weight')
        size = kernel.shape[-1] if kernel.ndim == 4 else None
        if not is_large or size not in DILATED_BRANCHES:
            continue  # reported as another shape
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


def _has_branches(own: dict[str, Tensor], kernel: Tensor) -> bool:
    """Whether all branches of a large kernel are there, with the right shapes."""
    channels, size = len(kernel), kernel.shape[-1]
    shapes = {}
    for conv, (bn, k, _) in branch_names(size).items():
        shapes[f'{conv}.weight'] = (channels, 1, k, k)
        for part in ('weight', 'bias', 'running_mean', 'running_var'):
            shapes[f'{bn}.{part}'] = (channels,)
    return all(k in own and own[k].shape == shape for k, shape in shapes.items())
