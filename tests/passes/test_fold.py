from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx.helper import make_node

from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.fold import Fold, normals
from qcompile.passes.outline import Outline

Bench = Any
Array = NDArray[np.float32]
ZOO = Path(os.environ.get("QCOMPILE_ZOO", Path(__file__).parents[3] / "shared" / "zoo"))
Parts = tuple[list[onnx.NodeProto], dict[str, list[int | str]], dict[str, NDArray[Any]]]
quick = settings(deadline=None, derandomize=True, max_examples=60)


def f32(*shape: int, seed: int = 0, positive: bool = False) -> Array:
    values = np.random.default_rng(seed + sum(shape)).standard_normal(shape)
    return (np.abs(values) + 0.2 if positive else values).astype(np.float32)


def norm(channels: int, seed: int = 0) -> dict[str, Array]:
    return {
        "gamma": f32(channels, seed=seed),
        "beta": f32(channels, seed=seed + 1),
        "mean": f32(channels, seed=seed + 2),
        "var": f32(channels, seed=seed + 3, positive=True),
    }


@st.composite
def conv_graphs(draw: st.DrawFn) -> Parts:
    """Arithmetic and padding that must all disappear into a Conv, the Conv, and a Relu."""
    rank = draw(st.integers(1, 2))
    group, per_in, per_out = (draw(st.integers(1, 3)) for _ in range(3))
    channels, filters = group * per_in, group * per_out
    kernel = [draw(st.integers(1, 3)) for _ in range(rank)]
    dilations = [draw(st.integers(1, 2)) for _ in range(rank)]
    seed = draw(st.integers(0, 1000))
    weights: dict[str, NDArray[Any]] = {"w": f32(filters, per_in, *kernel, seed=seed)}
    attributes: dict[str, Any] = {
        "group": group,
        "strides": [draw(st.integers(1, 2)) for _ in range(rank)],
        "dilations": dilations,
    }
    padding = draw(st.sampled_from(["none", "pads", "SAME_UPPER", "SAME_LOWER", "Pad"]))
    if padding == "pads":
        attributes["pads"] = [draw(st.integers(0, 2)) for _ in range(2 * rank)]
    elif padding.startswith("SAME"):
        attributes["auto_pad"] = padding
        # onnxruntime refuses dilation together with auto_pad.
        attributes["dilations"] = [1] * rank
    nodes: list[onnx.NodeProto] = []
    value = "x"

    def then(op_type: str, inputs: list[str], **more: Any) -> None:
        nonlocal value
        nodes.append(make_node(op_type, inputs, [f"v{len(nodes)}"], **more))
        value = f"v{len(nodes) - 1}"

    def arithmetic(count: int, ops: list[str]) -> None:
        for _ in range(draw(st.integers(0, 2))):
            op, name = draw(st.sampled_from(ops)), f"c{len(nodes)}"
            if op == "BatchNormalization":
                weights.update({f"{name}_{k}": v for k, v in norm(count, seed).items()})
                then(op, [value, *(f"{name}_{k}" for k in ("gamma", "beta", "mean", "var"))])
                continue
            shape = draw(st.sampled_from([(), (1,), (count, *[1] * rank), (1, count, *[1] * rank)]))
            weights[name] = f32(*shape, seed=seed + len(nodes), positive=op == "Div")
            flip = op != "Div" and draw(st.booleans())
            then(op, [name, value] if flip else [value, name])

    scaling, anything = ["Mul", "Div"], ["Mul", "Div", "Add", "Sub", "BatchNormalization"]
    arithmetic(channels, anything if padding == "none" else scaling)
    if padding == "Pad":
        around = [draw(st.integers(0, 2)) for _ in range(2 * rank)]
        weights["around"] = np.array([0, 0, *around[:rank], 0, 0, *around[rank:]], np.int64)
        then("Pad", [value, "around"])
    if draw(st.booleans()):
        weights["b"] = f32(filters, seed=seed)
        then("Conv", [value, "w", "b"], **attributes)
    else:
        then("Conv", [value, "w"], **attributes)
    arithmetic(filters, anything)
    then("Relu", [value])
    nodes[-1].output[0] = "y"
    sizes = [draw(st.integers(7, 9)) for _ in range(rank)]
    return nodes, {"x": ["N", channels, *sizes]}, weights


@quick
@given(parts=conv_graphs())
def test_everything_beside_a_conv_goes_into_it(bench: Bench, parts: Parts) -> None:
    model = bench.keeps(bench.model(*parts), Fold())
    assert bench.kinds(model) == ["Conv", "Relu"]


