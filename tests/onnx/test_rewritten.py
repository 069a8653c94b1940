"""Loops written out, and what scikit-learn exports: the same numbers as onnxruntime's, from standard operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.helper import make_node, make_tensor_value_info

from qcompile.errors import Unsupported
from qcompile.onnx import frontend
from qcompile.onnx.unroll import unroll

X = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)


def model(
    nodes: Sequence[onnx.NodeProto],
    constants: dict[str, NDArray[np.generic]],
    outputs: dict[str, int],
) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "g",
        [make_tensor_value_info("x", 1, [5, 4])],
        [make_tensor_value_info(n, t, None) for n, t in outputs.items()],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ai.onnx.ml", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def run(proto: onnx.ModelProto) -> list[NDArray[np.generic]]:
    return onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x": X})


def same(proto: onnx.ModelProto) -> list[str]:
    """Both give the same; the operators that are left."""
    wanted = run(proto)
    loaded = frontend.load(proto.SerializeToString(), isolated=False)
    for a, b in zip(wanted, run(ir.to_proto(loaded)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)
    return [n.op_type for n in loaded.graph]


def loop(turns: int, *, early: bool = False, scan: bool = True) -> onnx.ModelProto:
    """v = tanh(v * w + turn), turn after turn; every v is also kept."""
    nodes = [
        make_node("Mul", ["v", "w"], ["scaled"]),
        make_node("Cast", ["i"], ["turn"], to=1),
        make_node("Add", ["scaled", "turn"], ["sum"]),
        make_node("Tanh", ["sum"], ["next"]),
        make_node("Less", ["i", "n"], ["more"])
        if early
        else make_node("Identity", ["go"], ["more"]),
        make_node("Identity", ["next"], ["kept"]),
    ]
    inputs = [
        make_tensor_value_info("i", 7, []),
        make_tensor_value_info("go", 9, []),
        make_tensor_value_info("v", 1, None),
    ]
    outputs = [make_tensor_value_info("more", 9, []), make_tensor_value_info("next", 1, None)]
    outputs += [make_tensor_value_info("kept", 1, None)] if scan else []
    own = [numpy_helper.from_array(np.array([0.5, -1, 2, 0.1], np.float32), "w")]
    body = helper.make_graph(nodes, "body", inputs, outputs, own)
    made = ["last", "every"] if scan else ["last"]
    node = make_node("Loop", ["n", "yes", "x"], made, name="turns", body=body)
    constants = {"n": np.array(turns), "yes": np.array(True)}
    return model([node], constants, dict.fromkeys(made, 1))


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("turns", [1, 2, 5])
def test_a_loop_of_constant_length_is_written_out(turns: int, scan: bool) -> None:
    left = same(loop(turns, scan=scan))
    assert "Loop" not in left
    assert left.count("Tanh") == turns


def test_a_loop_without_turns_hands_on_what_it_got() -> None:
    assert same(loop(0, scan=False)) == ["Identity"]


@pytest.mark.parametrize(("most", "turns"), [(7, 4), (2, 2)])
def test_a_loop_that_counts_as_tensorflow_writes_it(most: int, turns: int) -> None:
    """It goes on while its own counter, and the loop's, are below a number; the condition at first is computed too."""
    nodes = [
        make_node("Split", ["both"], ["w", "b"], axis=0, num_outputs=2),
        make_node("Mul", ["v", "w"], ["scaled"]),
        make_node("Cast", ["count"], ["number"], to=1),
        make_node("Add", ["scaled", "number"], ["moved"]),
        make_node("Sub", ["moved", "b"], ["sum"]),
        make_node("Tanh", ["sum"], ["next"]),
        make_node("Add", ["count", "step"], ["counted"]),
        make_node("Cast", ["i"], ["turn"], to=1),
        make_node("Less", ["turn", "limit"], ["below"]),
        make_node("LessOrEqual", ["counted", "last"], ["above"]),
        make_node("And", ["below", "above"], ["more"]),
        make_node("Identity", ["next"], ["kept"]),
    ]
    inputs = [
        make_tensor_value_info("i", 7, []),
        make_tensor_value_info("go", 9, []),
        make_tensor_value_info("count", 6, []),
        make_tensor_value_info("v", 1, None),
        make_tensor_value_info("both", 1, None),
    ]
    outputs = [make_tensor_value_info("more", 9, []), make_tensor_value_info("counted", 6, [])]
    outputs += [make_tensor_value_info(n, 1, None) for n in ("next", "both", "kept")]
    own = {"limit": np.float32(9), "step": np.int32(2), "last": np.int32(10 + 2 * 3)}
    body = helper.make_graph(
        nodes, "body", inputs, outputs, [numpy_helper.from_array(np.asarray(a), n) for n, a in own.items()]
    )  # fmt: skip
    names = ["n", "yes", "ten", "x", "all"]
    loop = make_node("Loop", names, ["c_v", "last_v", "all_v", "every"], name="turns", body=body)
    begin = make_node("Less", ["ten", "twenty"], ["yes"])
    constants = {
        "n": np.array(most), "ten": np.int32(10), "twenty": np.int32(20), "all": X[:2] * 0.5,
    }  # fmt: skip
    left = same(model([begin, loop], constants, {"last_v": 1, "every": 1}))
    assert left.count("Tanh") == turns
    assert not {"Loop", "Split", "Less", "Cast"} & set(left)
    written_out = model([begin, loop], constants, {"last_v": 1}).graph
    unroll(written_out)
    counts = Counter(n.op_type for n in written_out.node)
    # what is the same in every turn is made once
    assert (counts["Tanh"], counts["Split"]) == (turns, 1)


