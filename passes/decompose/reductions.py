"""Reductions over any axes: the reduced ones go last, and a product with ones or a MaxPool makes one of them."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from qcompile.onnx.edit import Dims

from .expression import Expression


def reduced_axes(e: Expression, x: ir.Value) -> list[int] | None:
    """The axes a reduction runs over, None where it changes nothing."""
    rank = len(e.shape(x))
    axes = e.integers(1, "axes")
    if axes is None and "axes" in e.node.attributes:
        axes = list(e.node.attributes.get_ints("axes") or ())
    if not axes:
        if e.node.attributes.get_int("noop_with_empty_axes", 0):
            return None
        axes = list(range(rank))
    return sorted({a % rank for a in axes})


def _kept(e: Expression, x: ir.Value, axes: list[int]) -> Dims:
    """The shape of the result."""
    shape = e.shape(x)
    if e.node.attributes.get_int("keepdims", 1):
        return tuple(1 if i in axes else n for i, n in enumerate(shape))
    return tuple(n for i, n in enumerate(shape) if i not in axes)


def gathered(e: Expression, x: ir.Value, axes: list[int]) -> tuple[ir.Value, int]:
    """The tensor as [lead, kept, reduced], and the number that is reduced."""
    shape = e.shape(x)
    kept = [i for i in range(len(shape)) if i not in axes]
    count = math.prod(e.size(x, i) for i in axes)
    x = e.transpose(x, [*kept, *axes])
    lead = shape[kept[0]] if kept else 1
    rest = math.prod(e.size(x, i) for i in range(1, len(kept)))
    return e.reshape(x, (lead, rest, count)), count


def _finish(e: Expression, y: ir.Value, shape: Dims) -> ir.Value:
    return e.reshape(y, shape or (1,))


def total(e: Expression, x: ir.Value, axes: list[int], factor: float = 1.0) -> ir.Value:
    """The sum over axes times a factor, of the result's shape."""
    kept = _kept(e, x, axes)
    rows, count = gathered(e, x, axes)
    return _finish(e, e.matmul(rows, np.full((count, 1), factor)), kept)


def largest(e: Expression, x: ir.Value, axes: list[int]) -> ir.Value:
    """The largest value over axes, of the result's shape."""
    kept = _kept(e, x, axes)
    rows, count = gathered(e, x, axes)
    lead, rest, _ = e.shape(rows)
    y = e.op(
        "MaxPool", rows, shape=(lead, rest, 1), kernel_shape=(count,), strides=(1,), pads=(0, 0)
    )
    return _finish(e, y, kept)


def reduce(e: Expression) -> ir.Value | None:
    """ReduceSum, ReduceMean, ReduceMax, ReduceMin, ReduceL1, ReduceL2, ReduceSumSquare, ReduceLogSum(Exp)."""
    x, kind = e.input(0), e.node.op_type.removeprefix("Reduce")
    axes = reduced_axes(e, x)
    rank = len(e.shape(x))
    if rank == 0:
        axes = None
    if kind == "Mean" and axes == list(range(2, rank)) and rank > 2:
        return None  # the canonical form has an operator for it
    match kind:
        case "L1":
            x = e.unary("Abs", x)
        case "L2" | "SumSquare":
            x = _square(e, x)
        case "LogSumExp":
            x = e.unary("Exp", x)
        case "Min":
            x = e.unary("Neg", x)
        case _:
            pass
    if axes is not None:
        match kind:
            case "Max" | "Min":
                x = largest(e, x, axes)
            case "Mean":
                x = total(e, x, axes, 1 / math.prod(e.size(x, i) for i in axes))
            case _:
                x = total(e, x, axes)
    elif kind in ("Sum", "Mean", "Max", "Min"):
        return e.unary("Identity", e.input(0))
    match kind:
        case "Min":
            x = e.unary("Neg", x)
        case "L2":
            x = e.unary("Sqrt", x)
        case "LogSum" | "LogSumExp":
            x = e.unary("Log", x)
        case _:
            pass
    return x


def _square(e: Expression, x: ir.Value) -> ir.Value:
    return e.op("Pow", x, e.floats(2.0, "two"), shape=e.shape(x))


def arg(e: Expression) -> ir.Value | None:
    """ArgMax and ArgMin keep their axis; one that goes is reshaped away."""
    x, a = e.input(0), e.node.attributes
    axis = e.axis(0, x)
    if a.get_int("keepdims", 1) and a.get_int("axis", 0) == axis:
        return None
    shape = e.shape(x)
    kept = tuple(1 if i == axis else n for i, n in enumerate(shape))
    y = e.op(
        e.node.op_type, x, shape=kept, axis=axis, keepdims=1,
        select_last_index=a.get_int("select_last_index", 0),
    )  # fmt: skip
    y.type = ir.TensorType(ir.DataType.INT64)
    if a.get_int("keepdims", 1):
        return y
    y = e.reshape(y, tuple(n for i, n in enumerate(shape) if i != axis) or (1,))
    y.type = ir.TensorType(ir.DataType.INT64)
    return y


def mean(e: Expression) -> ir.Value:
    """Mean of n tensors -> their sum over n."""
    terms = [v for v in e.node.inputs if v is not None]
    y = terms[0]
    for term in terms[1:]:
        y = e.binary("Add", y, term)
    return e.times(y, 1 / len(terms))
