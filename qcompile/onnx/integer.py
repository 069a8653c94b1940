"""The integer graph as a standard ONNX model that any onnxruntime from 1.20 on runs to the same bits.

Every operator that ONNX lacks is a model-local function of domain `qcompile` whose body is standard integer operators;
functions are shared by all nodes of one signature and take their numbers as inputs and attributes. Sums of products
are uint8 x uint8 (`ConvInteger`, `MatMulInteger`, codes and weights lifted by 128), the one pairing that onnxruntime
computes exactly on every x86 and in every release: with mixed signs AVX2 machines without VNNI saturate.
A 16-bit operand is two of them, one per byte.

The meaning of the borders stands in `metadata_props`: `qcompile.inputs` and `qcompile.outputs` are JSON lists, in
the model's order, of {"name", "dtype", "scale", "zero_point"}, with real = scale * (code - zero_point).
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper, parser

from qcompile.ir import Graph, Node, Port, Value, arith, ops
from qcompile.ir.types import DType

OPSET = 13
"""The lowest standard operator set that has all that is needed; every newer onnxruntime still runs it."""

IR_VERSION = 8
"""The first file format with model-local functions."""

DOMAIN = "qcompile"

WEIGHT_ZERO = 128
"""What lifts int8 weights to the uint8 initializers of ConvInteger and MatMulInteger."""

_INT32, _INT64, _UINT8 = 6, 7, 2
"""Element types, as the attribute of Cast spells them."""

_Attribute = int | str | Sequence[int]
_Body = list[str]


def export(graph: Graph) -> onnx.ModelProto:
    """Return the model that equals `graph.run` on every element; the same graph gives the same model."""
    return _Exporter(graph).model()


class _Exporter:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.functions: dict[tuple[str, str], onnx.FunctionProto] = {}
        self._stored: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._taken = {port.name for port, _ in (*graph.inputs, *graph.outputs)}
        self._taken_nodes: set[str] = set()
        self._names: dict[Value, str] = {v: port.name for port, v in graph.inputs}
        for port, v in graph.outputs:
            if v.producer is not None:
                self._names.setdefault(v, port.name)

    def model(self) -> onnx.ModelProto:
        graph = self.graph
        for node in graph.nodes:
            self._node(node)
        for port, v in graph.outputs:
            if (name := self._name(v)) != port.name:
                self._emit("Identity", [name], port.name, port.name)
        body = helper.make_graph(
            self.nodes,
            graph.name or "integer",
            [self._border(port, v) for port, v in graph.inputs],
            [self._border(port, v) for port, v in graph.outputs],
            self.initializers,
        )
        model = helper.make_model(
            body,
            functions=list(self.functions.values()),
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
            ir_version=IR_VERSION,
            producer_name=DOMAIN,
        )
        helper.set_model_props(
            model,
            {"qcompile.inputs": _ports(graph.inputs), "qcompile.outputs": _ports(graph.outputs)},
        )
        return model

    def _border(self, port: Port, v: Value) -> onnx.ValueInfoProto:
        shape: list[int | str] = list(v.type.shape)
        if self.graph.free_batch and shape:
            shape[0] = "N"
        return helper.make_tensor_value_info(port.name, _element(v.type.dtype), shape)

    def _name(self, v: Value) -> str:
        if v not in self._names:
            self._names[v] = (
                _fresh(v.name, self._taken) if v.const is None else self._constant(v.const, v.name)
            )
        return self._names[v]

    def _constant(self, array: NDArray[np.generic], hint: str) -> str:
        """The initializer that holds `array`; equal arrays are stored once."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._stored:
            name = self._stored[key] = _fresh(hint, self._taken)
            self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return self._stored[key]

    def _row(self, entries: Sequence[int], hint: str) -> str:
        return self._constant(np.array(entries, np.int64), hint)

    def _emit(
        self,
        op_type: str,
        inputs: Sequence[str],
        output: str,
        name: str,
        domain: str = "",
        **attributes: _Attribute,
    ) -> None:
        self.nodes.append(
            helper.make_node(
                op_type,
                inputs,
                [output],
                name=_fresh(name, self._taken_nodes),
                domain=domain,
                **attributes,
            )
        )

    def _call(
        self,
        node: Node,
        kind: str,
        head: str,
        body: _Body,
        inputs: Sequence[str] = (),
        **attributes: _Attribute,
    ) -> None:
        """A node that calls the function `kind` on `inputs`, the operands by default."""
        name = self._function(kind, head, body)
        names = inputs or [self._name(v) for v in node.inputs]
        self._emit(name, names, self._name(node.output), node.name, DOMAIN, **attributes)

    def _function(self, kind: str, head: str, body: _Body) -> str:
        """The name of the function; the second body of a kind and those after it are numbered."""
        text = f"{head} {{\n{_lines(body)}}}"
        if (kind, text) not in self.functions:
            count = sum(k == kind for k, _ in self.functions)
            name = f"{kind}_{count + 1}" if count else kind
            self.functions[kind, text] = parser.parse_function(
                f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}, "{DOMAIN}" : 1]>\n{name} {text}'
            )
        return self.functions[kind, text].name

    def _node(self, node: Node) -> None:
        out, at, to = node.output, node.output.name, _element(node.output.type.dtype)
        names = [self._name(v) for v in node.inputs[:1]]
        match node.op:
            case ops.Conv() as op:
                self._conv(op, node)
            case ops.MatMul():
                self._matmul(node)
            case ops.Rescale() as op:
                self._rescale(op, node)
            case ops.Mul(zero_x=zx, zero_y=zy):
                head = "<zero_x, zero_y> (x, y) => (z)"
                self._call(node, "Mul", head, _MUL, zero_x=zx, zero_y=zy)
            case ops.Lut():
                head = "<lowest> (x, table) => (y)"
                self._call(node, "Lut", head, _LUT, lowest=node.inputs[0].type.dtype.lo)
            case ops.MaxPool() as op:
                x = node.inputs[0].type
                lowest = int(np.iinfo(x.dtype.numpy).min)
                body = [
                    f"wide = Cast <to = {_INT32}> (x)",
                    *_windows(op, op.dilations, x.shape[1:-1], "Max", lowest),
                    "y = Cast <to: int = @to> (swept)",
                ]
                self._call(node, "MaxPool", "<to> (x) => (y)", body, to=to)
            case ops.SumPool(kernel=kernel, zero_point=z) as op:
                spatial, ones = node.inputs[0].type.shape[1:-1], (1,) * len(kernel)
                body = [
                    *_minus("x", "zero_point", "wide"),
                    *_windows(op, ones, spatial, "Add", 0),
                ]
                self._call(node, "SumPool", "<zero_point> (x) => (swept)", body, zero_point=z)
            case ops.Softmax(out=dtype):
                self._function("FloorShift", *_FLOOR_SHIFT)
                self._function("Reciprocal", *_reciprocal())
                head = "<unit, lo, hi, to> (x, table) => (y)"
                unit = 1 << (31 - dtype.bits)
                self._call(
                    node, "Softmax", head, _SOFTMAX, unit=unit, lo=dtype.lo, hi=dtype.hi, to=to
                )
            case ops.Pad(pads=pads, value=value):
                rank = len(pads) // 2
                frame = [0, *pads[:rank], 0, *pads[rank:]]
                head = "<pads, pad_value, to> (x) => (y)"
                self._call(node, "Pad", head, _PAD, pads=frame, pad_value=value, to=to)
            case ops.Concat(axis=axis):
                names = [self._name(v) for v in node.inputs]
                self._emit("Concat", names, self._name(out), node.name, axis=axis)
            case ops.Slice(starts=starts, ends=ends, steps=steps):
                names += [
                    self._row(starts, f"{at}.starts"),
                    self._row(ends, f"{at}.ends"),
                    self._row(range(1, len(starts) + 1), f"{at}.axes"),
                    self._row(steps, f"{at}.steps"),
                ]
                self._emit("Slice", names, self._name(out), node.name)
            case ops.Reshape(shape=shape):
                names.append(self._row(shape, f"{at}.shape"))
                self._emit("Reshape", names, self._name(out), node.name)
            case ops.Transpose(perm=perm):
                self._emit("Transpose", names, self._name(out), node.name, perm=perm)
            case _:
                raise TypeError(f"{node.name}: {node.op} has no ONNX form")

    def _matmul(self, node: Node) -> None:
        x, w, b = node.inputs
        kind = _operand(x.type.dtype)
        body = [
            f"wide = Cast <to = {_INT32}> (x)",
            *_products(kind, "MatMulInteger", "", "wide"),
            "y = Add (sums, b)",
        ]
        inputs = [self._name(x), self._constant(_lifted(w.constant.T), w.name), self._name(b)]
        self._call(node, f"MatMul_{kind}", "(x, w, b) => (y)", body, inputs)

    def _conv(self, op: ops.Conv, node: Node) -> None:
        """Pad explicitly (ConvInteger's own border is its zero point), channels first, product, channels last."""
        x, w, b = node.inputs
        rank, kind = len(op.strides), _operand(x.type.dtype)
        spatial = range(1, rank + 1)
        window = "<strides: ints = @strides, dilations: ints = @dilations, group: int = @group>"
        body = [
            f"first = Transpose <perm = {[0, rank + 1, *spatial]}> (x)",
            f"wide = Cast <to = {_INT32}> (first)",
            *_FRAMED,
            *_products(kind, "ConvInteger", window, "padded"),
            f"last = Transpose <perm = {[0, *(i + 1 for i in spatial), 1]}> (sums)",
            "y = Add (last, b)",
        ]
        weights = _lifted(np.moveaxis(w.constant, -1, 1))
        self._call(
            node,
            f"Conv{rank}d_{kind}",
            "<strides, pads, dilations, group, pad_value> (x, w, b) => (y)",
            body,
            [self._name(x), self._constant(weights, w.name), self._name(b)],
            strides=op.strides,
            pads=[0, 0, *op.pads[:rank], 0, 0, *op.pads[rank:]],
            dilations=op.dilations,
            group=op.groups,
            pad_value=op.pad_value,
        )

    def _rescale(self, op: ops.Rescale, node: Node) -> None:
        at, shape = node.output.name, op.parameter_shape(node.output.type.shape)

        def row(entries: Sequence[int], what: str) -> str:
            array = np.array(entries, np.int64)
            return self._constant(
                array if array.size == 1 else array.reshape(shape), f"{at}.{what}"
            )

        names, inputs = [], []
        for i, (acc, v) in enumerate(zip(op.accs, node.inputs, strict=False)):
            # (acc << p) * m is acc * (m << p), and m << p has at most 62 bits.
            shifted = np.left_shift(np.array(acc.multiplier, np.int64), np.array(acc.pre_shift))
            names += [f"acc{i}", f"multiplier{i}"]
            inputs += [self._name(v), row(shifted.tolist(), f"multiplier{i}")]
        for j, (val, v) in enumerate(zip(op.vals, node.inputs[len(op.accs) :], strict=True)):
            names += [f"val{j}", f"factor{j}"]
            inputs += [self._name(v), row(val.multiplier, f"factor{j}")]
        zeros = {f"zero{j}": val.zero_point for j, val in enumerate(op.vals)}
        attributes = ", ".join([*zeros, "zero_point", "lo", "hi", "to"])
        self._function("FloorShift", *_FLOOR_SHIFT)
        self._call(
            node,
            f"Rescale_{len(op.accs)}acc_{len(op.vals)}val",
            f"<{attributes}> ({', '.join([*names, 'step'])}) => (y)",
            _rescale_body(len(op.accs), len(op.vals)),
            [*inputs, row([1 << f for f in op.f], "step")],
            **zeros,
            zero_point=op.zero_point,
            lo=op.lo,
            hi=op.hi,
            to=_element(op.out),
        )


