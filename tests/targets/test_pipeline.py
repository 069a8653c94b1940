"""The pipeline of streams gives what the graph gives, value by value, for every folding; its widths hold."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import qcompile
from qcompile.errors import BadInput, Unsupported
from qcompile.ir import (
    Array,
    Concat,
    Conv,
    DType,
    Graph,
    Lut,
    MatMul,
    MaxPool,
    Port,
    Rescale,
    Reshape,
    SumPool,
    TensorType,
    Transpose,
    Value,
    arith,
)
from qcompile.ir.proof import accumulator_bound, code_range, prove, prove_rescale
from qcompile.targets.hls import units
from qcompile.targets.hls.legalise import Folding, legalise
from qcompile.targets.hls.pipeline import Pipeline
from qcompile.targets.hls.reading import steps
from qcompile.targets.hls.requantize import Operand, Requantize, entry
from qcompile.targets.hls.units import Stream
from tests.strategies import HAVE_UNITS, WITHOUT_UNITS, Maker, feeds, graphs, singles
from tests.targets.test_families import data, network


def golden(graph: Graph, codes: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    values: dict[str, Array] = dict(
        zip([v.name for _, v in graph.inputs], codes.values(), strict=True)
    )
    return graph.run(codes, on_value=lambda v, x: values.update({v.name: x})), values


def compare(graph: Graph, codes: Mapping[str, Array], folding: Folding | None = None) -> Pipeline:
    """Outputs of all rows, and every value a stream carries for the first."""
    made = legalise(graph, folding)
    outputs, values = golden(graph, codes)
    got = made.run(codes)
    assert got.keys() == outputs.keys()
    for name, want in outputs.items():
        assert got[name].dtype == want.dtype
        np.testing.assert_array_equal(got[name], want, err_msg=name)
    carried = made.values({name: x[0] for name, x in codes.items()})
    assert {s.output.name for s in steps(graph)} <= carried.keys()
    for name, x in carried.items():
        np.testing.assert_array_equal(x, values[name][0].reshape(-1), err_msg=name)
    return made


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def foldings(draw: st.DrawFn, made: Pipeline) -> Folding:
    """Any divisors for any layers."""
    return {
        op.layer: (
            draw(st.sampled_from(divisors(op.extent[0]))),
            draw(st.sampled_from(divisors(op.extent[1]))),
        )
        for op in made.ops
        if op.fold is not None and draw(st.integers(0, 3))
    }


def each_folding(data: st.DataObject, graph: Graph, seed: int) -> None:
    codes = feeds(graph, seed)
    for c in codes:
        compare(graph, c)
    folding = data.draw(foldings(legalise(graph)))
    for c in codes[:2]:
        made = compare(graph, c, folding)
    assert {layer: made.folding[layer] for layer in folding} == dict(folding)


# ---------------------------------------------------------------------------- graphs


@pytest.mark.parametrize("operator", HAVE_UNITS)
@given(data=st.data(), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_every_operator_is_exact_or_refused(operator: str, data: st.DataObject, seed: int) -> None:
    graph = data.draw(singles(operator))
    with contextlib.suppress(Unsupported):
        legalise(graph)
        each_folding(data, graph, seed)


@given(data=st.data(), seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_small_graphs_are_exact_or_refused(data: st.DataObject, seed: int) -> None:
    graph = data.draw(graphs(operators=HAVE_UNITS))
    with contextlib.suppress(Unsupported):
        legalise(graph)
        each_folding(data, graph, seed)


@pytest.mark.parametrize(
    "folding", [None, {"first.acc": (4, 9), "pool": (2, 1), "dense.acc": (5, 24)}]
)
def test_a_small_network_is_exact(folding: Folding | None) -> None:
    made = compare(network(), data(5), folding)
    kinds = [type(op).__name__ for op in made.ops if not isinstance(op, units.Width)]
    assert kinds == [
        "Window",
        "MatrixVector",
        "Window",
        "MaxPool",
        "Window",
        "MatrixVector",
        "MatrixVector",
    ]


@pytest.mark.parametrize("name", ["digits-resnet", "digits-dscnn"])
@pytest.mark.parametrize(("weights", "activations"), [("int8", "int8"), ("int4", "int4")])
def test_shipped_networks_are_exact(
    tmp_path: Path, models: Path, name: str, weights: str, activations: str
) -> None:
    folder = models / name
    artifact = qcompile.compile(
        folder / "model.onnx",
        calibration=folder / "calib.toml",
        output=tmp_path / "out",
        weights=weights,
        activations=activations,
    )
    graph = artifact.graph
    ((port, value),) = graph.inputs
    rng = np.random.default_rng(1)
    shape = (3, *value.type.shape[1:])
    kind = value.type.dtype
    codes = {port.name: rng.integers(kind.lo, kind.hi + 1, shape).astype(kind.numpy)}
    made = compare(graph, codes)
    folding = {
        op.layer: (
            divisors(op.extent[0])[-1],
            divisors(op.extent[1])[1 % len(divisors(op.extent[1]))],
        )
        for op in made.ops
        if op.fold is not None
    }
    compare(graph, codes, folding)


# --------------------------------------------------------------------------- layers


class Net:
    """A graph that grows layer by layer, each with its Rescale."""

    def __init__(self, data: st.DataObject, shape: tuple[int, ...], kind: DType) -> None:
        self.draw, self.graph = data.draw, Graph("net")
        self.rng = np.random.default_rng(self.int(0, 999))
        self.x = self.graph.add_input(Port("x", 0.1, 0), TensorType(kind, (1, *shape)))

    def int(self, lo: int, hi: int) -> int:
        return self.draw(st.integers(lo, hi))

    def constant(self, kind: DType, shape: tuple[int, ...], lo: int, hi: int) -> Value:
        a = self.rng.integers(lo, hi + 1, shape).astype(kind.numpy)
        return self.graph.constant(a, TensorType(kind, shape), "constant")

    def conv(self, x: Value, outputs: int, bits: int, groups: int = 1) -> Value:
        """Any kernel, strides, pads and dilations that fit."""
        spatial = x.type.shape[1:-1]
        kernel = [self.int(1, 4) for _ in spatial]
        strides = tuple(self.int(1, 3) for _ in spatial)
        dilations = tuple(self.int(1, 2) for _ in spatial)
        pads = tuple(self.int(0, 2) for _ in range(2 * len(spatial)))
        for i, n in enumerate(spatial):
            while (kernel[i] - 1) * dilations[i] + 1 > n + pads[i] + pads[len(spatial) + i]:
                kernel[i] -= 1
        w = DType.of(bits)
        operands = (
            self.constant(w, (outputs, *kernel, x.type.shape[-1] // groups), w.lo, w.hi),
            self.constant(DType.I32, (outputs,), -999, 999),
        )
        fill = self.int(x.type.dtype.lo, x.type.dtype.hi)
        return self.graph.add(
            Conv(strides, pads, dilations, groups, fill), x, *operands, name="conv"
        )

    def rescale(self, acc: Value, out: DType, *values: Value) -> Value:
        """To the output's whole range, per channel, with skip terms."""
        channels = acc.type.shape[-1]
        made = acc.producer
        assert made is not None
        bounds = [int(b) for b in accumulator_bound(made)]
        scale = [
            arith.Fraction(out.hi * 8, (bounds[c % len(bounds)] + 1) * (1 + c % 3))
            for c in range(channels)
        ]
        spans = [
            arith.ValOperand(
                arith.Fraction(1 << out.bits, 2 << v.type.dtype.bits),
                self.int(v.type.dtype.lo, v.type.dtype.hi),
                *code_range(v),
            )
            for v in values
        ]
        fit = arith.fit_rescale(
            [arith.AccOperand(tuple(scale), tuple(bounds))], spans, bits=self.int(8, 24)
        )
        lo = self.int(out.lo, 0)
        op = Rescale(fit.accs, fit.vals, fit.f, self.int(out.lo, out.hi), lo, out.hi, out)
        return self.graph.add(op, acc, *values, name="rescale")

    def check(self, data: st.DataObject, *outputs: Value) -> None:
        for i, v in enumerate(outputs):
            self.graph.add_output(Port(f"y{i}", 0.1, 0), v)
        self.graph.verify()
        prove(self.graph)
        for node in self.graph.nodes:
            if isinstance(node.op, Rescale):
                prove_rescale(node)
        each_folding(data, self.graph, self.int(0, 99))


