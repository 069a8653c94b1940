"""BatchMatMul and Normalize against Python integers, and Normalize against what it approximates."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.ir import Array, DType, TensorType
from qcompile.ir.arith import inverse_root
from qcompile.ir.attention import BatchMatMul, Normalize
from tests.ir.test_ops import check, check_rows, codes

CASES = settings(deadline=None, derandomize=True, max_examples=60)
BYTES = st.sampled_from([DType.I8, DType.U8, DType.I4])
GUARD = 40
"""Fractional bits of a unit in which exact results are compared."""


# --- BatchMatMul ------------------------------------------------------------------------------------------------


@CASES
@given(st.lists(st.integers(1, 4), min_size=4, max_size=6), BYTES, BYTES, st.integers(0, 1 << 30))
def test_batch_matmul_is_the_sum_it_says(sizes: list[int], xt: DType, yt: DType, seed: int) -> None:
    *lead, m, k, p = sizes
    rng = np.random.default_rng(seed)
    x, y = codes(rng, xt, (*lead, m, k)), codes(rng, yt, (*lead, k, p))
    zeros = [int(codes(rng, d, (1,))[0]) for d in (xt, yt)]
    want = np.zeros((*lead, m, p), np.int64)
    for *at, i, j in np.ndindex(*want.shape):
        want[(*at, i, j)] = sum(
            (int(x[(*at, i, t)]) - zeros[0]) * (int(y[(*at, t, j)]) - zeros[1]) for t in range(k)
        )
    op = BatchMatMul(*zeros)
    check(op, (x, y), (xt, yt), want)
    check_rows(op, [x, y], [])


def test_the_longest_sum_is_exact_and_one_more_is_refused() -> None:
    """255 * 255 * 33025 is the last multiple below 2**31."""
    op, most = BatchMatMul(-128, 0), ((1 << 31) - 1) // 255**2
    assert most == 33025
    x = np.full((1, 1, most), 127, np.int8)
    y = np.full((1, most, 1), 255, np.uint8)
    kinds = [TensorType(DType.I8, x.shape), TensorType(DType.U8, y.shape)]
    assert op.infer(*kinds) == TensorType(DType.I32, (1, 1, 1))
    assert op.run(x, y).item() == 255 * 255 * most
    with pytest.raises(TypeError, match="a sum of 33026 products may leave 32 bits"):
        op.infer(TensorType(DType.I8, (1, 1, most + 1)), TensorType(DType.U8, (1, most + 1, 1)))


# --- inverse root -----------------------------------------------------------------------------------------------


def roots() -> list[int]:
    """Every small number, both sides of every power of two, and many of every size."""
    rng = np.random.default_rng(5)
    edges = [(1 << i) + d for i in range(2, 62) for d in (-1, 0, 1, 2)]
    window = [(1 << 30) + (i << 20) + d for i in range(3 << 10) for d in (0, (1 << 20) - 1)]
    drawn = [int(rng.integers(1 << b, 2 << b)) for b in range(61) for _ in range(100)]
    return [*range(1, 5000), *edges, *window, *drawn, (1 << 62) - 1]


def test_inverse_root_is_near_and_in_range() -> None:
    values = roots()
    found = inverse_root(np.array(values, np.int64))
    for v, r, k in zip(values, *(a.tolist() for a in found), strict=True):
        assert 1 << 29 <= r < 1 << 30
        assert -15 <= k <= 15
        one = 1 << 2 * (45 + k)
        # (r * 2**-(45 + k) * sqrt(v))**2 is 1 to twice the relative error
        assert abs(r * r * v - one) << 28 <= 2 * one


# --- Normalize --------------------------------------------------------------------------------------------------


def exact(deviation: int, spread: int, fraction: int) -> int:
    """deviation / sqrt(spread) * 2**fraction in units of 2**-GUARD, towards 0."""
    size = math.isqrt((deviation**2 << 2 * (fraction + GUARD)) // spread)
    return size if deviation >= 0 else -size


def furthest(op: Normalize, x: Array) -> float:
    """By how much, in units of the last place, a result is further from the exact one than rounding explains."""
    worst = 0.0
    for row, results in zip(
        x.reshape(-1, x.shape[-1]), op.run(x).reshape(-1, x.shape[-1]), strict=True
    ):
        entries = [int(n) for n in row]
        total = sum(entries)
        spread = len(entries) * sum(n * n for n in entries) - total**2 + op.epsilon
        for n, y in zip(entries, results.tolist(), strict=True):
            want = exact(len(entries) * n - total, spread, op.fraction)
            want = min(max(want, op.out.lo << GUARD), op.out.hi << GUARD)
            worst = max(worst, abs((y << GUARD) - want) / (1 << GUARD) - 0.5)
    return worst


@CASES
@given(
    st.integers(1, 70),
    st.sampled_from([DType.I8, DType.U8, DType.I4, DType.I16]),
    st.integers(0, 15),
    st.sampled_from([DType.I8, DType.I16]),
    st.integers(0, 60),
    st.integers(0, 1 << 30),
)
def test_normalize_is_exact_but_for_ties(
    n: int, dtype: DType, fraction: int, out: DType, size: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = codes(rng, dtype, (4, n))
    x[1], x[2] = x[1, 0], dtype.lo  # rows without a variance but for one entry
    x[2, -1] = dtype.hi
    op = Normalize(fraction, int(rng.integers(1, 2 << size)), out)
    assert op.infer(TensorType(dtype, x.shape)) == TensorType(out, x.shape)
    assert furthest(op, x) < 2**-13
    check_rows(op, [x], [])


@pytest.mark.parametrize(
    ("dtype", "n"), [(DType.I16, 57344), (DType.U8, 1 << 16), (DType.I8, 1 << 16)]
)
def test_the_longest_rows_stay_in_64_bits(dtype: DType, n: int) -> None:
    """Codes at both ends: the largest variance, and the largest deviation beside the least variance for it."""
    x = np.full((3, n), dtype.lo, dtype.numpy)
    x[0, ::2] = dtype.hi
    x[1, 0] = dtype.hi
    x[2, 1:] = dtype.hi
    op = Normalize(15, 1, DType.I16)
    op.infer(TensorType(dtype, (3, n)))
    few = np.array([op.run(x)[i, [0, 1, 2, n - 1]] for i in range(3)])
    for row, results in zip(x, few.tolist(), strict=True):
        entries = [int(e) for e in row]
        total = sum(entries)
        spread = n * sum(e * e for e in entries) - total**2 + 1
        for at, y in zip((0, 1, 2, n - 1), results, strict=True):
            want = exact(n * entries[at] - total, spread, 15) / (1 << GUARD)
            assert abs(y - min(max(want, -32768), 32767)) < 0.5 + 2**-13


def test_one_entry_more_of_16_bits_is_refused() -> None:
    op = Normalize(8, 1, DType.I16)
    op.infer(TensorType(DType.I16, (1, 57344)))
    with pytest.raises(TypeError, match="over 57345 entries of int16"):
        op.infer(TensorType(DType.I16, (1, 57345)))
    with pytest.raises(TypeError, match="epsilon 4611686018427387904 may leave 64 bits"):
        Normalize(8, 1 << 62, DType.I16).infer(TensorType(DType.I8, (1, 4)))


@CASES
@given(st.integers(2, 300), st.integers(1, 1 << 24), st.integers(0, 1 << 30))
def test_normalize_is_the_layer_normalization_of_real_numbers(
    n: int, epsilon: int, seed: int
) -> None:
    """In float64; scale and zero point of the codes only say which real epsilon it is."""
    rng = np.random.default_rng(seed)
    scale, zero = float(rng.uniform(0.001, 1)), int(rng.integers(-128, 128))
    x = codes(rng, DType.I8, (3, n))
    real = scale * (x.astype(np.float64) - zero)
    deviation = real - real.mean(axis=-1, keepdims=True)
    variance = real.var(axis=-1, keepdims=True) + epsilon * (scale / n) ** 2
    want = np.clip(deviation / np.sqrt(variance) * 1024, -32768, 32767)
    assert np.abs(Normalize(10, epsilon, DType.I16).run(x) - want).max() < 0.501
