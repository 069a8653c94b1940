"""A foreign ONNX graph as its readers see it: constants, who makes and who reads a value; and what they find in it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from qcompile.errors import BadInput
from qcompile.foreign.decisions import Codes, Grid
from qcompile.onnx import weights

Array = NDArray[np.generic]

_DEPTH = 16
"""How many operators may stand between a constant and the place where it is read."""


@dataclass(frozen=True, slots=True)
class Rounded:
    """`result` is `source` rounded to a grid and back to float."""

    source: str
    result: str
    grid: Grid


@dataclass(frozen=True, slots=True)
class Stored:
    """`result` is what constant codes stand for."""

    result: str
    codes: Codes
    grid: Grid


class Source:
    """Look-ups in a graph that nobody vouches for; BadInput where it is damaged."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.nodes = list(graph.node)
        self.inputs = {v.name for v in graph.input} - {t.name for t in graph.initializer}
        self.outputs = [v.name for v in graph.output]
        self.makers = {name: node for node in self.nodes for name in node.output if name}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.readers[name].append(node)
        self._stored = {t.name: t for t in graph.initializer}
        self._known: dict[str, Array] = {}

    def constant(self, name: str) -> Array | None:
        """The array of a constant, also behind Identity and Transpose; None for what is computed."""
        steps: list[onnx.NodeProto] = []
        while name not in self._stored:
            node = self.makers.get(name)
            if node is None or len(steps) == _DEPTH:
                return None
            if node.op_type == "Constant":
                break
            if node.op_type not in ("Identity", "Transpose") or not node.input:
                return None
            steps.append(node)
            name = node.input[0]
        array = self._leaf(name)
        for node in reversed(steps):
            if node.op_type == "Transpose":
                perm = attribute(node, "perm")
                try:
                    array = array.transpose(perm if isinstance(perm, list) else None)
                except ValueError as e:
                    raise BadInput(f"node {title(node)}: {e}") from e
        return array

    def _leaf(self, name: str) -> Array:
        if name not in self._known:
            tensor = self._stored.get(name)
            if tensor is None:
                value = attribute(self.makers[name], "value")
                if not isinstance(value, onnx.TensorProto):
                    simple = next((a for a in self.makers[name].attribute), None)
                    kind = None if simple is None else simple.name
                    if kind not in ("value_float", "value_floats", "value_int", "value_ints"):
                        raise BadInput(
                            f"node {title(self.makers[name])}: a Constant without numbers"
                        )
                    self._known[name] = np.asarray(
                        helper.get_attribute_value(self.makers[name].attribute[0]),
                        np.float32 if "float" in kind else np.int64,
                    )
                    return self._known[name]
                tensor = value
            if weights.unchecked(tensor):
                raise BadInput(
                    f"tensor {name!r} keeps its values in another file; give the model with its data in one file"
                )
            try:
                self._known[name] = weights.array(tensor)
            except Exception as e:
                # truncated data, shapes and types that do not fit: every class of error there is
                raise BadInput(f"tensor {name!r} is damaged: {' '.join(str(e).split())}") from e
        return self._known[name]

    def needed(self, node: onnx.NodeProto, index: int, role: str) -> Array:
        """A constant operand; BadInput where it is missing or computed."""
        name = operand(node, index)
        array = self.constant(name) if name else None
        if array is None:
            raise BadInput(
                f"node {title(node)}: its {role} is no constant; only fixed quantization is taken over"
            )
        return array


def operand(node: onnx.NodeProto, index: int) -> str:
    """The name of an operand, empty where it is left out."""
    return node.input[index] if index < len(node.input) else ""


def title(node: onnx.NodeProto) -> str:
    """How to call a node in a sentence."""
    return f"{node.name or ', '.join(node.output)!r} ({node.op_type})"


def attribute(node: onnx.NodeProto, name: str) -> object:
    """The value of an attribute, None without; BadInput where it is damaged."""
    for a in node.attribute:
        if a.name == name:
            try:
                value: object = helper.get_attribute_value(a)
            except ValueError as e:
                raise BadInput(f"node {title(node)}: its attribute {name} is damaged: {e}") from e
            return list(value) if isinstance(value, tuple) else value
    return None


def integer(node: onnx.NodeProto, name: str, default: int) -> int:
    """An integer attribute; BadInput for one of another type."""
    value = attribute(node, name)
    if value is None:
        return default
    if not isinstance(value, int):
        raise BadInput(f"node {title(node)}: its attribute {name} is an integer")
    return value