KINDS = st.sampled_from([DType.I2, DType.I3, DType.I4, DType.I5, DType.I8, DType.U8, DType.I16])
OUTS = st.sampled_from([DType.I2, DType.I4, DType.I8, DType.U8, DType.I16])
SPATIAL = st.one_of(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.tuples(st.integers(1, 12)))


@given(data=st.data(), kind=KINDS, out=OUTS, spatial=SPATIAL, bits=st.integers(2, 8))
@settings(max_examples=100, deadline=None)
def test_convolutions(
    data: st.DataObject, kind: DType, out: DType, spatial: tuple[int, ...], bits: int
) -> None:
    channels = data.draw(st.sampled_from([1, 2, 3, 4, 6]))
    net = Net(data, (*spatial, channels), kind)
    groups = data.draw(st.sampled_from([1, 1, channels, *divisors(channels)]))
    y = net.conv(net.x, groups * net.int(1, 4), bits, groups)
    net.check(data, net.rescale(y, out))


@given(data=st.data(), kind=KINDS, spatial=SPATIAL, depthwise=st.booleans())
@settings(max_examples=60, deadline=None)
def test_skip_terms_and_forks(
    data: st.DataObject, kind: DType, spatial: tuple[int, ...], depthwise: bool
) -> None:
    channels = data.draw(st.sampled_from([1, 4, 6]))
    net = Net(data, (*spatial, channels), kind)
    one = net.constant(
        DType.I8, (channels, *(1 for _ in spatial), 1 if depthwise else channels), -9, 9
    )
    bias = net.constant(DType.I32, (channels,), -99, 99)
    ones, none = (1,) * len(spatial), (0,) * 2 * len(spatial)
    conv = Conv(ones, none, ones, channels if depthwise else 1, 0)
    a = net.rescale(net.graph.add(conv, net.x, one, bias, name="a"), DType.I8)
    b = net.rescale(net.graph.add(conv, a, one, bias, name="b"), DType.I8, a, net.x)
    c = net.rescale(net.graph.add(conv, b, one, bias, name="c"), DType.I8, a)
    net.check(data, c, b)