def _ports(ports: Sequence[tuple[Port, Value]]) -> str:
    return json.dumps(
        [
            {
                "name": port.name,
                "dtype": str(v.type.dtype),
                "scale": port.scale,
                "zero_point": port.zero_point,
            }
            for port, v in ports
        ]
    )


def _fresh(hint: str, taken: set[str]) -> str:
    name, count = hint or "unnamed", 1
    while name in taken:
        count += 1
        name = f"{hint or 'unnamed'}.{count}"
    taken.add(name)
    return name


def _element(dtype: DType) -> int:
    return int(helper.np_dtype_to_tensor_dtype(dtype.numpy))


def _operand(dtype: DType) -> str:
    """How the codes of an operand become uint8."""
    return "int16" if dtype.bits > 8 else "int8" if dtype.signed else "uint8"


def _lifted(w: NDArray[np.generic]) -> NDArray[np.uint8]:
    return (w.astype(np.int16) + WEIGHT_ZERO).astype(np.uint8)


def _lines(body: _Body) -> str:
    return "".join(f"  {line}\n" for line in body)


def _integer(name: str, value: int) -> str:
    return f"{name} = Constant <value_int = {value}> ()"


def _attribute(name: str) -> str:
    return f"{name} = Constant <value_int: int = @{name}> ()"


