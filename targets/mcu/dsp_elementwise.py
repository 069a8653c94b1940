"""Elementwise operators of bytes with the DSP extension: four elements at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qcompile.ir import DType, Rescale, Value, ops
from qcompile.ir.proof import prove_rescale

from ..c.kernel import Layer, Scratch, Step, aligned, ends, key, loops
from ..c.nest import Nest, broadcast, merged, row_major
from ..c.text import at, c_int
from .dsp_rescale import HEADER, HERE, LIMIT, plain, wrapped

ELEMENTWISE_HEADER = HERE / "dsp_elementwise.h"
"""The micro-kernels."""
_WHOLE = (DType.I8, DType.U8)


@dataclass(frozen=True)
class Run:
    """The innermost loop, all operands dense along it, and the loops around it."""

    around: Nest
    length: int

    @property
    def count(self) -> int:
        """How often it runs."""
        return math.prod(extent for _, extent in self.around.loops)


@dataclass(frozen=True)
class Bytes:
    """Rescale of one or two values, and Mul with its Rescale, where one multiplier is for all."""

    name: str = "dsp elementwise"
    includes: Sequence[str | Path] = (HEADER, ELEMENTWISE_HEADER)

    def matches(self, step: Step) -> bool:
        """Operands and result of at most 8 bits, clamped by their type alone, dense along some axis."""
        if any(v.type.dtype.bits > 8 for v in (*step.node.inputs, step.output)):
            return False
        return _values(step) or _product(step)

    def cost(self, step: Step) -> int:
        """Instructions for each four elements, and for those that are left."""
        run = _run(step)
        if _values(step):
            four, one, around = (18, 6, 13) if len(step.node.inputs) == 1 else (26, 8, 13)
        else:
            four, one, around = 24, 10, 21
        return 20 + run.count * (around + run.length // 4 * four + run.length % 4 * one)

    def scratch(self, step: Step) -> Scratch:
        """None."""
        return Scratch()

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """Every operand of the same shape and type."""
        return aligned(step, *step.reads)

    def raster(self, step: Step) -> int | None:
        """One element: the last few are computed one by one."""
        return 1

    def packed(self, step: Step) -> tuple[Value, ...]:
        """None."""
        return ()

    def body(self, layer: Layer) -> str:
        """Loops around one run."""
        step = layer.step
        run = _run(step)
        y = at("y", run.around.at["y"])
        operands = [(at(layer[v], run.around.at[key(v)]), v.type.dtype) for v in step.node.inputs]
        call = self._rescale if _values(step) else self._multiply
        return "\n".join((loops(run.around), call(step, y, operands, run.length), ends(run.around)))

    def _rescale(
        self, step: Step, y: str, operands: Sequence[tuple[str, DType]], length: int
    ) -> str:
        op = step.node.op
        assert isinstance(op, Rescale)
        f = op.f[0]
        total = (1 << (f - 1)) + (op.zero_point << f)
        total -= sum(v.multiplier[0] * v.zero_point for v in op.vals)
        loads = ['"ldrsb"' if kind.signed else '"ldrb"' for _, kind in operands]
        sources = [f"{x}, {load}" for (x, _), load in zip(operands, loads, strict=True)]
        factors = [c_int(v.multiplier[0]) for v in op.vals]
        saturate = '"ssat"' if op.out.signed else '"usat"'
        arguments = [
            y, *sources, length, *factors, c_int(wrapped(total)), saturate, op.out.bits, f,
        ]  # fmt: skip
        name = "DSP_RESCALE" if len(operands) == 1 else "DSP_RESCALE2"
        return f"{name}({', '.join(map(str, arguments))});"

    def _multiply(
        self, step: Step, y: str, operands: Sequence[tuple[str, DType]], length: int
    ) -> str:
        op, constants = step.node.op, plain(step, _WHOLE)
        assert isinstance(op, ops.Mul)
        assert constants is not None
        kinds = [kind for _, kind in operands] + [step.output.type.dtype]
        name = "_".join(["dsp_mul", *("s8" if kind.signed else "u8" for kind in kinds)])
        pairs = [c_int(wrapped((-z & 0xFFFF) * 0x10001)) for z in (op.zero_x, op.zero_y)]
        arguments = [
            y, *(x for x, _ in operands), length, *pairs, int(constants.multipliers[0]),
            constants.zero_point,
        ]  # fmt: skip
        return f"{name}({', '.join(map(str, arguments))});"


def _values(step: Step) -> bool:
    """Is it a Rescale of values that a sum of 32 bits holds with the result's zero point?"""
    op = step.node.op
    if not isinstance(op, Rescale) or op.accs or len(op.vals) > 2:
        return False
    if any(len(set(row)) > 1 for row in (op.f, *(v.multiplier for v in op.vals))):
        return False
    whole = (op.lo, op.hi) == (op.out.lo, op.out.hi)
    return whole and prove_rescale(step.node) + (abs(op.zero_point) << op.f[0]) < LIMIT


def _product(step: Step) -> bool:
    """Is it a Mul whose Rescale has one multiplier for all?"""
    if not isinstance(step.node.op, ops.Mul) or (found := plain(step, _WHOLE)) is None:
        return False
    return len(set(found.multipliers.tolist())) == 1


def _run(step: Step) -> Run:
    """The innermost loops as one, as far as every operand is dense along them."""
    shape = step.output.type.shape
    operands = {key(v): broadcast(v.type.shape, shape) for v in step.node.inputs}
    operands["y"] = row_major(shape)
    length, lead = 1, len(shape)
    while lead and (shape[lead - 1] == 1 or all(s[lead - 1] == length for s in operands.values())):
        lead -= 1
        length *= shape[lead]
    return Run(merged(shape[:lead], {name: s[:lead] for name, s in operands.items()}), length)
