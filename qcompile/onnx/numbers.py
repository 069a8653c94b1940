"""Every number of a model as float32: half and double precision models, and integer tensors that are fed.

An integer graph quantizes real numbers, whatever type they came in. Integers that say where things are (shapes, axes,
indices) stay integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx
import onnx.defs
from onnx import TensorProto, helper, numpy_helper

from qcompile.errors import BadInput, Unsupported

_REALS = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})
_WHOLE = frozenset(
    {
        TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64,
        TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64,
    }
)  # fmt: skip

_SAME_FOR_REALS = frozenset(
    """Abs Add Clip Concat DepthToSpace Expand Flatten Gather Identity Max MaxPool Min Mul Neg Pad Pow ReduceMax
    ReduceMin ReduceSum Relu Reshape Slice SpaceToDepth Split Squeeze Sub Sum Tile Transpose Unsqueeze""".split()
)
"""Operators that make of integers what they make of the same real numbers, as long as nothing overflows."""


def as_float32(model: onnx.ModelProto) -> None:
    """Replace the other types of numbers by float32, in place; Unsupported names a node where that changes results."""
    graph = model.graph
    whole = {v.name for v in graph.input if v.type.tensor_type.elem_type in _WHOLE}
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in _REALS or value.name in whole:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for tensor in _tensors(graph):
        if tensor.data_type in _REALS:
            _to_float32(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in _REALS:
                attribute.i = TensorProto.FLOAT
    if whole:
        version = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
        _follow(graph, whole, version)
    # they name types that may be gone, and are inferred again
    del graph.value_info[:]


def _tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t


def _to_float32(tensor: TensorProto) -> None:
    try:
        array = numpy_helper.to_array(tensor)
    except Exception as e:
        # onnx's own errors share no class
        raise BadInput(f"tensor {tensor.name!r} is damaged: {e}") from e
    tensor.CopyFrom(numpy_helper.from_array(array.astype("float32"), tensor.name))


def _follow(graph: onnx.GraphProto, whole: set[str], version: int) -> None:
    """What is made of fed integers is real too, and so is every constant that meets it."""
    constants = {t.name: t for t in graph.initializer}
    for node in list(graph.node):
        if not whole & set(node.input):
            continue
        if node.op_type == "Div" and not node.domain:
            whole.add(node.output[0])
            _truncated(graph, node, constants)
            continue
        if node.op_type == "Cast":
            to = next((a.i for a in node.attribute if a.name == "to"), None)
            if to != TensorProto.FLOAT:
                raise Unsupported(
                    f"node {node.name!r} (Cast) makes integers of integers, which may wrap around; "
                    "cut the model behind it"
                )
            node.op_type = "Identity"
            del node.attribute[:]
            continue
        if node.domain not in ("", "ai.onnx") or node.op_type not in _SAME_FOR_REALS:
            raise Unsupported(
                f"node {node.name!r} ({node.op_type}) computes with integers as no real numbers do; "
                "feed the model what it makes"
            )
        if node.op_type == "Gather" and whole & set(node.input[1:]):
            raise Unsupported(
                f"node {node.name!r} (Gather) looks up by integers that are fed ({node.input[1]!r}); "
                "feed the model what it makes"
            )
        schema = _schema(node, version)
        kind = _formal(schema, next(i for i, n in enumerate(node.input) if n in whole))
        for i, name in enumerate(node.input):
            if _formal(schema, i) == kind and name in constants:
                tensor = constants[name]
                if tensor.data_type in _WHOLE:
                    _to_float32(tensor)
        for i, name in enumerate(node.output):
            if schema.outputs[min(i, len(schema.outputs) - 1)].type_str == kind:
                whole.add(name)
    for value in graph.output:
        if value.name in whole:
            value.type.tensor_type.elem_type = TensorProto.FLOAT


def _truncated(
    graph: onnx.GraphProto, node: onnx.NodeProto, constants: Mapping[str, TensorProto]
) -> None:
    """Integers are divided towards zero: the sign of the quotient times the floor of its amount."""
    for name in node.input:
        if name in constants and constants[name].data_type in _WHOLE:
            _to_float32(constants[name])
    y = node.output[0]
    node.output[0] = f"{y}.quotient"
    steps = [
        helper.make_node("Abs", [f"{y}.quotient"], [f"{y}.amount"], f"{y}.amount"),
        helper.make_node("Floor", [f"{y}.amount"], [f"{y}.floor"], f"{y}.floor"),
        helper.make_node("Sign", [f"{y}.quotient"], [f"{y}.sign"], f"{y}.sign"),
        helper.make_node("Mul", [f"{y}.sign", f"{y}.floor"], [y], f"{y}.truncated"),
    ]
    place = list(graph.node).index(node) + 1
    for i, step in enumerate(steps):
        graph.node.insert(place + i, step)


def _schema(node: onnx.NodeProto, version: int) -> onnx.defs.OpSchema:
    """The definition of an operator that takes and makes at least one tensor."""
    try:
        return onnx.defs.get_schema(node.op_type, version)
    except (onnx.defs.SchemaError, TypeError) as e:
        # a version beyond 32 bits is a TypeError
        raise BadInput(
            f"node {node.name!r}: opset {version}, which the model states, has no {node.op_type}"
        ) from e


def _formal(schema: onnx.defs.OpSchema, index: int) -> str:
    """The type variable of an input."""
    return str(schema.inputs[min(index, len(schema.inputs) - 1)].type_str)
