"""Ranges chosen for what they do to the layers that read a tensor, not to the tensor itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar
from zlib import crc32

import numpy as np
import onnx_ir as ir
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from qcompile.choose import Part, enough
from qcompile.errors import BadInput
from qcompile.formats import Int
from qcompile.onnx.edit import dims
from qcompile.onnx.execute import FloatSession
from qcompile.pipeline import Context, Samples
from qcompile.plan import Kind, Quantizer, QuantPlan, affine

from .layers import (
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
    View,
    initializer,
    partition,
)
from .operators import operands
from .prefix import spread
from .unfold import unfold

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

FACTORS = tuple(2.0 ** (k / 16) for k in (-16, -8, -4, -2, -1, 1, 2, 4, 8, 16))
"""By how much an end of a range, or both, may move in one step."""
STEPS = 8
TIE = 1e-4
"""A step is made where it saves more than this share of the error."""
SHRINK = tuple(np.linspace(1.0, 0.4, 13))
"""Scales tried for a channel of weights, as shares of the one that covers them."""
LEAST_POWER = 1e-30
HELD_BYTES = 512 << 20
"""What all rows of one part of the samples may take, with what the products make of them."""


# --- who reads a tensor -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reader:
    """A layer that reads a tensor: as a product, as an average, or element by element (`term` is None)."""

    tensor: str
    out: str
    term: Linear | Pooled | None

    @property
    def key(self) -> str:
        """Tells readers apart."""
        return f"{self.tensor} {self.out} {'' if self.term is None else self.term.node.name}"

    @property
    def values(self) -> list[str]:
        """The float values that must be known of it."""
        product = [self.term.node] if isinstance(self.term, Linear) else []
        return [self.tensor, self.out, *(str(n.outputs[0].name) for n in product)]

    def weights(self, inputs: int) -> Floats:
        """What multiplies the rows, [groups, outputs, inputs]."""
        match self.term:
            case Linear() as linear:
                array = initializer(linear.weight)
                assert array is not None
                rows = np.moveaxis(np.asarray(array, np.float32), linear.channel_axis, 0)
                groups = _groups(linear)
                return rows.reshape(groups, len(rows) // groups, -1)
            case Pooled():
                return np.full((1, 1, inputs), 1.0 / inputs, np.float32)
            case None:
                return np.ones((1, 1, 1), np.float32)

    def rows(self, seen: Mapping[str, Floats], limit: int, rng: np.random.Generator) -> Floats:
        """Operands as [groups, rows, inputs]: about `limit` numbers, of positions drawn alike."""
        x = seen[self.tensor]
        match self.term:
            case Linear() as linear:
                array = initializer(linear.weight)
                assert array is not None
                kernel = array.shape[2:] if linear.node.op_type == "Conv" else ()
                outputs = array.shape[linear.channel_axis]
                size = array.size // outputs * _groups(linear) + outputs
                result = linear.node.outputs[0]
                x, made = _own_axes(x, linear.x), _own_axes(seen[str(result.name)], result)
                return unfold(linear.node, kernel, x, made, max(1, limit // size), rng)[0]
            case Pooled(x=value, window=window):
                x = _own_axes(x, value)
                kernel = x.shape[2:] if window is None else window.kernel
                strides = kernel if window is None else window.strides
                windows = sliding_window_view(x, kernel, tuple(range(2, x.ndim)))
                at = (slice(None), slice(None), *(slice(None, None, s) for s in strides))
                flat = windows[at].reshape(-1, int(np.prod(kernel)))
            case None:
                flat = x.reshape(-1, 1)
        count = max(1, limit // flat.shape[1])
        if len(flat) > count:
            flat = flat[np.sort(rng.choice(len(flat), count, replace=False))]
        return np.ascontiguousarray(flat[np.newaxis])


def _own_axes(array: Floats, value: ir.Value) -> Floats:
    """The array without the axis of samples in front that a value has whose own leading axis counts none."""
    rank = len(dims(value) or array.shape)
    return array.reshape(-1, *array.shape[array.ndim - rank + 1 :])


def readers(layers: Sequence[Layer], plan: QuantPlan) -> dict[str, list[Reader]]:
    """Who reads the values of each slot; a slot is missing where something reads it that is neither linear nor a sum.

    A view or a Concat that shares its operand's quantizer reads nothing; an output of the graph is read by itself.
    """
    found: dict[str, list[Reader]] = {}
    opaque: set[str] = set()
    for layer in layers:
        out = str(layer.out.name)
        made = plan.owner(out)
        read: list[tuple[str, Linear | Pooled | None]] = []
        if isinstance(layer, Rescaled):
            for term in layer.terms:
                match term:
                    case Linear(x=x):
                        read.append((str(x.name), term))
                    case Pooled(x=x, window=window):
                        framed = window is not None and any(window.pads)
                        read.append((str(x.name), None if framed else term))
                    case Operand(value=value):
                        read += [] if initializer(value) is not None else [(str(value.name), None)]
                    case Product():
                        opaque |= {str(plan.owner(name)) for name in operands(layer)}
        elif isinstance(layer, View | Join):
            read += [(n, None) for n in operands(layer) if plan.owner(n) != made]
        else:
            opaque |= {str(plan.owner(name)) for name in operands(layer)}
        if layer.out.is_graph_output():
            read.append((out, None))
        for tensor, term_ in read:
            if (owner := plan.owner(tensor)) is not None:
                found.setdefault(owner, []).append(Reader(tensor, out, term_))
    opaque |= set_by_operators(layers, plan)
    return {name: r for name, r in found.items() if name not in opaque}


def set_by_operators(layers: Sequence[Layer], plan: QuantPlan) -> set[str]:
    """The slots whose scale is what their operator makes: of a Softmax, a normalization, an ArgMax."""
    return {
        str(plan.owner(str(x.out.name)))
        for x in layers
        if isinstance(x, SoftmaxLayer | Normalized | Index)
    }


def _groups(term: Linear) -> int:
    return term.node.attributes.get_int("group", 1) if term.node.op_type == "Conv" else 1


# --- what an error costs ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Seen:
    """A reader's float operands [groups, rows, inputs], its weights [groups, outputs, inputs], its result's variance.

    Of a product (`centred`) the mean of the error is left out, because the bias that is fitted later makes up for it;
    with `gain` also what a factor per output would undo, because weights below 8 bits have their scales fitted later.
    """

    x: Floats
    weights: Floats
    made: Floats
    power: float
    centred: bool
    gain: bool

    @staticmethod
    def of(x: Floats, weights: Floats, power: float, *, centred: bool, gain: bool) -> Seen:
        """The same, with what the product makes in float worked out."""
        made = x @ weights.transpose(0, 2, 1)
        return Seen(x, weights, made - _mean(made) if centred else made, power, centred, gain)

    def errors(self, q: Quantizer, weights: Floats | None = None) -> Doubles:
        """The mean squared error [groups, outputs] of the result over its variance, operands rounded by `q`.

        `weights` make the result where they are given, the float ones else.
        """
        used = self.weights if weights is None else weights
        made = fake(self.x, q) @ used.transpose(0, 2, 1)
        if self.centred:
            made -= _mean(made)
        if self.gain and weights is None:
            square = np.square(made).mean(axis=1, dtype=np.float64)
            both = (self.made * made).mean(axis=1, dtype=np.float64)
            whole = np.square(self.made).mean(axis=1, dtype=np.float64)
            explained = np.divide(both * both, square, out=np.zeros_like(both), where=square > 0)
            error: Doubles = np.maximum(whole - explained, 0.0)
        else:
            made -= self.made
            error = np.square(made).mean(axis=1, dtype=np.float64)
        return error / self.power


def _mean(made: Floats) -> Floats:
    mean: Floats = made.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
    return mean


def fake(x: Floats, q: Quantizer) -> Floats:
    """Real numbers as what their codes stand for, rounded half up."""
    zero, scale = np.float32(q.zero_point[0]), np.float32(q.scale[0])
    steps = x / scale
    steps += np.float32(0.5)
    np.floor(steps, out=steps)
    np.clip(steps, np.float32(q.format.lo) - zero, np.float32(q.format.hi) - zero, out=steps)
    steps *= scale
    return steps


def nearest(weights: Floats, scale: Doubles, fmt: Int) -> Floats:
    """Weights [groups, outputs, inputs] rounded to nearest at scales [groups, outputs]."""
    steps = scale[..., np.newaxis]
    return (np.clip(np.rint(weights / steps), fmt.lo, fmt.hi) * steps).astype(np.float32)


def candidates(q: Quantizer, lo: float, hi: float) -> list[Quantizer]:
    """Ranges to try instead of that of `q`: [lo, hi], which is what was seen, and neighbors of q's own.

    Both ends or one of them times FACTORS, no wider than what was seen or q's own; the zero point one to each side.
    """
    fmt, scale, zero = q.format, q.scale[0], q.zero_point[0]
    left, right = (fmt.lo - zero) * scale, (fmt.hi - zero) * scale
    found = [affine(lo, hi, fmt)]
    least, most = min(lo, left), max(hi, right)
    for f in FACTORS:
        a, b = max(least, left * f), min(most, right * f)
        found += [affine(a, b, fmt), affine(a, right, fmt), affine(left, b, fmt)]
    if left and right:
        found += [
            replace(q, zero_point=(z,)) for z in (zero - 1, zero + 1) if fmt.lo <= z <= fmt.hi
        ]
    return [c for c in dict.fromkeys(found) if c != q]


def search(cost: Callable[[Quantizer], float], q: Quantizer, lo: float, hi: float) -> Quantizer:
    """The range that steepest descent over `candidates` reaches from `q`, in at most STEPS steps."""
    least = cost(q)
    for _ in range(STEPS):
        tried = candidates(q, lo, hi)
        costs = [cost(c) for c in tried]
        best = int(np.argmin(costs))
        if not costs[best] < least * (1.0 - TIE):
            break
        q, least = tried[best], costs[best]
    return q


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the readers of a tensor saw on some samples, and the extremes of the tensor."""

    seen: tuple[Seen, ...]
    lo: float
    hi: float

    def cost(self, q: Quantizer, weights: Sequence[Floats | None]) -> float:
        """The error of a range: over the readers, the sum of noise over signal."""
        parts = zip(self.seen, weights, strict=True)
        return sum(float(s.errors(q, w).mean()) for s, w in parts)