def _minus(x: str, zero: str, result: str) -> _Body:
    """result = int32 x - attribute `zero`."""
    return [
        f"{x}_wide = Cast <to = {_INT32}> ({x})",
        f"{zero}_long = Constant <value_int: int = @{zero}> ()",
        f"{zero}_wide = Cast <to = {_INT32}> ({zero}_long)",
        f"{result} = Sub ({x}_wide, {zero}_wide)",
    ]


_FRAMED = [
    "frame = Constant <value_ints: ints = @pads> ()",
    _attribute("pad_value"),
    f"fill = Cast <to = {_INT32}> (pad_value)",
    "padded = Pad (wide, frame, fill)",
]
"""padded = int32 `wide` with `pad_value` around it; onnxruntime pads no int16."""

_PAD = [
    f"wide = Cast <to = {_INT32}> (x)",
    *_FRAMED,
    "y = Cast <to: int = @to> (padded)",
]

_MUL = [
    *_minus("x", "zero_x", "left"),
    *_minus("y", "zero_y", "right"),
    "z = Mul (left, right)",
]

_LUT = [*_minus("x", "lowest", "index"), "y = Gather <axis = 0> (table, index)"]


def _products(kind: str, product: str, attributes: str, x: str) -> _Body:
    """sums = int32 products of int32 codes `x` with uint8 weights `w`."""

    def one(codes: str, zero: str, result: str) -> str:
        return f"{result} = {product} {attributes} ({codes}, w, {zero}, half)"

    half = f"half = Constant <value = uint8 {{{WEIGHT_ZERO}}}> ()"
    none = "none = Constant <value = uint8 {0}> ()"
    match kind:
        case "uint8":
            return [half, none, f"codes = Cast <to = {_UINT8}> ({x})", one("codes", "none", "sums")]
        case "int8":
            return [
                half,
                "lift = Constant <value = int32 {128}> ()",
                f"lifted = Add ({x}, lift)",
                f"codes = Cast <to = {_UINT8}> (lifted)",
                one("codes", "half", "sums"),
            ]
        case _:
            return [
                half,
                none,
                "lift = Constant <value = int32 {32768}> ()",
                "byte = Constant <value = int32 {256}> ()",
                f"lifted = Add ({x}, lift)",
                "high = Div (lifted, byte)",
                "rest = Mul (high, byte)",
                "low = Sub (lifted, rest)",
                f"high_codes = Cast <to = {_UINT8}> (high)",
                f"low_codes = Cast <to = {_UINT8}> (low)",
                one("high_codes", "half", "high_sums"),
                one("low_codes", "none", "low_sums"),
                f"high_wide = Cast <to = {_INT64}> (high_sums)",
                f"low_wide = Cast <to = {_INT64}> (low_sums)",
                _integer("weight", 256),
                "weighted = Mul (high_wide, weight)",
                "both = Add (weighted, low_wide)",
                f"sums = Cast <to = {_INT32}> (both)",
            ]


