"""Bodies of standard integer operators for the operators of `qcompile.ir` that ONNX lacks.

Sums of products are uint8 x uint8 (codes and weights lifted by 128), the one pairing that onnxruntime computes exactly
on every x86 and in every release: with mixed signs AVX2 machines without VNNI saturate. A 16-bit operand is two of
them, one per byte. Pad, Max, Add and the like run in int32, since onnxruntime has none of them for int16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qcompile.ir.types import DType

OPSET = 13
"""The lowest standard operator set that has all that is needed; every newer onnxruntime still runs it."""

DOMAIN = "qcompile"

LIFT = 128
"""What turns int8 codes and weights into uint8."""

UINT8, INT32, INT64 = 2, 6, 7
"""Element types, as the attribute of Cast spells them."""

Body = list[str]


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


def integer(name: str, value: int) -> str:
    """A scalar."""
    return f"{name} = Constant <value_int = {value}> ()"


def row(name: str, values: Sequence[int]) -> str:
    """A tensor: shape inference in onnxruntime 1.20 takes lists (`value_ints`) for scalars."""
    return f"{name} = Constant <value = int64[{len(values)}] {{{', '.join(map(str, values))}}}> ()"


def attribute(name: str) -> str:
    """A scalar that the calling node gives."""
    return f"{name} = Constant <value_int: int = @{name}> ()"


def _minus(x: str, zero: str, result: str) -> Body:
    """Int32 `result` = x - attribute `zero`."""
    return [
        f"{x}_wide = Cast <to = {INT32}> ({x})",
        f"{zero}_long = Constant <value_int: int = @{zero}> ()",
        f"{zero}_wide = Cast <to = {INT32}> ({zero}_long)",
        f"{result} = Sub ({x}_wide, {zero}_wide)",
    ]


_FRAMED = [
    attribute("pad_value"),
    f"fill = Cast <to = {INT32}> (pad_value)",
    "padded = Pad (wide, frame, fill)",
]
"""`padded` = int32 `wide` with `pad_value` around it, as wide as `frame` says.

