"""The portable kernels: plain C99 that a compiler vectorises, one small object each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from qcompile.errors import Unsupported
from qcompile.ir import Node, Value, ops

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
from .nest import Nest, broadcast, merged, named, row_major
from .text import HERE, affine, c_int, c_type, minus, render
from .window import Window, window

_NINE_TAPS = 9
"""More taps than a 3 x 3 window's are looped over, not written out."""


def _pixels(step: Step, geometry: Window | None) -> Nest:
    """Loops over the result's pixels; indices are those of channel `c`, and of the pixel's row for `x` of a MatMul."""
    shape, operands = step.output.type.shape, strides(step)
    if geometry is not None:
        lead = named(shape[:-1], geometry.variables, {k: s[:-1] for k, s in operands.items()})
    else:
        operands["x"] = (*row_major(step.node.inputs[0].type.shape)[:-1], 0)
        lead = merged(shape[:-1], {k: s[:-1] for k, s in operands.items()})
    at = {k: affine([(index, 1), ("c", operands[k][-1])]) for k, index in lead.at.items()}
    return Nest(lead.loops, at)


def _window_of(node: Node) -> Window:
    match node.op:
        case ops.Conv(strides=strides, pads=pads, dilations=dilations):
            return window(node, node.inputs[1].type.shape[1:-1], strides, pads, dilations)
        case ops.MaxPool(kernel=kernel, strides=strides, pads=pads, dilations=dilations):
            return window(node, kernel, strides, pads, dilations)
        case ops.SumPool(kernel=kernel, strides=strides, pads=pads):
            return window(node, kernel, strides, pads, (1,) * len(kernel))
        case _:
            raise TypeError(f"{node.name} has no window")


