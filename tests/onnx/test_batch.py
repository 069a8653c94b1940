"""The batch keeps one name through the graph, or the model is refused where rows are merged."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompile.errors import Unsupported
from qcompile.onnx.batch import settle_batch


def model(*shapes: list[int]) -> ir.Model:
    import numpy as np

    names = ["x", *(f"r{i}" for i in range(len(shapes)))]
    nodes = [
        helper.make_node("Reshape", [names[i], f"s{i}"], [names[i + 1]], name=f"node{i}")
        for i in range(len(shapes))
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, 6])],
        [helper.make_tensor_value_info(names[-1], TensorProto.FLOAT, ["unk", *shapes[-1][1:]])],
        [numpy_helper.from_array(np.array(s, np.int64), f"s{i}") for i, s in enumerate(shapes)],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def test_an_inferred_symbol_becomes_the_inputs_own() -> None:
    built = model([-1, 24], [-1, 4, 6])
    settle_batch(built)
    leading = [str(v.shape.dims[0].value) for n in built.graph for v in n.outputs if v.shape]  # type: ignore[union-attr]
    assert leading == ["N", "N"]


def test_merged_rows_are_refused_by_name() -> None:
    with pytest.raises(Unsupported, match=r"node0.*--input-dim N=1"):
        settle_batch(model([-1, 6], [-1, 4, 6]))
