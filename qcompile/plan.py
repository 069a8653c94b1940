"""QuantPlan: which tensors of the float graph are rounded, to what format, with what scale.

Plain data beside the graph. `slots` says where (known before any data is seen), `quantizers` says
how (known after calibration). Everything after this file is integer arithmetic on these numbers.
"""

from __future__ import annotations

import enum
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from qcompile.errors import BadInput
from qcompile.formats import Int, parse_format
from qcompile.recipe import known_keys, one_of


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
        if not all(0 < s < np.inf and _is_float32(s) for s in self.scale):
            raise ValueError(f"scales are positive float32 numbers, not {self.scale[:4]}")
        if len(self.scale) != len(self.zero_point):
            raise ValueError("a quantizer has as many zero points as scales")
        if any(not self.format.lo <= z <= self.format.hi for z in self.zero_point):
            raise ValueError(f"a zero point lies in {self.format}, {self.zero_point[:4]} does not")

    @property
    def per_channel(self) -> bool:
        """Is there one scale for each channel?"""
        return self.axis is not None


def _is_float32(x: float) -> bool:
    with np.errstate(over="ignore"):
        return float(np.float32(x)) == x


def affine(lo: float, hi: float, fmt: Int) -> Quantizer:
    """The asymmetric quantizer whose codes cover [lo, hi] and 0: scale (hi - lo) / (levels - 1), or 1 for [0, 0]."""
    lo, hi = min(float(lo), 0.0), max(float(hi), 0.0)
    # a tensor that is 0 on all samples has no range; any scale holds 0, and 1 keeps later ratios ordinary
    scale = float(np.float32((hi - lo) / (fmt.levels - 1))) if hi - lo > 1e-30 else 1.0
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


def dump(plan: QuantPlan) -> str:
    """The plan as TOML; scales are written so that they read back as exactly the same float32 numbers."""
    lines = ["version = 1"]
    for name, slot in plan.slots.items():
        q = plan.quantizers.get(name)
        lines += [
            "",
            f"[tensors.{_key(name)}]",
            f'kind = "{slot.kind.value}"',
            f'format = "{slot.format}"',
        ]
        members = [m for m in slot.members if m != name]
        if members:
            lines.append(f"members = [{', '.join(map(_key, members))}]")
        if slot.axis is not None:
            lines.append(f"axis = {slot.axis}")
        if slot.known_range is not None:
            lines.append(f"known_range = [{', '.join(repr(float(r)) for r in slot.known_range)}]")
        if q is not None:
            lines.append(f"scale = {_row([repr(float(s)) for s in q.scale])}")
            lines.append(f"zero_point = {_row([str(z) for z in q.zero_point])}")
    return "\n".join(lines) + "\n"


def _row(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"[{', '.join(items)}]"


def _key(name: str) -> str:
    """A TOML basic string: quotes, backslashes and control characters escaped."""
    out = []
    for ch in name:
        if ch in '"\\':
            out.append(f"\\{ch}")
        elif ord(ch) < 32 or ord(ch) == 127:
            out.append(f"\\u{ord(ch):04x}")
        else:
            out.append(ch)
    return f'"{"".join(out)}"'


def parse(text: str) -> QuantPlan:
    """Read a plan that `dump` wrote or a person edited; BadInput names the tensor and the key that is wrong."""
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise BadInput(f"the plan is no TOML file: {e}") from e
    known_keys(data, ("version", "tensors"), "plan")
    if data.get("version") != 1:
        raise BadInput("the plan has another version than 1; make it anew")
    plan = QuantPlan()
    tensors = data.get("tensors", {})
    if not isinstance(tensors, dict):
        raise BadInput("the plan's [tensors] is a table of tables")
    for name, entry in tensors.items():
        try:
            _entry(plan, name, entry)
        except (ValueError, TypeError, OverflowError) as e:
            raise BadInput(f"plan, tensor {name}: {e}") from e
    owners: dict[str, str] = {}
    for slot in plan.slots.values():
        for member in dict.fromkeys((slot.tensor, *slot.members)):
            if owners.setdefault(member, slot.tensor) != slot.tensor:
                raise BadInput(
                    f"plan, tensor {slot.tensor}: {member} belongs to {owners[member]} already"
                )
    return plan


_KEYS = ("kind", "format", "members", "axis", "known_range", "scale", "zero_point")


def _entry(plan: QuantPlan, name: str, entry: object) -> None:
    if not isinstance(entry, dict):
        raise ValueError("it is a table of keys and values")
    known_keys(entry, _KEYS, f"plan, tensor {name}")
    members, axis, known = entry.get("members", []), entry.get("axis"), entry.get("known_range")
    if not isinstance(members, list) or not all(isinstance(m, str) for m in members):
        raise ValueError("members is a list of names")
    if axis is not None and (type(axis) is not int or axis < 0):
        raise ValueError("axis is an integer from 0")
    try:
        fmt = parse_format(str(entry.get("format")))
    except BadInput as e:
        raise ValueError(str(e)) from e
    kind = one_of(entry.get("kind"), tuple(k.value for k in Kind), f"plan, tensor {name}: kind")
    reach = None if known is None else tuple(_numbers(known))
    if reach is not None and not (len(reach) == 2 and -np.inf < reach[0] <= reach[1] < np.inf):
        raise ValueError("known_range is the least and the greatest value")
    plan.slots[name] = Slot(
        name,
        Kind(kind),
        fmt,
        (name, *members),
        axis,
        None if reach is None else (reach[0], reach[1]),
    )
    if "zero_point" in entry and "scale" not in entry:
        raise ValueError("a zero point without a scale")
    if "scale" in entry:
        zeros = _numbers(entry.get("zero_point", 0))
        if any(z != int(z) for z in zeros):
            raise ValueError("zero points are integers")
        plan.quantizers[name] = Quantizer(
            fmt, tuple(_numbers(entry["scale"])), tuple(int(z) for z in zeros), axis
        )


def _numbers(value: object) -> list[float]:
    items: list[object] = value if isinstance(value, list) else [value]
    numbers = [float(i) for i in items if isinstance(i, int | float) and not isinstance(i, bool)]
    if not items or len(numbers) != len(items):
        raise ValueError(f"'{str(value)[:40]}' is no number or list of numbers")
    return numbers
