"""Tables of unary functions: against onnxruntime's float32 operators, numpy and scipy, and against exact rounding."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx.helper import make_node
from scipy import special

from qcompile.errors import Unsupported
from qcompile.onnx import frontend
from qcompile.passes import exact
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.fold import Fold
from qcompile.passes.layers import TABLES, Table, partition
from qcompile.passes.outline import ELEMENTWISE, Outline
from qcompile.pipeline import Context
from qcompile.plan import QuantPlan
from tests.oracle import build, execute

Reals = NDArray[np.float64]


def table_layer(nodes: list[onnx.NodeProto], **constants: float) -> tuple[ir.Model, ir.Node, bytes]:
    """A model whose one layer is a table, its node, and the file."""
    weights = {n: np.float32(v) for n, v in constants.items()}
    data = build(nodes, {"x": ["N", 256]}, weights)  # type: ignore[arg-type]
    model = frontend.load(data, isolated=False)
    for p in (Fold(), Outline(), Canonicalize()):
        p(model, QuantPlan(), Context())
    (layer,) = partition(model)
    assert isinstance(layer, Table), layer
    return model, layer.node, data


def reals(model: ir.Model, node: ir.Node, xs: Reals) -> Reals:
    return np.array(
        [float(y) for y in exact.unary(model, node, [mpmath.mpf(float(x)) for x in xs])]
    )


def node(op: str, **attributes: Any) -> list[onnx.NodeProto]:
    return [make_node(op, ["x"], ["y"], name="it", **attributes)]


POSITIVE = np.linspace(1 / 32, 8, 256)
UNIT = np.linspace(-0.99, 0.99, 256)
ALL = np.linspace(-8, 8 - 1 / 16, 256)
FUNCTIONS: dict[str, tuple[list[onnx.NodeProto], Reals, Callable[[Reals], Reals]]] = {
    "Abs": (node("Abs"), ALL, np.abs),
    "Acos": (node("Acos"), UNIT, np.arccos),
    "Acosh": (node("Acosh"), 1 + POSITIVE, np.arccosh),
    "Asin": (node("Asin"), UNIT, np.arcsin),
    "Asinh": (node("Asinh"), ALL, np.arcsinh),
    "Atan": (node("Atan"), ALL, np.arctan),
    "Atanh": (node("Atanh"), UNIT, np.arctanh),
    "Ceil": (node("Ceil"), ALL, np.ceil),
    "Cos": (node("Cos"), ALL, np.cos),
    "Cosh": (node("Cosh"), ALL, np.cosh),
    "Celu": (node("Celu", alpha=0.5), ALL, lambda x: np.maximum(x, 0) + np.minimum(0, 0.5 * np.expm1(x / 0.5))),
    "Elu": (node("Elu", alpha=0.5), ALL, lambda x: np.where(x < 0, 0.5 * np.expm1(x), x)),
    "Erf": (node("Erf"), ALL, special.erf),
    "Exp": (node("Exp"), ALL, np.exp),
    "Floor": (node("Floor"), ALL, np.floor),
    "Gelu": (node("Gelu"), ALL, lambda x: x * special.ndtr(x)),
    "Gelu by tanh": (
        node("Gelu", approximate="tanh"), ALL,
        lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    ),
    "HardSigmoid": (node("HardSigmoid"), ALL, lambda x: np.clip(0.2 * x + 0.5, 0, 1)),
    "HardSigmoid of its own": (
        node("HardSigmoid", alpha=0.3, beta=0.1), ALL, lambda x: np.clip(0.3 * x + 0.1, 0, 1)
    ),
    "HardSwish": (node("HardSwish"), ALL, lambda x: x * np.clip(x / 6 + 0.5, 0, 1)),
    "LeakyRelu": (node("LeakyRelu"), ALL, lambda x: np.where(x < 0, 0.01 * x, x)),
    "LeakyRelu of its own": (node("LeakyRelu", alpha=0.3), ALL, lambda x: np.where(x < 0, 0.3 * x, x)),
    "Log": (node("Log"), POSITIVE, np.log),
    "Mish": (node("Mish"), ALL, lambda x: x * np.tanh(np.log1p(np.exp(x)))),
    "Neg": (node("Neg"), ALL, np.negative),
    "Reciprocal": (node("Reciprocal"), POSITIVE, np.reciprocal),
    "Round": (node("Round"), ALL, np.rint),
    "Selu": (
        node("Selu"), ALL, lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(x))
    ),
    "Shrink": (
        node("Shrink", lambd=0.5, bias=0.125), ALL,
        lambda x: np.sign(x) * (np.abs(x) > 0.5) * (np.abs(x) - 0.125),
    ),
    "Sigmoid": (node("Sigmoid"), ALL, special.expit),
    "Sign": (node("Sign"), ALL, np.sign),
    "Sin": (node("Sin"), ALL, np.sin),
    "Sinh": (node("Sinh"), ALL, np.sinh),
    "Softplus": (node("Softplus"), ALL, lambda x: np.logaddexp(0, x)),
    "Softsign": (node("Softsign"), ALL, lambda x: x / (1 + np.abs(x))),
    "Sqrt": (node("Sqrt"), POSITIVE, np.sqrt),
    "Tan": (node("Tan"), ALL, np.tan),
    "Tanh": (node("Tanh"), ALL, np.tanh),
    "ThresholdedRelu": (node("ThresholdedRelu", alpha=0.5), ALL, lambda x: np.where(x > 0.5, x, 0)),
}  # fmt: skip


def scalar(op: str, c: float, left: bool = False) -> tuple[list[onnx.NodeProto], dict[str, float]]:
    """An operator with a scalar constant, then a tanh so that nothing folds it away."""
    names = ["c", "x"] if left else ["x", "c"]
    return [make_node(op, names, ["m"], name="m"), make_node("Tanh", ["m"], ["y"], name="it")], {
        "c": c
    }


SCALARS: dict[
    str, tuple[tuple[list[onnx.NodeProto], dict[str, float]], Reals, Callable[[Reals], Reals]]
] = {
    "x + c": (scalar("Add", 0.3), ALL, lambda x: np.tanh(x + np.float32(0.3))),
    "c - x": (scalar("Sub", 0.3, left=True), ALL, lambda x: np.tanh(np.float32(0.3) - x)),
    "x * c": (scalar("Mul", 0.3), ALL, lambda x: np.tanh(x * np.float32(0.3))),
    "x / c": (scalar("Div", 0.3), ALL, lambda x: np.tanh(x / np.float32(0.3))),
    "c / x": (scalar("Div", 0.3, left=True), POSITIVE, lambda x: np.tanh(np.float32(0.3) / x)),
    "x ** 3": (scalar("Pow", 3.0), ALL, lambda x: np.tanh(x**3)),
    "x ** -2": (scalar("Pow", -2.0), POSITIVE, lambda x: np.tanh(x**-2)),
    "x ** 1.5": (scalar("Pow", 1.5), POSITIVE, lambda x: np.tanh(x**1.5)),
    "max(x, c)": (scalar("Max", 0.3), ALL, lambda x: np.tanh(np.maximum(x, np.float32(0.3)))),
    "min(x, c)": (scalar("Min", 0.3), ALL, lambda x: np.tanh(np.minimum(x, np.float32(0.3)))),
    "prelu": (
        scalar("PRelu", 0.3),
        ALL,
        lambda x: np.tanh(np.where(x < 0, x * np.float32(0.3), x)),
    ),
}


def chained(*ops: str) -> list[onnx.NodeProto]:
    names = ["x", *(f"v{i}" for i in range(len(ops) - 1)), "y"]
    return [
        make_node(op, [a], [b], name=b) for op, a, b in zip(ops, names, names[1:], strict=False)
    ]


CHAINS: dict[str, tuple[list[onnx.NodeProto], Reals, Callable[[Reals], Reals]]] = {
    "floor": (chained("Floor", "Tanh"), ALL, lambda x: np.tanh(np.floor(x))),
    "ceil": (chained("Ceil", "Tanh"), ALL, lambda x: np.tanh(np.ceil(x))),
    "round": (chained("Round", "Tanh"), ALL, lambda x: np.tanh(np.rint(x))),
    "sin, cos": (chained("Sin", "Cos"), ALL, lambda x: np.cos(np.sin(x))),
    "sign": (chained("Sign", "Tanh"), ALL, lambda x: np.tanh(np.sign(x))),
}


def steps(*lines: str) -> list[onnx.NodeProto]:
    """`y = Where(g, x, c)` line by line; `Cast(g) 1` is to float."""
    made = []
    for line in lines:
        output, op, inputs, to = re.fullmatch(r"(\w+) = (\w+)\((.*)\) ?(\d*)", line).groups()  # type: ignore[union-attr]
        more = {"to": int(to)} if to else {}
        made.append(make_node(op, inputs.split(", "), [output], name=output, **more))
    return made


CHOICES: dict[str, tuple[list[onnx.NodeProto], dict[str, float], Callable[[Reals], Reals]]] = {
    "softplus as PyTorch writes it": (
        steps("s = Softplus(x)", "g = Greater(x, c)", "y = Where(g, x, s)"), {"c": 1.5},
        lambda x: np.where(x > 1.5, x, np.logaddexp(0, x)),
    ),
    "at least": (
        steps("g = GreaterOrEqual(x, c)", "y = Where(g, x, d)"), {"c": 1.5, "d": -1.0},
        lambda x: np.where(x >= 1.5, x, -1.0),
    ),
    "less": (
        steps("g = Less(x, c)", "y = Where(g, d, x)"), {"c": 1.5, "d": -1.0},
        lambda x: np.where(x < 1.5, -1.0, x),
    ),
    "at most": (
        steps("g = LessOrEqual(x, c)", "y = Where(g, d, x)"), {"c": 1.5, "d": -1.0},
        lambda x: np.where(x <= 1.5, -1.0, x),
    ),
    "equal": (
        steps("g = Equal(x, c)", "y = Where(g, d, x)"), {"c": 1.5, "d": 9.0},
        lambda x: np.where(x == 1.5, 9.0, x),
    ),
    "within": (
        steps("g = Greater(x, d)", "h = Less(x, c)", "b = And(g, h)", "t = Tanh(x)", "y = Where(b, x, t)"),
        {"c": 1.5, "d": -1.0}, lambda x: np.where((x > -1) & (x < 1.5), x, np.tanh(x)),
    ),
    "without": (
        steps("g = Less(x, d)", "h = Greater(x, c)", "b = Or(g, h)", "n = Not(b)", "t = Tanh(x)", "y = Where(n, t, x)"),
        {"c": 1.5, "d": -1.0}, lambda x: np.where((x < -1) | (x > 1.5), x, np.tanh(x)),
    ),
    "one of two": (
        steps("g = Greater(x, d)", "h = Greater(x, c)", "b = Xor(g, h)", "t = Tanh(x)", "y = Where(b, x, t)"),
        {"c": 1.5, "d": -1.0}, lambda x: np.where((x > -1) & (x <= 1.5), x, np.tanh(x)),
    ),
    "a mask": (
        steps("g = Greater(x, c)", "f = Cast(g) 1", "y = Mul(x, f)"), {"c": 1.5},
        lambda x: x * (x > 1.5),
    ),
    "whole numbers": (
        steps("i = Cast(x) 6", "f = Cast(i) 1", "y = Sub(x, f)"), {}, lambda x: x - np.trunc(x),
    ),
    "not nothing": (
        steps("f = Floor(x)", "b = Cast(f) 9", "y = Where(b, x, c)"), {"c": 0.25},
        lambda x: np.where(np.floor(x) != 0, x, 0.25),
    ),
    "undefined where it is not chosen": (
        steps(
            "l = Log(x)", "q = Sqrt(x)", "r = Div(c, x)", "a = Sum(l, q, r)", "g = Greater(x, d)", "y = Where(g, a, x)"
        ),
        {"c": 1.5, "d": 0.25},
        lambda x: np.where(x > 0.25, np.log(np.abs(x) + 1e-30) + np.sqrt(np.abs(x)) + 1.5 / np.where(x, x, 1), x),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name: str) -> None:
    nodes, constants, f = CHOICES[name]
    check(nodes, constants, ALL, f)


def check(
    nodes: list[onnx.NodeProto], constants: dict[str, float], xs: Reals, f: Callable[[Reals], Reals]
) -> None:
    model, at, data = table_layer(nodes, **constants)
    xs = xs.astype(np.float32).astype(np.float64)
    got = reals(model, at, xs)
    np.testing.assert_allclose(got, f(xs), rtol=1e-6, atol=1e-7)
    (ort,) = execute(data, {"x": xs.astype(np.float32)[None]})
    np.testing.assert_allclose(got, ort[0].astype(np.float64), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_is_numpys_and_onnxruntimes(name: str) -> None:
    nodes, xs, f = FUNCTIONS[name]
    check(nodes, {}, xs, f)


@pytest.mark.parametrize("name", SCALARS)
def test_operator_with_a_constant(name: str) -> None:
    (nodes, constants), xs, f = SCALARS[name]
    check(nodes, constants, xs, f)


@pytest.mark.parametrize("name", CHAINS)
def test_operators_inside_a_function(name: str) -> None:
    nodes, xs, f = CHAINS[name]
    check(nodes, {}, xs, f)


def test_every_table_operator_is_tested() -> None:
    """Swish is of opset 24, beyond what the front door makes."""
    assert {n[0].op_type for n, _, _ in FUNCTIONS.values()} == TABLES - {"Swish"}


def test_swish() -> None:
    made = ir.node("Swish", [ir.Value(name="x")], {"alpha": 0.5}, name="it")
    model = ir.Model(ir.Graph([], [], nodes=[]), ir_version=10)
    np.testing.assert_allclose(reals(model, made, ALL), ALL * special.expit(0.5 * ALL), rtol=1e-12)


# --- tables -----------------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.sampled_from([n for n, (_, xs, _) in FUNCTIONS.items() if xs is ALL]),
    st.floats(2.0**-10, 0.25, width=32),
    st.integers(-128, 127),
    st.floats(2.0**-10, 0.25, width=32),
    st.integers(-128, 127),
)
def test_entries_are_the_nearest_codes(name: str, sx: float, zx: int, sy: float, zy: int) -> None:
    model, at, _ = table_layer(FUNCTIONS[name][0])
    codes = range(-128, 128)
    row = exact.table(model, at, codes, sx, zx, sy, zy)
    want = FUNCTIONS[name][2](np.array([(c - zx) * sx for c in codes])) / sy
    want = np.minimum(want, 2.0**40)
    assert np.abs(np.array(row) - zy - want).max() <= 0.5 + 1e-6 * np.abs(want).max() + 1e-9


def test_halves_go_to_even() -> None:
    model, at, _ = table_layer(node("Neg"))
    assert exact.table(model, at, range(-6, 7), 0.5, 0, 1.0, 0) == [
        3,
        2,
        2,
        2,
        1,
        0,
        0,
        0,
        -1,
        -2,
        -2,
        -2,
        -3,
    ]


def test_exact_values_are_exact() -> None:
    """LeakyRelu has no irrational in it: fractions say the same."""
    model, at, _ = table_layer(node("LeakyRelu", alpha=0.3))
    alpha, sx, sy = (Fraction(float(np.float32(v))) for v in (0.3, 0.017, 0.0031))
    row = exact.table(model, at, range(-128, 128), float(sx), 5, float(sy), -3)
    for code, entry in zip(range(-128, 128), row, strict=True):
        x = (code - 5) * sx
        y = (x if x >= 0 else alpha * x) / sy
        assert entry == round(y) - 3


def test_exponentials() -> None:
    row = exact.exponentials(256, 0.1, 20)
    want = np.exp(-0.1 * np.arange(256)) * 2**20
    assert row[0] == 1 << 20
    assert np.abs(np.array(row) - want).max() <= 0.5 + 1e-6
    assert row == sorted(row, reverse=True)


def test_enormous_results_are_bounded_quickly() -> None:
    """exp(1e30) has more digits than there are atoms; only that it is beyond every code matters."""
    model, at, _ = table_layer(node("Exp"))
    start = time.perf_counter()
    row = exact.table(model, at, range(-2, 3), 1e30, 0, 1e-30, 7)
    assert time.perf_counter() - start < 1
    assert row[:2] == [7, 7]
    assert row[3] >= 1 << 40


def test_the_callers_precision_does_not_matter() -> None:
    model, at, _ = table_layer(node("Tanh"))
    with mpmath.workprec(5):
        coarse = exact.table(model, at, range(-128, 128), 0.01, 0, 0.0001, 0)
    assert coarse == exact.table(model, at, range(-128, 128), 0.01, 0, 0.0001, 0)


# --- what is not defined ----------------------------------------------------------------------------------------


UNDEFINED: dict[str, tuple[list[onnx.NodeProto], dict[str, float], float]] = {
    "log of a negative number": (node("Log"), {}, -0.5),
    "log of 0": (node("Log"), {}, 0.0),
    "square root of a negative number": (node("Sqrt"), {}, -0.5),
    "1 / 0": (node("Reciprocal"), {}, 0.0),
    "c / 0": (*scalar("Div", 1.0, left=True), 0.0),
    "fractional power of a negative number": (*scalar("Pow", 0.5), -0.5),
    "0 to a negative power": (*scalar("Pow", -1.0), 0.0),
    "order of complex numbers": (
        [make_node("Log", ["x"], ["m"]), make_node("Max", ["m", "c"], ["y"], name="it")], {"c": 0.5}, -0.5,
    ),
    "chosen though undefined": (steps("l = Log(x)", "g = Less(x, c)", "y = Where(g, l, x)"), {"c": 0.5}, -0.5),
    "choice by what is undefined": (
        steps("r = Reciprocal(x)", "g = Less(r, c)", "y = Where(g, x, c)"), {"c": 0.5}, 0.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNDEFINED)
def test_undefined_values_are_refused_with_the_node(name: str) -> None:
    nodes, constants, x = UNDEFINED[name]
    model, at, _ = table_layer(nodes, **constants)
    at.name = "it"
    with pytest.raises(Unsupported, match=rf"node it: .* is not defined at {x:g}") as caught:
        exact.table(model, at, range(1), x or 1.0, 0 if not x else -1, 1.0, 0)
    assert "clip its input" in str(caught.value)


def test_codes_without_a_value_stand_for_the_nearest_with_one() -> None:
    model, at, _ = table_layer([make_node("Log", ["x"], ["y"], name="it")])
    row = exact.table(model, at, range(-3, 4), 0.5, 0, 0.01, 0)
    lowest = round(np.log(0.5) * 100)
    assert row == [lowest] * 5 + [0, round(np.log(1.5) * 100)]


def test_clipping_the_input_helps_as_the_sentence_says() -> None:
    clip = make_node("Clip", ["x", "lo"], ["m"], name="m")
    model, at, _ = table_layer([clip, make_node("Log", ["m"], ["y"], name="it")], lo=0.5)
    row = exact.table(model, at, range(-128, 128), 0.1, 0, 0.01, 0)
    assert min(row) == round(np.log(0.5) * 100)


def test_operator_without_meaning_is_refused_with_its_node() -> None:
    made = ir.node("Mod", [ir.Value(name="x")], name="outer")
    model = ir.Model(ir.Graph([], [], nodes=[]), ir_version=10)
    with pytest.raises(Unsupported, match="node outer: Mod has no table"):
        exact.unary(model, made, [mpmath.mpf(1)])


@pytest.mark.parametrize("op", sorted(ELEMENTWISE))
def test_whatever_is_outlined_has_a_meaning(op: str) -> None:
    assert exact.meaning(ir.Model(ir.Graph([], [], nodes=[]), ir_version=10), ir.node(op, []))
