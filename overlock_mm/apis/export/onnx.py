"""A model as an ONNX graph of few nodes."""

import contextlib
import io
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir.passes.common as passes
import torch
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn

# Values of a constant that is computed while exporting, and not again in every run.
_CONSTANT = 1 << 19


def capture(
    model: nn.Module, image: Tensor, dims: Mapping[int, tuple[str, int, int]] | None = None
) -> torch.export.ExportedProgram:
    """The program of a model, for images of one size or of many.

    Args:
        model: takes one tensor, in evaluation mode.
        image: an example of it.
        dims: dims of the image that may change: their name, smallest and largest size.
    """
    dims = {d: torch.export.Dim(n, min=a, max=b) for d, (n, a, b) in (dims or {}).items()}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return torch.export.export(
            model,
            (image,),
            dynamic_shapes=(dims,) if dims else None,
            strict=False,
            # its reasoning cannot prove all divisions of sizes that come out even
            prefer_deferred_runtime_asserts_over_guards=True,
        )


def write_onnx(
    program: torch.export.ExportedProgram,
    path: str | Path,
    outputs: Sequence[str],
    opset: int,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write a program as an ONNX file; the number of its nodes.

    Args:
        program: a program with one input, which the file calls ``image``.
        path: the file.
        outputs: names of the outputs.
        opset: version of the operators.
        metadata: text to keep in the file, by key.
    """
    with _quiet():
        written = torch.onnx.export(
            program,
            dynamo=True,
            optimize=False,  # slow for this many nodes, and the passes below do as well
            opset_version=opset,
            input_names=['image'],
            output_names=list(outputs),
            verbose=False,
        )
        model = written.model
        _simplify(model)
        model.metadata_props.update(metadata or {})
        written.save(path)
    return sum(1 for _ in model.graph)


def _simplify(model) -> None:
    """Compute constants, and merge what is computed more than once."""
    _merge_constants(model)
    fold_constants(
        model,
        onnx_shape_inference=True,
        input_size_limit=_CONSTANT,
        output_size_limit=_CONSTANT,
        should_fold=_should_fold,
    )
    _merge_constants(model)
    for simplify in (
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.ClearMetadataAndDocStringPass(),
    ):
        simplify(model)


def _merge_constants(model) -> None:
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.DeduplicateInitializersPass()(model)


def _should_fold(node) -> bool | None:
    """No for what spreads a table of biases over the map: the result is far larger."""
    if node.op_type != 'Gather' or None in (i.const_value for i in node.inputs):
        return None
    table, places = (i.const_value for i in node.inputs)
    return False if places.shape.rank() == 1 and table.size > 1 << 9 else None


@contextlib.contextmanager
def _quiet():
    """Without the exporter's own lines; its errors are exceptions."""
    logger = logging.getLogger('onnxscript')
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter('ignore')
            yield
    finally:
        logger.setLevel(level)
