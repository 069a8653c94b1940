"""Rescale and Mul for Helium: four elements side by side, whatever their types, tails predicated."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qcompile.ir import Node, Rescale, Value, ops
from qcompile.ir.proof import code_range

from ..c.kernel import Layer, Scratch, Step, aligned, ends, key, loops, parameters, strides
from ..c.nest import Nest, broadcast, merged
from ..c.text import affine, at, c_int, c_type

_INT32 = (-(1 << 31), (1 << 31) - 1)
_LARGEST_ZERO = 255
_INT8 = (-128, 127)
_INT16 = (-(1 << 15), (1 << 15) - 1)
_UNROLLED = 128
"""Instructions of a row's turns together up to which compilers unroll the loop."""
_PRODUCTS = ("vmullbq_int_s16", "vmulltq_int_s16")
_HALVES = ("vmovlbq_s16", "vmovltq_s16")

Vectors = tuple[str, ...]
"""C names of four results each."""


@dataclass(frozen=True)
class _Kind:
    """How elements of a C type come into lanes of `bits` bits and leave them."""

    load: str
    store: str
    unsigned: bool = False

    def loaded(self, pointer: str, bits: int, lanes: str) -> str:
        """A vector, only the first elements of which exist where `lanes` says so."""
        arguments = f"({pointer}, {lanes})" if lanes else f"({pointer})"
        vector = f"{self.load}q{'_z' if lanes else ''}_{'u' if self.unsigned else 's'}{bits}"
        if self.unsigned:
            return f"vreinterpretq_s{bits}_u{bits}({vector}{arguments})"
        return vector + arguments

    def stored(self, pointer: str, vector: str, bits: int, lanes: str) -> str:
        """The statement that stores a vector."""
        sign = "u" if self.unsigned else "s"
        if self.unsigned:
            vector = f"vreinterpretq_u{bits}_s{bits}({vector})"
        more = f", {lanes}" if lanes else ""
        return f"{self.store}q{'_p' if lanes else ''}_{sign}{bits}({pointer}, {vector}{more});"


_KINDS = {
    "int8_t": _Kind("vldrb", "vstrb"),
    "uint8_t": _Kind("vldrb", "vstrb", unsigned=True),
    "int16_t": _Kind("vldrh", "vstrh"),
    "int32_t": _Kind("vldrw", "vstrw"),
}


def replaced(index: str, variable: str, by: str) -> str:
    """An index expression with another value for one of its variables."""
    terms: list[tuple[str, int]] = []
    for term in index.replace(" - ", " + -").split(" + "):
        name, _, factor = term.partition(" * ")
        terms.append((by if name == variable else name, int(factor or 1)))
    return affine(
        [t for t in terms if not t[0].startswith("-")],
        sum(int(n) for n, _ in terms if n.startswith("-")),
    )


