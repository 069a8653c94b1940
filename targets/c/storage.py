"""The steps of a program, their kernels and order, and where every value's bytes lie."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from qcompile import memory
from qcompile.errors import Unsupported
from qcompile.ir import Graph, Node, Rescale, Reshape, Value, ops

from .kernel import ALIGN, Kernel, Step, shared
from .nest import row_major
from .window import trails


def fuse(graph: Graph) -> list[Step]:
    """The graph's steps: an accumulator that one Rescale alone reads is rescaled where it is made.

    A Rescale of several such accumulators takes the last; the others are stored.
    """
    outputs = {v for _, v in graph.outputs}
    into: dict[Node, Node] = {}
    for node in graph.nodes:
        if isinstance(node.op, Rescale):
            for v in node.inputs[: len(node.op.accs)]:
                alone = len(v.uses) == 1 and v not in outputs
                if alone and v.producer is not None and _accumulates(v.producer):
                    into[node] = v.producer
    fused = set(into.values())
    return [
        Step(into[node], node) if node in into else Step(node)
        for node in graph.nodes
        if node not in fused and not isinstance(node.op, Reshape)
    ]


def _accumulates(node: Node) -> bool:
    return isinstance(node.op, ops.Conv | ops.MatMul | ops.SumPool | ops.Mul | ops.BatchMatMul)


def cheapest(step: Step, kernels: Sequence[Kernel]) -> Kernel:
    """The kernel that computes a step in the fewest operations; Unsupported where none does."""
    able = [kernel for kernel in kernels if kernel.matches(step)]
    if not able:
        raise Unsupported(
            f"{step.name}: no C kernel computes {type(step.node.op).__name__} of"
            f" {', '.join(str(v.type) for v in step.node.inputs)}"
        )
    return min(able, key=lambda kernel: kernel.cost(step))


class Views:
    """Nodes that move nothing: they say where bytes lie that another step writes.

    A Reshape, a Slice of elements that lie side by side, and a Concat whose operands are made side by side.
    """

    def __init__(self, graph: Graph) -> None:
        self.returned = {_reshaped(v) for _, v in graph.outputs}
        self.nodes: set[Node] = set()
        self._within: dict[Value, tuple[Value, int]] = {}
        for node in graph.nodes:
            if self._is_view(node):
                self.nodes.add(node)
        self.joins = [node for node in graph.nodes if self._join(node)]
        self.nodes.update(self.joins)

    def _is_view(self, node: Node) -> bool:
        if isinstance(node.op, Reshape):
            return True
        if not isinstance(node.op, ops.Slice) or node.output in self.returned:
            return False
        root, _ = self.root(node.inputs[0])
        return root.const is None and _side_by_side(node)

    def _join(self, node: Node) -> bool:
        """Let the operands of a Concat be made inside its result, where that can be."""
        if not isinstance(node.op, ops.Concat) or not self._is_read(node.output):
            return False
        if math.prod(node.output.type.shape[: node.op.axis]) != 1:
            return False
        parts = [_reshaped(v) for v in node.inputs]
        if len(set(parts)) < len(parts) or not all(map(self._is_made, parts)):
            return False
        at = 0
        for part in parts:
            self._within[part] = (node.output, at)
            at += part.type.size
        return True

    def _is_made(self, part: Value) -> bool:
        """Is it written by a step (or are its parts), and free to lie in a larger value?"""
        if part.producer is None or part in self._within or part in self.returned:
            return False
        return part.producer not in self.nodes or isinstance(part.producer.op, ops.Concat)

    def _is_read(self, value: Value) -> bool:
        """Does a step read it, or is it returned? What lies in pieces lives for its readers."""
        if value in self.returned:
            return True
        return any(n not in self.nodes or self._is_read(n.output) for n, _ in value.uses)

    def root(self, value: Value) -> tuple[Value, int]:
        """The value whose bytes these are, and how many elements into it they begin."""
        at = 0
        while value.producer is not None and value.producer in self.nodes:
            node = value.producer
            if isinstance(node.op, ops.Concat):
                break
            if isinstance(node.op, ops.Slice):
                strides = row_major(node.inputs[0].type.shape)[1:]
                at += sum(a * s for a, s in zip(node.op.starts, strides, strict=True))
            (value,) = node.inputs
        return value, at

    def whole(self, value: Value) -> tuple[Value, int]:
        """The largest value it lies in, and how many elements into that it begins."""
        at = 0
        while value in self._within:
            value, more = self._within[value]
            at += more
        return value, at

    def pieces(self, value: Value) -> Iterator[tuple[Value, int]]:
        """What is made step by step of a value that is no view itself, and how many elements into it."""
        node = value.producer
        if node is None or node not in self.nodes:
            yield value, 0
            return
        at = 0
        for part in map(_reshaped, node.inputs):
            yield from ((piece, at + more) for piece, more in self.pieces(part))
            at += part.type.size


def _reshaped(value: Value) -> Value:
    while value.producer is not None and isinstance(value.producer.op, Reshape):
        (value,) = value.producer.inputs
    return value


def _side_by_side(node: Node) -> bool:
    """Do the elements of a Slice lie next to each other in its operand?"""
    op, source, result = node.op, node.inputs[0].type.shape, node.output.type.shape
    assert isinstance(op, ops.Slice)
    lead = next((i for i, n in enumerate(result) if n > 1), len(result))
    along = lead == 0 or lead == len(result) or op.steps[lead - 1] == 1
    return along and result[lead + 1 :] == source[lead + 1 :]


class Storage:
    """Which kernel computes which step, in which order, and where everything is stored meanwhile."""

    def __init__(self, graph: Graph, kernels: Sequence[Kernel], align: int = ALIGN) -> None:
        self.graph, self.views, self.align = graph, Views(graph), align
        steps = [step for step in fuse(graph) if step.node not in self.views.nodes]
        self._chosen = {step: cheapest(step, kernels) for step in steps}
        self.claimed = self._claim_outputs()
        made = [
            step.output for step in steps if self.views.whole(step.output)[0] not in self.claimed
        ]
        self._sizes = {v.name: v.type.bytes for v in made}
        self._tied: dict[str, tuple[str, int]] = {}
        for v in made:
            whole, at = self.views.whole(v)
            if whole is not v:
                self._tied[v.name] = (whole.name, at * v.type.dtype.bytes)
        tasks = [self._task(step) for step in steps]
        order = memory.order(tasks, self._sizes, align, self._tied)
        self.steps = [steps[i] for i in order]
        self._tasks = [tasks[i] for i in order]

    @property
    def kernels(self) -> list[Kernel]:
        """One for each step."""
        return [self._chosen[step] for step in self.steps]

    @property
    def least(self) -> int:
        """Bytes of arena that no plan for these steps can do without; quickly found."""
        return memory.max_live(self._tasks, self._sizes, self.align, self._tied)

    @property
    def spans(self) -> dict[str, tuple[int, int]]:
        """First and last step that needs each value."""
        return memory.lifetimes(self._tasks)

    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of the values that lie in the arena."""
        return self._sizes

    def plan(self) -> memory.Plan:
        """Places in the arena."""
        return memory.plan(self._tasks, self._sizes, self.align, self._tied)

    def _claim_outputs(self) -> dict[Value, int]:
        """Which made value is written straight to which output: the first that shows its bytes."""
        claimed: dict[Value, int] = {}
        for i, (_, v) in enumerate(self.graph.outputs):
            root = _reshaped(v)
            if root.producer is not None:
                claimed.setdefault(root, i)
        return claimed

    def buffers(self, value: Value) -> list[tuple[str, int]]:
        """The buffers a value lies in, and how many bytes after its first each begins."""
        root, at = self.views.root(value)
        width = root.type.dtype.bytes
        return [(piece.name, (start - at) * width) for piece, start in self.views.pieces(root)]

    def _task(self, step: Step) -> memory.Task:
        kernel = self._chosen[step]
        buffers = {v: self.buffers(v) for v in step.reads}
        names = [name for found in buffers.values() for name, _ in found]
        alone = {v for v, found in buffers.items() if all(names.count(n) == 1 for n, _ in found)}
        reuse = [buffers[v] for v in kernel.reuses(step) if v in alone]
        # threads keep no common order
        ordered = kernel.raster(step) is not None and not shared(kernel, step)
        behind: Mapping[Value, int] = trails(step) if ordered else {}
        return memory.Task(
            tuple(dict.fromkeys(names)),
            step.output.name,
            kernel.scratch(step).bytes,
            tuple(found[0][0] for found in reuse if len(found) == 1 and found[0][1] == 0),
            tuple(
                (name, distance + at)
                for v, distance in behind.items()
                if v in alone
                for name, at in buffers[v]
            ),
        )
