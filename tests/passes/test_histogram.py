from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import entropy

from qcompile.formats import Int
from qcompile.passes.histogram import Histogram, NotFinite, Statistics
from qcompile.passes.ranges import choose
from qcompile.plan import Quantizer, affine

Rows = NDArray[np.float32]
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
SAMPLES = st.lists(st.lists(FLOATS, min_size=3, max_size=3), min_size=1, max_size=8)
MIXED = st.one_of(SAMPLES, st.lists(st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.0, -2.0, 3.5, 1e-3]),
                  min_size=3, max_size=3), min_size=1, max_size=8))  # fmt: skip


def collected(rows: Rows, bins: int = 8) -> Statistics:
    statistics = Statistics(Histogram(bins))
    statistics.add(rows)
    return statistics


def state(s: Statistics) -> tuple[object, ...]:
    assert s.histogram is not None
    h = s.histogram
    known = (s.lo, s.hi, s.samples, s.elements, s.lo_units, s.hi_units)
    return (*known, h.bins, h.exponent, h.zeros, h.counts.tolist())


@settings(deadline=None, derandomize=True, max_examples=200)
@given(MIXED, st.data())
def test_any_split_in_any_order_merges_to_the_whole(
    samples: list[list[float]], data: st.DataObject
) -> None:
    rows = np.array(samples, np.float32)
    whole = state(collected(rows))
    order = data.draw(st.permutations(range(len(rows))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=4)))
    merged = Statistics(Histogram(8))
    for part in np.split(rows[list(order)], cuts):
        if len(part):
            shard = Statistics(Histogram(8))
            for row in part:
                shard.add(row[np.newaxis])
            merged.merge(shard)
    assert state(merged) == whole


@settings(deadline=None, derandomize=True, max_examples=200)
@given(MIXED)
def test_counts_are_those_of_exact_arithmetic_at_the_least_width(
    samples: list[list[float]],
) -> None:
    rows = np.array(samples, np.float32)
    s = collected(rows)
    assert s.histogram is not None
    values = [Fraction(float(x)) for x in rows.ravel()]
    width = Fraction(2) ** s.histogram.exponent

    def fits(width: Fraction) -> bool:
        return all(-8 <= math.floor(v / width) < 8 for v in values)

    assert fits(width)
    assert s.histogram.exponent == -120 or not fits(width / 2)
    counts = [0] * 16
    for v in values:
        counts[math.floor(v / width) + 8] += 1
    assert s.histogram.counts.tolist() == counts
    assert s.histogram.zeros == sum(v == 0 for v in values)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(SAMPLES)
def test_extremes_and_their_means_are_exact(samples: list[list[float]]) -> None:
    rows = np.array(samples, np.float32)
    s = collected(rows)
    assert (s.lo, s.hi) == (rows.min(), rows.max())
    for mean, ends in zip(s.mean_extremes, (rows.min(axis=1), rows.max(axis=1)), strict=True):
        assert mean == float(sum(map(Fraction, ends.tolist())) / len(rows))


def test_the_histogram_counts_every_nth_element_and_the_extremes_all() -> None:
    rows = np.arange(200, dtype=np.float32).reshape(2, 100)
    rows[0, 1] = -77.0
    s = Statistics(Histogram(256))
    s.add(rows, phase=2, stride=7)
    assert s.histogram is not None
    assert (s.lo, s.hi, s.elements) == (-77.0, 199.0, 200)
    taken = np.concatenate([rows[0, 2::7], rows[1, 2::7]])
    wanted = np.histogram(taken, 512, (-256.0, 256.0))[0]
    np.testing.assert_array_equal(s.histogram.counts, wanted)


