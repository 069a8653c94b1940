"""What scikit-learn's exporter puts around a network (domain ai.onnx.ml), in standard operators."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qcompile.errors import BadInput

DOMAIN = "ai.onnx.ml"


def in_standard_operators(model: onnx.ModelProto) -> None:
    """Replace, in place, Scaler by Sub and Mul, ZipMap by its table, and a look-up in 0, 1, 2, ... by its index."""
    graph = model.graph
    if not any(node.domain == DOMAIN for node in graph.node):
        return
    constants = {t.name: t for t in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        match node.domain, node.op_type:
            case "ai.onnx.ml", "Scaler":
                nodes.extend(_scaler(node, graph))
            case "ai.onnx.ml", "ZipMap":
                nodes.append(_identity(node))
                _plain_output(graph, node.output[0])
            case "ai.onnx.ml", "ArrayFeatureExtractor" if _counts_up(constants.get(node.input[0])):
                node.input.reverse()
                nodes.append(_identity(node))
            case _:
                nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    left = [o for o in model.opset_import if o.domain != DOMAIN]
    if not any(node.domain == DOMAIN for node in nodes):
        del model.opset_import[:]
        model.opset_import.extend(left)


def _identity(node: onnx.NodeProto) -> onnx.NodeProto:
    return helper.make_node("Identity", [node.input[0]], [node.output[0]], node.name)


def _scaler(node: onnx.NodeProto, graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """(x - offset) * scale."""
    y = node.output[0]
    numbers = {a.name: np.array(a.floats, np.float32) for a in node.attribute}
    for name in ("offset", "scale"):
        row = numbers.get(name, np.array([float(name == "scale")], np.float32))
        graph.initializer.append(numpy_helper.from_array(row, f"{y}.{name}"))
    yield helper.make_node("Sub", [node.input[0], f"{y}.offset"], [f"{y}.shifted"], f"{y}.shifted")
    yield helper.make_node("Mul", [f"{y}.shifted", f"{y}.scale"], [y], node.name)


def _counts_up(tensor: TensorProto | None) -> bool:
    """Are these the numbers of the classes, so that a class is its index?"""
    if tensor is None or tensor.data_type not in (TensorProto.INT32, TensorProto.INT64):
        return False
    try:
        classes = numpy_helper.to_array(tensor).reshape(-1)
    except Exception as e:
        # onnx's own errors share no class
        raise BadInput(f"tensor {tensor.name!r} is damaged: {e}") from e
    return bool(np.array_equal(classes, np.arange(len(classes))))


def _plain_output(graph: onnx.GraphProto, name: str) -> None:
    """A list of dictionaries becomes the table it is made of."""
    for value in graph.output:
        if value.name == name:
            value.CopyFrom(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
