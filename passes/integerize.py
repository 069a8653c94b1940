"""The dyadic rewrite: float graph and plan in, integer graph out (HAWQ-V3, Yao et al. 2021, section 3).

After it no float is left: scales have become integer multipliers with one rounding each, zero points have gone into
biases, layouts are channels-last. All constants come from exact fractions or single correctly rounded float64
operations, so that one plan gives the same bytes on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.errors import Unsupported
from qcompile.ir import (
    Array,
    Concat,
    Conv,
    DType,
    Graph,
    Lut,
    MatMul,
    MaxPool,
    Mul,
    Op,
    Pad,
    Port,
    Rescale,
    Reshape,
    Slice,
    Softmax,
    SumPool,
    TensorType,
    Transpose,
    Value,
)
from qcompile.ir.arith import AccOperand, NoRoom, ValOperand, fit_rescale
from qcompile.ir.proof import accumulator_bound, code_range, prove, prove_rescale
from qcompile.plan import Quantizer, QuantPlan

from . import exact
from .layers import (
    Clamp,
    Join,
    Layer,
    Linear,
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

Requant = Literal["dyadic", "shift"]
IoLayout = Literal["model", "nhwc"]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an integer value comes from: float tensor, and which float axis each of its axes is."""

    tensor: str
    axes: tuple[int, ...]


@dataclass(slots=True)
class Integerized:
    """The integer graph, what its values stand for, and the error of each rescale's multipliers."""

    graph: Graph
    origins: dict[str, Origin] = field(default_factory=dict)
    multiplier_errors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Carried:
    """A float tensor inside the integer graph: axis i of `value` is float axis axes[i].

    `order` tells, after a Flatten of a channels-last tensor, which float index each position of the last axis holds;
    `before` is then the tensor that was flattened.
    """

    value: Value
    axes: tuple[int, ...]
    order: tuple[int, ...] | None = None
    before: _Carried | None = None


def integerize(
    model: ir.Model,
    plan: QuantPlan,
    *,
    name: str = "model",
    residual: bool = True,
    requant: Requant = "dyadic",
    io_layout: IoLayout = "model",
    input_dtype: DType | None = None,
) -> Integerized:
    """Return the integer graph of a canonical float model whose plan is complete.

    Raises Unsupported, naming the node, where an operator or a format has no integer form.
    """
    layers = partition(model, fuse_residual=residual)
    work = _Integerizer(model, plan, name, requant, io_layout, input_dtype)
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


def storage(bits: int) -> DType:
    """The type that holds codes of that many bits."""
    return DType.of(bits) if bits <= 8 else DType.I16 if bits <= 16 else DType.I32


def _dims(value: ir.Value) -> tuple[int, ...]:
    """The static shape, one for a symbolic batch."""
    if value.shape is None:
        raise Unsupported(
            f"the shape of {value.name} is unknown; run shape inference or state --input-dim"
        )
    dims = []
    for i, d in enumerate(value.shape.dims):
        if isinstance(d, int):
            dims.append(d)
        elif i == 0:
            dims.append(1)
        else:
            raise Unsupported(
                f"axis {i} of {value.name} is only known at run time; state --input-dim"
            )
    return tuple(dims)


def _channels_last(rank: int) -> tuple[int, ...]:
    return (0, *range(2, rank), 1) if rank > 2 else tuple(range(rank))


