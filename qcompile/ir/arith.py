"""The arithmetic contract: the one home of integer rescaling, its choice of constants and its proofs.

A rescale works at `f` fractional bits and rounds once, half up:

    y = clamp(((T + (1 << (f - 1))) >> f) + z, lo, hi)
    T = sum_i (((acc_i << p_i) * m_i) >> 32) + sum_j (x_j - z_j) * n_j

`m_i` lies in [2**30, 2**31), so that every instruction set's high multiply computes the product; `f` lies in
1..30; `|acc_i << p_i| < 2**31` and `|T| + 2**(f-1) < 2**31` are proved where the constants are chosen
(`fit_rescale`), never checked at run time. With one accumulator this is TOSA's `apply_scale_32` with
single rounding and shift 32 + f - p.

Constants are chosen from exact fractions, so that they are the same on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T", int, Fraction)

ACC_LIMIT = 1 << 31
F_MIN, F_MAX = 1, 30


class NoRoom(ValueError):
    """No constants exist that keep every intermediate inside 32 bits at the needed precision."""


def value_error(bits: int) -> Fraction:
    """How far, in output steps, a value term may be off over its operand's range where the result has `bits` bits.

    2**-13 of the result's range: 1/32 step of 8 bits, 8 steps of 16, and never less than 1/32 step. A fixed fraction of
    a step would cost 16-bit results their bits: with an operand of 2**16 codes it leaves 32 bits no room for them.
    """
    return max(Fraction(1, 32), Fraction(2) ** (bits - 13))


def dyadic(scale: Fraction, bits: int) -> tuple[int, int]:
    """Return (m, e) with scale ~ m * 2**-32 * 2**-e, m in [2**30, 2**31) holding `bits` significant bits.

    The relative error is at most 2**-bits. Raises ValueError unless scale > 0.
    """
    if scale <= 0:
        raise ValueError("a scale is positive")
    k = exponent(scale)
    m = round_half_up(scale * Fraction(2) ** (bits - k))
    if m == 1 << bits:
        m, k = m >> 1, k + 1
    return m << (31 - bits), -k - 1


def round_half_up(x: Fraction) -> int:
    """The integer nearest to x; the larger one of two."""
    return (2 * x.numerator + x.denominator) // (2 * x.denominator)


def signed_digits(n: int) -> tuple[tuple[int, int], ...]:
    """The canonical signed digits of n, lowest first, as (position, sign): n = sum of sign * 2**position.

    No two are neighbours, and no other sum of powers of two with signs has fewer terms (Reitwiesner 1960).
    """
    found: list[tuple[int, int]] = []
    position = 0
    while n:
        if n & 1:
            sign = 2 - (n & 3)
            found.append((position, sign))
            n -= sign
        n >>= 1
        position += 1
    return tuple(found)


def nearest_digits(x: Fraction, digits: int) -> int:
    """The integer with at most `digits` signed digits that is nearest to x >= 0; the larger one of two.

    Taking the power of two nearest to what is left, digit by digit, reaches it.
    """
    found, rest = 0, x
    for _ in range(digits):
        if rest == 0:
            break
        power = 1
        # halfway from `power` to its double: up where that makes the sum larger
        while 2 * abs(rest) > 3 * power or (2 * rest == 3 * power):
            power *= 2
        if 2 * abs(rest) < 1 or 2 * rest == -1:
            break
        found += power if rest > 0 else -power
        rest = x - found
    return found


@dataclass(frozen=True, slots=True)
class Multipliers:
    """Which multipliers a rescale may have; without limits, any of its significant bits.

    `digits`: at most so many nonzero signed digits, so that a product is a sum of as many shifted copies; the nearest
    such number is off by at most 3 / (2 * 4**digits + 1) of the scale. `one_shift`: the multipliers of an accumulator
    are whole numbers of one unit for all channels, so that one shift serves them; a channel whose scale is 2**k
    times smaller than the largest has k bits fewer, and one always.
    """

    digits: int | None = None
    one_shift: bool = False

    def near(self, scales: Sequence[Fraction], bits: int) -> tuple[Fraction, ...]:
        """What stands for the scales of an operand's channels, the largest with `bits` significant bits."""
        if self == UNLIMITED:
            return tuple(scales)
        units = [Fraction(2) ** (exponent(s) - bits) for s in scales]
        if self.one_shift:
            units = [max(units)] * len(units)
        return tuple(max(1, self._whole(s / u)) * u for s, u in zip(scales, units, strict=True))

    def _whole(self, x: Fraction) -> int:
        return round_half_up(x) if self.digits is None else nearest_digits(x, self.digits)


UNLIMITED = Multipliers()


def exponent(scale: Fraction) -> int:
    """The k for which 2**(k - 1) <= scale < 2**k."""
    k = scale.numerator.bit_length() - scale.denominator.bit_length()
    return k + 1 if scale >= Fraction(2) ** k else k


