from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qcompile.errors import BadInput
from qcompile.onnx import execute
from qcompile.onnx.execute import FloatSession

RNG = np.random.default_rng(0)
KERNEL = RNG.standard_normal((32, 3, 3, 3), np.float32)
Arrays = dict[str, NDArray[np.float32]]


def proto(batch: int | str = "N", turned: bool = False) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["g"]),
        helper.make_node("Flatten", ["g"], ["y"]),
    ]
    if turned:
        nodes.append(helper.make_node("Transpose", ["r"], ["t"], perm=[1, 0, 2, 3]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 32])],
        [numpy_helper.from_array(KERNEL, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def plain(model: onnx.ModelProto, x: NDArray[np.float32], names: list[str]) -> Arrays:
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    del shown.graph.output[:]
    shown.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(shown.SerializeToString(), options)
    return dict(zip(names, session.run(names, {"x": x}), strict=True))


def close(got: Arrays, wanted: Arrays) -> None:
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        assert got[name].dtype == np.float32
        np.testing.assert_allclose(got[name], array, rtol=1e-4, atol=1e-5, err_msg=name)


def test_values_are_those_of_the_model_which_stays_as_it_was() -> None:
    model = ir.from_proto(proto())
    x = RNG.standard_normal((5, 3, 6, 6), np.float32)
    before = ir.to_proto(model).SerializeToString()
    session = FloatSession(model, ["r", "x", "y", "c"], threads=1)
    got = session.run({"x": x})
    wanted = plain(proto(), x, ["r", "y", "c"])
    close(got, {"r": wanted["r"], "x": x, "y": wanted["y"], "c": wanted["c"]})
    np.testing.assert_array_equal(got["x"], x)
    assert ir.to_proto(model).SerializeToString() == before


def test_rows_go_through_in_chunks_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    row_bytes = 4 * (32 * 36 + 32)
    monkeypatch.setattr(execute, "CHUNK_BYTES", 4 * row_bytes)
    session = FloatSession(ir.from_proto(proto()), ["r", "y"], threads=1)
    x = RNG.standard_normal((12, 3, 6, 6), np.float32)
    assert [len(c["r"]) for c in session.stream({"x": x})] == [1, 4, 4, 3]
    assert [len(c["r"]) for c in session.stream({"x": x})] == [4, 4, 4]
    close(session.run({"x": x}), plain(proto(), x, ["r", "y"]))


@pytest.mark.parametrize("rows", [1, 4, 6])
def test_a_fixed_batch_is_filled_up_and_the_filling_left_out(rows: int) -> None:
    x = RNG.standard_normal((rows, 3, 6, 6), np.float32)
    session = FloatSession(ir.from_proto(proto(4)), ["r", "y"], threads=1)
    close(session.run({"x": x}), plain(proto(), x, ["r", "y"]))


def test_values_that_do_not_lead_with_the_batch_come_row_by_row() -> None:
    x = RNG.standard_normal((3, 3, 6, 6), np.float32)
    session = FloatSession(ir.from_proto(proto(turned=True)), ["t", "y"], threads=1)
    wanted = plain(proto(turned=True), x, ["t", "y"])
    rows = np.stack([wanted["t"][:, i : i + 1] for i in range(3)])
    close(session.run({"x": x}), {"t": rows, "y": wanted["y"]})


def test_only_inputs_may_be_asked_for() -> None:
    x = RNG.standard_normal((2, 3, 6, 6), np.float32)
    np.testing.assert_array_equal(
        FloatSession(ir.from_proto(proto()), ["x"], 1).run({"x": x})["x"], x
    )


def test_what_does_not_run_is_bad_input() -> None:
    model = ir.from_proto(proto())
    with pytest.raises(BadInput, match="no value 'nowhere'"):
        FloatSession(model, ["nowhere"], 1)
    session = FloatSession(model, ["y"], 1)
    with pytest.raises(BadInput, match="does not run"):
        session.run({"x": np.zeros((1, 4, 6, 6), np.float32)})
    broken = proto()
    broken.graph.node[0].op_type = "Nonsense"
    with pytest.raises(BadInput, match="does not accept"):
        FloatSession(ir.from_proto(broken), ["y"], 1)
