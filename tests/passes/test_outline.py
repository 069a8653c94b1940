from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.helper import make_node

from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.fold import Fold
from qcompile.passes.outline import ELEMENTWISE, Outline

Bench = Any
Weights = dict[str, Any]
Build = Callable[[], tuple[list[onnx.NodeProto], Weights]]


def f32(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def nodes_of(text: str) -> list[onnx.NodeProto]:
    """`Mul(x, Sigmoid(x))` line by line: `s = Sigmoid(x)` then `y = Mul(x, s)`."""
    found = []
    for line in filter(None, map(str.strip, text.split(";"))):
        output, call = line.split(" = ")
        op, inputs = call.rstrip(")").split("(")
        found.append(make_node(op, [i.strip() for i in inputs.split(",")], [output], name=output))
    return found


NUMBERS = {
    "zero": 0.0, "half": 0.5, "one": 1.0, "two": 2.0, "three": 3.0, "six": 6.0, "root2": 2**0.5,
    "cube": 0.044715, "pi": (2 / np.pi) ** 0.5, "sixth": 1 / 6, "leak": 0.1, "invroot2": 0.5**0.5,
}  # fmt: skip

CURVES = {
    "Silu": "s = Sigmoid(x); y = Mul(x, s)",
    "HardSwish": "a = Add(x, three); c = Clip(a, zero, six); d = Div(c, six); y = Mul(x, d)",
    "HardSigmoid": "a = Add(x, three); c = Clip(a, zero, six); y = Mul(c, sixth)",
    "GeluErf": "d = Div(x, root2); e = Erf(d); a = Add(e, one); m = Mul(x, a); y = Mul(m, half)",
    "GeluTanh": "p = Pow(x, three); c = Mul(cube, p); a = Add(x, c); b = Mul(a, pi); t = Tanh(b);"
    " o = Add(one, t); h = Mul(half, x); y = Mul(h, o)",
    "Mish": "s = Softplus(x); t = Tanh(s); y = Mul(x, t)",
    "LeakyRelu": "l = Mul(x, leak); y = Max(x, l)",
    "Sigmoid": "n = Neg(x); e = Exp(n); o = Add(e, one); y = Reciprocal(o)",
    "Tanh": "d = Mul(x, two); s = Sigmoid(d); m = Mul(s, two); y = Sub(m, one)",
    "Softplus": "e = Exp(x); o = Add(e, one); y = Log(o)",
    "Unary1": "a = Add(x, three); y = Tanh(a)",
}
OTHER_SPELLINGS = {
    "GeluErf": "m = Mul(x, invroot2); e = Erf(m); a = Add(one, e); h = Mul(half, x); y = Mul(h, a)",
    "HardSwish": "h = HardSigmoid(x); y = Mul(h, x)",
    "LeakyRelu": "l = Mul(x, leak); g = Greater(x, zero); y = Where(g, x, l)",
    "Mish": "e = Exp(x); o = Add(e, one); l = Log(o); t = Tanh(l); y = Mul(t, x)",
}


def scalars(nodes: list[onnx.NodeProto]) -> Weights:
    used = {i for n in nodes for i in n.input}
    return {k: np.float32(v) for k, v in NUMBERS.items() if k in used}


@pytest.mark.parametrize(("name", "text"), [*CURVES.items(), *OTHER_SPELLINGS.items()])
def test_a_decomposed_curve_is_one_named_node(bench: Bench, name: str, text: str) -> None:
    nodes = nodes_of(text)
    if text == OTHER_SPELLINGS["HardSwish"]:
        nodes[0].attribute.append(onnx.helper.make_attribute("alpha", 1 / 6))
    original = bench.model(nodes, {"x": ["N", 3, 4, 4]}, scalars(nodes))
    model = bench.keeps(original, Outline(), Canonicalize())
    (node,) = model.graph
    assert (node.domain, node.op_type, node.name) == ("qcompile", name, "y")
    assert node.outputs[0].name == "y"


def test_equal_bodies_share_a_function_and_different_bodies_do_not(bench: Bench) -> None:
    text = """c1 = Conv(x, w); a1 = Sigmoid(c1); b1 = Mul(c1, a1); c2 = Conv(b1, w); a2 = Sigmoid(c2);
        b2 = Mul(c2, a2); c3 = Conv(b2, w); a3 = Sigmoid(c3); b3 = Mul(a3, c3); p = Conv(b3, w);
        q = Add(p, three); r = Tanh(q); s = Conv(r, w); t = Add(s, two); y = Tanh(t)"""
    nodes = nodes_of(text)
    weights = {**scalars(nodes), "w": f32(3, 3, 1, 1) / 2}
    model = bench.keeps(bench.model(nodes, {"x": ["N", 3, 4, 4]}, weights), Outline())
    called = [n.op_type for n in model.graph if n.domain]
    assert called == ["Silu", "Silu", "Silu2", "Unary1", "Unary2"]
    assert {f.name for f in model.functions.values()} == set(called)


@pytest.mark.parametrize(
    "op", ["Relu", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid", "LeakyRelu", "Gelu", "Exp", "Abs"]
)
def test_a_single_standard_curve_stays(bench: Bench, op: str) -> None:
    model = bench.keeps(bench.model([make_node(op, ["x"], ["y"])], {"x": ["N", 5]}), Outline())
    assert [(n.domain, n.op_type) for n in model.graph] == [("", op)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("y = Max(x, zero)", "Relu"),
        ("y = Max(zero, x)", "Relu"),
        ("a = Max(x, zero); y = Min(a, six)", "Clip"),
        ("a = Relu(x); y = Clip(a, , six)", "Clip"),
        ("a = Min(six, x); y = Relu(a)", "Clip"),
        ("a = Clip(x, half, two); b = Max(a, one); y = Min(b, three)", "Clip"),
        ("a = Relu(x); y = Max(a, half)", "Clip"),
        ("y = Clip(x, zero)", "Relu"),
        ("a = Relu(x); y = Relu(a)", "Relu"),
        ("a = Relu(x); y = Clip(a, two, one)", "Clip"),
    ],
)
def test_limits_become_one_clip_or_relu(bench: Bench, text: str, expected: str) -> None:
    nodes = nodes_of(text)
    original = bench.model(nodes, {"x": ["N", 50]}, scalars(nodes))
    model = bench.keeps(original, Outline(), Canonicalize())
    assert [(n.domain, n.op_type, len(n.inputs)) for n in model.graph] == [
        ("", expected, 1 if expected == "Relu" else 3)
    ]


def test_a_residual_sum_is_not_swallowed(bench: Bench) -> None:
    nodes = nodes_of("p = Conv(x, w); q = Add(p, x); a = Sigmoid(q); y = Mul(q, a)")
    model = bench.keeps(
        bench.model(nodes, {"x": ["N", 3, 4, 4]}, {"w": f32(3, 3, 1, 1)}), Outline()
    )
    assert bench.kinds(model) == ["Conv", "Add", "Silu"]


def test_a_gate_from_elsewhere_is_not_swallowed(bench: Bench) -> None:
    nodes = nodes_of("p = Conv(x, w); g = Sigmoid(p); y = Mul(x, g)")
    model = bench.keeps(
        bench.model(nodes, {"x": ["N", 3, 4, 4]}, {"w": f32(3, 3, 1, 1)}), Outline()
    )
    assert bench.kinds(model) == ["Conv", "Sigmoid", "Mul"]


def test_a_value_read_outside_ends_the_region(bench: Bench) -> None:
    nodes = nodes_of("a = Add(x, one); b = Tanh(a); c = Mul(b, two); d = Exp(b); y = Concat(c, d)")
    nodes[-1].attribute.append(onnx.helper.make_attribute("axis", 1))
    model = bench.keeps(bench.model(nodes, {"x": ["N", 3]}, scalars(nodes)), Outline())
    assert bench.kinds(model) == ["Unary1", "Unary2", "Exp", "Concat"]


def test_an_inner_value_that_is_an_output_ends_the_region(bench: Bench) -> None:
    nodes = nodes_of("a = Add(x, one); b = Tanh(a); y = Mul(b, two)")
    original = bench.model(nodes, {"x": ["N", 3]}, scalars(nodes), outputs=["b", "y"])
    model = bench.keeps(original, Outline())
    assert bench.kinds(model) == ["Unary1", "Unary2"]
    assert [v.name for v in model.graph.outputs] == ["b", "y"]


def test_constants_per_channel_are_not_part_of_a_table(bench: Bench) -> None:
    nodes = nodes_of("a = Add(x, c); b = Tanh(a); y = Mul(b, two)")
    weights = {**scalars(nodes), "c": f32(3, 1, 1)}
    model = bench.keeps(bench.model(nodes, {"x": ["N", 3, 4, 4]}, weights), Outline())
    assert bench.kinds(model) == ["Add", "Unary1"]


def test_relu_before_a_curve_is_in_its_table(bench: Bench) -> None:
    nodes = nodes_of("p = Conv(x, w); r = Relu(p); y = Sigmoid(r)")
    model = bench.keeps(
        bench.model(nodes, {"x": ["N", 3, 4, 4]}, {"w": f32(3, 3, 1, 1)}), Outline()
    )
    assert bench.kinds(model) == ["Conv", "Unary1"]


def softmax(axis: int, shifted: bool, inverse: bool) -> tuple[list[onnx.NodeProto], Weights]:
    nodes, z = [], "x"
    if shifted:
        nodes += [make_node("ReduceMax", ["x", "axes"], ["m"]), make_node("Sub", ["x", "m"], ["z"])]
        z = "z"
    nodes += [make_node("Exp", [z], ["e"]), make_node("ReduceSum", ["e", "axes"], ["s"])]
    if inverse:
        nodes += [make_node("Reciprocal", ["s"], ["i"]), make_node("Mul", ["i", "e"], ["y"])]
    else:
        nodes += [make_node("Div", ["e", "s"], ["y"])]
    return nodes, {"axes": np.array([axis], np.int64)}


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
def test_decomposed_softmax(bench: Bench, axis: int, shifted: bool, inverse: bool) -> None:
    nodes, weights = softmax(axis, shifted, inverse)
    model = bench.keeps(bench.model(nodes, {"x": ["N", 3, 4]}, weights), Outline())
    (node,) = model.graph
    assert (node.op_type, node.attributes["axis"].as_int()) == ("Softmax", axis % 3)


def test_a_quotient_by_another_sum_is_no_softmax(bench: Bench) -> None:
    nodes = [
        make_node("Exp", ["x"], ["e"]),
        make_node("ReduceSum", ["e", "axes"], ["s"], keepdims=0),
        make_node("Div", ["e", "s"], ["y"]),
    ]
    original = bench.model(nodes, {"x": [4, 4]}, {"axes": np.array([0], np.int64)})
    assert bench.kinds(bench.keeps(original, Outline())) == ["Exp", "ReduceSum", "Div"]
    nodes, weights = softmax(1, shifted=True, inverse=False)
    weights["other"] = np.array([2], np.int64)
    nodes[0].input[1] = "other"
    model = bench.keeps(bench.model(nodes, {"x": ["N", 3, 4]}, weights), Outline())
    assert bench.kinds(model) == ["ReduceMax", "Sub", "Softmax"]


SMOOTH = ["Sigmoid", "Tanh", "Relu", "Abs", "Neg", "Softplus", "HardSwish", "Erf"]


@st.composite
def element_wise(draw: st.DrawFn) -> tuple[list[onnx.NodeProto], Weights]:
    """A random connected graph of element-wise operators of x with scalar constants."""
    nodes: list[onnx.NodeProto] = []
    weights: Weights = {}
    values, unread = ["x"], []
    for i in range(draw(st.integers(1, 7))):
        source = draw(st.sampled_from(values))
        kind = draw(st.sampled_from(["unary", "constant", "pair"]))
        if kind == "unary":
            inputs, op = [source], draw(st.sampled_from(SMOOTH))
        else:
            op = draw(st.sampled_from(["Add", "Sub", "Mul", "Max", "Min"]))
            other = draw(st.sampled_from(values))
            if kind == "constant":
                other = f"c{i}"
                shape = draw(st.sampled_from([(), (1,), (1, 1)]))
                weights[other] = f32(*shape, seed=draw(st.integers(0, 99)))
            inputs = [source, other] if draw(st.booleans()) else [other, source]
        unread = [*(v for v in unread if v not in inputs), f"v{i}"]
        nodes.append(make_node(op, inputs, [f"v{i}"]))
        values.append(f"v{i}")
    if len(unread) > 1:
        nodes.append(make_node("Sum", unread, ["v9"]))
    nodes[-1].output[0] = "y"
    return nodes, weights


@settings(deadline=None, derandomize=True, max_examples=60)
@given(parts=element_wise())
def test_any_element_wise_graph_of_one_input_is_one_node(
    bench: Bench, parts: tuple[list[onnx.NodeProto], Weights]
) -> None:
    nodes, weights = parts
    original = bench.model(nodes, {"x": ["N", 30]}, weights)
    model = bench.keeps(original, Outline(), rtol=1e-5)
    assert len(model.graph) == 1


def test_the_list_of_element_wise_operators_is_of_standard_ones() -> None:
    for op in ELEMENTWISE:
        assert len(onnx.defs.get_schema(op, 21).outputs) == 1


def test_a_bias_goes_to_the_conv_before_the_curve_is_outlined(bench: Bench) -> None:
    nodes = nodes_of("p = Conv(x, w); q = Add(p, three); s = Sigmoid(q); y = Mul(q, s)")
    weights = {**scalars(nodes), "w": f32(3, 3, 1, 1)}
    model = bench.keeps(bench.model(nodes, {"x": ["N", 3, 4, 4]}, weights), Fold(), Outline())
    assert bench.kinds(model) == ["Conv", "Silu"]
