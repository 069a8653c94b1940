"""Build a small float model, run passes over it, and compare with onnxruntime on the original."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from qcompile.onnx import frontend
from qcompile.pipeline import Context, Pass
from qcompile.plan import QuantPlan

Feeds = Mapping[str, NDArray[np.generic]]


def execute(model: bytes, feeds: Feeds) -> list[NDArray[np.generic]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


@dataclass(frozen=True)
class Workbench:
    def model(
        self,
        nodes: Sequence[onnx.NodeProto],
        inputs: Mapping[str, Sequence[int | str]],
        weights: Mapping[str, NDArray[np.generic]] | None = None,
        outputs: Sequence[str] = ("y",),
        opset: int = 21,
    ) -> onnx.ModelProto:
        """A model of these nodes; the ranks of the outputs are left to inference."""
        graph = helper.make_graph(
            list(nodes),
            "test",
            [helper.make_tensor_value_info(n, 1, s) for n, s in inputs.items()],
            [helper.make_tensor_value_info(n, 1, None) for n in outputs],
            [numpy_helper.from_array(np.asarray(a), n) for n, a in (weights or {}).items()],
        )
        imports = [helper.make_opsetid("", opset)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=10)
        shaped = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        onnx.checker.check_model(shaped)
        return shaped

    def keeps(
        self,
        original: onnx.ModelProto | bytes,
        *passes: Pass,
        batch: int = 2,
        low: float = -3.0,
        high: float = 3.0,
        rtol: float = 1e-4,
    ) -> ir.Model:
        """The model after the passes, once its outputs equal those of the original."""
        data = original if isinstance(original, bytes) else original.SerializeToString()
        model = frontend.load(data, isolated=False)
        for p in passes:
            p(model, QuantPlan(), Context())
            again = p(model, QuantPlan(), Context())
            assert not again, f"{p} is not done when it says so"
        rng = np.random.default_rng(7)
        feeds: dict[str, NDArray[np.generic]] = {}
        for value in model.graph.inputs:
            assert value.shape is not None
            shape = [d if isinstance(d, int) else batch for d in value.shape]
            feeds[str(value.name)] = rng.uniform(low, high, shape).astype(np.float32)
        proto = ir.to_proto(model)
        onnx.checker.check_model(proto, full_check=True)
        before, after = execute(data, feeds), execute(proto.SerializeToString(), feeds)
        assert len(before) == len(after)
        for want, got in zip(before, after, strict=True):
            assert want.shape == got.shape
            bound = rtol * max(float(np.abs(want).max()), 1e-3)
            np.testing.assert_allclose(got, want, rtol=rtol, atol=bound)
        self.shapes_hold(model, feeds)
        return model

    def shapes_hold(self, model: ir.Model, feeds: Feeds) -> None:
        """Every value of the graph has the shape the graph says, names are unique and not empty."""
        names = [node.name for node in model.graph]
        assert all(names)
        assert len(set(names)) == len(names)
        values = [v for node in model.graph for v in node.outputs if v.name and v.dtype == 1]
        proto = ir.to_proto(model)
        del proto.graph.output[:]
        proto.graph.output.extend(
            helper.make_tensor_value_info(str(v.name), 1, None) for v in values
        )
        for value, array in zip(values, execute(proto.SerializeToString(), feeds), strict=True):
            assert value.shape is not None, value
            assert len(value.shape) == array.ndim, value
            for dim, size in zip(value.shape, array.shape, strict=True):
                assert not isinstance(dim, int) or dim == size, value

    def kinds(self, model: ir.Model) -> list[str]:
        """The operators in order."""
        return [node.op_type for node in model.graph]


@pytest.fixture(scope="session")
def bench() -> Workbench:
    return Workbench()
