"""What fuzzing (docs/fuzzing.md) has found, as small as it gets: each was a crash, or a result that was wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.helper import make_node

from qcompile import border
from qcompile.errors import BadInput, Unsupported
from qcompile.ir import Graph
from qcompile.npz import open_arrays
from qcompile.onnx import frontend
from tests.fuzz import chain, readers
from tests.fuzz.chain import agrees
from tests.fuzz.networks import Network
from tests.oracle import build

Array = NDArray[np.float32]


# --- networks ---------------------------------------------------------------------------------------------------


def test_a_state_to_start_from_is_multiplied_beforehand() -> None:
    rng = np.random.default_rng(1)
    weights = {
        "w": rng.normal(0, 0.3, (2, 1, 5)).astype(np.float32),
        "r": np.float32([[[0.03]], [[0.55]]]),
        "h": np.float32([[[-0.22]], [[-0.05]]]),
    }
    node = make_node(
        "RNN", ["x", "w", "r", "", "", "h"], ["y"], hidden_size=1, direction="bidirectional"
    )
    agrees([node], {"x": [5, 1, 5]}, weights)


def test_peepholes_of_a_cell_to_start_from() -> None:
    rng = np.random.default_rng(2)
    shapes = {"w": (1, 8, 3), "r": (1, 8, 2), "h": (1, 1, 2), "c": (1, 1, 2), "p": (1, 6)}
    weights = {k: rng.normal(0, 0.4, s).astype(np.float32) for k, s in shapes.items()}
    node = make_node("LSTM", ["x", "w", "r", "", "", "h", "c", "p"], ["y"], hidden_size=2)
    agrees([node], {"x": [3, 1, 3]}, weights)


@pytest.mark.parametrize("recipe", ["default", "fixed-point-khot"])
def test_positions_of_extremes_are_no_floats_to_rounding(recipe: str) -> None:
    nodes = [
        make_node("ArgMax", ["x"], ["y"], axis=1, keepdims=1),
        make_node("MatMul", ["x", "w"], ["z"]),
    ]
    weights = {"w": np.random.default_rng(3).normal(size=(10, 3)).astype(np.float32)}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 10])],
        [
            helper.make_tensor_value_info("y", TensorProto.INT64, None),
            helper.make_tensor_value_info("z", TensorProto.FLOAT, None),
        ],
        [numpy_helper.from_array(a, n) for n, a in weights.items()],
    )
    typed = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    x = np.random.default_rng(4).normal(size=(3, 10)).astype(np.float32)
    made = chain.compiled(Network(typed.SerializeToString(), {"x": x}, recipe, {}, ()))
    assert isinstance(made, Graph), made
    codes = border.encode(made, {"x": x})
    results = border.decode(made, made.run(codes))
    assert np.array_equal(results["y"].ravel(), codes["x"].reshape(3, 10).argmax(axis=1))
    np.testing.assert_allclose(results["z"], x @ weights["w"], atol=0.2)


def test_outputs_that_become_one_keep_their_names() -> None:
    nodes = [
        make_node("Clip", ["x", "low"], ["y"]),
        make_node("Split", ["y"], ["z"], axis=0, num_outputs=1),
        make_node("GlobalMaxPool", ["x"], ["u"]),
    ]
    agrees(nodes, {"x": [4, 1, 2]}, {"low": np.float32(-1)}, ("z", "y", "u"))


def test_a_slice_that_starts_before_the_axis_backwards() -> None:
    """The operator's specification clamps the start to 0; Python would give nothing."""
    bounds = {"s": [-2], "e": [-9], "a": [2], "t": [-1]}
    node = make_node("Slice", ["x", "s", "e", "a", "t"], ["y"])
    x = np.float32([[[3.0], [-1.0]], [[1.0], [2.0]]])
    weights = {k: np.array(v, np.int64) for k, v in bounds.items()}
    model = build([node], {"x": [2, 2, 1]}, weights)
    graph = chain.compiled(Network(model, {"x": x}, "fast", {}, ()))
    assert isinstance(graph, Graph), graph
    (result,) = border.decode(graph, graph.run(border.encode(graph, {"x": x}))).values()
    np.testing.assert_allclose(result, x, atol=0.02)


def test_a_convolution_that_is_returned_where_axis_0_is_mixed() -> None:
    weights = {"w": np.random.default_rng(5).normal(size=(2, 5, 1, 2)).astype(np.float32), "a": [0]}
    nodes = [
        make_node("Conv", ["x", "w"], ["y"], kernel_shape=[1, 2], pads=[0, 1, 0, 0]),
        make_node("ReduceSum", ["x", "a"], ["z"], keepdims=0),
    ]
    agrees(nodes, {"x": [2, 5, 1, 2]}, weights | {"a": np.array([0], np.int64)}, ("y", "z"))


def test_one_convolution_after_another_where_axis_0_is_mixed() -> None:
    rng = np.random.default_rng(8)
    weights = {
        "w": rng.normal(size=(2, 3, 1, 2)).astype(np.float32),
        "v": rng.normal(size=(2, 2, 1, 1)).astype(np.float32),
        "a": np.array([0], np.int64),
    }
    nodes = [
        make_node("Conv", ["x", "w"], ["c"]),
        make_node("Conv", ["c", "v"], ["d"]),
        make_node("ReduceMean", ["d", "a"], ["y"]),
    ]
    agrees(nodes, {"x": [3, 3, 2, 4]}, weights)


