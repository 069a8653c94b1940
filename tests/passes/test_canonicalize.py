from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.helper import make_node

from qcompile.errors import BadInput
from qcompile.onnx import frontend
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.fold import Fold
from qcompile.pipeline import Context
from qcompile.plan import QuantPlan

Bench = Any
quick = settings(deadline=None, derandomize=True, max_examples=50)
IMAGE = {"x": ["N", 3, 6, 5]}


def f32(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def norm(channels: int) -> dict[str, Any]:
    return {
        "gamma": f32(channels),
        "beta": f32(channels, seed=1),
        "mean": f32(channels, seed=2),
        "var": np.abs(f32(channels, seed=3)) + np.float32(0.5),
    }


def ints(*values: int) -> Any:
    return np.array(values, np.int64)


def only(bench: Bench, node: onnx.NodeProto, shape: list[int | str], **weights: Any) -> Any:
    """The canonical form of a single node."""
    original = bench.model([node], {"x": shape}, weights)
    model = bench.keeps(original, Canonicalize())
    return model, bench.kinds(model)


def attributes(node: Any) -> dict[str, Any]:
    return {name: a.value for name, a in node.attributes.items()}


def test_conv_has_everything_spelled_out(bench: Bench) -> None:
    node = make_node("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER", strides=[2, 1])
    model, kinds = only(bench, node, ["N", 3, 6, 5], w=f32(4, 3, 3, 2))
    assert kinds == ["Conv"]
    assert attributes(model.graph[0]) == {
        "dilations": (1, 1),
        "group": 1,
        "kernel_shape": (3, 2),
        "pads": (0, 0, 1, 1),
        "strides": (2, 1),
    }
    assert model.graph[0].inputs[2].const_value.numpy().tolist() == [0.0] * 4


def test_a_conv_whose_weights_are_computed_stays(bench: Bench) -> None:
    nodes = [make_node("Relu", ["v"], ["w"]), make_node("Conv", ["x", "w"], ["y"])]
    original = bench.model(nodes, {"x": [2, 3, 6, 6], "v": [4, 3, 3, 3]})
    model = bench.keeps(original, Fold(), Canonicalize())
    assert bench.kinds(model) == ["Relu", "Conv"]
    assert attributes(model.graph[1]) == {}


def test_matmul_of_a_matrix_is_gemm_and_of_more_stays(bench: Bench) -> None:
    nodes = [make_node("MatMul", ["x", "w"], ["p"]), make_node("Add", ["p", "b"], ["y"])]
    weights = {"w": f32(5, 4), "b": f32(4)}
    model = bench.keeps(bench.model(nodes, {"x": ["N", 5]}, weights), Canonicalize())
    assert bench.kinds(model) == ["Gemm"]
    assert attributes(model.graph[0]) == {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}
    model = bench.keeps(bench.model(nodes, {"x": ["N", 7, 5]}, weights), Canonicalize())
    assert bench.kinds(model) == ["MatMul", "Add"]


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_what_runs_along_channels_is_a_depthwise_conv(bench: Bench, rank: int) -> None:
    ones = [1] * (rank - 2)
    nodes = [
        make_node("Mul", ["x", "s"], ["p"]),
        make_node("Sub", ["t", "p"], ["q"]),
        make_node("Relu", ["q"], ["r"]),
        make_node("BatchNormalization", ["r", "gamma", "beta", "mean", "var"], ["y"], name="bn"),
    ]
    weights = {"s": f32(3, *ones), "t": f32(1, 3, *ones, seed=1), **norm(3)}
    shape = ["N", 3, 6, 5][:rank]
    model = bench.keeps(bench.model(nodes, {"x": shape}, weights), Canonicalize())
    wrapped = ["Reshape", "Conv", "Reshape"] if rank == 2 else ["Conv"]
    assert bench.kinds(model) == [*wrapped, "Relu", *wrapped]
    conv = next(n for n in reversed(model.graph) if n.op_type == "Conv")
    assert attributes(conv)["group"] == 3
    assert model.graph[-1].name == "bn"
    assert model.graph.outputs[0].name == "y"


def test_a_scalar_and_a_full_constant_stay(bench: Bench) -> None:
    nodes = [make_node("Mul", ["x", "s"], ["p"]), make_node("Add", ["p", "t"], ["y"])]
    weights = {"s": np.float32(3), "t": f32(3, 6, 5)}
    model = bench.keeps(bench.model(nodes, IMAGE, weights), Canonicalize())
    assert bench.kinds(model) == ["Mul", "Add"]


@st.composite
def pools(draw: st.DrawFn) -> tuple[onnx.NodeProto, list[int | str]]:
    rank = draw(st.integers(1, 2))
    op = draw(st.sampled_from(["MaxPool", "AveragePool"]))
    kernel = [draw(st.integers(1, 4)) for _ in range(rank)]
    sizes = [draw(st.integers(5, 9)) for _ in range(rank)]
    more: dict[str, Any] = {"kernel_shape": kernel}
    if draw(st.booleans()):
        more["strides"] = [draw(st.integers(1, k)) for k in kernel]
    match draw(st.sampled_from(["pads", "SAME_UPPER", "SAME_LOWER", "VALID"])):
        case "pads":
            more["pads"] = [draw(st.integers(0, k - 1)) for k in kernel * 2]
            more["ceil_mode"] = draw(st.integers(0, 1))
            if op == "MaxPool":
                more["dilations"] = [draw(st.integers(1, 2)) for _ in range(rank)]
        case auto:
            more["auto_pad"] = auto
    if op == "AveragePool" and not more.get("ceil_mode"):
        more["count_include_pad"] = draw(st.integers(0, 1))
    return make_node(op, ["x"], ["y"], **more), ["N", 2, *sizes]


@quick
@given(drawn=pools())
def test_pools_have_explicit_pads(bench: Bench, drawn: tuple[Any, list[int | str]]) -> None:
    node, shape = drawn
    model, kinds = only(bench, node, shape)
    assert kinds == [node.op_type]
    found = attributes(model.graph[0])
    keys = {"ceil_mode", "dilations", "kernel_shape", "pads", "strides"}
    if found.get("ceil_mode"):
        # Only where a dilated window needs more padding than onnxruntime takes.
        assert max(found["dilations"]) > 1
    else:
        assert set(found) == keys | ({"count_include_pad"} if kinds == ["AveragePool"] else set())
        assert len(found["pads"]) == 2 * len(found["kernel_shape"])


def test_a_pool_that_runtimes_disagree_about_stays(bench: Bench) -> None:
    beyond = make_node("MaxPool", ["x"], ["y"], kernel_shape=[1], strides=[3], ceil_mode=1)
    counted = make_node(
        "AveragePool",
        ["x"],
        ["y"],
        kernel_shape=[3],
        pads=[1, 1],
        strides=[2],
        ceil_mode=1,
        count_include_pad=1,
    )
    for node, size in ((beyond, 5), (counted, 6)):
        original = bench.model([node], {"x": ["N", 2, size]})
        model = frontend.load(original.SerializeToString(), isolated=False)
        assert not Canonicalize()(model, QuantPlan(), Context())
        assert model.graph[0].attributes["ceil_mode"].as_int() == 1


def test_ceil_mode_of_a_max_pool_becomes_padding(bench: Bench) -> None:
    node = make_node("MaxPool", ["x"], ["y"], kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
    model, _ = only(bench, node, ["N", 3, 6, 7])
    assert attributes(model.graph[0])["pads"] == (0, 0, 1, 0)
    assert attributes(model.graph[0])["ceil_mode"] == 0


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("axes", [(2, 3), (-1, -2), (3, 2)])
def test_spatial_mean(bench: Bench, axes: tuple[int, int], keep: int) -> None:
    node = make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=keep)
    _, kinds = only(bench, node, ["N", 3, 6, 5], axes=ints(*axes))
    assert kinds == (["GlobalAveragePool"] if keep else ["GlobalAveragePool", "Reshape"])


def test_another_mean_stays(bench: Bench) -> None:
    node = make_node("ReduceMean", ["x", "axes"], ["y"])
    assert only(bench, node, ["N", 3, 6, 5], axes=ints(1, 2))[1] == ["ReduceMean"]


@pytest.mark.parametrize(
    ("op", "shape", "weights", "extra", "target"),
    [
        ("Flatten", ["N", 3, 6, 5], {}, {"axis": 1}, [0, 90]),
        ("Flatten", ["N", 3, 6, 5], {}, {"axis": 3}, [-1, 5]),
        ("Flatten", [2, 3, 6, 5], {}, {"axis": 2}, [6, 30]),
        ("Squeeze", ["N", 3, 1, 1], {"a": ints(2, 3)}, {}, [0, 3]),
        ("Squeeze", ["N", 3, 1, 1], {"a": ints(-1)}, {}, [0, 3, 1]),
        ("Unsqueeze", ["N", 3], {"a": ints(1)}, {}, [0, 1, 3]),
        ("Reshape", ["N", 3, 6, 5], {"a": ints(0, -1)}, {}, [0, 90]),
        ("Reshape", ["N", 3, 6, 5], {"a": ints(-1, 30)}, {}, [-1, 30]),
        ("Reshape", [2, 3, 6, 5], {"a": ints(0, 0, -1)}, {}, [2, 3, 30]),
    ],
)
def test_reshapes(
    bench: Bench, op: str, shape: list[int | str], weights: Any, extra: Any, target: list[int]
) -> None:
    node = make_node(op, ["x", *weights], ["y"], **extra)
    model, kinds = only(bench, node, shape, **weights)
    assert kinds == ["Reshape"]
    assert model.graph[0].inputs[1].const_value.numpy().tolist() == target
    assert not attributes(model.graph[0])


def test_sum_of_many(bench: Bench) -> None:
    nodes = [make_node("Relu", ["x"], ["r"]), make_node("Sum", ["x", "z", "r"], ["y"], name="s")]
    original = bench.model(nodes, {"x": ["N", 3, 4], "z": ["N", 1, 4]})
    model = bench.keeps(original, Canonicalize())
    assert bench.kinds(model) == ["Relu", "Add", "Add"]
    assert model.graph[-1].name == "s"


@st.composite
def slices(draw: st.DrawFn) -> tuple[list[int], dict[str, Any]]:
    sizes = [draw(st.integers(1, 6)) for _ in range(3)]
    chosen = draw(st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True))
    columns: dict[str, list[int]] = {"starts": [], "ends": [], "axes": [], "steps": []}
    for axis in chosen:
        # Two elements of the axis, each counted from the front or from the back.
        size, step = sizes[axis], draw(st.sampled_from([1, 1, 2, -1, -2]))
        low, high = sorted(draw(st.tuples(*[st.integers(0, size - 1)] * 2)))
        beyond = draw(st.sampled_from([0, 1, 2**31]))
        if step > 0:
            start, end = (
                low,
                draw(st.sampled_from([high + 1, high - size or 2**63 - 1, size + beyond])),
            )
            end = end if len(range(size)[start:end]) else size
        else:
            start, end = high, draw(st.sampled_from([low - 1 - size, low - size - 1 - beyond]))
        columns["starts"].append(start - size * draw(st.integers(0, 1)))
        columns["ends"].append(end)
        columns["axes"].append(axis - 3 * draw(st.integers(0, 1)))
        columns["steps"].append(step)
    return sizes, {name: ints(*c) for name, c in columns.items()}


