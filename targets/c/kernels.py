"""The portable kernels: plain C99 that a compiler vectorises, one small object each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qcompile.errors import Unsupported
from qcompile.ir import Value, ops

from .attention import ATTENTION
from .convolve import Depthwise, Dot
from .kernel import (
    Kernel,
    Layer,
    Scratch,
    Step,
    aligned,
    constant,
    ends,
    key,
    loops,
    parameters,
    strides,
)
from .nest import Nest, broadcast, merged, row_major
from .selection import SELECTIONS
from .text import affine, at, c_int, c_type, minus, render
from .window import pixels, window_of


@dataclass(frozen=True)
class Pool:
    """MaxPool and SumPool: all channels of a pixel side by side, taps in the border left out."""

    name: str = "pool"
    includes: Sequence[str | Path] = ()

    def matches(self, step: Step) -> bool:
        """Every MaxPool and SumPool."""
        return isinstance(step.node.op, ops.MaxPool | ops.SumPool)

    def cost(self, step: Step) -> int:
        """Elements looked at."""
        return step.output.type.size * window_of(step.node).taps

    def scratch(self, step: Step) -> Scratch:
        """What one pixel has so far, largest elements or sums."""
        return Scratch((("acc", c_type(step.node.output.type.dtype), step.output.type.shape[-1]),))

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """A fused Rescale's other operands."""
        return tuple(v for v in aligned(step, *step.terms) if v is not step.node.inputs[0])

    def raster(self, step: Step) -> int | None:
        """One: it is stored when all its taps are seen."""
        return 1

    def packed(self, step: Step) -> tuple[Value, ...]:
        """None."""
        return ()

    def body(self, layer: Layer) -> str:
        """See the template."""
        step, node = layer.step, layer.step.node
        geometry = window_of(node)
        nest = pixels(step, geometry)
        largest = isinstance(node.op, ops.MaxPool)
        return render(
            "pool.c.j2",
            scratch=layer.scratch.declarations,
            nest=nest,
            window=geometry,
            largest=largest,
            lowest=c_int(int(np.iinfo(node.inputs[0].type.dtype.numpy).min)),
            zero_point=node.op.zero_point if isinstance(node.op, ops.SumPool) else 0,
            x=layer[node.inputs[0]],
            type=c_type(node.inputs[0].type.dtype),
            store=layer.store(nest.at, "acc[c]"),
            minus=minus,
            at=at,
            loops=loops,
            ends=ends,
        )


@dataclass(frozen=True)
class Elementwise:
    """Rescale, Mul, and Mul with its Rescale: one pass over the elements, operands broadcast."""

    name: str = "elementwise"
    includes: Sequence[str | Path] = ()

    def matches(self, step: Step) -> bool:
        """Every Rescale and Mul."""
        return isinstance(step.node.op, ops.Rescale | ops.Mul)

    def cost(self, step: Step) -> int:
        """One for each element."""
        return step.output.type.size

    def scratch(self, step: Step) -> Scratch:
        """None."""
        return Scratch()

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """Every operand of the same shape and type."""
        return aligned(step, *step.reads)

    def raster(self, step: Step) -> int | None:
        """One element."""
        return 1

    def packed(self, step: Step) -> tuple[Value, ...]:
        """None."""
        return ()

    def body(self, layer: Layer) -> str:
        """Loops around one element."""
        step, node = layer.step, layer.step.node
        shape = step.output.type.shape
        operands = strides(step)
        operands |= {key(v): broadcast(v.type.shape, shape) for v in node.inputs}
        if isinstance(node.op, ops.Rescale):
            operands |= parameters(node)
        nest = merged(shape, operands)
        elements = {v: layer.element(v, nest.at) for v in node.inputs}
        match node.op:
            case ops.Mul(zero_x=zero_x, zero_y=zero_y):
                x, y = (elements[v] for v in node.inputs)
                left, right = minus(x, zero_x), minus(y, zero_y)
                statements = layer.store(nest.at, f"({left}) * ({right})")
            case _:
                statements = layer.rescale(node, elements, nest.at)
        return "\n".join((loops(nest), statements, ends(nest)))


