"""The formats of exported files: how each is written and run."""

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import UserError
from .program import Dims, capture, quiet

Run = Callable[[np.ndarray], list[np.ndarray]]


class Job(NamedTuple):
    """What to write.

    Attributes:
        graph: the module, with the names of its ``outputs``.
        image: an example of its input.
        dims: dims of the input that may change, see :func:`capture`.
        opset: version of the ONNX operators.
        half: whether weights are float16.
        metadata: text to keep in the file, by key.
        rewrite: changes the ONNX file; how many nodes it has then.
    """

    graph: nn.Module
    image: Tensor
    dims: Dims
    opset: int
    half: bool
    metadata: Mapping[str, str]
    rewrite: Callable[[Path], int] | None = None


class Format(NamedTuple):
    """A format.

    Attributes:
        suffix: of its files.
        needs: packages that write and run it.
        write: write a job to a path; how many nodes the program has, if that is known.
        load: read a file; the function runs it on a batch of images in float32.
    """

    suffix: str
    needs: Sequence[str]
    write: Callable[[Job, Path], int | None]
    load: Callable[[Path], Run]


def _write_onnx(job: Job, path: Path) -> int:
    from .onnx import write_onnx

    program = capture(job.graph, job.image, job.dims)
    nodes = write_onnx(program, path, job.graph.outputs, job.opset, job.metadata)
    return job.rewrite(path) if job.rewrite else nodes


def load_onnx(path: Path, threads: int = 0) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        path, options, providers=['CPUExecutionProvider']
    )
    return lambda images: session.run(None, {'image': images})


def _write_openvino(job: Job, path: Path) -> int:
    import openvino

    onnx_file = path.with_suffix('.onnx')
    nodes = _write_onnx(job._replace(half=False), onnx_file)
    model = openvino.convert_model(onnx_file)
    for key, value in job.metadata.items():
        model.set_rt_info(value, ['overlock_mm', key])
    openvino.save_model(model, path, compress_to_fp16=job.half)
    onnx_file.unlink()
    return nodes


def load_openvino(path: Path, threads: int = 0, precision: str = 'f32') -> Run:
    import openvino

    options = {'INFERENCE_PRECISION_HINT': precision}
    if threads:
        options['INFERENCE_NUM_THREADS'] = threads
    compiled = openvino.Core().compile_model(path, 'CPU', options)
    return lambda images: list(compiled([images]).values())


def _write_pt2(job: Job, path: Path) -> None:
    program = capture(job.graph, job.image, job.dims, for_torch=True)
    extra = {'metadata.json': json.dumps(dict(job.metadata))}
    with quiet():
        torch.export.save(program, path, extra_files=extra)


def _load_pt2(path: Path) -> Run:
    with quiet():
        return _of_torch(torch.export.load(path).module())


def _write_torchscript(job: Job, path: Path) -> None:
    with torch.no_grad(), quiet():
        traced = torch.jit.trace(job.graph, job.image, check_trace=False)
        extra = {'metadata.json': json.dumps(dict(job.metadata))}
        traced.save(path, _extra_files=extra)


def _load_torchscript(path: Path) -> Run:
    with quiet():
        return _of_torch(torch.jit.load(path))


def _of_torch(module) -> Run:
    @torch.no_grad()
    def run(images: np.ndarray) -> list[np.ndarray]:
        with quiet():
            results = module(torch.from_numpy(images))
        results = [results] if isinstance(results, Tensor) else results
        return [result.numpy() for result in results]

    return run


FORMATS = dict(
    onnx=Format('.onnx', ('onnx', 'onnxscript', 'onnxruntime'), _write_onnx, load_onnx),
    openvino=Format(
        '.xml',
        ('onnx', 'onnxscript', 'openvino'),
        _write_openvino,
        load_openvino,
    ),
    pt2=Format('.pt2', (), _write_pt2, _load_pt2),
    torchscript=Format('.pt', (), _write_torchscript, _load_torchscript),
)


def format_of(name: str) -> Format:
    """The format of this name.

    Raises:
        UserError: if there is none, or a package that it needs is not installed.
    """
    if name not in FORMATS:
        raise UserError(f'--format {name} is not one of {", ".join(FORMATS)}')
    found = FORMATS[name]
    missing = [n for n in found.needs if importlib.util.find_spec(n) is None]
    if missing:
        raise UserError(
            f'--format {name} needs {", ".join(missing)}, which is not installed; run: '
            "pip install 'overlock_mm[export]'"
        )
    return found
