"""The integer graph as a standard ONNX model that any onnxruntime from 1.20 on runs to the same bits.

Every operator that ONNX lacks is a model-local function of domain `qcompile` (see `functions` and `newton`), shared by
all nodes of one signature, which give it their numbers as inputs and attributes.

The meaning of the borders stands in `metadata_props`: `qcompile.inputs` and `qcompile.outputs` are JSON lists, in
the model's order, of {"name", "dtype", "scale", "zero_point"}, with real = scale * (code - zero_point). Codes of fewer
than 8 bits are fed and returned one per int8 element.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir
from numpy.typing import NDArray
from onnx import helper, numpy_helper, parser

from qcompile.ir import DType, Graph, Node, Port, Value, ops
from qcompile.ir.text import digest
from qcompile.onnx import functions, newton, weights
from qcompile.onnx.functions import DOMAIN, LIFT, OPSET, Function, Sweep

IR_VERSION = 8
"""The first file format with model-local functions."""

_Attribute = int | Sequence[int]


def export(graph: Graph) -> onnx.ModelProto:
    """Return the model that equals `graph.run` on every element; the same graph gives the same model."""
    return weights.complete(*written(graph))


def written(graph: Graph) -> tuple[onnx.ModelProto, Mapping[str, onnx_ir.TensorProtocol]]:
    """The same without its large constants, and these."""
    exporter = _Exporter(graph)
    return exporter.model(), exporter.large


class _Exporter:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.large: dict[str, onnx_ir.TensorProtocol] = {}
        self.functions: dict[Function, onnx.FunctionProto] = {}
        self.stored: dict[tuple[str, tuple[int, ...], str], str] = {}
        self.value_names = {port.name for port, _ in (*graph.inputs, *graph.outputs)}
        self.node_names: set[str] = set()
        self.names: dict[Value, str] = {v: port.name for port, v in graph.inputs}
        for port, v in graph.outputs:
            if v.producer is not None:
                self.names.setdefault(v, port.name)

    def model(self) -> onnx.ModelProto:
        graph = self.graph
        for node in graph.nodes:
            self.node(node)
        for port, v in graph.outputs:
            if (name := self.name(v)) != port.name:
                self.emit("Identity", [name], port.name, port.name, "", {})
        body = helper.make_graph(
            self.nodes,
            graph.name or "integer",
            [self.border(port, v) for port, v in graph.inputs],
            [self.border(port, v) for port, v in graph.outputs],
            self.initializers,
        )
        model = helper.make_model(
            body,
            functions=list(self.functions.values()),
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
            ir_version=IR_VERSION,
            producer_name="qcompile",
        )
        meaning = {
            "qcompile.inputs": _meaning(graph.inputs),
            "qcompile.outputs": _meaning(graph.outputs),
        }
        helper.set_model_props(model, meaning)
        return model

    def border(self, port: Port, v: Value) -> onnx.ValueInfoProto:
        shape: list[int | str | None] = list(v.type.shape)
        if self.graph.free_batch:
            shape[0] = "N"
        return helper.make_tensor_value_info(port.name, _element(v.type.dtype), shape)

    def name(self, v: Value) -> str:
        if v not in self.names:
            if v.const is None:
                self.names[v] = fresh_name(v.name, self.value_names)
            else:
                self.names[v] = self.constant(v.const, v.name)
        return self.names[v]

    def constant(self, array: NDArray[np.generic], hint: str) -> str:
        """The initializer that holds `array`; equal arrays are stored once."""
        whole = np.ascontiguousarray(array)
        key = (array.dtype.str, array.shape, digest(whole))
        if key not in self.stored:
            name = self.stored[key] = fresh_name(hint, self.value_names)
            if array.nbytes < weights.LARGE_BYTES:
                self.initializers.append(
                    numpy_helper.from_array(np.asarray(array, order="C"), name)
                )
            else:
                self.large[name] = weights.kept(whole, name)
                self.initializers.append(weights.named(name, self.large[name]))
        return self.stored[key]

    def row(self, entries: Iterable[int], hint: str) -> str:
        return self.constant(np.array(list(entries), np.int64), hint)

    def function(self, f: Function) -> str:
        """The name of the function in this model; later bodies of a kind are numbered."""
        for inner in f.calls:
            self.function(inner)
        if f not in self.functions:
            count = 1 + sum(g.kind == f.kind for g in self.functions)
            name = f.kind if count == 1 else f"{f.kind}_{count}"
            self.functions[f] = parser.parse_function(f.text(name))
        return self.functions[f].name

    def emit(
        self,
        op_type: str,
        inputs: Sequence[str],
        output: str,
        name: str,
        domain: str,
        attributes: Mapping[str, _Attribute],
    ) -> None:
        node = helper.make_node(
            op_type, inputs, [output], name=fresh_name(name, self.node_names), domain=domain
        )
        node.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
        self.nodes.append(node)

    def call(
        self, node: Node, f: Function, inputs: Sequence[str] | None = None, **attributes: _Attribute
    ) -> None:
        """A node that calls `f`, on the operands where no inputs are given."""
        names = [self.name(v) for v in node.inputs] if inputs is None else inputs
        self.emit(self.function(f), names, self.name(node.output), node.name, DOMAIN, attributes)

    def standard(
        self, node: Node, op_type: str, *parameters: str, **attributes: _Attribute
    ) -> None:
        """A node of a standard operator on the operands and then the parameters."""
        names = [*(self.name(v) for v in node.inputs), *parameters]
        self.emit(op_type, names, self.name(node.output), node.name, "", attributes)

    def node(self, node: Node) -> None:
        out, at = node.output.type.dtype, node.output.name
        match node.op:
            case ops.Conv() as op:
                self.conv(node, op)
            case ops.MatMul():
                x, w, b = node.inputs
                weights = self.constant(_lifted(w.constant.T), w.name)
                inputs = [self.name(x), weights, self.name(b)]
                self.call(node, functions.matmul(x.type.dtype), inputs)
            case ops.Rescale() as op:
                self.rescale(node, op)
            case ops.Mul(zero_x=zx, zero_y=zy):
                self.call(node, functions.MUL, zero_x=zx, zero_y=zy)
            case ops.Lut():
                self.call(node, functions.LUT, lowest=node.inputs[0].type.dtype.lo)
            case ops.MaxPool(pads=pads, dilations=dilations) as op:
                lowest = int(np.iinfo(out.numpy).min)
                f = functions.max_pool(_frame(pads), lowest, _sweeps(node, op, dilations))
                self.call(node, f, to=_element(out))
            case ops.SumPool(kernel=kernel, pads=pads, zero_point=z) as op:
                f = functions.sum_pool(_frame(pads), _sweeps(node, op, (1,) * len(kernel)))
                self.call(node, f, zero_point=z)
            case ops.Softmax():
                unit, to = 1 << (31 - out.bits), _element(out)
                self.call(node, newton.SOFTMAX, unit=unit, lo=out.lo, hi=out.hi, to=to)
            case ops.Pad(pads=pads, value=value):
                half = len(pads) // 2
                frame = self.row([0, *pads[:half], 0, *pads[half:]], f"{at}.frame")
                inputs = [self.name(node.inputs[0]), frame]
                self.call(node, functions.PAD, inputs, pad_value=value, to=_element(out))
            case ops.Concat(axis=axis):
                self.standard(node, "Concat", axis=axis)
            case ops.Slice(starts=starts, ends=ends, steps=steps):
                self.standard(
                    node,
                    "Slice",
                    self.row(starts, f"{at}.starts"),
                    self.row(ends, f"{at}.ends"),
                    self.row(range(1, len(starts) + 1), f"{at}.axes"),
                    self.row(steps, f"{at}.steps"),
                )
            case ops.Reshape(shape=shape):
                self.standard(node, "Reshape", self.row(shape, f"{at}.shape"))
            case ops.Transpose(perm=perm):
                self.standard(node, "Transpose", perm=perm)
            case ops.Take(axis=axis, indices=indices):
                self.standard(node, "Gather", self.row(indices, f"{at}.indices"), axis=axis)
            case ops.Extreme(largest=largest):
                self.call(node, functions.extreme(largest), to=_element(out))
            case ops.ArgExtreme(axis=axis, largest=largest, last=last):
                self.call(node, functions.arg_extreme(largest), axis=axis, last=int(last))
            case ops.BatchMatMul(zero_x=zx, zero_y=zy):
                kinds = [v.type.dtype for v in node.inputs]
                zx, zy = (z + LIFT * d.signed for z, d in zip((zx, zy), kinds, strict=True))
                self.call(node, functions.batch_matmul(*kinds), zero_x=zx, zero_y=zy)
            case ops.Normalize(fraction=fraction, epsilon=epsilon):
                self.call(
                    node,
                    newton.NORMALIZE,
                    entries=node.output.type.shape[-1],
                    epsilon=epsilon,
                    unit=1 << (30 - fraction),
                    lo=out.lo,
                    hi=out.hi,
                    to=_element(out),
                )
            case _:
                raise TypeError(f"{node.name}: {node.op} has no ONNX form")

    def conv(self, node: Node, op: ops.Conv) -> None:
        x, w, b = node.inputs
        rank = len(op.strides)
        weights = self.constant(_lifted(np.moveaxis(w.constant, -1, 1)), w.name)
        widths = [0, 0, *op.pads[:rank], 0, 0, *op.pads[rank:]]
        frame = self.row(widths, f"{node.output.name}.frame")
        self.call(
            node,
            functions.conv(x.type.dtype, rank),
            [self.name(x), weights, self.name(b), frame],
            strides=op.strides,
            dilations=op.dilations,
            group=op.groups,
            pad_value=op.pad_value,
        )

    def rescale(self, node: Node, op: ops.Rescale) -> None:
        shape = op.parameter_shape(node.output.type.shape)

        def row(entries: Sequence[int], what: str) -> str:
            array = np.array(entries, np.int64)
            shaped = array if array.size == 1 else array.reshape(shape)
            return self.constant(shaped, f"{node.output.name}.{what}")

        inputs: list[str] = []
        for i, (acc, v) in enumerate(zip(op.accs, node.inputs, strict=False)):
            # (acc << p) * m is acc * (m << p), and m << p has at most 62 bits.
            shifted = np.left_shift(np.array(acc.multiplier, np.int64), np.array(acc.pre_shift))
            inputs += [self.name(v), row(shifted.tolist(), f"multiplier{i}")]
        for j, (val, v) in enumerate(zip(op.vals, node.inputs[len(op.accs) :], strict=True)):
            inputs += [self.name(v), row(val.multiplier, f"factor{j}")]
        self.call(
            node,
            functions.rescale(len(op.accs), len(op.vals)),
            [*inputs, row([1 << f for f in op.f], "step")],
            zero_point=op.zero_point,
            lo=op.lo,
            hi=op.hi,
            to=_element(op.out),
            **{f"zero{j}": val.zero_point for j, val in enumerate(op.vals)},
        )


def _meaning(ports: Sequence[tuple[Port, Value]]) -> str:
    return json.dumps(
        [
            {
                "name": port.name,
                "dtype": str(v.type.dtype),
                "scale": float(port.scale),
                "zero_point": port.zero_point,
            }
            for port, v in ports
        ]
    )


def fresh_name(hint: str, taken: set[str]) -> str:
    """Return a name like `hint` that is not taken, and take it."""
    name, count = hint or "unnamed", 1
    while name in taken:
        count += 1
        name = f"{hint or 'unnamed'}.{count}"
    taken.add(name)
    return name


def _element(dtype: DType) -> int:
    return int(helper.np_dtype_to_tensor_dtype(dtype.numpy))


def _lifted(w: NDArray[np.generic]) -> NDArray[np.uint8]:
    return (w.astype(np.int16) + LIFT).astype(np.uint8)


def _frame(pads: tuple[int, ...]) -> list[int]:
    """Spatial pads as pads of all axes of [N, *spatial, C]."""
    rank = len(pads) // 2
    return [0, *pads[:rank], 0, 0, *pads[rank:], 0]


def _sweeps(node: Node, op: ops.MaxPool | ops.SumPool, dilations: tuple[int, ...]) -> list[Sweep]:
    spatial, rank = node.inputs[0].type.shape[1:-1], len(op.kernel)
    return [
        Sweep(n + op.pads[i] + op.pads[rank + i], op.kernel[i], op.strides[i], dilations[i])
        for i, n in enumerate(spatial)
    ]
