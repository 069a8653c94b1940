"""The float operators of one layer in onnxruntime, on whatever values are given for its operands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnx import helper

from qcompile.onnx import weights

from .layers import (
    Index,
    Join,
    Layer,
    Linear,
    Normalized,
    Operand,
    Pooled,
    Product,
    Rescaled,
    SoftmaxLayer,
    Table,
    View,
    initializer,
)

Floats = NDArray[np.float32]
FLOAT = int(onnx.TensorProto.FLOAT)


class Operators:
    """Products and layers of a model, each by itself."""

    def __init__(self, model: ir.Model, threads: int) -> None:
        self._proto, self._large = weights.light(model)
        self._threads = threads
        graph = self._proto.graph
        self._types = {
            v.name: v.type.tensor_type.elem_type
            for v in (*graph.input, *graph.value_info, *graph.output)
        }
        self._products: dict[str, onnxruntime.InferenceSession] = {}

    def product(self, term: Linear, x: Floats, w: Floats) -> Floats:
        """The operand times weights in the shape of the term's own, without bias."""
        node = term.node
        if node.op_type == "Gemm":
            return np.asarray(x @ w.T, np.float32)
        if node.op_type == "MatMul":
            return np.asarray(x @ w, np.float32)
        key = str(node.outputs[0].name)
        if key not in self._products:
            conv = helper.make_node("Conv", ["x", "w"], ["y"])
            conv.attribute.extend(ir.to_proto(node).attribute)
            self._products[key] = self._session([conv], {"x": FLOAT, "w": FLOAT}, {"y": FLOAT}, [])
        return np.asarray(self._products[key].run(None, {"x": x, "w": w})[0], np.float32)

    def layer(
        self, layer: Layer, inputs: Sequence[str]
    ) -> Callable[[Mapping[str, NDArray[np.generic]]], Floats]:
        """The layer as a function of the named values, whatever else it reads being the model's constants."""
        out = str(layer.out.name)
        wanted, nodes = {out}, list[onnx.NodeProto]()
        for node in reversed(self._proto.graph.node):
            if wanted & set(node.output):
                nodes.insert(0, node)
                wanted |= set(node.input) - set(inputs)
        read = {n for node in nodes for n in node.input} - set(inputs)
        constants = [
            weights.written(t.name, self._large[t.name]) if t.name in self._large else t
            for t in self._proto.graph.initializer
            if t.name in read
        ]
        # what an ArgMax makes is no float
        kinds = {n: self._types.get(n, FLOAT) for n in (*inputs, out)}
        made = {out: kinds.pop(out)}
        session = self._session(nodes, kinds, made, constants)

        def run(given: Mapping[str, NDArray[np.generic]]) -> Floats:
            fed = {
                n: a.astype(helper.tensor_dtype_to_np_dtype(kinds[n]), copy=False)
                for n, a in given.items()
            }
            return np.asarray(session.run([out], fed)[0], np.float32)

        return run

    def _session(
        self,
        nodes: Sequence[onnx.NodeProto],
        inputs: Mapping[str, int],
        outputs: Mapping[str, int],
        constants: Sequence[onnx.TensorProto],
    ) -> onnxruntime.InferenceSession:
        fed, made = (
            [helper.make_tensor_value_info(n, kind, None) for n, kind in names.items()]
            for names in (inputs, outputs)
        )
        graph = helper.make_graph(list(nodes), "layer", fed, made, list(constants))
        model = helper.make_model(
            graph,
            opset_imports=self._proto.opset_import,
            ir_version=self._proto.ir_version,
            functions=list(self._proto.functions),
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.use_deterministic_compute = True
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )


def operands(layer: Layer) -> list[str]:
    """The values that are no constants and enter a layer."""
    match layer:
        case Rescaled(terms=terms):
            values: list[ir.Value] = []
            for term in terms:
                match term:
                    case Linear(x=x) | Pooled(x=x):
                        values.append(x)
                    case Product(x=x, y=y):
                        values += [x, y]
                    case Operand(value=value):
                        values.append(value)
        case Table(x=x) | SoftmaxLayer(x=x) | View(x=x) | Normalized(x=x) | Index(x=x):
            values = [x]
        case Join(xs=xs):
            values = list(xs)
    return [str(v.name) for v in values if initializer(v) is None]


def constant_operands(layer: Layer) -> dict[str, ir.Value]:
    """The constants that are added or multiplied in a layer, which have quantizers of their own, by name."""
    terms = layer.terms if isinstance(layer, Rescaled) else ()
    values = [
        term.value if isinstance(term, Operand) else term.y
        for term in terms
        if isinstance(term, Operand | Product)
    ]
    return {str(v.name): v for v in values if initializer(v) is not None}