_FLOOR_SHIFT = (
    "(v, step) => (q)",
    [
        # Div of a negative number would round towards zero, so the dividend is made positive first.
        _integer("lift", 1 << 62),
        "lifted = Add (v, lift)",
        "high = Div (lifted, step)",
        "down = Div (lift, step)",
        "q = Sub (high, down)",
    ],
)
"""floor(v / step) for a power of two `step` up to 2**62 and |v| < 2**62."""


def _rescale_body(accs: int, vals: int) -> _Body:
    body, terms = [], []
    if accs:
        body.append(_integer("word", 1 << 32))
    for i in range(accs):
        body += [
            f"acc{i}_wide = Cast <to = {_INT64}> (acc{i})",
            f"product{i} = Mul (acc{i}_wide, multiplier{i})",
            f"term{i} = {DOMAIN}.FloorShift (product{i}, word)",
        ]
        terms.append(f"term{i}")
    for j in range(vals):
        body += [
            f"val{j}_wide = Cast <to = {_INT64}> (val{j})",
            _attribute(f"zero{j}"),
            f"centred{j} = Sub (val{j}_wide, zero{j})",
            f"value{j} = Mul (centred{j}, factor{j})",
        ]
        terms.append(f"value{j}")
    total = terms[0]
    for k, term in enumerate(terms[1:], 1):
        body.append(f"total{k} = Add ({total}, {term})")
        total = f"total{k}"
    return [
        *body,
        *_rounded(total),
        _attribute("zero_point"),
        "placed = Add (shifted, zero_point)",
        *_clamped("placed"),
    ]