@dataclass(frozen=True, slots=True)
class Acc:
    """How an int32 accumulator enters a rescale: (acc << pre_shift) * multiplier >> 32; one entry or one a channel."""

    multiplier: tuple[int, ...]
    pre_shift: tuple[int, ...] = (0,)


@dataclass(frozen=True, slots=True)
class Val:
    """How an 8- or 16-bit value enters a rescale: (x - zero_point) * multiplier, one entry or one per channel."""

    multiplier: tuple[int, ...]
    zero_point: int = 0


@dataclass(frozen=True, slots=True)
class AccOperand:
    """An accumulator to be rescaled: its real scale in output steps and its proved bound, per channel."""

    scale: tuple[Fraction, ...]
    bound: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ValOperand:
    """A quantized value to be rescaled: its real scale in output steps, zero point and range of codes."""

    scale: Fraction
    zero_point: int
    lo: int
    hi: int

    @property
    def reach(self) -> int:
        """The largest |x - zero_point|."""
        return max(self.hi - self.zero_point, self.zero_point - self.lo, 0)


@dataclass(frozen=True, slots=True)
class Fit:
    """Constants of a rescale and the largest relative error of its multipliers against their real scales."""

    accs: tuple[Acc, ...]
    vals: tuple[Val, ...]
    f: tuple[int, ...]
    multiplier_error: Fraction


def fit_rescale(
    accs: Sequence[AccOperand],
    vals: Sequence[ValOperand],
    *,
    bits: int,
    tolerance: Fraction = Fraction(1, 32),
    multipliers: Multipliers = UNLIMITED,
) -> Fit:
    """Choose multipliers, pre-shifts and `f` so that the contract above holds, at the largest `f` there is.

    `bits` is the number of significant bits of a multiplier, `tolerance` the error in output steps that a value term
    may have (see `value_error`) against the scale that `multipliers` allows in place of its own. Raises NoRoom where
    32 bits cannot hold it: the caller then rescales the accumulator to int16 first.
    """
    near = [multipliers.near(a.scale, bits) for a in accs]
    targets = [replace(v, scale=multipliers.near((v.scale,), bits)[0]) for v in vals]
    channels = max([len(a.scale) for a in accs] + [len(a.bound) for a in accs] + [1])
    rows = [
        _Channel.of(
            [(_at(s, c), _at(a.bound, c)) for s, a in zip(near, accs, strict=True)],
            targets,
            bits,
            tolerance,
        )
        for c in range(channels)
    ]
    # an accumulator alone has its own f for every channel, because its shift is 32 + f - p whatever f is
    together = multipliers.one_shift and len(accs) + len(vals) > 1
    fs = [_largest_f(rows)] * channels if together else [_largest_f([r]) for r in rows]
    columns = [r.constants(f) for r, f in zip(rows, fs, strict=True)]
    error = Fraction(0)
    for c, (ms, ns, f) in enumerate(columns):
        for a, (m, p) in zip(accs, ms, strict=True):
            real = _at(a.scale, c)
            error = max(error, abs(Fraction(m, 1 << 32) * Fraction(2) ** (p - f) - real) / real)
        for v, n in zip(vals, ns, strict=True):
            error = max(error, abs(Fraction(n, 1 << f) - v.scale) / v.scale)
    return Fit(
        tuple(
            Acc(_fold([col[0][i][0] for col in columns]), _fold([col[0][i][1] for col in columns]))
            for i in range(len(accs))
        ),
        tuple(Val(_fold([col[1][j] for col in columns]), v.zero_point) for j, v in enumerate(vals)),
        _fold([col[2] for col in columns]),
        error,
    )


def _at(row: tuple[T, ...], channel: int) -> T:
    return row[channel] if len(row) > 1 else row[0]


def _fold(row: Sequence[int]) -> tuple[int, ...]:
    """One entry where all channels agree."""
    return (row[0],) if len(set(row)) == 1 else tuple(row)


@dataclass(frozen=True, slots=True)
class _Channel:
    """The operands of one channel, accumulators as (m, e, bound), and between which limits its f lies."""

    accs: tuple[tuple[int, int, int], ...]
    vals: tuple[ValOperand, ...]
    lowest: int
    highest: int

    @staticmethod
    def of(
        accs: Sequence[tuple[Fraction, int]],
        vals: Sequence[ValOperand],
        bits: int,
        tolerance: Fraction,
    ) -> _Channel:
        parts: list[tuple[int, int, int]] = []
        lowest, highest = F_MIN, F_MAX
        for scale, bound in accs:
            m, e = dyadic(scale, bits)
            room = 0
            while (bound << (room + 1)) < ACC_LIMIT and room < 31:
                room += 1
            if bound >= ACC_LIMIT:
                raise NoRoom("the accumulator itself needs more than 32 bits")
            parts.append((m, e, bound))
            lowest, highest = max(lowest, e), min(highest, e + room)
        if not vals and len(parts) == 1:
            highest = min(highest, lowest)
        elif vals:
            lowest = max(lowest, *(_precise_f(v, tolerance) for v in vals))
            # beyond `bits` significant bits in the largest n nothing is gained and a multiplier grows
            widest = max(v.scale for v in vals)
            saturated = F_MAX
            while saturated > lowest and round_half_up(widest * 2**saturated) >= 1 << bits:
                saturated -= 1
            highest = min(highest, saturated)
        return _Channel(tuple(parts), tuple(vals), lowest, highest)

    def holds(self, f: int) -> bool:
        """Does the sum at f fractional bits stay inside 32 bits?"""
        reach = sum((((bound << (f - e)) * m) >> 32) + 1 for m, e, bound in self.accs)
        reach += sum(v.reach * round_half_up(v.scale * 2**f) for v in self.vals)
        return reach + (1 << (f - 1)) < ACC_LIMIT

    def constants(self, f: int) -> tuple[list[tuple[int, int]], list[int], int]:
        """[(m, pre_shift)], [n], f."""
        ms = [(m, f - e) for m, e, _ in self.accs]
        return ms, [round_half_up(v.scale * 2**f) for v in self.vals], f


