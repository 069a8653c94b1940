"""Find the scale and the zero point of every slot, in one pass over the data."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar, Literal, get_args

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.errors import BadInput
from qcompile.formats import Int
from qcompile.onnx.edit import constant
from qcompile.onnx.execute import FloatSession
from qcompile.pipeline import Context
from qcompile.plan import Kind, Quantizer, QuantPlan, Slot, affine, has_range

from .histogram import Histogram, NotFinite, Statistics
from .lattice import Distinct, lattice
from .ranges import HISTOGRAM_METHODS, METHODS, Method, choose

WeightsRange = Literal["minmax", "mse"]

_ZEROS = 2.0**-24
"""The scale of weights that are all 0: `widen` enlarges what is too fine for a bias, but never refines."""

# What these make of a value lies within its range; Concat needs all its operands known.
_MOVES = frozenset(
    {
        "Concat",
        "DepthToSpace",
        "Flatten",
        "Identity",
        "MaxPool",
        "Reshape",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)


@dataclass(frozen=True)
class Calibrate:
    """Every slot has a quantizer: asymmetric from the data for activations, symmetric from the values for weights.

    The range of a slot is the union over the values that share it (the operands of a Concat). Inputs on
    a lattice keep it exactly. Formats above 8 bits have codes to spare: but for `minmax`, their range is
    min-max times `headroom`. Histograms count at most `elements` elements of a tensor in a sample (0: all), at
    a stride and phase drawn from the seed and the name; extremes are over all elements.
    """

    name: ClassVar[str] = "calibrate"
    method: Method = "mse"
    input_method: Method = "minmax"
    weights_range: WeightsRange = "minmax"
    percentile: float = 99.99
    headroom: float = 1.25
    bins: int = 2048
    elements: int = 16384
    threads: int | None = None

    def __post_init__(self) -> None:
        for method in (self.method, self.input_method):
            if method not in METHODS:
                raise BadInput(f"calibration method '{method}' is not one of {', '.join(METHODS)}")
        if self.weights_range not in get_args(WeightsRange):
            raise BadInput(f"weights_range is minmax or mse, not '{self.weights_range}'")
        if not 50.0 < self.percentile <= 100.0:
            raise BadInput(f"percentile lies above 50 and up to 100, {self.percentile} does not")
        if not self.headroom >= 1.0 or not math.isfinite(self.headroom):
            raise BadInput(f"headroom is at least 1, not {self.headroom}")
        if self.bins & (self.bins - 1) or not 256 <= self.bins <= 1 << 20:
            raise BadInput(f"bins is a power of two from 256 to 2**20, not {self.bins}")
        if self.elements < 0:
            raise BadInput(f"elements is at least 0, not {self.elements}")

    def __call__(self, model: ir.Model, plan: QuantPlan, context: Context) -> bool:
        """Set the quantizers of all open slots."""
        wanted: dict[str, tuple[str, ...]] = {}
        slots = list(plan.open_slots())
        for slot in slots:
            if slot.known_range is not None:
                plan.quantizers[slot.tensor] = affine(*slot.known_range, slot.format)
            elif slot.kind is Kind.WEIGHT:
                plan.quantizers[slot.tensor] = self._weight(model, slot)
            else:
                wanted[slot.tensor] = _sources(model, slot)
        if not wanted:
            return bool(slots)
        if context.samples is None:
            raise BadInput("calibration needs data; give --calib")
        counted = {
            name
            for tensor, names in wanted.items()
            if self._method(plan.slots[tensor]) in HISTOGRAM_METHODS
            for name in names
        }
        statistics = {
            name: Statistics(Histogram(self.bins) if name in counted else None)
            for names in wanted.values()
            for name in names
        }
        distinct = {
            tensor: Distinct(plan.slots[tensor].format.levels)
            for tensor, names in wanted.items()
            if plan.slots[tensor].kind is Kind.INPUT and names == (tensor,)
        }
        self._collect(model, statistics, distinct, context)
        zeros: list[Slot] = []
        for tensor, names in wanted.items():
            slot = plan.slots[tensor]
            quantizer = lattice(distinct[tensor], slot.format) if tensor in distinct else None
            if quantizer is not None:
                context.log(f"{tensor!r} lies on a lattice of step {quantizer.scale[0]:.9g}")
            else:
                ranges = [self._range(statistics[name], slot) for name in names]
                lo, hi = min(r[0] for r in ranges), max(r[1] for r in ranges)
                quantizer = affine(lo, hi, slot.format)
                if not has_range(lo, hi):
                    zeros.append(slot)
            plan.quantizers[tensor] = quantizer
        _settle_zeros(zeros, plan)
        return True

    def _method(self, slot: Slot) -> Method:
        """The method of a slot; what is wider than its range asks for needs no histogram."""
        return "minmax" if _wide(slot) else self._asked(slot)

    def _asked(self, slot: Slot) -> Method:
        """With fewer than 8 bits an input is clipped as other tensors are."""
        whole = slot.kind is Kind.INPUT and slot.format.bits >= 8
        return self.input_method if whole else self.method

    def _range(self, statistics: Statistics, slot: Slot) -> tuple[float, float]:
        lo, hi = choose(statistics, self._method(slot), slot.format, self.percentile)
        room = self.headroom if _wide(slot) and self._asked(slot) != "minmax" else 1.0
        return room * lo, room * hi

    def _collect(
        self,
        model: ir.Model,
        statistics: Mapping[str, Statistics],
        distinct: Mapping[str, Distinct],
        context: Context,
    ) -> None:
        """One pass over the data, all statistics at once."""
        session = FloatSession(model, list(statistics), self.threads)
        done, thinned = 0, 0
        for batch in context.samples or ():
            for chunk in session.stream(batch):
                for name, array in chunk.items():
                    rows = array.reshape(len(array), -1)
                    stride, phase = _grid(name, rows.shape[1], self.elements, context.seed)
                    kept = statistics[name]
                    thinned += not kept.samples and kept.histogram is not None and stride > 1
                    try:
                        kept.add(rows, phase, stride)
                    except NotFinite as e:
                        sample = f"sample {done + e.row}"
                        raise BadInput(
                            f"the float model computes NaN or Inf at {name!r} from {sample}"
                        ) from e
                    if name in distinct:
                        distinct[name].add(array)
                done += len(array)
        if not done:
            raise BadInput("calibration needs at least one sample; the data set is empty")
        context.log(f"calibrated on {done} samples")
        if thinned:
            context.log(
                f"histograms of {thinned} large tensors count at most {self.elements} elements of a sample "
                f"(seed {context.seed}), extremes all of them"
            )

    def _weight(self, model: ir.Model, slot: Slot) -> Quantizer:
        values = constant(model.graph.initializers.get(slot.tensor))
        if values is None:
            raise BadInput(f"the weight {slot.tensor!r} is no constant of the model")
        if not np.all(np.isfinite(values)):
            raise BadInput(f"the weight {slot.tensor!r} holds NaN or Inf; the model is damaged")
        scales = symmetric_scales(values, slot.axis, slot.format, self.weights_range)
        return Quantizer(slot.format, scales, (0,) * len(scales), slot.axis)


def _settle_zeros(zeros: Sequence[Slot], plan: QuantPlan) -> None:
    """A tensor that is 0 on all samples has the finest scale of the others: no sum becomes coarse for it."""
    silent = {slot.tensor for slot in zeros}
    scales = [
        q.scale[0]
        for name, q in plan.quantizers.items()
        if name not in silent and plan.slots[name].kind is not Kind.WEIGHT
    ]
    for slot in zeros:
        plan.quantizers[slot.tensor] = replace(
            plan.quantizers[slot.tensor], scale=(min(scales, default=1.0),)
        )


def symmetric_scales(
    weights: NDArray[np.generic], axis: int | None, fmt: Int, range_: WeightsRange
) -> tuple[float, ...]:
    """The scales, per channel of `axis`, at which zero is code 0 and the range of the weights fits `fmt`.

    A channel of zeros has the largest scale of the others; zeros alone have one so fine that no sum or bias becomes
    coarse for their sake. mse: least squared error over clipped ranges.
    """
    by_channel = weights.reshape(1, -1) if axis is None else np.moveaxis(weights, axis, 0)
    rows: NDArray[np.float32] = by_channel.reshape(len(by_channel), -1).astype(
        np.float32, copy=False
    )
    full: NDArray[np.float64] = rows.max(axis=1, initial=0.0).astype(np.float64) / fmt.hi
    if fmt.lo:
        full = np.maximum(full, rows.min(axis=1, initial=0.0).astype(np.float64) / fmt.lo)
    full = _storable(full)
    if range_ == "mse":
        exact = rows.astype(np.float64)
        best, least = full, np.full(len(full), np.inf)
        for fraction in np.arange(1.0, 0.29, -0.02):
            scale = _storable(full * fraction)
            codes = np.clip(np.rint(exact / scale[:, np.newaxis]), fmt.lo, fmt.hi)
            error = np.square(exact - codes * scale[:, np.newaxis]).sum(axis=1)
            best, least = np.where(error < least, scale, best), np.minimum(error, least)
        full = best
    return tuple(full.tolist())


def _storable(scales: NDArray[np.float64]) -> NDArray[np.float64]:
    """Positive float32 numbers."""
    largest = scales.max(initial=0.0) or _ZEROS
    scales = np.where(scales > 0.0, scales, largest)
    return np.maximum(scales.astype(np.float32), np.finfo(np.float32).tiny).astype(np.float64)


@cache
def _grid(name: str, size: int, elements: int, seed: int) -> tuple[int, int]:
    """Stride and phase of the elements counted: a prime that divides no axis visits all channels and places."""
    if not elements or size <= elements:
        return 1, 0
    stride = -(-size // elements)
    while size % stride == 0 or any(stride % n == 0 for n in range(2, math.isqrt(stride) + 1)):
        stride += 1
    return stride, zlib.crc32(f"{seed} {name}".encode()) % stride


def _wide(slot: Slot) -> bool:
    return slot.format.bits > 8


def _sources(model: ir.Model, slot: Slot) -> tuple[str, ...]:
    """The values of a slot that no operator merely moved there from others of the slot."""
    group = {slot.tensor, *slot.members}
    moved = {
        output.name
        for node in model.graph
        if not node.domain and node.op_type in _MOVES
        for output in node.outputs
        if output.name in group
        and all(
            x is not None and x.name in group
            for x in (node.inputs if node.op_type == "Concat" else node.inputs[:1])
        )
    }
    return tuple(name for name in dict.fromkeys((slot.tensor, *slot.members)) if name not in moved)