@st.composite
def dense_graphs(draw: st.DrawFn) -> tuple[Parts, str]:
    """Arithmetic along the last axis around a Gemm or a MatMul, and what must remain of it."""
    rank, columns, rows = draw(st.integers(2, 4)), draw(st.integers(2, 5)), draw(st.integers(2, 5))
    seed = draw(st.integers(0, 1000))
    weights: dict[str, NDArray[Any]] = {}
    nodes: list[onnx.NodeProto] = []
    value = "x"

    def then(op_type: str, inputs: list[str], **more: Any) -> None:
        nonlocal value
        nodes.append(make_node(op_type, inputs, [f"v{len(nodes)}"], **more))
        value = f"v{len(nodes) - 1}"

    def arithmetic(size: int, ops: list[str]) -> None:
        for _ in range(draw(st.integers(0, 3))):
            op, name = draw(st.sampled_from(ops)), f"c{len(nodes)}"
            shape = draw(st.sampled_from([(), (size,), (1, size)]))
            weights[name] = f32(*shape, seed=seed + len(nodes), positive=op == "Div")
            then(op, [value, name])

    arithmetic(columns, ["Mul", "Div"] if rank > 2 else ["Mul", "Add", "Sub"])
    gemm = rank == 2 and draw(st.booleans())
    if gemm:
        transposed = draw(st.integers(0, 1))
        weights["w"] = f32(*((rows, columns) if transposed else (columns, rows)), seed=seed)
        inputs = [value, "w"]
        if draw(st.booleans()):
            weights["b"] = f32(*draw(st.sampled_from([(), (1,), (rows,), (1, rows)])), seed=seed)
            inputs.append("b")
        alpha, beta = draw(st.sampled_from([1.0, 0.5])), draw(st.sampled_from([1.0, 2.0]))
        then("Gemm", inputs, transB=transposed, alpha=alpha, beta=beta)
    else:
        weights["w"] = f32(columns, rows, seed=seed)
        then("MatMul", [value, "w"])
    before = len(nodes)
    arithmetic(rows, ["Mul", "Add", "Sub", "Div"])
    added = any(n.op_type in ("Add", "Sub") for n in nodes[before:])
    then("Relu", [value])
    nodes[-1].output[0] = "y"
    kind = "Gemm" if rank == 2 else "MatMul Add" if added else "MatMul"
    return (nodes, {"x": ["N", *[3] * (rank - 2), columns]}, weights), f"{kind} Relu"


@quick
@given(drawn=dense_graphs())
def test_everything_beside_a_matrix_goes_into_it(bench: Bench, drawn: tuple[Parts, str]) -> None:
    parts, expected = drawn
    model = bench.keeps(bench.model(*parts), Fold())
    assert " ".join(bench.kinds(model)) == expected


def test_a_shift_before_a_padding_conv_stays(bench: Bench) -> None:
    nodes = [
        make_node("Sub", ["x", "mean"], ["centred"]),
        make_node("Conv", ["centred", "w"], ["y"], pads=[1, 1, 1, 1]),
    ]
    weights = {"mean": f32(3, 1, 1), "w": f32(4, 3, 3, 3)}
    model = bench.keeps(bench.model(nodes, {"x": ["N", 3, 6, 6]}, weights), Fold())
    assert bench.kinds(model) == ["Sub", "Conv"]


@pytest.mark.parametrize(
    ("kind", "amount", "mode"), [("value", 1.5, "constant"), ("mode", 0.0, "reflect")]
)
def test_a_pad_that_is_not_zeros_stays(bench: Bench, kind: str, amount: float, mode: str) -> None:
    nodes = [
        make_node("Pad", ["x", "pads", "v"], ["p"], mode=mode),
        make_node("Conv", ["p", "w"], ["y"]),
    ]
    weights = {
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        "v": np.float32(amount),
        "w": f32(4, 3, 3, 3),
    }
    model = bench.keeps(bench.model(nodes, {"x": ["N", 3, 6, 6]}, weights), Fold())
    assert bench.kinds(model) == ["Pad", "Conv"]


