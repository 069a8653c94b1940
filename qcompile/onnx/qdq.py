"""The float graph with every rounding of a QuantPlan written out as QuantizeLinear and DequantizeLinear.

Codes stand in the int8, uint8, int16 or uint16 that holds them, because onnxruntime quantizes to few other widths;
codes of fewer bits are clipped between the two operators. Clipping the real numbers before them instead breaks
onnxruntime 1.31, which then moves half of an int8 pair and gets its type wrong. What keeps more than 16 bits stays
float, which holds hardly more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from qcompile.errors import BadInput
from qcompile.formats import Int
from qcompile.onnx import weights
from qcompile.onnx.integer import fresh_name
from qcompile.plan import Quantizer, QuantPlan

_WIDEST = 16
"""The most bits of a code that QuantizeLinear makes (from opset 21 on)."""


_PRODUCTS = frozenset({"Conv", "Gemm", "MatMul"})


def export(model: ir.Model, plan: QuantPlan) -> onnx.ModelProto:
    """Return a copy of a canonical float model of opset 21 that rounds what, and as, the plan says.

    Members of a slot share its scale; biases are int32 at the scale of their accumulator where both factors are known.
    """
    return weights.complete(*written(model, plan))


def fake_quantized(model: ir.Model, plan: QuantPlan) -> ir.Model:
    """The same as a model whose large weights need not be in memory."""
    return weights.opened(*written(model, plan))


def written(
    model: ir.Model, plan: QuantPlan
) -> tuple[onnx.ModelProto, Mapping[str, ir.TensorProtocol]]:
    """The message without its large constants, and these."""
    proto, large = weights.light(model)
    exporter = _Exporter(proto.graph, plan, large)
    exporter.rewrite()
    _drop_dilations(proto.graph)
    return proto, exporter.large


def _drop_dilations(graph: onnx.GraphProto) -> None:
    """Leave out the dilations of an AveragePool that has none; onnxruntime's integer kernel knows no such attribute."""
    for node in graph.node:
        if not node.domain and node.op_type == "AveragePool":
            kept = [
                a for a in node.attribute if a.name != "dilations" or any(d != 1 for d in a.ints)
            ]
            del node.attribute[:]
            node.attribute.extend(kept)


@dataclass(frozen=True, slots=True)
class _Bias:
    """Operand `index` of `node`, which is added to `product`, x times weight; `axis` counts output channels."""

    product: str
    node: onnx.NodeProto
    index: int
    x: str
    weight: str
    axis: int


