"""Editing a float graph: read a constant, add one, put one node in the place of another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.onnx.weights import kept

Array = NDArray[np.generic]
Dims = tuple[int | ir.SymbolicDim, ...]


def constant(value: ir.Value | None) -> Array | None:
    """The array of an initializer; None for anything that is computed, fed or absent."""
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    return value.const_value.numpy()


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """The node's input at `index`, None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def dims(value: ir.Value | None) -> Dims | None:
    """The dimensions of a value whose rank is known."""
    return None if value is None or value.shape is None else value.shape.dims


def static(dimensions: Sequence[int | ir.SymbolicDim]) -> tuple[int, ...] | None:
    """The dimensions if all of them are numbers."""
    numbers = tuple(d for d in dimensions if isinstance(d, int))
    return numbers if len(numbers) == len(dimensions) else None


def sole_use(value: ir.Value) -> bool:
    """Is the value read exactly once, and not an output of the graph?"""
    return len(value.uses()) == 1 and not value.is_graph_output()


def reshape_target(source: ir.Value, target: ir.Value) -> list[int] | None:
    """The constant shape that makes `target` of `source`, leading with 0 or -1 where the batch is free."""
    before, after = dims(source), dims(target)
    if before is None or after is None:
        return None
    if (fixed := static(after)) is not None:
        return list(fixed)
    if isinstance(after[0], int):
        return None
    if before and before[0] == after[0] and (rest := static(before[1:])) is not None:
        known = [d for d in after[1:] if isinstance(d, int)]
        volume, product = math.prod(rest), math.prod(known)
        if len(known) == len(after) - 1 and volume == product:
            return [0, *known]
        if len(known) == len(after) - 2 and product and volume % product == 0:
            return [0, *(d if isinstance(d, int) else volume // product for d in after[1:])]
    tail = static(after[1:])
    return None if tail is None else [-1, *tail]


def keep_outputs(graph: ir.Graph, names: Sequence[str]) -> None:
    """Two outputs that became one value when an Identity went are two again."""
    for i, name in enumerate(names):
        value = graph.outputs[i]
        if value.name == name:
            continue
        copy = ir.Value(name=name, shape=value.shape, type=value.type)
        graph.append(ir.Node("", "Identity", [value], outputs=[copy], name=f"{name}.copy"))
        graph.outputs[i] = copy


class Editor:
    """Adds uniquely named constants and nodes to one graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._values = {v.name for v in graph.inputs} | set(graph.initializers)
        self._nodes: set[str | None] = set()
        self._turned: dict[ir.Value, ir.Value] = {}
        for node in graph:
            self._nodes.add(node.name)
            self._values.update(v.name for v in node.outputs)

    def _fresh(self, hint: str, taken: set[str | None]) -> str:
        name, count = hint, 1
        while not name or name in taken:
            count += 1
            name = f"{hint or 'unnamed'}_{count}"
        taken.add(name)
        return name

    def turned(self, matrix: ir.Value, hint: str) -> ir.Value:
        """The transpose of a constant matrix; nodes that share the matrix share it."""
        if matrix not in self._turned:
            array = constant(matrix)
            assert array is not None
            self._turned[matrix] = self.const(array.T, hint)
        return self._turned[matrix]

    def const(self, array: Array, hint: str) -> ir.Value:
        """A new initializer that holds `array`."""
        name = self._fresh(hint, self._values)
        tensor = kept(array, name)
        value = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(array.shape),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value

    def before(
        self,
        node: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        shape: Sequence[int | ir.SymbolicDim] | None,
        *,
        hint: str,
        domain: str = "",
        **attributes: float | str | Sequence[int],
    ) -> ir.Value:
        """Put a new float32 node with one output of `shape` in front of `node`."""
        name = self._fresh(hint, self._nodes)
        output = ir.Value(
            name=self._fresh(f"{name}_output", self._values),
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=None if shape is None else ir.Shape(shape),
        )
        new = ir.node(op_type, inputs, attributes, domain=domain, outputs=[output], name=name)
        self.graph.insert_before(node, new)
        return output

    def take_over(self, old: ir.Value, new: ir.Value) -> None:
        """Every reader of `old` reads `new`, which gets its name; the node that made `old` is gone."""
        name = old.name
        new.metadata_props.update(old.metadata_props)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        self.erase(old)
        old.name = self._fresh(f"{name}_old", self._values)
        new.name = name

    def replace(self, node: ir.Node, new: ir.Value) -> None:
        """The node that makes `new` stands for `node`, under its name."""
        heir = new.producer()
        assert heir is not None
        self.take_over(node.outputs[0], new)
        if node.name:
            heir.name = node.name

    def bypass(self, node: ir.Node) -> bool:
        """Let the readers of a node's output read its first input, unless a graph output needs the node."""
        source, output = node.inputs[0], node.outputs[0]
        assert source is not None
        if output.is_graph_output():
            if source.producer() is None or source.is_graph_output():
                return False
            self.take_over(output, source)
        else:
            output.replace_all_uses_with(source)
            self.erase(output)
        return True

    def erase(self, value: ir.Value) -> None:
        """Remove the node that makes `value`."""
        producer = value.producer()
        assert producer is not None
        self.graph.remove(producer, safe=True)


def set_inputs(node: ir.Node, inputs: Mapping[int, ir.Value]) -> None:
    """Replace some inputs of a node, lengthening its input list as needed."""
    if (need := max(inputs) + 1) > len(node.inputs):
        node.resize_inputs(need)
    for index, value in inputs.items():
        node.replace_input_with(index, value)


def set_attributes(node: ir.Node, **attributes: float | str | Sequence[int]) -> bool:
    """Give the node exactly these attributes; say whether that changed it."""
    new = ir.convenience.convert_attributes(attributes)
    if {a.name: a.value for a in new} == {a.name: a.value for a in node.attributes.values()}:
        return False
    node.attributes.clear()
    for attribute in new:
        node.attributes.add(attribute)
    return True
