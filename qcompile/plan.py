"""QuantPlan: which tensors of the float graph are rounded, to what format, with what scale.

Plain data beside the graph. `slots` says where (known before any data is seen), `quantizers` says
how (known after calibration). Everything after this file is integer arithmetic on these numbers.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from qcompile.formats import Int


class Kind(enum.Enum):
    """What a quantized tensor is."""

    INPUT = "input"
    ACTIVATION = "activation"
    OUTPUT = "output"
    WEIGHT = "weight"


@dataclass(frozen=True, slots=True)
class Slot:
    """A place where the float graph will be rounded, before its scale is known.

    `members` are the float values that share the one quantizer: `tensor` itself and, for example, what a
    MaxPool or a Reshape makes of it. `known_range` holds whatever the data (Softmax: 0 to 1).
    `axis` is the channel axis of a per-channel weight, None for one scale per tensor.
    """

    tensor: str
    kind: Kind
    format: Int
    members: tuple[str, ...] = ()
    axis: int | None = None
    known_range: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Quantizer:
    """real = scale * (code - zero_point); scales are float32 numbers, one per tensor or per channel of `axis`."""

    format: Int
    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    axis: int | None = None

    def __post_init__(self) -> None:
        if any(not np.isfinite(s) or s <= 0 or float(np.float32(s)) != s for s in self.scale):
            raise ValueError(f"scales are positive float32 numbers, not {self.scale[:4]}")
        if len(self.scale) != len(self.zero_point):
            raise ValueError("a quantizer has as many zero points as scales")
        if any(not self.format.lo <= z <= self.format.hi for z in self.zero_point):
            raise ValueError(f"a zero point lies in {self.format}, {self.zero_point[:4]} does not")

    @property
    def per_channel(self) -> bool:
        """Is there one scale for each channel?"""
        return self.axis is not None


def affine(lo: float, hi: float, fmt: Int) -> Quantizer:
    """The asymmetric quantizer whose codes cover [lo, hi] and 0: scale = float32((hi - lo) / (levels - 1))."""
    lo, hi = min(float(lo), 0.0), max(float(hi), 0.0)
    tiny = float(np.finfo(np.float32).tiny) * 2.0**24
    scale = float(np.float32(max((hi - lo) / (fmt.levels - 1), tiny)))
    zero = int(np.clip(np.rint(fmt.lo - lo / scale), fmt.lo, fmt.hi))
    return Quantizer(fmt, (scale,), (zero,))


@dataclass(slots=True)
class QuantPlan:
    """All slots and, once calibrated, all quantizers, each by the name of its tensor."""

    slots: dict[str, Slot] = field(default_factory=dict)
    quantizers: dict[str, Quantizer] = field(default_factory=dict)

    def of(self, tensor: str) -> Quantizer | None:
        """The quantizer of a tensor or of the slot it is a member of; None where it is not rounded."""
        if tensor in self.quantizers:
            return self.quantizers[tensor]
        owner = self.owner(tensor)
        return None if owner is None else self.quantizers.get(owner)

    def owner(self, tensor: str) -> str | None:
        """The slot a tensor belongs to."""
        if tensor in self.slots:
            return tensor
        return next((s.tensor for s in self.slots.values() if tensor in s.members), None)

    def open_slots(self) -> Iterable[Slot]:
        """The slots that have no quantizer yet."""
        return (s for s in self.slots.values() if s.tensor not in self.quantizers)