def test_many_values_are_counted_as_numpy_does() -> None:
    x = np.random.default_rng(0).standard_normal(300_001, np.float32)
    s = collected(x[np.newaxis], 1024)
    assert s.histogram is not None
    edge = 1024 * s.histogram.width
    np.testing.assert_array_equal(s.histogram.counts, np.histogram(x, 2048, (-edge, edge))[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_by_row_and_changes_nothing(bad: float) -> None:
    s = collected(np.ones((1, 4), np.float32))
    before = state(s)
    rows = np.ones((5, 4), np.float32)
    rows[3, 2] = bad
    with pytest.raises(NotFinite) as caught:
        s.add(rows)
    assert caught.value.row == 3
    assert state(s) == before


def test_histograms_of_other_resolution_do_not_merge() -> None:
    with pytest.raises(ValueError, match="do not merge"):
        Histogram(8).merge(Histogram(16))
    with pytest.raises(ValueError, match="power of two"):
        Histogram(12)


# Ranges, against brute force on the values themselves.

RNG = np.random.default_rng(5)
TENSORS: dict[str, Rows] = {
    "relu": np.maximum(RNG.standard_normal((4, 5_000), np.float32) - 1, 0),
    "gauss": RNG.standard_normal((4, 5_000), np.float32) + np.float32(0.3),
    "laplace": RNG.laplace(size=(4, 5_000)).astype(np.float32),
    "outliers": np.where(RNG.random((4, 5_000)) < 2e-4, np.float32(300), RNG.random((4, 5_000))).astype(np.float32),
    "negative": -np.abs(RNG.standard_normal((4, 5_000), np.float32)) ** 3,
    "lopsided": np.concatenate([RNG.standard_normal((4, 4_700)), 20 * RNG.random((4, 300))], 1).astype(np.float32),
}  # fmt: skip


def decoded(x: NDArray[np.float64], q: Quantizer) -> NDArray[np.float64]:
    codes = np.clip(np.rint(x / q.scale[0]) + q.zero_point[0], q.format.lo, q.format.hi)
    return (codes - q.zero_point[0]) * q.scale[0]


def squared_error(x: NDArray[np.float64], q: Quantizer) -> float:
    return float(np.square(decoded(x, q) - x).sum())


def grid(lo: float, hi: float) -> list[tuple[float, float]]:
    """Clipped ranges: a lattice over both ends, finer for one."""
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    steps = 2.0 ** -np.arange(0, 9, 0.3 if lo and hi else 0.02)
    return [(a, b) for a in (lo * steps if lo else [0.0]) for b in (hi * steps if hi else [0.0])]


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("bits", [4, 8])
def test_mse_finds_a_range_as_good_as_brute_force(name: str, bits: int) -> None:
    rows, fmt = TENSORS[name], Int(bits)
    s = collected(rows, 2048)
    x = rows.ravel().astype(np.float64)
    best = min(squared_error(x, affine(*r, fmt)) for r in grid(s.lo, s.hi))
    chosen = choose(s, "mse", fmt, 99.99)
    assert min(s.lo, 0.0) <= chosen[0] <= chosen[1] <= max(s.hi, 0.0)
    assert squared_error(x, affine(*chosen, fmt)) <= 1.02 * best


def divergence(
    x: NDArray[np.float64], bounds: tuple[float, float], width: float, fmt: Int
) -> float:
    """By scipy, from the values: distribution over bins with what lies outside at the ends, against its rounding."""
    bins, counts = np.unique(np.floor(x[x != 0] / width), return_counts=True)
    middles = (bins + 0.5) * width
    inside = (middles >= bounds[0]) & (middles <= bounds[1])
    if inside.sum() < fmt.levels and not inside.all():
        return math.inf
    p = counts[inside].astype(np.float64)
    codes = np.rint(middles[inside] / affine(*bounds, fmt).scale[0])
    q = np.array([counts[inside][codes == c].mean() for c in codes])
    p[0] += counts[middles < bounds[0]].sum()
    p[-1] += counts[middles > bounds[1]].sum()
    return float(entropy(p, q))


@pytest.mark.parametrize("name", ["relu", "negative"])
def test_entropy_finds_a_range_as_good_as_brute_force(name: str) -> None:
    rows, fmt = TENSORS[name], Int(6)
    s = collected(rows, 512)
    assert s.histogram is not None
    x, width = rows.ravel().astype(np.float64), s.histogram.width
    steps = np.arange(1.0, 0.05, -0.02)
    best = min(divergence(x, (min(s.lo, 0) * f, max(s.hi, 0) * f), width, fmt) for f in steps)
    assert divergence(x, choose(s, "entropy", fmt, 99.99), width, fmt) <= 1.02 * best + 1e-6


@pytest.mark.parametrize("method", ["mse", "entropy"])
def test_exact_zeros_do_not_move_the_range(method: str) -> None:
    sparse = TENSORS["relu"]
    dense = sparse[sparse > 0][np.newaxis]
    assert method in ("mse", "entropy")
    with_zeros, without = collected(sparse, 2048), collected(dense, 2048)
    choice: Callable[[Statistics], object] = lambda s: choose(s, method, Int(8), 99.99)  # noqa: E731
    assert choice(with_zeros) == choice(without)


@pytest.mark.parametrize(("method", "bits"), [("mse", 4), ("entropy", 8)])
def test_a_lone_outlier_is_clipped_and_an_even_spread_kept(method: str, bits: int) -> None:
    even = np.linspace(0, 1, 50_000, dtype=np.float32)[np.newaxis]
    assert method in ("mse", "entropy")
    lo, hi = choose(collected(even, 2048), method, Int(8), 99.99)
    assert lo == 0.0
    assert 0.98 <= hi <= 1.0
    with_outlier = np.append(even, np.float32(3.0))[np.newaxis]
    assert choose(collected(with_outlier, 2048), method, Int(bits), 99.99)[1] < 1.2


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 100.0])
def test_percentile_is_that_of_the_values_within_a_bin(name: str, percentile: float) -> None:
    rows = TENSORS[name]
    s = collected(rows, 2048)
    assert s.histogram is not None
    cut = (100 - percentile) / 200
    wanted = np.quantile(rows.astype(np.float64), [cut, 1 - cut], method="inverted_cdf")
    got = choose(s, "percentile", Int(8), percentile)
    assert np.abs(np.subtract(got, wanted)).max() <= s.histogram.width
    if percentile == 100.0:
        assert got == (s.lo, s.hi)


@pytest.mark.parametrize("method", ["minmax", "moving-average", "percentile", "entropy", "mse"])
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 1e-30, 3e38, -1e-45])
def test_constant_tensors_have_a_range(method: str, value: float) -> None:
    assert method in ("minmax", "moving-average", "percentile", "entropy", "mse")
    s = collected(np.full((2, 10), value, np.float32), 2048)
    lo, hi = choose(s, method, Int(8), 99.99)
    x = np.float64(np.float32(value))
    q = affine(lo, hi, Int(8))
    assert abs(decoded(x, q) - x) <= q.scale[0]
