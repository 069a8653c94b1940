"""Requantizers of few digits or of one shift: the graph's codes in the datapath, C++ and Verilog, without DSPs."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qcompile.ir import Array, Conv, DType, Graph, MatMul, Port, Rescale, TensorType, Value, arith
from qcompile.ir.arith import AccOperand, Multipliers, NoRoom, ValOperand, fit_rescale
from qcompile.ir.proof import accumulator_bound, prove_rescale
from qcompile.targets.hls import cplusplus, verilog
from qcompile.targets.hls.cplusplus_sim import CSim
from qcompile.targets.hls.legalise import Folding, legalise
from qcompile.targets.hls.pipeline import Pipeline
from qcompile.targets.hls.requantize import AccTerm, Operand, Requantize, ValTerm, entry
from qcompile.targets.hls.rtlsim import RtlSim, icarus

LIMITS = [Multipliers(k, layer) for k in (None, 1, 2, 3) for layer in (False, True)]


def spelled(term: AccTerm | ValTerm, channel: int) -> int:
    return sum(entry(c.sign, channel) << entry(c.position, channel) for c in term.copies)


@given(
    data=st.data(),
    limits=st.sampled_from(LIMITS),
    channels=st.sampled_from([1, 2, 5]),
    skip=st.booleans(),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_the_datapath_is_the_rescale(
    data: st.DataObject, limits: Multipliers, channels: int, skip: bool
) -> None:
    whole = st.integers(1, 1 << 20)
    scales = tuple(
        Fraction(data.draw(whole), 1 << data.draw(st.integers(12, 32))) for _ in range(channels)
    )
    bound = tuple(data.draw(st.integers(1, 1 << 24)) for _ in range(channels))
    skips = ValOperand(Fraction(data.draw(st.integers(1 << 12, 1 << 20)), 1 << 19), 3, -128, 127)
    values = [skips] if skip else []
    try:
        fit = fit_rescale([AccOperand(scales, bound)], values, bits=16, multipliers=limits)
    except NoRoom:
        return
    op = Rescale(fit.accs, fit.vals, fit.f, 5, -128, 127, DType.I8)
    operands = [Operand(bound, max(bound).bit_length() + 1), *(Operand((128,), 8) for _ in values)]
    made = Requantize.of(op, operands)
    (term,) = made.accs
    for t in (*made.accs, *made.vals):
        if t.copies:
            assert [spelled(t, c) for c in range(channels)] == [
                entry(t.multiplier, c) for c in range(channels)
            ]
        if limits.digits is not None:
            assert 1 <= len(t.copies) <= limits.digits
    if limits.digits == 1 and not skip and max(limits.near(scales, 16)) <= 1:
        assert term.multiplier == (1,)
    if limits.one_shift and term.multiplier != (1,):
        assert len(made.shift) == len(term.shift) == 1
        # beside a value, an accumulator of few bits is moved left
        assert term.m_bits <= 17 or term.shift == (0,)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    b = np.array(bound)
    rows = [b, -b, 0 * b, np.minimum(b, 1), *(rng.integers(-b, b + 1) for _ in range(9))]
    acc = np.stack([np.broadcast_to(r, (channels,)) for r in rows]).astype(np.int64)
    v = [rng.choice([-128, -1, 0, 3, 127], acc.shape).astype(np.int64) for _ in values]
    want = op.run(acc.astype(np.int32), *(x.astype(np.int8) for x in v))
    np.testing.assert_array_equal(made.run([acc], v), want)


def test_a_multiplication_remains_where_digits_are_many() -> None:
    (three, four) = (
        AccTerm((m,), (0,), 20) for m in (0b10101, 0b1010101)
    )  # 1 + 4 + 16 and one digit more
    assert [(c.position, c.sign) for c in three.copies] == [((2 * k,), (1,)) for k in range(3)]
    assert four.copies == ()
    (mixed,) = [ValTerm((7, -2, 0), 8, True).copies]
    assert [(c.position, c.sign) for c in mixed] == [
        ((0, 1, 0), (-1, -1, 0)),
        ((3, 0, 0), (1, 0, 0)),
    ]


# --------------------------------------------------------------------------- hardware


class Net:
    """Layers over 6 channels, each with its own limits of multipliers; channels' scales lie far apart."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(3)
        self.graph = Graph("net")

    def constant(self, name: str, codes: NDArray[np.int64], dtype: DType) -> Value:
        return self.graph.constant(codes.astype(dtype.numpy), TensorType(dtype, codes.shape), name)

    def rescaled(self, name: str, acc: Value, limits: Multipliers, *values: Value) -> Value:
        assert acc.producer is not None
        bounds = tuple(int(b) for b in accumulator_bound(acc.producer))
        gains = [Fraction(int(g), 97) for g in self.rng.integers(60, 700, len(bounds))]
        scales = tuple(g * 30 / b for g, b in zip(gains, bounds, strict=True))
        skips = [ValOperand(Fraction(11, 13), 3, -128, 127) for _ in values]
        fit = fit_rescale([AccOperand(scales, bounds)], skips, bits=16, multipliers=limits)
        signed = tuple(arith.Val(tuple(-n for n in v.multiplier), v.zero_point) for v in fit.vals)
        op = Rescale(fit.accs, signed, fit.f, 3, -128, 127, DType.I8)
        return self.graph.add(op, acc, *values, name=name)

    def conv(self, name: str, x: Value, limits: Multipliers, *values: Value) -> Value:
        w = self.rng.integers(-127, 128, (6, 1, 1, x.type.shape[-1]))
        b = self.rng.integers(-500, 500, 6)
        made = self.graph.add(
            Conv((1, 1), (0, 0, 0, 0), (1, 1)),
            x,
            self.constant(f"{name}.w", w, DType.I8),
            self.constant(f"{name}.b", b, DType.I32),
            name=f"{name}.acc",
        )
        return self.rescaled(name, made, limits, *values)