class Row:
    """The C of `count` results side by side, and how many instructions a turn of its loop takes.

    `indices` say where operands, parameters and results lie for each value of `variable`, which runs through the row.
    Operands of at most 16 bits come eight at a time: in their 32 bits the even ones and the odd ones are a vector each.
    """

    def __init__(
        self, layer: Layer, indices: Mapping[str, str], variable: str, count: int, *, wide: bool
    ) -> None:
        self.layer, self.indices, self.variable, self.count = layer, indices, variable, count
        self.lanes, self.bits = (4, 32) if wide else (8, 16)
        self.instructions = 0
        self._before: list[str] = []
        self._loads: list[tuple[str, str, str]] = []
        self._body: list[str] = []
        self._store = ("", "", "")

    @property
    def pointers(self) -> int:
        """How many sequences are walked through."""
        return len(self._loads) + 1

    def text(self) -> str:
        """Whole vectors, then what is left; fours are all predicated, which costs nothing in a loop of their own."""
        if self.lanes == 4:
            turn = (*self._turn("lanes"), *self._next())
            head = (
                f"for (int left = {self.count}; left > 0; left -= 4) {{",
                "const mve_pred16_t lanes = vctp32q((uint32_t)left);",
            )
            return "\n".join((*self._before, *head, *turn, "}"))
        whole, left = divmod(self.count, self.lanes)
        lines = [*self._before]
        if whole:
            lines += [f"for (int left = {whole}; left > 0; --left) {{"]
            lines += [*self._turn(""), *self._next(), "}"]
        if left:
            lines += [
                "{",
                f"const mve_pred16_t lanes = vctp16q({left}u);",
                *self._turn("lanes"),
                "}",
            ]
        return "\n".join(lines)

    def _turn(self, lanes: str) -> Iterator[str]:
        for name, pointer, kind in self._loads:
            loaded = _KINDS[kind].loaded(pointer, self.bits, lanes)
            yield f"const {self._type} {name} = {loaded};"
        yield from self._body
        pointer, vector, kind = self._store
        yield _KINDS[kind].stored(pointer, vector, self.bits, lanes)

    def _next(self) -> Iterator[str]:
        for _, pointer, _ in self._loads:
            yield f"{pointer} += {self.lanes};"
        yield f"{self._store[0]} += {self.lanes};"

    @property
    def _type(self) -> str:
        return f"int{self.bits}x{self.lanes}_t"

    def operand(self, value: Value) -> str:
        """A vector of an operand."""
        return self.elements(self.layer[value], c_type(value.type.dtype), self.indices[key(value)])

    def elements(self, pointer: str, kind: str, index: str) -> str:
        """Elements side by side, or always the same one where the row stays at it."""
        first = replaced(index, self.variable, "0")
        if first == index:
            name = f"same{len(self._before)}"
            element = f"{pointer}[{first}]"
            self._before.append(f"const {self._type} {name} = vdupq_n_s{self.bits}({element});")
            return name
        at_, name = f"from{len(self._loads)}", f"read{len(self._loads)}"
        self._before.append(f"const {kind} *{at_} = {at(pointer, first)};")
        self._loads.append((name, at_, kind))
        self.instructions += 1
        return name

    def difference(self, vector: str, zero: int) -> str:
        """Less a number; it stays in 16 bits where bytes come eight at a time."""
        if zero == 0:
            return vector
        return self._line(self._type, f"vsubq_n_s{self.bits}({vector}, {zero})")

    def sum(self, x: str, y: str) -> str:
        """Of two vectors."""
        return self._line(self._type, f"vaddq_s{self.bits}({x}, {y})")

    def product(self, x: str, y: str) -> Vectors:
        """Of two vectors, in 32 bits."""
        if self.bits == 32:
            return self._call("vmulq_s32", (x,), (y,))
        return tuple(self._line("int32x4_t", f"{f}({x}, {y})") for f in _PRODUCTS)

    def widened(self, vector: str) -> Vectors:
        """In 32 bits."""
        if self.bits == 32:
            return (vector,)
        return tuple(self._line("int32x4_t", f"{f}({vector})") for f in _HALVES)

    def store(self, vectors: Vectors) -> None:
        """The results, which fit their type."""
        kind = c_type(self.layer.step.output.type.dtype)
        first = replaced(self.indices["y"], self.variable, "0")
        self._before.append(f"{kind} *to = {at('y', first)};")
        self.instructions += 1
        self._store = ("to", vectors[0], kind)

    def rescaled(self, node: Node, sources: Mapping[Value, Vectors]) -> Vectors:
        """Results of a Rescale, see arith.py; additions may leave 32 bits in between, their sum does not."""
        op = node.op
        assert isinstance(op, Rescale)
        suffix = ["", *map(str, range(1, len(node.inputs)))]
        more, zero = self._constants(node)
        total: Vectors = ()
        for i, (acc, v) in enumerate(zip(op.accs, node.inputs, strict=False)):
            a = self._shifted(sources[v], "pre_shift" + suffix[i], acc.pre_shift)
            row = self._parameter("multiplier" + suffix[i], acc.multiplier, "int32_t")
            m = row or (f"vdupq_n_s32({acc.multiplier[0]})",) * len(a)
            term = self._call("vmulhq_s32", a, m)
            total = self._call("vaddq_s32", total, term) if total else term
        for i, (val, v) in enumerate(zip(op.vals, node.inputs[len(op.accs) :], strict=True)):
            x, n = sources[v], c_int(val.multiplier[0])
            row = self._parameter("factor" + suffix[i], val.multiplier, "int32_t")
            if row:
                (one,) = x
                term = self._call("vmulq_s32", (self.difference(one, val.zero_point),), row)
                total = self._call("vaddq_s32", total, term) if total else term
            elif total:
                total = self._call("vmlaq_n_s32", total, x, n)
            elif more:
                # Compilers make two instructions of it.
                self.instructions += len(x)
                factor = (f"vdupq_n_s32({n})",) * len(x)
                total, more = self._call("vmlasq_n_s32", x, factor, c_int(more)), 0
            else:
                total = self._call("vmulq_n_s32", x, n)
        if more:
            total = self._call("vaddq_n_s32", total, c_int(more))
        total = self._rounded(op, total)
        return (
            self._narrowed(op, total, zero) if self.lanes == 8 else self._clamped(op, total, zero)
        )

    def _constants(self, node: Node) -> tuple[int, int]:
        """What is added before the shift: zero points, the result's where that fits; what is added after it."""
        op = node.op
        assert isinstance(op, Rescale)
        total = reach = 0
        for val, v in zip(op.vals, node.inputs[len(op.accs) :], strict=True):
            lo, hi = code_range(v)
            most = max(map(abs, val.multiplier))
            reach += max(abs(lo - val.zero_point), abs(hi - val.zero_point)) * most
            if len(set(val.multiplier)) == 1:
                total -= val.zero_point * val.multiplier[0]
        places = op.f[0]
        early = not op.accs and len(set(op.f)) == 1
        if early and reach + (abs(op.zero_point) << places) < 1 << 31:
            return _wrapped(total + (op.zero_point << places)), 0
        return _wrapped(total), op.zero_point

    def _shifted(self, vectors: Vectors, role: str, places: Sequence[int]) -> Vectors:
        if not any(places):
            return vectors
        row = self._parameter(role, places, "int8_t")
        if row:
            return self._call("vshlq_s32", vectors, row)
        return self._call("vshlq_n_s32", vectors, str(places[0]))

    def _rounded(self, op: Rescale, total: Vectors) -> Vectors:
        row = self._parameter("fraction", [-f for f in op.f], "int8_t")
        if row:
            return self._call("vrshlq_s32", total, row)
        return self._call("vrshrq_n_s32", total, str(op.f[0]))

    def _clamped(self, op: Rescale, vectors: Vectors, zero: int) -> Vectors:
        vectors = self._call("vaddq_n_s32", vectors, c_int(zero)) if zero else vectors
        if (op.lo, op.hi) == _INT32:
            return vectors
        least = self._call("vmaxq_s32", vectors, f"vdupq_n_s32({c_int(op.lo)})")
        return self._call("vminq_s32", least, f"vdupq_n_s32({c_int(op.hi)})")

    def _narrowed(self, op: Rescale, vectors: Vectors, zero: int) -> Vectors:
        """Eight results as the lanes of one vector: saturating to 16 bits changes none that is clamped to fewer."""
        if zero and op.out.bits > 8:
            vectors, zero = self._call("vaddq_n_s32", vectors, c_int(zero)), 0
        even, odd = vectors
        made = self._line("int16x8_t", f"vqmovnbq_s32(vreinterpretq_s16_s32({even}), {even})")
        made = self._line("int16x8_t", f"vqmovntq_s32({made}, {odd})")
        if zero:
            made = self._line("int16x8_t", f"vqaddq_n_s16({made}, {zero})")
        if (op.lo, op.hi) != _INT16:
            made = self._line("int16x8_t", f"vmaxq_s16({made}, vdupq_n_s16({op.lo}))")
            made = self._line("int16x8_t", f"vminq_s16({made}, vdupq_n_s16({op.hi}))")
            # Compilers know that both together are one saturation.
            self.instructions -= (op.lo, op.hi) == _INT8
        return (made,)

    def _parameter(self, role: str, entries: Sequence[int], kind: str) -> Vectors:
        """Entries of a parameter's row; nothing where it is one number."""
        if len(set(entries)) == 1:
            return ()
        data = np.array(entries, np.dtype("i4" if kind == "int32_t" else "i1"))
        name = self.layer.constant(role, data)
        return (self.elements(name, kind, self.indices["parameter"]),)

    def _call(self, name: str, first: Vectors, *more: str | Vectors) -> Vectors:
        """One instruction for each vector."""
        made = []
        for i, vector in enumerate(first):
            rest = (m if isinstance(m, str) else m[i] for m in more)
            made.append(self._line("int32x4_t", f"{name}({', '.join((vector, *rest))})"))
        return tuple(made)

    def _line(self, kind: str, expression: str) -> str:
        """One instruction; its result gets a name, so that lines stay short."""
        self.instructions += 1
        name = f"v{len(self._body)}"
        self._body.append(f"const {kind} {name} = {expression};")
        return name


