"""Looking for floating point in an ONNX file, by types alone.

An operator of `_CLOSED` gives integers where it is given integers. If there are no others, no input, constant or
attribute is float and nothing is cast to float, then no tensor of the model is.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import AttributeProto, TensorProto

from qcompile.target import FloatCertificate

from .session import opened

_CLOSED = frozenset(
    {
        "Add", "ArgMax", "ArgMin", "Cast", "Clip", "Concat", "Constant", "ConvInteger", "Div", "Gather",
        "GreaterOrEqual", "Identity", "MatMulInteger", "Max", "Min", "Mul", "Pad", "ReduceMax", "ReduceSum",
        "Reshape", "Slice", "Sub", "Transpose",
    }
)  # fmt: skip
_INTEGERS = frozenset(
    {
        TensorProto.BOOL, TensorProto.INT4, TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64,
        TensorProto.UINT4, TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64,
    }
)  # fmt: skip
_CASTS = frozenset({"to", "dtype", "output_dtype"})
_INNOCENT = frozenset(
    {AttributeProto.INT, AttributeProto.INTS, AttributeProto.STRING, AttributeProto.STRINGS}
)


def certify(file: Path) -> FloatCertificate:
    """Read every operator of a model and of its functions, and every type it names."""
    model = opened(file)
    own = {(f.domain, f.name) for f in model.functions}
    nodes = [*model.graph.node, *(node for f in model.functions for node in f.node)]
    found = [
        f"{node.name or node.op_type}: {finding}"
        for node in nodes
        for finding in _node(node, (node.domain, node.op_type) in own)
    ]
    for tensor in model.graph.initializer:
        if tensor.data_type not in _INTEGERS:
            found.append(f"constant {tensor.name} is {_type(tensor.data_type)}")
    for port in (*model.graph.input, *model.graph.output):
        if port.type.tensor_type.elem_type not in _INTEGERS:
            found.append(f"{port.name} is {_type(port.type.tensor_type.elem_type)}")
    return FloatCertificate(
        len(nodes), found, f"operators of {file.name} and its functions were read"
    )


def _node(node: onnx.NodeProto, own: bool) -> Iterator[str]:
    if not own and (node.domain not in ("", "ai.onnx") or node.op_type not in _CLOSED):
        yield f"{node.op_type} may give floats"
    for attribute in node.attribute:
        if attribute.type == AttributeProto.TENSOR:
            if attribute.t.data_type not in _INTEGERS:
                yield f"{attribute.name} is {_type(attribute.t.data_type)}"
        elif attribute.type not in _INNOCENT:
            yield f"attribute {attribute.name} is no integer"
        elif attribute.name in _CASTS and not attribute.ref_attr_name:
            if attribute.i not in _INTEGERS:
                yield f"casts to {_type(attribute.i)}"


def _type(number: int) -> str:
    """What an element type is called."""
    known = TensorProto.DataType
    return known.Name(number).lower() if number in known.values() else f"type {number}"
