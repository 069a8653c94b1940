"""Bodies of standard integer operators for the operators of `qcompile.ir` that ONNX lacks.

Sums of products are uint8 x uint8 (codes and weights lifted by 128), the one pairing that onnxruntime computes exactly
on every x86 and in every release: with mixed signs AVX2 machines without VNNI saturate. A 16-bit operand is two of
them, one per byte. Pad, Max, Add and the like run in int32, since onnxruntime has none of them for int16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qcompile.ir import arith
from qcompile.ir.types import DType

OPSET = 13
"""The lowest standard operator set that has all that is needed; every newer onnxruntime still runs it."""

DOMAIN = "qcompile"

LIFT = 128
"""What turns int8 codes and weights into uint8."""

_UINT8, _INT32, _INT64 = 2, 6, 7
"""Element types, as the attribute of Cast spells them."""

_Body = list[str]


@dataclass(frozen=True, slots=True)
class Function:
    """What a node may call: `head` and `body` in ONNX's textual syntax, and the functions that the body calls."""

    kind: str
    head: str
    body: tuple[str, ...]
    calls: tuple[Function, ...] = ()

    def text(self, name: str) -> str:
        """The whole function, called `name`."""
        lines = "".join(f"  {line}\n" for line in self.body)
        imports = f'"" : {OPSET}, "{DOMAIN}" : 1'
        return f'<domain: "{DOMAIN}", opset_import: [{imports}]>\n{name} {self.head} {{\n{lines}}}'


@dataclass(frozen=True, slots=True)
class Sweep:
    """A window along one spatial axis of padded extent `extent`."""

    extent: int
    size: int
    stride: int
    dilation: int

    @property
    def reach(self) -> int:
        """How far the first tap travels, itself included."""
        return (self.extent - (self.size - 1) * self.dilation - 1) // self.stride * self.stride + 1


def _integer(name: str, value: int) -> str:
    return f"{name} = Constant <value_int = {value}> ()"


def _row(name: str, values: Sequence[int]) -> str:
    """A tensor: shape inference in onnxruntime 1.20 takes lists (`value_ints`) for scalars."""
    return f"{name} = Constant <value = int64[{len(values)}] {{{', '.join(map(str, values))}}}> ()"


def _attribute(name: str) -> str:
    return f"{name} = Constant <value_int: int = @{name}> ()"


def _minus(x: str, zero: str, result: str) -> _Body:
    """Int32 `result` = x - attribute `zero`."""
    return [
        f"{x}_wide = Cast <to = {_INT32}> ({x})",
        f"{zero}_long = Constant <value_int: int = @{zero}> ()",
        f"{zero}_wide = Cast <to = {_INT32}> ({zero}_long)",
        f"{result} = Sub ({x}_wide, {zero}_wide)",
    ]


_FRAMED = [
    _attribute("pad_value"),
    f"fill = Cast <to = {_INT32}> (pad_value)",
    "padded = Pad (wide, frame, fill)",
]
"""`padded` = int32 `wide` with `pad_value` around it, as wide as `frame` says.

The widths are an input, because shape inference in onnxruntime 1.20 knows no list of a function's attributes.
"""


PAD = Function(
    "Pad",
    "<pad_value, to> (x, frame) => (y)",
    (f"wide = Cast <to = {_INT32}> (x)", *_FRAMED, "y = Cast <to: int = @to> (padded)"),
)

MUL = Function(
    "Mul",
    "<zero_x, zero_y> (x, y) => (z)",
    (*_minus("x", "zero_x", "left"), *_minus("y", "zero_y", "right"), "z = Mul (left, right)"),
)

LUT = Function(
    "Lut",
    "<lowest> (x, table) => (y)",
    (*_minus("x", "lowest", "index"), "y = Gather <axis = 0> (table, index)"),
)


def extreme(largest: bool) -> Function:
    """The larger or the smaller."""
    kind = "Max" if largest else "Min"
    return Function(
        kind,
        "<to> (x, y) => (z)",
        (
            f"x_wide = Cast <to = {_INT32}> (x)",
            f"y_wide = Cast <to = {_INT32}> (y)",
            f"wide = {kind} (x_wide, y_wide)",
            "z = Cast <to: int = @to> (wide)",
        ),
    )


def arg_extreme(largest: bool) -> Function:
    """Where the largest or smallest stands."""
    kind = "ArgMax" if largest else "ArgMin"
    return Function(
        kind,
        "<axis, last> (x) => (y)",
        (
            f"wide = Cast <to = {_INT32}> (x)",
            f"place = {kind} <axis: int = @axis, keepdims = 1, select_last_index: int = @last> (wide)",
            f"y = Cast <to = {_INT32}> (place)",
        ),
    )


