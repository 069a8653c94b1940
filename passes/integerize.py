"""The dyadic rewrite: float graph and plan in, integer graph out (HAWQ-V3, Yao et al. 2021, section 3).

After it no float is left: scales have become integer multipliers with one rounding each, zero points have gone into
biases, layouts are channels-last. All constants come from exact fractions or single correctly rounded float64
operations, so that one plan gives the same bytes on every machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.errors import Unsupported
from qcompile.integerized import Integerized
from qcompile.ir import (
    ArgExtreme,
    Array,
    BatchMatMul,
    Concat,
    Conv,
    DType,
    Extreme,
    Graph,
    Lut,
    MatMul,
    MaxPool,
    Mul,
    Normalize,
    Op,
    Pad,
    Port,
    Rescale,
    Slice,
    Softmax,
    SumPool,
    Take,
    TensorType,
    Value,
)
from qcompile.ir.arith import AccOperand, Fit, Multipliers, NoRoom, Val, ValOperand, fit_rescale
from qcompile.ir.proof import accumulator_bound, code_range, prove, prove_rescale
from qcompile.ir.text import digest
from qcompile.plan import Quantizer, QuantPlan

from . import exact
from .codes import clamp_codes, product_codes, quantize, storage
from .layers import (
    Clamp,
    Index,
    Join,
    Layer,
    Linear,
    Normalized,
    Operand,
    Pooled,
    Product,
    Rescaled,
    SoftmaxLayer,
    Table,
    View,
    initializer,
    partition,
)
from .layout import Carried, Layout, channels_last
from .sums import settle
from .views import Cut, Framed, Largest, Permuted, Picked, Reshaped, counts, static_dims

Requant = Literal["dyadic", "shift", "khot"]
Shifts = Literal["channel", "layer"]
IoLayout = Literal["model", "nhwc"]


def integerize(
    model: ir.Model,
    plan: QuantPlan,
    *,
    name: str = "model",
    residual: bool = True,
    requant: Requant = "dyadic",
    digits: int = 3,
    shifts: Shifts = "channel",
    io_layout: IoLayout = "model",
    input_dtype: DType | None = None,
) -> Integerized:
    """Return the integer graph of a canonical float model whose plan is complete.

    Multipliers are any of 16 bits (`dyadic`), powers of two (`shift`) or sums of at most `digits` powers of two with
    signs (`khot`); with `shifts` by layer, an accumulator's channels share one shift.
    Raises Unsupported, naming the node, where an operator or a format has no integer form.
    """
    layers = partition(model, fuse_residual=residual)
    limits = Multipliers(
        {"dyadic": None, "shift": 1, "khot": digits}[requant], one_shift=shifts == "layer"
    )
    work = _Integerizer(model, plan, name, limits, io_layout, input_dtype)
    work.border_in()
    for layer in layers:
        try:
            work.layer(layer)
        except (TypeError, NoRoom, OverflowError) as e:
            raise Unsupported(
                f"node {layer.name}: {e}; give its tensors another format with --override, "
                "or keep this part of the model outside"
            ) from e
    work.border_out()
    graph = work.done.graph
    _drop_dead(graph)
    graph.verify()
    try:
        prove(graph)
        for node in graph.nodes:
            if isinstance(node.op, Rescale):
                prove_rescale(node)
    except OverflowError as e:
        raise Unsupported(f"{e}; use fewer weight bits for that layer (--override)") from e
    return work.done


def _drop_dead(graph: Graph) -> None:
    kept = {v for _, v in graph.outputs}
    for node in reversed(list(graph.nodes)):
        if not node.output.uses and node.output not in kept:
            graph.erase(node)


@dataclass(slots=True)
class _Sum:
    """What one Rescale adds up: accumulators, then values with their signs."""

    accs: list[tuple[Value, AccOperand]] = field(default_factory=list)
    vals: list[tuple[Value, ValOperand, int]] = field(default_factory=list)
    spatial: bool = False


class _Integerizer:
    def __init__(
        self,
        model: ir.Model,
        plan: QuantPlan,
        name: str,
        multipliers: Multipliers,
        io_layout: IoLayout,
        input_dtype: DType | None,
    ) -> None:
        self.model = model
        self.plan = plan
        self.multipliers = multipliers
        self.io_layout = io_layout
        self.input_dtype = input_dtype
        free = all(
            v.shape is not None and len(v.shape.dims) > 0 and not isinstance(v.shape.dims[0], int)
            for v in (*model.graph.inputs, *model.graph.outputs)
        )
        self.graph = Graph(name, free_batch=free)
        self.tensors = Layout(self.graph)
        self.done = Integerized(self.graph, self.tensors.origins)
        self.constants: dict[tuple[object, ...], Value] = {}

    # --- border -------------------------------------------------------------------------------------------------

    def border_in(self) -> None:
        for x in self.model.graph.inputs:
            name, q = str(x.name), self.quantizer(x)
            axes, shape = self.border_axes(x), static_dims(x)
            inner = storage(q.format)
            dtype = self.input_dtype or inner
            if dtype is not inner and (dtype is not DType.U8 or inner.bits > 8):
                raise Unsupported(
                    f"input {name}: codes of {q.format} do not come in as {dtype}; "
                    "leave its format and --input-dtype alike"
                )
            zero = q.zero_point[0] + (128 if dtype is DType.U8 else 0)
            kind = TensorType(dtype, tuple(shape[a] for a in axes))
            value = self.graph.add_input(Port(name, q.scale[0], zero), kind)
            if dtype is DType.U8:
                value = self.from_unsigned(value, inner, name)
            self.tensors.hold(name, Carried(value, axes))

    def from_unsigned(self, value: Value, out: DType, name: str) -> Value:
        """The same numbers as signed codes."""
        fit = fit_rescale([], [ValOperand(Fraction(1), 128, *code_range(value))], bits=16)
        op = Rescale(fit.accs, fit.vals, fit.f, 0, out.lo, out.hi, out)
        return self.graph.add(op, value, name=f"{name}:codes")

    def border_out(self) -> None:
        for y in self.model.graph.outputs:
            name = str(y.name)
            if name not in self.tensors:
                raise Unsupported(
                    f"output {name} is a constant of the model; leave it out and keep it outside"
                )
            q = self.quantizer(y)
            value = self.tensors.want(name, self.border_axes(y))
            self.graph.add_output(Port(name, q.scale[0], q.zero_point[0]), value)

    def border_axes(self, value: ir.Value) -> tuple[int, ...]:
        rank = len(static_dims(value))
        if rank == 0:
            raise Unsupported(f"{value.name} is a scalar without a batch axis; keep it outside")
        return channels_last(rank) if self.io_layout == "nhwc" else tuple(range(rank))

    # --- what is known about tensors ----------------------------------------------------------------------------

    def quantizer(self, value: ir.Value) -> Quantizer:
        """The quantizer of a whole tensor."""
        q = self.weight_quantizer(value)
        if len(q.scale) != 1:
            raise Unsupported(f"{value.name} has {len(q.scale)} scales; only weights have several")
        return q

    def weight_quantizer(self, value: ir.Value) -> Quantizer:
        """The quantizer of a tensor, which may have one scale per channel."""
        q = self.plan.of(str(value.name))
        if q is None:
            raise Unsupported(f"{value.name} has no quantizer; calibrate first")
        if not q.format.signed:
            raise Unsupported(
                f"{value.name}: {q.format} has no integer form here; use int{q.format.bits}"
            )
        return q

    def constant(self, name: str, array: NDArray[np.generic], dtype: DType) -> Value:
        """A constant, made once for a name and contents."""
        codes: Array = array.astype(dtype.numpy)
        key = (name, dtype, codes.shape, digest(codes))
        if key not in self.constants:
            self.constants[key] = self.graph.constant(codes, TensorType(dtype, codes.shape), name)
        return self.constants[key]

    # --- layers -------------------------------------------------------------------------------------------------

    def layer(self, layer: Layer) -> None:
        match layer:
            case Rescaled():
                self.rescaled(layer)
            case Table():
                self.table(layer)
            case SoftmaxLayer():
                self.softmax(layer)
            case View():
                self.view(layer)
            case Join():
                self.join(layer)
            case Normalized():
                self.normalized(layer)
            case Index():
                self.index(layer)

    def rescaled(self, layer: Rescaled) -> None:
        out, q = str(layer.out.name), self.quantizer(layer.out)
        step = Fraction(q.scale[0])
        if len(layer.terms) == 1 and isinstance(term := layer.terms[0], Operand):
            held, xq = self.tensors[str(term.value.name)], self.quantizer(term.value)
            made = self.requantize(layer.name, out, held.value, xq, q, layer.clamp)
            self.tensors.hold(out, Carried(made, held.axes, held.flat))
            return
        axes = self.axes(layer)
        parts = _Sum()
        for i, term in enumerate(layer.terms):
            match term:
                case Operand(value=value, sign=sign):
                    code, scale, zero = self.operand(value, axes)
                    operand = ValOperand(scale / step, zero, *code_range(code))
                    parts.vals.append((code, operand, sign))
                case _:
                    acc, scales = self.product(term, layer.name, f"{out}:acc{i or ''}", axes)
                    parts.spatial = isinstance(term, Pooled) and len(scales) > 1
                    assert acc.producer is not None
                    bound = tuple(int(b) for b in accumulator_bound(acc.producer))
                    parts.accs.append((acc, AccOperand(tuple(s / step for s in scales), bound)))
        made = self.emit_rescale(layer.name, out, parts, q, layer.clamp)
        self.tensors.hold(out, Carried(made, axes))

    def axes(self, layer: Rescaled) -> tuple[int, ...]:
        """The axis order a layer works in: channels-last for windows, else as its first operand stands."""
        rank = len(static_dims(layer.out))
        plain = tuple(range(rank))
        for term in layer.terms:
            match term:
                case Pooled():
                    return channels_last(rank)
                case Linear(node=node) | Product(node=node) if node.op_type != "Mul":
                    return channels_last(rank) if node.op_type == "Conv" else plain
                case _:
                    pass
        for term in layer.terms:
            value = term.value if isinstance(term, Operand) else term.x
            if str(value.name) in self.tensors:
                held = self.tensors[str(value.name)]
                if len(held.axes) == rank and not held.flat:
                    return held.axes
        return plain

    def operand(self, value: ir.Value, axes: tuple[int, ...]) -> tuple[Value, Fraction, int]:
        """Codes, scale and zero point of something that is added or multiplied."""
        q, rank = self.quantizer(value), len(axes)
        scale, zero = Fraction(q.scale[0]), q.zero_point[0]
        array = initializer(value)
        if array is not None:
            wide = np.asarray(array, np.float64)
            wide = wide.reshape((1,) * (rank - wide.ndim) + wide.shape).transpose(axes)
            return self.constant(str(value.name), quantize(wide, q), storage(q.format)), scale, zero
        return self.tensors.want(str(value.name), axes), scale, zero

    def requantize(
        self, layer: str, name: str, code: Value, xq: Quantizer, q: Quantizer, clamp: Clamp
    ) -> Value:
        """Codes of `xq` as codes of `q`, clamped."""
        ratio = Fraction(xq.scale[0]) / Fraction(q.scale[0])
        operand = ValOperand(ratio, xq.zero_point[0], *code_range(code))
        return self.emit_rescale(layer, name, _Sum(vals=[(code, operand, 1)]), q, clamp)

    def emit_rescale(self, layer: str, out: str, parts: _Sum, q: Quantizer, clamp: Clamp) -> Value:
        """One Rescale; where 32 bits have no room for its sum, its last accumulators go through int16 first."""
        found = settle(
            [a for _, a in parts.accs],
            [v for _, v, _ in parts.vals],
            q.format,
            self.multipliers,
        )
        accs = [v for v, _ in parts.accs]
        vals = [v for v, _, _ in parts.vals]
        signs = [sign for _, _, sign in parts.vals]
        for way in found.narrowed:
            label, i16 = f"{out}:wide{len(accs) - 1 or ''}", DType.I16
            op = Rescale(way.fit.accs, (), way.fit.f, 0, i16.lo, i16.hi, i16, parts.spatial)
            vals.append(self.add_rescale(op, way.fit, [accs.pop()], label, layer))
            signs.append(1)
        lo, hi = clamp_codes(clamp, q)
        fit = found.fit
        signed = tuple(map(_signed, fit.vals, signs))
        kind = storage(q.format)
        op = Rescale(fit.accs, signed, fit.f, q.zero_point[0], lo, hi, kind, parts.spatial)
        return self.add_rescale(op, fit, [*accs, *vals], out, layer)

    def add_rescale(
        self, op: Rescale, fit: Fit, operands: list[Value], name: str, layer: str
    ) -> Value:
        """Put it into the graph and its error on record."""
        self.done.multiplier_errors[name] = float(fit.multiplier_error)
        return self.graph.add(op, *operands, name=name, layer=layer)

    # --- accumulators -------------------------------------------------------------------------------------------

    def product(
        self, term: Linear | Pooled | Product, layer: str, label: str, axes: tuple[int, ...]
    ) -> tuple[Value, tuple[Fraction, ...]]:
        """An int32 accumulator and its real scale, one or one per channel (or position, for a pool)."""
        match term:
            case Linear():
                return self.linear(term, layer, label)
            case Pooled():
                return self.pooled(term, layer, label)
            case Product(node=node, x=x, y=y):
                a, sa, za = self.operand(x, axes)
                b, sb, zb = self.operand(y, axes)
                if node.op_type == "MatMul":
                    stacks = BatchMatMul(za, zb)
                    return self.graph.add(stacks, a, b, name=label, layer=layer), (sa * sb,)
                return self.graph.add(Mul(za, zb), a, b, name=label, layer=layer), (sa * sb,)

    def linear(self, term: Linear, layer: str, label: str) -> tuple[Value, tuple[Fraction, ...]]:
        x, name = str(term.x.name), str(term.weight.name)
        q, wq = self.quantizer(term.x), self.weight_quantizer(term.weight)
        codes, bias = product_codes(term, q, wq, self.plan)
        if term.node.op_type == "Conv":
            value, codes = (
                self.tensors.want(x, channels_last(codes.ndim)),
                np.moveaxis(codes, 1, -1),
            )
            a = term.node.attributes
            strides, pads, dilations = (
                tuple(a.get_ints(key)) for key in ("strides", "pads", "dilations")
            )
            op: Op = Conv(strides, pads, dilations, a.get_int("group", 1), q.zero_point[0])
        else:
            value, order = self.tensors.rows(x)
            op, codes = MatMul(), codes if order is None else codes[:, list(order)]
        w = self.constant(name, codes, storage(wq.format))
        b = self.constant(f"{layer}:bias", bias, DType.I32)
        scales = tuple(Fraction(q.scale[0]) * Fraction(s) for s in wq.scale)
        return self.graph.add(op, value, w, b, name=label, layer=layer), scales

    def pooled(self, term: Pooled, layer: str, label: str) -> tuple[Value, tuple[Fraction, ...]]:
        q, shape = self.quantizer(term.x), static_dims(term.x)
        x = self.tensors.want(str(term.x.name), channels_last(len(shape)))
        scale, zero = Fraction(q.scale[0]), q.zero_point[0]
        size, w = shape[2:], term.window
        if w is None:
            op = SumPool(size, (1,) * len(size), (0,) * (2 * len(size)), zero)
            each: tuple[int, ...] = (math.prod(size),)
        else:
            op = SumPool(w.kernel, w.strides, w.pads, zero)
            each = counts(term.node, size, w)
        acc = self.graph.add(op, x, name=label, layer=layer)
        return acc, tuple(scale / n for n in each)

    # --- everything else ----------------------------------------------------------------------------------------

    def table(self, layer: Table) -> None:
        xq, yq = self.quantizer(layer.x), self.quantizer(layer.out)
        held = self.tensors[str(layer.x.name)]
        if xq.format.bits > 8:
            raise TypeError(f"a table takes at most 8 bits, and {layer.x.name} is {xq.format}")
        lo, hi = code_range(held.value)
        kind, y = held.value.type.dtype, yq.format
        row = exact.table(
            self.model, layer.node, range(lo, hi + 1),
            xq.scale[0], xq.zero_point[0], yq.scale[0], yq.zero_point[0],
        )  # fmt: skip
        entries = [row[min(max(code, lo), hi) - lo] for code in range(kind.lo, kind.hi + 1)]
        clamped = np.array([min(max(v, y.lo), y.hi) for v in entries])
        table = self.constant(f"{layer.name}:table", clamped, storage(y))
        made = self.graph.add(Lut(), held.value, table, name=str(layer.out.name), layer=layer.name)
        self.tensors.hold(str(layer.out.name), Carried(made, held.axes, held.flat))

    def softmax(self, layer: SoftmaxLayer) -> None:
        q, yq = self.quantizer(layer.x), self.quantizer(layer.out)
        if q.format.bits > 8:
            raise TypeError(f"a Softmax takes at most 8 bits, and {layer.x.name} is {q.format}")
        if (yq.scale, yq.zero_point) != ((2.0**-yq.format.bits,), (yq.format.lo,)):
            raise TypeError(f"the result of a Softmax has scale 2**-{yq.format.bits} and no other")
        held = self.tensors.plain(str(layer.x.name))
        axes = (*(a for a in held.axes if a != layer.axis), layer.axis)
        x = self.tensors.want(str(layer.x.name), axes)
        fraction = 30 - max(1, (x.type.shape[-1]).bit_length())
        entries = np.array(exact.exponentials(1 << x.type.dtype.bits, q.scale[0], fraction))
        table = self.constant(f"{layer.name}:exp", entries, DType.I32)
        op = Softmax(fraction, storage(yq.format))
        made = self.graph.add(op, x, table, name=str(layer.out.name), layer=layer.name)
        self.tensors.hold(str(layer.out.name), Carried(made, axes))

    def join(self, layer: Join) -> None:
        out, q = str(layer.out.name), self.quantizer(layer.out)
        rank = len(static_dims(layer.out))
        known = [str(x.name) for x in layer.xs if str(x.name) in self.tensors]
        axes = self.tensors.plain(known[0]).axes if known else tuple(range(rank))
        parts = []
        for i, x in enumerate(layer.xs):
            array = initializer(x)
            if array is not None:
                codes = quantize(np.asarray(array, np.float64).transpose(axes), q)
                parts.append(self.constant(str(x.name), codes, storage(q.format)))
                continue
            code, xq = self.tensors.want(str(x.name), axes), self.quantizer(x)
            if xq != q:
                code = self.requantize(layer.name, f"{out}:in{i}", code, xq, q, Clamp())
            parts.append(code)
        op = (
            Extreme(layer.node.op_type == "Max")
            if layer.axis is None
            else Concat(axes.index(layer.axis))
        )
        made = self.graph.add(op, *parts, name=out, layer=layer.name)
        self.tensors.hold(out, Carried(made, axes))

    def normalized(self, layer: Normalized) -> None:
        x, out = str(layer.x.name), str(layer.out.name)
        q, yq = self.quantizer(layer.x), self.quantizer(layer.out)
        fraction = int(-math.log2(yq.scale[0]))
        value = self.tensors.want(x, tuple(range(len(static_dims(layer.x)))))
        row = value.type.shape[-1]
        # in squared steps of x, and n**2 times as large as the variance
        epsilon = Fraction(float(np.float32(layer.epsilon))) * row**2 / Fraction(q.scale[0]) ** 2
        op = Normalize(fraction, max(1, round(epsilon)), storage(yq.format))
        made = self.graph.add(op, value, name=out, layer=layer.name)
        self.tensors.hold(out, Carried(made, tuple(range(len(made.type.shape)))))

    def index(self, layer: Index) -> None:
        held = self.tensors.plain(str(layer.x.name))
        last = bool(layer.node.attributes.get_int("select_last_index", 0))
        op = ArgExtreme(held.axes.index(layer.axis), layer.node.op_type == "ArgMax", last)
        out = str(layer.out.name)
        made = self.graph.add(op, held.value, name=out, layer=layer.name)
        self.tensors.hold(out, Carried(made, held.axes))

    def view(self, layer: View) -> None:
        x, out = str(layer.x.name), str(layer.out.name)
        axes = self.tensors.plain(x).axes if not isinstance(layer.move, Reshaped) else ()
        match layer.move:
            case Permuted(perm=perm):
                moved = tuple(perm.index(a) for a in axes)
                self.tensors.hold(out, Carried(self.tensors.want(x, axes), moved))
                return
            case Reshaped(rows=rows, rest=rest):
                self.tensors.hold(out, self.tensors.reshape(x, rows, rest, out, layer.name))
                return
            case Largest(window=w):
                axes = channels_last(len(axes))
                op: Op = MaxPool(w.kernel, w.strides, w.pads, w.dilations)
            case Cut(starts=starts, ends=ends, steps=steps):
                kept = (tuple(row[a - 1] for a in axes[1:]) for row in (starts, ends, steps))
                op = Slice(*kept)
            case Picked(axis=axis, indices=indices):
                op = Take(axes.index(axis), indices)
            case Framed(begins=begins, ends=ends, value=value):
                fill = quantize(np.array([value]), self.quantizer(layer.x))
                widths = tuple(row[a - 1] for row in (begins, ends) for a in axes[1:])
                op = Pad(widths, int(fill[0]))
        made = self.graph.add(op, self.tensors.want(x, axes), name=out, layer=layer.name)
        self.tensors.hold(out, Carried(made, axes))


def _signed(val: Val, sign: int) -> Val:
    return replace(val, multiplier=tuple(sign * n for n in val.multiplier))
