"""What is fused with what: one rounding for everything that is summed before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.helper import make_node

from qcompile.errors import Unsupported
from qcompile.onnx import frontend
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.fold import Fold
from qcompile.passes.layers import (
    Clamp,
    Join,
    Layer,
    Linear,
    Operand,
    Pooled,
    Product,
    Rescaled,
    SoftmaxLayer,
    Table,
    View,
    operators,
    partition,
    refused,
)
from qcompile.passes.outline import Outline
from qcompile.pipeline import Context
from qcompile.plan import QuantPlan
from tests.oracle import build

IMAGE: Mapping[str, Sequence[int | str]] = {"x": ["N", 3, 4, 4]}
KEEP = {"pads": [1, 1, 1, 1]}


def model(
    nodes: list[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int | str]] = IMAGE,
    outputs: Sequence[str] = ("y",),
    **weights: Any,
) -> ir.Model:
    typed = {
        n: np.ones(w, np.float32) if isinstance(w, tuple) else np.asarray(w)
        for n, w in weights.items()
    }
    loaded = frontend.load(build(nodes, inputs, typed, outputs), isolated=False)
    for p in (Fold(), Outline(), Canonicalize()):
        p(loaded, QuantPlan(), Context())
    return loaded


def layers(*args: Any, fuse_residual: bool = True, **kwargs: Any) -> list[Layer]:
    return partition(model(*args, **kwargs), fuse_residual=fuse_residual)


def shape(layer: Layer) -> str:
    """`Linear + Operand - Operand -> y`."""
    if not isinstance(layer, Rescaled):
        return f"{type(layer).__name__} -> {layer.out.name}"
    parts = []
    for i, term in enumerate(layer.terms):
        sign = "-" if isinstance(term, Operand) and term.sign < 0 else "+"
        parts.append(f"{sign} {type(term).__name__}" if i else type(term).__name__)
    return f"{' '.join(parts)} -> {layer.out.name}"


def conv(x: str, w: str, y: str) -> onnx.NodeProto:
    return make_node("Conv", [x, w], [y], **KEEP)


def test_convolution_takes_in_its_clamps() -> None:
    (layer,) = layers([conv("x", "w", "c"), make_node("Relu", ["c"], ["y"])], w=(3, 3, 3, 3))
    assert isinstance(layer, Rescaled)
    assert shape(layer) == "Linear -> y"
    assert layer.clamp == Clamp(0.0, None)
    assert operators(layer) == ["Conv", "Relu"]


def test_last_convolution_of_a_branch_takes_in_the_skip() -> None:
    nodes = [
        conv("x", "w", "c"), make_node("Relu", ["c"], ["r"]), conv("r", "w", "d"),
        make_node("Add", ["d", "x"], ["a"]), make_node("Relu", ["a"], ["y"]),
    ]  # fmt: skip
    found = layers(nodes, w=(3, 3, 3, 3))
    assert [shape(x) for x in found] == ["Linear -> r", "Linear + Operand -> y"]
    assert operators(found[1]) == ["Conv", "Add", "Relu"]
    alone = layers(nodes, fuse_residual=False, w=(3, 3, 3, 3))
    assert [shape(x) for x in alone] == ["Linear -> r", "Linear -> d", "Operand + Operand -> y"]


def test_of_two_convolutions_the_later_one_waits() -> None:
    nodes = [conv("x", "w", "c"), conv("x", "v", "d"), make_node("Add", ["c", "d"], ["y"])]
    found = layers(nodes, w=(3, 3, 3, 3), v=(3, 3, 3, 3))
    assert [shape(x) for x in found] == ["Linear -> c", "Linear + Operand -> y"]


@pytest.mark.parametrize(
    ("minuend", "subtrahend", "want"),
    [
        ("c", "x", ["Linear - Operand -> y"]),
        ("x", "c", ["Linear -> c", "Operand - Operand -> y"]),
        ("c", "c", ["Linear -> c", "Operand - Operand -> y"]),
    ],
)
def test_subtraction(minuend: str, subtrahend: str, want: list[str]) -> None:
    nodes = [conv("x", "w", "c"), make_node("Sub", [minuend, subtrahend], ["y"])]
    assert [shape(x) for x in layers(nodes, w=(3, 3, 3, 3))] == want


def test_convolution_that_is_read_twice_or_returned_is_rounded() -> None:
    nodes = [conv("x", "w", "c"), make_node("Add", ["c", "x"], ["y"])]
    found = layers(nodes, outputs=("c", "y"), w=(3, 3, 3, 3))
    assert [shape(x) for x in found] == ["Linear -> c", "Operand + Operand -> y"]
    nodes = [*nodes, make_node("Sigmoid", ["c"], ["z"])]
    found = layers(nodes, outputs=("z", "y"), w=(3, 3, 3, 3))
    assert [shape(x) for x in found][:2] == ["Linear -> c", "Operand + Operand -> y"]


def test_convolution_that_is_broadcast_is_rounded() -> None:
    nodes = [conv("x", "w", "c"), make_node("Add", ["c", "z"], ["y"])]
    found = layers(nodes, {"x": ["N", 3, 1, 1], "z": ["N", 3, 4, 4]}, w=(3, 3, 3, 3))
    assert [shape(x) for x in found] == ["Linear -> c", "Operand + Operand -> y"]


def test_bias_of_a_matmul() -> None:
    mm = make_node("MatMul", ["x", "w"], ["m"])
    add = make_node("Add", ["m", "b"], ["y"])
    rows = {"x": ["N", 3, 4]}
    (layer,) = layers([mm, add], rows, w=(4, 5), b=(5,))
    assert isinstance(layer, Rescaled)
    (term,) = layer.terms
    assert isinstance(term, Linear)
    assert term.bias is not None
    assert term.channel_axis == 1
    # one number for every element is no bias of columns
    (layer,) = layers([mm, add], rows, w=(4, 5), b=(3, 5))
    assert shape(layer) == "Linear + Operand -> y"
    # nor are as many numbers as there are columns, one for each row
    (layer,) = layers([mm, add], {"x": ["N", 2, 5, 4]}, w=(4, 5), b=(5, 1))
    assert shape(layer) == "Linear + Operand -> y"


def test_kinds_of_layers() -> None:
    nodes = [
        make_node("Sigmoid", ["x"], ["a"]), make_node("Mul", ["a", "x"], ["b"]),
        make_node("MaxPool", ["b"], ["c"], kernel_shape=[2, 2]), make_node("Concat", ["c", "c"], ["d"], axis=-3),
        make_node("Softmax", ["d"], ["e"], axis=-3), make_node("AveragePool", ["e"], ["f"], kernel_shape=[2, 2]),
        make_node("Tanh", ["f"], ["y"]),
    ]  # fmt: skip
    found = layers(nodes, outputs=("y", "a"))
    assert [type(x) for x in found] == [Table, Rescaled, View, Join, SoftmaxLayer, Rescaled, Table]
    assert isinstance(found[1], Rescaled)
    assert isinstance(found[1].terms[0], Product)
    assert isinstance(found[3], Join)
    assert isinstance(found[4], SoftmaxLayer)
    assert found[3].axis == found[4].axis == 1
    assert isinstance(found[5], Rescaled)
    assert isinstance(found[5].terms[0], Pooled)
    assert [operators(x) for x in found] == [
        ["Sigmoid"], ["Mul"], ["MaxPool"], ["Concat"], ["Softmax"], ["AveragePool"], ["Tanh"],
    ]  # fmt: skip


def test_every_node_is_in_exactly_one_layer() -> None:
    nodes = [
        conv("x", "w", "a"), make_node("Relu", ["a"], ["b"]), conv("b", "w", "c"),
        make_node("Clip", ["c", "lo", "hi"], ["d"]), conv("d", "w", "e"), make_node("Add", ["e", "b"], ["f"]),
        make_node("Relu", ["f"], ["g"]), make_node("Relu", ["g"], ["y"]),
    ]  # fmt: skip
    found = layers(nodes, w=(3, 3, 3, 3), lo=np.float32(0), hi=np.float32(6))
    assert [shape(x) for x in found] == ["Linear -> b", "Linear -> d", "Linear + Operand -> y"]


# --- clamps -----------------------------------------------------------------------------------------------------


BOUND = st.none() | st.integers(-5, 5).map(float)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(BOUND, BOUND, BOUND, BOUND)
def test_one_clamp_then_another(
    a: float | None, b: float | None, c: float | None, d: float | None
) -> None:
    """Against numpy's clips one after the other, crossing bounds included (ONNX takes the upper one)."""

    def onnx_clip(x: Any, lo: float | None, hi: float | None) -> Any:
        x = x if lo is None else np.maximum(x, lo)
        return x if hi is None else np.minimum(x, hi)

    x = np.arange(-9.0, 9.5, 0.5)
    both = Clamp(a, b).then(Clamp(c, d))
    np.testing.assert_array_equal(
        onnx_clip(x, both.lo, both.hi), onnx_clip(onnx_clip(x, a, b), c, d)
    )