@dataclass(frozen=True)
class Table:
    """Lut: one load for each element."""

    name: str = "table"
    includes: Sequence[str | Path] = ()

    def matches(self, step: Step) -> bool:
        """Every Lut."""
        return isinstance(step.node.op, ops.Lut)

    def cost(self, step: Step) -> int:
        """One for each element."""
        return step.output.type.size

    def scratch(self, step: Step) -> Scratch:
        """None."""
        return Scratch()

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """The operand, where the table keeps its type."""
        return aligned(step, step.node.inputs[0])

    def raster(self, step: Step) -> int | None:
        """One element."""
        return 1

    def packed(self, step: Step) -> tuple[Value, ...]:
        """The table."""
        return step.node.inputs[1:]

    def body(self, layer: Layer) -> str:
        """One loop."""
        x = layer.step.node.inputs[0]
        entries = constant(layer.step.node, 1)
        lowest = 0 if not x.type.dtype.signed else -(len(entries) // 2)
        name = layer.constant("table", entries)
        return (
            f"for (int i = 0; i < {x.type.size}; ++i) {{\n"
            f"y[i] = {name}[{minus(f'{layer[x]}[i]', lowest)}];\n}}"
        )


@dataclass(frozen=True)
class SoftmaxRows:
    """Softmax: largest, sum and quotient in three passes over a row; the quotient by a Newton reciprocal."""

    name: str = "softmax"
    includes: Sequence[str | Path] = ()

    def matches(self, step: Step) -> bool:
        """Every Softmax."""
        return isinstance(step.node.op, ops.Softmax)

    def cost(self, step: Step) -> int:
        """Three passes."""
        return 3 * step.output.type.size

    def scratch(self, step: Step) -> Scratch:
        """None: the exponentials are looked up twice."""
        return Scratch()

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """The operand: the last pass reads an element before it writes there."""
        return aligned(step, step.node.inputs[0])

    def raster(self, step: Step) -> int | None:
        """None: a row is still read while it is written."""
        return None

    def packed(self, step: Step) -> tuple[Value, ...]:
        """The table."""
        return step.node.inputs[1:]

    def body(self, layer: Layer) -> str:
        """See the template."""
        node = layer.step.node
        assert isinstance(node.op, ops.Softmax)
        x, out = node.inputs[0].type, node.op.out
        entries = constant(node, 1)
        if entries.min() < 0 or entries[0] < 1 or int(entries.max()) * x.shape[-1] >= 1 << 31:
            raise Unsupported(
                f"{node.name}: the sum of {x.shape[-1]} entries of its table of exponentials does not"
                " stay in 1 .. 2**31 - 1; give the table fewer fractional bits"
            )
        rows = row_major(x.shape)[:-1]
        return render(
            "softmax.c.j2",
            nest=merged(x.shape[:-1], {"x": rows, "y": rows}),
            x=layer[node.inputs[0]],
            type=c_type(x.dtype),
            y_type=c_type(out),
            channels=x.shape[-1],
            table=layer.constant("exponentials", entries),
            bits=out.bits,
            lowest=out.lo,
            largest=out.hi,
            at=at,
            loops=loops,
            ends=ends,
        )


@dataclass(frozen=True)
class Move:
    """Concat, Slice, Pad and Transpose: strided copies, in whole runs where elements lie side by side."""

    name: str = "move"
    includes: Sequence[str | Path] = ()

    def matches(self, step: Step) -> bool:
        """Everything that only moves elements."""
        return isinstance(step.node.op, ops.Concat | ops.Slice | ops.Pad | ops.Transpose)

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
        """None: runs are copied in whatever order the axes have."""
        return None

    def packed(self, step: Step) -> tuple[Value, ...]:
        """None."""
        return ()

    def body(self, layer: Layer) -> str:
        """Fills and copies, in order."""
        node = layer.step.node
        x, out = node.inputs[0].type, node.output.type
        y, source = row_major(out.shape), row_major(x.shape)
        parts: list[Mapping[str, object]] = []
        match node.op:
            case ops.Transpose(perm=perm):
                steps = tuple(source[axis] for axis in perm)
                parts = [self._copy(layer[node.inputs[0]], out.shape, y, 0, steps, 0)]
            case ops.Slice(starts=starts, steps=hops):
                first = sum(a * s for a, s in zip(starts, source[1:], strict=True))
                steps = (source[0], *(h * s for h, s in zip(hops, source[1:], strict=True)))
                parts = [self._copy(layer[node.inputs[0]], out.shape, y, 0, steps, first)]
            case ops.Pad(pads=pads, value=value):
                first = sum(p * s for p, s in zip(pads, y[1:], strict=False))
                fill = {"fill": True, "count": out.size, "value": c_int(value)}
                copy = self._copy(layer[node.inputs[0]], x.shape, y, first, source, 0)
                parts = [fill, copy]
            case ops.Concat(axis=axis):
                first = 0
                for v in node.inputs:
                    steps = row_major(v.type.shape)
                    parts.append(self._copy(layer[v], v.type.shape, y, first, steps, 0))
                    first += v.type.shape[axis] * y[axis]
        return render("move.c.j2", parts=parts, at=at, loops=loops, ends=ends)

    def _copy(
        self,
        x: str,
        shape: Sequence[int],
        to: Sequence[int],
        to_first: int,
        source: Sequence[int],
        source_first: int,
    ) -> Mapping[str, object]:
        """Elements of `shape` from stride to stride, the innermost dense run at once."""
        run, lead = 1, len(shape)
        while lead and (shape[lead - 1] == 1 or to[lead - 1] == source[lead - 1] == run):
            lead -= 1
            run *= shape[lead]
        nest = merged(shape[:lead], {"y": to[:lead], "x": source[:lead]})
        first = {"y": to_first, "x": source_first}
        indices = {name: affine([(index, 1)], first[name]) for name, index in nest.at.items()}
        return {"fill": False, "x": x, "run": run, "nest": Nest(nest.loops, indices)}


PORTABLE: tuple[Kernel, ...] = (
    Dot(), Depthwise(), Pool(), Elementwise(), Table(), SoftmaxRows(), Move(), *SELECTIONS,
    *ATTENTION,
)  # fmt: skip
"""Together they compute every operator but Reshape, which moves nothing."""
