"""Fixed point: a binary point for every tensor instead of a scale, so that every rescale is a shift."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.errors import BadInput
from qcompile.formats import Int
from qcompile.onnx.edit import constant
from qcompile.pipeline import Context
from qcompile.plan import Kind, Quantizer, QuantPlan

from .layers import Layer, Linear, Pooled, Rescaled, partition
from .refine import (
    Doubles,
    Evidence,
    Floats,
    Reader,
    gather,
    nearest,
    readers,
    set_by_operators,
)
from .views import counts, static_dims
from .widen import Widen

_SETTLED = 8
"""Widen enlarges scales at most so often before nothing changes any more."""


@dataclass(frozen=True)
class BinaryPoint:
    """Every scale is a power of two and every zero point 0, or the lowest code where a tensor is unsigned.

    These are the numbers of `ap_fixed` and `ap_ufixed`, rounded half up and saturated: a binary point for each tensor,
    and for each channel of weights that had a scale each. Points are searched (the idea of QFX, Dai et al. 2024,
    arXiv 2401.17544, by descent here): that of an activation among the one which covers what was seen and `below`
    finer ones, by the error where the tensor is read; that of weights alike, given the operand; `rounds` times over,
    each given the others. Wider formats than 8 bits cover the calibrated range, which has room to spare.

    Weights take in what is no power of two, where only products read a tensor. Then an average over n elements stays a
    sum at a binary point: its scale is a power of two over n; and an input keeps its codes, whose scale the caller
    has chosen, unless `inputs` have points too. Any other average is off by what its rescale reports. Runs after
    calibrate and widen and before round; on `samples` of the samples, at most about `elements` numbers a reader.
    """

    name: ClassVar[str] = "binary_point"
    unsigned: bool = True
    inputs: bool = False
    below: int = 3
    rounds: int = 2
    elements: int = 1 << 18
    samples: int = 256
    threads: int | None = None
    fuse_residual: bool = True

    def __post_init__(self) -> None:
        if self.below < 0 or min(self.rounds, self.elements, self.samples) < 1:
            raise BadInput(
                "binary_point: rounds, elements and samples are at least 1, below at least 0"
            )

    def __call__(self, model: ir.Model, plan: QuantPlan, context: Context) -> bool:
        """Set the scales and zero points of all quantizers."""
        if context.samples is None:
            raise BadInput("binary_point needs data; give --calib")
        if plan.codes:
            raise BadInput("binary_point runs before round, whose weights are for the final scales")
        layers = partition(model, fuse_residual=self.fuse_residual)
        search = _Search(model, plan, self, _units(layers, plan, not self.inputs))
        wanted = search.wanted(layers)
        search.evidence = gather(
            model,
            plan,
            wanted,
            context.samples,
            seed=context.seed,
            count=self.samples,
            elements=self.elements,
            threads=self.threads,
        )
        for _ in range(self.rounds):
            before = dict(plan.quantizers)
            for name, mine in wanted.items():
                search.activation(name, mine)
            for name, slot in plan.slots.items():
                if slot.kind is Kind.WEIGHT:
                    search.weight(name, wanted)
            if plan.quantizers == before:
                break
        self._settle(search, context)
        for name in wanted:
            q = plan.quantizers[name]
            sign = "" if q.zero_point[0] == 0 else "unsigned, "
            context.log(
                f"binary_point: {name!r} in steps of 2**{_exponent(q.scale[0])} ({sign}{q.format})"
            )
        return True

    def _settle(self, search: _Search, context: Context) -> None:
        """What 32 bits have no room for is coarser, at a binary point again."""
        plan = search.plan
        widen = Widen(fuse_residual=self.fuse_residual)
        for _ in range(_SETTLED):
            before = dict(plan.quantizers)
            widen(search.model, plan, context)
            for name, q in plan.quantizers.items():
                if q != before[name]:
                    unit = search.units.get(name, 1.0)
                    exponents = np.array([_covers(s / unit) for s in q.scale])
                    plan.quantizers[name] = replace(q, scale=_scales(unit, exponents))
            if plan.quantizers == before:
                return


@dataclass
class _Search:
    """The points found so far, and what every reader of a tensor saw of it in float."""

    model: ir.Model
    plan: QuantPlan
    options: BinaryPoint
    units: Mapping[str, float]
    evidence: Mapping[str, Evidence] = field(default_factory=dict)

    def wanted(self, layers: Sequence[Layer]) -> dict[str, Sequence[Reader]]:
        """Who reads each activation; one that no linear layer reads is taken as it is."""
        found, held = readers(layers, self.plan), set_by_operators(layers, self.plan)
        return {
            name: found.get(name) or [Reader(name, name, None)]
            for name, slot in self.plan.slots.items()
            if slot.kind is not Kind.WEIGHT and slot.known_range is None and name not in held
        }

    def activation(self, name: str, mine: Sequence[Reader]) -> None:
        """The point, and the sign, at which readers lose least."""
        seen, q = self.evidence[name], self.plan.quantizers[name]
        if self.plan.slots[name].kind is Kind.INPUT and name in self.units:
            return
        weights = [self._rounded(r, s.weights) for r, s in zip(mine, seen.seen, strict=True)]
        tried = list(self._candidates(name, seen.lo, seen.hi, q))
        costs = [seen.cost(c, weights) for c in tried]
        self.plan.quantizers[name] = tried[int(np.argmin(costs))]

    def _candidates(self, name: str, lo: float, hi: float, q: Quantizer) -> Iterator[Quantizer]:
        fmt, below = q.format, self.options.below
        if fmt.bits > 8:
            left, right = ((c - q.zero_point[0]) * q.scale[0] for c in (fmt.lo, fmt.hi))
            # codes of a wide format never run out: what calibration left free stays free, up to twice what was seen
            lo, hi, below = max(left, 2.0 * lo), min(right, 2.0 * hi), 0
        unit = self.units.get(name, 1.0)
        for zero in (0, fmt.lo) if self.options.unsigned else (0,):
            if zero and fmt.bits > 8 and lo < 0:
                continue
            most = max(hi / (fmt.hi - zero), lo / fmt.lo if not zero else 0.0) / unit
            top = _covers(most) if most > 0 else _exponent(q.scale[0] / unit)
            for exponent in range(top, top - below - 1, -1):
                yield Quantizer(fmt, _scales(unit, np.array([exponent])), (zero,))

    def _rounded(self, reader: Reader, weights: Floats) -> Floats | None:
        """A reader's weights at their points; as they are where they have none yet."""
        if not isinstance(reader.term, Linear):
            return None
        q = self.plan.quantizers[self._owner(str(reader.term.weight.name))]
        unit = self.units.get(self._owner(str(reader.term.weight.name)), 1.0)
        if any(math.frexp(s / unit)[0] != 0.5 for s in q.scale):
            return None
        return nearest(weights, _spread(q.scale, weights), q.format)

    def weight(self, name: str, wanted: Mapping[str, Sequence[Reader]]) -> None:
        """The points of weights, or of another constant, given the operands of the products that read them."""
        values = constant(self.model.graph.initializers.get(name))
        assert values is not None
        q, unit = self.plan.quantizers[name], self.units.get(name, 1.0)
        axis = q.axis
        by_channel = values.reshape(1, -1) if axis is None else np.moveaxis(values, axis, 0)
        rows = np.asarray(by_channel, np.float64).reshape(len(by_channel), -1)
        reach = np.maximum(rows.max(axis=1) / q.format.hi, rows.min(axis=1) / q.format.lo)
        reach = np.where(reach > 0, reach, np.array(q.scale)) / unit
        top = np.array([_covers(r) for r in reach])
        tried = [top - k for k in range(self.options.below + 1)]
        met = [
            (x, s)
            for x, mine in wanted.items()
            for r, s in zip(mine, self.evidence[x].seen, strict=True)
            if isinstance(r.term, Linear) and self._owner(str(r.term.weight.name)) == name
        ]
        costs = []
        for exponents in tried:
            scale = _scales(unit, exponents)
            if met:
                errors = [
                    s.errors(
                        self.plan.quantizers[x],
                        nearest(s.weights, _spread(scale, s.weights), q.format),
                    ).reshape(-1)
                    for x, s in met
                ]
                cost = np.sum(errors, axis=0)
            else:
                cost = _rounding_error(rows, np.array(scale), q.format)
            costs.append(cost if axis is not None else np.full(1, cost.sum()))
        best = np.argmin(np.stack(costs), axis=0)
        chosen = np.stack(tried)[best, np.arange(len(top))]
        self.plan.quantizers[name] = replace(q, scale=_scales(unit, chosen))

    def _owner(self, tensor: str) -> str:
        return self.plan.owner(tensor) or tensor


