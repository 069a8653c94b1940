"""Spelled-out operators against onnxruntime: the float graph before and after gives the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.helper import make_node

from qcompile.onnx import frontend
from qcompile.passes.decompose import _RULES, REFUSED, Decompose, open_batch
from qcompile.pipeline import Context
from qcompile.plan import QuantPlan

Floats = NDArray[np.float32]
few = settings(max_examples=25, deadline=None, derandomize=True)


def network(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int | str]],
    constants: Mapping[str, NDArray[np.generic]],
    outputs: Sequence[str] = ("y",),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(n, 1, list(s)) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, 1, None) for n in outputs],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def run(model: onnx.ModelProto, feeds: Mapping[str, Floats]) -> list[Floats]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # its fusion of a spelled-out normalization (1.31) takes another epsilon
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, dict(feeds))


def decomposed(model: onnx.ModelProto) -> ir.Model:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    loaded = frontend.load(copy, isolated=False)
    Decompose()(loaded, QuantPlan(), Context())
    refusals = [n.metadata_props[REFUSED] for n in loaded.graph if REFUSED in n.metadata_props]
    assert not refusals, refusals
    return loaded


def check(model: onnx.ModelProto, feeds: Mapping[str, Floats], gone: str) -> ir.Model:
    """The same results without the operator, whatever axis in front they got."""
    made = decomposed(model)
    assert gone not in {n.op_type for n in made.graph}
    wide = {str(v.name): v.shape.numpy() for v in made.graph.inputs if v.shape is not None}
    fed = {n: x.reshape(wide[n]) for n, x in feeds.items()}
    for wanted, got in zip(run(model, feeds), run(ir.to_proto(made), fed), strict=True):
        assert got.size == wanted.size
        np.testing.assert_allclose(got.reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-4)
    return made


def numbers(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@few
@given(data=st.data())
def test_conv_transpose(data: st.DataObject) -> None:
    draw = data.draw
    rank = draw(st.integers(1, 2))
    group = draw(st.sampled_from([1, 1, 2]))
    axes = st.lists(st.integers(1, 3), min_size=rank, max_size=rank)
    kernel, strides, dilations = draw(axes), draw(axes), draw(axes)
    size = draw(st.lists(st.integers(1, 5), min_size=rank, max_size=rank))
    more = [draw(st.integers(0, s - 1)) for s in strides]
    pads = draw(st.lists(st.integers(0, 2), min_size=2 * rank, max_size=2 * rank))
    spans = zip(size, strides, kernel, dilations, more, pads, pads[rank:], strict=False)
    assume(all((n - 1) * s + (k - 1) * d + 1 + o - p - q >= 1 for n, s, k, d, o, p, q in spans))
    node = make_node(
        "ConvTranspose", ["x", "w", "b"], ["y"], kernel_shape=kernel, strides=strides, pads=pads,
        dilations=dilations, output_padding=more, group=group,
    )  # fmt: skip
    x, w = numbers(0, 2, 2 * group, *size), numbers(1, 2 * group, 3, *kernel)
    model = network([node], {"x": x.shape}, {"w": w, "b": numbers(2, 3 * group)})
    check(model, {"x": x}, "ConvTranspose")


def test_what_follows_a_conv_transpose_goes_into_its_weights() -> None:
    nodes = [
        make_node("ConvTranspose", ["x", "w"], ["t"], strides=[2, 2]),
        make_node("BatchNormalization", ["t", "s", "b", "m", "v"], ["y"]),
    ]
    stats = {n: np.abs(numbers(i, 3)) + 0.5 for i, n in enumerate("sbmv")}
    x = numbers(9, 1, 2, 4, 4)
    made = check(
        network(nodes, {"x": x.shape}, {"w": numbers(8, 2, 3, 3, 3), **stats}),
        {"x": x},
        "ConvTranspose",
    )
    assert "BatchNormalization" not in {n.op_type for n in made.graph}


MODES = ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"]


@few
@given(
    mode=st.sampled_from(["nearest", "linear", "cubic"]),
    how=st.sampled_from(MODES),
    rounding=st.sampled_from(["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]),
    before=st.tuples(st.integers(2, 6), st.integers(2, 6)),
    after=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_resize(
    mode: str, how: str, rounding: str, before: tuple[int, int], after: tuple[int, int]
) -> None:
    node = make_node(
        "Resize", ["x", "", "", "sizes"], ["y"], mode=mode, coordinate_transformation_mode=how,
        nearest_mode=rounding,
    )  # fmt: skip
    x = numbers(0, 1, 2, *before)
    check(network([node], {"x": x.shape}, {"sizes": np.array([1, 2, *after])}), {"x": x}, "Resize")


@few
@given(
    mode=st.sampled_from(["reflect", "edge", "wrap"]),
    widths=st.lists(st.integers(0, 3), min_size=6, max_size=6),
)
def test_borders_that_repeat_values(mode: str, widths: list[int]) -> None:
    x = numbers(0, 4, 5, 6)
    node = make_node("Pad", ["x", "p"], ["y"], mode=mode)
    check(network([node], {"x": x.shape}, {"p": np.array(widths)}), {"x": x}, "Pad")


KINDS = ["Sum", "Mean", "Max", "Min", "L1", "L2", "SumSquare", "LogSumExp"]


@few
@given(
    kind=st.sampled_from(KINDS),
    axes=st.sets(st.integers(-4, 3), min_size=1, max_size=4),
    keep=st.booleans(),
)
def test_reductions(kind: str, axes: set[int], keep: bool) -> None:
    rows = sorted({a % 4 for a in axes})
    assume(keep or len(rows) < 4)
    x = numbers(0, 2, 3, 4, 5)
    node = make_node(f"Reduce{kind}", ["x", "a"], ["y"], keepdims=int(keep))
    made = network([node], {"x": x.shape}, {"a": np.array(rows)})
    spatial = kind == "Mean" and rows == [2, 3]
    check(made, {"x": x}, "nothing" if spatial else f"Reduce{kind}")


@few
@given(
    axis=st.integers(-3, 2),
    picks=st.lists(st.integers(-3, 2), min_size=1, max_size=6),
    square=st.booleans(),
)
def test_gather(axis: int, picks: list[int], square: bool) -> None:
    x = numbers(0, 3, 3, 3)
    indices = np.array([picks, picks] if square else picks)
    made = check(
        network(
            [make_node("Gather", ["x", "i"], ["y"], axis=axis)], {"x": x.shape}, {"i": indices}
        ),
        {"x": x},
        "nothing",
    )
    for node in made.graph:
        assert node.op_type in ("Gather", "Slice", "Reshape")


@few
@given(
    left=st.sampled_from([(3,), (2, 3), (4, 2, 3), (1, 4, 2, 3), (5, 1, 2, 3)]),
    right=st.sampled_from([(3,), (3, 2), (4, 3, 2), (5, 4, 3, 2)]),
    fixed=st.sampled_from(["", "left", "right"]),
)
def test_matrices(left: tuple[int, ...], right: tuple[int, ...], fixed: str) -> None:
    a, b = numbers(0, *left), numbers(1, *right)
    assume(not (fixed == "left" and len(left) > 2))
    assume(len(left) > 1 or len(right) > 1)
    inputs = {n: x for n, x in (("a", a), ("b", b)) if n != {"left": "a", "right": "b"}.get(fixed)}
    constants = {n: x for n, x in (("a", a), ("b", b)) if n not in inputs}
    model = network(
        [make_node("MatMul", ["a", "b"], ["y"])], {n: x.shape for n, x in inputs.items()}, constants
    )
    check(model, inputs, "nothing")


NORMS = {
    "layer": ("LayerNormalization", {"axis": -2}, (4, 5)),
    "instance": ("InstanceNormalization", {}, (6,)),
    "group": ("GroupNormalization", {"num_groups": 3}, (6,)),
}


@pytest.mark.parametrize("name", NORMS)
def test_normalizations(name: str) -> None:
    kind, attributes, shape = NORMS[name]
    x = numbers(0, 2, 6, 4, 5)
    node = make_node(kind, ["x", "s", "t"], ["y"], **attributes)
    constants = {"s": numbers(1, *shape), "t": numbers(2, *shape)}
    made = check(network([node], {"x": x.shape}, constants), {"x": x}, "nothing")
    (norm,) = (n for n in made.graph if "Norm" in n.op_type)
    assert norm.op_type == "LayerNormalization"
    assert len(norm.inputs) == 2


def test_slopes_for_every_channel() -> None:
    x = numbers(0, 2, 3, 4)
    model = network(
        [make_node("PRelu", ["x", "s"], ["y"])], {"x": x.shape}, {"s": numbers(1, 3, 1)}
    )
    check(model, {"x": x}, "PRelu")


@pytest.mark.parametrize("kind", ["Max", "Min"])
def test_extremes_of_many(kind: str) -> None:
    x, z = numbers(0, 2, 3, 4), numbers(1, 2, 3, 4)
    nodes = [make_node(kind, ["x", "z", "row", "one"], ["y"])]
    constants = {"row": numbers(2, 3, 1), "one": np.array(0.3, np.float32)}
    check(network(nodes, {"x": x.shape, "z": z.shape}, constants), {"x": x, "z": z}, "nothing")


def test_an_open_batch_that_is_mixed_is_named() -> None:
    nodes = [make_node("ReduceMax", ["x", "a"], ["y"], keepdims=1)]
    loaded = frontend.load(network(nodes, {"x": ["rows", 4]}, {"a": np.array([0])}), isolated=False)
    Decompose()(loaded, QuantPlan(), Context())
    assert open_batch(loaded) == "rows"


def test_every_rule_is_met_by_a_case_of_onnx() -> None:
    from tests.node_cases import by_operator

    assert set(_RULES) <= set(by_operator())


def test_operators_with_fixed_axes_follow_each_other_in_a_model_without_a_batch() -> None:
    nodes = [
        make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2, 3]),
        make_node("Conv", ["t", "w"], ["c"]),
        make_node("MaxPool", ["c"], ["m"], kernel_shape=[2, 2]),
        make_node("GlobalAveragePool", ["m"], ["y"]),
    ]
    x = numbers(0, 3, 2, 6, 6)
    made = check(network(nodes, {"x": x.shape}, {"w": numbers(1, 4, 3, 3, 3)}), {"x": x}, "nothing")
    assert [v.shape.dims for v in made.graph.inputs if v.shape] == [(1, 3, 2, 6, 6)]


@pytest.mark.parametrize("last", ["Gemm", "Relu", "Transpose"])
def test_outputs_keep_their_shapes_where_one_sample_is_compiled(last: str) -> None:
    end = {
        "Gemm": make_node("Gemm", ["f", "w"], ["y"]),
        "Relu": make_node("Relu", ["f"], ["y"]),
        "Transpose": make_node("Transpose", ["f"], ["y"], perm=[0, 1]),
    }
    nodes = [
        make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        make_node("Softmax", ["t"], ["s"], axis=0),
        make_node("Transpose", ["s"], ["b"], perm=[1, 0, 2]),
        make_node("Reshape", ["b", "flat"], ["f"]),
        end[last],
    ]
    x = numbers(0, 1, 3, 4)
    constants = {"w": numbers(1, 12, 5), "flat": np.array([1, 12])}
    model = network(nodes, {"x": x.shape}, constants, ("y", "f"))
    made = check(model, {"x": x}, "nothing")
    fed = run(ir.to_proto(made), {"x": x})
    assert [a.shape for a in fed] == [a.shape for a in run(model, {"x": x})]
    assert [v.name for v in made.graph.outputs] == ["y", "f"]


def test_the_mean_of_a_volume() -> None:
    x = numbers(0, 2, 3, 2, 3, 4)
    model = network([make_node("GlobalAveragePool", ["x"], ["y"])], {"x": x.shape}, {})
    made = decomposed(model)
    np.testing.assert_allclose(
        run(ir.to_proto(made), {"x": x})[0], x.mean((2, 3, 4), keepdims=True), atol=1e-6
    )
    (pool,) = [n for n in made.graph if n.op_type == "GlobalAveragePool"]
    assert pool.inputs[0] is not None
    assert len(pool.inputs[0].shape or ()) == 3


def spelled(axes: Sequence[int], square: str, end: str, keep: int = 1) -> list[onnx.NodeProto]:
    """Layer normalization as exporters write it before opset 17."""
    nodes = [
        make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=keep),
        make_node("Sub", ["x", "mean"], ["apart"]),
    ]
    pow_ = ["apart", "two"] if square == "Pow" else ["apart", "apart"]
    nodes += [
        make_node(square, pow_, ["square"]),
        make_node("ReduceMean", ["square", "axes"], ["variance"], keepdims=keep),
        make_node("Add", ["epsilon", "variance"], ["sum"]),
        make_node("Sqrt", ["sum"], ["root"]),
    ]
    if end == "Div":
        return [*nodes, make_node("Div", ["apart", "root"], ["n"])]
    nodes.append(make_node("Reciprocal", ["root"], ["inverse"]))
    return [*nodes, make_node("Mul", ["inverse", "apart"], ["n"])]


@pytest.mark.parametrize("end", ["Div", "Mul"])
@pytest.mark.parametrize("square", ["Pow", "Mul"])
@pytest.mark.parametrize("axes", [[-1], [1], [1, 2], [2, -1]])
def test_a_normalization_that_is_spelled_out(axes: list[int], square: str, end: str) -> None:
    nodes = [
        *spelled(axes, square, end),
        make_node("Mul", ["n", "gamma"], ["scaled"]),
        make_node("Add", ["scaled", "beta"], ["y"]),
    ]
    x = 3 * numbers(0, 2, 3, 4, 5) + 1
    constants = {
        "axes": np.array(axes), "two": np.float32(2), "epsilon": np.float32(0.1),
        "gamma": numbers(1, 5), "beta": numbers(2, 5),
    }  # fmt: skip
    made = check(network(nodes, {"x": x.shape}, constants), {"x": x}, "Sqrt")
    kinds = [n.op_type for n in made.graph]
    assert kinds.count("LayerNormalization") == 1
    assert not {"ReduceMean", "Pow", "Div", "MatMul", "Gemm", "Sub"} & set(kinds)


@pytest.mark.parametrize("change", ["other axes", "other mean", "cubed", "batch", "epsilon", "two"])
def test_what_only_looks_like_a_normalization(change: str) -> None:
    nodes = spelled([-1], "Pow", "Div")
    constants: dict[str, NDArray[np.generic]] = {
        "axes": np.array([0] if change == "batch" else [-1]),
        "more": np.array([1]),
        "two": np.asarray(np.float32(4.0 if change == "cubed" else 2.0)),
        "epsilon": np.asarray(np.float32(0.1)),
    }
    if change == "other axes":
        nodes[3].input[1] = "more"
    if change == "other mean":
        nodes.insert(0, make_node("Abs", ["x"], ["z"]))
        nodes[1].input[0] = "z"
    if change in ("epsilon", "two"):
        # one number of more axes than x gives the result as many
        constants[change] = constants[change].reshape(1, 1, 1, 1)
    nodes[-1].output[0] = "y"
    model = network(nodes, {"x": [2, 3, 4]}, constants)
    made = decomposed(model)
    assert "LayerNormalization" not in {n.op_type for n in made.graph}
