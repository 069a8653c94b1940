"""Functions whose rows share a reciprocal or an inverse root, found by Newton's iteration in integers."""

from __future__ import annotations

from qcompile.ir import arith
from qcompile.onnx.functions import (
    CLAMPED,
    DOMAIN,
    FLOOR_SHIFT,
    INT64,
    Body,
    Function,
    attribute,
    integer,
    rounded,
    row,
)


def _shifted(result: str, a: str, b: str, step: str) -> Body:
    """`result` = floor(a * b / step)."""
    return [
        f"{result}_product = Mul ({a}, {b})",
        f"{result} = {DOMAIN}.FloorShift ({result}_product, {step})",
    ]


def _reciprocal() -> Function:
    """The steps of `arith.reciprocal`."""
    body = [
        integer("q30", 1 << 30),
        integer("q31", 1 << 31),
        integer("slope", int(arith.LINE_SLOPE)),
        integer("start", int(arith.LINE_CONSTANT)),
        *_shifted("fall", "s", "slope", "q31"),
        "x0 = Sub (start, fall)",
    ]
    last = arith.NEWTON_STEPS - 1
    for i in range(arith.NEWTON_STEPS):
        body += [
            *_shifted(f"near{i}", "s", f"x{i}", "q30"),
            f"error{i} = Sub (q31, near{i})",
            *_shifted(f"change{i}", f"x{i}", f"error{i}", "q31"),
            f"{'r' if i == last else f'x{i + 1}'} = Add (x{i}, change{i})",
        ]
    return Function("Reciprocal", "(s) => (r)", tuple(body), (FLOOR_SHIFT,))


SOFTMAX = Function(
    "Softmax",
    "<unit, lo, hi, to> (x, table) => (y)",
    (
        f"wide = Cast <to = {INT64}> (x)",
        "largest = ReduceMax <axes = [-1], keepdims = 1> (wide)",
        "below = Sub (largest, wide)",
        "found = Gather <axis = 0> (table, below)",
        f"e = Cast <to = {INT64}> (found)",
        row("row", [-1]),
        "total = ReduceSum <keepdims = 1> (e, row)",
        # The place of the highest bit is the number of powers of two, from 2 on, that the total reaches.
        row("powers", [1 << k for k in range(31)]),
        row("marks", [1 << k for k in range(1, 31)]),
        "reached = GreaterOrEqual (total, marks)",
        f"counted = Cast <to = {INT64}> (reached)",
        "top = ReduceSum <keepdims = 1> (counted, row)",
        integer("highest", 30),
        "room = Sub (highest, top)",
        "scale = Gather <axis = 0> (powers, room)",
        "aligned = Mul (total, scale)",
        f"inverse = {DOMAIN}.Reciprocal (aligned)",
        "product = Mul (e, inverse)",
        attribute("unit"),
        "size = Gather <axis = 0> (powers, top)",
        "step = Mul (size, unit)",
        *rounded("product"),
        "lowest = Constant <value_int: int = @lo> ()",
        "placed = Add (shifted, lowest)",
        *CLAMPED,
    ),
    (FLOOR_SHIFT, _reciprocal()),
)
"""`unit` is 2**(31 - bits of the result)."""


def _inverse_root() -> Function:
    """The steps of `arith.inverse_root`; `count` is its k + 15."""
    body = [
        row("row", [-1]),
        row("fours", [1 << 2 * i for i in range(1, 31)]),
        "reached = GreaterOrEqual (v, fours)",
        f"counted = Cast <to = {INT64}> (reached)",
        "count = ReduceSum <keepdims = 1> (counted, row)",
        row("ups", [1 << 2 * max(15 - i, 0) for i in range(31)]),
        row("downs", [1 << 2 * max(i - 15, 0) for i in range(31)]),
        "up = Gather <axis = 0> (ups, count)",
        "down = Gather <axis = 0> (downs, count)",
        *_shifted("s", "v", "up", "down"),
        *(integer(f"q{bits}", 1 << bits) for bits in (29, 31, 32)),
        integer("three", int(arith.ROOT_THREE)),
        integer("slope", int(arith.ROOT_SLOPE)),
        integer("start", int(arith.ROOT_CONSTANT)),
        *_shifted("fall", "s", "slope", "q32"),
        "x0 = Sub (start, fall)",
    ]
    last = arith.ROOT_STEPS - 1
    for i in range(arith.ROOT_STEPS):
        body += [
            *_shifted(f"square{i}", f"x{i}", f"x{i}", "q29"),
            *_shifted(f"near{i}", "s", f"square{i}", "q31"),
            f"rest{i} = Sub (three, near{i})",
            *_shifted("r" if i == last else f"x{i + 1}", f"x{i}", f"rest{i}", "q31"),
        ]
    return Function("InverseRoot", "(v) => (r, count)", tuple(body), (FLOOR_SHIFT,))


NORMALIZE = Function(
    "Normalize",
    "<entries, epsilon, unit, lo, hi, to> (x) => (y)",
    (
        f"wide = Cast <to = {INT64}> (x)",
        row("row", [-1]),
        attribute("entries"),
        attribute("epsilon"),
        attribute("unit"),
        "total = ReduceSum <keepdims = 1> (wide, row)",
        "square = Mul (wide, wide)",
        "squares = ReduceSum <keepdims = 1> (square, row)",
        "whole = Mul (squares, entries)",
        "mean = Mul (total, total)",
        "variance = Sub (whole, mean)",
        "spread = Add (variance, epsilon)",
        f"root, count = {DOMAIN}.InverseRoot (spread)",
        "raised_entries = Mul (wide, entries)",
        "deviation = Sub (raised_entries, total)",
        "product = Mul (deviation, root)",
        row("powers", [1 << k for k in range(31)]),
        "size = Gather <axis = 0> (powers, count)",
        "step = Mul (size, unit)",
        *rounded("product"),
        "placed = Identity (shifted)",
        *CLAMPED,
    ),
    (FLOOR_SHIFT, _inverse_root()),
)
"""`unit` is 2**(30 - fraction)."""
