"""The QDQ model against a simulation of the rounding in numpy, in onnxruntime with and without optimisation.

With scales that are powers of two every product and sum is exact in float32, so nothing may differ at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper, numpy_helper, parser

from qcompile.errors import BadInput
from qcompile.formats import Int
from qcompile.onnx.qdq import export
from qcompile.plan import Kind, Quantizer, QuantPlan, Slot, affine

Floats = NDArray[np.float32]
Reals = NDArray[np.float64]

LEVELS = (
    ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
)
"""As written, and with fake quantization fused into integer kernels."""

SEARCH = settings(deadline=None, derandomize=True, max_examples=20)
I4, I8, U8, I16 = Int(4), Int(8), Int(8, signed=False), Int(16)


def run(
    model: onnx.ModelProto, feeds: dict[str, Floats], level: ort.GraphOptimizationLevel
) -> list[Floats]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = level
    # without it uint8 x int8 kernels saturate on machines without VNNI
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    results: list[Floats] = session.run(None, feeds)
    return results


def float_model(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, list[int | str]],
    outputs: dict[str, list[int | str]],
    constants: dict[str, NDArray[np.generic]],
    functions: Sequence[onnx.FunctionProto] = (),
) -> ir.Model:
    def infos(shapes: dict[str, list[int | str]]) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in shapes.items()
        ]

    graph = helper.make_graph(
        nodes,
        "float",
        infos(inputs),
        infos(outputs),
        [numpy_helper.from_array(a, n) for n, a in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21)]
    if functions:
        opsets.append(helper.make_opsetid("qcompile", 1))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)
    onnx.checker.check_model(model, full_check=True)
    return ir.from_proto(model)


def plan_of(*entries: tuple[Kind, Quantizer, Sequence[str]]) -> QuantPlan:
    plan = QuantPlan()
    for kind, q, members in entries:
        plan.slots[members[0]] = Slot(members[0], kind, q.format, tuple(members), q.axis)
        plan.quantizers[members[0]] = q
    return plan


def fake(x: Reals | Floats, q: Quantizer) -> Reals:
    """What the numbers become: nearest code, half to even, saturated."""
    shape = [-1 if i == q.axis else 1 for i in range(x.ndim)] if q.axis is not None else ()
    scale, zero = np.array(q.scale).reshape(shape), np.array(q.zero_point).reshape(shape)
    code = np.clip(np.rint(x.astype(np.float64) / scale) + zero, q.format.lo, q.format.hi)
    real: Reals = (code - zero) * scale
    return real


def conv2d(x: Reals, w: Reals, b: Reals, pad: int) -> Reals:
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[2:], axis=(2, 3))
    sums: Reals = np.einsum("nchwij,ocij->nohw", windows, w) + b[:, None, None]
    return sums


class Net:
    """Conv, Relu, MaxPool, a residual Add with a second Conv, Reshape, Gemm."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.w1 = rng.normal(0, 0.2, (4, 3, 3, 3)).astype(np.float32)
        self.b1 = rng.normal(0, 0.5, 4).astype(np.float32)
        self.w2 = rng.normal(0, 0.3, (4, 4, 1, 1)).astype(np.float32)
        self.b2 = rng.normal(0, 0.5, 4).astype(np.float32)
        self.w3 = rng.normal(0, 0.2, (5, 36)).astype(np.float32)
        self.b3 = rng.normal(0, 0.5, 5).astype(np.float32)
        self.x = rng.normal(0, 1, (3, 3, 6, 6)).astype(np.float32)

    def model(self) -> ir.Model:
        nodes = [
            helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "conv1", pads=[1] * 4),
            helper.make_node("Relu", ["c1"], ["r1"], "relu1"),
            helper.make_node(
                "MaxPool", ["r1"], ["p1"], "pool", kernel_shape=[2, 2], strides=[2, 2]
            ),
            helper.make_node("Conv", ["p1", "w2", "b2"], ["c2"], "conv2", kernel_shape=[1, 1]),
            helper.make_node("Add", ["c2", "p1"], ["s"], "add"),
            helper.make_node("Reshape", ["s", "shape"], ["flat"], "flatten"),
            helper.make_node("Gemm", ["flat", "w3", "b3"], ["y"], "dense", transB=1),
        ]
        constants = {n: getattr(self, n) for n in ("w1", "b1", "w2", "b2", "w3", "b3")}
        constants["shape"] = np.array([0, 36], np.int64)
        return float_model(nodes, {"x": ["N", 3, 6, 6]}, {"y": ["N", 5]}, constants)

    def plan(self, q: dict[str, Quantizer]) -> QuantPlan:
        return plan_of(
            (Kind.INPUT, q["x"], ["x"]),
            (Kind.WEIGHT, q["w1"], ["w1"]),
            (Kind.ACTIVATION, q["r1"], ["r1", "p1"]),
            (Kind.WEIGHT, q["w2"], ["w2"]),
            (Kind.ACTIVATION, q["s"], ["s", "flat"]),
            (Kind.WEIGHT, q["w3"], ["w3"]),
            (Kind.OUTPUT, q["y"], ["y"]),
        )

    def simulate(self, q: dict[str, Quantizer]) -> Reals:
        def bias(b: Floats, x: str, w: str) -> Reals:
            step = q[x].scale[0] * np.array(q[w].scale)
            return np.rint(b / step) * step

        x = fake(self.x, q["x"])
        c1 = conv2d(x, fake(self.w1, q["w1"]), bias(self.b1, "x", "w1"), 1)
        r1 = fake(np.maximum(c1, 0), q["r1"])
        p1 = r1.reshape(len(x), 4, 3, 2, 3, 2).max(axis=(3, 5))
        c2 = conv2d(p1, fake(self.w2, q["w2"]), bias(self.b2, "r1", "w2"), 0)
        s = fake(c2 + p1, q["s"]).reshape(-1, 36)
        return fake(s @ fake(self.w3, q["w3"]).T + bias(self.b3, "s", "w3"), q["y"])