@quick
@given(drawn=slices())
def test_slices_count_from_the_front(bench: Bench, drawn: tuple[list[int], Any]) -> None:
    sizes, columns = drawn
    nodes = [make_node("Slice", ["x", *columns], ["s"]), make_node("Relu", ["s"], ["y"])]
    model = bench.keeps(bench.model(nodes, {"x": sizes}, columns), Canonicalize())
    for node in list(model.graph)[:-1]:
        starts, ends, axes, steps = (v.const_value.numpy() for v in node.inputs[1:])
        assert (starts >= 0).all()
        assert ((ends >= 0) | (steps < 0)).all()
        assert (np.diff(axes) > 0).all()


def test_a_slice_of_everything_and_of_the_free_batch(bench: Bench) -> None:
    nodes = [make_node("Slice", ["x", "s", "e", "a"], ["p"]), make_node("Relu", ["p"], ["y"])]
    whole = {"s": ints(0, 0), "e": ints(2**63 - 1, 3), "a": ints(0, 1)}
    model = bench.keeps(bench.model(nodes, IMAGE, whole), Canonicalize())
    assert bench.kinds(model) == ["Relu"]
    part = {**whole, "e": ints(2**63 - 1, 2)}
    model = bench.keeps(bench.model(nodes, IMAGE, part), Canonicalize())
    assert model.graph[0].inputs[3].const_value.numpy().tolist() == [1]