def conv(dtype: DType, rank: int) -> Function:
    """Channels first, an explicit border (ConvInteger's own is its zero point), the product, channels last."""
    spatial = range(1, rank + 1)
    kind, lines = _products(
        dtype,
        "padded",
        "ConvInteger <strides: ints = @strides, dilations: ints = @dilations, group: int = @group>",
    )
    return Function(
        f"Conv{rank}d_{kind}",
        "<strides, dilations, group, pad_value> (x, w, b, frame) => (y)",
        (
            f"first = Transpose <perm = {[0, rank + 1, *spatial]}> (x)",
            f"wide = Cast <to = {_INT32}> (first)",
            *_FRAMED,
            *lines,
            f"last = Transpose <perm = {[0, *(i + 1 for i in spatial), 1]}> (sums)",
            "y = Add (last, b)",
        ),
    )


def matmul(dtype: DType) -> Function:
    """Multiply by the transposed weights and add the bias."""
    kind, lines = _products(dtype, "wide", "MatMulInteger")
    return Function(
        f"MatMul_{kind}",
        "(x, w, b) => (y)",
        (f"wide = Cast <to = {_INT32}> (x)", *lines, "y = Add (sums, b)"),
    )


def batch_matmul(x: DType, y: DType) -> Function:
    """The product of two activations; zero points are those of the uint8 codes."""
    body: _Body = []
    for name, dtype in (("x", x), ("y", y)):
        body += [
            f"{name}_long = Constant <value_int: int = @zero_{name}> ()",
            f"{name}_zero = Cast <to = {_UINT8}> ({name}_long)",
        ]
        if dtype.signed:
            body += [
                f"{name}_lift = Constant <value = int32 {{{LIFT}}}> ()",
                f"{name}_wide = Cast <to = {_INT32}> ({name})",
                f"{name}_lifted = Add ({name}_wide, {name}_lift)",
                f"{name}_codes = Cast <to = {_UINT8}> ({name}_lifted)",
            ]
    left, right = (n + "_codes" if d.signed else n for n, d in (("x", x), ("y", y)))
    kinds = "_".join("int8" if d.signed else "uint8" for d in (x, y))
    return Function(
        f"BatchMatMul_{kinds}",
        "<zero_x, zero_y> (x, y) => (z)",
        (*body, f"z = MatMulInteger ({left}, {right}, x_zero, y_zero)"),
    )


def _products(dtype: DType, x: str, product: str) -> tuple[str, _Body]:
    """How codes enter a product, and int32 `sums` = the products of int32 codes `x` with uint8 weights `w`."""
    zeros = [
        f"half = Constant <value = uint8 {{{LIFT}}}> ()",
        "none = Constant <value = uint8 {0}> ()",
    ]
    if not dtype.signed:
        return "uint8", [
            *zeros,
            f"codes = Cast <to = {_UINT8}> ({x})",
            f"sums = {product} (codes, w, none, half)",
        ]
    if dtype.bits <= 8:
        return "int8", [
            zeros[0],
            f"lift = Constant <value = int32 {{{LIFT}}}> ()",
            f"lifted = Add ({x}, lift)",
            f"codes = Cast <to = {_UINT8}> (lifted)",
            f"sums = {product} (codes, w, half, half)",
        ]
    return "int16", [
        *zeros,
        f"lift = Constant <value = int32 {{{LIFT << 8}}}> ()",
        "byte = Constant <value = int32 {256}> ()",
        f"lifted = Add ({x}, lift)",
        "high = Div (lifted, byte)",
        "rest = Mul (high, byte)",
        "low = Sub (lifted, rest)",
        f"high_codes = Cast <to = {_UINT8}> (high)",
        f"low_codes = Cast <to = {_UINT8}> (low)",
        f"high_sums = {product} (high_codes, w, half, half)",
        f"low_sums = {product} (low_codes, w, none, half)",
        # 256 times the upper sum may leave 32 bits where the whole does not.
        f"high_wide = Cast <to = {_INT64}> (high_sums)",
        f"low_wide = Cast <to = {_INT64}> (low_sums)",
        _integer("weight", 256),
        "weighted = Mul (high_wide, weight)",
        "both = Add (weighted, low_wide)",
        f"sums = Cast <to = {_INT32}> (both)",
    ]


