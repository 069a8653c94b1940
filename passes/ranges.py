"""The range of a quantizer, chosen from the statistics of its tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from qcompile.formats import Int
from qcompile.plan import affine

from .histogram import Statistics

Method = Literal["minmax", "moving-average", "percentile", "entropy", "mse"]
METHODS: tuple[Method, ...] = get_args(Method)
HISTOGRAM_METHODS = frozenset({"percentile", "entropy", "mse"})

Range = tuple[float, float]
Floats = NDArray[np.float64]


def choose(statistics: Statistics, method: Method, fmt: Int, percentile: float) -> Range:
    """The range that `method` finds best; never wider than what was seen.

    moving-average: mean over the samples of their minima and maxima. percentile: as many elements are cut
    off at either end. entropy: least Kullback-Leibler divergence (Migacz 2017). mse: least squared error.
    """
    lo, hi = statistics.lo, statistics.hi
    match method:
        case "minmax":
            return lo, hi
        case "moving-average":
            return statistics.mean_extremes
        case "percentile":
            return _percentile(statistics, (100.0 - percentile) / 200.0)
        case "entropy":
            return _search(_divergence(statistics, fmt), min(lo, 0.0), max(hi, 0.0))
        case "mse":
            return _search(_squared_error(statistics, fmt), min(lo, 0.0), max(hi, 0.0))


def _pieces(statistics: Statistics) -> tuple[Floats, Floats, Floats, float]:
    if statistics.histogram is None:
        raise ValueError("this method needs a histogram")
    left, right, counts = statistics.histogram.pieces(statistics.lo, statistics.hi)
    return left, right, counts, float(statistics.histogram.zeros)


def _percentile(statistics: Statistics, cut: float) -> Range:
    left, right, counts, zeros = _pieces(statistics)
    place = int(np.searchsorted(left, 0.0))
    left, right, counts = (
        np.insert(a, place, x) for a, x in ((left, 0.0), (right, 0.0), (counts, zeros))
    )
    total = counts.sum()

    def quantile(q: float) -> float:
        upto = np.cumsum(counts)
        bin_ = min(int(np.searchsorted(upto, q * total)), len(counts) - 1)
        inside = 1.0 - (upto[bin_] - q * total) / max(counts[bin_], 1.0)
        return float((1.0 - inside) * left[bin_] + inside * right[bin_])

    lo, hi = quantile(cut), quantile(1.0 - cut)
    return max(lo, statistics.lo), min(hi, statistics.hi)


def _squared_error(statistics: Statistics, fmt: Int) -> Callable[[float, float], float]:
    """The squared error of a range: values spread evenly within a bin, exact zeros without error."""
    left, right, counts, _ = _pieces(statistics)
    # The sum over bins of density * (I(right) - I(left)), I being the integral of the squared error,
    # is summed by parts: I is needed once at each end of a bin, times the jump of the density there.
    least = 1e-9 * max(statistics.hi, -statistics.lo)
    right = np.maximum(right, left + least)
    density = counts / (right - left)
    ends, place = np.unique(np.concatenate([left, right]), return_inverse=True)
    jump = np.bincount(place, np.concatenate([-density, density]))
    ends, jump = ends[jump != 0], jump[jump != 0]

    def cost(lo: float, hi: float) -> float:
        quantizer = affine(lo, hi, fmt)
        scale, zero = quantizer.scale[0], quantizer.zero_point[0]
        steps = ends / scale
        codes = np.rint(steps)
        np.clip(codes, fmt.lo - zero, fmt.hi - zero, out=codes)
        steps -= codes
        integral = codes / 12.0 + steps * steps * steps / 3.0
        return float(jump @ integral) * scale**3

    return cost


def _divergence(statistics: Statistics, fmt: Int) -> Callable[[float, float], float]:
    """The divergence of the clipped from the quantized distribution, exact zeros left out of both.

    What is clipped counts in the outermost bin inside; a range with fewer bins in use than codes says nothing.
    """
    left, right, counts, _ = _pieces(statistics)
    middle = 0.5 * (left + right)

    def cost(lo: float, hi: float) -> float:
        inside = np.flatnonzero((middle >= lo) & (middle <= hi))
        full = len(inside) == len(middle)
        if not len(inside) or (not full and len(inside) < fmt.levels):
            return math.inf
        quantizer = affine(lo, hi, fmt)
        kept = counts[inside]
        code = np.rint(middle[inside] / quantizer.scale[0]).astype(np.int64)
        code -= code.min()
        spread = (np.bincount(code, kept) / np.maximum(np.bincount(code), 1))[code]
        clipped = kept.copy()
        clipped[0] += counts[: inside[0]].sum()
        clipped[-1] += counts[inside[-1] + 1 :].sum()
        p, q = clipped / clipped.sum(), spread / spread.sum()
        return float(p @ np.log(p / q))

    return cost


def _search(cost: Callable[[float, float], float], lo: float, hi: float) -> Range:
    """The range within [lo, hi] of least cost: both ends together, then each in turn, coarse then fine."""
    best, least = (lo, hi), cost(lo, hi)

    def sweep(fractions: list[float], ends: tuple[bool, bool]) -> bool:
        nonlocal best, least
        start, before = best, least
        for f in fractions:
            tried = (
                max(lo, start[0] * (f if ends[0] else 1.0)),
                min(hi, start[1] * (f if ends[1] else 1.0)),
            )
            if (c := cost(*tried)) < least:
                best, least = tried, c
        return least < before

    coarse = [2.0 ** (-k / 4) for k in range(1, 41)]
    fine = [2.0 ** (k / 64) for k in range(-20, 21) if k]
    sides = [ends for ends, x in (((True, False), lo), ((False, True), hi)) if x]
    if len(sides) == 2:
        sweep(coarse, (True, True))
        coarse = [1.0 / f for f in coarse[:16]] + coarse
    for fractions in (coarse, fine):
        for _ in range(8):
            if not any([sweep(fractions, ends) for ends in sides]):
                break
    return best
