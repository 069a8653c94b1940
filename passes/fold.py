"""Per-channel arithmetic and padding move into the Conv, Gemm or MatMul beside them.

    1. Pad(0) -> Conv                 the Conv pads
    2. Conv/Gemm/MatMul -> affine     W' = s W, b' = s b + t
    3. affine -> Conv/Gemm/MatMul     W' = W s, b' = b + W t; with t != 0 only if the Conv does not pad
    4. affine with s = 1, t = 0       nothing

An affine node is y = s x + t with constants per channel or per tensor: BatchNormalization (Jacob et al.
2018, section 3.2), or Add, Sub, Mul, Div with one constant operand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from numpy.typing import NDArray

from qcompile.onnx.edit import (
    Editor,
    constant,
    dims,
    operand,
    set_attributes,
    set_inputs,
    sole_use,
)
from qcompile.pipeline import Context
from qcompile.plan import QuantPlan

from .linear import floats, is_linear, normalise

Doubles = NDArray[np.float64]

NORMALS = "qcompile.normals"


@dataclass(frozen=True, slots=True)
class Normal:
    """What a BatchNormalization knew about a tensor: mean and standard deviation of each channel of axis 1."""

    mean: Doubles
    deviation: Doubles

    def affine(self, scale: Doubles, shift: Doubles) -> Normal:
        """The same of scale * x + shift."""
        return Normal(self.mean * scale + shift, self.deviation * np.abs(scale))


def normals(graph: ir.Graph) -> dict[str, Normal]:
    """The tensors that BatchNormalizations made or read before they were folded, by name; not stored with the model."""
    found = graph.meta.get(NORMALS, {})
    assert isinstance(found, dict)
    return found


@dataclass(frozen=True)
class Fold:
    """No constant factor, addend, BatchNormalization or zero Pad is left that a neighbour can absorb."""

    name: ClassVar[str] = "fold"

    def __call__(self, model: ir.Model, plan: QuantPlan, context: Context) -> bool:
        """Edit in place; say whether anything changed."""
        graph = model.graph
        editor = Editor(graph)
        changed = any([normalise(node, editor) for node in list(graph)])
        # Overflow to infinity is found when the weights are checked at the end.
        with np.errstate(all="ignore"):
            _remember(graph)
            while _sweep(graph, editor):
                changed = True
        common.RemoveUnusedNodesPass()(model)
        _forget(graph)
        return changed


def _remember(graph: ir.Graph) -> None:
    """Note what BatchNormalizations say of tensors; by name, because folding moves names along with values."""
    known = dict(normals(graph))
    for node in graph:
        a = affine(node)
        if a is None or a.axis not in (None, 1):
            continue
        if node.op_type == "BatchNormalization":
            mean, variance = (floats(v) for v in node.inputs[3:5])
            assert mean is not None
            assert variance is not None
            x = Normal(
                np.asarray(mean, np.float64),
                np.sqrt(np.maximum(np.asarray(variance, np.float64), 0.0)),
            )
            known.setdefault(str(a.x.name), x)
        elif str(a.x.name) in known:
            x = known[str(a.x.name)]
        else:
            continue
        known[str(node.outputs[0].name)] = x.affine(a.scale, a.shift)
    graph.meta[NORMALS] = known


def _forget(graph: ir.Graph) -> None:
    """A name that is gone may be given to another value."""
    names = {v.name for v in (*graph.inputs, *(v for node in graph for v in node.outputs))}
    graph.meta[NORMALS] = {name: n for name, n in normals(graph).items() if name in names}


def _sweep(graph: ir.Graph, editor: Editor) -> bool:
    pads = [fold_pad(node, editor) or drop(node, editor) for node in list(graph)]
    after = [fold_into_producer(node, editor) for node in list(graph)]
    before = [fold_into_consumers(node, editor) for node in reversed(list(graph))]
    return any(pads) or any(after) or any(before)


@dataclass(frozen=True, slots=True)
class Affine:
    """y = scale * x + shift along `axis` of x, or with one number for all of x where `axis` is None."""

    x: ir.Value
    scale: Doubles
    shift: Doubles
    axis: int | None

    def along(self, axis: int, size: int) -> tuple[Doubles, Doubles] | None:
        """Scale and shift for the `size` channels of `axis`; None if they run along another axis."""
        if self.axis not in (None, axis):
            return None
        return np.broadcast_to(self.scale, size), np.broadcast_to(self.shift, size)


def affine(node: ir.Node | None) -> Affine | None:
    """What the node multiplies and adds, if that is all it does and it is constant."""
    if node is None or node.domain:
        return None
    match node.op_type:
        case "BatchNormalization":
            return _batch_norm(node)
        case "Add" | "Sub" | "Mul" | "Div":
            return _with_constant(node)
    return None


def _batch_norm(node: ir.Node) -> Affine | None:
    parameters = [floats(v) for v in node.inputs[1:5]]
    arrays = [np.asarray(p, np.float64) for p in parameters if p is not None]
    x = node.inputs[0]
    if x is None or len(arrays) != 4 or len(node.outputs) != 1:
        return None
    gamma, beta, mean, variance = arrays
    scale = gamma / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    return Affine(x, scale, beta - mean * scale, 1)


def _with_constant(node: ir.Node) -> Affine | None:
    left, right = node.inputs
    a, b = floats(left), floats(right)
    x, array = (left, b) if a is None else (right, a)
    shape = dims(x)
    if x is None or shape is None or array is None or constant(x) is not None:
        return None
    if x.dtype != ir.DataType.FLOAT or array.ndim > len(shape):
        return None
    wide = (1,) * (len(shape) - array.ndim) + array.shape
    axes = [i for i, n in enumerate(wide) if n != 1]
    # A constant that stretches x is no affine map of its channels.
    if len(axes) > 1 or (axes and wide[axes[0]] != shape[axes[0]]):
        return None
    c = array.astype(np.float64).reshape(-1)
    one, zero = np.ones_like(c), np.zeros_like(c)
    axis = axes[0] if axes else None
    match node.op_type:
        case "Add":
            return Affine(x, one, c, axis)
        case "Sub":
            return Affine(x, one, -c, axis) if a is None else Affine(x, -one, c, axis)
        case "Mul":
            return Affine(x, c, zero, axis)
        case _:
            return Affine(x, 1 / c, zero, axis) if a is None and np.all(c) else None


def drop(node: ir.Node, editor: Editor) -> bool:
    """Rule 4; exporters write biases that were never trained."""
    a = affine(node)
    if a is None or np.any(a.scale != 1) or np.any(a.shift):
        return False
    first = node.inputs[0]
    if first is not None and first is not a.x:
        set_inputs(node, {0: a.x, 1: first})
    return editor.bypass(node)


def fold_into_producer(node: ir.Node, editor: Editor) -> bool:
    """Rule 2."""
    a = affine(node)
    if a is None or not sole_use(a.x):
        return False
    producer = a.x.producer()
    if producer is None:
        return False
    if producer.op_type in ("Add", "MatMul"):
        return _fold_into_matmul(a, producer, node, editor)
    if not is_linear(producer):
        return False
    weight, bias = floats(producer.inputs[1]), floats(producer.inputs[2])
    assert weight is not None
    assert bias is not None
    found = a.along(1, weight.shape[0])
    if found is None:
        return False
    scale, shift = found
    set_inputs(producer, {2: _float32(editor, bias * scale + shift, producer, "bias")})
    # a matrix that stays as it is stays shared
    if np.any(scale != 1):
        scaled = weight * scale.reshape(-1, *(1,) * (weight.ndim - 1))
        set_inputs(producer, {1: _float32(editor, scaled, producer, "weight")})
    editor.take_over(node.outputs[0], a.x)
    return True


def _fold_into_matmul(a: Affine, producer: ir.Node, node: ir.Node, editor: Editor) -> bool:
    """MatMul has no bias of its own: an Add of one number per column follows it and holds the bias."""
    addend = affine(producer) if producer.op_type == "Add" else None
    matmul = producer
    if addend is not None:
        source = addend.x.producer()
        if source is None or not sole_use(addend.x):
            return False
        matmul = source
    if matmul.op_type != "MatMul" or not is_linear(matmul):
        return False
    weight, last = floats(matmul.inputs[1]), len(dims(a.x) or ()) - 1
    assert weight is not None
    columns = weight.shape[1]
    found = a.along(last, columns)
    old = (np.ones(1), np.zeros(1)) if addend is None else addend.along(last, columns)
    if found is None or old is None:
        return False
    scale, shift = found
    bias = old[1] * scale + shift
    if addend is None and bias.any():
        # The node itself becomes the Add, unless it already is.
        present = floats(operand(node, 1))
        if node.op_type == "Add" and present is not None and present.shape == (columns,):
            return False
        node.op_type = "Add"
        set_inputs(node, {0: a.x, 1: _float32(editor, bias, node, "bias")})
    else:
        if addend is not None:
            set_inputs(producer, {0: addend.x, 1: _float32(editor, bias, producer, "bias")})
        editor.take_over(node.outputs[0], a.x)
    if np.any(scale != 1):
        set_inputs(matmul, {1: _float32(editor, weight * scale, matmul, "weight")})
    return True


def fold_into_consumers(node: ir.Node, editor: Editor) -> bool:
    """Rule 3."""
    a = affine(node)
    output = node.outputs[0]
    if a is None or output.is_graph_output() or not output.uses():
        return False
    folded: list[tuple[ir.Node, Doubles, Doubles]] = []
    for consumer in output.consumers():
        reads = [v is output for v in consumer.inputs]
        new = _absorbed(a, consumer) if reads[0] and sum(reads) == 1 else None
        if new is None:
            return False
        folded.append((consumer, *new))
    for consumer, weight, bias in folded:
        inputs = {0: a.x, 1: _float32(editor, weight, consumer, "weight")}
        if consumer.op_type != "MatMul":
            inputs[2] = _float32(editor, bias, consumer, "bias")
        set_inputs(consumer, inputs)
    editor.erase(output)
    return True


def _absorbed(a: Affine, consumer: ir.Node) -> tuple[Doubles, Doubles] | None:
    """Weight and bias with which the consumer reads a.x instead of scale * a.x + shift."""
    if not is_linear(consumer):
        return None
    raw, old = floats(consumer.inputs[1]), floats(operand(consumer, 2))
    assert raw is not None
    weight = raw.astype(np.float64)
    bias = np.zeros(1) if old is None else old.astype(np.float64)
    if consumer.op_type == "MatMul":
        found = a.along(len(dims(a.x) or ()) - 1, weight.shape[0])
        if found is None or found[1].any():
            return None
        return weight * found[0][:, None], bias
    group = consumer.attributes.get_int("group", 1)
    found = a.along(1, weight.shape[1] * group)
    if found is None:
        return None
    scale, shift = found
    if shift.any() and any(consumer.attributes.get_ints("pads", ())):
        # The zeros around x would have to become scale * 0 + shift.
        return None
    # [group, outputs, inputs, taps]: the inputs of each group are its own channels of x.
    grouped = weight.reshape(group, weight.shape[0] // group, weight.shape[1], -1)
    bias = bias + np.einsum("goik,gi->go", grouped, shift.reshape(group, -1)).reshape(-1)
    return (grouped * scale.reshape(group, 1, -1, 1)).reshape(weight.shape), bias


def fold_pad(node: ir.Node, editor: Editor) -> bool:
    """Rule 1."""
    pads = zero_pads(node)
    if pads is None:
        return False
    output, x = node.outputs[0], node.inputs[0]
    if x is None or output.is_graph_output() or not output.uses():
        return False
    rank = len(pads) // 2
    spatial = (*pads[2:rank], *pads[rank + 2 :])
    if any(p < 0 for p in pads) or any((*pads[:2], *pads[rank : rank + 2])):
        return False
    convs = output.consumers()
    if not all(c.op_type == "Conv" and is_linear(c) and c.inputs[0] is output for c in convs):
        return False
    for conv in convs:
        own = conv.attributes.get_ints("pads", ())
        attributes = {n: v.value for n, v in conv.attributes.items()}
        attributes["pads"] = tuple(p + q for p, q in zip(own, spatial, strict=True))
        set_attributes(conv, **attributes)
        set_inputs(conv, {0: x})
    editor.erase(output)
    return True


def pad_widths(node: ir.Node) -> tuple[int, ...] | None:
    """The begins and ends of a Pad for every axis of its input, if they are constants."""
    shape, pads = dims(node.inputs[0]), constant(operand(node, 1))
    if shape is None or pads is None:
        return None
    rank = len(shape)
    axes: list[int] = list(range(rank))
    if operand(node, 3) is not None:
        chosen = constant(operand(node, 3))
        if chosen is None:
            return None
        axes = [int(a) % rank for a in chosen.reshape(-1).tolist()]
    flat = [int(p) for p in pads.reshape(-1).tolist()]
    if len(flat) != 2 * len(axes):
        return None
    full = [0] * 2 * rank
    for i, axis in enumerate(axes):
        full[axis], full[rank + axis] = flat[i], flat[len(axes) + i]
    return tuple(full)


def zero_pads(node: ir.Node) -> tuple[int, ...] | None:
    """The begins and ends of a Pad that adds zeros."""
    if node.domain or node.op_type != "Pad":
        return None
    if node.attributes.get_string("mode", "constant") != "constant":
        return None
    if operand(node, 2) is not None:
        value = constant(operand(node, 2))
        if value is None or value.any():
            return None
    return pad_widths(node)


def _float32(editor: Editor, array: Doubles, node: ir.Node, what: str) -> ir.Value:
    """A fresh constant: the old one may have other readers."""
    return editor.const(array.astype(np.float32), f"{node.name}_{what}")
