"""The graph's Rescale as a datapath: products, one sum, one shift and a clamp, each of a proved width.

    T = sum_i ((acc_i * M_i) >> s_i) + sum_j x_j * N_j + offset
    y = clamp((T >> shift) + zero, lo, hi)

This is `qcompile.ir.arith`'s contract with the constants gathered: an accumulator's multiplier m = M << z loses its
zero low bits, so that ((acc << p) * m) >> 32 = (acc * M) >> (32 - p - z); the rounding constant, the zero points of the
values and constant operands are one offset. Where one accumulator is the only operand, its own shift moves behind the
sum, because floors nest: (((A >> s) + c) >> f) = (A + (c << s)) >> (s + f). A multiplier of 16 significant bits then
meets one multiplication and one rounding shift by 17 + f - p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qcompile.ir import Rescale

Words = NDArray[np.int64]
"""Elements of a stream; as the operands of a Requantize: [pixels, channels]."""

Row = tuple[int, ...]
"""One entry for all, or one for each channel (each pixel where the parameters are spatial)."""


def entry(row: Row, at: int) -> int:
    """What a row of parameters says at one channel or pixel."""
    return row[at] if len(row) > 1 else row[0]


def signed_bits(lo: int, hi: int) -> int:
    """The fewest bits of a two's complement number that hold lo..hi."""
    return max(hi.bit_length(), (~lo).bit_length() if lo < 0 else 0) + 1


@dataclass(frozen=True, slots=True)
class AccTerm:
    """(acc * multiplier) >> shift, rounded down: `acc` is signed and has `bits` bits, multipliers are positive."""

    multiplier: Row
    shift: Row
    bits: int

    @property
    def m_bits(self) -> int:
        """Bits of a multiplier, as an unsigned number."""
        return max(self.multiplier).bit_length()

    @property
    def product_bits(self) -> int:
        """Bits of a signed product."""
        return self.bits + self.m_bits


@dataclass(frozen=True, slots=True)
class ValTerm:
    """x * multiplier: `x` is the code of a stream of `bits` bits, multipliers have either sign."""

    multiplier: Row
    bits: int
    signed: bool

    @property
    def n_bits(self) -> int:
        """Bits of a multiplier, as a signed number."""
        return signed_bits(min(self.multiplier), max(self.multiplier))

    @property
    def product_bits(self) -> int:
        """Bits of a signed product."""
        return self.bits + int(not self.signed) + self.n_bits


@dataclass(frozen=True, slots=True)
class Operand:
    """What is proved of an operand: a bound of its magnitude (one or one a channel), its stream's bits and sign.

    `constant` holds the entries of an operand that is no stream.
    """

    bound: Row
    bits: int
    signed: bool = True
    constant: Row | None = None