def _largest_f(channels: Sequence[_Channel]) -> int:
    """The largest f that serves all of these channels."""
    lowest = max(c.lowest for c in channels)
    highest = min(c.highest for c in channels)
    for f in range(highest, lowest - 1, -1):
        if all(c.holds(f) for c in channels):
            return f
    raise NoRoom(f"no shift between {lowest} and {highest} keeps the sum inside 32 bits")


def _precise_f(v: ValOperand, tolerance: Fraction) -> int:
    """The smallest f at which rounding n moves no operand by more than `tolerance`."""
    f = F_MIN
    while v.reach * Fraction(1, 2 << f) > tolerance and f < F_MAX:
        if v.scale * 2**f == round_half_up(v.scale * 2**f):
            break
        f += 1
    return f


def rescale(
    accs: Sequence[tuple[Acc, NDArray[np.int32]]],
    vals: Sequence[tuple[Val, NDArray[np.generic]]],
    f: NDArray[np.int64],
    zero_point: int,
    lo: int,
    hi: int,
    shape: tuple[int, ...],
) -> NDArray[np.int64]:
    """The exact meaning of the contract; parameters of several entries are shaped by `shape` against the operands."""

    def row(entries: tuple[int, ...]) -> NDArray[np.int64]:
        a = np.array(entries, np.int64)
        return a if len(entries) == 1 else a.reshape(shape)

    total: NDArray[np.int64] = np.zeros((1,), np.int64)
    for a, x in accs:
        total = total + (((x.astype(np.int64) << row(a.pre_shift)) * row(a.multiplier)) >> 32)
    for v, y in vals:
        total = total + (y.astype(np.int64) - v.zero_point) * row(v.multiplier)
    rounded: NDArray[np.int64] = (total + (np.int64(1) << (f - 1))) >> f
    return np.minimum(np.maximum(rounded + zero_point, lo), hi)


def reciprocal(s: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return r ~ 2**61 / s for s in [2**30, 2**31), by Newton's iteration in integers; r in [2**30, 2**31].

    x <- x + x * (1 - s * x) with s as Q31 in [0.5, 1) and x as Q30 in (1, 2]; three steps from the minimax line
    48/17 - 32/17 * s leave an error below 2**-29 relative. Only multiplications and shifts.
    """
    x = LINE_CONSTANT - ((s * LINE_SLOPE) >> 31)
    for _ in range(NEWTON_STEPS):
        error = (np.int64(1) << 31) - ((s * x) >> 30)
        x = x + ((x * error) >> 31)
    return x


NEWTON_STEPS = 3
LINE_CONSTANT = np.int64(round_half_up(Fraction(48, 17) * 2**30))
LINE_SLOPE = np.int64(round_half_up(Fraction(32, 17) * 2**30))


def inverse_root(v: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (r, k) with r * 2**-(45 + k) ~ 1 / sqrt(v) for v in [1, 2**62); r in [2**29, 2**30), k in -15..15.

    v is s * 4**k with s in [2**30, 2**32), seen as Q32 in [1/4, 1). From the minimax line 273/128 - 39/32 * s, off by
    at most 11/128 relative, four steps x <- x * (3 - s * x**2) / 2 in Q29 leave an error below 2**-28 relative. Only
    multiplications and shifts, no product beyond 2**62.
    """
    k = np.searchsorted(_FOURS, v, side="right") - 15
    s = (v << (2 * np.maximum(-k, 0))) >> (2 * np.maximum(k, 0))
    x = ROOT_CONSTANT - ((s * ROOT_SLOPE) >> 32)
    for _ in range(ROOT_STEPS):
        square = (x * x) >> 29
        x = (x * (ROOT_THREE - ((s * square) >> 31))) >> 31
    return x, k


ROOT_BITS = 45
ROOT_STEPS = 4
ROOT_CONSTANT = np.int64(273 << 22)
ROOT_SLOPE = np.int64(39 << 24)
ROOT_THREE = np.int64(3 << 30)
_FOURS = np.array([1 << 2 * i for i in range(1, 31)], np.int64)
