"""The graph's Rescale as a datapath: products, one sum, one shift and a clamp, each of a proved width.

    T = sum_i ((acc_i * M_i) >> s_i) + sum_j x_j * N_j + offset
    y = clamp((T >> shift) + zero, lo, hi)

This is `qcompile.ir.arith`'s contract with the constants gathered: an accumulator's multiplier m = M << z loses its
zero low bits, channel by channel, so that ((acc << p) * m) >> 32 = (acc * M) >> (32 - p - z); the rounding constant,
the zero points of the values and constant operands are one offset. Where one accumulator is the only operand, its own
shift moves behind the sum, because floors nest: (((A >> s) + c) >> f) = (A + (c << s)) >> (s + f). A multiplier of 16
significant bits then meets one multiplication and one rounding shift by 17 + f - p, the same for all channels where
multipliers of UNIFORM_BITS allow that. Powers of two are left with multiplier 1 and a shift; multipliers of few signed
digits are no products at all but sums of shifted copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qcompile.ir import Rescale
from qcompile.ir.arith import Acc, signed_digits

Words = NDArray[np.int64]
"""Elements of a stream; as the operands of a Requantize: [pixels, channels]."""

Row = tuple[int, ...]
"""One entry for all, or one for each channel (each pixel where the parameters are spatial)."""


UNIFORM_BITS = 17
"""Channels share a shift where no multiplier then has more bits: with a sign, one port of any DSP block."""

MOST_COPIES = 3
"""A multiplier of more signed digits is multiplied by."""


def entry(row: Row, at: int) -> int:
    """What a row of parameters says at one channel or pixel."""
    return row[at] if len(row) > 1 else row[0]


def signed_bits(lo: int, hi: int) -> int:
    """The fewest bits of a two's complement number that hold lo..hi."""
    return max(hi.bit_length(), (~lo).bit_length() if lo < 0 else 0) + 1


@dataclass(frozen=True, slots=True)
class Copy:
    """One digit of a row of multipliers: sign * (x << position), where sign is 1, -1 or, without such a digit, 0."""

    position: Row
    sign: Row


def _copies(multiplier: Row) -> tuple[Copy, ...]:
    """A row of multipliers as sums of shifted copies, the lowest digit first; none where that takes too many."""
    digits = [signed_digits(m) for m in multiplier]
    count = max(map(len, digits))
    if count > MOST_COPIES:
        return ()
    filled = [d + ((0, 0),) * (count - len(d)) for d in digits]
    return tuple(
        Copy(fold([d[k][0] for d in filled]), fold([d[k][1] for d in filled])) for k in range(count)
    )


@dataclass(frozen=True, slots=True)
class AccTerm:
    """(acc * multiplier) >> shift, rounded down: `acc` is signed and has `bits` bits, multipliers are positive."""

    multiplier: Row
    shift: Row
    bits: int

    @property
    def copies(self) -> tuple[Copy, ...]:
        """What is added up in place of a product; empty where there is a product."""
        return _copies(self.multiplier)

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
    def copies(self) -> tuple[Copy, ...]:
        """What is added up in place of a product; empty where there is a product."""
        return _copies(self.multiplier)

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
    def entries(self) -> int:
        """How many entries the longest row of parameters has."""
        rows = [self.offset, self.shift, *(r for a in self.accs for r in (a.multiplier, a.shift))]
        return max(map(len, [*rows, *(v.multiplier for v in self.vals)]))

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

        streamed = [(v, o) for v, o in zip(op.vals, vals, strict=True) if o.constant is None]
        last = [entry(op.f, c) for c in range(n)]
        terms: list[tuple[list[int], list[int]]] = []
        for a in op.accs:
            ms, shift = _stripped(a, n)
            if len(op.accs) == 1 and not streamed:
                offset = [o << s for o, s in zip(offset, shift, strict=True)]
                last = [f + s for f, s in zip(last, shift, strict=True)]
                # (A << k) + o >> k + s = A + (o >> k) >> s: what was moved left goes back
                back = [min(_zeros(m), s) for m, s in zip(ms, last, strict=True)]
                ms = [m >> k for m, k in zip(ms, back, strict=True)]
                offset = [o >> k for o, k in zip(offset, back, strict=True)]
                last = [s - k for s, k in zip(last, back, strict=True)]
                up = _up(ms, last)
                offset = [o << u for o, u in zip(offset, up, strict=True)]
                last = [s + u for s, u in zip(last, up, strict=True)]
                shift = [0] * n
            else:
                up = _up(ms, shift)
                shift = [s + u for s, u in zip(shift, up, strict=True)]
            terms.append(([m << u for m, u in zip(ms, up, strict=True)], shift))
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


def _stripped(a: Acc, channels: int) -> tuple[list[int], list[int]]:
    """Multipliers without their zero low bits, and the shifts that they leave."""
    ms, shifts = [], []
    for c in range(channels):
        m = entry(a.multiplier, c)
        zeros = _zeros(m)
        shift = 32 - entry(a.pre_shift, c) - zeros
        ms.append((m >> zeros) << max(0, -shift))
        shifts.append(max(0, shift))
    return ms, shifts


def _zeros(m: int) -> int:
    """Zero low bits."""
    return (m & -m).bit_length() - 1


def _up(multipliers: Sequence[int], shifts: Sequence[int]) -> list[int]:
    """By how much each channel moves left so that one shift serves all; nowhere if that makes multipliers too wide.

    Powers of two stay 1: nothing is left to multiply by.
    """
    up = [max(shifts) - s for s in shifts]
    wide = max(m.bit_length() + u for m, u in zip(multipliers, up, strict=True))
    free = max(UNIFORM_BITS, *(m.bit_length() for m in multipliers))
    if wide > free or all(m == 1 for m in multipliers):
        return [0] * len(up)
    return up


def fold(row: Sequence[int]) -> Row:
    """One entry where all agree."""
    return (row[0],) if len(set(row)) == 1 else tuple(row)