@pytest.mark.parametrize("operands", [["pads"], ["pads", "v"], ["two", "v", "axes"]])
def test_pad_names_every_axis_and_its_value(bench: Bench, operands: list[str]) -> None:
    weights = {
        "pads": ints(0, 0, 1, 2, 0, 1, 0, 0),
        "two": ints(1, 2),
        "axes": ints(-2),
        "v": np.float32(2),
    }
    used = {k: v for k, v in weights.items() if k in operands}
    model, kinds = only(bench, make_node("Pad", ["x", *operands], ["y"]), ["N", 3, 6, 5], **used)
    assert kinds == ["Pad"]
    pads, value = (v.const_value.numpy() for v in model.graph[0].inputs[1:])
    assert pads.shape == (8,)
    assert value.shape == ()
    assert attributes(model.graph[0]) == {"mode": "constant"}


def test_what_does_nothing_is_gone(bench: Bench) -> None:
    nodes = [
        make_node("Pad", ["x", "zeros"], ["a"]),
        make_node("Transpose", ["a"], ["b"], perm=[0, 1, 2, 3]),
        make_node("Concat", ["b"], ["c"], axis=1),
        make_node("Reshape", ["c", "same"], ["d"]),
        make_node("Clip", ["d"], ["e"]),
        make_node("Sum", ["e"], ["f"]),
        make_node("Relu", ["f"], ["g"]),
        make_node("Flatten", ["g"], ["h"]),
        make_node("Flatten", ["h"], ["y"]),
    ]
    weights = {"zeros": ints(*[0] * 8), "same": ints(0, 3, 6, 5)}
    model = bench.keeps(bench.model(nodes, IMAGE, weights), Canonicalize())
    assert bench.kinds(model) == ["Relu", "Reshape"]
    assert model.graph.outputs[0].name == "y"


