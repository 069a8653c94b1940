"""The integer ONNX model equals the interpreter on every element, in every onnxruntime it is made for.

Graphs are drawn by `random.Random`, so that hypothesis can search and shrink them and a fixed set of seeds can be sent
to an onnxruntime of another release, or of this release on an emulated machine without VNNI.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from qcompile.ir import (
    ArgExtreme,
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
    Normalize,
    Op,
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
from qcompile.ir.arith import Acc, AccOperand, Val, ValOperand, fit_rescale
from qcompile.ir.proof import accumulator_bound, code_range, prove, prove_rescale
from qcompile.onnx.integer import export
from qcompile.targets.onnx.floats import certify
from tests.onnxruntimes import Feeds, compare, haswell, oldest, save

Ints = NDArray[np.signedinteger | np.unsignedinteger]

Case = tuple[Graph, Feeds]

LEVELS = (
    ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
)
"""None, and what a session does by default."""

ACTIVATIONS = (DType.I8, DType.I8, DType.U8, DType.I16, DType.I4)


# --- drawing ----------------------------------------------------------------------------------------------------


def codes(r: random.Random, lo: int, hi: int, shape: tuple[int, ...], dtype: DType) -> Ints:
    """Any codes, or only the two extremes."""
    rng = np.random.default_rng(r.randint(0, 1 << 30))
    if r.randint(0, 2) == 0:
        return rng.choice(np.array([lo, hi]), shape).astype(dtype.numpy)
    return rng.integers(lo, hi, shape, endpoint=True).astype(dtype.numpy)


def port(name: str) -> Port:
    return Port(name, 0.25, 0)


def feed(r: random.Random, v: Value, rows: int, limit: int | None = None) -> Ints:
    dtype = v.type.dtype
    lo, hi = (dtype.lo, dtype.hi) if limit is None else (-limit, limit - 1)
    return codes(r, lo, hi, (rows, *v.type.shape[1:]), dtype)


def image(r: random.Random, dtype: DType, ranks: tuple[int, ...] = (1, 2, 2, 3)) -> TensorType:
    spatial = tuple(r.randint(1, 7) for _ in range(r.choice(ranks)))
    return TensorType(dtype, (1, *spatial, r.randint(1, 6)))


def unary(r: random.Random, kind: TensorType, op: Op, *constants: Value | Ints) -> Case:
    """A graph of one operator of one input and constants."""
    graph = Graph("one")
    x = graph.add_input(port("x"), kind)
    fixed = [
        c if isinstance(c, Value) else graph.constant(c, TensorType(_storage(c), c.shape), f"c{i}")
        for i, c in enumerate(constants)
    ]
    graph.add_output(port("y"), graph.add(op, x, *fixed, name="y"))
    graph.verify()
    return graph, {"x": feed(r, x, r.randint(1, 3))}


def _storage(a: Ints) -> DType:
    return next(d for d in (DType.I8, DType.U8, DType.I16, DType.I32) if d.numpy == a.dtype)


def window(
    r: random.Random, spatial: tuple[int, ...], dilate: bool
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Kernel, strides, pads and dilations that fit and leave no window wholly in the border."""
    kernel, strides, begins, ends, dilations = [], [], [], [], []
    for n in spatial:
        k = r.choice([1, min(2, n), min(3, n), n])
        d = r.choice([1, 1, 2, 3]) if dilate and k > 1 and (k - 1) * 3 < n else 1
        free = r.randint(0, 1) if d == 1 else 0
        kernel.append(k)
        dilations.append(d)
        strides.append(r.randint(1, 3))
        begins.append(min(r.randint(0, 2), k - 1) * free)
        ends.append(min(r.randint(0, 2), k - 1) * free)
    return tuple(kernel), tuple(strides), (*begins, *ends), tuple(dilations)


