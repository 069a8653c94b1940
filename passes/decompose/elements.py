"""Element-wise operators of several tensors: equal ranks, two operands at a time, no division by a computed tensor."""

from __future__ import annotations

from functools import reduce

import numpy as np
import onnx_ir as ir

from qcompile.onnx.edit import constant, dims

from .expression import Expression, broadcast
from .reductions import largest


def aligned(e: Expression) -> ir.Value | None:
    """Computed operands of fewer axes than the result get them in front; others stay."""
    shape = dims(e.node.outputs[0])
    if shape is None:
        return None
    ranks = [len(dims(v) or ()) for v in e.node.inputs if v is not None and constant(v) is None]
    if all(r == len(shape) for r in ranks):
        return None
    inputs: list[ir.Value | None] = []
    for v in e.node.inputs:
        if v is None or constant(v) is not None:
            inputs.append(v)
        else:
            have = e.shape(v)
            inputs.append(e.reshape(v, (1,) * (len(shape) - len(have)) + have))
    return e.op(e.node.op_type, *inputs, shape=shape)


def cast(e: Expression) -> ir.Value | None:
    """Cast to the type that the operand has -> the operand."""
    x = e.input(0)
    return x if x.dtype is not None and x.dtype == e.node.attributes.get_int("to", 0) else None


def extreme(e: Expression) -> ir.Value | None:
    """Max and Min of at least two computed tensors, or a tensor of constants -> pairs of equal shape."""
    kind, shape = e.node.op_type, dims(e.node.outputs[0])
    terms = [v for v in e.node.inputs if v is not None]
    if shape is None:
        return None
    if len(terms) == 1:
        return e.unary("Identity", terms[0])
    computed = [v for v in terms if constant(v) is None]
    numbers = [np.asarray(constant(v), np.float64) for v in terms if constant(v) is not None]
    if len(computed) == 1 and all(n.size == 1 for n in numbers):
        return None
    if len(terms) == 2 and len(computed) == 2 and all(dims(v) == shape for v in computed):
        return None
    pick = np.maximum if kind == "Max" else np.minimum
    y: ir.Value | None = None
    for value in computed:
        value = e.spread(value, shape)
        y = value if y is None else e.op(kind, y, value, shape=shape)
    assert y is not None
    if not numbers:
        return y
    bound = reduce(pick, numbers)
    if bound.size == 1:
        return e.op(kind, y, e.floats(bound.reshape(()), "bound"), shape=shape)
    # Where y - bound is positive, it is what the largest has more than the bound.
    apart = e.op("Sub", y, e.floats(bound, "bound"), shape=shape)
    if kind == "Max":
        above = e.unary("Relu", apart)
    else:
        above = e.op("Clip", apart, None, e.floats(0.0, "zero"), shape=shape)
    return e.op("Add", above, e.floats(bound, "bound"), shape=shape)


def divide(e: Expression) -> ir.Value | None:
    """Div by a computed tensor -> Mul by its Reciprocal; by a constant that is no scalar -> Mul; others stay."""
    a, b = e.input(0), e.input(1)
    shape = broadcast(e.shape(a), e.shape(b))
    divisor = constant(b)
    if divisor is None:
        dividend = constant(a)
        if dividend is not None and dividend.size == 1:
            return None
        return e.op("Mul", e.unary("Reciprocal", b), a, shape=shape)
    if divisor.size == 1 or constant(a) is not None:
        return None
    with np.errstate(all="ignore"):
        inverse = 1 / np.asarray(divisor, np.float64)
    if not np.isfinite(inverse).all():
        raise e.refuse("by zero")
    return e.op("Mul", a, e.floats(inverse, "inverse"), shape=shape)


def prelu(e: Expression) -> ir.Value | None:
    """PRelu with several slopes -> the positive part plus slopes times the negative part; others stay."""
    x, slope = e.input(0), e.constant(1, "slopes")
    assert slope is not None
    if slope.size == 1:
        return None
    below = e.op("Clip", x, None, e.floats(0.0, "zero"), shape=e.shape(x))
    return e.binary("Add", e.unary("Relu", x), e.times(below, np.asarray(slope, np.float64)))


def power(e: Expression) -> ir.Value | None:
    """Pow by a constant tensor of one number -> by that number; x ** y of positive x -> exp(y * log(x))."""
    x, exponent = e.input(0), constant(e.input(1))
    if exponent is None:
        base = constant(x)
        if base is None:
            return e.unary("Exp", e.binary("Mul", e.unary("Log", x), e.input(1)))
        if (np.asarray(base, np.float64) <= 0).any():
            raise e.refuse("of bases that are not positive has no integer form here")
        logarithms = e.floats(np.log(np.asarray(base, np.float64)), "logarithms")
        return e.unary("Exp", e.binary("Mul", e.input(1), logarithms))
    if exponent.size == 1:
        return None
    if np.ptp(np.asarray(exponent, np.float64)):
        logarithm = e.unary("Log", x)
        return e.unary("Exp", e.times(logarithm, np.asarray(exponent, np.float64)))
    return e.op("Pow", x, e.floats(float(exponent.reshape(-1)[0]), "exponent"), shape=e.shape(x))


def add_all(e: Expression) -> ir.Value | None:
    """Sum of several -> Adds of two."""
    terms = [v for v in e.node.inputs if v is not None]
    if len(terms) == 1:
        return e.unary("Identity", terms[0])
    return reduce(lambda a, b: e.binary("Add", a, b), terms)


def log_softmax(e: Expression) -> ir.Value:
    """LogSoftmax -> x - max - log(sum(exp(x - max)))."""
    x = e.input(0)
    shape, axis = e.shape(x), e.axis(-1, x)
    order = [*(i for i in range(len(shape)) if i != axis), axis]
    rows = e.transpose(x, order)
    count = e.size(x, axis)
    peak = largest(e, rows, [len(shape) - 1])
    apart = e.binary("Sub", rows, peak)
    total = e.matmul(e.unary("Exp", apart), np.ones((count, 1)))
    y = e.binary("Sub", apart, e.unary("Log", total))
    return e.transpose(y, [order.index(i) for i in range(len(shape))])
