"""Take, Extreme and ArgExtreme against lists of Python integers."""

from __future__ import annotations

from itertools import product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.ir import Array, DType
from qcompile.ir.selection import ArgExtreme, Extreme, Take
from tests.ir.test_ops import check, check_rows, codes

CASES = settings(deadline=None, derandomize=True, max_examples=60)
SHAPES = st.lists(st.integers(1, 5), min_size=2, max_size=4)
TYPES = st.sampled_from([DType.I8, DType.U8, DType.I4, DType.I16, DType.I32])


def few(seed: int, dtype: DType, shape: list[int]) -> Array:
    """Codes of which many are equal."""
    rng = np.random.default_rng(seed)
    return rng.choice([dtype.lo, 0, 1, dtype.hi], shape).astype(dtype.numpy)


@CASES
@given(SHAPES, TYPES, st.data(), st.integers(0, 1 << 30))
def test_take_is_what_stands_at_the_indices(
    shape: list[int], dtype: DType, data: st.DataObject, seed: int
) -> None:
    x = codes(np.random.default_rng(seed), dtype, shape)
    axis = data.draw(st.integers(1, len(shape) - 1))
    indices = data.draw(st.lists(st.integers(0, shape[axis] - 1), min_size=1, max_size=9))
    want = np.zeros([*shape[:axis], len(indices), *shape[axis + 1 :]], np.int64)
    for place in product(*map(range, want.shape)):
        source = (*place[:axis], indices[place[axis]], *place[axis + 1 :])
        want[place] = int(x[source])
    check(Take(axis, tuple(indices)), (x,), (dtype,), want)
    check_rows(Take(axis, tuple(indices)), [x], [])


@CASES
@given(SHAPES, TYPES, st.booleans(), st.integers(0, 1 << 30))
def test_extreme_is_the_larger_or_the_smaller(
    shape: list[int], dtype: DType, largest: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x, y = (codes(rng, dtype, shape) for _ in range(2))
    choose = max if largest else min
    pairs = zip(x.ravel().tolist(), y.ravel().tolist(), strict=True)
    want = np.array([choose(a, b) for a, b in pairs]).reshape(shape)
    check(Extreme(largest), (x, y), (dtype, dtype), want)
    check_rows(Extreme(largest), [x, y], [])


@CASES
@given(SHAPES, TYPES, st.booleans(), st.booleans(), st.data(), st.integers(0, 1 << 30))
def test_argextreme_is_the_first_or_last_place_of_the_extreme(
    shape: list[int], dtype: DType, largest: bool, last: bool, data: st.DataObject, seed: int
) -> None:
    x = few(seed, dtype, shape)
    axis = data.draw(st.integers(1, len(shape) - 1))
    want = np.zeros([*shape[:axis], 1, *shape[axis + 1 :]], np.int64)
    for place in product(*map(range, want.shape)):
        row = x[(*place[:axis], slice(None), *place[axis + 1 :])].tolist()
        best = max(row) if largest else min(row)
        want[place] = len(row) - 1 - row[::-1].index(best) if last else row.index(best)
    check(ArgExtreme(axis, largest, last), (x,), (dtype,), want)
    check_rows(ArgExtreme(axis, largest, last), [x], [])
