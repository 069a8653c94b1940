"""How far a layer of the integer graph can be from the fake-quantized model, given the same codes as operands.

Both round the same real sum once: the model half to even, the integer graph half up. Before that rounding

    the integer graph is off by   e * R + (n - 1) * 2**-f + half a step of each bias,
    float32 is off by             K * 2**-24 * A,

in output steps: `e` the largest relative error of a multiplier, `R` how far the sum can be from the zero point before
it saturates, `n` accumulators whose product is floored at `f` fractional bits, `K` products in a sum, `A` the
accumulator's proved bound. If both together stay below one, the codes differ by at most one; they differ at all only
where the real sum is as close as that to the middle between two codes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from qcompile.integerized import Integerized
from qcompile.ir import Conv, MatMul, Node, Rescale
from qcompile.ir.proof import code_range


@dataclass(frozen=True, slots=True)
class Bound:
    """What is lost before the one rounding, in integers and in float32, in output steps."""

    integer: float
    float32: float

    @property
    def codes(self) -> int:
        """The largest difference of a code."""
        return 1 + math.floor(self.integer + self.float32)


def bounds(done: Integerized) -> dict[str, Bound]:
    """The bound of every rescaled tensor, by its float name."""
    found: dict[str, Bound] = {}
    for node in done.graph.nodes:
        origin = done.origins.get(node.output.name)
        if origin is not None and isinstance(node.op, Rescale):
            found[origin.tensor] = bound(done, node)
    return found


def bound(done: Integerized, node: Node) -> Bound:
    """The bound of one Rescale."""
    op = node.op
    assert isinstance(op, Rescale)
    finest = 2.0 ** -min(op.f)
    # flooring twice is flooring once: one accumulator alone loses nothing before it is rounded
    lost = max(len(op.accs) - 1, 0) * finest
    reach = single = 0.0
    for acc, value in zip(op.accs, node.inputs, strict=False):
        m, p, f = (np.array(x, np.float64) for x in (acc.multiplier, acc.pre_shift, op.f))
        unit = float((m * 2.0 ** (p - 32 - f)).max())
        lo, hi = code_range(value)
        far = max(abs(lo), abs(hi)) * unit
        reach += far
        maker = value.producer
        if maker is not None and isinstance(maker.op, Conv | MatMul):
            weights = maker.inputs[1].constant
            lost += unit / 2
            single += (weights.size // len(weights) + 1) * 2.0**-24 * far
        else:
            single += 2.0**-20 * far
    for val, value in zip(op.vals, node.inputs[len(op.accs) :], strict=True):
        unit = max(map(abs, val.multiplier)) * finest
        lo, hi = code_range(value)
        reach += max(abs(lo - val.zero_point), abs(hi - val.zero_point)) * unit
        inner = value.producer
        if value.name not in done.origins and inner is not None and isinstance(inner.op, Rescale):
            # an accumulator that went through int16 was rounded on the way
            way = bound(done, inner)
            lost, single = lost + (0.5 + way.integer) * unit, single + way.float32 * unit
    if len(op.accs) + len(op.vals) == 1:
        reach = min(reach, max(op.hi - op.zero_point, op.zero_point - op.lo) + 1.0)
    error = done.multiplier_errors.get(node.output.name, 0.0)
    return Bound(lost + error * reach, single)
