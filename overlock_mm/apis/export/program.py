"""The program of a model, as torch.export captures it."""

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...ops import set_contmix_backend

# Dims of an image that may change: the name, the smallest and the largest size of each.
Dims = Mapping[int, tuple[str, int, int]]
_DEFERRED = 'prefer_deferred_runtime_asserts_over_guards'


def capture(
    model: nn.Module, image: Tensor, dims: Dims | None = None, for_torch: bool = False
) -> torch.export.ExportedProgram:
    """The program of a model, for images of one size or of many.

    Args:
        model: takes one tensor, in evaluation mode.
        image: an example of it.
        dims: dims of the image that may change.
        for_torch: whether PyTorch will run or compile it. ContMix is written with torch's
            own views then, if no height and width may change: AOTInductor does not get
            done with the tables of indices that the others need.

    Raises:
        UserError: if torch is too old.
    """
    if _DEFERRED not in inspect.signature(torch.export.export).parameters:
        raise UserError(
            f'torch {torch.__version__} is too old to export this; torch 2.11 works. '
            '--format torchscript does not need it'
        )
    backend = 'torch' if for_torch and 2 not in (dims or {}) else None
    dims = {d: torch.export.Dim(n, min=a, max=b) for d, (n, a, b) in (dims or {}).items()}
    before = set_contmix_backend(backend) if backend else None
    try:
        program = _exported(model, image, dims)
    finally:
        if backend:
            set_contmix_backend(before)
    _share_tables(program.graph)
    _drop_asserts(program.graph)
    return program


def _exported(model, image, dims) -> torch.export.ExportedProgram:
    with torch.no_grad(), quiet():
        return torch.export.export(
            model,
            (image,),
            dynamic_shapes=(dims,) if dims else None,
            strict=False,
            # its reasoning cannot prove all divisions of sizes that come out even
            **{_DEFERRED: True},
        )


def _drop_asserts(graph: torch.fx.Graph) -> None:
    """Drop what torch asserts of sizes inside, which may be true of the example alone.

    The sizes of the input are still checked. ONNX has no asserts.
    """
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default:
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _share_tables(graph: torch.fx.Graph) -> None:
    """Compute what depends on sizes alone once, not in every block."""
    known = {}
    for node in list(graph.nodes):
        value = node.meta.get('val')
        is_table = isinstance(value, Tensor) and value.dtype in (torch.int64, torch.bool)
        if node.op != 'call_function' or not (is_table or isinstance(value, torch.SymInt)):
            continue
        if getattr(getattr(node.target, '_schema', None), 'is_mutable', False):
            continue
        key = str((node.target, node.args, node.kwargs))
        first = known.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out the lines and warnings that exporters print; their errors are raised."""
    logger = logging.getLogger('onnxscript')
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter('ignore')
            yield
    finally:
        logger.setLevel(level)
