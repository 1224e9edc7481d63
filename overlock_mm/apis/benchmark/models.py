"""The backbone against another one, and the op against itself."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import timm
import torch

from ...errors import UserError
from ...models import OverLoCK, fold
from ...ops import contmix, set_contmix_backend
from .measuring import Side, Step, prepare, seconds_of
from .options import Layout, ModelOptions, OpOptions, TrainStepOptions, parse_size


def compare_op(options: OpOptions) -> tuple[str, list[Side]]:
    """A title and the two sides: ContMix with one backend and with another."""
    n, channels, h, w = options.shape
    heads, kernels, regions = options.heads, (5, options.kernel), 49

    def build(backend, compiled=False):
        torch.manual_seed(0)
        op = torch.compile(contmix, dynamic=False) if compiled else contmix
        width, taps = channels // 2 // heads, sum(k * k for k in kernels)
        query, key = (n, heads, width, h, w), (n, heads, width, regions)
        rpbs = [(heads, 2 * k - 1, 2 * k - 1) for k in kernels]
        shapes = [query, key, options.shape, (taps, regions), (taps,), *rpbs]
        tensors = [torch.randn(shape) for shape in shapes]
        tensors[0] *= width**-0.5
        tensors[3] *= regions**-0.5  # logits of about 1
        kinds = dict(device=options.device, dtype=getattr(torch, options.dtype))
        tensors = [t.to(**kinds).requires_grad_(options.backward) for t in tensors]
        gradient = torch.ones_like(tensors[2])

        def step():
            with torch.set_grad_enabled(options.backward):
                out = op(*tensors[:5], tensors[5:], kernels, backend=backend)
            if options.backward:
                torch.autograd.grad(out, tensors, gradient)

        return step

    backend, against = options.backend, options.against
    ours = Side(f'ours: {backend}', partial(build, backend, options.compile))
    theirs = Side(f'theirs: {against}', partial(build, against))
    passes = 'forward and backward' if options.backward else 'forward'
    sizes = f'{n}x{channels}x{h}x{w}, {heads} heads, kernels 5 and {options.kernel}'
    return f'ContMix, {passes}, {sizes}', [ours, theirs]


def compare_models(options: ModelOptions) -> tuple[ModelOptions, str, list[Side]]:
    """The options with both layouts decided, a title and the two sides."""
    per_pixel = options.against.startswith('self:')
    other_size = parse_size(options.against[5:]) if per_pixel else options.size
    if options.amp and options.dtype == 'float32':
        raise UserError('--amp needs --dtype bfloat16 or float16')

    if options.against == 'torch':
        raise UserError('--against torch is for runtime; use a model of timm, or reference')

    ours = partial(model_step, options, our_model, options.backend, options.size)
    theirs = partial(model_step, options, timm_model, None, other_size)
    if options.against == 'reference':
        theirs = partial(model_step, options, plain_model, 'reference', other_size)
    elif per_pixel:
        theirs = partial(model_step, options, our_model, options.backend, other_size)

    layout = faster_layout(options.device, options.layout, 'ours', ours)
    usual = 'contiguous' if options.against == 'reference' else 'best'
    against_layout = options.against_layout or (layout if per_pixel else usual)
    against_layout = faster_layout(options.device, against_layout, 'theirs', theirs)

    def side(name, build, layout, size):
        pixels = options.batch * size[0] * size[1] if per_pixel else None
        return Side(f'{name}, {layout}', partial(build, layout), pixels)

    stages = f', with_cp {" ".join(map(str, options.with_cp))}' if options.with_cp else ''
    size, other = ('x'.join(map(str, sides)) for sides in (options.size, other_size))
    name = f'ours: {options.form}, {options.backend}{stages}, {size}'
    sides = [
        side(name, ours, layout, options.size),
        side(f'theirs: {options.against}, {other}', theirs, against_layout, other_size),
    ]
    what = f'OverLoCK-{options.arch.upper()} {options.command}, batch {options.batch}'
    return replace(options, layout=layout, against_layout=against_layout), what, sides


def model_step(options, make, backend, size, layout) -> Step:
    """Build a model with ``make(options)``, and images; return the step to measure."""
    train, dtype = isinstance(options, TrainStepOptions), getattr(torch, options.dtype)
    formats = dict(channels_last=torch.channels_last, contiguous=torch.contiguous_format)
    torch.manual_seed(0)
    kinds = dict(
        device=options.device,
        dtype=torch.float32 if options.amp else dtype,
        memory_format=formats[layout],
    )
    model = make(options).to(**kinds).train(train)
    images = torch.rand(options.batch, 3, *size).to(**kinds)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6) if train else None
    model = torch.compile(model, dynamic=False) if options.compile else model

    def step():
        set_contmix_backend(backend)  # of the whole process, and the sides alternate
        autocast = torch.autocast(options.device, dtype) if options.amp else nullcontext()
        with torch.set_grad_enabled(train), autocast:
            maps = model(images)
        if train:
            sum(m.float().square().mean() for m in maps).backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


def our_model(options) -> torch.nn.Module:
    model = plain_model(options, with_cp=options.with_cp)
    if options.form == 'deploy':
        model.switch_to_deploy()
    return fold(model.eval()) if options.form == 'fold' else model


def plain_model(options, **kwargs) -> torch.nn.Module:
    return OverLoCK(options.arch, drop_path_rate=options.drop_path, **kwargs)


def timm_model(options) -> torch.nn.Module:
    kwargs = dict(drop_path_rate=options.drop_path) if options.drop_path else {}
    if timm.models.get_pretrained_cfg(options.against).fixed_input_size:
        kwargs['img_size'] = options.size
    return timm.create_model(options.against, features_only=True, **kwargs)


def faster_layout(device: str, layout: Layout, side: str, build) -> str:
    """``layout``, or for 'best' the one in which the fastest of three steps was faster."""
    if layout != 'best':
        return layout
    seconds = {}
    for tried in ('channels_last', 'contiguous'):
        step = prepare(Side(side, partial(build, tried)))
        seconds[tried] = min(seconds_of(step, device) for _ in range(3))
    best = min(seconds, key=seconds.get)
    print(f'{side}: {best} is the faster layout')
    return best