class _Integerizer:
    def __init__(
        self,
        model: ir.Model,
        plan: QuantPlan,
        name: str,
        requant: Requant,
        io_layout: IoLayout,
        input_dtype: DType | None,
    ) -> None:
        self.model = model
        self.plan = plan
        self.requant = requant
        self.io_layout = io_layout
        self.input_dtype = input_dtype
        free = all(
            v.shape is not None and len(v.shape.dims) > 0 and not isinstance(v.shape.dims[0], int)
            for v in (*model.graph.inputs, *model.graph.outputs)
        )
        self.done = Integerized(Graph(name, free_batch=free))
        self.graph = self.done.graph
        self.carried: dict[str, _Carried] = {}
        self.constants: dict[str, Value] = {}

    # --- border -------------------------------------------------------------------------------------------------

    def border_in(self) -> None:
        for x in self.model.graph.inputs:
            name, q = str(x.name), self.quantizer(x)
            shape = _dims(x)
            axes = (
                _channels_last(len(shape)) if self.io_layout == "nhwc" else tuple(range(len(shape)))
            )
            dtype = self.input_dtype or storage(q.format.bits)
            inner = storage(q.format.bits)
            zero = q.zero_point[0] + (128 if dtype is DType.U8 else 0)
            kind = TensorType(dtype, tuple(shape[a] for a in axes))
            value = self.graph.add_input(Port(name, q.scale[0], zero), kind)
            if dtype is DType.U8:
                value = self.shift_code(value, -128, inner, name)
            self.hold(name, _Carried(value, axes))

    def shift_code(self, value: Value, by: int, out: DType, name: str) -> Value:
        """The same numbers with another zero point."""
        z = -by if by < 0 else 0
        fit = fit_rescale([], [ValOperand(Fraction(1), z, *code_range(value))], bits=16)
        op = Rescale(fit.accs, fit.vals, fit.f, by + z, out.lo, out.hi, out)
        return self.graph.add(op, value, name=f"{name}:codes")

    def border_out(self) -> None:
        for y in self.model.graph.outputs:
            name = str(y.name)
            q = self.quantizer(y)
            rank = len(_dims(y))
            axes = _channels_last(rank) if self.io_layout == "nhwc" else tuple(range(rank))
            self.graph.add_output(
                Port(name, q.scale[0], q.zero_point[0]), self.want(name, axes).value
            )

    # --- what is known about tensors ----------------------------------------------------------------------------

    def quantizer(self, value: ir.Value) -> Quantizer:
        q = self.plan.of(str(value.name))
        if q is None:
            raise Unsupported(f"{value.name} has no quantizer; calibrate first")
        return q

    def hold(self, name: str, carried: _Carried) -> None:
        self.carried[name] = carried
        if carried.order is None:
            self.done.origins[carried.value.name] = Origin(name, carried.axes)

    def want(self, name: str, axes: tuple[int, ...]) -> _Carried:
        """The tensor with its axes in the wanted order, transposed where it has to be."""
        have = self.carried[name]
        if have.order is not None and have.before is not None:
            plain = self.want_of(have.before, tuple(range(len(have.before.axes))), f"{name}:plain")
            flat = self.graph.add(Reshape((-1, *have.value.type.shape[1:])), plain.value, name=name)
            have = _Carried(flat, have.axes)
            self.hold(name, have)
        if have.axes == axes:
            return have
        got = self.want_of(have, axes, name)
        return got

    def want_of(self, have: _Carried, axes: tuple[int, ...], name: str) -> _Carried:
        if have.axes == axes:
            return have
        perm = tuple(have.axes.index(a) for a in axes)
        if perm[0] != 0:
            raise TypeError("the batch axis is moved, which an integer graph cannot do")
        moving = [p for p in perm if have.value.type.shape[p] != 1]
        op: Op
        if moving == sorted(moving):
            shape = tuple(have.value.type.shape[p] for p in perm)
            op = Reshape((-1, *shape[1:]))
        else:
            op = Transpose(perm)
        return _Carried(self.graph.add(op, have.value, name=name), axes)

    def constant(self, name: str, array: NDArray[np.generic], dtype: DType) -> Value:
        """A constant, made once for a name and contents."""
        key = f"{name}/{dtype}/{array.shape}/{hash(array.tobytes())}"
        if key not in self.constants:
            codes: Array = array.astype(dtype.numpy)
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
            case Join(name=name, xs=xs, node=node, out=out):
                self.join(name, xs, node, out)

    def rescaled(self, layer: Rescaled) -> None:
        out = str(layer.out.name)
        q = self.quantizer(layer.out)
        step = Fraction(q.scale[0])
        axes = self.layout(layer)
        accs: list[tuple[Value, AccOperand]] = []
        vals: list[tuple[Value, ValOperand, int]] = []
        spatial = False
        order: _Carried | None = None
        for i, term in enumerate(layer.terms):
            label = f"{out}:acc{i or ''}"
            match term:
                case Operand(value=value, sign=sign):
                    code, scale, zero = self.operand(value, axes, len(_dims(layer.out)))
                    vals.append((code, ValOperand(scale / step, zero, *code_range(code)), sign))
                    held = self.carried.get(str(value.name))
                    order = held if held is not None and held.order is not None else order
                case _:
                    acc, scales = self.product(term, layer.name, label, axes)
                    spatial = spatial or (isinstance(term, Pooled) and len(scales) > 1)
                    assert acc.producer is not None
                    bound = tuple(int(b) for b in accumulator_bound(acc.producer))
                    accs.append((acc, AccOperand(tuple(s / step for s in scales), bound)))
        made = self.emit_rescale(layer.name, out, accs, vals, q, layer.clamp, spatial)
        if order is not None and len(layer.terms) == 1:
            self.hold(out, _Carried(made, order.axes, order.order, self.replay(order, made)))
        else:
            self.hold(out, _Carried(made, axes))

    def replay(self, flat: _Carried, value: Value) -> _Carried:
        """What `value` was before the Flatten that `flat` went through."""
        assert flat.before is not None
        shape = flat.before.value.type.shape
        return _Carried(
            self.graph.add(Reshape((-1, *shape[1:])), value, name=f"{value.name}:4d"),
            flat.before.axes,
        )

    def layout(self, layer: Rescaled) -> tuple[int, ...]:
        """The axis order a layer works in: channels-last for windows, else as its first operand stands."""
        rank = len(_dims(layer.out))
        for term in layer.terms:
            match term:
                case Linear(node=node) if node.op_type == "Conv":
                    return _channels_last(rank)
                case Linear():
                    return tuple(range(rank))
                case Pooled():
                    return _channels_last(rank)
                case _:
                    pass
        for term in layer.terms:
            for value in (term.value,) if isinstance(term, Operand) else (term.x,):
                held = self.carried.get(str(value.name))
                if held is not None and len(held.axes) == rank:
                    return held.axes
        return tuple(range(rank))

    def operand(
        self, value: ir.Value, axes: tuple[int, ...], rank: int
    ) -> tuple[Value, Fraction, int]:
        """Codes, scale and zero point of something that is added or multiplied."""
        q = self.quantizer(value)
        array = initializer(value)
        if array is not None:
            wide = (
                np.asarray(array, np.float64)
                .reshape((1,) * (rank - array.ndim) + array.shape)
                .transpose(axes)
            )
            codes = quantize(wide, q)
            return (
                self.constant(str(value.name), codes, storage(q.format.bits)),
                Fraction(q.scale[0]),
                q.zero_point[0],
            )
        if len(_dims(value)) != rank:
            raise TypeError(
                f"operands of different rank ({value.name} has {len(_dims(value))} axes, the result {rank})"
            )
        held = self.carried[str(value.name)]
        code = (
            held.value
            if held.order is not None and held.axes == axes
            else self.want(str(value.name), axes).value
        )
        return code, Fraction(q.scale[0]), q.zero_point[0]

    def emit_rescale(
        self,
        name: str,
        out: str,
        accs: list[tuple[Value, AccOperand]],
        vals: list[tuple[Value, ValOperand, int]],
        q: Quantizer,
        clamp: Clamp,
        spatial: bool,
    ) -> Value:
        """One Rescale; where 32 bits have no room for its sum, the last accumulator goes through int16 first."""
        dtype, zero = storage(q.format.bits), q.zero_point[0]
        lo, hi = clamp_codes(clamp, q)
        bits = 16 if q.format.bits <= 8 else 24
        power = self.requant == "shift"
        while True:
            try:
                fit = fit_rescale(
                    [a for _, a in accs], [v for _, v, _ in vals], bits=bits, power_of_two=power
                )
                break
            except NoRoom:
                if len(accs) + len(vals) == 1 or not accs:
                    raise
                value, operand = accs.pop()
                vals.append(
                    self.through_int16(
                        name, f"{out}:wide{len(accs) or ''}", value, operand, spatial
                    )
                )
        signed = tuple(
            type(v)(tuple(n * sign for n in v.multiplier), v.zero_point)
            for v, (_, _, sign) in zip(fit.vals, vals, strict=True)
        )
        op = Rescale(fit.accs, signed, fit.f, zero, lo, hi, dtype, spatial)
        self.done.multiplier_errors[out] = float(fit.multiplier_error)
        return self.graph.add(
            op, *(v for v, _ in accs), *(v for v, _, _ in vals), name=out, layer=name
        )

    def through_int16(
        self, name: str, label: str, value: Value, operand: AccOperand, spatial: bool
    ) -> tuple[Value, ValOperand, int]:
        """Rescale an accumulator to int16 at the finest power-of-two step that spans 4096 output steps or its bound."""
        bounds = operand.bound * (len(operand.scale) if len(operand.bound) == 1 else 1)
        scales = operand.scale * (len(bounds) if len(operand.scale) == 1 else 1)
        reach = min(max(b * s for b, s in zip(bounds, scales, strict=True)), Fraction(4096))
        k = 0
        while reach * 2 ** (k + 1) <= 32767 and k < 14:
            k += 1
        fine = AccOperand(tuple(s * 2**k for s in operand.scale), operand.bound)
        fit = fit_rescale([fine], [], bits=24)
        op = Rescale(fit.accs, (), fit.f, 0, -32768, 32767, DType.I16, spatial)
        made = self.graph.add(op, value, name=label, layer=name)
        return made, ValOperand(Fraction(1, 2**k), 0, -32768, 32767), 1

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
            case Product(x=x, y=y):
                rank = max(len(_dims(x)), len(_dims(y)))
                a, sa, za = self.operand(x, axes, rank)
                b, sb, zb = self.operand(y, axes, rank)
                return self.graph.add(Mul(za, zb), a, b, name=label, layer=layer), (sa * sb,)

    def linear(self, term: Linear, layer: str, label: str) -> tuple[Value, tuple[Fraction, ...]]:
        node, wname = term.node, str(term.weight.name)
        q, wq = self.quantizer(term.x), self.quantizer(term.weight)
        weights = np.asarray(initializer(term.weight), np.float64)
        codes = quantize(weights, wq)
        if term.channel_axis == 1:
            codes = codes.T
        sw = np.array(wq.scale, np.float64)
        bias = (
            np.zeros(codes.shape[0])
            if term.bias is None
            else np.asarray(initializer(term.bias), np.float64)
        )
        # the product of two float32 numbers is exact in float64, so one correctly rounded division is all there is
        b = np.rint(np.broadcast_to(bias.ravel(), codes.shape[:1]) / (np.float64(q.scale[0]) * sw))
        zero = q.zero_point[0]
        folded = b - zero * codes.reshape(len(codes), -1).sum(axis=1)
        if np.abs(folded).max(initial=0) >= 2**31:
            raise OverflowError("a bias does not fit 32 bits")
        held = self.carried[str(term.x.name)]
        dtype = storage(wq.format.bits)
        scales = tuple(Fraction(q.scale[0]) * Fraction(s) for s in wq.scale)
        if node.op_type == "Conv":
            rank = len(_dims(term.x))
            x = self.want(str(term.x.name), _channels_last(rank)).value
            w = codes.transpose(0, *range(2, rank), 1)
            op: Op = Conv(
                _ints(node, "strides"), _ints(node, "pads"), _ints(node, "dilations"),
                node.attributes["group"].as_int() if "group" in node.attributes else 1, zero,
            )  # fmt: skip
        else:
            w, op = codes, MatMul()
            if held.order is not None:
                x, w = held.value, codes[:, list(held.order)]
            else:
                x = self.want(str(term.x.name), tuple(range(len(held.axes)))).value
        wv = self.constant(wname, w, dtype)
        bv = self.constant(f"{layer}:bias", folded, DType.I32)
        return self.graph.add(op, x, wv, bv, name=label, layer=layer), scales

    def pooled(self, term: Pooled, layer: str, label: str) -> tuple[Value, tuple[Fraction, ...]]:
        node = term.node
        q = self.quantizer(term.x)
        shape = _dims(term.x)
        x = self.want(str(term.x.name), _channels_last(len(shape))).value
        spatial = shape[2:]
        scale, zero = Fraction(q.scale[0]), q.zero_point[0]
        if node.op_type == "GlobalAveragePool":
            ones = (1,) * len(spatial)
            op = SumPool(spatial, ones, (0,) * (2 * len(spatial)), zero)
            return self.graph.add(op, x, name=label, layer=layer), (scale / int(np.prod(spatial)),)
        kernel, strides, pads = (
            _ints(node, "kernel_shape"),
            _ints(node, "strides"),
            _ints(node, "pads"),
        )
        op = SumPool(kernel, strides, pads, zero)
        acc = self.graph.add(op, x, name=label, layer=layer)
        inside = (
            "count_include_pad" not in node.attributes
            or node.attributes["count_include_pad"].as_int() == 0
        )
        if not inside or not any(pads):
            return acc, (scale / int(np.prod(kernel)),)
        counts = np.ones((), np.int64)
        for n, k, s, at, o in zip(
            spatial, kernel, strides, pads, acc.type.shape[1:-1], strict=False
        ):
            begin = np.arange(o) * s - at
            counts = np.multiply.outer(counts, np.minimum(begin + k, n) - np.maximum(begin, 0))
        return acc, tuple(scale / int(c) for c in counts.ravel())

    # --- everything else ----------------------------------------------------------------------------------------

    def table(self, layer: Table) -> None:
        xq, yq = self.quantizer(layer.x), self.quantizer(layer.out)
        held = self.carried[str(layer.x.name)]
        if xq.format.bits > 8:
            raise TypeError(
                f"{layer.node.op_type} of a {xq.format} tensor: a table takes at most 8 bits"
            )
        x, y = xq.format, yq.format
        row = exact.table(
            self.model, layer.node, range(x.lo, x.hi + 1),
            xq.scale[0], xq.zero_point[0], yq.scale[0], yq.zero_point[0],
        )  # fmt: skip
        entries = np.array([min(max(v, y.lo), y.hi) for v in row])
        table = self.constant(f"{layer.name}:table", entries, storage(yq.format.bits))
        made = self.graph.add(Lut(), held.value, table, name=str(layer.out.name), layer=layer.name)
        before = self.replay(held, made) if held.before is not None else None
        self.hold(str(layer.out.name), _Carried(made, held.axes, held.order, before))

    def softmax(self, layer: SoftmaxLayer) -> None:
        q, yq = self.quantizer(layer.x), self.quantizer(layer.out)
        held = self.carried[str(layer.x.name)]
        rank = len(held.axes)
        if q.format.bits > 8:
            raise TypeError(f"Softmax of a {q.format} tensor: it takes at most 8 bits")
        axes = held.axes
        if held.order is not None or axes[-1] != layer.axis:
            rest = tuple(a for a in range(rank) if a != layer.axis)
            axes = (*rest, layer.axis)
        x = self.want(str(layer.x.name), axes).value
        fraction = 30 - max(1, (x.type.shape[-1]).bit_length())
        entries = np.array(exact.exponentials(q.format.levels, q.scale[0], fraction))
        table = self.constant(f"{layer.name}:exp", entries, DType.I32)
        op = Softmax(fraction, storage(yq.format.bits))
        made = self.graph.add(op, x, table, name=str(layer.out.name), layer=layer.name)
        self.hold(str(layer.out.name), _Carried(made, axes))

    def join(self, name: str, xs: Sequence[ir.Value], node: ir.Node, out: ir.Value) -> None:
        q = self.quantizer(out)
        rank = len(_dims(out))
        axes = (
            self.carried[str(xs[0].name)].axes if initializer(xs[0]) is None else tuple(range(rank))
        )
        parts = []
        for i, x in enumerate(xs):
            xq = self.quantizer(x)
            code, scale, zero = self.operand(x, axes, rank)
            if xq != q:
                operand = ValOperand(scale / Fraction(q.scale[0]), zero, *code_range(code))
                code = self.emit_rescale(
                    name, f"{out.name}:in{i}", [], [(code, operand, 1)], q, Clamp(), False
                )
            parts.append(code)
        axis = axes.index(node.attributes["axis"].as_int() % rank)
        made = self.graph.add(Concat(axis), *parts, name=str(out.name), layer=name)
        self.hold(str(out.name), _Carried(made, axes))

    def view(self, layer: View) -> None:
        node, out = layer.node, str(layer.out.name)
        held = self.carried[str(layer.x.name)]
        q = self.quantizer(layer.x)
        shape = _dims(layer.x)
        rank = len(shape)
        match node.op_type:
            case "MaxPool":
                held = self.want(str(layer.x.name), _channels_last(rank))
                op: Op = MaxPool(
                    _ints(node, "kernel_shape"),
                    _ints(node, "strides"),
                    _ints(node, "pads"),
                    _ints(node, "dilations"),
                )
                axes = held.axes
            case "Transpose":
                perm = _ints(node, "perm")
                if perm[0] != 0:
                    raise TypeError("the batch axis is moved, which an integer graph cannot do")
                held = self.want(str(layer.x.name), held.axes)
                moved = tuple(perm.index(a) for a in held.axes)
                self.carried[out] = _Carried(held.value, moved)
                self.done.origins[held.value.name] = Origin(str(layer.x.name), held.axes)
                return
            case "Reshape":
                self.reshape(layer, held)
                return
            case "Slice":
                held = self.want(str(layer.x.name), held.axes)
                op, axes = self.slice(node, shape, held.axes), held.axes
            case _:
                held = self.want(str(layer.x.name), held.axes)
                op, axes = self.pad(node, rank, held.axes, q), held.axes
        made = self.graph.add(op, held.value, name=out, layer=layer.name)
        self.hold(out, _Carried(made, axes))

    def reshape(self, layer: View, held: _Carried) -> None:
        out = str(layer.out.name)
        shape = _dims(layer.out)
        if shape[0] != held.value.type.shape[0]:
            raise TypeError(
                f"Reshape to {list(shape)} changes the batch axis, which an integer graph cannot do"
            )
        plain = tuple(range(len(held.axes)))
        order_matters = [a for a in held.axes if held.value.type.shape[held.axes.index(a)] != 1]
        flattens = len(shape) == 2 and held.order is None and held.axes[0] == 0
        if flattens and order_matters != sorted(order_matters):
            sizes = [held.value.type.shape[held.axes.index(a)] for a in plain]
            index = np.arange(int(np.prod(sizes[1:]))).reshape(sizes[1:])
            order = index.transpose([a - 1 for a in held.axes[1:]]).ravel()
            flat = self.graph.add(Reshape((-1, shape[1])), held.value, name=out, layer=layer.name)
            self.hold(out, _Carried(flat, (0, 1), tuple(int(i) for i in order), held))
            return
        source = self.want(str(layer.x.name), plain).value
        if source.type.shape == shape:
            self.hold(out, _Carried(source, tuple(range(len(shape)))))
            return
        made = self.graph.add(Reshape((-1, *shape[1:])), source, name=out, layer=layer.name)
        self.hold(out, _Carried(made, tuple(range(len(shape)))))

    def slice(self, node: ir.Node, shape: tuple[int, ...], axes: tuple[int, ...]) -> Op:
        rank = len(shape)
        starts, ends, steps = [0] * rank, list(shape), [1] * rank
        given = [initializer(v) for v in node.inputs[1:]]
        if any(g is None for g in given):
            raise TypeError("Slice with bounds computed at run time")
        first = [np.asarray(g).ravel().tolist() for g in given]
        which = first[2] if len(first) > 2 else range(len(first[0]))
        for i, axis in enumerate(which):
            a = int(axis) % rank
            step = int(first[3][i]) if len(first) > 3 else 1
            if step < 1:
                raise TypeError("Slice with a negative step")
            begin, end, _ = slice(int(first[0][i]), int(first[1][i]), step).indices(shape[a])
            starts[a], ends[a], steps[a] = begin, max(begin, end), step
        if (starts[0], ends[0], steps[0]) != (0, shape[0], 1):
            raise TypeError("Slice along the batch axis")
        return Slice(*(tuple(row[a] for a in axes[1:]) for row in (starts, ends, steps)))

    def pad(self, node: ir.Node, rank: int, axes: tuple[int, ...], q: Quantizer) -> Op:
        mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "constant"
        pads = initializer(node.inputs[1])
        if mode != "constant" or pads is None:
            raise TypeError(f"Pad in mode {mode}: only constant padding has an integer form here")
        row = [int(p) for p in np.asarray(pads).ravel()]
        filler = node.inputs[2] if len(node.inputs) > 2 else None
        value = initializer(filler)
        real = np.zeros(1) if value is None else np.asarray(value, np.float64).reshape(1)
        if row[0] or row[rank] or min(row) < 0:
            raise TypeError("Pad along the batch axis, or negative")
        begins, ends = [row[a] for a in axes[1:]], [row[rank + a] for a in axes[1:]]
        return Pad((*begins, *ends), int(quantize(real, q)[0]))


