"""Statistics of a tensor that merge exactly: any order and any split of the samples gives the same."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

# Every finite float32 is a whole number of these.
_UNITS_PER_ONE = 1 << 149
# Below this width (2**e) float32 arithmetic on the values would round.
_LEAST_EXPONENT = -120
# Values counted at a time: the intermediate arrays stay in the cache.
_PIECE = 1 << 16


@dataclass(slots=True, eq=False)
class Histogram:
    """Counts in bins of width 2**exponent, `bins` on each side of zero; exact zeros are also counted apart.

    The width is the least that covers the extremes seen. It grows by doubling: as zero is an edge, bins merge
    in pairs, and the counts are those that the final width would have given from the start.
    """

    bins: int = 2048
    exponent: int = _LEAST_EXPONENT
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    zeros: int = 0

    def __post_init__(self) -> None:
        if self.bins < 2 or self.bins & (self.bins - 1):
            raise ValueError(f"a histogram has a power of two of bins, not {self.bins}")
        if not self.counts.size:
            self.counts = np.zeros(2 * self.bins, np.int64)

    @property
    def width(self) -> float:
        """The width of a bin."""
        return 2.0**self.exponent

    def cover(self, lo: float, hi: float) -> None:
        """Widen the bins until they hold [lo, hi]."""
        while hi >= self.bins * self.width or lo < -self.bins * self.width:
            self._widen(max(1, self._missing(lo, hi)))

    def add(self, values: NDArray[np.float32]) -> None:
        """Count values that lie within what is covered."""
        per_bin = np.float32(2.0**-self.exponent)
        scaled = np.empty(min(_PIECE, values.size), np.float32)
        index = np.empty(scaled.shape, np.int32)
        for start in range(0, values.size, _PIECE):
            piece = values[start : start + _PIECE]
            scaled, index = scaled[: piece.size], index[: piece.size]
            # A power of two scales without rounding, and floor is exact: so is the bin.
            np.multiply(piece, per_bin, out=scaled)
            np.floor(scaled, out=scaled)
            np.copyto(index, scaled, casting="unsafe")
            if self.exponent > 0:
                # The tiniest negative values vanish when scaled down; they belong below zero.
                index -= (scaled == 0) & (piece < 0)
            index += self.bins
            self.counts += np.bincount(index, minlength=2 * self.bins)
            self.zeros += int(np.count_nonzero(piece == 0))

    def merge(self, other: Histogram) -> None:
        """Hold what both held."""
        if self.bins != other.bins:
            raise ValueError(f"histograms of {self.bins} and {other.bins} bins do not merge")
        counts = other.counts
        if other.exponent > self.exponent:
            self._widen(other.exponent - self.exponent)
        elif other.exponent < self.exponent:
            counts = _pairwise(counts, self.exponent - other.exponent)
        self.counts = self.counts + counts
        self.zeros += other.zeros

    def pieces(
        self, lo: float, hi: float
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """The left and right ends of the bins in use, within [lo, hi], and their counts without exact zeros."""
        counts = self.counts.astype(np.float64)
        counts[self.bins] -= self.zeros
        used = np.flatnonzero(counts)
        left = (used - self.bins) * self.width
        return np.maximum(left, lo), np.minimum(left + self.width, hi), counts[used]

    def _missing(self, lo: float, hi: float) -> int:
        """How many doublings the magnitude asks for, give or take one at a power of two."""
        return math.frexp(max(hi, -lo))[1] - 1 - self.exponent - (self.bins.bit_length() - 1)

    def _widen(self, doublings: int) -> None:
        self.counts = _pairwise(self.counts, doublings)
        self.exponent += doublings


def _pairwise(counts: NDArray[np.int64], doublings: int) -> NDArray[np.int64]:
    """The counts at a bin width `doublings` powers of two larger."""
    half = counts.size // 2
    doublings = min(doublings, half.bit_length() - 1)
    merged = counts.reshape(-1, 1 << doublings).sum(axis=1)
    wide = np.zeros_like(counts)
    wide[half - merged.size // 2 : half + merged.size // 2] = merged
    return wide


class NotFinite(ValueError):
    """A sample, the `row`-th of those added, holds NaN or Inf."""

    def __init__(self, row: int) -> None:
        super().__init__(f"row {row} is not finite")
        self.row = row


@dataclass(slots=True, eq=False)
class Statistics:
    """What calibration knows of a tensor: exact extremes over all elements, and a histogram where one is wanted.

    `lo_units` and `hi_units` are exact sums of the per-sample minima and maxima, in units of 2**-149.
    """

    histogram: Histogram | None = None
    lo: float = math.inf
    hi: float = -math.inf
    samples: int = 0
    elements: int = 0
    lo_units: int = 0
    hi_units: int = 0

    def add(self, rows: NDArray[np.float32], phase: int = 0, stride: int = 1) -> None:
        """Take in samples, one a row; the histogram counts every `stride`-th element from `phase` on."""
        if not rows.size:
            raise ValueError("statistics of nothing")
        los, his = rows.min(axis=1), rows.max(axis=1)
        if not (finite := np.isfinite(los) & np.isfinite(his)).all():
            raise NotFinite(int(finite.argmin()))
        self.lo, self.hi = min(self.lo, float(los.min())), max(self.hi, float(his.max()))
        self.samples += len(rows)
        self.elements += rows.size
        self.lo_units += sum(map(_units, los.tolist()))
        self.hi_units += sum(map(_units, his.tolist()))
        if self.histogram is not None:
            self.histogram.cover(self.lo, self.hi)
            counted = rows if stride == 1 else rows[:, phase::stride]
            self.histogram.add(np.ascontiguousarray(counted).reshape(-1))

    def merge(self, other: Statistics) -> None:
        """Know what both knew."""
        self.lo, self.hi = min(self.lo, other.lo), max(self.hi, other.hi)
        self.samples += other.samples
        self.elements += other.elements
        self.lo_units += other.lo_units
        self.hi_units += other.hi_units
        if self.histogram is not None and other.histogram is not None:
            self.histogram.merge(other.histogram)

    @property
    def mean_extremes(self) -> tuple[float, float]:
        """The means over the samples of their minima and of their maxima."""
        whole = self.samples * _UNITS_PER_ONE
        return float(Fraction(self.lo_units, whole)), float(Fraction(self.hi_units, whole))


def _units(x: float) -> int:
    numerator, denominator = x.as_integer_ratio()
    return numerator * (_UNITS_PER_ONE // denominator)
