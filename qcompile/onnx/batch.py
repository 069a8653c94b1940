"""One name for the batch: every value whose leading axis counts the samples says so, whatever inference called it."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from qcompile.errors import Unsupported
from qcompile.onnx import weights

_PROBE = 3
"""The batch is followed through the graph by giving it this size."""


def settle_batch(model: ir.Model) -> None:
    """Every value with an open leading axis has the inputs' own symbol there.

    Raises Unsupported, naming the value, where samples are merged with another axis: rows could not be told apart.
    """
    symbols = [d for v in model.graph.inputs if (d := _symbol(v)) is not None]
    if not symbols:
        return
    probed = _probe(model)
    for node in model.graph:
        for value in node.outputs:
            if _symbol(value) is None or value.shape is None:
                continue
            if probed.get(str(value.name)) != _PROBE:
                raise Unsupported(
                    f"node {node.name}: its result {value.name} merges the samples of a batch with another axis, "
                    f"so that rows cannot be told apart; fix the batch with --input-dim {symbols[0]}=1"
                )
            value.shape = ir.Shape([symbols[0], *value.shape.dims[1:]])


def _symbol(value: ir.Value) -> str | None:
    if value.shape is None or not len(value.shape.dims) or isinstance(value.shape.dims[0], int):
        return None
    return str(value.shape.dims[0].value)


def _probe(model: ir.Model) -> dict[str, int]:
    """The leading extent of every value when the batch has _PROBE samples."""
    proto, _ = weights.light(model)
    del proto.graph.value_info[:]
    for v in proto.graph.input:
        first = v.type.tensor_type.shape.dim[0]
        if not first.HasField("dim_value"):
            first.dim_value = _PROBE
    for v in proto.graph.output:
        v.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    return {
        v.name: v.type.tensor_type.shape.dim[0].dim_value
        for v in (*inferred.graph.value_info, *inferred.graph.output)
        if len(v.type.tensor_type.shape.dim)
    }
