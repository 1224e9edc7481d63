"""Exported and compiled networks in other runtimes, and exported files."""

import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from mmcv.cnn import fuse_conv_bn
from torch import nn

from ...config.edit import without_pretrained
from ...config.load import build_model, load_config, toolbox_of
from ...errors import UserError
from ...models import fold
from ...models.folded import prepare_for_export
from ..export.formats import load_onnx, load_openvino
from ..export.graphs import Backbone, Segmentor
from ..export.onnx import write_onnx
from ..export.program import capture
from .measuring import Side, Step
from .models import faster_layout, model_step, our_model, timm_model
from .options import FileOptions, RuntimeOptions


def compare_runtimes(options: RuntimeOptions) -> tuple[RuntimeOptions, str, list[Side]]:
    """The options, a title and two sides: a runtime and PyTorch, or two models in one."""
    _check(options)
    size = 'x'.join(map(str, options.size))
    ours = partial(_runtime_step, options, _network, options.dynamic)
    theirs = partial(_runtime_step, options, timm_model, False)
    name = f'theirs: {options.against} in {options.runtime}'
    if options.against == 'torch':
        theirs = partial(model_step, options, _network, options.backend, options.size)
        layout = faster_layout('cpu', options.against_layout or 'best', 'theirs', theirs)
        theirs, name = partial(theirs, layout), f'theirs: PyTorch, {layout}'
        options = replace(options, against_layout=layout)
    kind = ', for any size' if options.dynamic else ''
    sides = [Side(f'ours: {options.runtime}{kind}, {size}', ours), Side(name, theirs)]
    what = options.config or f'OverLoCK-{options.arch.upper()}'
    return options, f'{what}, exported or compiled, batch {options.batch}', sides


def _check(options: RuntimeOptions) -> None:
    if options.device != 'cpu':
        raise UserError('runtime measures on the CPU; use --device cpu')
    if options.runtime != 'openvino' and options.dtype != 'float32':
        raise UserError(
            f'--runtime {options.runtime} with --dtype {options.dtype}: it is measured in '
            'float32; use --runtime openvino'
        )
    if options.dynamic and options.runtime == 'aotinductor':
        raise UserError('--runtime aotinductor compiles for one size; leave out --dynamic')
    if options.compile:
        raise UserError('--compile is for backbone and train-step; use --runtime compile')
    if options.against == 'reference' or options.against.startswith('self:'):
        raise UserError(
            f'--against {options.against} is for backbone and train-step; with runtime it '
            'is torch or a model of timm'
        )
    if options.config and options.against != 'torch':
        raise UserError(
            f'--config with --against {options.against}: a whole model is compared with '
            'itself in PyTorch; leave --against out'
        )


def compare_files(options: FileOptions) -> tuple[str, list[Side]]:
    """A title and the two sides: two exported files."""
    loaders = {'.onnx': load_onnx, '.xml': load_openvino}
    images = torch.randn(options.batch, 3, *options.size).numpy()

    def build(path):
        run = loaders[path.suffix](path, options.threads)
        return lambda: run(images)

    sides = []
    for name, text in (('ours', options.file), ('theirs', options.against)):
        path = Path(text)
        if path.suffix not in loaders or not path.is_file():
            raise UserError(f'{text} must be an exported file, .onnx or .xml')
        size = path.stat().st_size
        if path.suffix == '.xml':
            size += path.with_suffix('.bin').stat().st_size
        name = f'{name}: {path.name}, {size / 2**20:.1f} MiB'
        sides.append(Side(name, partial(build, path)))
    return f'Exported files, {"x".join(map(str, images.shape))}', sides


def _network(options) -> nn.Module:
    """Our folded network with random weights, whose results are a tensor or a tuple."""
    if not options.config:
        return Backbone(our_model(options))
    cfg = load_config(options.config)
    if toolbox_of(cfg) != 'mmseg':
        raise UserError(f'--config {options.config} is not of a segmentor')
    without_pretrained(cfg.model)
    model = fold(build_model(cfg).eval())
    return Segmentor(fuse_conv_bn(model), logits=True)


def _runtime_step(options, make, dynamic) -> Step:
    """Export or compile a model, load it and return the step to measure."""
    torch.manual_seed(0)
    start = time.perf_counter()
    model = make(options).eval()
    image = torch.rand(options.batch, 3, *options.size)
    if not isinstance(model, Backbone | Segmentor):
        model = _Maps(model)
    build = _compiled if options.runtime in ('compile', 'aotinductor') else _exported
    step, about = build(options, model, image, dynamic)
    step()
    spent = time.perf_counter() - start
    print(f'{make.__name__.strip("_")}: {about}ready in {spent:.0f} s')
    return step


def _exported(options, model, image, dynamic) -> tuple[Step, str]:
    """The step in ONNX Runtime or OpenVINO, and how many nodes the graph has."""
    prepare_for_export(model, plain_norms=options.runtime == 'openvino')
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'model.onnx')
        dims = {2: ('height', 193, 8192), 3: ('width', 193, 8192)} if dynamic else None
        program = capture(model, torch.rand(1, 3, 224, 896) if dynamic else image, dims)
        nodes = write_onnx(program, path, model.outputs, opset=20)
        if options.runtime == 'openvino':
            precision = dict(float32='f32', bfloat16='bf16')[options.dtype]
            run = load_openvino(path, options.threads, precision)
        else:
            run = load_onnx(path, options.threads)
    images = image.numpy()
    return lambda: run(images), f'{nodes} nodes, '


def _compiled(options, model, image, dynamic) -> tuple[Step, str]:
    """The step of a program that torch compiles."""
    layout = torch.contiguous_format
    if options.layout != 'contiguous':
        layout = torch.channels_last
    model, image = model.to(memory_format=layout), image.to(memory_format=layout)
    if options.runtime == 'compile':
        run = torch.compile(model, dynamic=dynamic)
    else:
        program = capture(model, image, for_torch=True)
        with tempfile.TemporaryDirectory() as folder:
            package = str(Path(folder, 'model.pt2'))
            torch._inductor.aoti_compile_and_package(program, package_path=package)
            run = torch._inductor.aoti_load_package(package)

    def step():
        with torch.no_grad():
            return run(image)

    return step, ''


class _Maps(nn.Module):
    """A backbone of timm, whose maps are a tuple."""

    outputs = tuple(f'map_{i}' for i in range(4))

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, image):
        return tuple(self.backbone(image))