# --- refusals ---------------------------------------------------------------------------------------------------


def test_every_refused_node_is_listed() -> None:
    nodes = [
        make_node("CumSum", ["x", "axis"], ["a"], name="first"),
        make_node("Relu", ["a"], ["b"]),
        make_node("Transpose", ["b"], ["c"], perm=[1, 0], name="second"),
        make_node("Hardmax", ["c"], ["y"], name="third"),
    ]
    loaded = model(nodes, {"x": [4, 4]}, axis=np.array(0))
    found = refused(loaded)
    assert [(name, op) for name, op, _ in found] == [
        ("first", "CumSum"), ("second", "Transpose"), ("third", "Hardmax"),
    ]  # fmt: skip
    assert all(name in sentence for name, _, sentence in found)
    with pytest.raises(Unsupported, match="first"):
        partition(loaded)


def test_clip_with_a_computed_bound_is_refused() -> None:
    nodes = [
        make_node("ReduceMax", ["x", "axes"], ["m"], keepdims=0),
        make_node("Clip", ["x", "", "m"], ["y"], name="bounded"),
    ]
    found = refused(model(nodes, {"x": [1, 4]}, axes=np.array([0, 1])))
    assert ("bounded", "Clip") in [(name, op) for name, op, _ in found]


def test_names_of_nodes_may_be_anything() -> None:
    hostile = '*/ #include "x"\n<script>'
    nodes = [make_node("CumSum", ["x", "axis"], ["y"], name=hostile)]
    ((name, _, sentence),) = refused(model(nodes, {"x": [4, 4]}, axis=np.array(1)))
    assert name == hostile
    assert hostile in sentence
