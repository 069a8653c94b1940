from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx import helper, numpy_helper
from onnx.helper import make_node, make_tensor_value_info

from qcompile.onnx import frontend
from qcompile.passes.decompose import Decompose
from qcompile.pipeline import Context
from qcompile.plan import QuantPlan


def test_operators_with_fixed_axes_follow_each_other_in_a_model_without_a_batch() -> None:
    weight = np.random.default_rng(1).standard_normal((4, 3, 3, 3)).astype(np.float32)
    nodes = [
        make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2, 3]),
        make_node("Conv", ["t", "w"], ["c"]),
        make_node("MaxPool", ["c"], ["m"], kernel_shape=[2, 2]),
        make_node("GlobalAveragePool", ["m"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "test",
        [make_tensor_value_info("x", 1, [3, 2, 6, 6])],
        [make_tensor_value_info("y", 1, [2, 4, 1, 1])],
        [numpy_helper.from_array(weight, "w")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    source = proto.SerializeToString()
    x = np.random.default_rng(2).standard_normal((3, 2, 6, 6)).astype(np.float32)

    def run(data: bytes, feed: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> object:
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        return session.run(None, {"x": feed})[0]

    model = frontend.load(source, isolated=False)
    assert Decompose()(model, QuantPlan(), Context(seed=0))
    assert [v.shape.dims for v in model.graph.inputs if v.shape] == [(1, 3, 2, 6, 6)]
    got = run(ir.to_proto(model).SerializeToString(), x[None])
    np.testing.assert_allclose(got, np.asarray(run(source, x))[None], rtol=1e-5, atol=1e-6)