def test_a_loop_whose_counter_counts_for_ever_is_refused() -> None:
    endless = loop(2)
    endless.graph.node[0].input[0] = ""
    with pytest.raises(Unsupported, match="'turns' \\(Loop\\) branches or loops at run time"):
        frontend.load(endless.SerializeToString(), isolated=False)


def test_a_loop_that_stops_at_a_number_needs_no_count() -> None:
    stops = loop(3, early=True)
    stops.graph.node[0].input[0] = ""
    assert same(stops).count("Tanh") == 4


def test_a_loop_that_the_data_stop_is_refused() -> None:
    stops = loop(3)
    body = stops.graph.node[0].attribute[0].g
    limit = numpy_helper.from_array(np.float32([[3]]), "limit")
    body.initializer.append(limit)
    body.node.append(make_node("ReduceMax", ["next"], ["largest"]))
    body.node.append(make_node("Less", ["largest", "limit"], ["decided"]))
    body.output[0].name = "decided"
    with pytest.raises(Unsupported, match="'turns' \\(Loop\\) branches or loops at run time"):
        frontend.load(stops.SerializeToString(), isolated=False)


def test_products_of_constants_are_constants() -> None:
    a, b, c = X[:2], X[:, :3][:4], np.arange(3, dtype=np.float32)
    nodes = [
        make_node("MatMul", ["a", "b"], ["ab"]),
        make_node("MatMul", ["ab", "c"], ["abc"]),
        make_node("ReduceSum", ["abc"], ["s"], keepdims=0),
        make_node("Mul", ["x", "s"], ["m"]),
        make_node("Relu", ["m"], ["y"]),
    ]
    assert same(model(nodes, {"a": a, "b": b, "c": c}, {"y": 1})) == ["Mul", "Relu"]


def classifier(classes: Sequence[int], *, zipmap: bool) -> onnx.ModelProto:
    """What skl2onnx 1.20 writes for a pipeline of StandardScaler and MLPClassifier."""
    rng = np.random.default_rng(1)
    nodes = [
        make_node(
            "Scaler", ["x"], ["scaled"], domain="ai.onnx.ml", offset=[0.5, -1.0, 0.0, 2.0],
            scale=[2.0, 0.5, 1.0, 0.25],
        ),
        make_node("Cast", ["scaled"], ["cast"], to=1),
        make_node("MatMul", ["cast", "w"], ["m"]),
        make_node("Add", ["m", "b"], ["a"]),
        make_node("Softmax", ["a"], ["table"], axis=1),
        make_node("ArgMax", ["table"], ["index"], axis=1),
        make_node("ArrayFeatureExtractor", ["classes", "index"], ["found"], domain="ai.onnx.ml"),
        make_node("Reshape", ["found", "flat"], ["row"]),
        make_node("Cast", ["row"], ["label"], to=7),
    ]  # fmt: skip
    if zipmap:
        nodes.append(
            make_node(
                "ZipMap", ["table"], ["chances"], domain="ai.onnx.ml", classlabels_int64s=classes
            )
        )
    constants = {
        "w": rng.normal(size=(4, 3)).astype(np.float32),
        "b": rng.normal(size=3).astype(np.float32),
        "classes": np.array(classes),
        "flat": np.array([-1]),
    }
    made = model(nodes, constants, {"label": 7, "table": 1})
    if zipmap:
        element = helper.make_map_type_proto(7, helper.make_tensor_type_proto(1, []))
        made.graph.output.append(
            helper.make_value_info("chances", helper.make_sequence_type_proto(element))
        )
    return made


def test_a_scikit_learn_classifier_needs_no_operators_of_its_own() -> None:
    left = same(classifier([0, 1, 2], zipmap=False))
    assert {"Sub", "Mul", "ArgMax"} <= set(left)
    assert not {"Scaler", "ArrayFeatureExtractor"} & set(left)


def test_a_list_of_dictionaries_becomes_its_table() -> None:
    proto = classifier([0, 1, 2], zipmap=True)
    label, table, chances = run(proto)
    loaded = frontend.load(proto.SerializeToString(), isolated=False)
    got = run(ir.to_proto(loaded))
    np.testing.assert_array_equal(got[0], label)
    np.testing.assert_allclose(got[2], table, rtol=1e-5)
    np.testing.assert_allclose([[row[k] for k in range(3)] for row in chances], got[2], rtol=1e-5)


def test_classes_with_other_names_are_refused() -> None:
    with pytest.raises(Unsupported, match="ArrayFeatureExtractor"):
        frontend.load(classifier([3, 5, 7], zipmap=False).SerializeToString(), isolated=False)
