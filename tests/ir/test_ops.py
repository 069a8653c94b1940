"""Every operator's `run` against onnxruntime's integer operators or plain Python integers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper

from qcompile.ir import (
    ArgExtreme,
    Array,
    BatchMatMul,
    Concat,
    Conv,
    DType,
    Extreme,
    Lut,
    MatMul,
    MaxPool,
    Mul,
    Normalize,
    Op,
    Pad,
    Rescale,
    Reshape,
    Slice,
    Softmax,
    SumPool,
    Take,
    TensorType,
    Transpose,
    ops,
)
from qcompile.ir.arith import Acc, Val

CASES = settings(deadline=None, derandomize=True, max_examples=100)
Draw = st.DrawFn
Ints = tuple[int, ...]
Rng = np.random.Generator
Window = tuple[Ints, Ints, Ints, Ints, Ints]
"""spatial, kernel, strides, pads, dilations"""
Tap = tuple[Ints, Ints | None]
Convolution = tuple[Window, Ints, int]
"""window; groups, depth, width, rows; seed"""


def onnxruntime_says(op: str, feeds: Sequence[NDArray[Any]], opset: int = 17, **attrs: Any) -> Any:
    """The result of one standard operator in onnxruntime."""
    names = [f"x{i}" for i in range(len(feeds))]
    inputs = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        for n, x in zip(names, feeds, strict=True)
    ]
    node = helper.make_node(op, names, ["y"], **attrs)
    output = helper.make_empty_tensor_value_info("y")
    model = helper.make_model(
        helper.make_graph([node], "one", inputs, [output]),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )
    model = onnx.shape_inference.infer_shapes(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, dict(zip(names, feeds, strict=True)))[0]


def channels_first(x: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(np.moveaxis(x, -1, 1))


def channels_last(x: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(np.moveaxis(x, 1, -1))


def codes(rng: Rng, dtype: DType, shape: Sequence[int]) -> Array:
    """Random elements, the extreme ones often."""
    x = rng.integers(dtype.lo, dtype.hi + 1, shape)
    extreme = rng.choice([dtype.lo, dtype.hi], shape)
    return np.where(rng.random(shape) < 0.2, extreme, x).astype(dtype.numpy)


def kind(x: Array, dtype: DType) -> TensorType:
    return TensorType(dtype, x.shape)


def check(op: Op, ins: Sequence[Array], dtypes: Sequence[DType], want: NDArray[Any]) -> None:
    """The result, its inferred type, and that rows run alone give what they give together."""
    got = op.run(*ins)
    inferred = op.infer(*(kind(x, d) for x, d in zip(ins, dtypes, strict=True)))
    assert (inferred.shape, inferred.dtype.numpy) == (got.shape, got.dtype)
    assert got.min(initial=0) >= inferred.dtype.lo
    assert got.max(initial=0) <= inferred.dtype.hi
    assert got.shape == want.shape
    assert np.array_equal(got, want)


def check_rows(op: Op, batched: Sequence[Array], shared: Sequence[Array]) -> None:
    whole = op.run(*batched, *shared)
    for n in range(len(whole)):
        alone = op.run(*(x[n : n + 1] for x in batched), *shared)
        assert np.array_equal(alone, whole[n : n + 1])


# --- windows ----------------------------------------------------------------------------------------------------


def windows_of(
    spatial: Ints, kernel: Ints, strides: Ints, pads: Ints, dilations: Ints
) -> Iterator[tuple[Ints, list[Tap]]]:
    """(output position, [(kernel position, input position or None in the border)]) by counting."""
    rank = len(spatial)
    extents = [
        len(range(0, n + pads[i] + pads[rank + i] - (kernel[i] - 1) * dilations[i], strides[i]))
        for i, n in enumerate(spatial)
    ]
    for out in product(*map(range, extents)):
        taps = []
        for tap in product(*map(range, kernel)):
            where = tuple(
                o * s - p + t * d
                for o, s, p, t, d in zip(out, strides, pads, tap, dilations, strict=False)
            )
            inside = all(0 <= w < n for w, n in zip(where, spatial, strict=True))
            taps.append((tap, where if inside else None))
        yield out, taps


def extents_of(*window: Ints) -> Ints:
    return tuple(np.array([out for out, _ in windows_of(*window)]).max(axis=0) + 1)


@st.composite
def windows(draw: Draw, ranks: Sequence[int] = (1, 2), dilate: bool = True) -> Window:
    """A window that fits."""
    rank = draw(st.sampled_from(ranks))

    def row(lo: int, hi: int) -> Ints:
        return tuple(draw(st.integers(lo, hi)) for _ in range(rank))

    kernel, strides = row(1, 3), row(1, 3)
    dilations = row(1, 2) if dilate else (1,) * rank
    pads = (*row(0, 2), *row(0, 2))
    spatial = tuple(
        draw(st.integers(max(1, (k - 1) * d + 1 - pads[i] - pads[rank + i]), 7))
        for i, (k, d) in enumerate(zip(kernel, dilations, strict=True))
    )
    return spatial, kernel, strides, pads, dilations


@st.composite
def convolutions(draw: Draw) -> Convolution:
    window = draw(windows())
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    depth = draw(st.sampled_from([1, 1, 2, 3]))  # one with groups: depthwise
    width = draw(st.integers(1, 3))  # outputs of a group: the depth multiplier
    seed = draw(st.integers(0, 1 << 30))
    rows = draw(st.integers(1, 3))
    return window, (groups, depth, width, rows), seed


def naive_conv(x: Array, w: Array, b: Array, window: Window, groups: int, fill: int) -> Array:
    depth, width = w.shape[-1], len(w) // groups
    out = np.zeros((len(x), *extents_of(*window), len(w)), object)
    for n, o in product(range(len(x)), range(len(w))):
        first = o // width * depth
        for place, taps in windows_of(*window):
            out[(n, *place, o)] = int(b[o]) + sum(
                (fill if where is None else int(x[(n, *where, first + c)])) * int(w[(o, *tap, c)])
                for tap, where in taps
                for c in range(depth)
            )
    return out.astype(np.int64)


@CASES
@given(
    convolutions(),
    st.sampled_from([DType.I8, DType.U8, DType.I16, DType.I4]),
    st.sampled_from([DType.I8, DType.I4, DType.I2]),
)
def test_conv_is_the_sum_it_says(case: Convolution, xt: DType, wt: DType) -> None:
    (spatial, kernel, strides, pads, dilations), (groups, depth, width, rows), seed = case
    rng = np.random.default_rng(seed)
    fill = int(codes(rng, xt, (1,))[0])
    x = codes(rng, xt, (rows, *spatial, depth * groups))
    w = codes(rng, wt, (width * groups, *kernel, depth))
    b = rng.integers(-(1 << 24), 1 << 24, width * groups).astype(np.int32)
    op = Conv(strides, pads, dilations, groups, fill)
    want = naive_conv(x, w, b, case[0], groups, fill)
    check(op, (x, w, b), (xt, wt, DType.I32), want)
    check_rows(op, [x], [w, b])


@CASES
@given(convolutions(), st.integers(-128, 127))
def test_conv_with_the_zero_point_folded_is_onnxruntimes_conv_integer(
    case: Convolution, zero: int
) -> None:
    (spatial, kernel, strides, pads, dilations), (groups, depth, width, rows), seed = case
    rng = np.random.default_rng(seed)
    x = codes(rng, DType.I8, (rows, *spatial, depth * groups))
    w = codes(rng, DType.I8, (width * groups, *kernel, depth))
    folded = -zero * w.astype(np.int64).reshape(len(w), -1).sum(axis=1)
    got = Conv(strides, pads, dilations, groups, zero).run(x, w, folded.astype(np.int32))
    want = onnxruntime_says(
        "ConvInteger",
        [
            channels_first((x.astype(np.int16) + 128).astype(np.uint8)),
            channels_first((w.astype(np.int16) + 128).astype(np.uint8)),
            np.array(zero + 128, np.uint8),
            np.array(128, np.uint8),
        ],
        strides=strides,
        pads=pads,
        dilations=dilations,
        group=groups,
    )
    assert np.array_equal(got, channels_last(want))


def test_a_convolution_cut_into_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    x = codes(rng, DType.I8, (7, 6, 5, 4))
    w, b = codes(rng, DType.I8, (6, 3, 2, 2)), codes(rng, DType.I32, (6,)) >> 8
    op = Conv((1, 2), (1, 0, 1, 1), (1, 1), 2, -3)
    whole = op.run(x, w, b)
    monkeypatch.setattr(ops, "_CHUNK_BYTES", 5000)
    assert np.array_equal(op.run(x, w, b), whole)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("dtype", "depth"), [(DType.I8, 1035), (DType.I8, 20000), (DType.I16, 511)]
)
def test_large_sums_are_exact(dtype: DType, depth: int, sign: int) -> None:
    """Sums on both sides of the 24 bits that a float32 holds, next to a bias at the end of its range."""
    x = np.full((2, depth), dtype.hi if sign > 0 else dtype.lo, dtype.numpy)
    x[1, 0] -= np.sign(sign) * 1
    w = np.full((2, depth), 127, np.int8)
    w[1, ::2] = -127
    b = np.array([sign * 12345, -sign], np.int32)
    want = [
        [sum(map(int.__mul__, r, c)) + int(d) for c, d in zip(w.tolist(), b, strict=True)]
        for r in x.tolist()
    ]
    assert MatMul().run(x, w, b).tolist() == want
    cube = x.reshape(2, 1, 1, depth)
    conv = Conv((1, 1), (0, 0, 0, 0), (1, 1)).run(cube, w.reshape(2, 1, 1, depth), b)
    assert conv.reshape(2, 2).tolist() == want


@CASES
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(0, 1 << 30),
)
def test_matmul_is_onnxruntimes_matmul_integer(lead: list[int], k: int, o: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, w = codes(rng, DType.I8, (*lead, k)), codes(rng, DType.I8, (o, k))
    b = rng.integers(-(1 << 30), 1 << 30, o).astype(np.int32)
    want = onnxruntime_says(
        "MatMulInteger",
        [
            (x.astype(np.int16) + 128).astype(np.uint8),
            np.ascontiguousarray((w.T.astype(np.int16) + 128).astype(np.uint8)),
            np.array(128, np.uint8),
            np.array(128, np.uint8),
        ],
    )
    check(MatMul(), (x, w, b), (DType.I8, DType.I8, DType.I32), want + b)
    check_rows(MatMul(), [x], [w, b])


@CASES
@given(windows(), st.sampled_from([DType.I8, DType.U8]), st.integers(0, 1 << 30))
def test_maxpool_is_onnxruntimes(window: Window, dtype: DType, seed: int) -> None:
    spatial, kernel, strides, pads, dilations = window
    assume(all(p < k for p, k in zip(pads, kernel * 2, strict=True)))  # onnxruntime's own limit
    assume(all(any(w is not None for _, w in taps) for _, taps in windows_of(*window)))
    rng = np.random.default_rng(seed)
    x = codes(rng, dtype, (2, *spatial, 3))
    if rng.random() < 0.3:
        x[:] = dtype.lo  # nothing beats the border
    op = MaxPool(kernel, strides, pads, dilations)
    want = onnxruntime_says(
        "MaxPool",
        [channels_first(x)],
        kernel_shape=kernel,
        strides=strides,
        pads=pads,
        dilations=dilations,
    )
    check(op, (x,), (dtype,), channels_last(want))
    check_rows(op, [x], [])


@CASES
@given(windows(), st.sampled_from([DType.I4, DType.I16, DType.I32]), st.integers(0, 1 << 30))
def test_maxpool_refuses_empty_windows_and_takes_the_largest(
    window: Window, dtype: DType, seed: int
) -> None:
    spatial, kernel, strides, pads, dilations = window
    x = codes(np.random.default_rng(seed), dtype, (1, *spatial, 2))
    op = MaxPool(kernel, strides, pads, dilations)
    met = [(out, [w for _, w in taps if w is not None]) for out, taps in windows_of(*window)]
    if any(not places for _, places in met):
        with pytest.raises(TypeError, match="border"):
            op.infer(kind(x, dtype))
        return
    want = np.zeros((1, *extents_of(*window), 2), np.int64)
    for (out, places), c in product(met, range(2)):
        want[(0, *out, c)] = max(int(x[(0, *p, c)]) for p in places)
    check(op, (x,), (dtype,), want)


@CASES
@given(
    windows(dilate=False), st.sampled_from([DType.I8, DType.U8, DType.I16]), st.integers(0, 1 << 30)
)
def test_sumpool_counts_the_border_as_zero(window: Window, dtype: DType, seed: int) -> None:
    spatial, kernel, strides, pads, _ = window
    rng = np.random.default_rng(seed)
    x, zero = codes(rng, dtype, (2, *spatial, 2)), int(codes(rng, dtype, (1,))[0])
    want = np.zeros((2, *extents_of(*window), 2), np.int64)
    for n, c in product(range(2), range(2)):
        for out, taps in windows_of(*window):
            want[(n, *out, c)] = sum(int(x[(n, *w, c)]) - zero for _, w in taps if w is not None)
    op = SumPool(kernel, strides, pads, zero)
    check(op, (x,), (dtype,), want)
    check_rows(op, [x], [])


# --- element by element -----------------------------------------------------------------------------------------


RescaleCase = tuple[Rescale, Ints, list[DType], list[Ints], int]
"""operator; shape of the result; types and shapes of the values; seed"""


@st.composite
def rescales(draw: Draw) -> RescaleCase:
    rank = draw(st.integers(1, 4))
    shape = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    spatial = rank > 2 and draw(st.booleans())
    entries = math.prod(shape[1:-1]) if spatial else shape[-1]

    def row(lo: int, hi: int) -> Ints:
        return tuple(draw(st.integers(lo, hi)) for _ in range(draw(st.sampled_from([1, entries]))))

    accs = tuple(
        Acc(row(1 << 30, (1 << 31) - 1), row(0, 2)) for _ in range(draw(st.integers(0, 2)))
    )
    count = draw(st.integers(0 if accs else 1, 2))
    kinds = [draw(st.sampled_from([DType.I8, DType.U8, DType.I16, DType.I4])) for _ in range(count)]
    vals = tuple(Val(row(-2000, 2000), draw(st.integers(k.lo, k.hi))) for k in kinds)
    full = draw(
        st.integers(0, max(0, count - 1))
    )  # without accumulators one value has the whole shape
    shapes = [
        shape if not accs and i == full else tuple(n if draw(st.booleans()) else 1 for n in shape)
        for i in range(count)
    ]
    out = draw(st.sampled_from([DType.I8, DType.U8, DType.I16, DType.I32, DType.I4]))
    lo = draw(st.integers(out.lo, out.hi))
    hi = draw(st.integers(lo, out.hi))
    op = Rescale(accs, vals, row(1, 30), draw(st.integers(-300, 300)), lo, hi, out, spatial)
    return op, shape, kinds, shapes, draw(st.integers(0, 1 << 30))


@CASES
@given(rescales())
def test_rescale_is_the_contract_element_by_element(case: RescaleCase) -> None:
    op, shape, kinds, shapes, seed = case
    rng = np.random.default_rng(seed)
    accs = [rng.integers(-(1 << 28), 1 << 28, shape).astype(np.int32) for _ in op.accs]
    vals = [codes(rng, k, s) for k, s in zip(kinds, shapes, strict=True)]
    want = np.zeros(shape, np.int64)
    for index in np.ndindex(*shape):
        place = int(np.ravel_multi_index(index[1:-1], shape[1:-1])) if op.spatial else index[-1]

        def at(row: Ints, place: int = place) -> int:
            return row[place] if len(row) > 1 else row[0]

        total = sum(
            int(x[index]) * 2 ** at(a.pre_shift) * at(a.multiplier) // 2**32
            for a, x in zip(op.accs, accs, strict=True)
        )
        for v, x in zip(op.vals, vals, strict=True):
            code = int(np.broadcast_to(x, shape)[index])
            total += (code - v.zero_point) * at(v.multiplier)
        y = (total + 2 ** (at(op.f) - 1)) // 2 ** at(op.f) + op.zero_point
        want[index] = min(max(y, op.lo), op.hi)
    check(op, (*accs, *vals), [DType.I32] * len(accs) + kinds, want)


def test_rows_of_a_rescale_are_independent() -> None:
    rng = np.random.default_rng(4)
    acc = rng.integers(-(1 << 28), 1 << 28, (4, 2, 3, 5)).astype(np.int32)
    val = codes(rng, DType.I8, (4, 2, 3, 5))
    m = tuple(int(m) for m in rng.integers(1 << 30, 1 << 31, 5))
    op = Rescale((Acc(m),), (Val((3, 4, 5, 6, 7), -5),), (9,), 3, -128, 127, DType.I8)
    check_rows(op, [acc, val], [])


@CASES
@given(st.data(), st.integers(0, 1 << 30))
def test_mul_is_a_product_of_integers(data: st.DataObject, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    other = [n if data.draw(st.booleans()) else 1 for n in shape]
    narrow = [DType.I8, DType.U8, DType.I4]
    kinds = [data.draw(st.sampled_from(k)) for k in (narrow, [*narrow, DType.I16])]
    if data.draw(st.booleans()):
        kinds.reverse()
    x, y = codes(rng, kinds[0], shape), codes(rng, kinds[1], other)
    zx, zy = (int(codes(rng, k, (1,))[0]) for k in kinds)
    wide = np.broadcast_to(y, shape)
    want = [(int(a) - zx) * (int(b) - zy) for a, b in zip(x.flat, wide.flat, strict=True)]
    check(Mul(zx, zy), (x, y), kinds, np.array(want, np.int64).reshape(shape))
    check_rows(Mul(zx, zy), [x], [y[:1]])


@pytest.mark.parametrize("dtype", [DType.I8, DType.U8, DType.I4, DType.I2], ids=str)
@pytest.mark.parametrize("out", [DType.I8, DType.I16, DType.U8, DType.I32], ids=str)
def test_lut_is_onnxruntimes_gather(dtype: DType, out: DType) -> None:
    rng = np.random.default_rng(5)
    table = codes(rng, out, (1 << dtype.bits,))
    every = np.arange(dtype.lo, dtype.hi + 1).astype(dtype.numpy)
    x = np.stack([every, rng.permutation(every)])
    want = onnxruntime_says("Gather", [table, x.astype(np.int64) - dtype.lo], axis=0)
    check(Lut(), (x, table), (dtype, out), want)
    check_rows(Lut(), [x], [table])


# --- softmax ----------------------------------------------------------------------------------------------------


def exponentials(levels: int, step: float, fraction: int) -> Array:
    return np.array([round(math.exp(-k * step) * 2**fraction) for k in range(levels)], np.int32)


@CASES
@given(
    st.integers(1, 64),
    st.sampled_from([DType.I8, DType.U8, DType.I4]),
    st.sampled_from([DType.I8, DType.I16]),
    st.floats(1e-4, 3.0),
    st.integers(0, 1 << 30),
)
def test_softmax_rounds_the_exact_quotient(
    width: int, dtype: DType, out: DType, step: float, seed: int
) -> None:
    fraction = 30 - width.bit_length()
    table = exponentials(1 << dtype.bits, step, fraction)
    rng = np.random.default_rng(seed)
    x = codes(rng, dtype, (3, width))
    x[1] = x[1, 0]  # a tie of all
    got = Softmax(fraction, out).run(x, table)
    inferred = Softmax(fraction, out).infer(kind(x, dtype), kind(table, DType.I32))
    assert inferred == kind(got, out)
    assert got.dtype == out.numpy
    for row, ys in zip(x.tolist(), got.tolist(), strict=True):
        weights = [Fraction(int(table[max(row) - v])) for v in row]
        for v, y, e in zip(row, ys, weights, strict=True):
            exact = min(e / sum(weights) * 2**out.bits + out.lo, Fraction(out.hi))
            assert abs(y - exact) <= Fraction(1, 2) + Fraction(1, 1 << 12)
            assert all(y >= other for u, other in zip(row, ys, strict=True) if v >= u)
    check_rows(Softmax(fraction, out), [x], [table])


def test_softmax_at_the_ends_of_its_range() -> None:
    """One certain class takes the largest code, and a sum just below 2**31 does not overflow."""
    table = exponentials(256, 1.0, 29)
    sure = np.array([[127, -128, -128]], np.int8)
    assert Softmax(29, DType.I8).run(sure, table).tolist() == [[127, -128, -128]]
    assert Softmax(29, DType.I16).run(sure, table).tolist() == [[32767, -32768, -32768]]
    even = np.zeros((1, 3), np.int8)
    assert Softmax(29, DType.I8).run(even, table).tolist() == [[-128 + round(256 / 3)] * 3]
    with pytest.raises(TypeError, match="overflows"):
        Softmax(29, DType.I8).infer(TensorType(DType.I8, (1, 4)), TensorType(DType.I32, (256,)))


# --- moving elements --------------------------------------------------------------------------------------------

MOVED = st.sampled_from([DType.I8, DType.U8, DType.I32])
SHAPES = st.lists(st.integers(1, 4), min_size=2, max_size=4)


@CASES
@given(SHAPES, MOVED, st.data(), st.integers(0, 1 << 30))
def test_concat_is_onnxruntimes(
    shape: list[int], dtype: DType, data: st.DataObject, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    axis = data.draw(st.integers(1, len(shape) - 1))
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    xs = [codes(rng, dtype, (*shape[:axis], n, *shape[axis + 1 :])) for n in sizes]
    check(Concat(axis), xs, [dtype] * len(xs), onnxruntime_says("Concat", xs, axis=axis))
    check_rows(Concat(axis), xs, [])


@CASES
@given(SHAPES, MOVED, st.data(), st.integers(0, 1 << 30))
def test_slice_is_onnxruntimes(
    shape: list[int], dtype: DType, data: st.DataObject, seed: int
) -> None:
    x = codes(np.random.default_rng(seed), dtype, shape)
    starts = [data.draw(st.integers(0, n - 1)) for n in shape[1:]]
    ends = [data.draw(st.integers(a + 1, n)) for a, n in zip(starts, shape[1:], strict=True)]
    steps = [data.draw(st.integers(1, 3)) for _ in starts]
    axes = range(1, len(shape))
    bounds = [np.array(r, np.int64) for r in (starts, ends, axes, steps)]
    op = Slice(tuple(starts), tuple(ends), tuple(steps))
    check(op, (x,), (dtype,), onnxruntime_says("Slice", [x, *bounds]))
    check_rows(op, [x], [])


@CASES
@given(SHAPES, MOVED, st.data(), st.integers(0, 1 << 30))
def test_pad_is_onnxruntimes(
    shape: list[int], dtype: DType, data: st.DataObject, seed: int
) -> None:
    x = codes(np.random.default_rng(seed), dtype, shape)
    value = data.draw(st.integers(dtype.lo, dtype.hi))
    begins, ends = ([data.draw(st.integers(0, 2)) for _ in shape[1:]] for _ in range(2))
    pads = np.array([0, *begins, 0, *ends], np.int64)
    op = Pad((*begins, *ends), value)
    want = onnxruntime_says("Pad", [x, pads, np.array(value, dtype.numpy)])
    check(op, (x,), (dtype,), want)
    check_rows(op, [x], [])


@CASES
@given(SHAPES, MOVED, st.data(), st.integers(0, 1 << 30))
def test_transpose_and_reshape_are_onnxruntimes(
    shape: list[int], dtype: DType, data: st.DataObject, seed: int
) -> None:
    x = codes(np.random.default_rng(seed), dtype, shape)
    perm = (0, *data.draw(st.permutations(range(1, len(shape)))))
    check(Transpose(perm), (x,), (dtype,), onnxruntime_says("Transpose", [x], perm=perm))
    check_rows(Transpose(perm), [x], [])
    flat = (-1, math.prod(shape[1:]))
    want = onnxruntime_says("Reshape", [x, np.array(flat, np.int64)])
    check(Reshape(flat), (x,), (dtype,), want)
    check_rows(Reshape(flat), [x], [])
    whole = (shape[0], 1, flat[1], 1)
    assert Reshape(whole).infer(kind(x, dtype)).shape == whole


# --- what is refused --------------------------------------------------------------------------------------------


def t(dtype: DType, *shape: int) -> TensorType:
    return TensorType(dtype, shape)


I4, I8, U8, I16, I32 = DType.I4, DType.I8, DType.U8, DType.I16, DType.I32
CONV = Conv((1, 1), (0, 0, 0, 0), (1, 1))
POOL = MaxPool((2, 2), (2, 2), (0, 0, 0, 0), (1, 1))
IMAGE, KERNEL, BIAS = t(I8, 1, 4, 4, 2), t(I8, 3, 2, 2, 2), t(I32, 3)


def requant(**changed: Any) -> Rescale:
    fields: dict[str, Any] = {
        "accs": (Acc((1 << 30,)),), "vals": (), "f": (8,),
        "zero_point": 0, "lo": -128, "hi": 127, "out": I8,
    }  # fmt: skip
    return Rescale(**(fields | changed))


ACC = t(I32, 1, 4, 3)
REFUSED: dict[str, tuple[Op, tuple[TensorType, ...], str]] = {
    "Op": (Op(), (IMAGE,), "no operator"),
    "Conv operands": (CONV, (IMAGE, KERNEL), "takes 3 operands, not 2"),
    "Conv wide input": (CONV, (t(I32, 1, 4, 4, 2), KERNEL, BIAS), "Conv of int32"),
    "Conv wide weight": (CONV, (IMAGE, t(I16, 3, 2, 2, 2), BIAS), "by int16"),
    "Conv unsigned weight": (CONV, (IMAGE, t(U8, 3, 2, 2, 2), BIAS), "by uint8"),
    "Conv ranks": (CONV, (t(I8, 1, 4, 2), KERNEL, BIAS), "equal ranks"),
    "Conv flat": (Conv((), (), ()), (t(I8, 1, 2), t(I8, 3, 2), BIAS), "equal ranks"),
    "Conv channels": (CONV, (t(I8, 1, 4, 4, 3), KERNEL, BIAS), "3 channels in 1 groups"),
    "Conv groups": (Conv((1, 1), (0,) * 4, (1, 1), 2), (t(I8, 1, 4, 4, 4), KERNEL, BIAS), "groups"),
    "Conv no groups": (Conv((1, 1), (0,) * 4, (1, 1), 0), (IMAGE, KERNEL, BIAS), "0 groups"),
    "Conv bias": (CONV, (IMAGE, KERNEL, t(I32, 4)), "int32[3] as bias"),
    "Conv bias type": (CONV, (IMAGE, KERNEL, t(I16, 3)), "int32[3] as bias"),
    "Conv pad value": (Conv((1, 1), (0,) * 4, (1, 1), 1, 128), (IMAGE, KERNEL, BIAS), "pad value"),
    "Conv strides": (Conv((1,), (0,) * 4, (1, 1)), (IMAGE, KERNEL, BIAS), "2 spatial axes"),
    "Conv pads": (Conv((1, 1), (0, 0), (1, 1)), (IMAGE, KERNEL, BIAS), "4 pads"),
    "Conv stride 0": (Conv((0, 1), (0,) * 4, (1, 1)), (IMAGE, KERNEL, BIAS), "positive"),
    "Conv dilation 0": (Conv((1, 1), (0,) * 4, (1, 0)), (IMAGE, KERNEL, BIAS), "positive"),
    "Conv negative pad": (Conv((1, 1), (0, 0, 0, -1), (1, 1)), (IMAGE, KERNEL, BIAS), "positive"),
    "Conv too small": (Conv((1, 1), (0,) * 4, (4, 1)), (IMAGE, KERNEL, BIAS), "does not fit"),
    "MatMul operands": (MatMul(), (t(I8, 1, 2), t(I8, 3, 2)), "takes 3 operands"),
    "MatMul types": (MatMul(), (t(I32, 1, 2), t(I8, 3, 2), BIAS), "MatMul of int32"),
    "MatMul weight": (MatMul(), (t(I8, 1, 2), t(U8, 3, 2), BIAS), "by uint8"),
    "MatMul depth": (MatMul(), (t(I8, 1, 3), t(I8, 3, 2), BIAS), "does not fit"),
    "MatMul rank": (MatMul(), (t(I8, 2), t(I8, 3, 2), BIAS), "does not fit"),
    "MatMul bias": (MatMul(), (t(I8, 1, 2), t(I8, 3, 2), t(I32, 2)), "int32[3] as bias"),
    "Rescale operands": (requant(), (ACC, ACC), "got 2 operands"),
    "Rescale of nothing": (requant(accs=()), (), "got 0 operands"),
    "Rescale scalar": (requant(), (t(I32),), "at least one axis"),
    "Rescale narrow accumulator": (requant(), (t(I16, 1, 4, 3),), "accumulator is int32"),
    "Rescale wide value": (requant(vals=(Val((1,)),)), (ACC, ACC), "at most 16 bits"),
    "Rescale shapes": (requant(vals=(Val((1,)),)), (ACC, t(I8, 1, 4, 2)), "do not broadcast"),
    "Rescale small accumulator": (
        requant(vals=(Val((1,)),)), (t(I32, 1, 1, 3), t(I8, 1, 4, 3)), "never broadcast",
    ),
    "Rescale entries": (requant(f=(8, 8)), (ACC,), "1 or 3 entries"),
    "Rescale positions": (requant(f=(8, 8, 8), spatial=True), (ACC,), "1 or 4 entries"),
    "Rescale multiplier entries": (requant(accs=(Acc((1 << 30,) * 2),)), (ACC,), "entries"),
    "Rescale shift entries": (requant(accs=(Acc((1 << 30,), (0, 0)),)), (ACC,), "entries"),
    "Rescale value entries": (requant(vals=(Val((1, 1)),)), (ACC, t(I8, 1, 4, 3)), "entries"),
    "Rescale no f": (requant(f=()), (ACC,), "entries"),
    "Rescale f 0": (requant(f=(0,)), (ACC,), "f lies in 1..30"),
    "Rescale f 31": (requant(f=(31,)), (ACC,), "f lies in 1..30"),
    "Rescale small multiplier": (requant(accs=(Acc(((1 << 30) - 1,)),)), (ACC,), r"[2**30, 2**31)"),
    "Rescale large multiplier": (requant(accs=(Acc((1 << 31,)),)), (ACC,), r"[2**30, 2**31)"),
    "Rescale right shift": (requant(accs=(Acc((1 << 30,), (-1,)),)), (ACC,), "0..31"),
    "Rescale far shift": (requant(accs=(Acc((1 << 30,), (32,)),)), (ACC,), "0..31"),
    "Rescale wide n": (requant(vals=(Val((1 << 31,)),)), (ACC, t(I8, 1, 4, 3)), "32 bits"),
    "Rescale value's zero": (requant(vals=(Val((1,), 128),)), (ACC, t(I8, 1, 4, 3)), "zero point"),
    "Rescale far zero": (requant(zero_point=(1 << 30) + 1), (ACC,), "may leave 32 bits"),
    "Rescale clamp": (requant(hi=128), (ACC,), "is not in int8"),
    "Rescale empty clamp": (requant(lo=1, hi=0), (ACC,), "is not in int8"),
    "Mul operands": (Mul(0, 0), (IMAGE,), "takes 2 operands"),
    "Mul wide": (Mul(0, 0), (t(I16, 1, 4, 4, 2),) * 2, "at most 16 bits by at most 8 bits"),
    "Mul wider": (Mul(0, 0), (IMAGE, t(I32, 1, 4, 4, 2)), "at most 16 bits by at most 8 bits"),
    "Mul shapes": (Mul(0, 0), (IMAGE, t(I8, 3)), "do not broadcast"),
    "Mul zero of x": (Mul(200, 0), (IMAGE, IMAGE), "zero point 200 is no int8"),
    "Mul zero of y": (Mul(0, -9), (IMAGE, t(I4, 1, 4, 4, 2)), "zero point -9 is no int4"),
    "Lut operands": (Lut(), (IMAGE,), "takes 2 operands"),
    "Lut wide": (Lut(), (t(I16, 4), t(I8, 65536)), "at most 8 bits"),
    "Lut short": (Lut(), (IMAGE, t(I8, 255)), "256 entries"),
    "MaxPool operands": (POOL, (IMAGE, IMAGE), "takes 1 operands"),
    "MaxPool flat": (MaxPool((), (), (), ()), (t(I8, 1, 2),), "spatial axes"),
    "MaxPool border": (MaxPool((2, 2), (1, 1), (2, 0, 0, 0), (1, 1)), (IMAGE,), "border"),
    "MaxPool end border": (MaxPool((2, 2), (1, 1), (0, 0, 0, 2), (1, 1)), (IMAGE,), "border"),
    "MaxPool between taps": (MaxPool((2,), (1,), (1, 1), (2,)), (t(I8, 1, 1, 1),), "border"),
    "SumPool operands": (SumPool((1,), (1,), (0, 0), 0), (), "takes 1 operands"),
    "SumPool wide": (SumPool((2,), (1,), (0, 0), 0), (t(I32, 1, 4, 1),), "at most 16 bits"),
    "SumPool zero": (SumPool((2,), (1,), (0, 0), -1), (t(U8, 1, 4, 1),), "zero point"),
    "SumPool too small": (SumPool((5,), (1,), (0, 0), 0), (t(I8, 1, 4, 1),), "does not fit"),
    "Softmax operands": (Softmax(20, I8), (t(I8, 1, 4),), "takes 2 operands"),
    "Softmax scalar": (Softmax(20, I8), (t(I8), t(I32, 256)), "at least one axis"),
    "Softmax wide": (Softmax(20, I8), (t(I16, 1, 4), t(I32, 65536)), "Softmax of int16"),
    "Softmax to int32": (Softmax(20, I32), (t(I8, 1, 4), t(I32, 256)), "to int32"),
    "Softmax table": (Softmax(20, I8), (t(I8, 1, 4), t(I16, 256)), "Softmax table"),
    "Softmax fraction": (Softmax(-1, I8), (t(I8, 1, 4), t(I32, 256)), "0..30 bits"),
    "Softmax sum": (Softmax(29, I8), (t(I8, 1, 4), t(I32, 256)), "overflows"),
    "Concat of nothing": (Concat(1), (), "takes operands"),
    "Concat rows": (Concat(0), (IMAGE, IMAGE), "axis 0"),
    "Concat axis": (Concat(4), (IMAGE, IMAGE), "axis 4"),
    "Concat shapes": (Concat(3), (IMAGE, t(I8, 1, 4, 3, 2)), "does not fit"),
    "Concat types": (Concat(3), (IMAGE, t(U8, 1, 4, 4, 2)), "does not fit"),
    "Concat ranks": (Concat(1), (t(I8, 2, 3), t(I8, 2)), "does not fit"),
    "Slice operands": (Slice((0,), (1,), (1,)), (), "takes 1 operands"),
    "Slice rank": (Slice((0,), (1,), (1,)), (IMAGE,), "Slice of"),
    "Slice range": (Slice((0,), (5,), (1,)), (t(I8, 1, 4),), "leaves"),
    "Slice negative": (Slice((-1,), (4,), (1,)), (t(I8, 1, 4),), "leaves"),
    "Slice empty": (Slice((2,), (2,), (1,)), (t(I8, 1, 4),), "leaves"),
    "Slice step": (Slice((0,), (4,), (0,)), (t(I8, 1, 4),), "leaves"),
    "Pad operands": (Pad((0, 0), 0), (), "takes 1 operands"),
    "Pad rank": (Pad((0, 0), 0), (IMAGE,), "Pad of"),
    "Pad negative": (Pad((0, -1), 0), (t(I8, 1, 4),), "Pad of"),
    "Pad value": (Pad((0, 1), 8), (t(I4, 1, 4),), "pad value 8 is no int4"),
    "Reshape operands": (Reshape((-1, 2)), (), "takes 1 operands"),
    "Reshape to nothing": (Reshape(()), (IMAGE,), "Reshape of"),
    "Reshape hole": (Reshape((1, -1)), (IMAGE,), "Reshape of"),
    "Reshape size": (Reshape((-1, 5)), (IMAGE,), "cannot be reshaped"),
    "Reshape lead": (Reshape((2, 32)), (IMAGE,), "cannot be reshaped"),
    "Transpose operands": (Transpose((0, 1)), (), "takes 1 operands"),
    "Transpose perm": (Transpose((0, 1, 1)), (t(I8, 1, 2, 3),), "by (0, 1, 1)"),
    "Transpose rank": (Transpose((0, 1)), (t(I8, 1, 2, 3),), "by (0, 1)"),
    "Transpose rows": (Transpose((1, 0)), (t(I8, 1, 2),), "moves the rows"),
    "Take operands": (Take(1, (0,)), (), "takes 1 operands"),
    "Take rows": (Take(0, (0,)), (IMAGE,), "along axis 0"),
    "Take axis": (Take(4, (0,)), (IMAGE,), "along axis 4"),
    "Take of nothing": (Take(1, ()), (IMAGE,), "takes no index"),
    "Take negative": (Take(1, (0, -1)), (IMAGE,), "indices -1 to 0 leaves axis 1"),
    "Take beyond": (Take(3, (2, 0)), (IMAGE,), "indices 0 to 2 leaves axis 3"),
    "Extreme operands": (Extreme(True), (IMAGE,), "takes 2 operands"),
    "Extreme types": (Extreme(True), (IMAGE, t(U8, 1, 4, 4, 2)), "of one type"),
    "Extreme shapes": (Extreme(False), (IMAGE, t(I8, 1, 4, 4, 1)), "of one type"),
    "ArgExtreme operands": (ArgExtreme(1, True, False), (), "takes 1 operands"),
    "ArgExtreme rows": (ArgExtreme(0, True, False), (IMAGE,), "along axis 0"),
    "ArgExtreme axis": (ArgExtreme(4, True, False), (IMAGE,), "along axis 4"),
    "BatchMatMul operands": (BatchMatMul(0, 0), (IMAGE,), "takes 2 operands"),
    "BatchMatMul wide": (BatchMatMul(0, 0), (t(I16, 1, 2, 2), t(I8, 1, 2, 2)), "at most 8 bits"),
    "BatchMatMul rank": (BatchMatMul(0, 0), (t(I8, 2, 2), t(I8, 2, 2)), "does not fit"),
    "BatchMatMul ranks": (BatchMatMul(0, 0), (t(I8, 1, 2, 2), t(I8, 1, 1, 2, 2)), "does not fit"),
    "BatchMatMul lead": (BatchMatMul(0, 0), (t(I8, 1, 3, 2, 2), t(I8, 1, 2, 2, 2)), "does not fit"),
    "BatchMatMul depth": (BatchMatMul(0, 0), (t(I8, 1, 2, 3), t(I8, 1, 2, 2)), "does not fit"),
    "BatchMatMul zero of x": (BatchMatMul(128, 0), (t(I8, 1, 2, 2),) * 2, "zero point 128"),
    "BatchMatMul zero of y": (BatchMatMul(0, -9), (t(I4, 1, 2, 2),) * 2, "zero point -9"),
    "BatchMatMul sum": (
        BatchMatMul(-128, 0), (t(I8, 1, 1, 33026), t(U8, 1, 33026, 1)), "may leave 32 bits",
    ),
    "Normalize operands": (Normalize(8, 1, I8), (), "takes 1 operands"),
    "Normalize rank": (Normalize(8, 1, I8), (t(I8, 4),), "wants rows"),
    "Normalize wide": (Normalize(8, 1, I8), (t(I32, 1, 4),), "Normalize of int32"),
    "Normalize result": (Normalize(8, 1, U8), (t(I8, 1, 4),), "to uint8"),
    "Normalize fraction": (Normalize(16, 1, I16), (t(I8, 1, 4),), "0..15 fractional bits"),
    "Normalize negative fraction": (Normalize(-1, 1, I16), (t(I8, 1, 4),), "0..15 fractional bits"),
    "Normalize epsilon": (Normalize(8, 0, I16), (t(I8, 1, 4),), "epsilon of at least 1"),
    "Normalize length": (Normalize(8, 1, I16), (t(I16, 1, 57345),), "may leave 64 bits"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_infer_refuses_with_a_sentence(case: str) -> None:
    op, ins, part = REFUSED[case]
    with pytest.raises(TypeError) as e:
        op.infer(*ins)
    assert part in str(e.value)


GOOD: dict[str, tuple[Op, tuple[TensorType, ...], TensorType]] = {
    "Conv": (CONV, (IMAGE, KERNEL, BIAS), t(I32, 1, 3, 3, 3)),
    "MatMul": (MatMul(), (t(I8, 1, 2), t(I4, 3, 2), BIAS), t(I32, 1, 3)),
    "Rescale": (requant(f=(8, 8, 8)), (ACC,), t(I8, 1, 4, 3)),
    "Rescale by position": (requant(f=(8,) * 4, spatial=True), (ACC,), t(I8, 1, 4, 3)),
    "MaxPool": (POOL, (IMAGE,), t(I8, 1, 2, 2, 2)),
    "Softmax": (Softmax(28, I16), (t(U8, 1, 4), t(I32, 256)), t(I16, 1, 4)),
}  # fmt: skip


@pytest.mark.parametrize("case", GOOD)
def test_what_the_refused_are_variants_of_is_accepted(case: str) -> None:
    op, ins, out = GOOD[case]
    assert op.infer(*ins) == out


def test_every_operator_is_refused_something_here() -> None:
    assert {type(op) for op, _, _ in REFUSED.values()} == {Op, *ops.OPS}


@pytest.mark.parametrize("make", [lambda: POOL, requant, lambda: CONV])
def test_equal_operators_are_one_key(make: Callable[[], Op]) -> None:
    assert len({make(), make(), Reshape((1, 2))}) == 2
