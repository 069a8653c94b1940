"""Take, Extreme and ArgExtreme in portable C."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from qcompile.ir import Value, ops

from .kernel import Kernel, Layer, Scratch, Step, aligned, ends, loops
from .nest import merged
from .text import affine, at, c_type

_UNROLLED = 4
"""So many copies stand one by one in the code; more are a loop over a table."""


@dataclass(frozen=True)
class Taken:
    """Take: runs of neighbouring indices are copied at once."""

    name: str = "take"
    includes: Sequence[str | Path] = ()

    def matches(self, step: Step) -> bool:
        """Every Take."""
        return isinstance(step.node.op, ops.Take)

    def cost(self, step: Step) -> int:
        """One for each element."""
        return step.output.type.size

    def scratch(self, step: Step) -> Scratch:
        """None."""
        return Scratch()

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """None: elements change places."""
        return ()

    def raster(self, step: Step) -> int | None:
        """None: elements change places."""
        return None

    def packed(self, step: Step) -> tuple[Value, ...]:
        """None."""
        return ()

    def body(self, layer: Layer) -> str:
        """For each row before the axis: one copy a run, or a loop over where pieces of one length begin."""
        node = layer.step.node
        assert isinstance(node.op, ops.Take)
        axis, indices = node.op.axis, node.op.indices
        shape = node.inputs[0].type.shape
        inner, rows = math.prod(shape[axis + 1 :]), math.prod(shape[:axis])
        strides = {"x": (shape[axis] * inner,), "y": (len(indices) * inner,)}
        nest = merged((rows,), strides)
        x, to, source = layer[node.inputs[0]], nest.at["y"], nest.at["x"]
        copied = pieces(indices)
        if len(copied) <= _UNROLLED:
            copies, done = [], 0
            for first, length in copied:
                here, there = affine([(to, 1)], done * inner), affine([(source, 1)], first * inner)
                copies.append(_copy(here, x, there, length * inner))
                done += length
            return "\n".join((loops(nest), *copies, ends(nest)))
        firsts = np.array([first for first, _ in copied], np.int64)
        kind = next(t for t in (np.uint8, np.int16, np.int32) if firsts.max() <= np.iinfo(t).max)
        table, count = layer.constant("indices", firsts.astype(kind)), copied[0][1] * inner
        here = affine([(to, 1), ("k", count)])
        there = affine([(source, 1), (f"{table}[k]", inner)])
        loop = f"for (int k = 0; k < {len(firsts)}; ++k) {{"
        return "\n".join((loops(nest), loop, _copy(here, x, there, count), "}", ends(nest)))


def pieces(indices: Sequence[int]) -> list[tuple[int, int]]:
    """What is copied at once, as (first, how many): runs of neighbours, cut to one length where they are many."""
    runs: list[list[int]] = []
    for _, group in groupby(enumerate(indices), lambda pair: pair[1] - pair[0]):
        runs.append([index for _, index in group])
    if len(runs) <= _UNROLLED:
        return [(run[0], len(run)) for run in runs]
    length = math.gcd(*map(len, runs))
    return [(first, length) for first in indices[::length]]


def _copy(to: str, x: str, source: str, count: int) -> str:
    """C that copies elements side by side."""
    if count == 1:
        return f"y[{to}] = {x}[{source}];"
    return f"memcpy({at('y', to)}, {at(x, source)}, {count} * sizeof *y);"


@dataclass(frozen=True)
class Larger:
    """Extreme: one comparison for each element."""

    name: str = "extreme"
    includes: Sequence[str | Path] = ()

    def matches(self, step: Step) -> bool:
        """Every Extreme."""
        return isinstance(step.node.op, ops.Extreme)

    def cost(self, step: Step) -> int:
        """One for each element."""
        return step.output.type.size

    def scratch(self, step: Step) -> Scratch:
        """None."""
        return Scratch()

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """Both operands."""
        return aligned(step, *step.reads)

    def raster(self, step: Step) -> int | None:
        """One element."""
        return 1

    def packed(self, step: Step) -> tuple[Value, ...]:
        """None."""
        return ()

    def body(self, layer: Layer) -> str:
        """One loop."""
        step = layer.step
        assert isinstance(step.node.op, ops.Extreme)
        kind, sign = c_type(step.output.type.dtype), ">" if step.node.op.largest else "<"
        a, b = (f"{layer[v]}[i]" for v in step.node.inputs)
        return (
            f"for (int i = 0; i < {step.output.type.size}; ++i) {{\n"
            f"const {kind} a = {a};\nconst {kind} b = {b};\n"
            f"y[i] = a {sign} b ? a : b;\n}}"
        )


@dataclass(frozen=True)
class Places:
    """ArgExtreme: one pass along the axis for each result."""

    name: str = "argextreme"
    includes: Sequence[str | Path] = ()

    def matches(self, step: Step) -> bool:
        """Every ArgExtreme."""
        return isinstance(step.node.op, ops.ArgExtreme)

    def cost(self, step: Step) -> int:
        """One for each element looked at."""
        return step.node.inputs[0].type.size

    def scratch(self, step: Step) -> Scratch:
        """None."""
        return Scratch()

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """None: a result is larger than what it is found among."""
        return ()

    def raster(self, step: Step) -> int | None:
        """None."""
        return None

    def packed(self, step: Step) -> tuple[Value, ...]:
        """None."""
        return ()

    def body(self, layer: Layer) -> str:
        """The best so far and its place."""
        node = layer.step.node
        assert isinstance(node.op, ops.ArgExtreme)
        x, axis = node.inputs[0], node.op.axis
        shape = x.type.shape
        inner, rows = math.prod(shape[axis + 1 :]), math.prod(shape[:axis])
        strides = {"x": (shape[axis] * inner, 1), "y": (inner, 1)}
        nest = merged((rows, inner), strides)
        kind = c_type(x.type.dtype)
        sign = (">" if node.op.largest else "<") + ("=" if node.op.last else "")
        candidate = f"from[{affine([('k', inner)])}]"
        return "\n".join(
            (
                loops(nest),
                f"const {kind} *const from = {at(layer[x], nest.at['x'])};",
                f"{kind} best = from[0];",
                "int32_t place = 0;",
                f"for (int k = 1; k < {shape[axis]}; ++k) {{",
                f"if ({candidate} {sign} best) {{",
                f"best = {candidate};",
                "place = k;",
                "}",
                "}",
                f"y[{nest.at['y']}] = place;",
                ends(nest),
            )
        )


SELECTIONS: tuple[Kernel, ...] = (Taken(), Larger(), Places())
"""One for each operator."""
