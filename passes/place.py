"""Decide where the float graph is rounded and to what format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import onnx_ir as ir

from qcompile.errors import BadInput
from qcompile.formats import Int
from qcompile.pipeline import Context
from qcompile.plan import TIED, Kind, Quantizer, QuantPlan, Slot

from .layers import (
    MOVES,
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
    Term,
    View,
    initializer,
    partition,
)
from .views import static_dims

Residual = Literal["accumulator", "int8", "int16"]


@dataclass(frozen=True)
class Place:
    """Every tensor that will be rounded has a slot; what only moves values shares the slot of its operand.

    Tensors of one role in every step of a loop share one too, so that every step has the same integers.
    `first_last` keeps the first and the last layer at another format: weights, the first's result, the last's operand.
    An average that only products read has at least the bits of `pool`, the sum of two tensors (the residual stream)
    those of `sums`, where 2 bits ask for nothing. `residual` says how the last product of a sum enters it: unrounded,
    rounded like any activation, or to 16 bits, which the results then have too. What a table, a Mul or a Softmax reads
    has at most 8 bits.
    `overrides` maps globs of tensor names to formats, the last match wins, whatever the rest says.
    """

    name: ClassVar[str] = "place"
    weights: Int = Int(8, narrow=True)
    activations: Int = Int(8)
    first_last: Int | None = None
    input: Int = Int(8)
    output: Int = Int(16)
    pool: Int = Int(16)
    sums: Int = Int(2)
    residual: Residual = "accumulator"
    per_channel: bool = True
    overrides: Mapping[str, Int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, fmt in (("pool", self.pool), ("sums", self.sums)):
            if not fmt.signed or fmt.bits > 16:
                raise BadInput(f"place: {what} takes int2 to int16, not {fmt}")

    def __call__(self, model: ir.Model, plan: QuantPlan, context: Context) -> bool:
        """Fill `plan.slots`, and the quantizers that no data can change."""
        layers = partition(model, fuse_residual=self.residual == "accumulator")
        products = [
            t for x in layers if isinstance(x, Rescaled) for t in x.terms if isinstance(t, Linear)
        ]
        edge = {id(t) for t in (products[:1] + products[-1:])} if self.first_last else set()
        placer = _Placer(plan)
        for value in model.graph.inputs:
            placer.open(value, Kind.INPUT, self.input)
        for layer in layers:
            match layer:
                case Rescaled(terms=terms, out=out):
                    for term in terms:
                        match term:
                            case Linear():
                                wide = self.first_last is not None and id(term) in edge
                                placer.weight(term, self._weights(wide), self.per_channel)
                            case Product(y=y) if initializer(y) is not None:
                                placer.open(y, Kind.WEIGHT, Int(8, narrow=True))
                            case Operand(value=value) if initializer(value) is not None:
                                placer.open(value, Kind.WEIGHT, Int(16))
                            case _:
                                pass
                    summed = any(isinstance(t, Linear | Pooled) for t in terms)
                    if summed and _only_leaves(out):
                        placer.open(out, Kind.OUTPUT, self.output)
                    else:
                        placer.open(out, Kind.ACTIVATION, self._result(terms, out))
                case Table(out=out):
                    placer.open(out, Kind.ACTIVATION, self.activations)
                case SoftmaxLayer(out=out):
                    bits = (
                        self.output.bits if _only_leaves(out) and self.output.bits in (8, 16) else 8
                    )
                    placer.open(out, Kind.OUTPUT, Int(bits))
                    plan.quantizers[_name(out)] = Quantizer(
                        Int(bits), (2.0**-bits,), (-(1 << (bits - 1)),)
                    )
                case Normalized(out=out):
                    plan.quantizers[_name(out)] = q = _standard(layer)
                    placer.open(out, Kind.ACTIVATION, q.format)
                case Index(out=out):
                    placer.open(out, Kind.OUTPUT, Int(32))
                    plan.quantizers[_name(out)] = Quantizer(Int(32), (1.0,), (0,))
                case View(x=x, out=out):
                    placer.share(x, out)
                case Join(xs=xs, out=out):
                    placer.open(out, Kind.ACTIVATION, self.activations)
                    for x in xs:
                        placer.adopt(x, out)
        if self.first_last is not None and products:
            first = next(
                x.out for x in layers if isinstance(x, Rescaled) and products[0] in x.terms
            )
            for value in (first, products[-1].x):
                owner = placer.owner(value)
                # the program's own border has formats of its own, a Softmax its only one
                free = owner.kind is Kind.ACTIVATION and owner.tensor not in plan.quantizers
                if free and owner.format.bits <= 8:
                    plan.slots[owner.tensor] = replace(owner, format=self.first_last)
        for layer in layers:
            for x in _bytes_read(layer):
                placer.limit(x, self.activations if self.activations.bits <= 8 else Int(8))
        self._override(plan)
        return True

    def _weights(self, edge: bool) -> Int:
        fmt = self.first_last if edge and self.first_last is not None else self.weights
        return Int(fmt.bits, narrow=fmt.bits == 8)

    def _result(self, terms: tuple[Term, ...], out: ir.Value) -> Int:
        """The widest format that something asks for."""
        formats = [self.activations]
        if any(isinstance(t, Pooled) for t in terms) and _only_multiplied(out):
            formats.append(self.pool)
        if sum(not isinstance(t, Operand) or initializer(t.value) is None for t in terms) > 1:
            formats.append(self.sums)
            if self.residual == "int16":
                formats.append(Int(16))
        adds = [not u.node.domain and u.node.op_type in ("Add", "Sub") for u in out.uses()]
        if self.residual == "int16" and adds and all(adds):
            formats.append(Int(16))
        return max(formats, key=lambda fmt: fmt.bits)

    def _override(self, plan: QuantPlan) -> None:
        for glob, fmt in self.overrides.items():
            hits = [
                name
                for name, slot in plan.slots.items()
                if any(fnmatchcase(n, glob) for n in (name, *slot.members))
            ]
            if not hits:
                raise BadInput(
                    f"override '{glob}' matches no quantized tensor; see `qcompile inspect` for their names"
                )
            for name in hits:
                slot = plan.slots[name]
                if name in plan.quantizers:
                    raise BadInput(
                        f"override '{glob}': the scale of {name} is fixed by its operator"
                    )
                allowed = range(2, 9) if slot.kind is Kind.WEIGHT else (4, 8, 16)
                if fmt.bits not in allowed or not fmt.signed:
                    raise BadInput(
                        f"override '{glob}={fmt}': {name} ({slot.kind.value}) takes signed formats of "
                        f"{', '.join(map(str, allowed))} bits"
                    )
                narrow = slot.kind is Kind.WEIGHT and fmt.bits == 8
                plan.slots[name] = replace(slot, format=Int(fmt.bits, narrow=narrow))


def _name(value: ir.Value) -> str:
    if value.name is None:
        raise BadInput("the model has a value without a name; run onnx.checker on it")
    return value.name


def _only_leaves(value: ir.Value) -> bool:
    """Is a value read by nobody but the caller, perhaps through views?"""
    if not value.is_graph_output() and not list(value.uses()):
        return False
    return all(
        not u.node.domain
        and u.node.op_type in ("Reshape", "Transpose", "Identity")
        and _only_leaves(u.node.outputs[0])
        for u in value.uses()
    )


def _only_multiplied(value: ir.Value) -> bool:
    """Do only products with weights read a value, perhaps through what merely moves it, and the caller not at all?"""
    if value.is_graph_output():
        return False
    return all(
        not u.node.domain
        and (
            u.node.op_type in ("Conv", "Gemm", "MatMul")
            or (u.node.op_type in MOVES and _only_multiplied(u.node.outputs[0]))
        )
        for u in value.uses()
    )


def _bytes_read(layer: Layer) -> list[ir.Value]:
    """The operands whose codes have at most 8 bits: of tables, products of two tensors and Softmax."""
    match layer:
        case Table(x=x) | SoftmaxLayer(x=x):
            return [x]
        case Rescaled(terms=terms):
            pairs = [
                (t.x, t.y) for t in terms if isinstance(t, Product) and initializer(t.y) is None
            ]
            return [v for pair in pairs for v in pair]
        case _:
            return []


def _standard(layer: Normalized) -> Quantizer:
    """Whatever a row holds, no entry lies further than sqrt(n - 1) deviations from the mean."""
    row = static_dims(layer.x)[-1]
    bits = 16 if _only_multiplied(layer.out) or _only_leaves(layer.out) else 8
    whole = max(0, math.ceil(math.log2(max(row - 1, 1)) / 2))
    return Quantizer(Int(bits), (2.0 ** -(bits - 1 - whole),), (0,))


class _Placer:
    def __init__(self, plan: QuantPlan) -> None:
        self.slots = plan.slots
        self.tied: dict[str, str] = {}

    def open(self, value: ir.Value, kind: Kind, fmt: Int) -> None:
        name = _name(value)
        if name in self.slots:
            return
        role = value.metadata_props.get(TIED)
        first = self.slots.get(self.tied.setdefault(role, name)) if role else None
        if first is not None and (first.kind, first.format) == (kind, fmt):
            self.slots[first.tensor] = replace(first, members=(*first.members, name))
            return
        self.slots[name] = Slot(name, kind, fmt, (name,))

    def weight(self, linear: Linear, fmt: Int, per_channel: bool) -> None:
        name = _name(linear.weight)
        axis = linear.channel_axis if per_channel else None
        if name in self.slots and self.slots[name].axis != axis:
            raise BadInput(
                f"weights {name} are shared by layers with different channel axes; give each its own copy"
            )
        self.slots.setdefault(name, Slot(name, Kind.WEIGHT, fmt, (name,), axis))

    def owner(self, value: ir.Value) -> Slot:
        name = _name(value)
        for slot in self.slots.values():
            if name in slot.members:
                return slot
        raise BadInput(f"{name} is read before anything makes it")

    def limit(self, value: ir.Value, fmt: Int) -> None:
        """Give a result that has more than 8 bits this format; an input's bits are the caller's own choice."""
        slot = self.owner(value)
        if slot.kind is not Kind.INPUT and slot.format.bits > 8:
            self.slots[slot.tensor] = replace(slot, format=fmt)

    def share(self, x: ir.Value, out: ir.Value) -> None:
        owner = self.owner(x)
        self.slots[owner.tensor] = replace(owner, members=(*owner.members, _name(out)))

    def adopt(self, x: ir.Value, out: ir.Value) -> None:
        """An operand that only a Concat reads is rounded straight to the Concat's scale."""
        name = _name(x)
        slot = self.slots.get(name)
        if (
            slot is None
            or slot.kind is not Kind.ACTIVATION
            or slot.members != (name,)
            or x.is_graph_output()
            or len(list(x.uses())) != 1
        ):
            return
        joined = self.slots[_name(out)]
        del self.slots[name]
        self.slots[joined.tensor] = replace(joined, members=(*joined.members, name))
