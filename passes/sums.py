"""How a sum is brought into 32 bits: as one Rescale, or with its accumulators rounded to int16 first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from qcompile.formats import Int
from qcompile.ir.arith import (
    UNLIMITED,
    AccOperand,
    Fit,
    Multipliers,
    NoRoom,
    ValOperand,
    fit_rescale,
    value_error,
)

FINEST = 14
"""An accumulator goes through int16 in steps of at least 2**-14 output steps."""


@dataclass(frozen=True, slots=True)
class Narrowed:
    """An accumulator rescaled to int16 by `fit`; `operand` is what then enters the sum."""

    fit: Fit
    operand: ValOperand


@dataclass(frozen=True, slots=True)
class Settled:
    """Constants of a sum whose last accumulators are narrowed, the very last one first, and follow the values."""

    fit: Fit
    narrowed: tuple[Narrowed, ...] = ()


def settle(
    accs: Sequence[AccOperand],
    vals: Sequence[ValOperand],
    fmt: Int,
    multipliers: Multipliers = UNLIMITED,
) -> Settled:
    """Constants for a sum in steps of its result, whose format is `fmt`; NoRoom where 32 bits hold none."""
    bits, off = 16 if fmt.bits <= 8 else 24, value_error(fmt.bits)
    accs, vals, narrowed = list(accs), list(vals), list[Narrowed]()
    while True:
        try:
            fit = fit_rescale(accs, vals, bits=bits, tolerance=off, multipliers=multipliers)
        except NoRoom:
            if not accs or len(accs) + len(vals) == 1:
                raise
            last = accs.pop()
            rest = sum(map(reach, accs), Fraction(0)) + sum(v.reach * v.scale for v in vals)
            narrowed.append(_narrow(last, fmt.levels + rest, multipliers))
            vals.append(narrowed[-1].operand)
        else:
            return Settled(fit, tuple(narrowed))


def reach(a: AccOperand) -> Fraction:
    """How many steps an accumulator can amount to."""
    bounds = a.bound * (len(a.scale) if len(a.bound) == 1 else 1)
    scales = a.scale * (len(a.bound) if len(a.scale) == 1 else 1)
    return max(b * s for b, s in zip(bounds, scales, strict=True))


def _narrow(a: AccOperand, span: Fraction, multipliers: Multipliers) -> Narrowed:
    """At the finest power-of-two step at which saturating loses no result.

    Beyond `span`, what the rest of the sum can still bring back into the range of the result, nothing is told apart.
    """
    span, k = min(reach(a), span), FINEST
    while span * Fraction(2) ** k > 32767:
        k -= 1
    fine = replace(a, scale=tuple(s * Fraction(2) ** k for s in a.scale))
    fit = fit_rescale([fine], [], bits=24, multipliers=multipliers)
    return Narrowed(fit, ValOperand(Fraction(2) ** -k, 0, -32768, 32767))