def test_a_window_over_three_axes_that_is_larger_than_its_operand() -> None:
    # ONNX divides towards zero, and finds one window where there is none
    node = make_node("Conv", ["x", "k"], ["y"], strides=[2, 1, 1])
    model = one_node(node, kind=TensorProto.FLOAT)
    del model.graph.input[0].type.tensor_type.shape.dim[:]
    for _ in range(5):
        model.graph.input[0].type.tensor_type.shape.dim.add(dim_value=1)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((1, 1, 2, 1, 1), "f4"), "k"))
    x = np.zeros((1, 1, 1, 1, 1), np.float32)
    refused = chain.compiled(Network(model.SerializeToString(), {"x": x}, "fast", {}, ()))
    assert isinstance(refused, str)
    assert "larger than its padded operand" in refused


def test_binary_points_of_a_convolution_over_three_axes() -> None:
    w = np.random.default_rng(6).normal(size=(3, 1, 1, 1, 2)).astype(np.float32)
    v = np.random.default_rng(7).normal(size=(1, 3, 1, 3, 3)).astype(np.float32)
    nodes = [
        make_node("Conv", ["x", "w"], ["c"], strides=[2, 1, 2], pads=[0, 0, 1, 0, 0, 0]),
        make_node("Conv", ["c", "v"], ["y"], strides=[3, 3, 3], auto_pad="SAME_UPPER"),
    ]
    agrees(nodes, {"x": [1, 1, 3, 4, 2]}, {"w": w, "v": v}, recipe="fixed-point-khot", share=0.1)


def test_a_border_that_takes_the_place_of_everything() -> None:
    """What is left is one entry, of the value of the border alone: no input is in it."""
    node = make_node("Pad", ["x", "p"], ["y"])
    model = build([node], {"x": [1, 1]}, {"p": np.array([0, 1, 0, -1])})
    refused = chain.compiled(Network(model, {"x": np.ones((1, 1))}, "fast", {}, ()))
    assert isinstance(refused, str)
    assert "leaves nothing of axis 1" in refused


@pytest.mark.parametrize("recipe", ["default", "fixed-point"])
def test_no_recipe_moves_the_scale_of_a_softmax(recipe: str) -> None:
    rng = np.random.default_rng(9)
    weights = {k: rng.normal(size=(8, 8)).astype(np.float32) * 0.1 for k in "wv"}
    nodes = [
        make_node("MatMul", ["x", "w"], ["l"]),
        make_node("Softmax", ["l"], ["s"]),
        make_node("MatMul", ["s", "v"], ["y"]),
    ]
    agrees(nodes, {"x": [64, 8]}, weights, recipe=recipe, share=0.1)


def test_an_output_whose_leading_axis_counts_no_samples(tmp_path: Path) -> None:
    nodes = [make_node("Gather", ["x", "i"], ["y"], axis=0), make_node("Relu", ["x"], ["z"])]
    model = build(nodes, {"x": [1, 5, 7]}, {"i": np.int64(0)}, ("y", "z"))
    network = Network(model, {}, "data-free", {}, ())
    assert chain.whole(network) is None


def test_a_limit_in_front_of_a_value_whose_batch_has_a_name_of_its_own() -> None:
    resized = make_node(
        "Resize", ["x", "", "", "k"], ["r"], axes=[1], mode="nearest",
        coordinate_transformation_mode="half_pixel", nearest_mode="round_prefer_floor",
    )  # fmt: skip
    nodes = [resized, make_node("Relu", ["r"], ["p"]), make_node("Max", ["c", "p"], ["y"])]
    agrees(nodes, {"x": ["N", 1]}, {"k": np.array([1]), "c": np.float32([[0.0377]])})


@pytest.mark.parametrize("leads", [(2, 1), (1, 2), (2, 3)])
def test_inputs_that_have_nothing_in_common_on_axis_0(leads: tuple[int, int]) -> None:
    nodes = [make_node("Flatten", ["b"], ["f"]), make_node("Relu", ["a"], ["r"])]
    inputs = {"a": [leads[0], 4], "b": [leads[1], 3, 2]}
    agrees(nodes, inputs, outputs=("f", "r"), recipe="default")


# --- models that are damaged ------------------------------------------------------------------------------------


