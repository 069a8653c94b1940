"""Graph, Node, Value: SSA in execution order with use lists; all edits go through Graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from qcompile.ir.ops import Op
from qcompile.ir.types import Array, TensorType


@dataclass(eq=False, slots=True)
class Value:
    """One tensor: made by a node, a graph input, or a constant."""

    name: str
    type: TensorType
    producer: Node | None = None
    const: Array | None = None
    uses: dict[tuple[Node, int], None] = field(default_factory=dict)

    @property
    def constant(self) -> Array:
        """The array of a constant; TypeError for any other value."""
        if self.const is None:
            raise TypeError(f"{self.name} is no constant")
        return self.const

    def __repr__(self) -> str:
        return f"%{self.name}: {self.type}"


@dataclass(eq=False, slots=True)
class Node:
    """One operator applied to values; `name` says which layer of the model it stands for."""

    op: Op
    inputs: tuple[Value, ...]
    output: Value
    name: str

    def __repr__(self) -> str:
        return f"{self.output!r} = {self.op}({', '.join(repr(v) for v in self.inputs)})"


@dataclass(frozen=True, slots=True)
class Port:
    """What the integers at the border mean: real = scale * (code - zero_point)."""

    name: str
    scale: float
    zero_point: int


class Graph:
    """Integer nodes in execution order, between the float model's inputs and outputs.

    `free_batch` says that the first axis of every value counts rows, so that any number of them may be run at once.
    """

    def __init__(self, name: str, free_batch: bool = True) -> None:
        self.name = name
        self.free_batch = free_batch
        self.inputs: list[tuple[Port, Value]] = []
        self.outputs: list[tuple[Port, Value]] = []
        self.nodes: list[Node] = []
        self._names: set[str] = set()

    def _fresh(self, name: str) -> str:
        candidate, count = name, 1
        while candidate in self._names:
            count += 1
            candidate = f"{name}.{count}"
        self._names.add(candidate)
        return candidate

    def add_input(self, port: Port, kind: TensorType) -> Value:
        """Append a graph input."""
        value = Value(self._fresh(port.name), kind)
        self.inputs.append((port, value))
        return value

    def add_output(self, port: Port, value: Value) -> None:
        """Append a graph output."""
        self.outputs.append((port, value))

    def constant(self, array: Array, kind: TensorType, name: str) -> Value:
        """Return a constant; its array is frozen."""
        if array.shape != kind.shape or array.dtype != kind.dtype.numpy:
            raise TypeError(f"constant {name} is {array.dtype}{list(array.shape)}, not {kind}")
        frozen = np.ascontiguousarray(array)
        frozen.flags.writeable = False
        return Value(self._fresh(name), kind, const=frozen)

    def add(self, op: Op, *inputs: Value, name: str, layer: str = "") -> Value:
        """Append op(*inputs) and return its result, called `name`; `layer` is the node's name, `name` by default."""
        return self.insert(len(self.nodes), op, *inputs, name=name, layer=layer)

    def insert(self, at: int, op: Op, *inputs: Value, name: str, layer: str = "") -> Value:
        """Put op(*inputs) at a place in the order and return its result."""
        out = Value(self._fresh(name), op.infer(*(v.type for v in inputs)))
        node = Node(op, inputs, out, layer or name)
        out.producer = node
        for i, v in enumerate(inputs):
            v.uses[node, i] = None
        self.nodes.insert(at, node)
        return out

    def replace(self, old: Value, new: Value) -> None:
        """Let every user of old, the graph's outputs included, read new."""
        for node, i in list(old.uses):
            node.inputs = (*node.inputs[:i], new, *node.inputs[i + 1 :])
            new.uses[node, i] = None
        old.uses.clear()
        self.outputs = [(port, new if v is old else v) for port, v in self.outputs]

    def erase(self, node: Node) -> None:
        """Remove a node nobody reads."""
        if node.output.uses or any(v is node.output for _, v in self.outputs):
            raise ValueError(f"{node.name} is still read")
        for i, v in enumerate(node.inputs):
            del v.uses[node, i]
        self.nodes.remove(node)
        self._names.discard(node.output.name)

    def constants(self) -> Iterator[Value]:
        """Every constant that a node reads, once, in order of first use."""
        seen: set[Value] = set()
        for node in self.nodes:
            for v in node.inputs:
                if v.const is not None and v not in seen:
                    seen.add(v)
                    yield v

    def verify(self) -> None:
        """Raise TypeError at the first broken promise: order, use lists, result types, names."""
        seen = {v for _, v in self.inputs}
        names: set[str] = {v.name for v in seen}
        for node in self.nodes:
            for i, v in enumerate(node.inputs):
                if v.const is None and v not in seen:
                    raise TypeError(f"{node.name} reads {v.name} before it is made")
                if (node, i) not in v.uses:
                    raise TypeError(f"{v.name} does not know its user {node.name}")
            if node.op.infer(*(v.type for v in node.inputs)) != node.output.type:
                raise TypeError(f"{node.name}: stale result type {node.output.type}")
            if node.output.name in names:
                raise TypeError(f"two values are called {node.output.name}")
            names.add(node.output.name)
            seen.add(node.output)
        for port, v in self.outputs:
            if v not in seen and v.const is None:
                raise TypeError(f"output {port.name} is never made")

    def run(
        self,
        feeds: Mapping[str, Array],
        *,
        on_value: Callable[[Value, Array], None] | None = None,
    ) -> dict[str, Array]:
        """Interpret: the golden reference. Feeds and results are codes, by port name; `on_value` sees every result.

        A value is dropped after its last use, so memory stays near the program's own.
        """
        env: dict[Value, Array] = {}
        for port, value in self.inputs:
            x = np.asarray(feeds[port.name])
            if x.dtype != value.type.dtype.numpy:
                raise TypeError(f"input {port.name} takes {value.type.dtype}, not {x.dtype}")
            rows = x.shape[:1] if self.free_batch else value.type.shape[:1]
            if x.shape != (*rows, *value.type.shape[1:]):
                raise TypeError(f"input {port.name} takes {value.type}, not shape {list(x.shape)}")
            env[value] = x
        last = {v: node for node in self.nodes for v in node.inputs}
        kept = {v for _, v in self.outputs}
        for node in self.nodes:
            result = node.op.run(*(v.const if v.const is not None else env[v] for v in node.inputs))
            env[node.output] = result
            if on_value is not None:
                on_value(node.output, result)
            for v in node.inputs:
                if last[v] is node and v not in kept:
                    env.pop(v, None)
        return {port.name: v.const if v.const is not None else env[v] for port, v in self.outputs}

    def values(self) -> Sequence[Value]:
        """Inputs and every node's result, in order."""
        return [v for _, v in self.inputs] + [n.output for n in self.nodes]

    def __str__(self) -> str:
        from qcompile.ir.text import dump

        return dump(self)
