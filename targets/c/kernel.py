"""What a kernel is: it matches a step of the program, packs its constants and renders its C function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from qcompile.errors import Unsupported
from qcompile.ir import Array, Node, Rescale, Value, ops

from .nest import Nest, broadcast, parameter_strides, row_major
from .text import c_int, c_type, cast, minus

ALIGN = 16
"""Alignment of the arena and of everything in it."""

LINE = 64
"""The same where processors have caches: a register that lies across two lines is loaded as two."""

_INT32 = (-(1 << 31), (1 << 31) - 1)


@dataclass(frozen=True, eq=False)
class Step:
    """One kernel call: a node and, where `rescale` is set, the Rescale that alone reads its accumulator."""

    node: Node
    rescale: Node | None = None

    @property
    def output(self) -> Value:
        """The value it stores."""
        return (self.rescale or self.node).output

    @property
    def terms(self) -> tuple[Value, ...]:
        """What the fused Rescale reads beside the accumulator."""
        if self.rescale is None:
            return ()
        return tuple(v for v in self.rescale.inputs if v is not self.node.output)

    @property
    def reads(self) -> tuple[Value, ...]:
        """All values it reads, each once."""
        return tuple(dict.fromkeys((*self.node.inputs, *self.terms)))

    @property
    def name(self) -> str:
        """The layer of the model."""
        return self.node.name

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        size = self.node.output.type.size
        match self.node.op:
            case ops.Conv() | ops.MatMul():
                return size * int(np.prod(self.node.inputs[1].type.shape[1:], dtype=np.int64))
            case ops.BatchMatMul():
                return size * self.node.inputs[0].type.shape[-1]
            case ops.Mul():
                return size
            case _:
                return 0


@dataclass(frozen=True)
class Scratch:
    """Regions of a kernel's working memory: name, C type, elements; each aligned."""

    regions: tuple[tuple[str, str, int], ...] = ()

    @property
    def bytes(self) -> int:
        """All regions together."""
        return sum(_bytes(t, n) for _, t, n in self.regions)

    @property
    def declarations(self) -> str:
        """C that names the regions of `scratch`."""
        lines, offset = [], 0
        for name, kind, count in self.regions:
            lines.append(f"{kind} *const {name} = {cast(kind, 'scratch', offset)};")
            offset += _bytes(kind, count)
        return "\n".join(lines)