def one_node(
    node: onnx.NodeProto, opset: int = 17, kind: int = TensorProto.INT32
) -> onnx.ModelProto:
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", kind, [2, 3])],
        [helper.make_tensor_value_info("y", kind, None)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


@pytest.mark.parametrize(
    ("node", "opset"),
    [
        (make_node("Min", ["x", "x"], ["y"]), 1 << 31),
        (make_node("Min", ["x", "x"], ["y"]), -(1 << 63)),
        (make_node("Expand", ["x", "x"], ["y"]), 1),
    ],
)
def test_an_opset_without_the_operator(node: onnx.NodeProto, opset: int) -> None:
    with pytest.raises(BadInput, match=rf"opset {opset}.* has no {node.op_type}"):
        frontend.load(one_node(node, opset).SerializeToString())


@pytest.mark.parametrize(
    "node", [make_node("Cast", ["x"], ["y"]), make_node("Gather", ["x"], ["y"])]
)
def test_nodes_that_lack_what_they_need(node: onnx.NodeProto) -> None:
    with pytest.raises((BadInput, Unsupported)):
        frontend.load(one_node(node).SerializeToString())


@pytest.mark.parametrize(
    ("node", "lacks"),
    [
        (make_node("Div", ["x", "x"], []), "result"),
        (make_node("ZipMap", ["x"], [], domain="ai.onnx.ml"), "result"),
        (make_node("ArrayFeatureExtractor", [], ["y"], domain="ai.onnx.ml"), "operand"),
    ],
)
def test_nodes_that_make_nothing_or_take_nothing(node: onnx.NodeProto, lacks: str) -> None:
    with pytest.raises(BadInput, match=f"{node.op_type}.*has no {lacks}"):
        frontend.load(one_node(node).SerializeToString())


@pytest.mark.parametrize("attribute", [{"auto_pad": b"\xb7AME_LOWER"}, {"texts": [b"a", b"\xff"]}])
def test_attributes_that_are_no_text(attribute: dict[str, object]) -> None:
    model = one_node(make_node("Relu", ["x"], ["y"], **attribute))
    with pytest.raises(BadInput, match=r"attribute .* is not text"):
        frontend.load(model.SerializeToString())


def test_classes_that_are_cut_short() -> None:
    node = make_node("ArrayFeatureExtractor", ["k", "x"], ["y"], domain="ai.onnx.ml")
    model = one_node(node)
    model.graph.initializer.append(TensorProto(name="k", data_type=TensorProto.INT64, dims=[3]))
    with pytest.raises(BadInput, match="tensor 'k' is damaged"):
        frontend.load(model.SerializeToString())


def test_an_output_that_is_listed_twice() -> None:
    model = one_node(make_node("Relu", ["x"], ["y"]), kind=TensorProto.FLOAT)
    model.graph.output.append(model.graph.output[0])
    with pytest.raises(BadInput, match="returns 'y' twice"):
        frontend.load(model.SerializeToString())


def test_sizes_beyond_all_memory() -> None:
    model = one_node(make_node("Relu", ["x"], ["y"]), kind=TensorProto.FLOAT)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 1 << 40
    with pytest.raises(BadInput, match=rf"input 'x' has {1 << 41} elements"):
        frontend.load(model.SerializeToString())
    wide = one_node(make_node("Tile", ["x", "k"], ["y"]), kind=TensorProto.FLOAT)
    wide.graph.initializer.append(numpy_helper.from_array(np.array([1, 1 << 40]), "k"))
    with pytest.raises(Unsupported, match=rf"makes 'y' of {3 << 40} elements"):
        frontend.load(wide.SerializeToString())


def test_an_operator_of_channels_on_what_has_none() -> None:
    model = one_node(make_node("LRN", ["x"], ["y"], size=3), kind=TensorProto.FLOAT)
    del model.graph.input[0].type.tensor_type.shape.dim[1:]
    refused = chain.compiled(Network(model.SerializeToString(), {"x": np.zeros(2)}, "fast", {}, ()))
    assert isinstance(refused, str)
    assert "only 1 axes" in refused


def test_a_transpose_by_no_order_of_the_axes() -> None:
    model = one_node(make_node("Transpose", ["x"], ["y"], perm=[0]), kind=TensorProto.FLOAT)
    with pytest.raises(BadInput, match=r"\[0\] is no order of the 2 axes"):
        frontend.load(model.SerializeToString())


def test_a_tensor_of_doubles_that_is_cut_short() -> None:
    model = one_node(make_node("Add", ["x", "k"], ["y"]), kind=TensorProto.DOUBLE)
    model.graph.initializer.append(numpy_helper.from_array(np.arange(3.0), "k"))
    model.graph.initializer[0].raw_data = b"\0" * 7
    with pytest.raises(BadInput, match=r"tensor 'k' has 7 bytes.*takes 24; the model is damaged"):
        frontend.load(model.SerializeToString())


# --- data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [b"{'descr': '<f4', 'shape': (3,", b"(" * 60_000, b"{'descr': '''", b"\t{\n  }", b"\0"],
)
def test_headers_of_arrays_that_no_parser_takes(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "data.npy"
    file.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(12))
    with pytest.raises(BadInput, match="cannot be read"):
        open_arrays(file)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ('file = "\\u0000data.npz"', "is no path"),
        (f'file = "data.npz"\n[inputs.x]\nscale = 1{"0" * 400}', "is a number"),
        ("x = " + "[" * 5000, "cannot be read"),
    ],
)
def test_descriptions_beyond_all_bounds(tmp_path: Path, words: str, match: str) -> None:
    file = tmp_path / "data.toml"
    file.write_text(words)
    with pytest.raises(BadInput, match=match):
        readers.read_samples(file)