def quantize(x: NDArray[np.float64], q: Quantizer) -> NDArray[np.int64]:
    """Codes of real numbers: round half to even, saturate; per channel of q.axis."""
    scale, zero = np.array(q.scale, np.float64), np.array(q.zero_point, np.float64)
    if q.axis is not None:
        row = [-1 if i == q.axis else 1 for i in range(x.ndim)]
        scale, zero = scale.reshape(row), zero.reshape(row)
    return np.clip(np.rint(x / scale) + zero, q.format.lo, q.format.hi).astype(np.int64)


def clamp_codes(clamp: Clamp, q: Quantizer) -> tuple[int, int]:
    """The codes a clamp in real numbers leaves."""
    scale, zero = q.scale[0], q.zero_point[0]

    def code(real: float | None, otherwise: int) -> int:
        if real is None or not np.isfinite(real):
            return otherwise
        return int(np.clip(np.rint(np.float64(real) / scale) + zero, q.format.lo, q.format.hi))

    lo, hi = code(clamp.lo, q.format.lo), code(clamp.hi, q.format.hi)
    return min(lo, hi), hi


def _ints(node: ir.Node, name: str) -> tuple[int, ...]:
    """An attribute of the canonical form: where a default may be left out, it is filled in for the spatial rank."""
    if name in node.attributes:
        return tuple(int(i) for i in node.attributes[name].as_ints())
    x = node.inputs[0]
    rank = len(_dims(x)) - 2 if x is not None else 2
    return (0,) * (2 * rank) if name == "pads" else (1,) * rank
