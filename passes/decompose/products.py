"""Products of matrices in two forms: the last axis by a constant matrix, and two computed stacks of equal shape."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from qcompile.onnx.edit import Array, Dims, constant, operand

from .expression import Expression, Floats, broadcast

MOST_MATRICES = 256


def matmul(e: Expression) -> ir.Value | None:
    """MatMul with vectors, a constant first operand, stacks of constants or shapes that broadcast; others stay."""
    a, b = e.input(0), e.input(1)
    left, right = constant(a), constant(b)
    if left is not None and right is None:
        return _constant_first(e, np.asarray(left, np.float64), b)
    x, shape = a, e.shape(a)
    if right is not None:
        if right.ndim == 2 and len(shape) > 1:
            return None
        return _by_constants(e, x, np.asarray(right, np.float64))
    if len(shape) == len(e.shape(b)) > 2 and shape[:-2] == e.shape(b)[:-2]:
        return None
    return _stacks(e, a, b)


def _by_constants(e: Expression, x: ir.Value, right: Floats) -> ir.Value:
    shape = e.shape(x)
    vector = len(shape) == 1
    if vector:
        x = e.reshape(x, (1, *shape))
    if right.ndim == 1:
        y = e.matmul(x, right[:, None])
        return e.reshape(y, e.shape(y)[:-1])
    if right.ndim == 2:
        y = e.matmul(x, right)
    else:
        lead = broadcast(e.shape(x)[:-2], right.shape[:-2])
        sizes = tuple(n for n in lead if isinstance(n, int))
        if len(sizes) != len(lead) or math.prod(sizes) > MOST_MATRICES:
            raise e.refuse(
                f"by more than {MOST_MATRICES} constant matrices has no integer form here"
            )
        x = e.spread(x, (*lead, *e.shape(x)[-2:]))
        rows, depth = e.shape(x)[-2:]
        x = e.reshape(x, (math.prod(sizes), rows, depth))
        ws = np.broadcast_to(right, (*sizes, *right.shape[-2:])).reshape(-1, *right.shape[-2:])
        parts = [e.matmul(e.slice(x, 0, i, i + 1), w) for i, w in enumerate(ws)]
        y = e.reshape(e.concat(parts, 0), (*lead, rows, right.shape[-1]))
    return e.reshape(y, (*e.shape(y)[:-2], e.shape(y)[-1])) if vector else y


def _constant_first(e: Expression, left: Floats, b: ir.Value) -> ir.Value:
    """A @ b as the transpose of b' @ A'."""
    shape = e.shape(b)
    if len(shape) == 1:
        return matmul_by(e, b, left)
    if left.ndim > 2:
        raise e.refuse("of a stack of constants by a computed operand has no integer form here")
    rank = len(shape)
    swap = (*range(rank - 2), rank - 1, rank - 2)
    if left.ndim == 1:
        y = e.matmul(e.transpose(b, swap), left[:, None])
        return e.reshape(y, e.shape(y)[:-1])
    return e.transpose(e.matmul(e.transpose(b, swap), left.T), swap)


def matmul_by(e: Expression, vector: ir.Value, left: Floats) -> ir.Value:
    """A @ v for a computed vector."""
    y = e.matmul(e.reshape(vector, (1, *e.shape(vector))), left.reshape(-1, left.shape[-1]).T)
    return e.reshape(y, left.shape[:-1] or (1,))


def _stacks(e: Expression, a: ir.Value, b: ir.Value) -> ir.Value:
    """Both operands in rank 3 or more with equal leading axes."""
    first, second = e.shape(a), e.shape(b)
    x = e.reshape(a, (1, *first)) if len(first) == 1 else a
    y = e.reshape(b, (*second, 1)) if len(second) == 1 else b
    lead: Dims = broadcast(e.shape(x)[:-2], e.shape(y)[:-2])
    wide: Dims = lead or (1,)
    x, y = (e.spread(v, (*wide, *e.shape(v)[-2:])) for v in (x, y))
    made = e.op("MatMul", x, y, shape=(*wide, e.shape(x)[-2], e.shape(y)[-1]))
    shape = [*lead]
    shape += [] if len(first) == 1 else [e.shape(x)[-2]]
    shape += [] if len(second) == 1 else [e.shape(y)[-1]]
    return e.reshape(made, shape or (1,))


def gemm(e: Expression) -> ir.Value | None:
    """Gemm whose second operand is computed, whose first is turned, or whose addend is no row; others stay."""
    a, b, c = e.input(0), e.input(1), operand(e.node, 2)
    attributes = e.node.attributes
    turned, weight = attributes.get_int("transA", 0), constant(b)
    row = c is None or (
        (array := constant(c)) is not None and _is_row(array, e.shape(e.node.outputs[0]))
    )
    if weight is not None and not turned and row:
        return None
    alpha, beta = attributes.get_float("alpha", 1.0), attributes.get_float("beta", 1.0)
    if turned:
        a = e.transpose(a, (1, 0))
    if weight is not None:
        wide = np.asarray(weight, np.float64) * alpha
        y = e.matmul(a, wide.T if attributes.get_int("transB", 0) else wide)
    else:
        if attributes.get_int("transB", 0):
            b = e.transpose(b, (1, 0))
        y = _stacks(e, a, b)
        y = e.times(y, alpha) if alpha != 1 else y
    if c is None or not beta:
        return y
    array = constant(c)
    if array is not None:
        return e.plus(y, np.asarray(array, np.float64) * beta)
    return e.binary("Add", y, e.times(c, beta) if beta != 1 else c)


def _is_row(array: Array, shape: Dims) -> bool:
    return array.size == 1 or (array.size == shape[-1] and array.shape[-1] == shape[-1])
