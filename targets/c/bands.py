"""Early layers in bands of rows: less memory at once, some rows computed twice (MCUNetV2, arXiv:2110.15352).

A region between a source and a sink is copied once for every band of the sink's rows. Each copy computes the
rows that its band needs, no more; the pads of the image stay at the image's border. Bands are views of contiguous
memory, so nothing is copied; and every element equals the one it stands for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from qcompile.ir import Graph, Node, Op, Rescale, Value, ops
from qcompile.target import Piece

from .kernel import ALIGN, Kernel, Step
from .storage import Storage, fuse

_COUNTS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)
"""Numbers of bands that are tried."""

Rows = tuple[int, int]
"""First row, and the one after the last."""


@dataclass(frozen=True)
class Banded:
    """A graph in bands that gives the same results; `pieces` says what the values are that the original has not."""

    graph: Graph
    pieces: Mapping[str, Piece] = field(default_factory=dict)
    count: int = 1
    sink: str | None = None

    @property
    def macs(self) -> int:
        """Multiply-accumulates, repeated ones included."""
        return sum(Step(node).macs for node in self.graph.nodes)


def split(graph: Graph, sink: Value, count: int, source: Value | None = None) -> Banded | None:
    """Compute everything between `source` and `sink` in bands; None where it cannot be split so.

    The source is the first input, or what only moving its elements makes of it, unless another value is given.
    The bands have equal numbers of the sink's rows, but for the last; there are `count` of them, or a few less.
    """
    region = _region(graph, source or _entry(graph), sink)
    height = sink.type.shape[1] if len(sink.type.shape) >= 3 else 1
    if not region or not 2 <= count <= height:
        return None
    size = -(-height // count)
    bands = [(at, min(at + size, height)) for at in range(0, height, size)]
    needs = [_needs(region, sink, band) for band in bands]
    found = [need for need in needs if need is not None]
    if len(found) < len(bands) or len(bands) < 2:
        return None
    return _Copy(graph).banded(region, sink, found)


def _entry(graph: Graph) -> Value:
    """The first input as the first layer reads it."""
    value = graph.inputs[0][1]
    moves = ops.Reshape | ops.Transpose | ops.Pad
    while len(value.uses) == 1 and isinstance((user := next(iter(value.uses))[0]).op, moves):
        value = user.output
    return value


def _region(graph: Graph, source: Value, sink: Value) -> list[Node]:
    """The nodes between two values, in order; none where a value between them is read elsewhere too."""
    reached, needed = set[Value](), {sink}
    for node in graph.nodes:
        if any(v is source or v in reached for v in node.inputs):
            reached.add(node.output)
    for node in reversed(graph.nodes):
        if node.output in needed:
            needed.update(node.inputs)
    between = [n for n in graph.nodes if n.output in reached and n.output in needed]
    inside = set(between)
    returned = {v for _, v in graph.outputs}
    for node in between:
        kept = node.output is sink or (
            node.output not in returned and all(user in inside for user, _ in node.output.uses)
        )
        shape = node.output.type.shape
        if not kept or len(shape) < 3 or shape[0] != 1 or node.inputs[0].type.shape[0] != 1:
            return []
    return between


@dataclass(frozen=True, slots=True)
class _Need:
    """What one copy of a node computes: its rows, its operator, the rows it reads of every operand, None for all."""

    rows: Rows
    op: Op
    reads: tuple[Rows | None, ...]


def _needs(region: Sequence[Node], sink: Value, band: Rows) -> dict[Node, _Need] | None:
    """For one band, what every node of the region computes; None where that cannot be said."""
    rows: dict[Value, Rows] = {sink: band}
    found: dict[Node, _Need] = {}
    made = {node.output for node in region}
    for node in reversed(region):
        need = _need(node, rows[node.output])
        if need is None:
            return None
        for v, part in zip(node.inputs, need.reads, strict=True):
            if v in made and part is None:
                return None
            if v.const is not None and part is not None:
                return None
            if v in made and part is not None:
                first, last = rows.get(v, part)
                rows[v] = min(first, part[0]), max(last, part[1])
        found[node] = need
    return found


def _need(node: Node, rows: Rows) -> _Need | None:
    """How a node makes these rows of its result alone."""
    op = node.op
    match op:
        case ops.Conv(strides=strides, pads=pads, dilations=dilations):
            kernel = node.inputs[1].type.shape[1:-1]
        case ops.MaxPool(kernel=kernel, strides=strides, pads=pads, dilations=dilations):
            pass
        case ops.SumPool(kernel=kernel, strides=strides, pads=pads):
            dilations = (1,) * len(kernel)
        case ops.Pad(pads=pads):
            kernel = strides = dilations = (1,) * (len(pads) // 2)
        case ops.Slice(starts=starts, ends=ends, steps=steps):
            first, last = (starts[0] + row * steps[0] for row in (rows[0], rows[1] - 1))
            op = replace(op, starts=(0, *starts[1:]), ends=(last + 1 - first, *ends[1:]))
            return _Need(rows, op, ((first, last + 1),))
        case (
            ops.Rescale()
            | ops.Mul()
            | ops.Lut()
            | ops.Softmax()
            | ops.MatMul()
            | ops.Extreme()
            | ops.Normalize()
        ):
            return _rowwise(node, rows)
        case ops.Concat(axis=axis) | ops.Take(axis=axis) | ops.ArgExtreme(axis=axis) if axis > 1:
            return _rowwise(node, rows)
        case _:
            return None
    height = node.inputs[0].type.shape[1]
    start = rows[0] * strides[0] - pads[0]
    end = (rows[1] - 1) * strides[0] - pads[0] + (kernel[0] - 1) * dilations[0] + 1
    reads = max(start, 0), min(end, height)
    if reads[0] >= reads[1]:
        return None
    rank = len(pads) // 2
    around = max(-start, 0), *pads[1:rank], max(end - height, 0), *pads[rank + 1 :]
    return _Need(rows, replace(op, pads=around), (reads, *(None for _ in node.inputs[1:])))


def _rowwise(node: Node, rows: Rows) -> _Need | None:
    """The same for an operator that makes every row of the same row of its operands."""
    op, shape = node.op, node.output.type.shape
    if isinstance(op, Rescale) and op.spatial:
        op = _spatial(op, shape[2:-1], rows)
    constants = 1 if isinstance(op, ops.Lut | ops.Softmax | ops.MatMul) else len(node.inputs)
    reads: list[Rows | None] = []
    for i, v in enumerate(node.inputs):
        own = v.type.shape[max(0, 1 + len(v.type.shape) - len(shape)) :]
        if i >= constants or len(own) < len(shape) - 1 or own[0] == 1 < shape[1]:
            reads.append(None)
        elif len(v.type.shape) == len(shape):
            reads.append(rows)
        else:
            return None
    return _Need(rows, op, tuple(reads))


def _spatial(op: Rescale, inner: Sequence[int], rows: Rows) -> Rescale:
    """Parameters of these rows alone."""
    width = math.prod(inner)

    def cut(row: tuple[int, ...]) -> tuple[int, ...]:
        return row if len(row) == 1 else row[rows[0] * width : rows[1] * width]

    return replace(
        op,
        accs=tuple(
            replace(a, multiplier=cut(a.multiplier), pre_shift=cut(a.pre_shift)) for a in op.accs
        ),
        vals=tuple(replace(v, multiplier=cut(v.multiplier)) for v in op.vals),
        f=cut(op.f),
    )


class _Copy:
    """A second graph, made from a first one node by node."""

    def __init__(self, graph: Graph) -> None:
        self._old = graph
        self._new = Graph(graph.name, graph.free_batch)
        self._values: dict[Value, Value] = {
            v: self._new.add_input(port, v.type, v.name) for port, v in graph.inputs
        }
        for v in graph.constants():
            self._values[v] = self._new.constant(v.constant, v.type, v.name)
        self._pieces: dict[str, Piece] = {}
        self._taken = {v.name for v in (*graph.values(), *graph.constants())}

    def banded(
        self, region: Sequence[Node], sink: Value, bands: Sequence[Mapping[Node, _Need]]
    ) -> Banded:
        """All nodes in order, the region in bands where its last node was."""
        inside = set(region)
        for node in self._old.nodes:
            if node not in inside:
                inputs = (self._values[v] for v in node.inputs)
                self._values[node.output] = self._new.add(
                    node.op, *inputs, name=node.output.name, layer=node.name
                )
            elif node.output is sink:
                parts = [self._band(region, band)[sink] for band in bands]
                self._values[sink] = self._new.add(
                    ops.Concat(1), *parts, name=sink.name, layer=node.name
                )
        for port, v in self._old.outputs:
            self._new.add_output(port, self._values[v])
        return Banded(self._new, self._pieces, len(bands), sink.name)

    def _band(self, region: Sequence[Node], band: Mapping[Node, _Need]) -> dict[Value, Value]:
        """One copy of the region; gives what it has of every value."""
        made: dict[Value, Value] = {}
        starts: dict[Value, int] = {}
        for node in region:
            need = band[node]
            inputs = []
            for v, rows in zip(node.inputs, need.reads, strict=True):
                whole = made.get(v, self._values.get(v))
                assert whole is not None
                inputs.append(
                    whole if rows is None else self._rows(v, rows, whole, starts.get(v, 0))
                )
            made[node.output] = self._piece(node.output, need.rows, need.op, inputs, node.name)
            starts[node.output] = need.rows[0]
        return made

    def _rows(self, value: Value, rows: Rows, copy: Value, start: int) -> Value:
        """These rows of a value, of which `copy` has those from `start` on."""
        first, last = rows[0] - start, rows[1] - start
        height, *rest = copy.type.shape[1:]
        if (first, last) == (0, height):
            return copy
        op = ops.Slice((first, *(0 for _ in rest)), (last, *rest), (1,) * (1 + len(rest)))
        return self._piece(value, rows, op, [copy], value.name)

    def _piece(
        self, value: Value, rows: Rows, op: Op, inputs: Sequence[Value], layer: str
    ) -> Value:
        name, taken = f"{value.name}[{rows[0]}:{rows[1]}]", self._taken
        while name in taken:
            name += "'"
        taken.add(name)
        made = self._new.add(op, *inputs, name=name, layer=layer)
        self._pieces[made.name] = Piece(value.name, *rows)
        return made


def configurations(graph: Graph) -> Iterator[Banded]:
    """The graph as it is, then in ever more bands up to every stored value that ends a region."""
    yield Banded(graph)
    for sink in (step.output for step in fuse(graph)):
        height = sink.type.shape[1] if len(sink.type.shape) >= 3 else 1
        counts = {-(-height // -(-height // count)) for count in _COUNTS if count <= height}
        for count in sorted(counts):
            if (made := split(graph, sink, count)) is None:
                break
            yield made


def fit(graph: Graph, kernels: Sequence[Kernel], limit: int, align: int = ALIGN) -> Banded:
    """What computes least of all whose arena, inputs and outputs take at most `limit` bytes, else the smallest."""
    room = limit - sum(v.type.bytes for _, v in (*graph.inputs, *graph.outputs))
    if Storage(graph, kernels, align).plan().peak <= room:
        return Banded(graph)
    found = [_Found(made, kernels, align) for made in configurations(graph)]
    for one in sorted(found, key=lambda one: one.macs):
        if one.least <= room and one.storage.plan().peak <= room:
            return one.made
    return _smallest(found)


def smallest(graph: Graph, kernels: Sequence[Kernel]) -> Banded:
    """What needs the smallest arena, and of several the one that computes least."""
    return _smallest([_Found(made, kernels, ALIGN) for made in configurations(graph)])


class _Found:
    """A configuration and what it costs at least."""

    def __init__(self, made: Banded, kernels: Sequence[Kernel], align: int) -> None:
        self.made, self.macs = made, made.macs
        self.storage = Storage(made.graph, kernels, align)
        self.least = self.storage.least


def _smallest(found: Sequence[_Found]) -> Banded:
    best: tuple[int, int, Banded] | None = None
    for one in sorted(found, key=lambda one: (one.least, one.macs)):
        if best is not None and one.least > best[0]:
            break
        peak = one.storage.plan().peak
        if best is None or (peak, one.macs) < best[:2]:
            best = peak, one.macs, one.made
    assert best is not None
    return best[2]
