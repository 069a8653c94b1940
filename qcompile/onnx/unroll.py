"""Loops whose number of turns is a constant, written out turn by turn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

MOST_NODES = 1 << 14
"""How many nodes a loop may become; a longer one stays."""


def unroll(graph: onnx.GraphProto) -> None:
    """Replace, in place, every Loop of the graph that runs a constant number of turns and never stops early."""
    constants = _constants(graph)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        turns = _turns(node, constants)
        body = next((a.g for a in node.attribute if a.name == "body"), None)
        if turns is None or body is None or turns * len(body.node) > MOST_NODES:
            nodes.append(node)
            continue
        graph.initializer.extend(_renamed_initializers(body, node))
        nodes.extend(_turned(graph, node, body, turns))
    del graph.node[:]
    graph.node.extend(nodes)


def _constants(graph: onnx.GraphProto) -> dict[str, NDArray[np.generic]]:
    """Small constants by name."""
    found = {t.name: numpy_helper.to_array(t) for t in graph.initializer if sum(t.dims) <= 1}
    for node in graph.node:
        for a in node.attribute:
            if node.op_type == "Constant" and a.name == "value" and sum(a.t.dims) <= 1:
                found[node.output[0]] = numpy_helper.to_array(a.t)
    return found


def _turns(node: onnx.NodeProto, constants: Mapping[str, NDArray[np.generic]]) -> int | None:
    """How often a Loop turns; None where that is known at run time only, or for another node."""
    if node.op_type != "Loop" or node.domain or len(node.input) < 2:
        return None
    count, condition = node.input[0], node.input[1]
    if count not in constants or (condition and condition not in constants):
        return None
    if condition and not bool(constants[condition].reshape(-1)[0]):
        return 0 if len(node.output) == len(node.input) - 2 else None
    body = next(a.g for a in node.attribute if a.name == "body")
    if not _goes_on(body):
        return None
    turns = int(constants[count].reshape(-1)[0])
    # an empty list of scanned values would have no shape
    return turns if turns > 0 or len(node.output) == len(node.input) - 2 else None


def _goes_on(body: onnx.GraphProto) -> bool:
    """Does the body hand on the condition it got, or a constant True?"""
    source = body.output[0].name
    makers = {name: node for node in body.node for name in node.output}
    while source in makers and makers[source].op_type in ("Identity", "Cast"):
        source = makers[source].input[0]
    if source == body.input[1].name:
        return True
    constant = _constants(body).get(source)
    return constant is not None and bool(constant.reshape(-1)[0])


def _inner(node: onnx.NodeProto, name: str) -> str:
    return f"{node.name or node.output[0]}.{name}"


def _renamed_initializers(
    body: onnx.GraphProto, node: onnx.NodeProto
) -> Iterator[onnx.TensorProto]:
    for tensor in body.initializer:
        copy = onnx.TensorProto()
        copy.CopyFrom(tensor)
        copy.name = _inner(node, tensor.name)
        yield copy


def _turned(
    graph: onnx.GraphProto, node: onnx.NodeProto, body: onnx.GraphProto, turns: int
) -> Iterator[onnx.NodeProto]:
    carried = list(node.input[2:])
    scanned: list[list[str]] = [[] for _ in body.output[1 + len(carried) :]]
    true = _inner(node, "true")
    graph.initializer.append(numpy_helper.from_array(np.array(True), true))
    axis = _inner(node, "axis")
    graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), axis))
    for turn in range(turns):
        number = _inner(node, f"{turn}")
        graph.initializer.append(numpy_helper.from_array(np.array(turn, np.int64), number))
        names = {t.name: _inner(node, t.name) for t in body.initializer}
        names |= dict(zip((v.name for v in body.input), [number, true, *carried], strict=True))
        for inner in body.node:
            copy = onnx.NodeProto()
            copy.CopyFrom(inner)
            copy.name = _inner(node, f"{inner.name or inner.op_type}.{turn}")
            for name in inner.output:
                names[name] = _inner(node, f"{name}.{turn}") if name else ""
            del copy.input[:], copy.output[:]
            copy.input.extend(names.get(name, name) for name in inner.input)
            copy.output.extend(names[name] for name in inner.output)
            yield copy
        carried = [names.get(v.name, v.name) for v in body.output[1 : 1 + len(carried)]]
        for row, v in zip(scanned, body.output[1 + len(carried) :], strict=True):
            row.append(names.get(v.name, v.name))
    for name, source in zip(node.output, carried, strict=False):
        if name:
            yield helper.make_node("Identity", [source], [name], f"{name}.last")
    for name, row in zip(node.output[len(carried) :], scanned, strict=True):
        if name:
            wide = [f"{source}.{name}.row" for source in row]
            for source, made in zip(row, wide, strict=True):
                yield helper.make_node("Unsqueeze", [source, axis], [made], f"{made}.unsqueeze")
            yield helper.make_node("Concat", wide, [name], f"{name}.rows", axis=0)