def steps(r: st.DataObject, count: int, exponents: tuple[int, int]) -> tuple[float, ...]:
    drawn = r.draw(st.lists(st.integers(*exponents), min_size=count, max_size=count))
    return tuple(2.0**e for e in drawn)


def activation(r: st.DataObject, formats: Sequence[Int], exponents: tuple[int, int]) -> Quantizer:
    fmt = r.draw(st.sampled_from(formats))
    finer = 0 if fmt.bits > 4 else 3
    (scale,) = steps(r, 1, (exponents[0] + finer, exponents[1] + finer))
    return Quantizer(fmt, (scale,), (r.draw(st.integers(fmt.lo // 2, fmt.hi // 2)),))


def weights(r: st.DataObject, channels: int) -> Quantizer:
    fmt = r.draw(st.sampled_from([Int(8, narrow=True), Int(4), Int(2), Int(8)]))
    count = r.draw(st.sampled_from([1, channels]))
    scales = steps(r, count, (-8, -6) if fmt.bits == 8 else (-4, -2))
    return Quantizer(fmt, scales, (0,) * count, None if count == 1 else 0)


@SEARCH
@given(st.data())
def test_scales_of_powers_of_two_are_exact(r: st.DataObject) -> None:
    net = Net(r.draw(st.integers(0, 1000)))
    narrow = [I8, U8, I4, Int(8, narrow=True), Int(6)]
    q = {
        "x": activation(r, narrow, (-6, -5)),
        "w1": weights(r, 4),
        "r1": activation(r, narrow, (-6, -5)),
        "w2": weights(r, 4),
        "s": activation(r, narrow, (-6, -5)),
        "w3": weights(r, 5),
        "y": activation(r, [*narrow, I16], (-6, -5)),
    }
    model = export(net.model(), net.plan(q))
    onnx.checker.check_model(model, full_check=True)
    expected = net.simulate(q)
    for level in LEVELS:
        (got,) = run(model, {"x": net.x}, level)
        np.testing.assert_array_equal(got, expected, err_msg=str(level))


@SEARCH
@given(st.integers(0, 1000), st.sampled_from([I8, U8, I16]))
def test_any_scales_stay_within_a_step(seed: int, fmt: Int) -> None:
    net = Net(seed)

    def symmetric(w: Floats) -> Quantizer:
        peaks = np.abs(w).reshape(len(w), -1).max(axis=1)
        row = tuple(float(np.float32(p / 127)) for p in peaks)
        return Quantizer(Int(8, narrow=True), row, (0,) * len(row), 0)

    q = {
        "x": affine(-3, 3, fmt),
        "w1": symmetric(net.w1),
        "r1": affine(0, 4, fmt),
        "w2": symmetric(net.w2),
        "s": affine(-3, 6, fmt),
        "w3": symmetric(net.w3),
        "y": affine(-8, 8, I16),
    }
    model = export(net.model(), net.plan(q))
    expected = net.simulate(q)
    for level in LEVELS:
        (got,) = run(model, {"x": net.x}, level)
        # one step of `s` more or less, where a sum falls on a half, reaches y through one weight
        slack = q["s"].scale[0] * 127 * max(q["w3"].scale) * 2 + q["y"].scale[0]
        assert np.abs(got - expected).max() <= slack, level
        assert np.isclose(got, expected, atol=2.5 * q["y"].scale[0]).mean() > 0.6, level


WHOLE: dict[str, str] = {
    "Relu": "Relu (x)",
    "Clip": "Clip (x, low, high)",
    "LeakyRelu": "LeakyRelu <alpha = 0.1> (x)",
    "Sigmoid": "Sigmoid (x)",
    "HardSigmoid": "HardSigmoid (x)",
    "HardSwish": "HardSwish (x)",
    "Tanh": "Tanh (x)",
    "Gelu": "Gelu (x)",
    "Softmax": "Softmax <axis = 1> (x)",
    "AveragePool": """AveragePool <ceil_mode = 0, count_include_pad = 0, dilations = [1, 1],
        kernel_shape = [2, 2], pads = [0, 0, 1, 1], strides = [1, 1]> (x)""",
    "GlobalAveragePool": "GlobalAveragePool (x)",
    "Mul": "Mul (x, x)",
    "Sub": "Sub (x, other)",
    "Concat": "Concat <axis = 1> (x, x)",
}
MOVED: dict[str, str] = {
    "MaxPool": """MaxPool <ceil_mode = 0, dilations = [1, 1], kernel_shape = [2, 2], pads = [0, 0, 1, 1],
        storage_order = 0, strides = [2, 2]> (x)""",
    "Reshape": "Reshape (x, shape)",
    "Transpose": "Transpose <perm = [0, 2, 3, 1]> (x)",
    "Slice": "Slice (x, from, to, axes, steps)",
    "Pad": "Pad (x, frame)",
}


@pytest.mark.parametrize("op", [*WHOLE, *MOVED])
@pytest.mark.parametrize("fmt", [I8, U8, I16, I4], ids=str)
def test_operator(op: str, fmt: Int) -> None:
    """One operator between two roundings; what only moves values shares the rounding of its operand."""
    source = parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        single (float[N,4,5,5] x) => (float[] y)
        <float[1,4,5,5] other, float low = {{-0.5}}, float high = {{1.25}}, int64[2] shape = {{0, 100}},
         int64[2] from = {{1, 0}}, int64[2] to = {{4, 5}}, int64[2] axes = {{2, 3}}, int64[2] steps = {{1, 2}},
         int64[8] frame = {{0, 0, 1, 0, 0, 0, 1, 2}}> {{ y = {(WHOLE | MOVED)[op]} }}"""
    )
    rng = np.random.default_rng(len(op))
    other = rng.normal(0, 1, (1, 4, 5, 5)).astype(np.float32)
    used = set(source.graph.node[0].input)
    constants = {t.name: numpy_helper.to_array(t) for t in source.graph.initializer}
    constants["other"] = other
    del source.graph.initializer[:]
    for name, array in constants.items():
        if name in used:
            source.graph.initializer.append(numpy_helper.from_array(array, name))
    source = onnx.shape_inference.infer_shapes(source, strict_mode=True)
    x = rng.normal(0, 1, (8, 4, 5, 5)).astype(np.float32)
    q = {"x": affine(-2.5, 3, fmt), "y": affine(-2.5, 3, fmt), "other": affine(-2, 2, I8)}
    entries = [(Kind.WEIGHT, q["other"], ["other"])] if "other" in used else []
    if op in MOVED:
        plan = plan_of((Kind.INPUT, q["x"], ["x", "y"]))
    else:
        plan = plan_of((Kind.INPUT, q["x"], ["x"]), *entries, (Kind.OUTPUT, q["y"], ["y"]))
    exported = export(ir.from_proto(source), plan)
    onnx.checker.check_model(exported, full_check=True)
    for t in source.graph.initializer:
        if t.name == "other":
            t.CopyFrom(numpy_helper.from_array(fake(other, q["other"]).astype(np.float32), "other"))
    (real,) = run(source, {"x": fake(x, q["x"]).astype(np.float32)}, LEVELS[0])
    expected = fake(real, q["y"])
    for level in LEVELS:
        (got,) = run(exported, {"x": x}, level)
        wrong = np.abs(got - expected) / q["y"].scale[0]
        # float sums may fall on the other side of a half, and fused kernels round products and tables of their own
        assert wrong.max() < (0.01 if op in MOVED and fmt is not I16 else 1.01), level
        plain = level is LEVELS[0] and op != "AveragePool"
        assert (wrong < 0.01).mean() > (0.9 if plain else 0.65), level


def test_what_is_written() -> None:
    net = Net(0)
    q = {
        "x": affine(-3, 3, I8),
        "w1": Quantizer(Int(8, narrow=True), (2.0**-7, 2.0**-6, 3 * 2.0**-8, 2.0**-5), (0,) * 4, 0),
        "r1": affine(0, 4, I8),
        "w2": Quantizer(I4, (0.125,), (0,)),
        "s": affine(-3, 6, I16),
        "w3": Quantizer(I8, (0.25,), (0,)),
        "y": affine(-8, 8, I16),
    }
    source = net.model()
    before = ir.to_proto(source).SerializeToString(deterministic=True)
    model = export(source, net.plan(q))
    assert ir.to_proto(source).SerializeToString(deterministic=True) == before
    again = export(source, net.plan(q))
    assert again.SerializeToString(deterministic=True) == model.SerializeToString(
        deterministic=True
    )
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    makers = {n.output[0]: n for n in model.graph.node}
    conv1 = next(n for n in model.graph.node if n.op_type == "Conv")
    # weights: int8 codes, a scale per output channel
    dequantize = makers[conv1.input[1]]
    assert dequantize.op_type == "DequantizeLinear"
    assert {a.name: a.i for a in dequantize.attribute} == {"axis": 0}
    codes = stored[dequantize.input[0]]
    assert codes.dtype == np.int8
    np.testing.assert_array_equal(
        codes * np.array(q["w1"].scale, np.float32).reshape(4, 1, 1, 1),
        fake(net.w1, q["w1"]).astype(np.float32),
    )
    # bias: int32 codes of accumulator steps
    dequantize = makers[conv1.input[2]]
    assert stored[dequantize.input[0]].dtype == np.int32
    step = q["x"].scale[0] * np.array(q["w1"].scale)
    np.testing.assert_array_equal(stored[dequantize.input[1]], step.astype(np.float32))
    np.testing.assert_array_equal(stored[dequantize.input[0]], np.rint(net.b1 / step))
    assert stored[makers["s"].input[1]].shape == stored[makers["s"].input[2]].shape == ()
    # members of a slot: one scale
    both = [makers[name] for name in ("r1", "p1")]
    assert [n.op_type for n in both] == ["DequantizeLinear"] * 2
    assert both[0].input[1:] == both[1].input[1:]
    # nothing float is left over
    assert not {"w1", "w2", "w3", "b1", "b2", "b3"} & set(stored)
    assert stored[makers["s"].input[2]].dtype == np.int16


def test_functions_inputs_and_names_survive() -> None:
    """A model-local activation, an input read twice, an output that is also read, and hostile names."""
    hostile = '*/ #include "x"'
    silu = parser.parse_function(
        '<domain: "qcompile", opset_import: ["" : 21]> Silu (x) => (y) { s = Sigmoid (x)\n y = Mul (x, s) }'
    )
    nodes = [
        helper.make_node("Silu", [hostile], ["<script>"], hostile, domain="qcompile"),
        helper.make_node("Add", ["<script>", hostile], ["y"], "y.QuantizeLinear"),
    ]
    shape: list[int | str] = ["N", 8]
    model = float_model(nodes, {hostile: shape}, {"y": shape, "<script>": shape}, {}, [silu])
    q = {name: affine(-4, 4, fmt) for name, fmt in ((hostile, U8), ("<script>", I8), ("y", I16))}
    plan = plan_of(
        (Kind.INPUT, q[hostile], [hostile]),
        (Kind.ACTIVATION, q["<script>"], ["<script>"]),
        (Kind.OUTPUT, q["y"], ["y"]),
    )
    exported = export(model, plan)
    onnx.checker.check_model(exported, full_check=True)
    x = np.random.default_rng(3).normal(0, 2, (64, 8)).astype(np.float32)
    rounded = fake(x, q[hostile])
    middle = fake(rounded / (1 + np.exp(-rounded)), q["<script>"])
    for level in LEVELS:
        y, silu_out = run(exported, {hostile: x}, level)
        wrong = np.abs(silu_out - middle)
        assert (wrong < 1e-6).mean() > 0.99
        assert wrong.max() <= q["<script>"].scale[0] * 1.001
        np.testing.assert_allclose(y, fake(silu_out + rounded, q["y"]), atol=1e-6 + q["y"].scale[0])


def test_matmul_with_an_added_bias_and_constants_of_16_bits() -> None:
    rng = np.random.default_rng(4)
    w = rng.normal(0, 0.2, (6, 5)).astype(np.float32)
    b = rng.normal(0, 1, 5).astype(np.float32)
    c = rng.normal(0, 1, (1, 1, 5)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Add", ["b", "m"], ["a"]),
        helper.make_node("Add", ["a", "c"], ["y"]),
    ]
    model = float_model(nodes, {"x": ["N", 3, 6]}, {"y": ["N", 3, 5]}, {"w": w, "b": b, "c": c})
    q = {
        "x": Quantizer(I8, (2.0**-5,), (3,)),
        "w": Quantizer(Int(8, narrow=True), tuple(2.0**-e for e in (6, 7, 8, 7, 6)), (0,) * 5, 1),
        "a": Quantizer(I16, (2.0**-9,), (-7,)),
        "c": Quantizer(I16, (2.0**-12,), (0,)),
    }
    plan = plan_of(
        (Kind.INPUT, q["x"], ["x"]),
        (Kind.WEIGHT, q["w"], ["w"]),
        (Kind.ACTIVATION, q["a"], ["a"]),
        (Kind.WEIGHT, q["c"], ["c"]),
        # wider than anything float32 holds: stays as it is
        (Kind.OUTPUT, Quantizer(Int(32), (2.0**-20,), (0,)), ["y"]),
    )
    exported = export(model, plan)
    onnx.checker.check_model(exported, full_check=True)
    kinds = {numpy_helper.to_array(t).dtype for t in exported.graph.initializer}
    assert {np.dtype(np.int32), np.dtype(np.int16), np.dtype(np.int8)} <= kinds
    x = rng.normal(0, 1, (4, 3, 6)).astype(np.float32)
    step = q["x"].scale[0] * np.array(q["w"].scale)
    sums = fake(x, q["x"]) @ fake(w, q["w"]) + np.rint(b / step) * step
    expected = fake(sums, q["a"]) + fake(c, q["c"])
    for level in LEVELS:
        np.testing.assert_array_equal(run(exported, {"x": x}, level)[0], expected)


def test_a_plan_for_another_model_is_refused() -> None:
    plan = plan_of((Kind.ACTIVATION, affine(-1, 1, I8), ["elsewhere"]))
    with pytest.raises(BadInput, match="elsewhere"):
        export(Net(0).model(), plan)


def test_a_bias_stays_float_where_a_factor_is_not_known() -> None:
    net = Net(1)
    plan = plan_of((Kind.INPUT, affine(-3, 3, I8), ["x"]))
    model = export(net.model(), plan)
    assert {"b1", "w1"} <= {t.name for t in model.graph.initializer}
    rounded = fake(net.x, plan.quantizers["x"]).astype(np.float32)
    (float_result,) = run(ir.to_proto(net.model()), {"x": rounded}, LEVELS[0])
    for level in LEVELS:
        np.testing.assert_allclose(run(model, {"x": net.x}, level)[0], float_result, atol=1e-4)