def network() -> Graph:
    net = Net()
    g = net.graph
    x = g.add_input(Port("x", 0.1, 0), TensorType(DType.I8, (1, 3, 3, 4)))
    a = net.conv("shift", x, Multipliers(1))
    b = net.conv("two", a, Multipliers(2), a)
    c = net.conv("three", b, Multipliers(3))
    d = net.conv("shared", c, Multipliers(2, one_shift=True), b)
    e = net.conv("layer", d, Multipliers(None, one_shift=True))
    g.add_output(Port("y", 0.1, 0), e)
    g.verify()
    for node in g.nodes:
        if isinstance(node.op, Rescale):
            prove_rescale(node)
    return g


FOLDED: Folding = {
    "shift.acc": (3, 2), "two.acc": (2, 3), "three.acc": (1, 6), "shared.acc": (6, 6), "layer.acc": (2, 1),
}  # fmt: skip


def codes(rows: int) -> dict[str, Array]:
    x = np.random.default_rng(rows).integers(-128, 128, (rows, 3, 3, 4))
    x[0], x[1] = -128, 127
    return {"x": x.astype(np.int8)}


def write(files: Mapping[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def multiplied(pipeline: Pipeline) -> list[str]:
    """The layers whose requantizer has a product left."""
    return [
        op.layer
        for op in pipeline.ops
        if (r := getattr(op, "requantize", None)) and not all(t.copies for t in (*r.accs, *r.vals))
    ]


def test_cplusplus_gives_the_graphs_codes(tmp_path: Path) -> None:
    graph, pipeline = network(), legalise(network(), FOLDED)
    assert multiplied(pipeline) == ["layer.acc"]
    files = cplusplus.emit(pipeline, "net", [])
    sim = CSim(write(files, tmp_path), pipeline, "net")
    want, got = graph.run(codes(40)), sim.run(codes(40))
    np.testing.assert_array_equal(got["y"], want["y"])
    assert len(np.unique(want["y"])) > 50


def test_verilog_gives_the_graphs_codes(tmp_path: Path) -> None:
    graph, pipeline = network(), legalise(network(), FOLDED)
    with RtlSim(pipeline, tmp_path / "rtl") as rtl:
        for seed in (0, 5):
            run = rtl.run(codes(40), seed)
            assert (run.complete, run.mismatches) == (True, 0)
            np.testing.assert_array_equal(run.codes["y"], graph.run(codes(40))["y"])
    files = verilog.emit(pipeline, "top", codes(2))
    assert icarus(write(files, tmp_path / "whole"), 1)[0] == 0
    faulty = files["qc_shift_add.v"].replace(b"? -c2 : c2", b"? c2 : c2")
    assert faulty != files["qc_shift_add.v"]
    planted = write({**files, "qc_shift_add.v": faulty}, tmp_path / "planted")
    assert icarus(planted, 1)[0] > 0


def dsps(limits: Multipliers, folder: Path) -> int:
    """DSP48E1 of a dense layer of 6 outputs, two rows and two columns at a time."""
    net = Net()
    x = net.graph.add_input(Port("x", 0.1, 0), TensorType(DType.I8, (1, 8)))
    w = net.constant("w", net.rng.integers(-127, 128, (6, 8)), DType.I8)
    b = net.constant("b", net.rng.integers(-500, 500, 6), DType.I32)
    acc = net.graph.add(MatMul(), x, w, b, name="acc")
    net.graph.add_output(Port("y", 0.1, 0), net.rescaled("y", acc, limits))
    feeds: dict[str, Array] = {"x": np.zeros((1, 8), np.int8)}
    files = verilog.emit(legalise(net.graph, {"acc": (2, 2)}), "top", feeds)
    read = f"read_verilog -defer {' '.join(n for n in files if n.endswith('.v') and '/' not in n)}"
    synth = "synth_xilinx -family xc7 -flatten -top top -run begin:coarse"
    done = subprocess.run(
        ["yosys", "-p", f"{read}; {synth}; select -count t:DSP48E1"],
        cwd=write(files, folder),
        capture_output=True,
        text=True,
        check=True,
    )
    return int(re.findall(r"^(\d+) objects", done.stdout, re.M)[-1])


PRODUCTS = [(Multipliers(), 2), (Multipliers(1), 0), (Multipliers(2), 0)]


@pytest.mark.parametrize(("limits", "more"), PRODUCTS)
def test_digits_take_no_dsp(tmp_path: Path, limits: Multipliers, more: int) -> None:
    """4 for the products with weights and, only where multipliers are any, one for each row."""
    assert dsps(limits, tmp_path) == 4 + more