def _wrapped(n: int) -> int:
    """The 32-bit number with the same lowest bits."""
    return (n + (1 << 31)) % (1 << 32) - (1 << 31)


def narrow(step: Step) -> bool:
    """Do operands, parameters and result let eight elements be computed at a time?"""
    rescale = step.rescale or step.node
    kinds = [v.type.dtype for v in (*step.reads, step.output)]
    if not isinstance(rescale.op, Rescale) or any(k.bytes > 2 for k in kinds):
        return False
    # less its zero point, an operand of 16 bits may have 17
    if isinstance(step.node.op, ops.Mul) and any(v.type.dtype.bits > 8 for v in step.node.inputs):
        return False
    return not parameters(rescale) and abs(rescale.op.zero_point) <= _LARGEST_ZERO


@dataclass(frozen=True)
class Elementwise:
    """Rescale, Mul, and Mul with its Rescale: one pass over the elements, operands broadcast."""

    name: str = "mve elementwise"
    includes: Sequence[str] = ("<arm_mve.h>",)

    def matches(self, step: Step) -> bool:
        """Every Rescale and Mul."""
        return isinstance(step.node.op, ops.Rescale | ops.Mul)

    def cost(self, step: Step) -> int:
        """Executed instructions, fitted to counts."""
        names = {v: "x" for v in step.reads}
        row, nest = self._row(Layer(step, names, lambda role, _: role))
        rows = math.prod(n for _, n in nest.loops)
        turns, left = divmod(row.count, row.lanes)
        each = 6 + 2 * row.pointers + turns * (row.instructions + 1)
        if rows > 1 and turns * row.instructions <= _UNROLLED:
            each = 2 + turns * row.instructions - turns // 2
        if left:
            each += row.instructions + (1 if row.lanes == 4 else 4 + row.pointers)
        return 20 + rows * each

    def scratch(self, step: Step) -> Scratch:
        """None."""
        return Scratch()

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """Every operand of the same shape and type."""
        return aligned(step, *step.reads)

    def raster(self, step: Step) -> int | None:
        """A vector."""
        return 8 if narrow(step) else 4

    def packed(self, step: Step) -> tuple[Value, ...]:
        """None."""
        return ()

    def body(self, layer: Layer) -> str:
        """Loops around one row."""
        row, nest = self._row(layer)
        return "\n".join((loops(nest), row.text(), ends(nest)))

    def _row(self, layer: Layer) -> tuple[Row, Nest]:
        """The innermost loop, and those around it."""
        step, node = layer.step, layer.step.node
        shape = step.output.type.shape
        operands = strides(step)
        operands |= {key(v): broadcast(v.type.shape, shape) for v in node.inputs}
        if isinstance(node.op, Rescale):
            operands |= parameters(node)
        nest = merged(shape, operands)
        *outer, (variable, count) = nest.loops or (("i", 1),)
        row = Row(layer, nest.at, variable, count, wide=not narrow(step))
        loaded = {v: row.operand(v) for v in step.reads}
        if isinstance(node.op, ops.Mul):
            x, y = (loaded[v] for v in node.inputs)
            x, y = row.difference(x, node.op.zero_x), row.difference(y, node.op.zero_y)
            made = row.product(x, y)
            if step.rescale is not None:
                sources = {v: row.widened(loaded[v]) for v in step.terms}
                made = row.rescaled(step.rescale, {**sources, node.output: made})
        else:
            made = row.rescaled(node, {v: row.widened(x) for v, x in loaded.items()})
        row.store(made)
        return row, Nest(tuple(outer), {})
