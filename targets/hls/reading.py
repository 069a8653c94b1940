"""The integer graph as a pipeline's builder reads it: steps that become units, geometries, proved widths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qcompile.errors import Unsupported
from qcompile.ir import Graph, Node, Rescale, Reshape, Transpose, Value, ops
from qcompile.ir.proof import accumulator_bound, code_range

from .requantize import Operand, Requantize, Row, fold, signed_bits

_ACCUMULATORS = (ops.Conv, ops.MatMul, ops.SumPool)
_UNITS = (
    *_ACCUMULATORS, Rescale, ops.Lut, ops.MaxPool, ops.Softmax, ops.Concat, ops.Pad, ops.Slice,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Step:
    """A node that becomes units, and the Rescale that is part of them."""

    node: Node
    rescale: Node | None
    layer: str

    @property
    def output(self) -> Value:
        """The value it makes."""
        return (self.rescale or self.node).output

    @property
    def terms(self) -> tuple[Value, ...]:
        """What it reads beside the accumulator to requantize."""
        values = () if self.rescale is None else self.rescale.inputs[1:]
        return tuple(v for v in values if v.const is None)

    @property
    def reads(self) -> tuple[Value, ...]:
        """The values it reads as streams, one entry a stream."""
        match self.node.op:
            case ops.Concat():
                return self.node.inputs
            case Rescale(accs=accs):
                values = self.node.inputs[len(accs) :]
                return (
                    *self.node.inputs[: len(accs)],
                    *(v for v in values if v.const is None),
                )
            case _:
                return (self.node.inputs[0], *self.terms)


def steps(graph: Graph) -> list[Step]:
    """The nodes that outputs need and that become units, in order, with what is fused into them."""
    needed: set[Value] = {v for _, v in graph.outputs}
    for node in reversed(graph.nodes):
        if node.output in needed:
            needed.update(node.inputs)
    returned = {v for _, v in graph.outputs}
    into: dict[Node, Node] = {}
    for node in graph.nodes:
        if isinstance(node.op, Rescale) and len(node.op.accs) == 1 and node.output in needed:
            acc = node.inputs[0]
            if (
                acc.producer is not None
                and isinstance(acc.producer.op, _ACCUMULATORS)
                and len(acc.uses) == 1
                and acc not in returned
            ):
                into[acc.producer] = node
    fused = set(into.values())
    names: dict[str, int] = {}
    found = []
    for node in graph.nodes:
        if node.output not in needed or isinstance(node.op, Reshape | Transpose):
            continue
        if node in fused:
            continue
        if not isinstance(node.op, _UNITS):
            raise Unsupported(
                f"{node.name}: no unit of the FPGA target computes {type(node.op).__name__};"
                " run this model on another target"
            )
        # a fused node computes where its Rescale stands: there everything it reads has been made
        rescale = into.get(node)
        count = names[node.name] = names.get(node.name, 0) + 1
        layer = node.name if count == 1 else f"{node.name}.{count}"
        found.append(Step(node, rescale, layer))
    place = {node: i for i, node in enumerate(graph.nodes)}
    return sorted(found, key=lambda s: place[s.rescale or s.node])


class Views:
    """Which made value a value's elements are, and their order in it: None as they stand."""

    def __init__(self, graph: Graph) -> None:
        self._known: dict[Value, tuple[Value, NDArray[np.int64] | None]] = {}
        for node in graph.nodes:
            if not isinstance(node.op, Reshape | Transpose):
                continue
            source = node.inputs[0]
            if source.type.shape[:1] != node.output.type.shape[:1]:
                raise Unsupported(f"{node.name}: a Reshape mixes the rows of the batch")
            root, order = self[source]
            if isinstance(node.op, Transpose):
                row = np.arange(root.type.size // root.type.shape[0])
                stood = row if order is None else order
                shape, perm = source.type.shape[1:], [p - 1 for p in node.op.perm[1:]]
                moved = stood.reshape(shape).transpose(perm).reshape(-1)
                order = None if np.array_equal(moved, row) else moved
            self._known[node.output] = root, order

    def __getitem__(self, value: Value) -> tuple[Value, NDArray[np.int64] | None]:
        return self._known.get(value, (value, None))


def geometry(value: Value) -> tuple[int, int, int]:
    """Height, width and channels of a value's row."""
    row = value.type.shape[1:]
    if len(row) < 2:
        return 1, 1, math.prod(row)
    return math.prod(row[:-2]), row[-2], row[-1]


def kind(value: Value) -> tuple[int, bool]:
    """Bits and sign of a value's stream: an accumulator has as many as it is proved to need."""
    dtype = value.type.dtype
    if dtype.bits < 32:
        return dtype.bits, dtype.signed
    return min(32, signed_bits(*code_range(value))), True


def _bound(value: Value) -> Row:
    """The largest magnitude of a value, for each channel where that is proved."""
    if value.producer is not None and isinstance(value.producer.op, ops.Conv | ops.MatMul):
        return fold([int(b) for b in accumulator_bound(value.producer)])
    lo, hi = code_range(value)
    return (max(abs(lo), abs(hi)),)


def planar(row: Sequence[int], default: int) -> tuple[int, int]:
    """A row of one entry for each spatial axis, for two axes."""
    return (default, row[0]) if len(row) == 1 else (row[0], row[1])


def planar_pads(pads: Sequence[int]) -> tuple[int, int, int, int]:
    """Top, left, bottom, right, for one or two spatial axes."""
    return (0, pads[0], 0, pads[1]) if len(pads) == 2 else (pads[0], pads[1], pads[2], pads[3])


def split(value: Value, axis: int) -> tuple[int, int, int]:
    """The geometry in which a Concat along any axis is one of channels."""
    shape = value.type.shape
    return 1, math.prod(shape[1:axis]), math.prod(shape[axis:])


def same_order(a: NDArray[np.int64] | None, b: NDArray[np.int64] | None) -> bool:
    """Are the elements in the same order?"""
    return a is b or (a is not None and b is not None and np.array_equal(a, b))


def check_spatial(node: Node) -> None:
    """Unsupported where a window has more than two spatial axes."""
    if len(node.inputs[0].type.shape) > 4:
        raise Unsupported(f"{node.name}: windows have one or two spatial axes")


def is_depthwise(node: Node) -> bool:
    """Does every channel have its own row of taps and no other?"""
    shape = node.inputs[1].type.shape
    assert isinstance(node.op, ops.Conv)
    return node.op.groups == shape[0] == node.inputs[0].type.shape[-1] and shape[-1] == 1


def dense(w: NDArray[np.int64], groups: int) -> NDArray[np.int64]:
    """The weights of a grouped convolution among all channels."""
    if groups == 1:
        return w
    outputs, depth = len(w) // groups, w.shape[-1]
    wide = np.zeros((*w.shape[:-1], groups * depth), np.int64)
    for g in range(groups):
        rows, columns = slice(g * outputs, (g + 1) * outputs), slice(g * depth, (g + 1) * depth)
        wide[rows, ..., columns] = w[rows]
    return wide


def acc_bits(node: Node) -> int:
    """The bits of a signed accumulator that holds every partial sum."""
    return int(accumulator_bound(node).max()).bit_length() + 1


def datapath(node: Node) -> Requantize:
    """The Requantize of a Rescale node; Unsupported where an operand cannot be streamed."""
    op = node.op
    assert isinstance(op, Rescale)
    shape = node.output.type.shape
    operands = []
    for i, v in enumerate(node.inputs):
        bits, signed = kind(v)
        constant: Row | None = None
        if v.const is not None:
            if (
                i < len(op.accs)
                or v.const.size not in (1, shape[-1])
                or (op.spatial and v.const.size > 1)
                or v.const.size != v.const.shape[-1]
            ):
                raise Unsupported(
                    f"{node.name}: constant {v.name} has more than one row of channels"
                )
            constant = fold([int(c) for c in v.const.reshape(-1)])
        elif v.type.shape != shape:
            raise Unsupported(
                f"{node.name}: {v.name} is {v.type} where {shape} is computed; streams are not broadcast"
            )
        operands.append(Operand(_bound(v), bits, signed, constant))
    return Requantize.of(op, operands)
