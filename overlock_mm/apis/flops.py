"""Count the parameters and multiply-adds of a model, part by part."""

import importlib
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from difflib import get_close_matches
from functools import partial, wraps
from typing import NamedTuple

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import overlock_mm.timm  # noqa: F401  registers the classifiers

from ..archs import ARCHS
from ..errors import UserError
from ..models import OverLoCK, switch_to_deploy
from ..models.contmix import ContMix

COUNTED = 'convolutions and matrix products, one image'
_TIMM = 'timm/'
_HEADS = ('head', 'aux_head')
# The children of an OverLoCK that each of its parts consists of.
_OVERLOCK = {
    'stem and downsampling': (
        'patch_embed1',
        'patch_embed2',
        'patch_embed3',
        'patch_embed4',
        'patch_embedx',
    ),
    'Base-Net': ('blocks1', 'blocks2', 'blocks3'),
    'Overview-Net': ('blocks4', 'high_level_proj'),
    'Focus-Net': ('sub_blocks3', 'sub_blocks4'),
}
_CONTMIX = 'of it ContMix'
_REGIONS = 1000  # of a detector without a region proposal network
_REST = 'other'


class Part(NamedTuple):
    """A part of a model.

    Attributes:
        name: names of the part and of those that it belongs to, the outermost first.
        parameters: their number.
        multiply_adds: their number, for one image.
    """

    name: tuple[str, ...]
    parameters: int
    multiply_adds: int


class Count(NamedTuple):
    """Parameters and multiply-adds of a model.

    Attributes:
        model: what was counted.
        shape: height and width of the image that the model reads.
        parts: the parts. Those whose name has one component add up to the whole.
        parameters: parameters of the whole model.
        multiply_adds: multiply-adds of the whole model, for one image.
        notes: what else there is to know, a line each.
    """

    model: str
    shape: tuple[int, int]
    parts: list[Part]
    parameters: int
    multiply_adds: int
    notes: list[str]

    def as_dict(self) -> dict:
        """The same in types of JSON."""
        parts = [dict(p._asdict(), name=list(p.name)) for p in self.parts]
        return dict(self._asdict(), shape=list(self.shape), parts=parts, counted=COUNTED)

    def __str__(self) -> str:
        rows = [('', 'parameters', 'multiply-adds')]
        for part in self.parts:
            indented = '  ' * (len(part.name) - 1) + part.name[-1]
            rows.append((indented, _million(part.parameters), _giga(part.multiply_adds)))
        rows.append(('total', _million(self.parameters), _giga(self.multiply_adds)))
        width = max(len(name) for name, *_ in rows)
        lines = [f'{name:{width}}{a:>14}{b:>16}' for name, a, b in rows]
        height, columns = self.shape
        what = f'{self.model}, {height} x {columns} pixels: {COUNTED}'
        return '\n'.join([what, '', *lines, '', *self.notes]).rstrip()


def count(
    model: str,
    shape: tuple[int, int] | None = None,
    deploy: bool = False,
    cfg_options: dict | None = None,
) -> Count:
    """Count the parameters and multiply-adds of a model at inference.

    Counted are the multiply-adds of convolutions and matrix products, as
    ``torch.utils.flop_counter`` counts them (it counts each as two), whatever the
    operators compute inside: see ``docs/flops.md``. The weights are random.

    Args:
        model: path of a config of MMDetection or MMSegmentation, with any backbone; an arch
            of OverLoCK, for its ImageNet classifier; or ``'timm/NAME'``.
        shape: height and width of the image. By default that of the model in timm, the
            crop size of a segmentor, and the scale at which a detector is tested.
        deploy: merge the dilated branches first.
        cfg_options: values for keys of a config.

    Raises:
        UserError: if there is no such model, if it cannot be built, if it does not take an
            image of this shape, or if there is nothing to merge.
    """
    if shape is not None and min(shape) < 1:
        raise UserError(f'--shape {shape[0]} {shape[1]} must be two positive numbers, H W')
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # what toolboxes warn of does not matter here
        torch.manual_seed(0)
        subject = _built(model, cfg_options)
        # torch's counter fails where a view of a parameter goes into a layer
        subject.network.eval().requires_grad_(False)
        if deploy:
            try:
                switch_to_deploy(subject.network)
            except ValueError as error:
                raise UserError(f'{model}: {error}; leave out --deploy') from error
        height, width = shape or subject.shape()
        try:
            return _count(subject, subject.inputs(height, width))
        except Exception as error:  # anything may go wrong in others' models
            raise UserError(
                f'{model} fails on an image of {height} x {width} pixels: '
                f'{_line(error)}. Give another --shape H W, if the model '
                'takes images of one size only (--debug shows where it fails)'
            ) from error