def _units(layers: Sequence[Layer], plan: QuantPlan, keep_inputs: bool) -> dict[str, float]:
    """The slots whose steps are powers of two times another number from 1 to 2, and that number.

    An average over n elements has 2**k / n, a kept input its scale, and the weights that read them the inverse.
    """
    found: dict[str, float] = {}
    read = readers(layers, plan)
    numbers = {
        n: q.scale[0] for n, q in plan.quantizers.items() if plan.slots[n].kind is Kind.INPUT
    }
    odd = {n: s for n, s in numbers.items() if keep_inputs} | dict(_averages(layers, plan))
    for name, number in odd.items():
        weights = [r.term.weight for r in read.get(name, ()) if isinstance(r.term, Linear)]
        alone = all(len(list(w.uses())) == 1 for w in weights)
        mantissa = 2.0 * math.frexp(number)[0]
        if alone and weights and len(weights) == len(read[name]):
            found[name] = float(np.float32(mantissa))
            found |= {str(w.name): float(np.float32(1.0 / mantissa)) for w in weights}
    return found


def _averages(layers: Sequence[Layer], plan: QuantPlan) -> Iterator[tuple[str, float]]:
    """The slots that hold an average over n elements, always as many, and 1 / n."""
    for layer in layers:
        if not isinstance(layer, Rescaled) or len(layer.terms) != 1:
            continue
        term, out = layer.terms[0], plan.owner(str(layer.out.name))
        if isinstance(term, Pooled) and out is not None:
            size, window = static_dims(term.x)[2:], term.window
            each = {math.prod(size)} if window is None else set(counts(term.node, size, window))
            if len(each) == 1:
                yield out, 1.0 / each.pop()


def _covers(step: float) -> int:
    """The smallest k for which 2**k >= step."""
    mantissa, exponent = math.frexp(step)
    return exponent - 1 if mantissa == 0.5 else exponent


def _exponent(step: float) -> int:
    """The k for which 2**k is nearest to a step, by ratio."""
    return round(math.log2(step))


def _scales(
    unit: float, exponents: Sequence[int] | np.ndarray[tuple[int], np.dtype[np.int64]]
) -> tuple[float, ...]:
    return tuple(float(np.float32(unit) * np.float32(2.0 ** int(k))) for k in exponents)


def _spread(scale: Sequence[float], weights: Floats) -> Doubles:
    """Scales as [groups, outputs]."""
    groups, outputs = weights.shape[:2]
    return np.broadcast_to(np.array(scale), (groups * outputs,)).reshape(groups, outputs)


def _rounding_error(rows: Doubles, scale: Doubles, fmt: Int) -> Doubles:
    steps = scale[:, np.newaxis]
    rounded = np.clip(np.rint(rows / steps), fmt.lo, fmt.hi) * steps
    error: Doubles = np.square(rows - rounded).sum(axis=1)
    return error