@given(data=st.data(), kind=KINDS, spatial=SPATIAL, out=OUTS)
@settings(max_examples=60, deadline=None)
def test_pools_then_a_dense_layer_on_the_whole_map(
    data: st.DataObject, kind: DType, spatial: tuple[int, ...], out: DType
) -> None:
    net = Net(data, (*spatial, data.draw(st.sampled_from([1, 2, 6]))), kind)
    kernel = tuple(net.int(1, n) for n in spatial)
    strides = tuple(net.int(1, 3) for _ in spatial)
    pads = tuple(net.int(0, k - 1) for k in (*kernel, *kernel))
    y = net.graph.add(MaxPool(kernel, strides, pads, (1,) * len(spatial)), net.x, name="max")
    inner = y.type.shape[1:-1]
    whole = net.int(0, 1)
    window = inner if whole else tuple(net.int(1, n) for n in inner)
    border = (0,) * 2 * len(inner) if whole else tuple(net.int(0, 1) for _ in range(2 * len(inner)))
    zero = net.int(kind.lo, kind.hi)
    y = net.rescale(net.graph.add(SumPool(window, strides, border, zero), y, name="sum"), out)
    depth = y.type.size
    y = net.graph.add(Reshape((-1, depth)), y, name="flat")
    w = net.constant(DType.I4, (6, depth), -8, 7)
    y = net.graph.add(MatMul(), y, w, net.constant(DType.I32, (6,), -99, 99), name="dense")
    net.check(data, net.rescale(y, DType.I8))


@given(data=st.data(), kind=KINDS)
@settings(max_examples=30, deadline=None)
def test_transposed_ports_tables_and_joins(data: st.DataObject, kind: DType) -> None:
    net = Net(data, (3, 4, 5), kind)
    x = net.graph.add(Transpose((0, 2, 3, 1)), net.x, name="last")
    w, b = net.constant(DType.I8, (6, 1, 1, 3), -99, 99), net.constant(DType.I32, (6,), -99, 99)
    y = net.graph.add(Conv((1, 1), (0,) * 4, (1, 1)), x, w, b, name="conv")
    y = net.rescale(y, DType.I8)
    table = net.constant(DType.I8, (256,), -128, 127)
    z = net.graph.add(Lut(), y, table, name="table")
    y = net.graph.add(Concat(net.int(1, 3)), y, z, z, name="join")
    net.check(data, net.graph.add(Transpose((0, 3, 1, 2)), y, name="first"))


