"""What is proved is true, on corners and random data, and not much weaker than the truth."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qcompile.ir import (
    ArgExtreme,
    Array,
    BatchMatMul,
    Concat,
    Conv,
    DType,
    Extreme,
    Graph,
    Lut,
    MatMul,
    MaxPool,
    Mul,
    Pad,
    Port,
    Rescale,
    Reshape,
    Slice,
    Softmax,
    SumPool,
    Take,
    TensorType,
    Transpose,
    Value,
)
from qcompile.ir.arith import Acc, AccOperand, NoRoom, Val, ValOperand, fit_rescale
from qcompile.ir.proof import accumulator_bound, code_range, prove, prove_rescale

CASES = settings(deadline=None, derandomize=True, max_examples=100)
I8, U8, I16, I32 = DType.I8, DType.U8, DType.I16, DType.I32
LIMIT = 1 << 31
Ints = tuple[int, ...]


def constant(graph: Graph, array: Array, dtype: DType, name: str = "c") -> Value:
    return graph.constant(array.astype(dtype.numpy), TensorType(dtype, array.shape), name)


def source(graph: Graph, dtype: DType, *shape: int, name: str = "x") -> Value:
    return graph.add_input(Port(name, 1.0, 0), TensorType(dtype, shape))


def clamped(graph: Graph, x: Value, lo: int, hi: int) -> Value:
    """The same codes, known to lie in [lo, hi]."""
    op = Rescale((), (Val((2,)),), (1,), 0, lo, hi, x.type.dtype)
    return graph.add(op, x, name="clamped")


# --- ranges of codes --------------------------------------------------------------------------------------------


def test_code_range_follows_clamps_and_tables() -> None:
    graph = Graph("ranges")
    x = source(graph, I8, 1, 4, 4, 2)
    assert code_range(x) == (-128, 127)
    y = clamped(graph, x, -3, 90)
    assert code_range(y) == (-3, 90)
    assert code_range(graph.add(MaxPool((2, 2), (2, 2), (0,) * 4, (1, 1)), y, name="m")) == (-3, 90)
    assert code_range(graph.add(Slice((0, 0, 0), (2, 4, 2), (1, 1, 1)), y, name="s")) == (-3, 90)
    assert code_range(graph.add(Transpose((0, 3, 1, 2)), y, name="t")) == (-3, 90)
    assert code_range(graph.add(Reshape((-1, 32)), y, name="r")) == (-3, 90)
    assert code_range(graph.add(Pad((1, 0, 0, 0, 0, 0), -7), y, name="p")) == (-7, 90)
    assert code_range(graph.add(Pad((1, 0, 0, 0, 0, 0), 99), y, name="q")) == (-3, 99)
    z = clamped(graph, x, 5, 100)
    assert code_range(graph.add(Concat(1), y, z, name="j")) == (-3, 100)
    table = constant(graph, np.arange(256) % 50 - 20, I8)
    assert code_range(graph.add(Lut(), y, table, name="l")) == (-20, 29)
    assert code_range(constant(graph, np.array([4, 9]), I8)) == (0, 9)
    assert code_range(graph.add(Take(1, (2, 0)), y, name="k")) == (-3, 90)
    assert code_range(graph.add(Extreme(True), y, z, name="a")) == (5, 100)
    assert code_range(graph.add(Extreme(False), y, z, name="b")) == (-3, 90)
    assert code_range(graph.add(ArgExtreme(2, True, False), y, name="i")) == (0, 3)
    ones = constant(graph, np.ones(256, np.int64), I32)
    assert code_range(graph.add(Softmax(20, I16), y, ones, name="e")) == (-32768, 32767)


# --- accumulators -----------------------------------------------------------------------------------------------


def spans(dtype: DType) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(dtype.lo, dtype.hi), st.integers(dtype.lo, dtype.hi)).map(
        lambda p: (min(p), max(p))
    )


def partial_sums(b: int, terms: Sequence[int]) -> tuple[int, int]:
    """The least and greatest sum of any subset of terms, with and without the bias."""
    every = [b, *terms]
    return sum(t for t in every if t < 0), sum(t for t in every if t > 0)


def extreme(b: int, w: Sequence[int], lo: int, hi: int) -> int:
    """The largest magnitude of a partial sum over all inputs in [lo, hi]: each term is at an end of its range."""
    down = partial_sums(b, [min(v * lo, v * hi) for v in w])[0]
    up = partial_sums(b, [max(v * lo, v * hi) for v in w])[1]
    return max(-down, up)


@CASES
@given(st.sampled_from([I8, U8, I16]).flatmap(lambda d: st.tuples(st.just(d), spans(d))), st.data())
def test_bound_of_matmul_is_true_and_tight(case: tuple[DType, Ints], data: st.DataObject) -> None:
    dtype, (lo, hi) = case
    k = data.draw(st.integers(1, 6))
    w = np.array([[data.draw(st.integers(-128, 127)) for _ in range(k)] for _ in range(2)])
    b = np.array([data.draw(st.integers(-(1 << 20), 1 << 20)) for _ in range(2)])
    graph = Graph("bound")
    x = clamped(graph, source(graph, dtype, 1, k), lo, hi)
    y = graph.add(MatMul(), x, constant(graph, w, I8), constant(graph, b, I32), name="y")
    assert y.producer is not None
    bounds = accumulator_bound(y.producer)
    for o in range(2):
        reached = extreme(int(b[o]), w[o].tolist(), lo, hi)
        assert reached <= bounds[o]
        if lo <= 0 <= hi and min(-lo, hi) * 2 >= max(-lo, hi):
            assert reached * 2 >= bounds[o]  # both signs of the operand are nearly there
    graph.add_output(Port("y", 1.0, 0), y)
    (proof,) = prove(graph)
    assert (proof.node, proof.bound) == ("y", max(bounds))
    assert -(1 << (proof.bits - 1)) <= -proof.bound <= proof.bound < 1 << (proof.bits - 1)


def test_every_order_of_summation_stays_inside() -> None:
    """Literally: all orders, all corner inputs, every prefix."""
    w, b, lo, hi = [7, -5, 3], 11, -128, 127
    graph = Graph("orders")
    x = source(graph, I8, 1, 3)
    y = graph.add(
        MatMul(),
        x,
        constant(graph, np.array([w]), I8),
        constant(graph, np.array([b]), I32),
        name="y",
    )
    assert y.producer is not None
    (bound,) = accumulator_bound(y.producer)
    worst = 0
    for corner in np.ndindex(2, 2, 2):
        terms = [b, *(v * (hi if c else lo) for v, c in zip(w, corner, strict=True))]
        for order in permutations(terms):
            worst = max(worst, int(np.abs(np.cumsum(order)).max()))
    assert worst <= bound <= worst * 1.02


@CASES
@given(st.integers(-128, 127), st.integers(-40, 60), st.booleans(), st.integers(0, 1 << 30))
def test_bound_of_conv_counts_the_border(fill: int, hi: int, deep: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lo = hi - int(rng.integers(0, 40))
    groups = 1 if deep else 2
    w = rng.integers(-127, 128, (4, 2, 2, 2 // groups))
    b = rng.integers(-5000, 5000, 4)
    graph = Graph("conv")
    x = clamped(graph, source(graph, I8, 6, 3, 3, 2), lo, hi)
    op = Conv((1, 1), (1, 0, 1, 1), (1, 1), groups, fill)
    y = graph.add(op, x, constant(graph, w, I8), constant(graph, b, I32), name="y")
    graph.add_output(Port("y", 1.0, 0), y)
    assert y.producer is not None
    bounds = accumulator_bound(y.producer)
    feeds = rng.choice([-128, 127], (6, 3, 3, 2)).astype(np.int8)
    assert (np.abs(graph.run({"x": feeds})["y"]).reshape(-1, 4).max(axis=0) <= bounds).all()
    for o in range(4):
        flat = w[o].ravel().tolist()
        reached = extreme(int(b[o]), flat, min(lo, fill), max(hi, fill))
        assert reached <= bounds[o]


@CASES
@given(spans(I8), spans(U8), st.integers(-128, 127), st.integers(0, 255), st.integers(1, 9))
def test_bounds_of_products_and_sums_are_reached(
    xs: Ints, ys: Ints, zx: int, zy: int, k: int
) -> None:
    graph = Graph("mul")
    x = clamped(graph, source(graph, I8, 1, k, 1), *xs)
    y = clamped(graph, source(graph, U8, 1, k, 1, name="y"), *ys)
    product = graph.add(Mul(zx, zy), x, y, name="product")
    pool = graph.add(SumPool((k,), (1,), (0, 0), zx), x, name="pool")
    assert product.producer is not None
    assert pool.producer is not None
    ends = [abs((a - zx) * (b - zy)) for a in xs for b in ys]
    assert accumulator_bound(product.producer).tolist() == [max(ends)]
    assert accumulator_bound(pool.producer).tolist() == [k * max(abs(a - zx) for a in xs)]
    assert code_range(product) == (-max(ends), max(ends))
    row, column = (
        graph.add(Reshape(shape), v, name=f"{v.name}.as")
        for v, shape in ((x, (-1, 1, k)), (y, (-1, k, 1)))
    )
    whole = graph.add(BatchMatMul(zx, zy), row, column, name="whole")
    assert whole.producer is not None
    assert accumulator_bound(whole.producer).tolist() == [k * max(ends)]
    graph.add_output(Port("whole", 1.0, 0), whole)
    assert [p.bound for p in prove(graph) if p.node == "whole"] == [k * max(ends)]


def test_a_sum_of_exponentials_is_an_accumulator_too() -> None:
    def built(entries: Array, width: int) -> Graph:
        graph = Graph("softmax")
        x = source(graph, I8, 1, width)
        table = constant(graph, entries, I32)
        graph.add_output(Port("y", 1.0, 0), graph.add(Softmax(20, I8), x, table, name="soft"))
        return graph

    falling = (1 << 20) >> np.minimum(np.arange(256), 20)
    (proof,) = prove(built(falling, 10))
    assert (proof.node, proof.bound, proof.bits) == ("soft", 10 << 20, 25)
    with pytest.raises(OverflowError, match=r"soft.*beyond 32 bits"):
        prove(built(falling << 10, 10))
    for wrong in (falling - 2, falling - (1 << 20), np.where(falling == falling[0], 0, falling)):
        with pytest.raises(TypeError, match="exponentials"):
            prove(built(wrong, 10))


@pytest.mark.parametrize(("bias", "fits"), [(1, True), (2, False), (-1, True), (-2, False)])
def test_prove_raises_at_exactly_32_bits(bias: int, fits: bool) -> None:
    """2**31 - 2 from the products; one more is the largest an int32 holds with either sign."""
    graph = Graph("edge")
    x = clamped(graph, source(graph, I16, 1, 1), -2, 2)
    w = constant(graph, np.array([[1]]), I8)
    b = constant(graph, np.array([np.sign(bias) * (LIMIT - 4 + abs(bias))]), I32)
    graph.add_output(Port("y", 1.0, 0), graph.add(MatMul(), x, w, b, name="y", layer="fc <1>"))
    if fits:
        (proof,) = prove(graph)
        assert (proof.bound, proof.bits) == (LIMIT - 1, 32)
    else:
        with pytest.raises(OverflowError, match=f"fc <1> may reach {LIMIT},"):
            prove(graph)


def test_what_makes_no_accumulator_is_refused() -> None:
    graph = Graph("none")
    y = graph.add(Reshape((-1, 2, 2)), source(graph, I8, 1, 4), name="y")
    assert y.producer is not None
    with pytest.raises(TypeError, match="y makes no accumulator"):
        accumulator_bound(y.producer)


# --- sums of a rescale ------------------------------------------------------------------------------------------


def worst_sum(op: Rescale, bounds: Sequence[Sequence[int]], spans: Sequence[Ints]) -> int:
    """The largest |T| + 2**(f-1) over all corner operands, by entries of per-channel parameters."""

    def at(row: Sequence[int], c: int) -> int:
        return row[c] if len(row) > 1 else row[0]

    rows = [op.f, *(r for a in op.accs for r in (a.multiplier, a.pre_shift)), *bounds]
    worst = 0
    for c in range(max(map(len, [*rows, *(v.multiplier for v in op.vals)]))):
        low = high = 0
        for a, bound in zip(op.accs, bounds, strict=True):
            ends = [
                s * at(bound, c) * 2 ** at(a.pre_shift, c) * at(a.multiplier, c) // 2**32
                for s in (-1, 1)
            ]
            low, high = low + min(ends), high + max(ends)
        for v, span in zip(op.vals, spans, strict=True):
            ends = [(x - v.zero_point) * at(v.multiplier, c) for x in span]
            low, high = low + min(ends), high + max(ends)
        worst = max(worst, max(-low, high) + (1 << (at(op.f, c) - 1)))
    return worst


@CASES
@given(st.data())
def test_prove_rescale_is_sound_and_close(data: st.DataObject) -> None:
    """With subtracted values, several accumulators and per-channel parameters."""
    channels = data.draw(st.integers(1, 3))
    row = st.sampled_from([1, channels])

    def entries(lo: int, hi: int) -> Ints:
        return tuple(data.draw(st.integers(lo, hi)) for _ in range(data.draw(row)))

    graph = Graph("sum")
    x = source(graph, I8, 1, 2)
    accs, operands, bounds = [], [], []
    for _ in range(data.draw(st.integers(0, 2))):
        w = np.array([[data.draw(st.integers(-127, 127)) for _ in "ab"] for _ in range(channels)])
        b = np.array([data.draw(st.integers(-(1 << 27), 1 << 27)) for _ in range(channels)])
        acc = graph.add(MatMul(), x, constant(graph, w, I8), constant(graph, b, I32), name="acc")
        assert acc.producer is not None
        bounds.append([int(n) for n in accumulator_bound(acc.producer)])
        operands.append(acc)
        accs.append(Acc(entries(1 << 30, LIMIT - 1), entries(0, 5)))
    vals, ranges = [], []
    for i in range(data.draw(st.integers(0 if accs else 1, 2))):
        dtype = data.draw(st.sampled_from([I8, U8, I16]))
        lo, zero, hi = sorted(data.draw(st.integers(dtype.lo, dtype.hi)) for _ in range(3))
        operands.append(clamped(graph, source(graph, dtype, 1, channels, name=f"v{i}"), lo, hi))
        ranges.append((lo, hi))
        vals.append(Val(entries(-(1 << 15), 1 << 15), zero))
    op = Rescale(tuple(accs), tuple(vals), entries(1, 30), 0, -128, 127, I8)
    made = graph.add(op, *operands, name="y")
    assert made.producer is not None
    worst = worst_sum(op, bounds, ranges)
    shifted = max(
        (b * 2 ** max(a.pre_shift) for a, bs in zip(accs, bounds, strict=True) for b in bs),
        default=0,
    )
    try:
        proved = prove_rescale(made.producer)
    except OverflowError:
        # every bound is taken with its worst sign, so that it may be up to twice what is met
        assert worst * 2 + 4 * len(accs) >= LIMIT or shifted >= LIMIT
    else:
        assert worst <= proved < LIMIT
        assert proved <= worst * 2 + 4 * len(accs)


@CASES
@given(
    st.lists(st.fractions(min_value=Fraction(1, 1 << 20), max_value=2), min_size=2, max_size=2),
    st.fractions(min_value=Fraction(1, 1 << 10), max_value=16),
    st.integers(-128, 127),
    st.sampled_from([1, -1]),
)
def test_what_fit_rescale_chooses_is_proved(
    scales: list[Fraction], skip: Fraction, zero: int, sign: int
) -> None:
    graph = Graph("fit")
    x = source(graph, I8, 1, 2)
    skipped = source(graph, I8, 1, 2, name="skip")
    w = constant(graph, np.array([[127, -127], [3, 4]]), I8)
    acc = graph.add(MatMul(), x, w, constant(graph, np.array([70000, -1]), I32), name="acc")
    assert acc.producer is not None
    bound = tuple(int(b) for b in accumulator_bound(acc.producer))
    try:
        fit = fit_rescale(
            [AccOperand(tuple(scales), bound)],
            [ValOperand(skip, zero, -128, 127)],
            bits=16,
        )
    except NoRoom:
        assume(False)
    vals = tuple(Val(tuple(sign * n for n in v.multiplier), v.zero_point) for v in fit.vals)
    op = Rescale(fit.accs, vals, fit.f, 0, -128, 127, I8)
    made = graph.add(op, acc, skipped, name="y")
    assert made.producer is not None
    assert prove_rescale(made.producer) < LIMIT


def test_a_subtracted_value_counts_as_much_as_an_added_one() -> None:
    def bound(n: int) -> int:
        graph = Graph("signs")
        xs = [source(graph, I8, 1, 2, name=name) for name in "ab"]
        op = Rescale((), (Val((1000,)), Val((n,))), (8,), 0, -128, 127, I8)
        made = graph.add(op, *xs, name="y")
        assert made.producer is not None
        return prove_rescale(made.producer)

    assert bound(-1000) == bound(1000) == 2 * 128 * 1000 + 128


def test_positions_are_not_channels_even_where_there_are_as_many() -> None:
    """Four positions and four channels: every position meets the widest channel."""
    graph = Graph("positions")
    x = source(graph, I8, 1, 2, 2, 1)
    w = constant(graph, np.array([1, 1, 1, 127]).reshape(4, 1, 1, 1), I8)
    b = constant(graph, np.zeros(4, np.int64), I32)
    acc = graph.add(Conv((1, 1), (0,) * 4, (1, 1)), x, w, b, name="acc")
    op = Rescale((Acc((1 << 30,), (18, 5, 5, 5)),), (), (9,), 0, -128, 127, I8, spatial=True)
    made = graph.add(op, acc, name="y")
    assert made.producer is not None
    with pytest.raises(OverflowError, match="y: a shifted accumulator may reach"):
        prove_rescale(made.producer)


def test_channels_may_differ_in_nothing_but_the_first_shift() -> None:
    graph = Graph("shifts")
    w = constant(graph, np.array([[1], [100]]), I8)
    acc = graph.add(
        MatMul(),
        source(graph, I8, 1, 1),
        w,
        constant(graph, np.zeros(2, np.int64), I32),
        name="acc",
    )
    op = Rescale((Acc((1 << 30,), (9, 2)),), (), (1,), 0, -128, 127, I8)
    made = graph.add(op, acc, name="y")
    assert made.producer is not None
    assert prove_rescale(made.producer) == max(128 << 9, 12800 << 2) // 4 + 1 + 1


def test_an_accumulator_may_be_moved_before_it_is_rescaled() -> None:
    graph = Graph("moved")
    x = source(graph, I8, 1, 2)
    w = constant(graph, np.array([[100, 100], [1, 1]]), I8)
    acc = graph.add(MatMul(), x, w, constant(graph, np.zeros(2, np.int64), I32), name="acc")
    turned = graph.add(Reshape((-1, 2, 1)), acc, name="turned")
    made = graph.add(Rescale((Acc((1 << 30,)),), (), (1,), 0, -128, 127, I8), turned, name="y")
    assert made.producer is not None
    assert prove_rescale(made.producer) == (25600 << 30 >> 32) + 1 + 1
    raw = source(graph, I32, 1, 2, name="raw")
    wide = graph.add(Rescale((Acc((LIMIT - 1,)),), (), (1,), 0, -128, 127, I8), raw, name="z")
    assert wide.producer is not None
    with pytest.raises(OverflowError, match="z: a shifted accumulator"):
        prove_rescale(wide.producer)
