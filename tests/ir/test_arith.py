"""The arithmetic contract against exact fractions and Python integers."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import product
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from qcompile.ir.arith import (
    F_MAX,
    F_MIN,
    Acc,
    AccOperand,
    Fit,
    Multipliers,
    NoRoom,
    Val,
    ValOperand,
    dyadic,
    fit_rescale,
    reciprocal,
    rescale,
    round_half_up,
    value_error,
)

T = TypeVar("T")
STRICT = Fraction(1, 32)
OFF = st.sampled_from([STRICT, Fraction(1, 2), Fraction(8)])
CASES = settings(deadline=None, derandomize=True, max_examples=150)
INT32 = 1 << 31


def real(m: int, e: int) -> Fraction:
    return Fraction(m, 1 << 32) / Fraction(2) ** e


def log_scales(lo: int, hi: int) -> st.SearchStrategy[Fraction]:
    """Positive fractions between 2**lo and 2**hi, evenly in the logarithm."""
    return st.builds(
        lambda m, e: Fraction(m, 1 << 30) * Fraction(2) ** e,
        st.integers(1 << 30, (1 << 31) - 1),
        st.integers(lo, hi - 1),
    )


# --- single numbers ---------------------------------------------------------------------------------------------


@CASES
@given(
    st.fractions(min_value=Fraction(1, 1 << 300), max_value=1 << 300) | log_scales(-400, 400),
    st.integers(1, 31),
)
@example(Fraction(1), 16)
@example(Fraction((1 << 17) - 1, 1 << 17), 16)  # rounds up to the next power of two
@example(Fraction(3, 2), 1)
def test_dyadic_is_near_left_aligned_and_short(scale: Fraction, bits: int) -> None:
    assume(scale > 0)
    m, e = dyadic(scale, bits)
    assert 1 << 30 <= m < 1 << 31
    assert m % (1 << (31 - bits)) == 0
    assert abs(real(m, e) - scale) <= scale / (1 << bits)


@CASES
@given(log_scales(-60, 60), st.integers(2, 31))
def test_dyadic_takes_the_nearest_multiplier(scale: Fraction, bits: int) -> None:
    m, e = dyadic(scale, bits)
    step = 1 << (31 - bits)
    for other in (m - step, m + step):
        assert abs(real(m, e) - scale) <= abs(real(other, e) - scale)


@pytest.mark.parametrize("scale", [Fraction(0), Fraction(-1, 3)])
def test_dyadic_refuses_what_is_not_positive(scale: Fraction) -> None:
    with pytest.raises(ValueError, match="positive"):
        dyadic(scale, 16)


@CASES
@given(st.fractions())
@example(Fraction(1, 2))
@example(Fraction(-1, 2))
@example(Fraction(-3, 2))
def test_round_half_up(x: Fraction) -> None:
    y = round_half_up(x)
    assert Fraction(-1, 2) < y - x <= Fraction(1, 2)


# --- choice of constants ----------------------------------------------------------------------------------------


@st.composite
def value_operands(draw: st.DrawFn) -> ValOperand:
    bits = draw(st.sampled_from([2, 4, 8, 8, 8, 16]))
    lo, hi = draw(
        st.sampled_from([(-(1 << (bits - 1)), (1 << (bits - 1)) - 1), (0, (1 << bits) - 1)])
    )
    scale = draw(log_scales(-24, 6) | st.sampled_from([Fraction(1), Fraction(1, 256), Fraction(4)]))
    return ValOperand(scale, draw(st.integers(lo, hi)), lo, hi)


@st.composite
def acc_operands(draw: st.DrawFn, channels: int) -> AccOperand:
    bounds = st.integers(0, INT32 - 1) | st.integers(0, 1 << 20)
    wide = draw(st.booleans())
    scale = tuple(draw(log_scales(-34, 4)) for _ in range(channels if wide else 1))
    bound = tuple(draw(bounds) for _ in range(channels if not wide or draw(st.booleans()) else 1))
    return AccOperand(scale, bound)


def at(row: tuple[T, ...], channel: int) -> T:
    return row[channel] if len(row) > 1 else row[0]


def raw_sum(fit: Fit, c: int, accs: Sequence[int], xs: Sequence[int]) -> int:
    """T of the contract, for one element, in Python integers."""
    total = 0
    for a, x in zip(fit.accs, accs, strict=True):
        shifted = x * 2 ** at(a.pre_shift, c)
        assert -INT32 < shifted < INT32
        total += shifted * at(a.multiplier, c) // (1 << 32)
    for v, x in zip(fit.vals, xs, strict=True):
        total += (x - v.zero_point) * at(v.multiplier, c)
    return total


@CASES
@given(st.data())
def test_fitted_constants_keep_the_contract(data: st.DataObject) -> None:
    channels = data.draw(st.integers(1, 3))
    accs = data.draw(st.lists(acc_operands(channels), max_size=2))
    vals = data.draw(st.lists(value_operands(), min_size=0 if accs else 1, max_size=2))
    bits = data.draw(st.sampled_from([8, 16, 24]))
    try:
        check_contract(accs, vals, bits, data.draw(OFF))
    except NoRoom:
        assume(False)


def test_the_rounding_constant_counts_in_the_sum() -> None:
    """At f = 23 the products alone are below 2**31, with half a step added they are not."""
    scale = Fraction(2557, 10 * 255)
    assert 255 * round(scale * 2**23) < INT32 <= 255 * round(scale * 2**23) + 2**22
    assert check_contract([], [ValOperand(scale, 0, 0, 255)], 24).f == (22,)


def check_contract(
    accs: Sequence[AccOperand],
    vals: Sequence[ValOperand],
    bits: int,
    off: Fraction = Fraction(1, 32),
) -> Fit:
    """Every promise of the chosen constants, at the corners of the operands."""
    fit = fit_rescale(accs, vals, bits=bits, tolerance=off)
    width = max([1, *(max(len(a.scale), len(a.bound)) for a in accs)])
    assert [v.zero_point for v in fit.vals] == [v.zero_point for v in vals]
    worst = Fraction(0)
    for c in range(width):
        f = at(fit.f, c)
        assert F_MIN <= f <= F_MAX
        slack = Fraction(1, 2) + max(0, len(accs) - 1) * Fraction(1, 1 << f)
        for a, want in zip(fit.accs, accs, strict=True):
            m, p = at(a.multiplier, c), at(a.pre_shift, c)
            assert 1 << 30 <= m < 1 << 31
            assert m % (1 << (31 - bits)) == 0
            assert 0 <= p <= 31
            error = abs(real(m, f - p) - at(want.scale, c))
            worst = max(worst, error / at(want.scale, c))
            assert error <= at(want.scale, c) / (1 << bits)
            slack += error * at(want.bound, c)
        for v, operand in zip(fit.vals, vals, strict=True):
            error = abs(Fraction(at(v.multiplier, c), 1 << f) - operand.scale)
            worst = max(worst, error / operand.scale)
            assert error * operand.reach <= off
            slack += error * operand.reach
        corners = product(
            *((-at(a.bound, c), -min(1, at(a.bound, c)), 0, at(a.bound, c)) for a in accs),
            *((v.lo, v.zero_point, v.hi) for v in vals),
        )
        for corner in corners:
            codes, xs = corner[: len(accs)], corner[len(accs) :]
            total = raw_sum(fit, c, codes, xs)
            assert abs(total) + (1 << (f - 1)) < INT32
            y = (total + (1 << (f - 1))) // (1 << f)
            exact = sum((x * at(a.scale, c) for x, a in zip(codes, accs, strict=True)), Fraction(0))
            exact += sum((x - v.zero_point) * v.scale for x, v in zip(xs, vals, strict=True))
            assert abs(y - exact) <= slack
    assert fit.multiplier_error == worst
    return fit


def something_fits(
    accs: Sequence[AccOperand], vals: Sequence[ValOperand], bits: int, off: Fraction
) -> bool:
    """Try every f: the definition of the contract for one channel, with no search order and no short cut."""
    for f in range(1, 31):
        total, fine = 1 << (f - 1), True
        for a in accs:
            m, e = dyadic(a.scale[0], bits)
            if not 0 <= f - e <= 31 or a.bound[0] * 2 ** (f - e) >= INT32:
                fine = False
                break
            total += a.bound[0] * 2 ** (f - e) * m // (1 << 32) + 1
        for v in vals:
            exact = v.scale * 2**f
            fine = fine and (exact.denominator == 1 or v.reach <= off * 2 ** (f + 1))
            total += v.reach * round_half_up(exact)
        if fine and total < INT32:
            return True
    return False


@CASES
@given(st.lists(acc_operands(1), max_size=2), st.lists(value_operands(), max_size=2), OFF)
@example(
    [],
    [ValOperand(Fraction(1), 0, -128, 127), ValOperand(Fraction(1, 1 << 25), 0, -128, 127)],
    STRICT,
)
@example(
    [AccOperand((Fraction(1, 1 << 10),), (1 << 20,))],
    [ValOperand(Fraction(1, 1 << 40), 0, 0, 255)],
    STRICT,
)
@example([AccOperand((Fraction(1, 1 << 33),), (1 << 30,))], [], STRICT)
@example([AccOperand((Fraction(1, 1 << 34),), (1 << 30,))], [], STRICT)
@example([AccOperand((Fraction(1, 4),), (INT32 - 1,))], [], STRICT)
@example([AccOperand((Fraction(1, 2),), (INT32 - 1,))], [], STRICT)
@example([AccOperand((Fraction(3, 4),), (INT32 - 1,))], [], STRICT)
@example([], [ValOperand(Fraction(7, 9), 0, -32768, 32767)] * 2, STRICT)
@example([], [ValOperand(Fraction(7, 9), 0, -32768, 32767)] * 2, Fraction(8))
def test_no_room_is_said_when_and_only_when_nothing_fits(
    accs: list[AccOperand], vals: list[ValOperand], off: Fraction
) -> None:
    assume(accs or vals)
    possible = something_fits(accs, vals, 16, off)
    if possible:
        fit_rescale(accs, vals, bits=16, tolerance=off)
    else:
        with pytest.raises(NoRoom):
            fit_rescale(accs, vals, bits=16, tolerance=off)


def test_a_value_may_be_off_by_a_fraction_of_the_results_range() -> None:
    """2**-13 of it: 1/32 step of the 256 that 8 bits have, and never less than that."""
    assert {bits: value_error(bits) for bits in (2, 4, 8)} == dict.fromkeys((2, 4, 8), STRICT)
    assert {bits: value_error(bits) / 2**bits for bits in (8, 9, 12, 16, 24)} == dict.fromkeys(
        (8, 9, 12, 16, 24), Fraction(1, 1 << 13)
    )


def test_sums_of_16_bit_operands_have_room_only_for_a_fraction_of_the_range() -> None:
    """Why a fixed fraction of a step will not do: 17 bits of sum at the 20 fractional bits it asks for are 37."""
    pair = [ValOperand(Fraction(7, 9), 0, -32768, 32767)] * 2
    with pytest.raises(NoRoom):
        fit_rescale([], pair, bits=24)
    check_contract([], pair, 24, value_error(16))


def test_an_accumulator_beyond_32_bits_has_no_room() -> None:
    with pytest.raises(NoRoom, match="more than 32 bits"):
        fit_rescale([AccOperand((Fraction(1, 1000),), (INT32,))], [], bits=16)


@CASES
@given(st.lists(acc_operands(2), max_size=2), st.lists(value_operands(), max_size=2))
def test_power_of_two_constants_are_powers_of_two(
    accs: list[AccOperand], vals: list[ValOperand]
) -> None:
    assume(accs or vals)
    try:
        fit = fit_rescale(accs, vals, bits=16, multipliers=Multipliers(digits=1))
    except NoRoom:
        assume(False)
    assert all(m == 1 << 30 for a in fit.accs for m in a.multiplier)
    assert vals or fit.multiplier_error <= Fraction(1, 3)
    for v, operand in zip(fit.vals, vals, strict=True):
        power = Fraction(1)
        while power > operand.scale:
            power /= 2
        while power * 2 <= operand.scale:
            power *= 2
        nearest = power if operand.scale < power * Fraction(3, 2) else power * 2
        for c in range(max(len(fit.f), len(v.multiplier))):
            n, f = at(v.multiplier, c), at(fit.f, c)
            assert abs(Fraction(n, 1 << f) - nearest) * operand.reach <= Fraction(1, 32)
            assert n & (n - 1) == 0


# --- the meaning ------------------------------------------------------------------------------------------------


def spell_out(acc: int, m: int, p: int, f: int, z: int, lo: int, hi: int) -> int:
    t = (acc * m << p) // (1 << 32)
    return min(max((t + (1 << f - 1)) // (1 << f) + z, lo), hi)


EXTREMES = [0, 1, -1, 2, -2, INT32 - 1, -INT32 + 1, 1 << 30, -(1 << 30), (1 << 24) + 1]


@CASES
@given(
    st.lists(st.integers(-INT32 + 1, INT32 - 1), max_size=20),
    st.integers(1 << 30, INT32 - 1),
    st.integers(0, 8),
    st.integers(1, 30),
    st.integers(-128, 127),
)
@example([], 1 << 30, 0, 1, 0)
@example([(k << 2) + 2 for k in range(-9, 9)], 1 << 30, 0, 1, 3)  # ties
def test_one_accumulator(xs: list[int], m: int, p: int, f: int, z: int) -> None:
    accs = np.array([*xs, *EXTREMES], np.int64) >> p
    got = rescale(
        [(Acc((m,), (p,)), accs.astype(np.int32))], [], np.array([f]), z, -32768, 32767, (1,)
    )
    want = [spell_out(int(x), m, p, f, z, -32768, 32767) for x in accs]
    assert got.tolist() == want


def test_one_accumulator_is_tosa_apply_scale_32_with_one_rounding() -> None:
    rng = np.random.default_rng(1)
    n = 200_000
    f = rng.integers(1, 31, n)
    p = rng.integers(0, 4, n)
    m = rng.integers(1 << 30, INT32, n)
    x = rng.integers(-INT32 + 1, INT32, n) >> rng.integers(0, 30, n) >> p
    # put a quarter of them on and beside a tie, where roundings differ
    half = n // 4
    m[:half] = 1 << 30
    step = np.maximum(f[:half] + 1 - p[:half], 0)
    x[:half] = ((x[:half] >> step) << step) + (np.int64(1) << step) // 2 + rng.integers(-1, 2, half)
    x = np.clip(x, -((INT32 - 1) >> p), (INT32 - 1) >> p)
    shift = 32 + f - p
    tosa = (x * m + (np.int64(1) << (shift - 1))) >> shift
    row = (Acc(tuple(m.tolist()), tuple(p.tolist())), x.astype(np.int32))
    got = rescale([row], [], f, 0, -INT32, INT32 - 1, (n,))
    assert np.array_equal(got, tosa)


@CASES
@given(st.data())
def test_many_terms_equal_python_integers(data: st.DataObject) -> None:
    channels = data.draw(st.integers(1, 4))

    def row(lo: int, hi: int) -> tuple[int, ...]:
        return tuple(row_of(data, data.draw(st.sampled_from([1, channels])), lo, hi))

    accs = [
        (
            Acc(row(1 << 30, INT32 - 1), row(0, 3)),
            np.array(
                [row_of(data, channels, -(1 << 28), 1 << 28), [(1 << 28) - 1] * channels], np.int32
            ),
        )
        for _ in range(data.draw(st.integers(0, 2)))
    ]
    vals = [
        (
            Val(row(-70000, 70000), data.draw(st.integers(-128, 127))),
            np.array([row_of(data, channels, -32768, 32767), [-32768] * channels], np.int16),
        )
        for _ in range(data.draw(st.integers(0, 2)))
    ]
    assume(accs or vals)
    f = row(1, 30)
    z = data.draw(st.integers(-40000, 40000))
    got = rescale(accs, vals, np.array(f, np.int64).reshape(-1), z, -32768, 32767, (channels,))
    for r in range(2):
        for c in range(channels):
            total = sum(
                int(x[r, c]) * 2 ** at(a.pre_shift, c) * at(a.multiplier, c) // 2**32
                for a, x in accs
            ) + sum((int(x[r, c]) - v.zero_point) * at(v.multiplier, c) for v, x in vals)
            want = (total + 2 ** (at(f, c) - 1)) // 2 ** at(f, c) + z
            assert int(got[r, c]) == min(max(want, -32768), 32767)


def row_of(data: st.DataObject, count: int, lo: int, hi: int) -> list[int]:
    return data.draw(st.lists(st.integers(lo, hi), min_size=count, max_size=count))


# --- reciprocal -------------------------------------------------------------------------------------------------


def test_reciprocal_is_near_and_in_range() -> None:
    rng = np.random.default_rng(2)
    ends = np.arange(1 << 12)
    s = np.concatenate(
        [
            (1 << 30) + ends,
            INT32 - 1 - ends,
            rng.integers(1 << 30, INT32, 300_000),
            (1 << 30) + (ends << 18),
        ]
    )
    r = reciprocal(s)
    assert r.min() >= 1 << 30
    assert r.max() <= 1 << 31
    # r * s is below 2**62, so that this is exact: |r - 2**61 / s| / (2**61 / s) < 2**-29
    assert np.abs(r * s - (np.int64(1) << 61)).max() < 1 << (61 - 29)