_FLOOR_SHIFT = Function(
    "FloorShift",
    "(v, step) => (q)",
    (
        # Div of a negative number would round towards zero, so the dividend is made positive first.
        _integer("lift", 1 << 62),
        "lifted = Add (v, lift)",
        "high = Div (lifted, step)",
        "down = Div (lift, step)",
        "q = Sub (high, down)",
    ),
)
"""floor(v / step) for a power of two `step` up to 2**62 and |v| < 2**62."""


def _rounded(total: str) -> _Body:
    """`shifted` = total / step, rounded half up."""
    return [
        _integer("two", 2),
        "half_step = Div (step, two)",
        f"raised = Add ({total}, half_step)",
        f"shifted = {DOMAIN}.FloorShift (raised, step)",
    ]


_CLAMPED = [
    _attribute("lo"),
    _attribute("hi"),
    "clamped = Clip (placed, lo, hi)",
    "y = Cast <to: int = @to> (clamped)",
]


def rescale(accs: int, vals: int) -> Function:
    """The arithmetic contract; a pre-shift is part of a multiplier, and step = 2**f."""
    operands = [f"{x}{i}" for i in range(accs) for x in ("acc", "multiplier")]
    operands += [f"{x}{j}" for j in range(vals) for x in ("val", "factor")]
    zeros = [f"zero{j}" for j in range(vals)]
    body = [_integer("word", 1 << 32)] if accs else []
    for i in range(accs):
        body += [
            f"acc{i}_wide = Cast <to = {_INT64}> (acc{i})",
            f"product{i} = Mul (acc{i}_wide, multiplier{i})",
            f"term{i} = {DOMAIN}.FloorShift (product{i}, word)",
        ]
    for j, zero in enumerate(zeros):
        body += [
            f"val{j}_wide = Cast <to = {_INT64}> (val{j})",
            _attribute(zero),
            f"centred{j} = Sub (val{j}_wide, {zero})",
            f"term{accs + j} = Mul (centred{j}, factor{j})",
        ]
    total = "term0"
    for k in range(1, accs + vals):
        body.append(f"total{k} = Add ({total}, term{k})")
        total = f"total{k}"
    return Function(
        f"Rescale_{accs}acc_{vals}val",
        f"<{', '.join([*zeros, 'zero_point', 'lo', 'hi', 'to'])}> ({', '.join([*operands, 'step'])}) => (y)",
        (
            *body,
            *_rounded(total),
            _attribute("zero_point"),
            "placed = Add (shifted, zero_point)",
            *_CLAMPED,
        ),
        (_FLOOR_SHIFT,),
    )


def _shifted(result: str, a: str, b: str, step: str) -> _Body:
    """`result` = floor(a * b / step)."""
    return [
        f"{result}_product = Mul ({a}, {b})",
        f"{result} = {DOMAIN}.FloorShift ({result}_product, {step})",
    ]