class _Exporter:
    def __init__(
        self, graph: onnx.GraphProto, plan: QuantPlan, large: Mapping[str, ir.TensorProtocol]
    ) -> None:
        self.graph = graph
        self.large = dict(large)
        self.constants = {t.name: t for t in graph.initializer}
        self.taken = {v.name for v in (*graph.input, *graph.output)} | set(self.constants)
        self.taken.update(name for node in graph.node for name in node.output)
        self.node_names = {node.name for node in graph.node}
        self.plan = plan
        self.rounded = _roundings(plan, self.taken)
        self.decided: dict[str, NDArray[np.float64]] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.made: dict[tuple[str, Quantizer], tuple[str, str]] = {}

    def rewrite(self) -> None:
        self.decide_biases()
        for bias in list(_biases(self.graph, self.constants)):
            self.bias(bias)
        for name, (owner, q) in self.rounded.items():
            if name in self.constants:
                self.weight(name, owner, q)
        renamed = {
            v.name: self.fresh(f"{v.name}.rounded")
            for v in self.graph.input
            if v.name in self.rounded
        }
        for name, result in renamed.items():
            self.activation(name, result, *self.rounded[name])
        for node in self.graph.node:
            node.input[:] = [renamed.get(name, name) for name in node.input]
            found = [(i, name) for i, name in enumerate(node.output) if name in self.rounded]
            for i, name in found:
                node.output[i] = self.fresh(f"{name}.float")
            self.nodes.append(node)
            for i, name in found:
                self.activation(node.output[i], name, *self.rounded[name])
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        read = {name for node in self.nodes for name in node.input}
        read.update(v.name for v in self.graph.output)
        del self.graph.initializer[:]
        self.graph.initializer.extend(t for t in self.constants.values() if t.name in read)

    def decide_biases(self) -> None:
        """Give every product the bias the plan decided, in place of its own or as a new operand."""
        known = {bias.product: bias for bias in _biases(self.graph, self.constants)}
        makers = {node.output[0]: node for node in self.graph.node if node.op_type in _PRODUCTS}
        for product, real in self.plan.biases.items():
            if product not in makers:
                raise BadInput(f"the plan has a bias for {product!r}, which is no product here")
            constant = self.constant(real.astype(np.float32), f"{product}.bias")
            self.decided[constant] = real
            node = makers[product]
            if product in known:
                known[product].node.input[known[product].index] = constant
            elif node.op_type != "MatMul":
                node.input.append(constant)
            else:
                node.output[0] = self.fresh(f"{product}.product")
                title = fresh_name(f"{product}.Add", self.node_names)
                added = helper.make_node("Add", [node.output[0], constant], [product], name=title)
                self.graph.node.insert(list(self.graph.node).index(node) + 1, added)

    def fresh(self, hint: str) -> str:
        return fresh_name(hint, self.taken)

    def constant(self, array: NDArray[np.generic], hint: str) -> str:
        name = self.fresh(hint)
        if array.nbytes < weights.LARGE_BYTES:
            self.constants[name] = numpy_helper.from_array(np.asarray(array, order="C"), name)
        else:
            self.large[name] = weights.kept(array, name)
            self.constants[name] = weights.named(name, self.large[name])
        return name

    def array(self, name: str) -> NDArray[np.generic]:
        """The values of a constant."""
        if name in self.large:
            return self.large[name].numpy()
        return numpy_helper.to_array(self.constants[name])

    def emit(
        self, op_type: str, inputs: Sequence[str], output: str, **attributes: int | None
    ) -> None:
        """Append a node; attributes that are None are left out."""
        name = fresh_name(f"{output}.{op_type}", self.node_names)
        node = helper.make_node(op_type, inputs, [output], name=name)
        given = {k: v for k, v in attributes.items() if v is not None}
        node.attribute.extend(helper.make_attribute(k, v) for k, v in given.items())
        self.nodes.append(node)

    def parameters(self, owner: str, q: Quantizer) -> tuple[str, str]:
        """The scale and the zero point of a slot, made once for all its members."""
        if (owner, q) not in self.made:
            shape = () if q.axis is None else (len(q.scale),)
            scale = np.array(q.scale, np.float32).reshape(shape)
            zero = np.array(q.zero_point, _storage(q.format)).reshape(shape)
            self.made[owner, q] = (
                self.constant(scale, f"{owner}.scale"),
                self.constant(zero, f"{owner}.zero_point"),
            )
        return self.made[owner, q]

    def activation(self, source: str, result: str, owner: str, q: Quantizer) -> None:
        scale, zero = self.parameters(owner, q)
        codes = self.fresh(f"{result}.codes")
        self.emit("QuantizeLinear", [source, scale, zero], codes, axis=q.axis)
        held = np.iinfo(_storage(q.format))
        if (q.format.lo, q.format.hi) != (held.min, held.max):
            codes = self.clipped(codes, result, q.format)
        self.emit("DequantizeLinear", [codes, scale, zero], result, axis=q.axis)

    def clipped(self, codes: str, hint: str, fmt: Int) -> str:
        """The codes inside the format's range; through int32, because onnxruntime clips no int16."""
        bounds = [
            self.constant(np.array(bound, np.int32), f"{hint}.{what}")
            for what, bound in (("lo", fmt.lo), ("hi", fmt.hi))
        ]
        wide, inside, result = (self.fresh(f"{hint}.{w}") for w in ("wide", "inside", "clipped"))
        self.emit("Cast", [codes], wide, to=onnx.TensorProto.INT32)
        self.emit("Clip", [wide, *bounds], inside)
        self.emit("Cast", [inside], result, to=int(helper.np_dtype_to_tensor_dtype(_storage(fmt))))
        return result

    def weight(self, name: str, owner: str, q: Quantizer) -> None:
        values = self.array(name)
        self.large.pop(name, None)
        del self.constants[name]
        row = [-1 if i == q.axis else 1 for i in range(values.ndim)]
        scale = np.array(q.scale).reshape(row if q.axis is not None else ())
        zero = np.array(q.zero_point).reshape(scale.shape)

        def coded(part: NDArray[np.generic], rows: slice) -> NDArray[np.float64]:
            step, origin = (s[rows] if q.axis == 0 else s for s in (scale, zero))
            real = part.astype(np.float64)
            codes: NDArray[np.float64] = np.rint(real / step) + origin
            return codes.clip(q.format.lo, q.format.hi)

        known = self.plan.codes.get(name)
        if known is None:
            codes = weights.by_rows(values, _storage(q.format), coded)
        else:
            codes = known.astype(_storage(q.format))
        stored = self.constant(codes, f"{name}.codes")
        self.emit("DequantizeLinear", [stored, *self.parameters(owner, q)], name, axis=q.axis)

    def bias(self, bias: _Bias) -> None:
        """The code of a bias counts steps of the accumulator, so that it is added as an integer."""
        name = bias.node.input[bias.index]
        _, x = self.rounded.get(bias.x, ("", None))
        _, w = self.rounded.get(bias.weight, ("", None))
        if x is None or w is None or len(x.scale) != 1 or name in self.rounded:
            return
        if w.axis not in (None, bias.axis):
            return
        step = x.scale[0] * np.array(w.scale)
        scale = step.astype(np.float32)
        values = self.decided.get(name)
        if values is None:
            values = self.array(name).astype(np.float64)
        fits = len(step) == 1 or values.shape[-1:] == step.shape
        if not fits or scale.min() < np.finfo(np.float32).tiny:
            return
        limit = np.iinfo(np.int32)
        codes = np.clip(np.rint(values / step), limit.min, limit.max).astype(np.int32)
        per_channel = len(step) > 1
        result = self.fresh(f"{name}.rounded")
        self.emit(
            "DequantizeLinear",
            [
                self.constant(codes, f"{name}.codes"),
                self.constant(scale if per_channel else scale.reshape(()), f"{name}.scale"),
            ],
            result,
            axis=values.ndim - 1 if per_channel else None,
        )
        bias.node.input[bias.index] = result