def conv(r: random.Random) -> Case:
    kind = image(r, r.choice(ACTIVATIONS))
    spatial, channels = kind.shape[1:-1], kind.shape[-1]
    groups = r.choice([1, channels, *(g for g in range(1, channels + 1) if channels % g == 0)])
    outputs = groups * r.randint(1, 4)
    kernel = tuple(r.randint(1, 3) for _ in spatial)
    dilations = tuple(r.randint(1, 3) for _ in spatial)
    need = [(k - 1) * d + 1 - n for k, d, n in zip(kernel, dilations, spatial, strict=True)]
    pads = tuple(max(n, 0) + r.randint(0, 2) for n in need) + tuple(r.randint(0, 2) for _ in need)
    op = Conv(
        tuple(r.randint(1, 3) for _ in spatial),
        pads,
        dilations,
        groups,
        r.choice([0, kind.dtype.lo, kind.dtype.hi, r.randint(kind.dtype.lo, kind.dtype.hi)]),
    )
    w = codes(r, -128, 127, (outputs, *kernel, channels // groups), DType.I8)
    b = codes(r, -(1 << 20), 1 << 20, (outputs,), DType.I32)
    return unary(r, kind, op, w, b)


def matmul(r: random.Random) -> Case:
    shape = tuple(r.randint(1, 40) for _ in range(r.randint(1, 3)))
    kind = TensorType(r.choice(ACTIVATIONS), (1, *shape))
    w = codes(r, -128, 127, (r.randint(1, 9), shape[-1]), DType.I8)
    return unary(r, kind, MatMul(), w, codes(r, -(1 << 20), 1 << 20, (len(w),), DType.I32))


def rescale(r: random.Random) -> Case:
    """Any number of accumulators and values, each near the largest that the contract allows."""
    accs, vals = r.choice([(1, 0), (1, 0), (1, 1), (0, 1), (0, 2), (2, 0), (2, 2), (0, 3)])
    rank = r.randint(1, 3)
    shape = tuple(r.randint(1, 5) for _ in range(rank))
    spatial = rank > 1 and r.random() < 0.4
    entries = int(np.prod(shape[:-1])) if spatial else shape[-1]
    out = r.choice([DType.I8, DType.I8, DType.I16, DType.U8, DType.I4, DType.I32])

    def row(lo: int, hi: int) -> tuple[int, ...]:
        return tuple(r.randint(lo, hi) for _ in range(r.choice([1, entries])))

    graph, feeds, rows = Graph("one"), {}, r.randint(1, 3)
    room = 30 - (accs + vals - 1).bit_length()
    ins: list[Value] = []
    parts: list[Acc] = []
    factors: list[Val] = []
    for i in range(accs):
        bits = r.randint(1, room)
        v = graph.add_input(port(f"a{i}"), TensorType(DType.I32, (1, *shape)))
        feeds[f"a{i}"] = feed(r, v, rows, 1 << bits)
        shift = row(room - bits, room - bits) if r.random() < 0.7 else row(0, room - bits)
        parts.append(Acc(row(1 << 30, (1 << 31) - 1), shift))
        ins.append(v)
    for j in range(vals):
        dtype = r.choice([DType.I8, DType.U8, DType.I16])
        # one of the values may be broadcast, but all together must have the whole shape
        whole = accs or j or r.random() < 0.5
        inner = tuple(n if r.random() < 0.6 else 1 for n in shape) if whole and j != 0 else shape
        v = graph.add_input(port(f"v{j}"), TensorType(dtype, (1, *inner)))
        feeds[f"v{j}"] = feed(r, v, rows)
        most = 1 << (room - 1 - dtype.bits)
        factors.append(Val(row(-most, most), r.randint(dtype.lo, dtype.hi)))
        ins.append(v)
    lo = r.randint(out.lo, out.hi)
    op = Rescale(
        tuple(parts),
        tuple(factors),
        row(1, 30),
        r.randint(-200, 200),
        lo if r.random() < 0.3 else out.lo,
        r.randint(lo, out.hi) if r.random() < 0.3 else out.hi,
        out,
        spatial,
    )
    graph.add_output(port("y"), graph.add(op, *ins, name="y"))
    graph.verify()
    return graph, feeds


def mul(r: random.Random) -> Case:
    shape = tuple(r.randint(1, 5) for _ in range(r.randint(1, 3)))
    graph, rows = Graph("one"), r.randint(1, 3)
    kinds = [r.choice([DType.I8, DType.U8, DType.I4]) for _ in range(2)]
    if r.random() < 0.3:
        kinds[r.randint(0, 1)] = DType.I16
    inner = tuple(n if r.random() < 0.6 else 1 for n in shape)
    x = graph.add_input(port("x"), TensorType(kinds[0], (1, *shape)))
    y = graph.add_input(port("y"), TensorType(kinds[1], (1, *inner)))
    zeros = [r.randint(k.lo, k.hi) for k in kinds]
    graph.add_output(port("z"), graph.add(Mul(*zeros), x, y, name="z"))
    return graph, {"x": feed(r, x, rows), "y": feed(r, y, rows)}


def lut(r: random.Random) -> Case:
    kind = image(r, r.choice([DType.I8, DType.U8, DType.I4, DType.I7]))
    out = r.choice([DType.I8, DType.U8, DType.I16, DType.I32])
    return unary(r, kind, Lut(), codes(r, out.lo, out.hi, (1 << kind.dtype.bits,), out))


def max_pool(r: random.Random) -> Case:
    kind = image(r, r.choice((*ACTIVATIONS, DType.I32)))
    kernel, strides, pads, dilations = window(r, kind.shape[1:-1], True)
    return unary(r, kind, MaxPool(kernel, strides, pads, dilations))


def sum_pool(r: random.Random) -> Case:
    kind = image(r, r.choice(ACTIVATIONS))
    kernel, strides, pads, _ = window(r, kind.shape[1:-1], False)
    zero = r.randint(kind.dtype.lo, kind.dtype.hi)
    return unary(r, kind, SumPool(kernel, strides, pads, zero))


def softmax(r: random.Random) -> Case:
    dtype = r.choice([DType.I8, DType.U8, DType.I4])
    classes = r.choice([1, 2, 3, 10, 200])
    fraction = r.randint(10, 30 - (classes - 1).bit_length())
    step = r.choice([0.001, 0.05, 0.3, 2.0])
    table = np.rint(np.exp(-np.arange(1 << dtype.bits) * step) * (1 << fraction)).astype(np.int32)
    rows = tuple(r.randint(1, 4) for _ in range(r.randint(0, 2)))
    kind = TensorType(dtype, (1, *rows, classes))
    return unary(r, kind, Softmax(fraction, r.choice([DType.I8, DType.I16])), table)


def concat(r: random.Random) -> Case:
    kind = image(r, r.choice(ACTIVATIONS))
    axis = r.randint(1, len(kind.shape) - 1)
    graph, rows, feeds, ins = Graph("one"), r.randint(1, 3), {}, []
    for i in range(r.randint(1, 4)):
        shape = list(kind.shape)
        shape[axis] = r.randint(1, 4)
        v = graph.add_input(port(f"x{i}"), TensorType(kind.dtype, tuple(shape)))
        feeds[f"x{i}"] = feed(r, v, rows)
        ins.append(v)
    graph.add_output(port("y"), graph.add(Concat(axis), *ins, name="y"))
    return graph, feeds


def cut(r: random.Random) -> Case:
    kind = image(r, r.choice((*ACTIVATIONS, DType.I32)))
    starts = tuple(r.randint(0, n - 1) for n in kind.shape[1:])
    ends = tuple(r.randint(a + 1, n) for a, n in zip(starts, kind.shape[1:], strict=True))
    return unary(r, kind, Slice(starts, ends, tuple(r.randint(1, 3) for _ in starts)))


def pad(r: random.Random) -> Case:
    kind = image(r, r.choice((*ACTIVATIONS, DType.I32)))
    pads = tuple(r.randint(0, 3) for _ in range(2 * len(kind.shape) - 2))
    return unary(r, kind, Pad(pads, r.randint(kind.dtype.lo, kind.dtype.hi)))


def reshape(r: random.Random) -> Case:
    kind = image(r, r.choice((*ACTIVATIONS, DType.I32)))
    rows = r.random() < 0.3
    shape = kind.shape[-1:] if rows else (*kind.shape[2:], kind.shape[1])
    return unary(r, kind, Reshape((-1, *shape)))


def transpose(r: random.Random) -> Case:
    kind = image(r, r.choice((*ACTIVATIONS, DType.I32)))
    perm = list(range(1, len(kind.shape)))
    r.shuffle(perm)
    return unary(r, kind, Transpose((0, *perm)))


def take(r: random.Random) -> Case:
    kind = image(r, r.choice((*ACTIVATIONS, DType.I32)))
    axis = r.randint(1, len(kind.shape) - 1)
    indices = tuple(r.randint(0, kind.shape[axis] - 1) for _ in range(r.randint(1, 9)))
    return unary(r, kind, Take(axis, indices))


def extreme(r: random.Random) -> Case:
    kind = image(r, r.choice((*ACTIVATIONS, DType.I32)))
    graph, rows = Graph("one"), r.randint(1, 3)
    x, y = (graph.add_input(port(name), kind) for name in "xy")
    graph.add_output(port("z"), graph.add(Extreme(r.random() < 0.5), x, y, name="z"))
    return graph, {"x": feed(r, x, rows), "y": feed(r, y, rows)}


def arg_extreme(r: random.Random) -> Case:
    kind = image(r, r.choice((*ACTIVATIONS, DType.I32)))
    axis = r.randint(1, len(kind.shape) - 1)
    return unary(r, kind, ArgExtreme(axis, r.random() < 0.5, r.random() < 0.5))


def batch_matmul(r: random.Random) -> Case:
    lead = (1, *(r.randint(1, 4) for _ in range(r.randint(0, 2))))
    m, k, p = (r.choice([1, 2, 3, 16, 65]) for _ in range(3))
    graph, rows = Graph("one"), r.randint(1, 3)
    kinds = [r.choice([DType.I8, DType.U8, DType.I4]) for _ in range(2)]
    x = graph.add_input(port("x"), TensorType(kinds[0], (*lead, m, k)))
    y = graph.add_input(port("y"), TensorType(kinds[1], (*lead, k, p)))
    zeros = [r.choice([d.lo, d.hi, r.randint(d.lo, d.hi)]) for d in kinds]
    graph.add_output(port("z"), graph.add(BatchMatMul(*zeros), x, y, name="z"))
    return graph, {"x": feed(r, x, rows), "y": feed(r, y, rows)}


def normalize(r: random.Random) -> Case:
    rows = tuple(r.randint(1, 4) for _ in range(r.randint(0, 2)))
    kind = TensorType(r.choice(ACTIVATIONS), (1, *rows, r.choice([1, 2, 3, 64, 1000])))
    epsilon = r.choice([1, r.randint(1, 1 << r.randint(1, 60))])
    return unary(r, kind, Normalize(r.randint(0, 15), epsilon, r.choice([DType.I8, DType.I16])))


OPS: tuple[Callable[[random.Random], Case], ...] = (
    conv, matmul, rescale, mul, lut, max_pool, sum_pool, softmax, concat, cut, pad, reshape, transpose,
    take, extreme, arg_extreme, batch_matmul, normalize,
)  # fmt: skip


def requantize(graph: Graph, r: random.Random, acc: Value, *vals: Value, out: DType) -> Value:
    """A rescale of an accumulator and values whose constants the compiler's own choice proves safe."""
    assert acc.producer is not None
    bound = tuple(int(b) for b in accumulator_bound(acc.producer))
    scales = tuple(Fraction(r.randint(1, 2 * out.hi), max(b, 1)) for b in bound)
    operands = []
    for v in vals:
        lo, hi = code_range(v)
        operands.append(ValOperand(Fraction(r.randint(50, 100), 100), r.randint(lo, hi), lo, hi))
    fit = fit_rescale([AccOperand(scales, bound)], operands, bits=16 if out.bits <= 8 else 24)
    zero = r.randint(out.lo, out.hi)
    op = Rescale(fit.accs, fit.vals, fit.f, zero, r.choice([out.lo, zero]), out.hi, out)
    made = graph.add(op, acc, *vals, name="rescaled")
    assert made.producer is not None
    prove_rescale(made.producer)
    return made


def layer(graph: Graph, r: random.Random, x: Value, out: DType) -> Value:
    """A convolution that keeps the shape, with a skip where it can have one."""
    channels = x.type.shape[-1]
    groups = r.choice([1, channels])
    w = codes(r, -127, 127, (channels, 3, 3, channels // groups), DType.I8)
    b = codes(r, -9999, 9999, (channels,), DType.I32)
    lo, hi = code_range(x)
    op = Conv((1, 1), (1, 1, 1, 1), (1, 1), groups, r.randint(lo, hi))
    acc = graph.add(
        op,
        x,
        graph.constant(w, TensorType(DType.I8, w.shape), "weights"),
        graph.constant(b, TensorType(DType.I32, b.shape), "bias"),
        name="acc",
    )
    skip = [x] if out.bits <= 8 and x.type.dtype.bits <= 8 and r.random() < 0.5 else []
    return requantize(graph, r, acc, *skip, out=out)


def network(r: random.Random) -> Case:
    """A small network with the joins, pools and tables of a real one, in one or two heads."""
    graph = Graph("network")
    shape = (1, r.randint(4, 9), r.randint(4, 9), r.randint(1, 5))
    first = graph.add_input(port("image"), TensorType(r.choice([DType.I8, DType.U8]), shape))
    x = layer(graph, r, first, DType.I8)
    for _ in range(r.randint(1, 5)):
        match r.randint(0, 4):
            case 0 | 1:
                x = layer(graph, r, x, r.choice([DType.I8, DType.I8, DType.I16]))
                if x.type.dtype is DType.I16:
                    x = layer(graph, r, x, DType.I8)
            case 2 if min(x.type.shape[1:3]) > 2:
                x = graph.add(MaxPool((3, 3), (2, 2), (1, 1, 1, 1), (1, 1)), x, name="pooled")
            case 3:
                table = codes(r, -128, 127, (256,), DType.I8)
                fixed = graph.constant(table, TensorType(DType.I8, (256,)), "table")
                x = graph.add(Lut(), x, fixed, name="looked")
            case _:
                x = graph.add(Concat(3), x, layer(graph, r, x, DType.I8), name="joined")
    whole = x.type.shape[1:3]
    pooled = graph.add(SumPool(whole, (1, 1), (0,) * 4, r.randint(-128, 127)), x, name="sum")
    mean = requantize(graph, r, pooled, out=DType.I8)
    flat = graph.add(Reshape((-1, mean.type.shape[-1])), mean, name="flat")
    w = codes(r, -127, 127, (r.randint(2, 10), flat.type.shape[-1]), DType.I8)
    b = codes(r, -9999, 9999, (len(w),), DType.I32)
    acc = graph.add(
        MatMul(),
        flat,
        graph.constant(w, TensorType(DType.I8, w.shape), "weights"),
        graph.constant(b, TensorType(DType.I32, b.shape), "bias"),
        name="acc",
    )
    graph.add_output(port("logits"), requantize(graph, r, acc, out=DType.I16))
    if r.random() < 0.5:
        narrow = requantize(graph, r, acc, out=DType.I8)
        table = np.rint(np.exp(-np.arange(256) * 0.1) * (1 << 20)).astype(np.int32)
        fixed = graph.constant(table, TensorType(DType.I32, (256,)), "exp")
        graph.add_output(
            port("likely"), graph.add(Softmax(20, DType.I8), narrow, fixed, name="soft")
        )
    graph.verify()
    prove(graph)
    return graph, {"image": feed(r, first, r.randint(1, 4))}


# --- comparing --------------------------------------------------------------------------------------------------


def run(model: onnx.ModelProto, feeds: Feeds, level: ort.GraphOptimizationLevel) -> list[Ints]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = level
    data = model.SerializeToString(deterministic=True)
    session = ort.InferenceSession(data, options, ["CPUExecutionProvider"])
    results: list[Ints] = session.run(None, feeds)
    return results


def check(case: Case) -> None:
    graph, feeds = case
    model = export(graph)
    onnx.checker.check_model(model, full_check=True)
    expected = graph.run(feeds)
    assert [o.name for o in model.graph.output] == list(expected)
    for level in LEVELS:
        for name, want, got in zip(
            expected, expected.values(), run(model, feeds, level), strict=True
        ):
            assert got.dtype == want.dtype, (level, name)
            assert got.shape == want.shape, (level, name)
            np.testing.assert_array_equal(got, want, err_msg=f"{name} at {level}")


SEARCH = settings(deadline=None, derandomize=True, max_examples=40)


@pytest.mark.parametrize("make", OPS, ids=lambda f: f.__name__)
def test_operator(make: Callable[[random.Random], Case]) -> None:
    @SEARCH
    @given(st.randoms(use_true_random=False))
    def search(r: random.Random) -> None:
        check(make(r))

    search()


@settings(SEARCH, max_examples=15)
@given(st.integers(0, 1 << 32))
def test_network(seed: int) -> None:
    check(network(random.Random(seed)))


def test_every_operator_is_drawn() -> None:
    from qcompile.ir.ops import OPS as CLOSED

    drawn = {type(n.op) for make in OPS for n in make(random.Random(0))[0].nodes}
    assert drawn == set(CLOSED)


@pytest.mark.parametrize("make", OPS, ids=lambda f: f.__name__)
def test_no_operator_gives_floats(make: Callable[[random.Random], Case], tmp_path: Path) -> None:
    graph, _ = make(random.Random(1))
    (tmp_path / "integer.onnx").write_bytes(export(graph).SerializeToString(deterministic=True))
    assert certify(tmp_path / "integer.onnx").findings == []


# --- the other onnxruntimes -------------------------------------------------------------------------------------


def save_case(folder: Path, name: str, case: Case) -> None:
    graph, feeds = case
    save(folder, name, export(graph), feeds, graph.run(feeds))


def test_oldest_onnxruntime(tmp_path: Path) -> None:
    for make in OPS:
        for seed in range(12):
            save_case(tmp_path, f"{make.__name__}-{seed}", make(random.Random(seed)))
    for seed in range(12):
        save_case(tmp_path, f"network-{seed}", network(random.Random(seed)))
    said = compare([oldest()], tmp_path)
    assert said.startswith("onnxruntime 1.20."), said
    assert said.endswith(" wrong []"), said
    assert int(said.split()[3]) >= 2 * 12 * (len(OPS) + 1)


def extremes(dtype: DType) -> Case:
    """Sums in which every pair of products leaves 16 bits: 255 * 127 * 2 and beyond."""
    graph = Graph("extremes")
    x = graph.add_input(port("x"), TensorType(dtype, (1, 5, 5, 32)))
    for sign, name in ((-128, "low"), (127, "high")):
        w = np.full((16, 3, 3, 32), sign, np.int8)
        fixed = graph.constant(w, TensorType(DType.I8, w.shape), "w")
        zero = graph.constant(np.zeros(16, np.int32), TensorType(DType.I32, (16,)), "b")
        op = Conv((1, 1), (1, 1, 1, 1), (1, 1), 1, dtype.hi)
        made = graph.add(op, x, fixed, zero, name=name)
        graph.add_output(port(name), made)
    flat = graph.add(Reshape((-1, 800)), x, name="flat")
    w = np.where(np.arange(8 * 800).reshape(8, 800) % 5 < 2, -128, 127).astype(np.int8)
    fixed = graph.constant(w, TensorType(DType.I8, w.shape), "w")
    zero = graph.constant(np.zeros(8, np.int32), TensorType(DType.I32, (8,)), "b")
    graph.add_output(port("dense"), graph.add(MatMul(), flat, fixed, zero, name="dense"))
    graph.verify()
    values = [np.full((1, 5, 5, 32), v) for v in (dtype.lo, dtype.hi)]
    return graph, {"x": np.concatenate(values).astype(dtype.numpy)}


def mixed_signs() -> tuple[onnx.ModelProto, Feeds, Feeds]:
    """What the exporter avoids: a product of uint8 codes with int8 weights."""
    w = np.full((64, 16), 127, np.int8)
    x = np.full((8, 64), 255, np.uint8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "mixed",
        [helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, [8, 64])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.INT32, [8, 16])],
        [numpy_helper.from_array(w, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return model, {"x": x}, {"y": x.astype(np.int32) @ w.astype(np.int32)}


@pytest.mark.slow
def test_machine_without_vnni(tmp_path: Path) -> None:
    command = haswell()
    for dtype in (DType.I8, DType.U8, DType.I16):
        save_case(tmp_path, f"extremes-{dtype}", extremes(dtype))
    for seed in range(3):
        save_case(tmp_path, f"network-{seed}", network(random.Random(seed)))
    said = compare(command, tmp_path)
    assert said.endswith(" wrong []"), said
    # the machine that saturates is the one we ran on: there mixed signs are wrong
    control = tmp_path / "control"
    control.mkdir()
    save(control, "mixed", *mixed_signs())
    assert "mixed.onnx" in compare(command, control)


# --- the borders ------------------------------------------------------------------------------------------------


def test_borders_keep_names_types_shapes_and_meaning() -> None:
    hostile = '*/ #include "x"\n<script>'
    graph = Graph("<b>&", free_batch=True)
    x = graph.add_input(Port(hostile, 0.125, -3), TensorType(DType.I4, (1, 2, 3)))
    y = graph.add(Transpose((0, 2, 1)), x, name=hostile, layer=hostile)
    z = graph.add(Transpose((0, 2, 1)), y, name="z", layer=hostile)
    seven = graph.constant(np.full((2,), 7, np.int16), TensorType(DType.I16, (2,)), "seven")
    for name, v in (("z", y), ("first", z), ("again", z), ("same", x), ("fixed", seven)):
        graph.add_output(Port(name, 1.0, 0), v)
    model = export(graph)
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version <= 10
    assert {o.domain: o.version for o in model.opset_import} == {"": 13, "qcompile": 1}
    (fed,) = model.graph.input
    assert fed.name == hostile
    assert fed.type.tensor_type.elem_type == onnx.TensorProto.INT8
    assert [d.dim_param or d.dim_value for d in fed.type.tensor_type.shape.dim] == ["N", 2, 3]
    props = {p.key: json.loads(p.value) for p in model.metadata_props}
    assert props["qcompile.inputs"] == [
        {"name": hostile, "dtype": "int4", "scale": 0.125, "zero_point": -3}
    ]
    assert [p["name"] for p in props["qcompile.outputs"]] == [o.name for o in model.graph.output]
    codes_in = np.arange(-8, 4, dtype=np.int8).reshape(2, 2, 3)
    expected = graph.run({hostile: codes_in})
    for level in LEVELS:
        got = run(model, {hostile: codes_in}, level)
        for name, a, b in zip(expected, expected.values(), got, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)


def test_fixed_batch_is_kept() -> None:
    graph = Graph("fixed", free_batch=False)
    x = graph.add_input(port("x"), TensorType(DType.I8, (3, 4)))
    graph.add_output(port("y"), graph.add(Reshape((2, 6)), x, name="y"))
    model = export(graph)
    dims = [[d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.output]
    assert dims == [[2, 6]]
    check((graph, {"x": np.arange(12, dtype=np.int8).reshape(3, 4)}))


def test_same_graph_same_bytes() -> None:
    first, second = (
        export(network(random.Random(5))[0]).SerializeToString(deterministic=True) for _ in range(2)
    )
    assert first == second


def test_nodes_of_one_signature_share_a_function() -> None:
    graph = Graph("shared")
    x = graph.add_input(port("x"), TensorType(DType.I8, (1, 4, 4, 2)))
    r = random.Random(1)
    for _ in range(4):
        x = layer(graph, r, x, DType.I8)
    wide = graph.add(MaxPool((3, 3), (1, 1), (1,) * 4, (1, 1)), x, name="wide")
    once = graph.add(MaxPool((2, 2), (2, 2), (0,) * 4, (1, 1)), wide, name="once")
    graph.add_output(port("y"), once)
    names = [f.name for f in export(graph).functions]
    assert len(names) == len(set(names))
    assert {"Conv2d_int8", "FloorShift", "MaxPool", "MaxPool_2"} <= set(names)
    assert sum(n.startswith("Conv") for n in names) == 1


def test_int16_products_are_exact_where_the_upper_half_alone_would_overflow() -> None:
    """256 * sum(high byte) leaves 32 bits although the sum of the codes does not."""
    depth = 520
    graph = Graph("deep")
    x = graph.add_input(port("x"), TensorType(DType.I16, (1, depth)))
    w = np.full((1, depth), 127, np.int8)
    b = np.full((1,), (1 << 31) - 1 - 127 * depth * 32512, np.int32)
    fixed = graph.constant(w, TensorType(DType.I8, w.shape), "w")
    bias = graph.constant(b, TensorType(DType.I32, b.shape), "b")
    graph.add_output(port("y"), graph.add(MatMul(), x, fixed, bias, name="y"))
    check((graph, {"x": np.full((1, depth), 32512, np.int16)}))
