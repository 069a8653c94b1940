"""Biases and sums that would leave 32 bits: coarser scales, and results as good as the coarser scales allow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx.helper import make_node

from qcompile.errors import Unsupported
from qcompile.formats import Int
from qcompile.ir import Rescale
from qcompile.passes.place import Place
from qcompile.passes.widen import Widen
from qcompile.pipeline import Context
from qcompile.plan import Quantizer, QuantPlan, affine
from tests.oracle import Case, build, integer, interpret, judge, prepare

Array = NDArray[Any]
CASES = settings(deadline=None, derandomize=True, max_examples=25)


def dense(w: Array, b: Array, seed: int = 0, **options: Any) -> Case:
    """y = Relu(x w + b), or without the Relu."""
    nodes = [make_node("Gemm", ["x", "w", "b"], ["y"], transB=1, name="dense")]
    model = build(
        nodes, {"x": ["N", w.shape[1]]}, {"w": w.astype(np.float32), "b": b.astype(np.float32)}
    )
    return prepare(model, seed, rows=16, **options)


def widened(case: Case) -> list[str]:
    """Run the pass on its own; what it logs."""
    lines: list[str] = []
    changed = Widen(fuse_residual=case.fused)(case.model, case.plan, Context(log=lines.append))
    assert changed == bool(lines)
    assert not Widen(fuse_residual=case.fused)(case.model, case.plan, Context())
    return lines


def random(rows: int = 3, columns: int = 8) -> Array:
    return np.random.default_rng(0).integers(-127, 128, (rows, columns)) / 64


def test_ordinary_layers_are_left_alone() -> None:
    case = dense(random(), np.array([1.0, -2.0, 0.5]), widen=False)
    before = dict(case.plan.quantizers)
    assert widened(case) == []
    assert case.plan.quantizers == before


@pytest.mark.parametrize("dead", [0.0, 1e-12, 1e-30])
def test_dead_channel_with_an_ordinary_bias(dead: float) -> None:
    """All weights next to nothing: their bias still comes out to a fraction of a step."""
    w = random()
    w[1] = dead
    case = dense(w, np.array([1.0, 123.4, -0.5]), widen=False)
    if dead:
        # without the pass there is no graph
        with pytest.raises(Unsupported, match="node dense"):
            integer(case)
    lines = widened(case)
    assert bool(lines) == bool(dead)
    assert all("weight scales of dense" in line for line in lines)
    judge(case, integer(case))


@pytest.mark.parametrize("size", [1e3, 1e6, 1e9, 1e20])
def test_huge_bias(size: float) -> None:
    case = dense(random(), np.array([size, -size, 1.0]), widen=False)
    widened(case)
    done = integer(case)
    (bias,) = [v for v in done.graph.constants() if v.name.endswith(":bias")]
    assert np.abs(bias.constant.astype(np.int64)).max() < 1 << 30
    judge(case, done)


def test_bias_beyond_every_scale_is_refused() -> None:
    case = dense(random(), np.array([1e38, 0, 0]), widen=False)
    case.set("x", scale=(float(np.float32(1e-30)),))
    with pytest.raises(Unsupported, match=r"node dense: its bias of 1e\+38"):
        widened(case)


@pytest.mark.parametrize("size", [1e-3, 1e-9, 1e-20])
def test_tiny_weights(size: float) -> None:
    case = dense(random() * size, np.zeros(3), widen=False)
    widened(case)
    judge(case, integer(case))


@CASES
@given(st.integers(0, 1 << 32), st.sampled_from([True, False]))
def test_channels_of_any_size_stay_within_their_bound(seed: int, per_channel: bool) -> None:
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(6, 5)) * 10.0 ** rng.integers(-25, 3, (6, 1))
    b = rng.normal(size=6) * 10.0 ** rng.integers(-8, 4, 6)
    case = dense(w, b, seed, place=Place(per_channel=per_channel, output=Int(8)))
    judge(case, integer(case))


# --- results that hardly vary -----------------------------------------------------------------------------------


def two(op: str) -> bytes:
    return build([make_node(op, ["x", "z"], ["y"], name="it")], {"x": ["N", 4], "z": ["N", 4]})


def all_but_dead(case: Case, tensor: str = "y", scale: float = 2.0**-90) -> None:
    case.plan.quantizers[tensor] = Quantizer(Int(8), (scale,), (0,))


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul"])
def test_result_that_calibration_saw_as_all_but_constant(op: str) -> None:
    case = prepare(two(op), 0, widen=False)
    all_but_dead(case)
    with pytest.raises(Unsupported, match="node it: no shift"):
        integer(case)
    (line,) = widened(case)
    assert "scale of y enlarged" in line
    judge(case, integer(case))


def test_dead_layer_between_live_ones() -> None:
    """A convolution whose Relu never fires on the calibration data, and the layer that reads it."""
    w = random(4, 3).reshape(4, 3, 1, 1)
    v = random(2, 4).reshape(2, 4, 1, 1)
    nodes = [
        make_node("Conv", ["x", "w", "b"], ["c"], name="dead"),
        make_node("Relu", ["c"], ["r"]),
        make_node("Conv", ["r", "v", "d"], ["y"], name="after"),
    ]
    weights = {"w": w, "b": np.full(4, -1e4), "v": v, "d": np.array([0.5, -3.0])}
    model = build(
        nodes, {"x": ["N", 3, 4, 4]}, {n: a.astype(np.float32) for n, a in weights.items()}
    )
    for scale in (2.0**-100, 2.0**-60, 1e-6):
        case = prepare(model, 0, widen=False)
        all_but_dead(case, "r", float(np.float32(scale)))
        case.plan.quantizers["y"] = affine(-3, 0.5, Int(16))
        widened(case)
        done = integer(case)
        judge(case, done)
        outputs = interpret(case, done).outputs["y"]
        np.testing.assert_array_equal(
            outputs, np.broadcast_to(outputs[:1, :, :1, :1], outputs.shape)
        )


def test_scale_shared_by_a_concat_grows_for_all_of_it() -> None:
    nodes = [
        make_node("Gemm", ["x", "w"], ["a"], transB=1, name="first"),
        make_node("Add", ["z", "z"], ["b"], name="second"),
        make_node("Concat", ["a", "b"], ["y"], axis=1, name="join"),
    ]
    model = build(nodes, {"x": ["N", 8], "z": ["N", 4]}, {"w": random().astype(np.float32)})
    case = prepare(model, 0, widen=False)
    all_but_dead(case)
    assert case.plan.owner("a") == case.plan.owner("b") == "y"
    widened(case)
    judge(case, integer(case))


def test_inputs_joined_at_an_impossible_scale() -> None:
    nodes = [make_node("Concat", ["x", "z"], ["y"], axis=1, name="join")]
    case = prepare(build(nodes, {"x": ["N", 2], "z": ["N", 2]}), 0, widen=False)
    all_but_dead(case)
    (line,) = widened(case)
    assert "scale of y" in line
    judge(case, integer(case))


def test_average_of_all_but_constant_images() -> None:
    nodes = [
        make_node("AveragePool", ["x"], ["y"], kernel_shape=[2, 2], pads=[1, 1, 0, 0], name="pool")
    ]
    case = prepare(build(nodes, {"x": ["N", 2, 4, 4]}), 0, widen=False)
    all_but_dead(case)
    widened(case)
    judge(case, integer(case))


def test_what_cannot_be_helped_is_left_for_its_error() -> None:
    """An accumulator beyond 32 bits: no scale changes that, and the plan stays as it was."""
    w = np.full((1, 140_000), 127 / 64)
    case = dense(w, np.zeros(1), widen=False, place=Place(input=Int(8)))
    before = dict(case.plan.quantizers)
    assert widened(case) == []
    assert case.plan.quantizers == before
    with pytest.raises(Unsupported, match="node dense"):
        integer(case)


def test_incomplete_plan_is_no_concern_of_this_pass() -> None:
    case = dense(random(), np.zeros(3), widen=False)
    assert not Widen()(case.model, QuantPlan(case.plan.slots, {}), Context())


@CASES
@given(st.integers(0, 1 << 32))
def test_scales_stay_float32(seed: int) -> None:
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(4, 5)) * 10.0 ** rng.integers(-25, 3, (4, 1))
    case = dense(w, rng.normal(size=4) * 100, seed)
    for q in case.plan.quantizers.values():
        assert all(float(np.float32(s)) == s and type(s) is float for s in q.scale)
    done = integer(case)
    assert all(1 <= f <= 30 for n in done.graph.nodes if isinstance(n.op, Rescale) for f in n.op.f)