class _Subject(NamedTuple):
    """What is counted.

    Attributes:
        name: the name that was given.
        network: the model.
        shape: finds the default height and width.
        inputs: makes the arguments of a call from height and width, the image first.
        modes: keyword arguments of a call; those that come later are for models that do
            not take the first.
        notes: what there is to know, a line each.
    """

    name: str
    network: nn.Module
    shape: Callable[[], tuple[int, int]]
    inputs: Callable[[int, int], tuple]
    modes: tuple[dict, ...]
    notes: list[str]


def _built(model: str, cfg_options: dict | None) -> _Subject:
    is_name = model.startswith(_TIMM) or (model in ARCHS and not os.path.isfile(model))
    if is_name and cfg_options:
        raise UserError(f'{model} is not a config, so it has no keys to override')
    if is_name:
        network = _classifier(model)
        channels, *size = network.pretrained_cfg.get('input_size') or (3, 224, 224)
        return _Subject(
            name=model,
            network=network,
            shape=lambda: tuple(size),
            inputs=lambda *shape: (torch.zeros(1, channels, *shape),),
            modes=({},),
            notes=[],
        )
    if not os.path.isfile(model) and '::' not in model and not model.endswith('.py'):
        raise UserError(
            f'{model} is neither a config file nor an arch; give the path of a config, '
            "xt, t, s or b, or 'timm/NAME' for a model of timm"
        )
    return _of_config(model, cfg_options)


def _classifier(name: str) -> nn.Module:
    known = {'extreme-tiny': 'xt', 'tiny': 't', 'small': 's', 'base': 'b'}
    timm_name = (
        name.removeprefix(_TIMM)
        if name.startswith(_TIMM)
        else f'overlock_{known.get(name, name)}'
    )
    try:
        return timm.create_model(timm_name)
    except Exception as error:  # timm raises what it likes
        near = get_close_matches(timm_name, timm.list_models())
        hint = f'did you mean {", ".join(near)}?' if near else 'see timm.list_models()'
        raise UserError(f'timm cannot build {timm_name}: {_line(error)}; {hint}') from error


def _of_config(config: str, cfg_options: dict | None) -> _Subject:
    # none of it is needed for the other models, nor is mmengine
    from mmengine.config import Config
    from mmengine.model import revert_sync_batchnorm

    from ..config.edit import without_pretrained
    from ..config.load import build_model, load_config, toolbox_of
    from ..config.swap import find_backbone

    cfg = load_config(config, cfg_options)
    toolbox = toolbox_of(cfg)
    if not isinstance(cfg.get('model'), dict):
        raise UserError(f'{config} has no model; give the config of one')
    node, keys = cfg.model, ()
    with suppress(UserError):  # some models have several backbones or call it otherwise
        keys = find_backbone(cfg)[1:-1]
    for key in keys:  # the detector inside of a tracker or a semi-supervised model
        node = node[key]
    notes = [f'counted is model.{".".join(keys)}'] if keys else []
    inner = Config(dict(model=node.to_dict(), default_scope=toolbox))
    without_pretrained(inner.model)
    if not inner.model.get('data_preprocessor'):  # the model around it has one
        name = 'DetDataPreprocessor' if toolbox == 'mmdet' else 'SegDataPreProcessor'
        inner.model.data_preprocessor = dict(type=name)
    try:
        network = revert_sync_batchnorm(build_model(inner))
    except Exception as error:  # anything may go wrong in others' models
        raise UserError(
            f'the model of {config} cannot be built: {_line(error)} (--debug shows where)'
        ) from error
    return _Subject(
        name=config,
        network=network,
        shape=partial(default_shape, cfg, network, toolbox),
        inputs=partial(_inputs, toolbox, network),
        # layers alone, or else with what follows them
        modes=(dict(mode='tensor'), dict(mode='predict')),
        notes=notes,
    )


