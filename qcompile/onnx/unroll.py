"""Loops whose number of turns follows from constants, written out turn by turn.

Exporters of TensorFlow write a recurrent layer as a Loop that counts, and goes on while its counter is below a number.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[np.generic]

MOST_NODES = 1 << 14
"""How many nodes a loop may become; a longer one stays."""

_ARITHMETIC: Mapping[str, Callable[..., Array]] = {
    "Add": np.add, "And": np.logical_and, "Equal": np.equal, "Greater": np.greater, "GreaterOrEqual": np.greater_equal,
    "Identity": np.asarray, "Less": np.less, "LessOrEqual": np.less_equal, "Max": np.maximum, "Min": np.minimum,
    "Mul": np.multiply, "Not": np.logical_not, "Or": np.logical_or, "Sub": np.subtract, "Xor": np.logical_xor,
}  # fmt: skip
_NUMBERS = frozenset({TensorProto.BOOL, TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64})
"""What counters and conditions are made of, and casts between."""


def unroll(graph: onnx.GraphProto) -> None:
    """Replace, in place, every Loop of the graph whose number of turns follows from constants."""
    constants = _numbers(graph)
    _follow(graph.node, constants)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        turns = _turns(node, constants)
        body = next((a.g for a in node.attribute if a.name == "body"), None)
        if turns is None or body is None:
            nodes.append(node)
            continue
        graph.initializer.extend(_renamed_initializers(body, node))
        nodes.extend(_turned(graph, node, body, turns))
    del graph.node[:]
    graph.node.extend(nodes)


def _numbers(graph: onnx.GraphProto) -> dict[str, Array]:
    """Initializers that are one number."""
    return {t.name: numpy_helper.to_array(t) for t in graph.initializer if math.prod(t.dims) == 1}


def _follow(nodes: Iterable[onnx.NodeProto], known: MutableMapping[str, Array]) -> None:
    """Add what the nodes make of single numbers that are known."""
    for node in nodes:
        value = None if node.domain or len(node.output) != 1 else _made(node, known)
        if value is not None and value.size == 1:
            known[node.output[0]] = value


def _made(node: onnx.NodeProto, known: Mapping[str, Array]) -> Array | None:
    """What a node makes of numbers that are known."""
    attributes = {a.name: a for a in node.attribute}
    if node.op_type == "Constant" and "value" in attributes:
        tensor = attributes["value"].t
        return numpy_helper.to_array(tensor) if math.prod(tensor.dims) == 1 else None
    if not node.input or any(name not in known for name in node.input):
        return None
    operands = [known[name] for name in node.input]
    with np.errstate(all="ignore"):
        if node.op_type == "Cast" and attributes["to"].i in _NUMBERS:
            return operands[0].astype(helper.tensor_dtype_to_np_dtype(attributes["to"].i))
        if node.op_type in _ARITHMETIC:
            return np.asarray(_ARITHMETIC[node.op_type](*operands))
    return None


def _turns(node: onnx.NodeProto, constants: dict[str, Array]) -> int | None:
    """How often a Loop turns; None where that is known at run time only, is too often, or for another node."""
    if node.op_type != "Loop" or node.domain or len(node.input) < 2:
        return None
    count, condition, *carried = node.input
    if any(name and name not in constants for name in (count, condition)):
        return None
    most = int(constants[count].reshape(-1)[0]) if count else None
    going = not condition or bool(constants[condition].reshape(-1)[0])
    body = next(a.g for a in node.attribute if a.name == "body")
    number, go, *states = (v.name for v in body.input)
    own = _numbers(body)
    known = {
        v: constants[name] for v, name in zip(states, carried, strict=True) if name in constants
    }
    turns = 0
    while going and (most is None or turns < most):
        known |= {number: np.array(turns, np.int64), go: np.array(True)}
        found = ChainMap(known, own, constants)
        _follow(body.node, found)
        after = found.get(body.output[0].name)
        turns += 1
        if after is None or turns * len(body.node) > MOST_NODES or turns > MOST_NODES:
            return None
        going = bool(after.reshape(-1)[0])
        if not (going or condition):
            # runtimes differ in whether a condition counts that nothing began with
            return None
        handed = [v.name for v in body.output[1 : 1 + len(states)]]
        known = {v: found[name] for v, name in zip(states, handed, strict=True) if name in found}
    # an empty list of scanned values would have no shape
    return turns if turns or len(node.output) == len(carried) else None


def _invariant(body: onnx.GraphProto) -> set[str]:
    """What every turn would make alike."""
    states = zip(body.input[2:], body.output[1:], strict=False)
    changing = {v.name for v in body.input} - {
        v.name for v, after in states if v.name == after.name
    }
    same: set[str] = set()
    for node in body.node:
        if changing.isdisjoint(node.input) and not any(a.HasField("g") for a in node.attribute):
            same.update(node.output)
        else:
            changing.update(node.output)
    return same


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
    same = _invariant(body)
    first: dict[str, str] = {}
    for turn in range(turns):
        number = _inner(node, f"{turn}")
        graph.initializer.append(numpy_helper.from_array(np.array(turn, np.int64), number))
        names = {t.name: _inner(node, t.name) for t in body.initializer}
        names |= dict(zip((v.name for v in body.input), [number, true, *carried], strict=True))
        names |= first
        for inner in body.node:
            if turn and same.issuperset(inner.output):
                continue
            copy = onnx.NodeProto()
            copy.CopyFrom(inner)
            copy.name = _inner(node, f"{inner.name or inner.op_type}.{turn}")
            for name in inner.output:
                names[name] = _inner(node, f"{name}.{turn}") if name else ""
            del copy.input[:], copy.output[:]
            copy.input.extend(names.get(name, name) for name in inner.input)
            copy.output.extend(names[name] for name in inner.output)
            yield copy
        first = {name: names[name] for name in same if name in names}
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