# ------------------------------------------------------------------- requantization


def pure(op: Rescale, accs: list[int], vals: list[int], c: int) -> int:
    """The contract of qcompile.ir.arith in Python's integers."""
    f = entry(op.f, c)
    total = sum(
        ((a << entry(t.pre_shift, c)) * entry(t.multiplier, c)) >> 32
        for t, a in zip(op.accs, accs, strict=True)
    )
    total += sum(
        (x - v.zero_point) * entry(v.multiplier, c) for v, x in zip(op.vals, vals, strict=True)
    )
    return min(max(((total + (1 << (f - 1))) >> f) + op.zero_point, op.lo), op.hi)


@given(data=st.data(), terms=st.integers(0, 2), values=st.integers(0, 2))
@settings(max_examples=200, deadline=None)
def test_the_datapath_is_the_contract_and_keeps_its_widths(
    data: st.DataObject, terms: int, values: int
) -> None:
    draw, rows = data.draw, st.sampled_from([1, 3])
    if terms + values == 0:
        terms = 1

    def row(lo: int, hi: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(lo, hi)) for _ in range(draw(rows)))

    zeros = draw(st.integers(0, 30))
    accs, operands = [], []
    for _ in range(terms):
        bound = tuple(
            draw(st.integers(1, 1 << draw(st.integers(1, 28)))) for _ in range(draw(rows))
        )
        room = 30 - max(bound).bit_length()
        shifts = row(0, max(0, room))
        ms = tuple((m >> zeros) << zeros for m in row(1 << 30, (1 << 31) - 1))
        accs.append(arith.Acc(ms, shifts))
        operands.append(Operand(bound, max(bound).bit_length() + 1))
    vals = []
    for _ in range(values):
        vals.append(arith.Val(row(-(1 << 20), 1 << 20), draw(st.integers(-128, 127))))
        operands.append(Operand((128,), 8))
    op = Rescale(
        tuple(accs), tuple(vals), row(1, 30), draw(st.integers(-128, 127)), -128, 127, DType.I8
    )
    made = Requantize.of(op, operands)
    alone = terms == 1 and values == 0
    for a, t in zip(accs, made.accs, strict=True):
        for c in range(3):
            gain = Fraction(entry(a.multiplier, c) << entry(a.pre_shift, c), 1 << 32)
            shift = entry(t.shift, c)
            if alone:
                assert shift == 0
                gain /= 1 << entry(op.f, c)
                shift = entry(made.shift, c)
            assert Fraction(entry(t.multiplier, c), 1 << shift) == gain
    for at in range(4):
        a = [
            [
                draw(st.sampled_from([-1, 0, 1])) * entry(o.bound, c) + (at % 2 == 0)
                for c in range(3)
            ]
            for o in operands[:terms]
        ]
        a = [
            [min(max(x, -entry(o.bound, c)), entry(o.bound, c)) for c, x in enumerate(r)]
            for r, o in zip(a, operands, strict=False)
        ]
        v = [[draw(st.sampled_from([-128, 127, 3])) for _ in range(3)] for _ in vals]
        want = [[pure(op, [r[c] for r in a], [r[c] for r in v], c) for c in range(3)]]
        words = [np.array([r], np.int64) for r in a], [np.array([r], np.int64) for r in v]
        assert made.run(*words).tolist() == want
        for c in range(3):
            parts = [
                (r[c] * entry(t.multiplier, c)) >> entry(t.shift, c)
                for r, t in zip(a, made.accs, strict=True)
            ]
            parts += [r[c] * entry(t.multiplier, c) for r, t in zip(v, made.vals, strict=True)]
            parts.append(entry(made.offset, c))
            ends = sum(x for x in parts if x > 0), sum(x for x in parts if x < 0)
            assert all(-(1 << (made.t_bits - 1)) <= x < 1 << (made.t_bits - 1) for x in ends)
            for r, t in zip(a, made.accs, strict=True):
                assert abs(r[c] * entry(t.multiplier, c)) < 1 << (t.product_bits - 1)


# ---------------------------------------------------------------------------- streams