def test_a_node_between_input_and_output_stays(bench: Bench) -> None:
    model, kinds = only(bench, make_node("Flatten", ["x"], ["y"]), ["N", 3])
    assert kinds == ["Flatten"]
    assert model.graph.outputs[0].name == "y"


def test_axes_count_from_the_front(bench: Bench) -> None:
    nodes = [
        make_node("Softmax", ["x"], ["s"]),
        make_node("Transpose", ["s"], ["t"]),
        make_node("Concat", ["t", "t"], ["y"], axis=-2),
    ]
    model = bench.keeps(bench.model(nodes, {"x": [2, 3, 4]}), Canonicalize())
    found = [attributes(n) for n in model.graph]
    assert found == [{"axis": 2}, {"perm": (2, 1, 0)}, {"axis": 1}]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.0, None, "Relu"), (None, 6.0, "Clip"), (-1.0, np.inf, "Clip"), (0.0, 6.0, "Clip")],
)
def test_clip(bench: Bench, low: float | None, high: float | None, expected: str) -> None:
    limits = {"l": low, "h": high}
    weights = {k: np.float32(v) for k, v in limits.items() if v is not None}
    node = make_node("Clip", ["x", *(k if k in weights else "" for k in limits)], ["y"])
    model, kinds = only(bench, node, ["N", 20], **weights)
    assert kinds == [expected]
    if expected == "Clip":
        assert all(np.isfinite(v.const_value.numpy()) for v in model.graph[0].inputs[1:])


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(bench: Bench, poison: float) -> None:
    weights = f32(4, 3, 3, 3)
    weights[1, 2, 0, 0] = poison
    node = make_node("Conv", ["x", "w"], ["y"], name="first")
    model = frontend.load(
        bench.model([node], IMAGE, {"w": weights}).SerializeToString(), isolated=False
    )
    with pytest.raises(BadInput, match="'first'"):
        Canonicalize()(model, QuantPlan(), Context())


def test_a_variance_below_zero_is_refused(bench: Bench) -> None:
    node = make_node("BatchNormalization", ["x", "gamma", "beta", "mean", "var"], ["y"], name="bn")
    weights = {**norm(3), "var": np.float32([1, -1, 1])}
    model = frontend.load(bench.model([node], IMAGE, weights).SerializeToString(), isolated=False)
    with pytest.raises(BadInput, match="'bn'"):
        Canonicalize()(model, QuantPlan(), Context())