def test_a_pad_of_channels_stays(bench: Bench) -> None:
    nodes = [make_node("Pad", ["x", "pads"], ["p"]), make_node("Conv", ["p", "w"], ["y"])]
    weights = {"pads": np.array([0, 1, 0, 0, 0, 1, 0, 0]), "w": f32(4, 5, 3, 3)}
    model = bench.keeps(bench.model(nodes, {"x": ["N", 3, 6, 6]}, weights), Fold())
    assert bench.kinds(model) == ["Pad", "Conv"]


def test_a_pad_with_axes_goes_into_the_conv(bench: Bench) -> None:
    nodes = [
        make_node("Pad", ["x", "pads", "", "axes"], ["p"]),
        make_node("Conv", ["p", "w"], ["y"], pads=[0, 1, 0, 0]),
    ]
    weights = {"pads": np.array([1, 2]), "axes": np.array([-1]), "w": f32(4, 3, 3, 3)}
    model = bench.keeps(bench.model(nodes, {"x": ["N", 3, 6, 6]}, weights), Fold())
    assert bench.kinds(model) == ["Conv"]
    assert model.graph[0].attributes["pads"].as_ints() == (0, 2, 0, 2)


def test_shared_weights_are_copied_before_they_change(bench: Bench) -> None:
    nodes = [
        make_node("Conv", ["x", "w", "b"], ["p"]),
        make_node("Mul", ["p", "s"], ["q"]),
        make_node("Conv", ["x", "w", "b"], ["r"]),
        make_node("Add", ["q", "r"], ["y"]),
    ]
    weights = {"w": f32(4, 3, 3, 3), "b": f32(4), "s": f32(4, 1, 1)}
    model = bench.keeps(bench.model(nodes, {"x": ["N", 3, 6, 6]}, weights), Fold())
    assert bench.kinds(model) == ["Conv", "Conv", "Add"]


def test_a_value_with_two_readers_is_not_scaled_for_one(bench: Bench) -> None:
    nodes = [
        make_node("Conv", ["x", "w"], ["p"]),
        make_node("Mul", ["p", "s"], ["q"]),
        make_node("Add", ["p", "q"], ["y"]),
    ]
    weights = {"w": f32(4, 3, 3, 3), "s": f32(4, 1, 1)}
    model = bench.keeps(bench.model(nodes, {"x": ["N", 3, 6, 6]}, weights), Fold())
    assert bench.kinds(model) == ["Conv", "Mul", "Add"]


def test_a_value_that_is_an_output_is_not_scaled(bench: Bench) -> None:
    nodes = [make_node("Conv", ["x", "w"], ["p"]), make_node("Mul", ["p", "s"], ["y"])]
    weights = {"w": f32(4, 3, 3, 3), "s": f32(4, 1, 1)}
    original = bench.model(nodes, {"x": ["N", 3, 6, 6]}, weights, outputs=["p", "y"])
    assert bench.kinds(bench.keeps(original, Fold())) == ["Conv", "Mul"]


def test_a_scale_read_by_two_convs_goes_into_both(bench: Bench) -> None:
    nodes = [
        make_node("Mul", ["x", "s"], ["p"]),
        make_node("Conv", ["p", "w"], ["q"], pads=[1, 1, 1, 1]),
        make_node("Conv", ["p", "v"], ["r"]),
        make_node("Add", ["q", "r"], ["y"]),
    ]
    weights = {"w": f32(4, 3, 3, 3), "v": f32(4, 3, 1, 1), "s": f32(3, 1, 1)}
    model = bench.keeps(bench.model(nodes, {"x": ["N", 3, 6, 6]}, weights), Fold())
    assert bench.kinds(model) == ["Conv", "Conv", "Add"]


def test_a_constant_that_stretches_its_operand_stays(bench: Bench) -> None:
    nodes = [make_node("Conv", ["x", "w"], ["p"]), make_node("Mul", ["p", "s"], ["y"])]
    weights = {"w": f32(1, 3, 6, 6), "s": f32(1, 5, 1, 1)}
    model = bench.keeps(bench.model(nodes, {"x": ["N", 3, 6, 6]}, weights), Fold())
    assert bench.kinds(model) == ["Conv", "Mul"]


def test_output_names_stay(bench: Bench) -> None:
    nodes = [
        make_node("Conv", ["x", "w"], ["p"], name="conv"),
        make_node("BatchNormalization", ["p", "gamma", "beta", "mean", "var"], ["y"], name="bn"),
    ]
    weights = {"w": f32(4, 3, 3, 3), **norm(4)}
    model = bench.keeps(bench.model(nodes, {"x": ["N", 3, 6, 6]}, weights), Fold())
    assert [(n.name, n.outputs[0].name) for n in model.graph] == [("conv", "y")]
    assert sorted(model.graph.initializers) == ["conv_bias_2", "conv_weight"]