def _roundings(plan: QuantPlan, tensors: set[str]) -> dict[str, tuple[str, Quantizer]]:
    """For every tensor that is rounded, the slot it belongs to and how."""
    found: dict[str, tuple[str, Quantizer]] = {}
    for owner, q in plan.quantizers.items():
        slot = plan.slots.get(owner)
        for name in (owner, *(slot.members if slot is not None else ())):
            if name not in tensors:
                raise BadInput(f"the plan rounds {name!r}, which the model does not have")
            if q.format.bits <= _WIDEST:
                found[name] = (owner, plan.quantizers.get(name, q))
    return found


def _storage(fmt: Int) -> np.dtype[np.signedinteger | np.unsignedinteger]:
    return np.dtype(f"{'i' if fmt.signed else 'u'}{1 if fmt.bits <= 8 else 2}")


def _biases(graph: onnx.GraphProto, constants: Mapping[str, onnx.TensorProto]) -> Iterator[_Bias]:
    """Every constant that joins an accumulator: third operand of Conv and Gemm, or added to a MatMul."""
    makers = {name: node for node in graph.node for name in node.output}
    readers = [name for node in graph.node for name in node.input]
    readers += [v.name for v in graph.output]
    for node in graph.node:
        match node.domain, node.op_type, list(node.input):
            case "", "Conv", [x, w, b] if b in constants:
                yield _Bias(node.output[0], node, 2, x, w, 0)
            case "", "Gemm", [x, w, b] if b in constants and _plain(node):
                yield _Bias(node.output[0], node, 2, x, w, 0)
            case "", "Add", [left, right]:
                for index, (b, sums) in enumerate(((left, right), (right, left))):
                    maker = makers.get(sums)
                    if (
                        b in constants
                        and maker is not None
                        and (maker.domain, maker.op_type) == ("", "MatMul")
                        and readers.count(sums) == 1
                    ):
                        yield _Bias(sums, node, index, maker.input[0], maker.input[1], 1)


def _plain(node: onnx.NodeProto) -> bool:
    """Is this Gemm x W^T + b?"""
    a = {x.name: helper.get_attribute_value(x) for x in node.attribute}
    return (a.get("alpha", 1.0), a.get("beta", 1.0), a.get("transB", 0)) == (1.0, 1.0, 1)