@dataclass(frozen=True)
class Dot:
    """Conv and MatMul: the taps of a few pixels side by side, widened to int16, times the rows of the weights.

    int16 by int8 with an int32 sum is what compilers turn into multiply-add instructions; a few pixels share each
    row of weights.
    """

    name: str = "dot"
    includes: Sequence[str] = ()
    template: str = "dot.c.j2"
    folder: Path = HERE
    patch: str = "int16_t"
    lanes: ClassVar[int] = 8

    def matches(self, step: Step) -> bool:
        """Every Conv and MatMul."""
        return isinstance(step.node.op, ops.Conv | ops.MatMul)

    def cost(self, step: Step) -> int:
        """Products, and the copies of each group's patch."""
        pixels = step.output.type.size // step.output.type.shape[-1]
        return step.macs + 8 * pixels * self._groups(step) * self._depth(step)

    def scratch(self, step: Step) -> Scratch:
        """Patches and accumulators of the pixels of one block."""
        block = self._block(step)
        return Scratch(
            (
                ("patch", self.patch, block * self._padded(step)),
                ("acc", "int32_t", block * self._outputs(step)),
            )
        )

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """A fused Rescale's other operands; never the one whose pixels are read again."""
        return tuple(v for v in aligned(step, *step.terms) if v is not step.node.inputs[0])

    def body(self, layer: Layer) -> str:
        """See the template."""
        step = layer.step
        x = step.node.inputs[0]
        conv = step.node.op if isinstance(step.node.op, ops.Conv) else None
        geometry = self._window(step)
        block = self._block(step)
        nest = self._nest(step)
        accumulator = affine([("pixel" if block > 1 else "0", self._outputs(step)), ("c", 1)])
        weights, bias = constant(step.node, 1), constant(step.node, 2)
        return render(
            self.template,
            self.folder,
            scratch=layer.scratch.declarations,
            nest=nest,
            window=geometry,
            x=layer[x],
            x_type=c_type(x.type.dtype),
            type=self.patch,
            block=block,
            depth=self._depth(step),
            padded=self._padded(step),
            groups=self._groups(step),
            channels=len(weights) // self._groups(step),
            outputs=self._outputs(step),
            passes=self.passes(step),
            pad_value=conv.pad_value if conv else 0,
            weights=layer.constant("weights", self.pack(step, weights)),
            bias=layer.constant("bias", self.pack_bias(step, bias)),
            store=layer.store(nest.at, f"acc[{accumulator}]"),
            affine=affine,
        )

    def pack(self, step: Step, weights: NDArray[np.generic]) -> NDArray[np.int8]:
        """One row for each output channel, filled with zeros to whole vectors."""
        rows = weights.reshape(len(weights), -1).astype(np.int8)
        return np.pad(rows, ((0, 0), (0, self._padded(step) - rows.shape[1])))

    def pack_bias(self, step: Step, bias: NDArray[np.generic]) -> NDArray[np.int32]:
        """As it is."""
        return bias.astype(np.int32)

    def passes(self, step: Step) -> list[tuple[int, int, int]]:
        """(first, last, how many at once) of the channels of a group."""
        channels = step.output.type.shape[-1] // self._groups(step)
        width = 4 if self._block(step) == 1 else 2
        full = channels - channels % width
        return [p for p in ((0, full, width), (full, channels, channels - full)) if p[0] < p[1]]

    def _block(self, step: Step) -> int:
        """Pixels at once: the number that wastes least at the end of a row."""
        nest = self._nest(step)
        row = nest.loops[-1][1] if nest.loops else 1
        cost = {4: 10, 2: 12, 1: 16}
        return min(cost, key=lambda p: -(-row // p) * p * cost[p])

    def _window(self, step: Step) -> Window | None:
        return _window_of(step.node) if isinstance(step.node.op, ops.Conv) else None

    def _nest(self, step: Step) -> Nest:
        return _pixels(step, self._window(step))

    def _groups(self, step: Step) -> int:
        return step.node.op.groups if isinstance(step.node.op, ops.Conv) else 1

    def _depth(self, step: Step) -> int:
        return math.prod(step.node.inputs[1].type.shape[1:])

    def _padded(self, step: Step) -> int:
        return -(-self._depth(step) // self.lanes) * self.lanes

    def _outputs(self, step: Step) -> int:
        return step.output.type.shape[-1]


@dataclass(frozen=True)
class Depthwise:
    """Conv with one input channel a group: all channels of a pixel side by side, a row of pad values for the border."""

    name: str = "depthwise"
    includes: Sequence[str] = ()

    def matches(self, step: Step) -> bool:
        """One input channel in every group."""
        op = step.node.op
        return isinstance(op, ops.Conv) and op.groups == step.node.inputs[0].type.shape[-1]

    def cost(self, step: Step) -> int:
        """Products; several outputs a channel do not vectorise."""
        return step.macs * (2 if self._times(step) == 1 else 8)

    def scratch(self, step: Step) -> Scratch:
        """One pixel's accumulators, and the row of pad values."""
        x, geometry = step.node.inputs[0], _window_of(step.node)
        acc = ("acc", "int32_t", step.output.type.shape[-1])
        border = ("border", c_type(x.type.dtype), geometry.channels)
        return Scratch((acc, border) if self._border(geometry) else (acc,))

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """A fused Rescale's other operands."""
        return tuple(v for v in aligned(step, *step.terms) if v is not step.node.inputs[0])

    def body(self, layer: Layer) -> str:
        """See the template."""
        step, node = layer.step, layer.step.node
        assert isinstance(node.op, ops.Conv)
        geometry = _window_of(node)
        nest = _pixels(step, geometry)
        whole = geometry.taps <= _NINE_TAPS
        columns_unrolled = whole or geometry.x.kernel <= _NINE_TAPS
        weights = constant(node, 1)
        return render(
            "depthwise.c.j2",
            scratch=layer.scratch.declarations,
            nest=nest,
            window=geometry,
            border=self._border(geometry),
            whole=whole,
            rows_unrolled=whole,
            columns_unrolled=columns_unrolled,
            rows=geometry.y.unrolled() if whole else geometry.y.looped(),
            columns=geometry.x.unrolled() if columns_unrolled else geometry.x.looped(),
            x=layer[node.inputs[0]],
            type=c_type(node.inputs[0].type.dtype),
            pad_value=node.op.pad_value,
            outputs=len(weights),
            times=self._times(step),
            weights=layer.constant("weights", weights.reshape(len(weights), -1).T.astype(np.int8)),
            bias=layer.constant("bias", constant(node, 2)),
            store=layer.store(nest.at, "acc[c]"),
            affine=affine,
            loops=loops,
            ends=ends,
        )

    def _times(self, step: Step) -> int:
        return step.output.type.shape[-1] // step.node.inputs[0].type.shape[-1]

    def _border(self, geometry: Window) -> bool:
        return bool(geometry.y.inside or geometry.x.inside)


@dataclass(frozen=True)
class Pool:
    """MaxPool and SumPool: all channels of a pixel side by side, taps in the border left out."""

    name: str = "pool"
    includes: Sequence[str] = ()

    def matches(self, step: Step) -> bool:
        """Every MaxPool and SumPool."""
        return isinstance(step.node.op, ops.MaxPool | ops.SumPool)

    def cost(self, step: Step) -> int:
        """Elements looked at."""
        return step.output.type.size * _window_of(step.node).taps

    def scratch(self, step: Step) -> Scratch:
        """The sums of one pixel."""
        if isinstance(step.node.op, ops.MaxPool):
            return Scratch()
        return Scratch((("acc", "int32_t", step.output.type.shape[-1]),))

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """A fused Rescale's other operands."""
        return tuple(v for v in aligned(step, *step.terms) if v is not step.node.inputs[0])

    def body(self, layer: Layer) -> str:
        """See the template."""
        step, node = layer.step, layer.step.node
        geometry = _window_of(node)
        nest = _pixels(step, geometry)
        largest = isinstance(node.op, ops.MaxPool)
        if largest:
            nest = Nest(
                nest.loops, {"y": affine([(nest.at["y"].removesuffix("c").rstrip(" +") or "0", 1)])}
            )
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
            y_type=c_type(step.output.type.dtype),
            store="" if largest else layer.store(nest.at, "acc[c]"),
            minus=minus,
            loops=loops,
            ends=ends,
        )


@dataclass(frozen=True)
class Elementwise:
    """Rescale, Mul, and Mul with its Rescale: one pass over the elements, operands broadcast."""

    name: str = "elementwise"
    includes: Sequence[str] = ()

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
    includes: Sequence[str] = ()

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

    def body(self, layer: Layer) -> str:
        """One loop."""
        x, table = layer.step.node.inputs
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
    includes: Sequence[str] = ()

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
            loops=loops,
            ends=ends,
        )


@dataclass(frozen=True)
class Move:
    """Concat, Slice, Pad and Transpose: strided copies, in whole runs where elements lie side by side."""

    name: str = "move"
    includes: Sequence[str] = ()

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
                at = 0
                for v in node.inputs:
                    strides = row_major(v.type.shape)
                    parts.append(self._copy(layer[v], v.type.shape, y, at, strides, 0))
                    at += v.type.shape[axis] * y[axis]
        return render("move.c.j2", parts=parts, loops=loops, ends=ends)

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
        at = {name: affine([(index, 1)], first[name]) for name, index in nest.at.items()}
        return {"fill": False, "x": x, "run": run, "nest": Nest(nest.loops, at)}


PORTABLE: tuple[Kernel, ...] = (
    Dot(), Depthwise(), Pool(), Elementwise(), Table(), SoftmaxRows(), Move(),
)  # fmt: skip
"""Together they compute every operator but Reshape, which moves nothing."""
