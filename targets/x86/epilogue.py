"""From sums in registers to stored results: a Rescale, or nothing, on vectors of channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qcompile.ir import Rescale, Value

from ..c.kernel import Layer, Step
from ..c.text import affine, at, c_int
from .isa import Isa

_INT32 = (-(1 << 31), (1 << 31) - 1)
_MOST_ZERO = {1: 255, 2: 1 << 29, 4: 1 << 30}
"""Zero points that the stores of results of so many bytes take."""


def fits(step: Step) -> bool:
    """Are the parameters one number or one a channel, all operands of the result's shape, the sums used once?"""
    if step.rescale is None:
        return True
    op, out = step.rescale.op, step.output.type
    assert isinstance(op, Rescale)
    same = all(v.type.shape == out.shape and v.const is None for v in step.terms)
    once = sum(v is step.node.output for v in step.rescale.inputs) == 1
    return not op.spatial and same and once and abs(op.zero_point) <= _MOST_ZERO[out.dtype.bytes]


@dataclass(frozen=True)
class Epilogue:
    """Renders what follows the sums of a step; parameters of a group of channels are filled up to whole vectors."""

    layer: Layer
    isa: Isa
    groups: int = 1

    def render(
        self, sums: Sequence[Sequence[str]], offsets: Sequence[int], index: str, count: int
    ) -> str:
        """C that stores sums[pixel][vector], vectors of the channels from `index` of the parameters on.

        The first `count` channels are stored, `offsets[pixel]` elements behind `y + at`.
        """
        lines: list[str] = []
        vectors = range(len(sums[0]))
        counts = [min(self.isa.lanes, count - v * self.isa.lanes) for v in vectors]
        for v in vectors:
            lines += self._rescaled(
                [(row[v], offset + v * self.isa.lanes) for row, offset in zip(sums, offsets, strict=True)],
                affine([(index, 1)], v * self.isa.lanes),
                str(v),
                counts[v],
            )  # fmt: skip
        for row, offset in zip(sums, offsets, strict=True):
            lines += self._stores(row, offset, counts)
        return "\n".join(lines)

    def _row(self, role: str, entries: Sequence[int], index: str, kind: str = "i4") -> str:
        """A parameter of the lanes at `index`."""
        if len(set(entries)) == 1:
            return f"splat({c_int(entries[0])})"
        rows = np.array(entries, np.int64).reshape(self.groups, -1)
        more = -rows.shape[1] % self.isa.lanes
        filled = np.pad(rows, ((0, 0), (0, more)), mode="edge").astype(kind)
        return f"load({at(self.layer.constant(role, filled.ravel()), index)})"

    def _rescaled(
        self, sums: Sequence[tuple[str, int]], index: str, name: str, count: int
    ) -> list[str]:
        """Statements that turn (variable, offset) of a vector of some pixels into results without zero point."""
        step = self.layer.step
        if step.rescale is None:
            return []
        op = step.rescale.op
        assert isinstance(op, Rescale)
        lines: list[str] = []
        terms: list[tuple[Value, str]] = []
        for i, (acc, v) in enumerate(zip(op.accs, step.rescale.inputs, strict=False)):
            more = str(i or "")
            term = "{}"
            if any(acc.pre_shift):
                lines.append(
                    f"const vec places{more}_{name} = {self._row('pre_shift' + more, acc.pre_shift, index)};"
                )
                term = f"shift_left_each({term}, places{more}_{name})"
            lines.append(
                f"const vec m{more}_{name} = {self._row('multiplier' + more, acc.multiplier, index)};"
            )
            terms.append((v, f"high_multiply_each({term}, m{more}_{name})"))
        added: list[int] = []
        for i, (val, v) in enumerate(
            zip(op.vals, step.rescale.inputs[len(op.accs) :], strict=True)
        ):
            lines.append(
                f"const vec n{i or ''}_{name} = {self._row('factor' + str(i or ''), val.multiplier, index)};"
            )
            terms.append((v, f"multiply({{}}, n{i or ''}_{name})"))
            if val.zero_point:
                added = _sum(added, [_wrap(-val.zero_point * n) for n in val.multiplier])
        if added:
            lines.append(f"const vec added_{name} = {self._row('added', added, index)};")
        if len(set(op.f)) > 1:
            lines.append(f"const vec f_{name} = {self._row('fraction', op.f, index)};")
        for variable, offset in sums:
            parts = [
                term.format(variable if v is step.node.output else self._load(v, offset, count))
                for v, term in terms
            ]
            if added:
                parts.append(f"added_{name}")
            total = parts[0]
            for part in parts[1:]:
                total = f"add({total}, {part})"
            shifted = (
                f"round_shift_all({total}, {op.f[0]})"
                if len(set(op.f)) == 1
                else f"round_shift_each({total}, f_{name})"
            )
            lines.append(f"{variable} = {shifted};")
        return lines

    def _load(self, value: Value, offset: int, count: int) -> str:
        kind = value.type.dtype
        place = at(self.layer[value], affine([("at", 1)], offset))
        return f"load_{'i' if kind.signed else 'u'}{kind.bytes * 8}({place}, {count})"

    def _stores(self, row: Sequence[str], offset: int, counts: Sequence[int]) -> list[str]:
        """Statements that store one pixel."""
        step, lanes = self.layer.step, self.isa.lanes
        op = step.rescale.op if step.rescale is not None else None
        assert op is None or isinstance(op, Rescale)
        zero, lo, hi = (op.zero_point, op.lo, op.hi) if op is not None else (0, *_INT32)
        kind = step.output.type.dtype
        suffix = f"{'i' if kind.signed else 'u'}{kind.bytes * 8}"
        bounds = f"{zero}, {c_int(lo)}, {c_int(hi)}"
        lines, first = [], 0
        while first < len(row):
            left = len(row) - first
            size = next(n for n in (4, 2, 1) if n <= left) if kind.bytes == 1 else 1
            place = at("y", affine([("at", 1)], offset + first * lanes))
            stored = sum(counts[first : first + size])
            lines.append(
                f"store{size}_{suffix}({place}, {stored}, {', '.join(row[first : first + size])}, {bounds});"
            )
            first += size
        return lines


def _wrap(n: int) -> int:
    """As int32 arithmetic has it."""
    return (n + (1 << 31)) % (1 << 32) - (1 << 31)


def _sum(a: list[int], b: list[int]) -> list[int]:
    if not a:
        return b
    width = max(len(a), len(b))
    return [_wrap(x + y) for x, y in zip(a * (width // len(a)), b * (width // len(b)), strict=True)]
