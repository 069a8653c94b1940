"""Inputs whose values are integers times a step: pixels, 8-bit features. They are taken over without error."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qcompile.formats import Int
from qcompile.plan import Quantizer

# Fewer distinct values than this are no evidence of a lattice (a mask, a constant).
_EVIDENCE = 8
# A value is on the lattice within this much of itself: a few roundings to float32.
_TOLERANCE = 2.0**-21
# The smallest gap seen is at most this many steps.
_GAP_STEPS = 64


class Distinct:
    """The distinct values of a tensor, given up when there are more than `limit`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.values: NDArray[np.float32] | None = np.zeros(0, np.float32)

    def add(self, array: NDArray[np.float32]) -> None:
        """Take in the values of an array."""
        if self.values is not None:
            values = np.union1d(self.values, array.reshape(-1))
            self.values = values if len(values) <= self._limit else None

    def merge(self, other: Distinct) -> None:
        """Know what both knew."""
        if other.values is None:
            self.values = None
        else:
            self.add(other.values)


def lattice(distinct: Distinct, fmt: Int) -> Quantizer | None:
    """The quantizer that represents every value seen, or None where the values are on no such lattice."""
    if distinct.values is None or len(distinct.values) < min(_EVIDENCE, fmt.levels // 2):
        return None
    seen = distinct.values
    values = np.union1d(seen.astype(np.float64), 0.0)
    gaps = np.diff(values)
    narrowest = int(gaps.argmin())
    span, gap = float(values[-1] - values[0]), float(gaps[narrowest])
    # of float32 values, whose difference may be off by as much as their last place
    off = float(np.spacing(np.abs(values[narrowest : narrowest + 2]).max().astype(np.float32)))
    for steps in range(1, _GAP_STEPS + 1):
        if span * steps > (fmt.levels - 0.5) * (gap + off):
            return None
        if (scale := _float32_step(seen, _refined(values, gap / steps))) is not None:
            codes = np.rint(values / scale)
            return _placed(int(codes[0]), int(codes[-1]), scale, fmt)
    return None


def _refined(values: NDArray[np.float64], step: float) -> float:
    """The step fitted to ever larger values, so that its error never moves one to the next code."""
    size = np.abs(values)
    limit = 4.0 * step
    while True:
        near = values[size <= limit]
        codes = np.rint(near / step)
        if (weight := float(codes @ codes)) > 0.0:
            step = float(codes @ near) / weight
        if limit >= size.max():
            return step
        limit *= 2.0


def _float32_step(seen: NDArray[np.float32], step: float) -> float | None:
    """The float32 nearest to the step that reproduces most values, None where it does not fit all."""
    nearest = np.float32(step)
    best: tuple[int, float] | None = None
    for scale in (
        nearest,
        np.nextafter(nearest, np.float32(0)),
        np.nextafter(nearest, np.float32(np.inf)),
    ):
        if not 0 < scale < np.inf:
            continue
        made = np.rint(seen / scale) * scale
        if np.all(np.abs(made - seen) <= _TOLERANCE * np.abs(seen)):
            exact = int(np.count_nonzero(made == seen))
            if best is None or exact > best[0]:
                best = exact, float(scale)
    return None if best is None else best[1]


def _placed(first: int, last: int, scale: float, fmt: Int) -> Quantizer | None:
    """Codes first..last and 0 within the format: from its end if all of one sign, else with equal room around."""
    low, high = fmt.lo - first, fmt.hi - last
    if low > high:
        return None
    zero = low if first == 0 else high if last == 0 else (low + high) // 2
    return Quantizer(fmt, (scale,), (zero,))