@dataclass(frozen=True, slots=True)
class Requantize:
    """See the module; every partial sum of T, in any order, is a signed number of `t_bits` bits."""

    accs: tuple[AccTerm, ...]
    vals: tuple[ValTerm, ...]
    offset: Row
    shift: Row
    zero: int
    lo: int
    hi: int
    t_bits: int
    spatial: bool = False

    @property
    def uniform(self) -> bool:
        """Every shift is the same for all channels: wires, no shifter."""
        return all(len(r) == 1 for r in (self.shift, *(a.shift for a in self.accs)))

    @property
    def entries(self) -> int:
        """How many entries the longest row of parameters has."""
        rows = [self.offset, self.shift, *(r for a in self.accs for r in (a.multiplier, a.shift))]
        return max(map(len, [*rows, *(v.multiplier for v in self.vals)]))

    def levelled(self) -> Requantize:
        """The same function with wider multipliers and shifts that are uniform.

        A shift behind the sum of several terms stays as it is.
        """
        return replace(self, accs=tuple(map(_levelled, self.accs)))._level_sum()

    def _level_sum(self) -> Requantize:
        if len(self.shift) == 1 or self.vals or any(a.shift != (0,) for a in self.accs):
            return self
        top, n = max(self.shift), self.entries
        up = [top - entry(self.shift, c) for c in range(n)]
        accs = tuple(
            replace(a, multiplier=fold([entry(a.multiplier, c) << up[c] for c in range(n)]))
            for a in self.accs
        )
        offset = fold([entry(self.offset, c) << up[c] for c in range(n)])
        # T may grow by the most any channel is moved; |T >> shift| does not
        return replace(
            self, accs=accs, offset=offset, shift=(top,), t_bits=self.t_bits + max(up, default=0)
        )

    def run(self, accs: Sequence[Words], vals: Sequence[Words]) -> Words:
        """Compute exactly; operands are [pixels, channels]."""
        products = [a.product_bits for a in self.accs] + [v.product_bits for v in self.vals]
        # a pre-shifted product may need more than 64 bits where Python's own integers do not mind
        kind = np.dtype(object if max([self.t_bits, *products]) > 63 else np.int64)

        def row(entries: Row) -> Words:
            r: Words = np.array(entries, kind)
            return r.reshape(-1, 1) if self.spatial else r

        total = row(self.offset)
        for a, x in zip(self.accs, accs, strict=True):
            product: Words = x.astype(kind) * row(a.multiplier)
            total = total + (product >> row(a.shift))
        for v, x in zip(self.vals, vals, strict=True):
            product = x.astype(kind) * row(v.multiplier)
            total = total + product
        moved: Words = (total >> row(self.shift)) + self.zero
        words: Words = np.minimum(np.maximum(moved, self.lo), self.hi).astype(np.int64)
        return words

    @staticmethod
    def of(op: Rescale, operands: Sequence[Operand]) -> Requantize:
        """The datapath of a Rescale; operands as in its node, constants among the values only."""
        accs, vals = operands[: len(op.accs)], operands[len(op.accs) :]
        rows = [op.f, *(r for a in op.accs for r in (a.multiplier, a.pre_shift))]
        rows += [v.multiplier for v in op.vals]
        if not op.spatial:
            rows += [o.constant for o in vals if o.constant is not None]
            rows += [o.bound for o in accs]
        n = max(map(len, rows))
        # entries over positions are not entries over channels, even where there are as many
        bounds = [(max(o.bound),) if op.spatial else o.bound for o in accs]

        offset = [1 << (entry(op.f, c) - 1) for c in range(n)]
        for v, o in zip(op.vals, vals, strict=True):
            for c in range(n):
                code = 0 if o.constant is None else entry(o.constant, c)
                offset[c] += (code - v.zero_point) * entry(v.multiplier, c)

        terms: list[tuple[list[int], list[int]]] = []
        for a in op.accs:
            spare = min((m & -m).bit_length() - 1 for m in a.multiplier)
            shift = [32 - entry(a.pre_shift, c) - spare for c in range(n)]
            terms.append(
                (
                    [(entry(a.multiplier, c) >> spare) << max(0, -shift[c]) for c in range(n)],
                    [max(0, s) for s in shift],
                )
            )
        streamed = [(v, o) for v, o in zip(op.vals, vals, strict=True) if o.constant is None]
        last = [entry(op.f, c) for c in range(n)]
        if len(terms) == 1 and not streamed:
            ((ms, shift),) = terms
            offset = [o << s for o, s in zip(offset, shift, strict=True)]
            last = [f + s for f, s in zip(last, shift, strict=True)]
            terms = [(ms, [0] * n)]
        reach = [abs(o) for o in offset]
        for (ms, shift), bound in zip(terms, bounds, strict=True):
            for c in range(n):
                reach[c] += ((entry(bound, c) * ms[c]) >> shift[c]) + 1
        for v, o in streamed:
            for c in range(n):
                reach[c] += abs(entry(v.multiplier, c)) * max(o.bound)
        return Requantize(
            tuple(
                AccTerm(fold(ms), fold(shift), o.bits)
                for (ms, shift), o in zip(terms, accs, strict=True)
            ),
            tuple(ValTerm(v.multiplier, o.bits, o.signed) for v, o in streamed),
            fold(offset),
            fold(last),
            op.zero_point,
            op.lo,
            op.hi,
            max(reach).bit_length() + 1,
            op.spatial,
        )


def _levelled(a: AccTerm) -> AccTerm:
    if len(a.shift) == 1:
        return a
    top, n = max(a.shift), max(len(a.shift), len(a.multiplier))
    ms = [entry(a.multiplier, c) << (top - entry(a.shift, c)) for c in range(n)]
    return replace(a, multiplier=fold(ms), shift=(top,))


def fold(row: Sequence[int]) -> Row:
    """One entry where all agree."""
    return (row[0],) if len(set(row)) == 1 else tuple(row)