@given(
    bits=st.integers(1, 20), signed=st.booleans(), lanes=st.integers(1, 5), seed=st.integers(0, 99)
)
def test_words_are_packed_from_the_lowest_bit(
    bits: int, signed: bool, lanes: int, seed: int
) -> None:
    s = Stream("s", bits, signed, 2, 3, 2 * lanes, lanes)
    rng = np.random.default_rng(seed)
    words: NDArray[np.int64] = rng.integers(s.lo, s.hi + 1, (s.words, s.lanes))
    packed = s.pack(words)
    for word, number in zip(words, packed, strict=True):
        assert 0 <= number < 1 << s.word_bits
        for i, x in enumerate(word):
            field = (number >> (i * bits)) % (1 << bits)
            assert (field - int(x)) % (1 << bits) == 0
    np.testing.assert_array_equal(s.unpack(packed), words)


def residual() -> Graph:
    g = Graph("residual")
    rng = np.random.default_rng(0)
    x = g.add_input(Port("x", 0.1, 0), TensorType(DType.I8, (1, 5, 5, 4)))
    w = g.constant(
        rng.integers(-8, 8, (4, 3, 3, 4)).astype(np.int8), TensorType(DType.I8, (4, 3, 3, 4)), "w"
    )
    b = g.constant(np.zeros(4, np.int32), TensorType(DType.I32, (4,)), "b")
    y = g.add(Conv((1, 1), (1,) * 4, (1, 1)), x, w, b, name="conv")
    op = Rescale(
        (arith.Acc((1 << 30,), (4,)),), (arith.Val((1 << 11,), 0),), (12,), 0, -128, 127, DType.I8
    )
    g.add_output(Port("y", 0.1, 0), g.add(op, y, x, name="join"))
    g.verify()
    return g


def test_every_arm_of_a_fork_holds_an_image_and_depths_can_be_set() -> None:
    made = legalise(residual(), {"conv": (2, 4)})
    (fork,) = (op for op in made.ops if isinstance(op, units.Fork))
    assert [s.depth for s in fork.outputs] == [25, 25]
    assert "in0" not in made.fifos
    arm = fork.outputs[1].name
    other = made.with_depths({arm: 7})
    assert other.fifos[arm].depth == 7
    assert {n: s.depth for n, s in other.fifos.items() if n != arm} == {
        n: s.depth for n, s in made.fifos.items() if n != arm
    }


def test_a_pipeline_whose_streams_do_not_fit_is_refused() -> None:
    made = legalise(network())
    with pytest.raises(ValueError, match="which is not there"):
        replace(made, ops=made.ops[::-1])
    with pytest.raises(ValueError, match="which is not there"):
        replace(made, ops=made.ops[:-1])


def test_an_accumulator_that_is_too_narrow_is_seen() -> None:
    made = legalise(network())
    (first, *_) = (op for op in made.ops if isinstance(op, units.MatrixVector))
    narrow = replace(first, acc_bits=first.acc_bits - 4)
    planted = replace(made, ops=tuple(narrow if op is first else op for op in made.ops))
    with pytest.raises(OverflowError, match=f"{first.name}: an accumulator leaves"):
        planted.run(data(5))


@pytest.mark.parametrize(
    ("folding", "sentence"),
    [
        ({"nothing": (1, 1)}, "the folding names nothing"),
        ({"first.acc": (3, 1)}, "divide 8 and 27"),
        ({"first.acc": (1, 0)}, "divide 8 and 27"),
        ({"pool": (3, 1)}, "the first divides 8"),
        ({"pool": (2, 2)}, "the other is 1"),
    ],
)
def test_a_folding_that_does_not_fit_is_refused(folding: Folding, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        legalise(network(), folding)


@pytest.mark.parametrize("operator", WITHOUT_UNITS)
def test_what_has_no_unit_is_named(operator: str) -> None:
    @given(st.data())
    @settings(max_examples=5, deadline=None)
    def check(data: st.DataObject) -> None:
        maker = Maker(data.draw)
        value = getattr(maker, operator)()
        maker.graph.add_output(Port("y", 0.1, 0), value)
        kind = type(value.producer.op).__name__
        with pytest.raises(
            Unsupported, match=f"{kind} 0: no unit of the FPGA target computes {kind}"
        ):
            legalise(maker.graph)

    check()
