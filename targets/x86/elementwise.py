"""Rescale, Mul, and Mul with its Rescale: the innermost loop in vectors, operands broadcast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from qcompile.ir import Node, Rescale, Value, ops

from ..c.kernel import Layer, Scratch, Step, aligned, key, parameters, strides
from ..c.nest import Nest, broadcast, merged
from ..c.text import affine, at, c_int
from .epilogue import Epilogue
from .isa import Isa

_AT_ONCE = 4
_WORTH = 1 << 13
"""Elements that are worth a meeting of threads."""

_NARROW_ZERO = 255
_WIDE_ZERO = 1 << 29
"""Zero points that the stores of bytes and of wider results take."""


@dataclass(frozen=True)
class Elementwise:
    """One pass over the elements, by `threads` together."""

    isa: Isa
    threads: int = 1

    @property
    def name(self) -> str:
        """See Kernel."""
        return f"elementwise-{self.isa.name}"

    @property
    def includes(self) -> Sequence[str | Path]:
        """The headers of the instruction set."""
        return self.isa.headers

    def matches(self, step: Step) -> bool:
        """Zero points that the stores take."""
        if not isinstance(step.node.op, ops.Rescale | ops.Mul):
            return False
        rescale = _rescale(step)
        if rescale is None:
            return True
        assert isinstance(rescale.op, Rescale)
        once = rescale is step.node or sum(v is step.node.output for v in rescale.inputs) == 1
        most = _NARROW_ZERO if step.output.type.dtype.bytes == 1 else _WIDE_ZERO
        return once and abs(rescale.op.zero_point) <= most

    def shares(self, step: Step) -> bool:
        """See Shared: all but what is done sooner than threads meet."""
        return self.threads > 1 and step.output.type.size >= _WORTH and bool(_nest(step)[0].loops)

    def cost(self, step: Step) -> int:
        """Cycles: every operand's loads and product, then the results."""
        nest, _ = _nest(step)
        inner = nest.loops[-1][1] if nest.loops else 1
        vectors = -(-inner // self.isa.lanes) * (step.output.type.size // inner)
        return int(vectors * (2 * len(step.reads) * self.isa.load_cost + self.isa.epilogue_cost))

    def scratch(self, step: Step) -> Scratch:
        """None."""
        return Scratch()

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """Every operand of the same shape and type."""
        return aligned(step, *step.reads)

    def raster(self, step: Step) -> int | None:
        """At least one element: vectors are read whole before they are written."""
        return 1

    def packed(self, step: Step) -> tuple[Value, ...]:
        """None."""
        return ()

    def body(self, layer: Layer) -> str:
        """Loops around vectors of the innermost axis."""
        step = layer.step
        nest, inner = _nest(step)
        if not nest.loops:
            return self._block(layer, nest, inner, 1)
        *outer, (variable, extent) = nest.loops
        lines = [f"for (int {v} = 0; {v} < {n}; ++{v}) {{" for v, n in outer]
        shared = self.shares(step)
        if shared and outer:
            v, n = outer[0]
            lines[0] = f"for (int {v} = SHARE({n}, thread); {v} < SHARE({n}, thread + 1); ++{v}) {{"
        alone = shared and not outer
        block = _AT_ONCE * self.isa.lanes
        whole = extent - extent % block
        for first, end, size in ((0, whole, block), (whole, extent, extent - whole)):
            if first == end:
                continue
            loop = f"for (int {variable} = {first}; {variable} < {end}; {variable} += {size}) {{"
            if alone and size == block:
                share = f"SHARE({whole // block}, thread"
                loop = (
                    f"for (int {variable} = {share}) * {block}; {variable} < {share} + 1) * {block};"
                    f" {variable} += {block}) {{"
                )
            elif end - first == size:
                loop = f"{'if (thread == 0) ' if alone else ''}{{\nconst int {variable} = {first};"
            lines += [loop, self._block(layer, nest, inner, size), "}"]
        return "\n".join([*lines, *["}"] * len(outer)])

    def _block(self, layer: Layer, nest: Nest, inner: Mapping[str, int], size: int) -> str:
        """Statements that make `size` results side by side."""
        step, lanes = layer.step, self.isa.lanes
        streams = _Streams(_as_rescaled(layer), self.isa, nest=nest, inner=inner)
        sums = [f"s{v}" for v in range(-(-size // lanes))]
        lines = [f"const int at = {nest.at['y']};"]
        for v, name in enumerate(sums):
            count = min(lanes, size - v * lanes)
            match step.node.op:
                case ops.Mul(zero_x=zero_x, zero_y=zero_y):
                    x, y = (
                        _less(streams.operand(value, v * lanes, count), zero)
                        for value, zero in zip(step.node.inputs, (zero_x, zero_y), strict=True)
                    )
                    lines.append(f"vec {name} = multiply({x}, {y});")
                case _:
                    lines.append(f"vec {name};")
        return "\n".join([*lines, streams.render([sums], [0], "c", size)])


@dataclass(frozen=True)
class _Streams(Epilogue):
    """Operands and parameters that lie as a nest of loops says; `inner` are their strides in the innermost."""

    nest: Nest = field(default_factory=lambda: Nest((), {}))
    inner: Mapping[str, int] = field(default_factory=dict)

    def operand(self, value: Value, offset: int, count: int) -> str:
        """Some elements of an operand: side by side, or one in all lanes."""
        place = key(value)
        index = self.nest.at[place]
        if not self.inner[place]:
            return f"splat({self.layer[value]}[{index}])"
        kind = value.type.dtype
        suffix = f"{'i' if kind.signed else 'u'}{kind.bytes * 8}"
        return f"load_{suffix}({at(self.layer[value], affine([(index, 1)], offset))}, {count})"

    def _load(self, value: Value, offset: int, count: int) -> str:
        return self.operand(value, offset, count)

    def _row(self, role: str, entries: Sequence[int], index: str, kind: str = "i4") -> str:
        if len(set(entries)) == 1:
            return f"splat({c_int(entries[0])})"
        filled = np.pad(np.array(entries, np.int64), (0, self.isa.lanes - 1), mode="edge")
        name = self.layer.constant(role, filled.astype(kind))
        place = self.nest.at["parameter"]
        if not self.inner["parameter"]:
            return f"splat({name}[{place}])"
        _, _, offset = index.rpartition("+")
        return f"load({at(name, affine([(place, 1)], int(offset) if '+' in index else 0))})"


def _rescale(step: Step) -> Node | None:
    return step.node if isinstance(step.node.op, Rescale) else step.rescale


def _as_rescaled(layer: Layer) -> Layer:
    """The same with a Rescale as one that is fused to a node whose sums none of its terms takes."""
    step = layer.step
    if not isinstance(step.node.op, Rescale):
        return layer
    none = Value("", step.output.type)
    return replace(layer, step=Step(Node(step.node.op, (), none, step.name), step.node))


def _nest(step: Step) -> tuple[Nest, Mapping[str, int]]:
    """The loops over the results, and every operand's stride in the innermost."""
    shape = step.output.type.shape
    operands = strides(step)
    operands |= {key(v): broadcast(v.type.shape, shape) for v in step.node.inputs}
    if isinstance(step.node.op, Rescale):
        operands |= parameters(step.node)
    last = max((axis for axis, n in enumerate(shape) if n > 1), default=0)
    return merged(shape, operands), {name: s[last] for name, s in operands.items()}


def _less(vector: str, zero: int) -> str:
    return f"add({vector}, splat({-zero}))" if zero else vector