def default_shape(cfg, network: nn.Module, toolbox: str) -> tuple[int, int]:
    """The crop size of a segmentor, or the scale at which a detector is tested."""
    size = getattr(network.data_preprocessor, 'size', None) or cfg.get('crop_size')
    if toolbox == 'mmseg':
        return tuple(size or (512, 512))
    long, short = default_scale(cfg) or (1333, 800)
    return short, long


def default_scale(cfg) -> tuple[int, int] | None:
    """The scale of the test pipeline: longest side, longest short side. None: no scale."""
    for pipeline in (cfg.get('test_dataloader'), cfg.get('test_pipeline')):
        for scale in _scales(pipeline):
            return max(scale), min(scale)
    return None


def _scales(node) -> Iterator[tuple[int, int]]:
    """All pairs of numbers that are given as a scale in a pipeline."""
    if isinstance(node, dict):
        scale = node.get('scale')
        if isinstance(scale, list | tuple) and len(scale) == 2:
            yield tuple(scale)
        node = list(node.values())
    if isinstance(node, list | tuple):
        for value in node:
            yield from _scales(value)


def _inputs(toolbox: str, network: nn.Module, height: int, width: int) -> tuple:
    """A gray image, behind the preprocessor of the model, and its data sample."""
    structures = importlib.import_module(f'{toolbox}.structures')
    kind = structures.DetDataSample if toolbox == 'mmdet' else structures.SegDataSample
    sizes = dict.fromkeys(
        ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape'), (height, width)
    )
    sample = kind(
        metainfo=dict(
            sizes, scale_factor=(1.0, 1.0), flip=False, img_id=0, img_path='', text='object'
        )
    )
    if toolbox == 'mmdet':  # which Fast R-CNN reads
        sample.proposals = _boxes(_REGIONS)
    channels = len(getattr(network.data_preprocessor, 'mean', (0, 0, 0)))
    image = torch.full((channels, height, width), 128, dtype=torch.uint8)
    data = network.data_preprocessor(dict(inputs=[image], data_samples=[sample]), False)
    return data['inputs'], data['data_samples']


@contextmanager
def _fixed_regions(network: nn.Module, notes: list[str]) -> Iterator[None]:
    """Give the second stage as many regions as it gets at most.

    How many a network with random weights finds says nothing. Masks are only computed of
    the final detections at inference.
    """
    roi_head, config = getattr(network, 'roi_head', None), _test_cfg(network)
    regions = config.get('rpn', {}).get('max_per_img')
    if roi_head is None or not regions:
        yield
        return
    masks = min(regions, config.get('rcnn', {}).get('max_per_img') or 0)
    notes.append(f'roi_head: {regions} regions, as test_cfg.rpn.max_per_img says')
    propose, mask = network.rpn_head.predict, getattr(roi_head, '_mask_forward', None)

    def predict(*args, **kwargs):
        return [
            found[_cycle(regions, len(found))] if len(found) else _boxes(regions)
            for found in propose(*args, **kwargs)
        ]

    def mask_forward(*args, **kwargs):
        *before, rois = args
        results = mask(*before, rois[:masks], **kwargs)
        every = _cycle(len(rois), masks)
        return {k: v[every] if torch.is_tensor(v) else v for k, v in results.items()}

    with ExitStack() as stack:
        _replace(network.rpn_head, 'predict', predict, stack)
        if masks and mask and roi_head.with_mask:
            _replace(roi_head, '_mask_forward', mask_forward, stack)
            notes[-1] += f'; masks of {masks}, as test_cfg.rcnn.max_per_img says'
        yield