def _rounded(total: str) -> _Body:
    """shifted = total / step, rounded half up."""
    return [
        _integer("two", 2),
        "half_step = Div (step, two)",
        f"raised = Add ({total}, half_step)",
        f"shifted = {DOMAIN}.FloorShift (raised, step)",
    ]


def _clamped(x: str) -> _Body:
    return [
        _attribute("lo"),
        _attribute("hi"),
        f"clamped = Clip ({x}, lo, hi)",
        "y = Cast <to: int = @to> (clamped)",
    ]


def _reciprocal() -> tuple[str, _Body]:
    """r = arith.reciprocal(s)."""

    def shift(result: str, a: str, b: str, step: str) -> _Body:
        return [
            f"{result}_product = Mul ({a}, {b})",
            f"{result} = {DOMAIN}.FloorShift ({result}_product, {step})",
        ]

    body = [
        _integer("q30", 1 << 30),
        _integer("q31", 1 << 31),
        _integer("slope", int(arith.LINE_SLOPE)),
        _integer("start", int(arith.LINE_CONSTANT)),
        *shift("fall", "s", "slope", "q31"),
        "x0 = Sub (start, fall)",
    ]
    for i, result in enumerate(("x1", "x2", "r")):
        body += [
            *shift(f"near{i}", "s", f"x{i}", "q30"),
            f"error{i} = Sub (q31, near{i})",
            *shift(f"change{i}", f"x{i}", f"error{i}", "q31"),
            f"{result} = Add (x{i}, change{i})",
        ]
    return "(s) => (r)", body


_SOFTMAX = [
    f"wide = Cast <to = {_INT64}> (x)",
    "largest = ReduceMax <axes = [-1], keepdims = 1> (wide)",
    "below = Sub (largest, wide)",
    "found = Gather <axis = 0> (table, below)",
    f"e = Cast <to = {_INT64}> (found)",
    "row = Constant <value_ints = [-1]> ()",
    "total = ReduceSum <keepdims = 1> (e, row)",
    # The place of the highest bit is the number of powers of two, from 2 on, that the total reaches.
    f"powers = Constant <value_ints = {[1 << k for k in range(31)]}> ()",
    f"marks = Constant <value_ints = {[1 << k for k in range(1, 31)]}> ()",
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
    *_clamped("placed"),
]


def _windows(
    op: ops.MaxPool | ops.SumPool,
    dilations: tuple[int, ...],
    spatial: tuple[int, ...],
    combine: str,
    fill: int,
) -> _Body:
    """swept = int32 `wide` combined (Max or Add) under each window, one axis after the other.

    onnxruntime's MaxPool takes no int16 and only borders smaller than its kernel; this takes all.
    """
    rank = len(spatial)
    frame = [0, *op.pads[:rank], 0, 0, *op.pads[rank:], 0]
    body = [
        f"frame = Constant <value_ints = {frame}> ()",
        f"fill = Constant <value = int32 {{{fill}}}> ()",
        "padded = Pad (wide, frame, fill)",
    ]
    source = "padded"
    for i, n in enumerate(spatial):
        extent = n + op.pads[i] + op.pads[rank + i]
        size, stride, dilation = op.kernel[i], op.strides[i], dilations[i]
        reach = (extent - (size - 1) * dilation - 1) // stride * stride + 1
        result = "swept" if i == rank - 1 else f"swept{i}"
        body.append(f"axis{i} = Constant <value_ints = [{i + 1}]> ()")
        if size == extent and combine == "Max":
            body.append(f"{result} = ReduceMax <axes = [{i + 1}], keepdims = 1> ({source})")
        elif size == extent:
            body.append(f"{result} = ReduceSum <keepdims = 1> ({source}, axis{i})")
        else:
            body.append(f"stride{i} = Constant <value_ints = [{stride}]> ()")
            for k in range(size):
                at, so_far = f"{i}_{k}", result if k == size - 1 else f"upto{i}_{k}"
                tap = f"tap{at}" if k else so_far
                body += [
                    f"from{at} = Constant <value_ints = [{k * dilation}]> ()",
                    f"to{at} = Constant <value_ints = [{k * dilation + reach}]> ()",
                    f"{tap} = Slice ({source}, from{at}, to{at}, axis{i}, stride{i})",
                ]
                if k:
                    body.append(f"{so_far} = {combine} (upto{i}_{k - 1}, {tap})")
        source = result
    return body