def test_what_a_normalization_knew_stays_with_the_names_of_its_values(bench: Bench) -> None:
    nodes = [
        make_node("Conv", ["x", "w"], ["p"]),
        make_node("BatchNormalization", ["p", "gamma", "beta", "mean", "var"], ["n"]),
        make_node("Mul", ["n", "s"], ["q"]),
        make_node("Sub", ["t", "q"], ["r"]),
        make_node("Relu", ["r"], ["y"]),
    ]
    known = norm(4)
    weights = {"w": f32(4, 3, 3, 3), "s": f32(4, 1, 1), "t": np.float32(0.5), **known}
    model = bench.keeps(bench.model(nodes, {"x": ["N", 3, 6, 6]}, weights), Fold())
    assert bench.kinds(model) == ["Conv", "Relu"]
    found, factor = normals(model.graph), weights["s"].ravel()
    assert model.graph[0].outputs[0].name == "r"
    assert set(found) == {"r"}
    np.testing.assert_allclose(found["r"].mean, 0.5 - factor * known["beta"], rtol=1e-6)
    deviation = np.abs(factor * known["gamma"]) * np.sqrt(known["var"] / (known["var"] + 1e-5))
    np.testing.assert_allclose(found["r"].deviation, deviation, rtol=1e-6)


def test_a_normalization_that_becomes_a_conv_knew_both_its_ends(bench: Bench) -> None:
    nodes = [
        make_node("Relu", ["x"], ["r"]),
        make_node("BatchNormalization", ["r", "gamma", "beta", "mean", "var"], ["n"]),
        make_node("Relu", ["n"], ["y"]),
    ]
    known = norm(4)
    model = bench.keeps(
        bench.model(nodes, {"x": ["N", 4, 6, 6]}, known, outputs=["y"]), Fold(), Canonicalize()
    )
    assert bench.kinds(model) == ["Relu", "Conv", "Relu"]
    found = normals(model.graph)
    np.testing.assert_allclose(found["r"].mean, known["mean"], rtol=1e-6)
    np.testing.assert_allclose(found["r"].deviation, np.sqrt(known["var"]), rtol=1e-6)
    assert model.graph[1].outputs[0].name == "n"
    np.testing.assert_allclose(found["n"].mean, known["beta"], rtol=1e-6)


@pytest.mark.zoo
@pytest.mark.parametrize(
    "name",
    [
        "mlperf-tiny-ad-autoencoder/model.onnx",
        "mlperf-tiny-ic-resnet8/model.onnx",
        "mlperf-tiny-kws-dscnn/model.onnx",
        "resnet20-cifar10/model.onnx",
        "resnet20-cifar10/model_bn.onnx",
    ],
)
def test_trained_networks_keep_their_outputs(bench: Bench, name: str) -> None:
    model = bench.keeps((ZOO / name).read_bytes(), Fold(), Outline(), Canonicalize())
    left = set(bench.kinds(model))
    assert not left & {"BatchNormalization", "MatMul", "Flatten", "Identity"}
    assert isinstance(model, ir.Model)


@pytest.mark.parametrize(
    ("op", "operands", "number", "left"),
    [
        ("Add", "cs", 0, 0), ("Add", "sc", 0, 0), ("Sub", "sc", 0, 0), ("Mul", "cs", 1, 0), ("Div", "sc", 1, 0),
        ("Add", "cs", 1, 1), ("Sub", "cs", 0, 1), ("Mul", "sc", 0, 1),
    ],
)  # fmt: skip
def test_what_changes_nothing_is_dropped(
    bench: Bench, op: str, operands: str, number: int, left: int
) -> None:
    nodes = [make_node("Sigmoid", ["x"], ["s"]), make_node(op, list(operands), ["y"])]
    weights = {"c": np.full(4, number, np.float32)}
    model = bench.keeps(bench.model(nodes, {"x": ["N", 4]}, weights), Fold())
    assert len(bench.kinds(model)) == 1 + left


def test_a_network_that_changes_nothing_has_its_node(bench: Bench) -> None:
    zeros = {"c": np.zeros(4, np.float32)}
    model = bench.model([make_node("Add", ["c", "x"], ["y"])], {"x": ["N", 4]}, zeros)
    assert bench.kinds(bench.keeps(model, Fold())) == ["Add"]
