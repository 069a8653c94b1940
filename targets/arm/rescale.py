"""How NEON turns sums of channels side by side into results: a Rescale of four lanes, exactly as in `ir.arith`.

The upper half of an even multiplier's product is one instruction: vqdmulhq_s32 doubles the product with the half, and
saturates only where both factors are the lowest int32, which no multiplier is. A rounding shift has one too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qcompile.ir import Array, Rescale, Value
from qcompile.ir.arith import Val

from ..c.kernel import Step
from ..c.text import at, c_type

_LARGEST_ZERO = 255
"""Beyond it the sum of a saturated int16 and a zero point might be one of the 8-bit results."""
_INT16 = 1 << 15
_FULL = {"s8": (-128, 127), "u8": (0, 255), "s16": (-_INT16, _INT16 - 1)}
_KINDS = {"int8_t": "s8", "uint8_t": "u8", "int16_t": "s16", "int32_t": "s32"}
_BYTES = {"s8": 1, "u8": 1, "s16": 2, "s32": 4}


def loads(pointer: str, count: int) -> list[str]:
    """C expressions of vectors of four int32 side by side."""
    return [f"vld1q_s32({at(pointer, str(4 * v))})" for v in range(count)]


def lanes(pointer: str, name: str, count: int, kind: str = "s32") -> tuple[list[str], list[str]]:
    """C that loads vectors side by side, up to four with one instruction, and what each of them is called."""
    bits = int(kind[1:])
    lines, names = [], []
    for first in range(0, count, 4):
        n = min(4, count - first)
        source = at(pointer, str(first * 128 // bits))
        here = f"{name}{first // 4}"
        several = f"x{n}" if n > 1 else ""
        load = f"vld1q_{kind}_{several}" if several else f"vld1q_{kind}"
        lines.append(f"const int{bits}x{128 // bits}{several}_t {here} = {load}({source});")
        names += [f"{here}.val[{i}]" for i in range(n)] if several else [here]
    return lines, names


def _same(row: Sequence[int]) -> bool:
    return len(set(row)) == 1


@dataclass(frozen=True)
class Results:
    """Sums of `channels` channels to elements of `kind`, by `op` or as they are."""

    op: Rescale | None
    channels: int
    kind: str
    values: tuple[Value, ...]

    @property
    def bytes(self) -> int:
        """Of one element."""
        return _BYTES[self.kind]

    @property
    def together(self) -> int:
        """Vectors of four sums that make one vector of results."""
        return 4 // self.bytes

    def cost(self, vectors: int) -> int:
        """Instructions for the sums of one pixel."""
        return vectors * self._each + -(-vectors // self.together) * self._stores

    @cached_property
    def _each(self) -> int:
        """Instructions for a vector of sums."""
        if self.op is None:
            return 0
        shifted = any(any(a.pre_shift) for a in self.op.accs)
        return 2 + (not self._even) * 2 + shifted + sum(2 - self._short(v) for v in self.op.vals)

    @property
    def _stores(self) -> int:
        """Instructions for a vector of results."""
        return 1 if self.op is None else 7 + 4 * len(self.values)

    def constants(self, constant: Callable[[str, Array], str]) -> Mapping[str, str]:
        """The arrays that hold what differs between channels, by role."""
        found: dict[str, str] = {}
        for role, row, kind in self._rows():
            if not _same(row):
                # Eight factors are loaded where four may be left.
                filled = np.zeros(-(-self.channels // 16) * 16 + 8 * (kind == "i2"), kind)
                filled[: self.channels] = row
                found[role] = constant(role, filled)
        return found

    def _rows(self) -> list[tuple[str, Sequence[int], str]]:
        if self.op is None:
            return []
        (acc,) = self.op.accs
        halves = [m // 2 for m in acc.multiplier] if self._even else acc.multiplier
        rows: list[tuple[str, Sequence[int], str]] = [
            ("before", acc.pre_shift, "i4"),
            ("multiplier", halves, "i4"),
            ("shift", [-f for f in self.op.f], "i4"),
        ]
        rows += [
            (f"factor{i}", v.multiplier, "i2" if self._short(v) else "i4")
            for i, v in enumerate(self.op.vals)
        ]
        return rows

    @cached_property
    def _even(self) -> bool:
        assert self.op is not None
        return all(m % 2 == 0 for m in self.op.accs[0].multiplier)

    def _short(self, value: Val) -> bool:
        return all(-_INT16 <= n < _INT16 for n in value.multiplier)

    def parameters(
        self, constants: Mapping[str, str], first: str, vectors: int
    ) -> tuple[list[str], dict[str, list[str]]]:
        """C that loads the constants of the channels from `first` on, and what their vectors are called."""
        lines: list[str] = []
        names: dict[str, list[str]] = {}
        for role, row, kind in self._rows():
            if _same(row):
                continue
            count = -(-vectors // 2) if kind == "i2" else vectors
            loads, names[role] = lanes(
                at(constants[role], first), f"{role}_", count, "s16" if kind == "i2" else "s32"
            )
            lines += loads
        return lines, names

    def store(
        self,
        sums: Sequence[str],
        parameters: Mapping[str, Sequence[str]],
        to: str,
        values: Sequence[str],
        count: int,
    ) -> str:
        """C that stores `count` channels' results at `to`; `values` point to the other operands' elements there."""
        lines: list[str] = []
        for first in range(0, len(sums), self.together):
            group = sums[first : first + self.together]
            here = min(len(group) * 4, count - first * 4)
            for i, (pointer, v) in enumerate(zip(values, self.values, strict=True)):
                source = at(pointer, str(first * 4))
                lines += self._widened(i, f"{i}_{first // self.together}", source, here, v, group)
            for i, s in enumerate(group):
                lines.append(self._scaled(s, first + i, i, first // self.together, parameters))
            lines.append(self._stored(group, at(to, str(first * 4)), here * self.bytes))
        return "\n".join(["{", *lines, "}"])

    def _widened(
        self, i: int, name: str, pointer: str, count: int, value: Value, group: Sequence[str]
    ) -> list[str]:
        """C that takes the zero point from an operand's bytes."""
        assert self.op is not None
        zero = self.op.vals[i].zero_point
        signed = value.type.dtype.signed
        s, v = ("s8", f"value{name}") if signed else ("u8", f"vreinterpretq_u8_s8(value{name})")
        lines = [f"const int8x16_t value{name} = neon_load({pointer}, {count});"]
        for half, part in (("low", f"vget_low_{s}({v})"), ("high", v)):
            if half == "high" and len(group) <= 2:
                break
            high = "_high" if half == "high" else ""
            dup = f"vdup{'q' if high else ''}_n_{s}({zero})"
            wide = f"vsubl{high}_{s}({part}, {dup})" if zero else f"vmovl{high}_{s}({part})"
            wide = wide if signed else f"vreinterpretq_s16_u16({wide})"
            lines.append(f"const int16x8_t {half}{name} = {wide};")
        return lines

    def _scaled(
        self, s: str, vector: int, lane: int, group: int, parameters: Mapping[str, Sequence[str]]
    ) -> str:
        """C that rescales four sums."""
        op = self.op
        if op is None:
            return ""
        (acc,) = op.accs
        e = s
        if "before" in parameters:
            e = f"vshlq_s32({e}, {parameters['before'][vector]})"
        elif acc.pre_shift[0]:
            e = f"vshlq_n_s32({e}, {acc.pre_shift[0]})"
        m = acc.multiplier[0] // 2 if self._even else acc.multiplier[0]
        by = parameters["multiplier"][vector] if "multiplier" in parameters else ""
        if self._even:
            e = f"vqdmulhq_s32({e}, {by})" if by else f"vqdmulhq_n_s32({e}, {m})"
        else:
            e = f"neon_high_multiply({e}, {by or f'vdupq_n_s32({m})'})"
        for i, v in enumerate(op.vals):
            wide = f"{'low' if lane < 2 else 'high'}{i}_{group}"
            high = "_high" if lane % 2 else ""
            half = wide if high else f"vget_low_s16({wide})"
            row = parameters.get(f"factor{i}")
            n = v.multiplier[0]
            if self._short(v) and row is None:
                e = f"vmlal{high}_n_s16({e}, {half}, {n})"
            elif self._short(v) and row is not None:
                factors = row[vector // 2]
                e = f"vmlal{high}_s16({e}, {half}, {factors if high else f'vget_low_s16({factors})'})"
            else:
                factors = row[vector] if row is not None else f"vdupq_n_s32({n})"
                e = f"vmlaq_s32({e}, vmovl{high}_s16({half}), {factors})"
        if "shift" in parameters:
            e = f"vrshlq_s32({e}, {parameters['shift'][vector]})"
        else:
            e = f"vrshrq_n_s32({e}, {op.f[0]})"
        if op.zero_point and self.kind == "s16":
            e = f"vaddq_s32({e}, vdupq_n_s32({op.zero_point}))"
        return f"{s} = {e};"

    def _stored(self, group: Sequence[str], to: str, count: int) -> str:
        """C that narrows a vector of results and stores its first `count` bytes."""
        op = self.op
        if op is None:
            return f"neon_store({to}, vreinterpretq_s8_s32({group[0]}), {count});"
        a, b, c, d = (*group, *[group[-1]] * (4 - len(group)))
        if len(group) == 1:
            a = b = group[0]
        low, high = f"neon_halves({a}, {b})", f"neon_halves({c}, {d})"
        if op.zero_point and self.kind != "s16":
            low = f"neon_moved({a}, {b}, {op.zero_point})"
            high = f"neon_moved({c}, {d}, {op.zero_point})"
        if self.kind == "s16":
            v, kind = low, "s16"
        elif len(group) <= 2 and self.kind == "s8":
            v, kind = f"vcombine_s8(vqmovn_s16({low}), vdup_n_s8(0))", "s8"
        elif len(group) <= 2:
            v, kind = f"vcombine_u8(vqmovun_s16({low}), vdup_n_u8(0))", "u8"
        elif self.kind == "s8":
            v, kind = f"neon_signed_bytes({low}, {high})", "s8"
        else:
            v, kind = f"neon_unsigned_bytes({low}, {high})", "u8"
        lowest, largest = _FULL[self.kind]
        if op.lo > lowest:
            v = f"vmaxq_{kind}({v}, vdupq_n_{kind}({op.lo}))"
        if op.hi < largest:
            v = f"vminq_{kind}({v}, vdupq_n_{kind}({op.hi}))"
        if kind != "s8":
            v = f"vreinterpretq_s8_{kind}({v})"
        return f"neon_store({to}, {v}, {count});"


def results(step: Step) -> Results | None:
    """How a step's sums become results; None where its Rescale has none of these shapes."""
    kind = _KINDS.get(c_type(step.output.type.dtype))
    channels = step.output.type.shape[-1]
    if step.rescale is None:
        return Results(None, channels, "s32", ()) if kind == "s32" else None
    op = step.rescale.op
    assert isinstance(op, Rescale)
    if kind is None or kind == "s32" or len(op.accs) != 1:
        return None
    if abs(op.zero_point) > _LARGEST_ZERO and kind != "s16":
        return None
    values = step.rescale.inputs[1:]
    if any(v.type.shape != step.output.type.shape or v.type.dtype.bits > 8 for v in values):
        return None
    rows = (op.f, op.accs[0].multiplier, op.accs[0].pre_shift, *(v.multiplier for v in op.vals))
    if op.spatial and not all(map(_same, rows)):
        return None
    if kind == "s16" and values:
        return None
    return Results(op, channels, kind, tuple(values))
