"""Fixed point: scales are powers of two where layers lose least, rescales are shifts, weights have few digits."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx.helper import make_node

import qcompile
from qcompile.errors import BadInput
from qcompile.formats import Int
from qcompile.ir import Conv, Graph, MatMul, Rescale
from qcompile.onnx import frontend
from qcompile.passes.binary_point import BinaryPoint
from qcompile.passes.calibrate import Calibrate
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.integerize import integerize
from qcompile.passes.place import Place
from qcompile.passes.round import Round
from qcompile.passes.widen import Widen
from qcompile.pipeline import Context
from qcompile.plan import Kind, QuantPlan
from tests.oracle import build, execute

Floats = NDArray[np.float32]


def planned(
    data: bytes, x: Floats, chosen: BinaryPoint, place: Place | None = None
) -> tuple[ir.Model, QuantPlan, Context]:
    """A model in fixed point."""
    model, plan = frontend.load(data), QuantPlan()
    context = Context(samples=[{"x": x}])
    for p in (Canonicalize(), place or Place(), Calibrate(), Widen(), chosen):
        p(model, plan, context)
    return model, plan, context


def dense(seed: int) -> tuple[bytes, Floats, Floats]:
    """One layer whose channels of weights lie far apart, and data with a few outliers."""
    rng = np.random.default_rng(seed)
    w = (rng.normal(size=(6, 4)) * 2.0 ** rng.uniform(-4, 2, 4)).astype(np.float32)
    x = rng.standard_t(3, (256, 6)).astype(np.float32)
    return build([make_node("MatMul", ["x", "w"], ["y"])], {"x": ["N", 6]}, {"w": w}), x, w


def fake(x: NDArray[np.float64], step: float, lo: int, hi: int) -> NDArray[np.float64]:
    return np.clip(np.floor(x / step + 0.5), lo, hi) * step


@pytest.mark.parametrize("seed", range(4))
def test_no_neighbouring_point_loses_less(seed: int) -> None:
    """Operand and weights of a product, against the output's variance beside its mean, by the definition."""
    data, x, w = dense(seed)
    _, plan, _ = planned(data, x, BinaryPoint(inputs=True, unsigned=False, rounds=4))
    (weight,) = (n for n, slot in plan.slots.items() if slot.kind is Kind.WEIGHT)
    xq, wq = plan.quantizers["x"], plan.quantizers[weight]
    real = x.astype(np.float64) @ w.astype(np.float64)

    def error(step: float, steps: NDArray[np.float64]) -> NDArray[np.float64]:
        coded = np.clip(np.rint(w / steps), wq.format.lo, wq.format.hi) * steps
        off = fake(x, step, -128, 127) @ coded - real
        found: NDArray[np.float64] = off.var(axis=0)
        return found

    steps = np.array(wq.scale)
    assert {math.frexp(s)[0] for s in (*wq.scale, *xq.scale)} == {0.5}
    found = error(xq.scale[0], steps)
    # coarser than what covers all values is not tried: only chance makes it better
    cover = np.abs(x).max() / 127
    covers = np.abs(w).max(axis=0) / 127
    for other in (0.25, 0.5, 2.0, 4.0):
        assert (
            xq.scale[0] * other >= 2 * cover
            or error(xq.scale[0] * other, steps).mean() >= found.mean() * 0.9999
        )
        beyond = steps * other >= 2 * covers
        assert (beyond | (error(xq.scale[0], steps * other) >= found * 0.9999)).all()


def network(outputs: int = 5) -> tuple[bytes, Floats]:
    """Convolution, residual sum, an average over 25 elements, a dense layer; pixels as input."""
    rng = np.random.default_rng(2)
    nodes = [
        make_node("Conv", ["x", "u", "b"], ["p"]),
        make_node("Relu", ["p"], ["q"]),
        make_node("Conv", ["q", "v"], ["r"]),
        make_node("Add", ["r", "q"], ["s"]),
        make_node("GlobalAveragePool", ["s"], ["a"]),
        make_node("Flatten", ["a"], ["f"]),
        make_node("Gemm", ["f", "w"], ["y"]),
    ]
    weights = {
        "u": rng.normal(size=(6, 3, 1, 1)).astype(np.float32),
        "b": rng.normal(size=6).astype(np.float32),
        "v": rng.normal(size=(6, 6, 1, 1)).astype(np.float32),
        "w": rng.normal(size=(6, outputs)).astype(np.float32),
    }
    x = rng.integers(0, 256, (64, 3, 5, 5)).astype(np.float32) * np.float32(0.0117)
    return build(nodes, {"x": ["N", 3, 5, 5]}, weights), x


def multipliers(graph: Graph) -> set[int]:
    rows = [n.op for n in graph.nodes if isinstance(n.op, Rescale)]
    return {abs(m) for op in rows for t in (*op.accs, *op.vals) for m in t.multiplier}


