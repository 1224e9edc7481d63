"""A model as an ONNX graph of few nodes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir.passes.common as passes
import torch
from onnxscript.optimizer import fold_constants

from .program import quiet

# Values of a constant that is computed while exporting, and not again in every run.
_CONSTANT = 1 << 19


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
    with quiet():
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
    _merge_reshapes(model)
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


def _merge_reshapes(model) -> None:
    """Let a reshape of a reshape start from the first input."""
    for node in model.graph:
        before = node.inputs[0].producer() if node.op_type == 'Reshape' else None
        if before is None or before.op_type != 'Reshape':
            continue
        shape = node.inputs[1].const_value
        literal = node.attributes.get_int('allowzero', 0) == 1
        if literal or (shape is not None and (shape.numpy() != 0).all()):
            node.replace_input_with(0, before.inputs[0])


def _should_fold(node) -> bool | None:
    """No for what spreads a table of biases over the map: the result is far larger."""
    if node.op_type != 'Gather' or None in (i.const_value for i in node.inputs):
        return None
    table, places = (i.const_value for i in node.inputs)
    return False if places.shape.rank() == 1 and table.size > 1 << 9 else None
