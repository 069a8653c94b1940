from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qcompile.data import InputSpec, open_data
from qcompile.errors import BadInput
from qcompile.formats import Int
from qcompile.passes.calibrate import Calibrate, symmetric_scales
from qcompile.passes.lattice import Distinct, lattice
from qcompile.pipeline import Context
from qcompile.plan import Kind, Quantizer, QuantPlan, Slot, affine

RNG = np.random.default_rng(3)
W = RNG.standard_normal((8, 3, 3, 3), np.float32)
X = RNG.standard_normal((10, 3, 8, 8), np.float32)
INT8, WIDE, NARROW = Int(8), Int(16), Int(8, narrow=True)
VALUES = ["c", "r", "p", "j", "s", "v", "y"]


def proto() -> onnx.ModelProto:
    """r and s, of different ranges, are joined; p is a view of r; v is a Softmax."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("MaxPool", ["r"], ["p"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("Sigmoid", ["c"], ["s"]),
        helper.make_node("Neg", ["s"], ["n"]),
        helper.make_node("Concat", ["p", "n"], ["j"], axis=1),
        helper.make_node("Softmax", ["j"], ["v"], axis=1),
        helper.make_node("Log", ["x"], ["log"]),
        helper.make_node("Conv", ["j", "k"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2, 8, 8])],
        [
            numpy_helper.from_array(W, "w"),
            numpy_helper.from_array(RNG.standard_normal((2, 16, 1, 1), np.float32), "k"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


MODEL = proto()


def computed(x: NDArray[np.float32], names: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """By onnxruntime alone, with the same optimisations."""
    shown = onnx.ModelProto()
    shown.CopyFrom(MODEL)
    del shown.graph.output[:]
    shown.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(shown.SerializeToString(), options)
    return dict(zip(names, session.run(list(names), {"x": x}), strict=True))


def calibrated(
    slots: Sequence[Slot], x: NDArray[np.generic] = X, parts: int = 1, **options: Any
) -> tuple[QuantPlan, Context]:
    plan = QuantPlan({slot.tensor: slot for slot in slots})
    spec = InputSpec("x", ("N", 3, 8, 8), np.dtype(np.float32))
    data = open_data([{"x": p} for p in np.array_split(x, parts)], [spec])
    log: list[str] = []
    context = Context(data, log=log.append)
    assert Calibrate(**options, threads=1)(ir.from_proto(MODEL), plan, context)
    assert not list(plan.open_slots())
    assert any(f"calibrated on {len(x)} samples" in line for line in log)
    return plan, context


def activation(tensor: str, *members: str, fmt: Int = INT8) -> Slot:
    return Slot(tensor, Kind.ACTIVATION, fmt, members)


def close(a: Quantizer, b: Quantizer) -> bool:
    return a.zero_point == b.zero_point and bool(np.allclose(a.scale, b.scale, rtol=1e-5))


def test_minmax_is_that_of_numpy() -> None:
    plan, _ = calibrated([activation(v) for v in "crpsn"], method="minmax")
    for name, array in computed(X, list("crpsn")).items():
        assert close(plan.quantizers[name], affine(array.min(), array.max(), INT8))


def test_moving_average_is_the_mean_over_samples_however_they_are_batched() -> None:
    values = computed(X, ["c", "s"])
    for parts in (1, 3, 10):
        plan, _ = calibrated([activation("c"), activation("s")], X, parts, method="moving-average")
        for name, array in values.items():
            rows = array.reshape(len(X), -1).astype(np.float64)
            lo, hi = rows.min(axis=1).mean(), rows.max(axis=1).mean()
            assert close(plan.quantizers[name], affine(lo, hi, INT8))


@pytest.mark.parametrize("method", ["percentile", "mse", "entropy"])
def test_histogram_methods_stay_within_what_was_seen_and_repeat(method: str) -> None:
    array = computed(X, ["c"])["c"]
    plan, _ = calibrated([activation("c")], method=method)
    again, _ = calibrated([activation("c")], method=method)
    assert plan.quantizers == again.quantizers
    whole = affine(array.min(), array.max(), INT8).scale[0]
    assert 0.3 * whole < plan.quantizers["c"].scale[0] <= whole


def test_mse_beats_minmax_on_the_data() -> None:
    array = computed(X, ["c"])["c"].astype(np.float64)

    def error(method: str) -> float:
        fmt = Int(4)
        q = calibrated([activation("c", fmt=fmt)], method=method)[0].quantizers["c"]
        codes = np.clip(np.rint(array / q.scale[0]) + q.zero_point[0], fmt.lo, fmt.hi)
        return float(np.square((codes - q.zero_point[0]) * q.scale[0] - array).sum())

    assert error("mse") < 0.8 * error("minmax")


def test_a_joined_slot_covers_all_its_operands_and_views_add_nothing() -> None:
    values = computed(X, ["p", "n", "r"])
    lo = min(a.min() for a in values.values())
    hi = max(a.max() for a in values.values())
    for slot in (activation("j", "p", "n", "r"), activation("r", "p", "j", "n")):
        plan, _ = calibrated([slot], method="minmax")
        assert close(plan.quantizers[slot.tensor], affine(lo, hi, INT8))
    r = values["r"]
    plan, _ = calibrated([activation("r", "p")], method="minmax")
    assert close(plan.quantizers["r"], affine(r.min(), r.max(), INT8))


def test_known_ranges_hold_whatever_the_data() -> None:
    slot = Slot("v", Kind.OUTPUT, Int(8), known_range=(0.0, 1.0))
    plan = QuantPlan({"v": slot})
    assert Calibrate()(ir.from_proto(MODEL), plan, Context())
    assert plan.quantizers["v"] == affine(0.0, 1.0, INT8)
    assert not Calibrate()(ir.from_proto(MODEL), plan, Context())


def test_wide_formats_get_headroom_unless_minmax_is_asked_for() -> None:
    y = computed(X, ["y"])["y"]
    slot = Slot("y", Kind.OUTPUT, WIDE)
    for method, room in (("mse", 1.5), ("percentile", 1.5), ("moving-average", 1.5), ("minmax", 1)):
        plan, _ = calibrated([slot], method=method, headroom=1.5)
        assert close(plan.quantizers["y"], affine(room * y.min(), room * y.max(), WIDE))


def test_quantizers_already_there_stay() -> None:
    plan = QuantPlan({"c": activation("c")}, {"c": affine(-1, 1, INT8)})
    assert not Calibrate()(ir.from_proto(MODEL), plan, Context())
    assert plan.quantizers == {"c": affine(-1, 1, INT8)}


def test_a_subsample_is_stated_and_leaves_the_extremes_alone() -> None:
    plan, context = calibrated(
        [activation("c")], method="percentile", percentile=100.0, elements=50
    )
    c = computed(X, ["c"])["c"]
    whole = affine(c.min(), c.max(), INT8)
    assert plan.quantizers["c"].scale[0] <= whole.scale[0]
    said: list[str] = []
    context.log = said.append
    again = QuantPlan({"c": activation("c")})
    Calibrate(method="percentile", percentile=100.0, elements=50, threads=1)(
        ir.from_proto(MODEL), again, context
    )
    assert again.quantizers == plan.quantizers
    assert "1 large tensors count at most 50 elements" in said[-1]
    context.seed = 1
    other = QuantPlan({"c": activation("c")})
    Calibrate(method="percentile", percentile=100.0, elements=50, threads=1)(
        ir.from_proto(MODEL), other, context
    )
    assert other.quantizers != plan.quantizers


def test_missing_empty_and_poisonous_data() -> None:
    plan = QuantPlan({"c": activation("c")})
    with pytest.raises(BadInput, match="--calib"):
        Calibrate()(ir.from_proto(MODEL), plan, Context())
    x = np.abs(X) + np.float32(1e-3)
    x[4, 0, 0, 0] = -1.0
    with pytest.raises(BadInput, match="'log' from sample 4"):
        calibrated([activation("log")], x)
    with pytest.raises(BadInput, match="no constant"):
        calibrated([Slot("c", Kind.WEIGHT, NARROW)])


@pytest.mark.parametrize(
    "options",
    [
        {"method": "mean"},
        {"input_method": "kl"},
        {"weights_range": "max"},
        {"percentile": 101.0},
        {"headroom": 0.5},
        {"headroom": float("nan")},
        {"bins": 1000},
        {"elements": -1},
    ],
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        Calibrate(**options)


# weights


def test_weights_are_symmetric_per_channel_or_per_tensor() -> None:
    plan, _ = calibrated([Slot("w", Kind.WEIGHT, NARROW, axis=0), activation("c")])
    q = plan.quantizers["w"]
    wanted = np.float32(np.abs(W).max(axis=(1, 2, 3)).astype(np.float64) / 127)
    assert (q.scale, q.zero_point, q.axis) == (tuple(wanted.tolist()), (0,) * 8, 0)
    plan, _ = calibrated([Slot("w", Kind.WEIGHT, NARROW), activation("c")])
    q = plan.quantizers["w"]
    assert (q.scale, q.zero_point, q.axis) == (
        (float(np.float32(np.abs(W).max() / 127.0)),),
        (0,),
        None,
    )


def test_the_whole_range_of_a_format_is_used_and_zero_channels_are_harmless() -> None:
    w = np.float32([[-8, 7, 0], [-4, 1, 0], [1, 3.5, 0], [0, 0, 0]])
    assert symmetric_scales(w, 0, Int(4), "minmax") == (1.0, 0.5, 0.5, 1.0)
    assert symmetric_scales(np.zeros((2, 2), np.float32), 0, NARROW, "minmax") == (2**-24,) * 2
    tiny = np.float32([[1e-45], [1.0]])
    assert all(np.float32(s) > 0 for s in symmetric_scales(tiny, 0, NARROW, "mse"))


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(0, 1000), st.integers(2, 8), st.sampled_from([None, 0, 1]))
def test_mse_of_weights_is_the_least_of_all_clipped_ranges(
    seed: int, bits: int, axis: int | None
) -> None:
    w = np.random.default_rng(seed).laplace(size=(3, 4, 5)).astype(np.float32)
    fmt = Int(bits, narrow=bits == 8)
    full, best = (symmetric_scales(w, axis, fmt, r) for r in ("minmax", "mse"))
    channels = (
        [w.ravel()] if axis is None else [w.take(i, axis).ravel() for i in range(w.shape[axis])]
    )

    def error(x: NDArray[np.float32], scale: float) -> float:
        codes = np.clip(np.rint(x.astype(np.float64) / scale), fmt.lo, fmt.hi)
        return float(np.square(x - codes * scale).sum())

    for x, whole, chosen in zip(channels, full, best, strict=True):
        least = min(error(x, whole * f) for f in np.linspace(0.3, 1, 36))
        assert 0.29 * whole < chosen <= whole
        assert error(x, chosen) <= least * (1 + 1e-4) + 1e-12


# lattices


def round_trip(x: NDArray[np.float32], q: Quantizer) -> NDArray[np.float32]:
    """QuantizeLinear and DequantizeLinear of onnxruntime."""
    kind = {8: TensorProto.INT8, 16: TensorProto.INT16}[q.format.bits]
    if not q.format.signed:
        kind = {8: TensorProto.UINT8, 16: TensorProto.UINT16}[q.format.bits]
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None])],
        [
            numpy_helper.from_array(np.float32(q.scale[0]), "s"),
            helper.make_tensor("z", kind, [], [q.zero_point[0]]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    result = onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})[0]
    return np.asarray(result, np.float32)


def found(x: NDArray[np.float32], fmt: Int = INT8) -> Quantizer | None:
    distinct = Distinct(fmt.levels)
    for part in np.array_split(x, 3):
        shard = Distinct(fmt.levels)
        shard.add(part)
        distinct.merge(shard)
    return lattice(distinct, fmt)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    st.floats(2.0**-20, 2.0**20, width=32),
    st.sampled_from([INT8, NARROW, Int(8, signed=False), WIDE]),
    st.data(),
)
def test_values_on_a_lattice_are_represented_exactly(
    step: float, fmt: Int, data: st.DataObject
) -> None:
    span = data.draw(st.integers(16, fmt.levels - 1))
    first = data.draw(st.integers(-span, 0))
    codes = data.draw(
        st.lists(st.integers(first, first + span), min_size=16, max_size=60, unique=True)
    )
    # Neighbours are seen, or the step could as well be a larger one.
    codes += [first, first + 1, first + span]
    x = np.float32(codes) * np.float32(step)
    q = found(x, fmt)
    assert q is not None
    assert q.scale == (step,)
    np.testing.assert_array_equal(round_trip(x, q), x)


def test_well_known_lattices() -> None:
    pixels = np.arange(256, dtype=np.float32)
    assert found(pixels) == Quantizer(INT8, (1.0,), (-128,))
    assert found(pixels[:200]) == Quantizer(INT8, (1.0,), (-128,))
    assert found(pixels, Int(8, signed=False)) == Quantizer(Int(8, signed=False), (1.0,), (0,))
    assert found(pixels - 128) == Quantizer(INT8, (1.0,), (0,))
    assert found(-pixels) == Quantizer(INT8, (1.0,), (127,))
    unit = found(pixels / np.float32(255))
    assert unit is not None
    np.testing.assert_allclose(round_trip(pixels / np.float32(255), unit), pixels / 255, rtol=2e-7)
    features = (pixels - np.float32(128 + 83)) * np.float32(0.5847029)
    assert found(features) == Quantizer(INT8, (float(np.float32(0.5847029)),), (83,))
    # Multiples -171 to 18 of the step: codes -95 to 94, 33 free at either end.
    assert found(features[40:230]) == Quantizer(INT8, (float(np.float32(0.5847029)),), (76,))


def test_what_is_on_no_lattice_or_needs_too_many_codes() -> None:
    pixels = np.arange(256, dtype=np.float32)
    assert found(np.append(pixels[:-1], np.float32(7.5))) is None
    assert found(np.arange(257, dtype=np.float32)) is None
    assert found(pixels + 1) is None
    assert found(pixels / np.float32(127.5) - 1) is None
    assert found(np.float32([0, 1, 1, 0])) is None
    assert found(np.zeros(5, np.float32)) is None
    assert found(np.random.default_rng(0).standard_normal(100).astype(np.float32)) is None
    assert found(pixels, NARROW) is None


def test_inputs_on_a_lattice_keep_it_and_others_get_their_range() -> None:
    slot = Slot("x", Kind.INPUT, INT8)
    pixels = np.random.default_rng(0).integers(0, 256, X.shape).astype(np.uint8)
    assert calibrated([slot], pixels)[0].quantizers["x"] == Quantizer(INT8, (1.0,), (-128,))
    assert calibrated([slot])[0].quantizers["x"] == affine(X.min(), X.max(), INT8)
    known = Slot("x", Kind.INPUT, INT8, known_range=(-3.0, 5.0))
    plan, _ = calibrated([known, activation("c")], pixels)
    assert plan.quantizers["x"] == affine(-3.0, 5.0, INT8)


def test_an_input_that_shares_its_quantizer_is_no_lattice() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, X.shape).astype(np.uint8)
    plan, _ = calibrated([Slot("x", Kind.INPUT, INT8, ("n",))], pixels, method="minmax")
    assert close(
        plan.quantizers["x"], affine(computed(np.float32(pixels), ["n"])["n"].min(), 255.0, INT8)
    )


def test_a_lattice_whose_narrowest_gap_was_rounded_is_found() -> None:
    """-136 and -135 steps of 125377 differ by one less in float32, where 65535 steps would need 65536 levels."""
    codes = np.array([-136, *range(-135, 17), 65399])
    x = codes.astype(np.float32) * np.float32(125377)
    q = found(x, WIDE)
    assert q is not None
    assert q.scale == (125377.0,)
    np.testing.assert_array_equal(round_trip(x, q), x)