def _boxes(count: int):
    from mmengine.structures import InstanceData

    boxes = torch.tensor([[0.0, 0.0, 32.0, 32.0]]).repeat(count, 1)
    zeros = torch.zeros(count)
    return InstanceData(bboxes=boxes, scores=zeros, labels=zeros.long())


def _test_cfg(network: nn.Module) -> dict:
    config = getattr(network, 'test_cfg', None) or {}
    return {k: v for k, v in config.items() if v}  # some are None


def _cycle(count: int, length: int) -> torch.Tensor:
    """Indices of ``count`` elements, again from the first after ``length``."""
    return torch.arange(count) % length


def _count(subject: _Subject, inputs: tuple) -> Count:
    """Run the model, and count what every part of it does."""
    network, notes = subject.network, [*subject.notes]
    if not hasattr(torch.utils.flop_counter, 'register_flop_formula'):
        notes.append('torch before 2.2 does not count fused attention: use a later one')
    tops, inner = _parts(network)
    for options in subject.modes:
        counter = FlopCounterMode(display=False, custom_mapping=_missing_formulas())
        tracked = _tracked({**tops, **inner}, counter)
        fixed = _fixed_regions(network, notes)
        try:
            with torch.no_grad(), _without_fused_layers(), fixed, counter, tracked as flops:
                network(*inputs, **options)
            break
        except Exception:
            if options is subject.modes[-1]:
                raise
            notes = [
                *subject.notes,
                'counted is a prediction, with what follows the layers',
            ]

    op = torch.ops.overlock_mm.contmix
    for name in inner:
        if name[-1] == _CONTMIX:
            flops[name][op] = flops[name[:-1]][op]
    total = _counts(counter).total()
    flops = {name: flops[name].total() for name in {**tops, **inner}}
    everything = _parameters([network])
    parts, seen = [], set()
    for name, modules in tops.items():
        own = _parameters(modules) - seen
        seen |= own
        parts.append((name, own, flops[name]))
        below = {n: m for n, m in inner.items() if n[0] == name[0]}
        parts += [(n, _parameters(m) & own, flops[n]) for n, m in below.items()]
        if below:
            direct = [n for n in below if len(n) == 2]
            rest = own - _parameters([m for n in direct for m in below[n]])
            left = flops[name] - sum(flops[n] for n in direct)
            parts.append(((*name, _REST), rest, left))
    left = total - sum(flops[name] for name in tops)
    parts.append(((_REST,), everything - seen, left))
    counted = [
        Part(name, sum(p.numel() for p in parameters), flops // 2)
        for name, parameters, flops in parts
        if parameters or flops
    ]
    if idle := [p.name[0] for p in counted if len(p.name) == 1 and not p.multiply_adds]:
        notes.append(f'{", ".join(idle)}: no multiply-adds at inference')
    size = sum(p.numel() for p in everything)
    shape = tuple(inputs[0].shape[-2:])
    return Count(subject.name, shape, counted, size, total // 2, notes)


def _counts(counter: FlopCounterMode) -> Counter:
    """What was counted so far, by operation."""
    return Counter(counter.get_flop_counts().get('Global', {}))


def _parts(network: nn.Module) -> tuple[dict, dict]:
    """Modules by part: of the whole model, and of the OverLoCK in it."""
    if isinstance(network, OverLoCK):
        children = dict(network.named_children())
        heads = {(n,): [children.pop(n)] for n in _HEADS if n in children}
        tops = {('backbone',): [*children.values()], **heads}
    else:
        tops = {(name,): [child] for name, child in network.named_children()}
    inner = {}
    for top, modules in tops.items():
        found = [m for module in modules for m in module.modules()]
        backbones = [m for m in found if isinstance(m, OverLoCK)]
        if isinstance(network, OverLoCK) and top == ('backbone',):
            backbones = [network]
        for part, names in _OVERLOCK.items() if backbones else ():
            children = [getattr(b, name, None) for b in backbones for name in names]
            inner[(*top, part)] = [c for c in children if c is not None]
        if backbones and inner[(*top, 'Focus-Net')]:
            mixers = [
                m
                for stage in inner[(*top, 'Focus-Net')]
                for m in stage.modules()
                if isinstance(m, ContMix)
            ]
            inner[(*top, 'Focus-Net', _CONTMIX)] = [
                part
                for m in mixers
                # a projection with a replaced method would not be read, but called
                for part in (
                    m.weight_query,
                    m.weight_key,
                    *m.weight_proj.parameters(),
                    m.rpb1,
                    m.rpb2,
                )
            ]
    return tops, inner


@contextmanager
def _tracked(parts: dict, counter: FlopCounterMode) -> Iterator[dict[tuple, Counter]]:
    """Count by operation what runs in each part, by following the calls of its modules.

    Hooks would not do: toolboxes call ``forward`` and ``predict`` of heads directly.
    """
    flops, active = {part: Counter() for part in parts}, set()

    def track(module: nn.Module, method: str, part) -> None:
        inside = getattr(module, method)

        @wraps(inside)
        def call(*args, **kwargs):
            outer = len(part) == 1 and any(len(other) == 1 for other in active)
            if part in active or outer:  # it is counted already
                return inside(*args, **kwargs)
            active.add(part)
            before = _counts(counter)
            try:
                return inside(*args, **kwargs)
            finally:
                active.remove(part)
                flops[part] += _counts(counter) - before

        _replace(module, method, call, stack)

    with ExitStack() as stack:
        for part, modules in parts.items():
            for module in _called(modules):
                for method in ('forward', 'predict'):
                    if callable(getattr(module, method, None)):
                        track(module, method, part)
        yield flops


def _replace(module: nn.Module, method: str, new: Callable, stack: ExitStack) -> None:
    """Replace a method of one module, until ``stack`` is closed."""
    own = vars(module).get(method)
    setattr(module, method, new)
    stack.callback(
        partial(setattr, module, method, own) if own else partial(delattr, module, method)
    )


def _called(modules: list) -> list[nn.Module]:
    """Modules, and their children for those that are not called as a whole."""
    found = {}
    for module in modules:
        if isinstance(module, nn.Module):
            for m in (module, *module.children()):
                found |= dict.fromkeys(
                    m.children() if isinstance(m, nn.ModuleList) else [m]
                )
    return list(found)


def _parameters(modules: list) -> set[nn.Parameter]:
    return {
        p for m in modules for p in (m.parameters() if isinstance(m, nn.Module) else [m])
    }


def _missing_formulas() -> dict:
    """Formulas for matrix products that torch's counter does not know."""
    aten = torch.ops.aten

    def product(like, a, b, *args, out_val=None, **kwargs) -> int:
        return 2 * a.numel() * b.shape[-1]

    def attention(query, key, value, *args, out_val=None, **kwargs) -> int:
        return 2 * query.numel() * key.shape[-2] + 2 * out_val[0].numel() * key.shape[-2]

    formulas = {aten.addmm_: product, aten.baddbmm_: product}
    name = '_scaled_dot_product_flash_attention_for_cpu'
    if hasattr(aten, name):
        formulas[getattr(aten, name)] = attention
    for formula in (product, attention):
        formula._get_raw = True  # it gets the tensors, not their shapes
    return formulas


@contextmanager
def _without_fused_layers() -> Iterator[None]:
    """Have torch's attention layers run as single operations, which can be counted."""
    mha = getattr(torch.backends, 'mha', None)  # torch 2.2
    before = mha and mha.get_fastpath_enabled()
    try:
        if mha:
            mha.set_fastpath_enabled(False)
        yield
    finally:
        if mha:
            mha.set_fastpath_enabled(before)


def _line(error: Exception) -> str:
    return ' '.join(f'{type(error).__name__}: {error}'.split())


def _million(number: int) -> str:
    return f'{number / 1e6:.2f} M'


def _giga(number: int) -> str:
    return f'{number / 1e9:.3f} G'
