"""Large weights stay out of the messages that the ONNX libraries work on: inputs stand for them meanwhile."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import onnx
import onnx.helper
import onnx_ir as ir

_Message = TypeVar("_Message", onnx.ModelProto, onnx.GraphProto)

LARGE_BYTES = 1 << 20
"""Smaller weights stay: shapes and indices among them settle what is inferred."""


def detach(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, ir.TensorProtocol]]:
    """A copy without its large float32 weights, as inputs instead, and these weights by name; `model` stays whole."""
    names = Counter(t.name for t in model.graph.initializer)
    names.update(v.name for v in model.graph.input)
    light = onnx.ModelProto()
    _copy(model, light, "graph")
    _copy(model.graph, light.graph, "initializer")
    weights: dict[str, ir.TensorProtocol] = {}
    for tensor in model.graph.initializer:
        if names[tensor.name] > 1 or not _large(tensor):
            light.graph.initializer.append(tensor)
            continue
        array = np.frombuffer(tensor.raw_data, "<f4").reshape(tensor.dims)
        weights[tensor.name] = ir.Tensor(array, name=tensor.name)
        light.graph.input.append(
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
    return light, weights


def attach(model: ir.Model, weights: Mapping[str, ir.TensorProtocol]) -> bool:
    """Put weights back where inputs stood for them, unused ones excepted; is a node made of constants alone now?"""
    graph = model.graph
    back = [value for value in graph.inputs if value.name in weights]
    for value in back:
        graph.inputs.remove(value)
        if value.uses() or value.is_graph_output():
            value.const_value = weights[str(value.name)]
            graph.register_initializer(value)
    return any(
        all(v is None or v.is_initializer() for v in node.inputs)
        for value in back
        for node in value.consumers()
    )


def _large(tensor: onnx.TensorProto) -> bool:
    """Is it large, and as long as its shape says? The checker words what is wrong with any other."""
    if tensor.data_type != onnx.TensorProto.FLOAT or min(tensor.dims, default=0) < 1:
        return False
    size = math.prod(tensor.dims) * 4
    return bool(tensor.name) and size >= LARGE_BYTES and size == len(tensor.raw_data)


def _copy(source: _Message, target: _Message, left_out: str) -> None:
    for field, value in source.ListFields():
        if field.name == left_out:
            continue
        if hasattr(value, "MergeFrom"):
            getattr(target, field.name).MergeFrom(value)
        else:
            setattr(target, field.name, value)
