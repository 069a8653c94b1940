"""Graph, Node, Value: SSA in execution order with use lists; all edits go through Graph."""

from __future__ import annotations

import math
from collections import Counter
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

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"the scale of {self.name} is positive, not {self.scale}")


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

    def add_input(self, port: Port, kind: TensorType, name: str | None = None) -> Value:
        """Append a graph input; its value is called `name`, by default as the port."""
        value = Value(self._fresh(port.name if name is None else name), kind)
        self.inputs.append((port, value))
        return value

    def add_output(self, port: Port, value: Value) -> None:
        """Append a graph output."""
        self.outputs.append((port, value))

    def constant(self, array: Array, kind: TensorType, name: str) -> Value:
        """Return a constant that holds a frozen copy of the array."""
        if array.shape != kind.shape or array.dtype != kind.dtype.numpy:
            raise TypeError(f"constant {name} is {array.dtype}{list(array.shape)}, not {kind}")
        lo, hi = int(array.min(initial=0)), int(array.max(initial=0))
        if lo < kind.dtype.lo or hi > kind.dtype.hi:
            raise TypeError(f"constant {name} holds {lo}..{hi}, which is not all {kind.dtype}")
        frozen = np.array(array, order="C")
        frozen.flags.writeable = False
        return Value(self._fresh(name), kind, const=frozen)

    def add(self, op: Op, *inputs: Value, name: str, layer: str | None = None) -> Value:
        """Append op(*inputs) and return its result, called `name`; `layer` is the node's name, `name` by default."""
        return self.insert(len(self.nodes), op, *inputs, name=name, layer=layer)

    def insert(self, at: int, op: Op, *inputs: Value, name: str, layer: str | None = None) -> Value:
        """Put op(*inputs) at a place in the order and return its result."""
        kind = op.infer(*(v.type for v in inputs))
        out = Value(self._fresh(name), kind)
        node = Node(op, inputs, out, name if layer is None else layer)
        out.producer = node
        for i, v in enumerate(inputs):
            v.uses[node, i] = None
        self.nodes.insert(at, node)
        return out

    def replace(self, old: Value, new: Value) -> None:
        """Let every user of old, the graph's outputs included, read new."""
        if new is old:
            return
        for node, i in old.uses:
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
        """Every constant that a node reads or the graph returns, once, in order of first use."""
        read = (v for node in self.nodes for v in node.inputs)
        returned = (v for _, v in self.outputs)
        yield from dict.fromkeys(v for v in (*read, *returned) if v.const is not None)

    def verify(self) -> None:
        """Raise TypeError at the first broken promise: order, result types, use lists, names, rows."""
        users: dict[Value, set[tuple[Node, int]]] = {v: set() for _, v in self.inputs}
        users.update((v, set()) for v in self.constants())
        for node in self.nodes:
            for i, v in enumerate(node.inputs):
                if v not in users:
                    raise TypeError(f"{node.name} reads {v.name} before it is made")
                users[v].add((node, i))
            if node.op.infer(*(v.type for v in node.inputs)) != node.output.type:
                raise TypeError(f"{node.name}: stale result type {node.output.type}")
            if node.output.producer is not node or node.output in users:
                raise TypeError(f"{node.output.name} is not made by {node.name} alone")
            users[node.output] = set()
        for port, v in self.outputs:
            if v not in users:
                raise TypeError(f"output {port.name} is never made")
        for v, known in users.items():
            if v.uses.keys() != known:
                raise TypeError(f"{v.name} does not know its users")
        for what, names in (
            ("values", [v.name for v in users]),
            ("inputs", [port.name for port, _ in self.inputs]),
            ("outputs", [port.name for port, _ in self.outputs]),
        ):
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise TypeError(f"two {what} are called {twice[0]}")
        if self.free_batch:
            self._verify_rows()

    def _verify_rows(self) -> None:
        """Twice the rows at the inputs must be twice the rows everywhere."""
        doubled = {v: _twice(v) for _, v in self.inputs}
        for node in self.nodes:
            kind = node.op.infer(*(doubled.get(v, v.type) for v in node.inputs))
            doubled[node.output] = _twice(node.output)
            if kind != doubled[node.output]:
                raise TypeError(f"{node.name} does not take any number of rows: {node.op}")

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
            lo, hi = value.type.dtype.lo, value.type.dtype.hi
            if x.min(initial=0) < lo or x.max(initial=0) > hi:
                raise TypeError(f"input {port.name} takes {value.type.dtype}, {lo} to {hi}")
            env[value] = x
        last = {v: node for node in self.nodes for v in node.inputs}
        kept = {v for _, v in self.outputs}
        for node in self.nodes:
            result = node.op.run(*(v.const if v.const is not None else env[v] for v in node.inputs))
            if node.output in last or node.output in kept:
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


def _twice(value: Value) -> TensorType:
    if not value.type.shape:
        raise TypeError(f"{value.name} has no rows")
    rows, *rest = value.type.shape
    return TensorType(value.type.dtype, (2 * rows, *rest))