def _reciprocal() -> Function:
    """The steps of `arith.reciprocal`."""
    body = [
        _integer("q30", 1 << 30),
        _integer("q31", 1 << 31),
        _integer("slope", int(arith.LINE_SLOPE)),
        _integer("start", int(arith.LINE_CONSTANT)),
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
    return Function("Reciprocal", "(s) => (r)", tuple(body), (_FLOOR_SHIFT,))


SOFTMAX = Function(
    "Softmax",
    "<unit, lo, hi, to> (x, table) => (y)",
    (
        f"wide = Cast <to = {_INT64}> (x)",
        "largest = ReduceMax <axes = [-1], keepdims = 1> (wide)",
        "below = Sub (largest, wide)",
        "found = Gather <axis = 0> (table, below)",
        f"e = Cast <to = {_INT64}> (found)",
        _row("row", [-1]),
        "total = ReduceSum <keepdims = 1> (e, row)",
        # The place of the highest bit is the number of powers of two, from 2 on, that the total reaches.
        _row("powers", [1 << k for k in range(31)]),
        _row("marks", [1 << k for k in range(1, 31)]),
        "reached = GreaterOrEqual (total, marks)",
        f"counted = Cast <to = {_INT64}> (reached)",
        "top = ReduceSum <keepdims = 1> (counted, row)",
        _integer("highest", 30),
        "room = Sub (highest, top)",
        "scale = Gather <axis = 0> (powers, room)",
        "aligned = Mul (total, scale)",
        f"inverse = {DOMAIN}.Reciprocal (aligned)",
        "product = Mul (e, inverse)",
        _attribute("unit"),
        "size = Gather <axis = 0> (powers, top)",
        "step = Mul (size, unit)",
        *_rounded("product"),
        "lowest = Constant <value_int: int = @lo> ()",
        "placed = Add (shifted, lowest)",
        *_CLAMPED,
    ),
    (_FLOOR_SHIFT, _reciprocal()),
)
"""`unit` is 2**(31 - bits of the result)."""


def _inverse_root() -> Function:
    """The steps of `arith.inverse_root`; `count` is its k + 15."""
    body = [
        _row("row", [-1]),
        _row("fours", [1 << 2 * i for i in range(1, 31)]),
        "reached = GreaterOrEqual (v, fours)",
        f"counted = Cast <to = {_INT64}> (reached)",
        "count = ReduceSum <keepdims = 1> (counted, row)",
        _row("ups", [1 << 2 * max(15 - i, 0) for i in range(31)]),
        _row("downs", [1 << 2 * max(i - 15, 0) for i in range(31)]),
        "up = Gather <axis = 0> (ups, count)",
        "down = Gather <axis = 0> (downs, count)",
        *_shifted("s", "v", "up", "down"),
        *(_integer(f"q{bits}", 1 << bits) for bits in (29, 31, 32)),
        _integer("three", int(arith.ROOT_THREE)),
        _integer("slope", int(arith.ROOT_SLOPE)),
        _integer("start", int(arith.ROOT_CONSTANT)),
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
    return Function("InverseRoot", "(v) => (r, count)", tuple(body), (_FLOOR_SHIFT,))


NORMALIZE = Function(
    "Normalize",
    "<entries, epsilon, unit, lo, hi, to> (x) => (y)",
    (
        f"wide = Cast <to = {_INT64}> (x)",
        _row("row", [-1]),
        _attribute("entries"),
        _attribute("epsilon"),
        _attribute("unit"),
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
        _row("powers", [1 << k for k in range(31)]),
        "size = Gather <axis = 0> (powers, count)",
        "step = Mul (size, unit)",
        *_rounded("product"),
        "placed = Identity (shifted)",
        *_CLAMPED,
    ),
    (_FLOOR_SHIFT, _inverse_root()),
)
"""`unit` is 2**(30 - fraction)."""


def max_pool(frame: list[int], fill: int, sweeps: list[Sweep]) -> Function:
    """The largest of each window; onnxruntime's own MaxPool takes no int16."""
    return Function(
        "MaxPool",
        "<to> (x) => (y)",
        (
            f"wide = Cast <to = {_INT32}> (x)",
            *_swept("Max", frame, fill, sweeps),
            "y = Cast <to: int = @to> (swept)",
        ),
    )


def sum_pool(frame: list[int], sweeps: list[Sweep]) -> Function:
    """The sum of each window, less the zero point at every element."""
    return Function(
        "SumPool",
        "<zero_point> (x) => (swept)",
        (*_minus("x", "zero_point", "wide"), *_swept("Add", frame, 0, sweeps)),
    )


def _swept(
    combine: Literal["Max", "Add"], frame: list[int], fill: int, sweeps: list[Sweep]
) -> _Body:
    """`swept` = int32 `wide`, combined under each window one axis after the other."""
    body = [
        _row("frame", frame),
        f"fill = Constant <value = int32 {{{fill}}}> ()",
        "padded = Pad (wide, frame, fill)",
    ]
    source = "padded"
    for i, sweep in enumerate(sweeps):
        result = "swept" if i == len(sweeps) - 1 else f"swept{i}"
        body.append(_row(f"axis{i}", [i + 1]))
        if sweep.size != sweep.extent:
            body += _taps(combine, i, sweep, source, result)
        elif combine == "Max":
            body.append(f"{result} = ReduceMax <axes = [{i + 1}], keepdims = 1> ({source})")
        else:
            body.append(f"{result} = ReduceSum <keepdims = 1> ({source}, axis{i})")
        source = result
    return body


def _taps(combine: str, i: int, sweep: Sweep, source: str, result: str) -> _Body:
    body = [_row(f"stride{i}", [sweep.stride])]
    for k in range(sweep.size):
        at, first = f"{i}_{k}", k * sweep.dilation
        so_far = result if k == sweep.size - 1 else f"upto{at}"
        tap = f"tap{at}" if k else so_far
        body += [
            _row(f"from{at}", [first]),
            _row(f"to{at}", [first + sweep.reach]),
            f"{tap} = Slice ({source}, from{at}, to{at}, axis{i}, stride{i})",
        ]
        if k:
            body.append(f"{so_far} = {combine} (upto{i}_{k - 1}, {tap})")
    return body
