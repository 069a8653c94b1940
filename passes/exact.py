"""Unary functions to more digits than a table needs, the same on every machine: mpmath, which is integer arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import mpmath
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.errors import Unsupported

Real: TypeAlias = Any
"""An mpmath number; the package carries no types."""
_CONTEXT = mpmath.MPContext()
_CONTEXT.prec = 100


def _sigmoid(x: Real) -> Real:
    return 1 / (1 + _CONTEXT.exp(-x))


def _softplus(x: Real) -> Real:
    return _CONTEXT.log1p(_CONTEXT.exp(-abs(x))) + max(x, _CONTEXT.mpf(0))


def _gelu(x: Real, approximate: str) -> Real:
    if approximate == "tanh":
        inner = _CONTEXT.sqrt(2 / _CONTEXT.pi) * (x + _CONTEXT.mpf("0.044715") * x**3)
        return x / 2 * (1 + _CONTEXT.tanh(inner))
    return x / 2 * (1 + _CONTEXT.erf(x / _CONTEXT.sqrt(2)))


def _power(x: Real, y: Real) -> Real:
    if x < 0 and y != int(y):
        raise ValueError("a fractional power of a negative number")
    return x ** (int(y) if y == int(y) else y)


def _elementary(node: ir.Node, name: str | None) -> Callable[..., Real]:
    """The meaning of an elementwise operator on exact numbers (ONNX operator specification, opset 21).

    Unsupported names the node of the model that it is or is part of.
    """
    c = _CONTEXT

    def number(name: str, default: float) -> Real:
        # ONNX attributes are float32, defaults included
        stated = node.attributes[name].as_float() if name in node.attributes else default
        return c.mpf(float(np.float32(stated)))

    def clip(x: Real, lo: Real | None = None, hi: Real | None = None) -> Real:
        x = x if lo is None else max(x, lo)
        return x if hi is None else min(x, hi)

    one, zero = c.mpf(1), c.mpf(0)
    sixth = one / 6
    table: Mapping[str, Callable[..., Real]] = {
        "Abs": abs,
        "Acos": c.acos,
        "Acosh": c.acosh,
        "Add": lambda x, y: x + y,
        "And": lambda x, y: x and y,
        "Asin": c.asin,
        "Asinh": c.asinh,
        "Atan": c.atan,
        "Atanh": c.atanh,
        "Ceil": c.ceil,
        "Celu": lambda x: (
            max(x, zero) + min(zero, number("alpha", 1) * c.expm1(x / number("alpha", 1)))
        ),
        "Clip": clip,
        "Cast": _cast(node),
        "Cos": c.cos,
        "Cosh": c.cosh,
        "Div": lambda x, y: x / y,
        "Elu": lambda x: x if x >= 0 else number("alpha", 1) * c.expm1(x),
        "Equal": lambda x, y: x == y,
        "Erf": c.erf,
        "Exp": c.exp,
        "Floor": c.floor,
        "Gelu": lambda x: _gelu(
            x,
            node.attributes["approximate"].as_string()
            if "approximate" in node.attributes
            else "none",
        ),
        "Greater": lambda x, y: x > y,
        "GreaterOrEqual": lambda x, y: x >= y,
        "HardSigmoid": lambda x: clip(number("alpha", 0.2) * x + number("beta", 0.5), zero, one),
        "HardSwish": lambda x: x * clip(x * sixth + one / 2, zero, one),
        "Identity": lambda x: x,
        "LeakyRelu": lambda x: x if x >= 0 else number("alpha", 0.01) * x,
        "Less": lambda x, y: x < y,
        "LessOrEqual": lambda x, y: x <= y,
        "Log": c.log,
        "Max": lambda *xs: max(xs),
        "Min": lambda *xs: min(xs),
        "Mish": lambda x: x * c.tanh(_softplus(x)),
        "Mul": lambda x, y: x * y,
        "Neg": lambda x: -x,
        "Not": lambda x: not x,
        "Or": lambda x, y: x or y,
        "PRelu": lambda x, slope: x if x >= 0 else slope * x,
        "Pow": _power,
        "Reciprocal": lambda x: 1 / x,
        "Relu": lambda x: max(x, zero),
        "Round": c.nint,
        "Selu": lambda x: (
            number("gamma", 1.0507009873554805)
            * (x if x > 0 else number("alpha", 1.6732632423543772) * c.expm1(x))
        ),
        "Sigmoid": _sigmoid,
        "Sign": lambda x: c.sign(x),
        "Shrink": lambda x: _shrink(x, number("lambd", 0.5), number("bias", 0)),
        "Sin": c.sin,
        "Sinh": c.sinh,
        "Softplus": _softplus,
        "Softsign": lambda x: x / (1 + abs(x)),
        "Sqrt": lambda x: (
            c.sqrt(x) if x >= 0 else _undefined("the square root of a negative number")
        ),
        "Sub": lambda x, y: x - y,
        "Sum": lambda *xs: sum(xs, zero),
        "Swish": lambda x: x * _sigmoid(number("alpha", 1) * x),
        "Tan": c.tan,
        "Tanh": c.tanh,
        "ThresholdedRelu": lambda x: x if x > number("alpha", 1) else zero,
        "Where": lambda condition, x, y: x if condition else y,
        "Xor": lambda x, y: bool(x) != bool(y),
    }
    if node.op_type not in table:
        raise Unsupported(
            f"node {name}: {node.op_type} has no table; replace it by supported operators"
        )
    return table[node.op_type]


def _shrink(x: Real, lambd: Real, bias: Real) -> Real:
    if x < -lambd:
        return x + bias
    return x - bias if x > lambd else _CONTEXT.mpf(0)


def _cast(node: ir.Node) -> Callable[[Real], Real]:
    to = ir.DataType(node.attributes.get_int("to", ir.DataType.FLOAT))
    if to == ir.DataType.STRING:
        raise Unsupported(f"node {node.name}: text has no table; keep the model's values numbers")
    if to == ir.DataType.BOOL:
        return bool
    return _CONTEXT.mpf if to.is_floating_point() else lambda x: _CONTEXT.mpf(int(x))


def _undefined(what: str) -> Real:
    raise ValueError(what)


def meaning(model: ir.Model, node: ir.Node) -> Callable[[Real], Real]:
    """What a unary node (a standard operator or a function of the model) makes of an exact number.

    Unsupported names the node where an operator has no exact meaning here.
    """
    if not node.domain:
        return _elementary(node, node.name)
    function = model.functions[node.op_identifier()]
    numbers: dict[ir.Value, Real] = {}
    steps: list[tuple[ir.Node, Callable[..., Real]]] = []
    for inner in function:
        if inner.op_type == "Constant":
            numbers[inner.outputs[0]] = _CONTEXT.mpf(float(_constant(inner).reshape(())))
        else:
            steps.append((inner, _elementary(inner, node.name)))

    def evaluate(x: Real) -> Real:
        known = numbers | {function.inputs[0]: x}
        for inner, step in steps:
            args = [None if v is None else known[v] for v in inner.inputs]
            known[inner.outputs[0]] = _applied(inner.op_type, step, args)
        y = known[function.outputs[0]]
        if isinstance(y, Exception):
            raise y
        return y

    return evaluate


def _applied(op_type: str, step: Callable[..., Real], args: Sequence[Real]) -> Real:
    """What a step makes of its operands, or why that is undefined; a Where does not mind what it does not choose."""
    if op_type == "Where" and not isinstance(args[0], Exception):
        return step(*args)
    undefined = next((a for a in args if isinstance(a, Exception)), None)
    if undefined is not None:
        return undefined
    try:
        return step(*args)
    except (ValueError, ZeroDivisionError, TypeError) as e:
        return e


def unary(model: ir.Model, node: ir.Node, xs: Sequence[Real]) -> list[Real]:
    """The values of a unary node on exact inputs.

    An undefined value (the logarithm of a negative number) is refused, naming the node: a table has no place for it.
    """
    evaluate = meaning(model, node)
    return [_guarded(node, evaluate, x) for x in xs]


def _defined(evaluate: Callable[[Real], Real], x: Real) -> Real | None:
    """A finite real value, None where there is none."""
    try:
        y = evaluate(x)
    except (ValueError, ZeroDivisionError, TypeError):
        # complex numbers have no order
        return None
    return None if isinstance(y, _CONTEXT.mpc) or not _CONTEXT.isfinite(y) else y


def _guarded(node: ir.Node, evaluate: Callable[[Real], Real], x: Real) -> Real:
    y = _defined(evaluate, x)
    if y is None:
        shown = mpmath.nstr(x, 6)
        raise Unsupported(
            f"node {node.name}: {node.op_type} is not defined at {shown}, which its quantized input can reach; "
            "clip its input in the model"
        )
    return y


def _constant(node: ir.Node) -> NDArray[np.generic]:
    for name, attribute in node.attributes.items():
        match name:
            case "value":
                return np.asarray(attribute.as_tensor().numpy())
            case "value_float":
                return np.asarray(attribute.as_float())
            case "value_int":
                return np.asarray(attribute.as_int())
            case "value_floats":
                return np.asarray(attribute.as_floats())
            case _:
                pass
    raise Unsupported(f"node {node.name}: a constant that is no number")


def table(
    model: ir.Model,
    node: ir.Node,
    codes: range,
    x_scale: float,
    x_zero: int,
    y_scale: float,
    y_zero: int,
) -> list[int]:
    """round(f((code - x_zero) * x_scale) / y_scale) + y_zero for every code, half to even, within 2**40.

    Where f is not defined (the logarithm of 0), a code stands for the nearest at which it is: quantized ranges always
    hold 0. Unsupported, naming the node, where it is defined nowhere.
    """
    c = _CONTEXT
    far = c.mpf(2) ** 40
    evaluate = meaning(model, node)
    reals = [c.mpf(code - x_zero) * c.mpf(x_scale) for code in codes]
    found = [_defined(evaluate, x) for x in reals]
    known = [i for i, y in enumerate(found) if y is not None]
    if not known:
        _guarded(node, evaluate, reals[0])
    nearest = [found[min(known, key=lambda k: (abs(k - i), k))] for i in range(len(found))]
    steps = [min(max(y / c.mpf(y_scale), -far), far) for y in nearest]
    return [int(c.nint(step)) + y_zero for step in steps]


def exponentials(count: int, scale: float, fraction: int) -> list[int]:
    """round(exp(-k * scale) * 2**fraction) for k below count."""
    c = _CONTEXT
    return [int(c.nint(c.exp(-k * c.mpf(scale)) * 2**fraction)) for k in range(count)]
