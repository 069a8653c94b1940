"""Keep every accumulator, bias and sum inside 32 bits by coarser scales, where they would not fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.errors import Unsupported
from qcompile.formats import Int
from qcompile.ir.arith import ACC_LIMIT, AccOperand, NoRoom, ValOperand
from qcompile.ir.proof import product_bound
from qcompile.pipeline import Context
from qcompile.plan import Kind, Quantizer, QuantPlan

from .codes import product_codes, real_bias
from .layers import (
    Join,
    Layer,
    Linear,
    Operand,
    Pooled,
    Product,
    Rescaled,
    Term,
    initializer,
    partition,
)
from .sums import reach, settle
from .views import counts, static_dims

_DOUBLINGS = 160
"""From the finest scale that calibration gives, 2**-102, to far beyond one."""
_EASY = 1 << 28
"""An accumulator alone that reaches no more output steps always has constants."""
_DECIDED_LATER = Fraction(7, 8)
"""What rounding to nearest may use of 32 bits: weights and biases that a later pass decides may add up to more."""


@dataclass(frozen=True)
class Widen:
    """Every accumulator of 16-bit codes and every bias fits 32 bits, and every sum has constants that do.

    A channel of very small weights under an ordinary bias (a dead filter, a folded BatchNorm) would otherwise
    overflow or saturate its bias; its weights lose precision instead, which such a channel does not miss. A result
    that is all but constant (a dead layer) would ask for multipliers beyond 32 bits; its scale is doubled until not.
    A tensor of more than 8 bits whose products or averages may sum to more than 32 bits holds fewer bits, at a coarser
    scale; the program's input, whose codes come from outside, keeps them, and the weights it meets are coarser instead.
    A bias has at most `bias_bits` bits.
    """

    name: ClassVar[str] = "widen"
    bias_bits: int = 29
    fuse_residual: bool = True

    def __call__(self, model: ir.Model, plan: QuantPlan, context: Context) -> bool:
        """Enlarge scales in the plan; name the layers in the log."""
        layers = partition(model, fuse_residual=self.fuse_residual)
        narrowed = [
            self._operand(layer.name, term, plan, context)
            for layer in layers
            if isinstance(layer, Rescaled)
            for term in layer.terms
            if isinstance(term, Linear | Pooled)
        ]
        changed = [self._layer(layer, plan, context) for layer in layers]
        if any(changed):
            # a layer that shares its scale with a later one sees only now that it was enlarged
            for layer in layers:
                self._layer(layer, plan, context)
        return any(narrowed) or any(changed)

    def _operand(
        self, layer: str, term: Linear | Pooled, plan: QuantPlan, context: Context
    ) -> bool:
        """The codes of an operand are few enough for 32 bits to hold what is summed over them."""
        key = plan.owner(str(term.x.name))
        before = None if key is None else plan.quantizers.get(key)
        if (
            key is None
            or before is None
            or before.format.bits <= 8
            or _excess(term, plan).max() <= 1.0
        ):
            return False
        slot = plan.slots[key]
        if slot.kind is Kind.INPUT:
            if not isinstance(term, Linear) or not _coarser(term, plan):
                return False
            what = f"weight scales of {layer} enlarged"
        else:
            q = before
            while q.format.bits > 8 and _excess(term, plan).max() > 1.0:
                q = _narrower(q)
                plan.quantizers[key] = q
            plan.slots[key] = replace(slot, format=q.format)
            what = f"{key} narrowed from {before.format} to {q.format}"
        context.log(f"widen: {what} so that the sums of {layer} over its operand fit 32 bits")
        return True

    def _layer(self, layer: Layer, plan: QuantPlan, context: Context) -> bool:
        terms = layer.terms if isinstance(layer, Rescaled) else ()
        out = str(layer.out.name)
        key, q = plan.owner(out), plan.of(out)
        if not isinstance(layer, Rescaled | Join) or key is None or q is None:
            return False
        before = dict(plan.quantizers)
        if self._weights(layer.name, terms, q, plan):
            context.log(
                f"widen: weight scales of {layer.name} enlarged so that its bias fits 32 bits"
            )
        for doublings in range(_DOUBLINGS):
            if _fits(layer, plan):
                if doublings:
                    context.log(f"widen: scale of {key} enlarged so that its sum fits 32 bits")
                return plan.quantizers != before
            q = replace(q, scale=(2.0 * q.scale[0],))
            plan.quantizers[key] = q
            self._weights(layer.name, terms, q, plan)
        # nothing helps: integerize says what is wrong
        plan.quantizers.clear()
        plan.quantizers.update(before)
        return False

    def _weights(self, layer: str, terms: Sequence[Term], y: Quantizer, plan: QuantPlan) -> bool:
        """No accumulator step is below 2**-28 output steps, and none too small for its bias."""
        changed = False
        for term in terms:
            if not isinstance(term, Linear):
                continue
            x, w = plan.of(str(term.x.name)), plan.of(str(term.weight.name))
            if x is None or w is None:
                continue
            bias = real_bias(term, plan)
            need = np.maximum(
                np.abs(bias) / (x.scale[0] * 2.0**self.bias_bits),
                y.scale[0] / x.scale[0] * 2.0**-28,
            )
            if not need.max() < np.finfo(np.float32).max:
                raise Unsupported(
                    f"node {layer}: its bias of {np.abs(bias).max():.3g} is beyond 32 bits for any weights; "
                    "repair the model, or calibrate its input on a wider range"
                )
            scale = np.array(w.scale, np.float64)
            if len(scale) == 1:
                need = need.max(keepdims=True)
            short = scale < need
            if short.any():
                above = np.nextafter(need.astype(np.float32), np.float32(np.inf))
                wider = np.broadcast_to(np.where(short, above, scale), scale.shape)
                key = plan.owner(str(term.weight.name))
                assert key is not None
                # codes decided for the old scale stand for other weights now
                plan.codes.pop(key, None)
                plan.quantizers[key] = replace(w, scale=tuple(float(s) for s in wider))
                changed = True
        return changed


def _narrower(q: Quantizer) -> Quantizer:
    """One bit less for the same range."""
    fmt = Int(q.format.bits - 1)
    return Quantizer(fmt, (2.0 * q.scale[0],), (q.zero_point[0] // 2,))


def _excess(term: Linear | Pooled, plan: QuantPlan) -> NDArray[np.float64]:
    """What each accumulator may reach, as a share of what it is allowed; 0 where something else is amiss."""
    q = plan.of(str(term.x.name))
    assert q is not None
    try:
        acc = _accumulator(term, q, plan)
    except TypeError:
        return np.zeros(1)
    except OverflowError:
        return np.full(1, 2.0)
    decided = isinstance(term, Pooled) or str(term.weight.name) in plan.codes
    allowed = (ACC_LIMIT - 1) * (1 if decided else _DECIDED_LATER)
    return np.zeros(1) if acc is None else np.array(acc.bound, np.float64) / float(allowed)


def _coarser(term: Linear, plan: QuantPlan) -> bool:
    """Enlarge the scales of the channels whose sums do not fit; say whether that was possible."""
    name = str(term.weight.name)
    key = plan.owner(name)
    if key is None or name in plan.codes:
        return False
    before = plan.quantizers[key]
    for _ in range(_DOUBLINGS):
        excess = _excess(term, plan)
        if excess.max() <= 1.0:
            return True
        w = plan.quantizers[key]
        factor = np.where(excess > 1.0, 1.001 * excess, 1.0)
        if len(w.scale) == 1:
            factor = factor.max(keepdims=True)
        scale = (np.array(w.scale) * factor).astype(np.float32)
        plan.quantizers[key] = replace(w, scale=tuple(scale.astype(np.float64).tolist()))
    plan.quantizers[key] = before
    return False


def _fits(layer: Rescaled | Join, plan: QuantPlan) -> bool:
    """Does every rescale of a layer have constants? Yes also where that is not what keeps it from being integer."""
    q = plan.of(str(layer.out.name))
    assert q is not None
    try:
        for accs, vals in _sums(layer, q, plan):
            if len(accs) == 1 and not vals and reach(accs[0]) < _EASY:
                continue
            settle(accs, vals, q.format)
    except NoRoom:
        return False
    except (TypeError, OverflowError):
        return True
    return True


def _sums(
    layer: Rescaled | Join, y: Quantizer, plan: QuantPlan
) -> Iterator[tuple[list[AccOperand], list[ValOperand]]]:
    """What each rescale of a layer adds up, in steps of its result; accumulators beyond 32 bits are left out."""

    def value(x: Quantizer) -> ValOperand:
        ratio = Fraction(x.scale[0]) / Fraction(y.scale[0])
        return ValOperand(ratio, x.zero_point[0], x.format.lo, x.format.hi)

    if isinstance(layer, Join):
        quantizers = [plan.of(str(x.name)) for x in layer.xs if initializer(x) is None]
        yield from (([], [value(x)]) for x in quantizers if x is not None and x != y)
        return
    accs: list[AccOperand] = []
    vals: list[ValOperand] = []
    for term in layer.terms:
        match term:
            case Operand(value=v):
                x = plan.of(str(v.name))
                if x is not None:
                    vals.append(value(x))
            case _:
                acc = _accumulator(term, y, plan)
                if acc is not None and max(acc.bound) < ACC_LIMIT:
                    accs.append(acc)
    if accs or vals:
        yield accs, vals


def _accumulator(
    term: Linear | Pooled | Product, y: Quantizer, plan: QuantPlan
) -> AccOperand | None:
    """An accumulator's scale and bound, whatever codes come in; None where the plan is not complete."""
    q = plan.of(str(term.x.name))
    other = (
        None if isinstance(term, Pooled) else term.weight if isinstance(term, Linear) else term.y
    )
    w = q if other is None else plan.of(str(other.name))
    if q is None or w is None:
        return None
    unit = Fraction(q.scale[0]) / Fraction(y.scale[0])
    far = _far(q)
    match term:
        case Linear():
            codes, bias = product_codes(term, q, w, plan)
            bound = product_bound(codes, bias, q.format.lo, q.format.hi)
            return AccOperand(
                tuple(unit * Fraction(s) for s in w.scale), tuple(int(b) for b in bound)
            )
        case Product(node=node):
            depth = static_dims(term.x)[-1] if node.op_type == "MatMul" else 1
            return AccOperand((unit * Fraction(w.scale[0]),), (depth * far * _far(w),))
        case Pooled(window=window):
            size = static_dims(term.x)[2:]
            each = (int(np.prod(size)),) if window is None else counts(term.node, size, window)
            bound_ = far * (each[0] if window is None else int(np.prod(window.kernel)))
            return AccOperand(tuple(unit / n for n in each), (bound_,))


def _far(q: Quantizer) -> int:
    """The largest distance of a code from the zero point."""
    return max(q.format.hi - q.zero_point[0], q.zero_point[0] - q.format.lo)