def _bytes(kind: str, count: int) -> int:
    width = int("".join(c for c in kind if c.isdigit())) // 8
    return -(-count * width // ALIGN) * ALIGN


@dataclass
class Layer:
    """What a kernel knows while it renders: the C names of its operands, and where its constants go."""

    step: Step
    operands: Mapping[Value, str]
    constant: Callable[[str, Array], str]
    scratch: Scratch = field(default_factory=Scratch)

    def __getitem__(self, value: Value) -> str:
        return self.operands[value]

    def element(self, value: Value, at: Mapping[str, str]) -> str:
        """One element of an operand."""
        return f"{self[value]}[{at[key(value)]}]"

    def row(self, role: str, entries: Sequence[int], index: str, kind: str) -> str:
        """A parameter: a literal where it is one number, else an element of a constant array."""
        if len(set(entries)) == 1:
            return c_int(entries[0])
        return f"{self.constant(role, np.array(entries, np.dtype(kind)))}[{index}]"

    def store(self, at: Mapping[str, str], accumulator: str) -> str:
        """C that turns `accumulator` into the result's element at `at["y"]`, other operands being at `at[name]`.

        `accumulator` is an int32 expression; a fused Rescale is applied, otherwise it is stored as it is.
        """
        if self.step.rescale is None:
            return f"y[{at['y']}] = {accumulator};"
        sources = {v: self.element(v, at) for v in self.step.terms}
        sources[self.step.node.output] = accumulator
        return self.rescale(self.step.rescale, sources, at)

    def rescale(self, node: Node, sources: Mapping[Value, str], at: Mapping[str, str]) -> str:
        """C of one element of a Rescale whose operands are the expressions `sources`."""
        op = node.op
        assert isinstance(op, Rescale)
        index = at.get("parameter", "0")
        terms = []
        suffix = ["", *map(str, range(1, len(node.inputs)))]
        for i, (acc, v) in enumerate(zip(op.accs, node.inputs, strict=False)):
            a = sources[v]
            if any(acc.pre_shift):
                places = self.row("pre_shift" + suffix[i], acc.pre_shift, index, "u1")
                a = f"shift_left({a}, {places})"
            m = self.row("multiplier" + suffix[i], acc.multiplier, index, "i4")
            terms.append(f"high_multiply({a}, {m})")
        for i, (val, v) in enumerate(zip(op.vals, node.inputs[len(op.accs) :], strict=True)):
            n = self.row("factor" + suffix[i], val.multiplier, index, "i4")
            x = minus(sources[v], val.zero_point)
            terms.append(f"({x}) * {n}" if val.zero_point else f"{x} * {n}")
        f = self.row("fraction", op.f, index, "u1")
        y = minus("round_shift(t, " + f + ")", -op.zero_point)
        kind = c_type(op.out)
        if (op.lo, op.hi) != _INT32:
            y = f"clamp({y}, {c_int(op.lo)}, {c_int(op.hi)})"
        cast = "" if kind == "int32_t" else f"({kind})"
        first = f"{'const ' if len(terms) == 1 else ''}int32_t t = {terms[0]};"
        more = [f"t += {term};" for term in terms[1:]]
        return "\n".join([first, *more, f"y[{at['y']}] = {cast}{y};"])


def strides(step: Step) -> dict[str, tuple[int, ...]]:
    """Along the axes of the result: strides of `y`, of the fused Rescale's other operands, of its parameters."""
    shape = step.output.type.shape
    found = {"y": row_major(shape)}
    found |= {key(v): broadcast(v.type.shape, shape) for v in step.terms}
    if step.rescale is not None:
        found |= parameters(step.rescale)
    return found


def key(value: Value) -> str:
    """Under which an operand's strides and index stand; never the same as `y` or `parameter`."""
    return f"%{value.name}"


def parameters(node: Node) -> dict[str, tuple[int, ...]]:
    """The stride of a Rescale's parameter rows, where it has any."""
    op = node.op
    assert isinstance(op, Rescale)
    rows = [op.f, *(r for a in op.accs for r in (a.multiplier, a.pre_shift))]
    if all(len(set(r)) == 1 for r in (*rows, *(v.multiplier for v in op.vals))):
        return {}
    return {"parameter": parameter_strides(node.output.type.shape, op.spatial)}


class Kernel(Protocol):
    """A way to compute some steps."""

    @property
    def name(self) -> str:
        """What the report calls it."""
        ...

    @property
    def includes(self) -> Sequence[str | Path]:
        """Headers its code needs; a Path is a file that is emitted beside the program."""
        ...

    def matches(self, step: Step) -> bool:
        """Can it compute this step?"""
        ...

    def cost(self, step: Step) -> int:
        """Roughly how many operations it takes: the cheapest that matches is taken."""
        ...

    def scratch(self, step: Step) -> Scratch:
        """Working memory."""
        ...

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """Operands each of whose elements is read before the result's element at the same place is written."""
        ...

    def raster(self, step: Step) -> int | None:
        """How many pixels of the result it makes at a time, in raster order; None where it keeps no such order.

        A pixel is all channels at one position; an elementwise operator's is one element. Raster order is the
        order in memory. Before it writes any of these pixels, the kernel has read all that they need of operand 0
        (an elementwise kernel: of every operand of the result's shape), and neither they nor later pixels are read
        for more than their own windows. So the result may overlap that operand: see `window.trails`.
        """
        ...

    def packed(self, step: Step) -> tuple[Value, ...]:
        """Constant operands that it packs itself instead of reading them as they are."""
        ...

    def body(self, layer: Layer) -> str:
        """The statements of the function."""
        ...


@runtime_checkable
class Shared(Protocol):
    """A kernel some of whose steps threads run together: all call its function, each with its number `thread`."""

    def shares(self, step: Step) -> bool:
        """Is the body made for several threads?

        All have the same scratch, and none reads what another may write but after `meet()`.
        """
        ...


def shared(kernel: Kernel, step: Step) -> bool:
    """Do several threads run this step together?"""
    return isinstance(kernel, Shared) and kernel.shares(step)


def aligned(step: Step, *values: Value) -> tuple[Value, ...]:
    """Those of `values` that have the result's shape and C type."""
    out = step.output.type
    return tuple(
        v for v in values if v.type.shape == out.shape and c_type(v.type.dtype) == c_type(out.dtype)
    )


def constant(node: Node, operand: int) -> Array:
    """A constant operand's array; Unsupported where it is no constant."""
    value = node.inputs[operand]
    if value.const is None:
        raise Unsupported(
            f"{node.name}: its operand {value.name} must be a constant; C for two variable"
            f" operands of {type(node.op).__name__} does not exist here"
        )
    return value.const


def loops(nest: Nest) -> str:
    """C that opens the loops of a nest."""
    return "\n".join(f"for (int {v} = 0; {v} < {n}; ++{v}) {{" for v, n in nest.loops)


def ends(nest: Nest) -> str:
    """C that closes them."""
    return "\n".join("}" for _ in nest.loops)