The widths are an input, because shape inference in onnxruntime 1.20 knows no list of a function's attributes.
"""


PAD = Function(
    "Pad",
    "<pad_value, to> (x, frame) => (y)",
    (f"wide = Cast <to = {INT32}> (x)", *_FRAMED, "y = Cast <to: int = @to> (padded)"),
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
            f"x_wide = Cast <to = {INT32}> (x)",
            f"y_wide = Cast <to = {INT32}> (y)",
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
            f"wide = Cast <to = {INT32}> (x)",
            f"place = {kind} <axis: int = @axis, keepdims = 1, select_last_index: int = @last> (wide)",
            f"y = Cast <to = {INT32}> (place)",
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
            f"wide = Cast <to = {INT32}> (first)",
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
        (f"wide = Cast <to = {INT32}> (x)", *lines, "y = Add (sums, b)"),
    )


def batch_matmul(x: DType, y: DType) -> Function:
    """The product of two activations; zero points are those of the uint8 codes."""
    body: Body = []
    for name, dtype in (("x", x), ("y", y)):
        body += [
            f"{name}_long = Constant <value_int: int = @zero_{name}> ()",
            f"{name}_zero = Cast <to = {UINT8}> ({name}_long)",
        ]
        if dtype.signed:
            body += [
                f"{name}_lift = Constant <value = int32 {{{LIFT}}}> ()",
                f"{name}_wide = Cast <to = {INT32}> ({name})",
                f"{name}_lifted = Add ({name}_wide, {name}_lift)",
                f"{name}_codes = Cast <to = {UINT8}> ({name}_lifted)",
            ]
    left, right = (n + "_codes" if d.signed else n for n, d in (("x", x), ("y", y)))
    kinds = "_".join("int8" if d.signed else "uint8" for d in (x, y))
    return Function(
        f"BatchMatMul_{kinds}",
        "<zero_x, zero_y> (x, y) => (z)",
        (*body, f"z = MatMulInteger ({left}, {right}, x_zero, y_zero)"),
    )


def _products(dtype: DType, x: str, product: str) -> tuple[str, Body]:
    """How codes enter a product, and int32 `sums` = the products of int32 codes `x` with uint8 weights `w`."""
    zeros = [
        f"half = Constant <value = uint8 {{{LIFT}}}> ()",
        "none = Constant <value = uint8 {0}> ()",
    ]
    if not dtype.signed:
        return "uint8", [
            *zeros,
            f"codes = Cast <to = {UINT8}> ({x})",
            f"sums = {product} (codes, w, none, half)",
        ]
    if dtype.bits <= 8:
        return "int8", [
            zeros[0],
            f"lift = Constant <value = int32 {{{LIFT}}}> ()",
            f"lifted = Add ({x}, lift)",
            f"codes = Cast <to = {UINT8}> (lifted)",
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
        f"high_codes = Cast <to = {UINT8}> (high)",
        f"low_codes = Cast <to = {UINT8}> (low)",
        f"high_sums = {product} (high_codes, w, half, half)",
        f"low_sums = {product} (low_codes, w, none, half)",
        # 256 times the upper sum may leave 32 bits where the whole does not.
        f"high_wide = Cast <to = {INT64}> (high_sums)",
        f"low_wide = Cast <to = {INT64}> (low_sums)",
        integer("weight", 256),
        "weighted = Mul (high_wide, weight)",
        "both = Add (weighted, low_wide)",
        f"sums = Cast <to = {INT32}> (both)",
    ]


FLOOR_SHIFT = Function(
    "FloorShift",
    "(v, step) => (q)",
    (
        # Div of a negative number would round towards zero, so the dividend is made positive first.
        integer("lift", 1 << 62),
        "lifted = Add (v, lift)",
        "high = Div (lifted, step)",
        "down = Div (lift, step)",
        "q = Sub (high, down)",
    ),
)
"""floor(v / step) for a power of two `step` up to 2**62 and |v| < 2**62."""


def rounded(total: str) -> Body:
    """`shifted` = total / step, rounded half up."""
    return [
        integer("two", 2),
        "half_step = Div (step, two)",
        f"raised = Add ({total}, half_step)",
        f"shifted = {DOMAIN}.FloorShift (raised, step)",
    ]


CLAMPED = [
    attribute("lo"),
    attribute("hi"),
    "clamped = Clip (placed, lo, hi)",
    "y = Cast <to: int = @to> (clamped)",
]


def rescale(accs: int, vals: int) -> Function:
    """The arithmetic contract; a pre-shift is part of a multiplier, and step = 2**f."""
    operands = [f"{x}{i}" for i in range(accs) for x in ("acc", "multiplier")]
    operands += [f"{x}{j}" for j in range(vals) for x in ("val", "factor")]
    zeros = [f"zero{j}" for j in range(vals)]
    body = [integer("word", 1 << 32)] if accs else []
    for i in range(accs):
        body += [
            f"acc{i}_wide = Cast <to = {INT64}> (acc{i})",
            f"product{i} = Mul (acc{i}_wide, multiplier{i})",
            f"term{i} = {DOMAIN}.FloorShift (product{i}, word)",
        ]
    for j, zero in enumerate(zeros):
        body += [
            f"val{j}_wide = Cast <to = {INT64}> (val{j})",
            attribute(zero),
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
            *rounded(total),
            attribute("zero_point"),
            "placed = Add (shifted, zero_point)",
            *CLAMPED,
        ),
        (FLOOR_SHIFT,),
    )


def max_pool(frame: list[int], fill: int, sweeps: list[Sweep]) -> Function:
    """The largest of each window; onnxruntime's own MaxPool takes no int16."""
    return Function(
        "MaxPool",
        "<to> (x) => (y)",
        (
            f"wide = Cast <to = {INT32}> (x)",
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
) -> Body:
    """`swept` = int32 `wide`, combined under each window one axis after the other."""
    body = [
        row("frame", frame),
        f"fill = Constant <value = int32 {{{fill}}}> ()",
        "padded = Pad (wide, frame, fill)",
    ]
    source = "padded"
    for i, sweep in enumerate(sweeps):
        result = "swept" if i == len(sweeps) - 1 else f"swept{i}"
        body.append(row(f"axis{i}", [i + 1]))
        if sweep.size != sweep.extent:
            body += _taps(combine, i, sweep, source, result)
        elif combine == "Max":
            body.append(f"{result} = ReduceMax <axes = [{i + 1}], keepdims = 1> ({source})")
        else:
            body.append(f"{result} = ReduceSum <keepdims = 1> ({source}, axis{i})")
        source = result
    return body


def _taps(combine: str, i: int, sweep: Sweep, source: str, result: str) -> Body:
    body = [row(f"stride{i}", [sweep.stride])]
    for k in range(sweep.size):
        at, first = f"{i}_{k}", k * sweep.dilation
        so_far = result if k == sweep.size - 1 else f"upto{at}"
        tap = f"tap{at}" if k else so_far
        body += [
            row(f"from{at}", [first]),
            row(f"to{at}", [first + sweep.reach]),
            f"{tap} = Slice ({source}, from{at}, to{at}, axis{i}, stride{i})",
        ]
        if k:
            body.append(f"{so_far} = {combine} (upto{i}_{k - 1}, {tap})")
    return body
