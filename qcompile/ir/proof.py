"""What is proved about an integer graph before any code exists: ranges of codes and bounds of accumulators."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qcompile.ir import ops
from qcompile.ir.arith import ACC_LIMIT
from qcompile.ir.graph import Graph, Node, Value


@dataclass(frozen=True, slots=True)
class AccumulatorProof:
    """No partial sum of `node`, in any order, exceeds `bound`; `bits` is what an accumulator needs, sign included."""

    node: str
    bound: int
    bits: int


def code_range(value: Value) -> tuple[int, int]:
    """The smallest and largest code a value can take, from the clamp or table that made it."""
    if value.const is not None:
        return int(value.const.min(initial=0)), int(value.const.max(initial=0))
    node = value.producer
    if node is None:
        return value.type.dtype.lo, value.type.dtype.hi
    match node.op:
        case ops.Rescale(lo=lo, hi=hi):
            return lo, hi
        case ops.Lut():
            table = node.inputs[1].constant
            return int(table.min()), int(table.max())
        case ops.MaxPool() | ops.Slice() | ops.Reshape() | ops.Transpose() | ops.Take():
            return code_range(node.inputs[0])
        case ops.Pad(value=fill):
            lo, hi = code_range(node.inputs[0])
            return min(lo, fill), max(hi, fill)
        case ops.Concat():
            ranges = [code_range(v) for v in dict.fromkeys(node.inputs)]
            return min(lo for lo, _ in ranges), max(hi for _, hi in ranges)
        case ops.Extreme(largest=largest):
            lows, highs = zip(*map(code_range, node.inputs), strict=True)
            choose = max if largest else min
            return choose(lows), choose(highs)
        case ops.ArgExtreme(axis=axis):
            return 0, node.inputs[0].type.shape[axis] - 1
        case ops.Conv() | ops.MatMul() | ops.SumPool() | ops.Mul() | ops.BatchMatMul():
            bound = int(accumulator_bound(node).max())
            return -bound, bound
        case _:
            return value.type.dtype.lo, value.type.dtype.hi


_BLOCK = 1 << 22
"""Weights whose 64 bits are in memory at a time."""


def product_bound(
    w: NDArray[np.generic], b: NDArray[np.generic], lo: int, hi: int
) -> NDArray[np.int64]:
    """|b| + sum |w| * max |x| for each output channel (first axis of w): holds for every partial sum in any order."""
    step = max(1, _BLOCK * len(w) // max(w.size, 1))
    parts = [w[at : at + step] for at in range(0, len(w), step)]
    sums = [np.abs(p.astype(np.int64)).reshape(len(p), -1).sum(axis=1) for p in parts]
    reach = np.concatenate([np.zeros(0, np.int64), *sums])
    total: NDArray[np.int64] = np.abs(b.astype(np.int64)) + reach * max(abs(lo), abs(hi))
    return total


def accumulator_bound(node: Node) -> NDArray[np.int64]:
    """The bound of an accumulator that `node` makes: per channel for Conv and MatMul, else one entry."""
    lo, hi = code_range(node.inputs[0])
    match node.op:
        case ops.Conv(pad_value=fill):
            w, b = node.inputs[1].constant, node.inputs[2].constant
            return product_bound(w, b, min(lo, fill), max(hi, fill))
        case ops.MatMul():
            w, b = node.inputs[1].constant, node.inputs[2].constant
            return product_bound(w, b, lo, hi)
        case ops.SumPool(kernel=kernel, zero_point=z):
            return np.array([math.prod(kernel) * max(abs(lo - z), abs(hi - z))], np.int64)
        case ops.Mul(zero_x=zx, zero_y=zy) | ops.BatchMatMul(zero_x=zx, zero_y=zy):
            ylo, yhi = code_range(node.inputs[1])
            product = max(abs(lo - zx), abs(hi - zx)) * max(abs(ylo - zy), abs(yhi - zy))
            summed = isinstance(node.op, ops.BatchMatMul)
            return np.array([product * (node.inputs[0].type.shape[-1] if summed else 1)], np.int64)
        case ops.Softmax():
            table = node.inputs[1].constant
            if table.min() < 0 or table[0] == 0:
                raise TypeError(
                    f"{node.name}: a table of exponentials falls from above 0 towards 0"
                )
            return np.array([node.inputs[0].type.shape[-1] * int(table.max())], np.int64)
        case _:
            raise TypeError(f"{node.name} makes no accumulator")


_ACCUMULATING = (ops.Conv, ops.MatMul, ops.SumPool, ops.Mul, ops.BatchMatMul, ops.Softmax)


def prove(graph: Graph) -> list[AccumulatorProof]:
    """One proof for every accumulator of the graph; raises OverflowError naming the first that needs over 32 bits."""
    proofs = []
    for node in graph.nodes:
        if isinstance(node.op, _ACCUMULATING):
            bound = int(accumulator_bound(node).max())
            if bound >= ACC_LIMIT:
                raise OverflowError(
                    f"the accumulator of {node.name} may reach {bound}, beyond 32 bits"
                )
            proofs.append(AccumulatorProof(node.name, bound, bound.bit_length() + 1))
    return proofs


def _channel_bounds(value: Value) -> tuple[int, ...]:
    """The largest magnitude of an accumulator: one entry, or one a channel where Conv or MatMul made it."""
    if value.producer is not None and isinstance(value.producer.op, ops.Conv | ops.MatMul):
        return tuple(int(b) for b in accumulator_bound(value.producer))
    lo, hi = code_range(value)
    return (max(abs(lo), abs(hi)),)


def prove_rescale(node: Node) -> int:
    """The largest |T| + 2**(f-1) a Rescale can meet; OverflowError where it does not stay below 2**31."""
    op = node.op
    assert isinstance(op, ops.Rescale)
    parameters = [op.f, *(r for a in op.accs for r in (a.multiplier, a.pre_shift))]
    channels = max(map(len, [*parameters, *(v.multiplier for v in op.vals)]))

    def row(entries: tuple[int, ...]) -> NDArray[np.object_]:
        return np.array(entries * (channels if len(entries) == 1 else 1), dtype=object)

    total = np.array([1 << (f - 1) for f in row(op.f)], dtype=object)
    for a, v in zip(op.accs, node.inputs, strict=False):
        bounds = _channel_bounds(v)
        # entries over positions are not entries over channels, even where there are as many
        aligned = not op.spatial and len(bounds) in (1, channels)
        bound = row(bounds if aligned else (max(bounds),))
        shifted = np.array(
            [b << p for b, p in zip(bound, row(a.pre_shift), strict=True)], dtype=object
        )
        if max(shifted) >= ACC_LIMIT:
            raise OverflowError(f"{node.name}: a shifted accumulator may reach {max(shifted)}")
        total = total + (shifted * row(a.multiplier) >> 32) + 1
    for val, v in zip(op.vals, node.inputs[len(op.accs) :], strict=True):
        lo, hi = code_range(v)
        total = total + abs(row(val.multiplier)) * max(
            abs(lo - val.zero_point), abs(hi - val.zero_point)
        )
    if max(total) >= ACC_LIMIT:
        raise OverflowError(
            f"{node.name}: the sum of a rescale may reach {max(total)}, beyond 32 bits"
        )
    return int(max(total))