def gather(
    model: ir.Model,
    plan: QuantPlan,
    wanted: Mapping[str, Sequence[Reader]],
    samples: Samples,
    *,
    seed: int,
    count: int,
    elements: int,
    threads: int | None = None,
) -> dict[str, Evidence]:
    """What the readers of each tensor see on `count` of the samples, in one run of the float network.

    About `elements` numbers a reader; all of them where there are no more.
    """
    every = [r for mine in wanted.values() for r in mine]
    names = {n for r in every for n in r.values}
    total = min(count, sum(len(next(iter(b.values()))) for b in samples))
    limit = min(elements, HELD_BYTES // 4 // (2 * len(every)))
    session = FloatSession(model, sorted(names), threads)
    rows: list[list[Floats]] = [[] for _ in every]
    sums = {r.out: np.zeros(3) for r in every}
    ends = {r.tensor: (0.0, 0.0) for r in every}
    done = 0
    for batch in spread(samples, total):
        for values in session.stream(batch):
            size = len(values[every[0].tensor])
            for reader, pieces in zip(every, rows, strict=True):
                rng = np.random.default_rng([seed, done, crc32(reader.key.encode())])
                pieces.append(reader.rows(values, max(1, limit * size // total), rng))
            for tensor, (lo, hi) in ends.items():
                x = values[tensor]
                ends[tensor] = min(lo, float(x.min())), max(hi, float(x.max()))
            for out, row in sums.items():
                y = values[out].astype(np.float64)
                row += (y.size, y.sum(), np.square(y).sum())
            done += size
    found = {}
    pending = iter(rows)
    for name, mine in wanted.items():
        seen = []
        for reader in mine:
            x = np.concatenate(next(pending), axis=1)
            n, first, second = sums[reader.out]
            power = max(float(second / n - (first / n) ** 2), LEAST_POWER)
            linear = reader.term if isinstance(reader.term, Linear) else None
            wq = None if linear is None else plan.of(str(linear.weight.name))
            seen.append(
                Seen.of(
                    x,
                    reader.weights(x.shape[2]),
                    power,
                    centred=linear is not None,
                    gain=wq is not None and wq.format.bits < 8,
                )
            )
        limits = [ends[r.tensor] for r in mine]
        found[name] = Evidence(tuple(seen), min(a for a, _ in limits), max(b for _, b in limits))
    return found


# --- the pass ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refine:
    """Every activation of at most `bits` bits has the range, near the calibrated one, that its readers lose least by.

    The loss of a range is what its rounding error e costs where the tensor is read: tr(W E[e e^T] W^T) over the
    variance of the reader's result, summed over the readers, from sampled rows of float operands (im2col); the network
    is run once for all candidates. Three of four samples choose, the fourth ones accept: a range that does not save
    the share `margin` of the error there as well is not taken. `rounds` times, where weights below 8 bits have a scale
    per channel and no codes yet, these scales are then chosen alike given the range, and the range given the weights.
    Inputs keep their ranges, as do tensors that a table, a Softmax or a Mul reads.
    Runs after calibrate and before widen, which needs the final scales; at most about `elements` numbers a reader.

    By default only below 8 bits: at 8 the range of least squared error serves the readers as well, and the outputs gain
    nothing. No channel has a clip of its own (dual clipping: RepQuant, Li et al. 2024): a Rescale clamps all
    channels at the same codes, so a channel's own clip would be a scale of its own, and those Equalize has decided
    before there are ranges. The range taken here clips every channel at its end over the channel's scale.
    """

    name: ClassVar[str] = "refine"
    bits: int = 7
    margin: float = 0.02
    rounds: int = 0
    elements: int = 1 << 20
    samples: int = 512
    threads: int | None = None
    fuse_residual: bool = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.margin < 1.0:
            raise BadInput(f"refine: margin lies from 0 up to 1, {self.margin} does not")
        if self.rounds < 0 or min(self.bits, self.elements, self.samples) < 1:
            raise BadInput("refine: bits, elements and samples are at least 1, rounds at least 0")

    def __call__(self, model: ir.Model, plan: QuantPlan, context: Context) -> bool:
        """Set the scales and zero points that were found better, and name them in the log."""
        if context.samples is None:
            raise BadInput("refine needs data; give --calib")
        wanted = {
            name: mine
            for name, mine in readers(
                partition(model, fuse_residual=self.fuse_residual), plan
            ).items()
            if plan.slots[name].kind in (Kind.ACTIVATION, Kind.OUTPUT)
            and plan.slots[name].known_range is None
            and plan.quantizers[name].format.bits <= self.bits
        }
        if not wanted:
            return False
        if not enough(context.samples):
            context.warn("refine: too few samples to hold some out; ranges stay as calibrated")
            return False
        chosen, held = (
            gather(
                model,
                plan,
                wanted,
                Part(context.samples, held_out=h),
                seed=context.seed,
                count=self.samples,
                elements=self.elements,
                threads=self.threads,
            )
            for h in (False, True)
        )
        taken = [
            self._tensor(name, mine, plan, chosen[name], held[name], context)
            for name, mine in wanted.items()
        ]
        context.log(f"refine: {sum(taken)} of {len(taken)} ranges changed")
        return any(taken)

    def _tensor(
        self,
        name: str,
        mine: Sequence[Reader],
        plan: QuantPlan,
        chosen: Evidence,
        held: Evidence,
        context: Context,
    ) -> bool:
        """Choose and accept the range of one tensor, and the scales of the weights it meets."""
        known, best = dict(plan.quantizers), plan.quantizers[name]
        weights: list[Floats | None] = [None] * len(mine)
        for round_ in range(self.rounds + 1):
            found = search(partial(chosen.cost, weights=weights), best, chosen.lo, chosen.hi)
            was, now = held.cost(best, weights), held.cost(found, weights)
            if found != best and now < (1.0 - self.margin) * was:
                gained = 10.0 * np.log10(was / now)
                context.log(
                    f"refine: {name!r} scale {best.scale[0]:.4g} -> {found.scale[0]:.4g}, "
                    f"{gained:.2f} dB less error where it is read"
                )
                best = found
            if round_ < self.rounds:
                weights = [
                    self._weights(r, plan, best, s, h)
                    for r, s, h in zip(mine, chosen.seen, held.seen, strict=True)
                ]
        plan.quantizers[name] = best
        return plan.quantizers != known

    def _weights(
        self, reader: Reader, plan: QuantPlan, q: Quantizer, chosen: Seen, held: Seen
    ) -> Floats | None:
        """Refine the scales of a reader's weights; the rounded weights, None where they are taken as float."""
        term = reader.term
        wq = plan.of(str(term.weight.name)) if isinstance(term, Linear) else None
        if (
            not isinstance(term, Linear)
            or wq is None
            or wq.format.bits >= 8
            or not wq.per_channel
            or str(term.weight.name) in plan.codes
            or str(term.weight.name) not in plan.quantizers
            or len(list(term.weight.uses())) != 1
        ):
            return None
        shape, fmt = chosen.weights.shape[:2], wq.format
        best = np.array(wq.scale).reshape(shape)
        full = np.abs(chosen.weights).max(axis=2).astype(np.float64) / fmt.hi
        full = np.where(full > 0, full, best)
        costs, kept = (s.errors(q, nearest(s.weights, best, fmt)) for s in (chosen, held))
        for share in SHRINK:
            scale = np.maximum((share * full).astype(np.float32), np.finfo(np.float32).tiny)
            scale = scale.astype(np.float64)
            rounded = nearest(chosen.weights, scale, fmt)
            cost, again = chosen.errors(q, rounded), held.errors(q, rounded)
            better = (cost < costs) & (again < (1.0 - self.margin) * kept)
            best, costs = np.where(better, scale, best), np.where(better, cost, costs)
        plan.quantizers[str(term.weight.name)] = replace(wq, scale=tuple(best.ravel().tolist()))
        return nearest(chosen.weights, best, fmt)