@pytest.mark.parametrize("inputs", [False, True])
def test_every_rescale_is_a_shift_and_an_average_a_sum(inputs: bool) -> None:
    data, x = network()
    model, plan, _ = planned(data, x, BinaryPoint(inputs=inputs))
    done = integerize(model, plan, requant="shift")
    assert all(m & (m - 1) == 0 for m in multipliers(done.graph))
    # scales are float32 numbers: 2**k / 25 and the input's are none exactly
    assert max(done.multiplier_errors.values()) < 2.0**-22
    odd = {n for n, q in plan.quantizers.items() if any(math.frexp(s)[0] != 0.5 for s in q.scale)}
    (last,) = (n for n in plan.slots if n.endswith("weight"))
    assert odd == {"a", last} | (set() if inputs else {"x", "u"})
    power = math.log2(plan.quantizers["a"].scale[0] * 25)
    assert power == pytest.approx(round(power), abs=2**-22)
    for name, slot in plan.slots.items():
        zero = plan.quantizers[name].zero_point
        if slot.kind is Kind.WEIGHT:
            assert set(zero) == {0}
        elif name != "x" or inputs:
            assert zero[0] in (0, slot.format.lo)
    assert plan.quantizers["q"].zero_point == (-128,)
    assert plan.quantizers["x"].zero_point == (-128,)
    # 16 bits cover what was seen and a quarter more (calibrate's headroom), at the finest point that does
    (made,) = execute(data, {"x": x})
    most = np.abs(made).max()
    assert most <= 32767 * plan.quantizers["y"].scale[0] <= 2 * 1.25 * most
    # the lattice of the pixels is kept: its own scale, no error
    assert inputs or plan.quantizers["x"].scale == (float(np.float32(0.0117)),)


def test_signed_tensors_only() -> None:
    data, x = network()
    model, plan, _ = planned(data, x, BinaryPoint(inputs=True, unsigned=False))
    assert {q.zero_point[0] for q in plan.quantizers.values()} == {0}
    assert all(
        m & (m - 1) == 0 for m in multipliers(integerize(model, plan, requant="shift").graph)
    )


def test_one_point_for_all_weights_of_a_tensor() -> None:
    data, x = network()
    _, plan, _ = planned(data, x, BinaryPoint(), Place(per_channel=False))
    assert {len(q.scale) for q in plan.quantizers.values()} == {1}


@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_keeps_points_and_digits(digits: int, bits: int) -> None:
    data, x = network()
    place = Place(weights=Int(bits, narrow=True))
    model, plan, context = planned(data, x, BinaryPoint(), place)
    before = dict(plan.quantizers)
    Round(digits=digits, scales=False)(model, plan, context)
    assert plan.quantizers == before
    for name, codes in plan.codes.items():
        n = codes.astype(np.int64)
        ones = np.array([int(c).bit_count() for c in (np.abs(n) ^ (3 * np.abs(n))).ravel()])
        assert ones.max() <= digits
        assert np.abs(n).max() > 3 or bits == 4, name
    constants = [
        n.inputs[1].constant
        for n in integerize(model, plan, requant="shift").graph.nodes
        if isinstance(n.op, Conv | MatMul)
    ]
    assert len(constants) == len(plan.codes) == 3


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "no rounds": (lambda: BinaryPoint(rounds=0), "rounds, elements and samples are at least 1"),
    "finer than covering": (lambda: BinaryPoint(below=-1), "below at least 0"),
    "learned digits": (lambda: Round(digits=2, method="adaround"), "by descent or quantease"),
    "no digits": (lambda: Round(digits=0), "at least 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(name: str) -> None:
    make, reason = WRONG[name]
    with pytest.raises(BadInput, match=reason):
        make()


def test_needs_data_and_comes_before_rounding() -> None:
    data, x = network()
    model, plan, context = planned(data, x, BinaryPoint())
    Round()(model, plan, context)
    with pytest.raises(BadInput, match="before round"):
        BinaryPoint()(model, plan, context)
    with pytest.raises(BadInput, match="needs data"):
        BinaryPoint()(model, QuantPlan(), Context())


@pytest.mark.parametrize(
    ("name", "recipe"), [("digits-dscnn", "fixed-point"), ("digits-resnet", "fixed-point-khot")]
)
def test_shipped_networks_lose_no_point(
    models: Path, tmp_path: Path, name: str, recipe: str
) -> None:
    folder = models / name
    made = qcompile.compile(
        folder / "model.onnx",
        calibration=folder / "calib.toml",
        recipe=recipe,
        output=tmp_path / "out",
    )
    with np.load(folder / "eval.npz") as stored:
        images, labels = stored["image"], stored["y"]
    feeds = {"image": images}
    verification = made.verify([feeds])
    assert (verification.samples, verification.mismatches) == (len(images), 0)
    assert all(m & (m - 1) == 0 for m in multipliers(made.graph))
    (real,) = execute((folder / "model.onnx").read_bytes(), feeds)
    (mine,) = made.run(feeds).values()
    right = [(x.argmax(1) == labels).mean() for x in (real, mine)]
    assert right[1] >= right[0] - 0.01
