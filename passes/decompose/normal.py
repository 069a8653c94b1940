"""Normalizations: what is normalized together goes last, LayerNormalization without scale does it, constants follow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.onnx.edit import Editor, constant, dims, operand

from .expression import Expression, Floats
from .reductions import gathered


def standard(e: Expression, rows: ir.Value, epsilon: float) -> ir.Value:
    """Rows [lead, rows, n] with mean 0 and variance 1 along the last axis."""
    n = e.size(rows, len(e.shape(rows)) - 1)
    return e.op(
        "LayerNormalization", rows, e.floats(np.ones(n), "ones"),
        shape=e.shape(rows), axis=len(e.shape(rows)) - 1, epsilon=epsilon,
    )  # fmt: skip


def _scaled(e: Expression, y: ir.Value, scale: Floats | None, shift: Floats | None) -> ir.Value:
    if scale is not None and (scale != 1).any():
        y = e.times(y, scale)
    if shift is not None and shift.any():
        y = e.plus(y, shift)
    return y


def _numbers(e: Expression, index: int) -> Floats | None:
    array = e.constant(index, "a scale or shift")
    return None if array is None else np.asarray(array, np.float64)


def _is_standard(e: Expression, axis: int) -> bool:
    """Does the node stand in the form that `standard` makes?"""
    scale = _numbers(e, 1)
    last = len(e.shape(e.input(0))) - 1
    return (
        axis == last > 1
        and e.node.attributes.get_int("axis", -1) == last
        and len(e.node.inputs) == 2
        and len(e.node.outputs) == 1
        and scale is not None
        and bool((scale == 1).all())
    )


def layer_norm(e: Expression) -> list[ir.Value | None] | None:
    """LayerNormalization over trailing axes, with mean and inverse deviation where they are asked for."""
    x = e.input(0)
    shape, axis = e.shape(x), e.axis(-1, x)
    if _is_standard(e, axis):
        return None
    epsilon = e.node.attributes.get_float("epsilon", 1e-5)
    rows, n = gathered(e, x, list(range(axis, len(shape))))
    y = e.reshape(standard(e, rows, epsilon), shape)
    found: list[ir.Value | None] = [_scaled(e, y, _numbers(e, 1), _numbers(e, 2))]
    kept = (*shape[:axis], *(1,) * (len(shape) - axis))
    used = [v.is_graph_output() or bool(v.uses()) for v in e.node.outputs]
    if any(used[1:]):
        mean = e.matmul(rows, np.full((n, 1), 1 / n))
        found.append(e.reshape(mean, kept) if used[1] else None)
    if any(used[2:]):
        apart = e.binary("Sub", rows, mean)
        square = e.op("Pow", apart, e.floats(2.0, "two"), shape=e.shape(rows))
        variance = e.plus(e.matmul(square, np.full((n, 1), 1 / n)), epsilon)
        inverse = e.op("Pow", variance, e.floats(-0.5, "power"), shape=e.shape(variance))
        found.append(e.reshape(inverse, kept))
    return found


def instance_norm(e: Expression) -> ir.Value:
    """InstanceNormalization: every channel of every sample."""
    x = e.input(0)
    shape = e.shape(x)
    rows, _ = gathered(e, x, list(range(2, len(shape))))
    y = e.reshape(standard(e, rows, e.node.attributes.get_float("epsilon", 1e-5)), shape)
    row = (-1, *(1,) * (len(shape) - 2))
    scale, shift = _numbers(e, 1), _numbers(e, 2)
    return _scaled(
        e,
        y,
        None if scale is None else scale.reshape(row),
        None if shift is None else shift.reshape(row),
    )


def group_norm(e: Expression) -> ir.Value:
    """GroupNormalization: the channels of a group together."""
    x, groups = e.input(0), e.node.attributes.get_int("num_groups", 1)
    shape = e.shape(x)
    channels = e.size(x, 1)
    count = channels // groups
    for i in range(2, len(shape)):
        count *= e.size(x, i)
    rows = e.reshape(x, (shape[0], groups, count))
    y = e.reshape(standard(e, rows, e.node.attributes.get_float("epsilon", 1e-5)), shape)
    row = (-1, *(1,) * (len(shape) - 2))

    def each(index: int) -> Floats | None:
        array = _numbers(e, index)
        if array is None:
            return None
        # up to opset 20 there is one number for a group
        return np.repeat(array, channels // len(array)).reshape(row)

    return _scaled(e, y, each(1), each(2))


def mean_variance(e: Expression) -> ir.Value:
    """MeanVarianceNormalization over any axes."""
    x = e.input(0)
    rank = len(e.shape(x))
    axes = sorted(a % rank for a in e.node.attributes.get_ints("axes") or (0, 2, 3))
    return _along(e, x, axes, 1e-9)


def _along(e: Expression, x: ir.Value, axes: list[int], epsilon: float) -> ir.Value:
    shape = e.shape(x)
    kept = [i for i in range(len(shape)) if i not in axes]
    rows, _ = gathered(e, x, axes)
    y = standard(e, rows, epsilon)
    order = [*kept, *axes]
    y = e.reshape(y, [shape[i] for i in order])
    return e.transpose(y, [order.index(i) for i in range(len(shape))])


# --- as exporters spell it out ----------------------------------------------------------------------------------


def spelled_out(graph: ir.Graph, editor: Editor) -> bool:
    """Find (x - mean) / sqrt(variance + epsilon) and have a normalization stand for it; was there any?

    Exporters of opsets before 17 write LayerNormalization like that. Left so, every one of its parts would be rounded.
    """
    found = False
    for node in list(graph):
        part = _spelled(node)
        if part is None:
            continue
        e = Expression(node, editor)
        rank = len(dims(part.x) or ())
        axes = sorted({a % rank for a in part.axes}) if rank else []
        if not axes or axes[0] == 0 or any(not isinstance(e.shape(part.x)[a], int) for a in axes):
            continue
        editor.replace(node, _along(e, part.x, axes, part.epsilon))
        found = True
    return found


@dataclass(frozen=True)
class _Spelled:
    x: ir.Value
    axes: tuple[int, ...]
    epsilon: float


def _spelled(node: ir.Node) -> _Spelled | None:
    """What a node normalizes, if it is the last step of it."""
    match node.op_type, list(node.inputs):
        case "Div", [apart, deviation]:
            root = _maker(deviation, "Sqrt")
        case "Mul", [left, right]:
            inverse, apart = _maker(left, "Reciprocal"), right
            if inverse is None:
                inverse, apart = _maker(right, "Reciprocal"), left
            root = None if inverse is None else _maker(inverse.inputs[0], "Sqrt")
        case _:
            return None
    added = None if root is None else _maker(root.inputs[0], "Add")
    if added is None or node.domain:
        return None
    for variance, number in (added.inputs, added.inputs[::-1]):
        epsilon = constant(number)
        mean = _mean(variance)
        if epsilon is None or epsilon.size != 1 or mean is None:
            continue
        squared, axes = mean
        centered, base = _centered(apart), _centered(_root_of_square(squared))
        # a constant of more axes would give them to the result
        if centered is not None and epsilon.ndim > len(dims(centered[0]) or ()):
            continue
        if centered is not None and centered == base and centered[1] == axes:
            return _Spelled(centered[0], axes, float(epsilon.reshape(-1)[0]))
    return None


def _maker(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes a value, if it is of that type."""
    node = None if value is None else value.producer()
    return node if node is not None and (node.domain, node.op_type) == ("", op_type) else None


def _mean(value: ir.Value | None) -> tuple[ir.Value, tuple[int, ...]] | None:
    """What a value is the mean of, and along which axes, which it keeps."""
    node = _maker(value, "ReduceMean")
    if node is None or not node.attributes.get_int("keepdims", 1):
        return None
    axes, x = constant(operand(node, 1)), node.inputs[0]
    if axes is None or not axes.size or x is None:
        return None
    return x, tuple(int(a) for a in axes.reshape(-1))


def _centered(value: ir.Value | None) -> tuple[ir.Value, tuple[int, ...]] | None:
    """X and the axes, of a value that is x minus its mean."""
    node = _maker(value, "Sub")
    mean = None if node is None else _mean(node.inputs[1])
    if node is None or mean is None or node.inputs[0] is not mean[0]:
        return None
    return mean


def _root_of_square(value: ir.Value) -> ir.Value | None:
    """What is squared."""
    node = value.producer()
    if node is None or node.domain or len(node.inputs) != 2:
        return None
    x, other = node.inputs
    power = constant(other)
    if node.op_type == "Pow" and power is not None and power.size == 1:
        return x if power.reshape(-1)[0] == 2 and power.ndim <= len(dims(x) or ()) else None
    return x if node.op_type == "Mul" and x is other else None
