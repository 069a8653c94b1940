"""QuantPlan: which tensors of the float graph are rounded, to what format, with what scale.

Plain data beside the graph. `slots` says where (known before any data is seen), `quantizers` says
how (known after calibration). Everything after this file is integer arithmetic on these numbers.
"""

from __future__ import annotations

import enum
import io
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qcompile.errors import BadInput
from qcompile.formats import Int, parse_format
from qcompile.ir import text
from qcompile.npz import open_arrays
from qcompile.recipe import known_keys, one_of

PLAN_FILE, ARRAYS_FILE = "plan.toml", "plan.npz"
TIED = "qcompile.tied"
"""The key under which float values that play one role in every step of an unrolled loop name it: they share a slot."""


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
    scale = float(np.float32((hi - lo) / (fmt.levels - 1))) if has_range(lo, hi) else 1.0
    zero = int(np.clip(np.rint(fmt.lo - lo / scale), fmt.lo, fmt.hi))
    return Quantizer(fmt, (scale,), (zero,))


def has_range(lo: float, hi: float) -> bool:
    """Is a tensor within [lo, hi] ever anything but 0, so that it takes a certain scale to hold it?"""
    return max(hi, 0.0) - min(lo, 0.0) > 1e-30


@dataclass(frozen=True, slots=True)
class Channels:
    """A float tensor was replaced by scale * old + shift, one entry for each channel of `axis`."""

    axis: int
    scale: tuple[float, ...]
    shift: tuple[float, ...]

    def __post_init__(self) -> None:
        if not all(0 < s < np.inf for s in self.scale) or not np.all(np.isfinite(self.shift)):
            raise ValueError("channel scales are positive, shifts finite numbers")
        if len(self.scale) != len(self.shift) or self.axis < 0:
            raise ValueError("as many channel scales as shifts, along an axis from 0")


@dataclass(slots=True)
class QuantPlan:
    """All slots and, once calibrated, all quantizers, each by the name of its tensor; and what passes decided besides.

    `codes`: the integer weights of a tensor, in the shape of its float weights; without, they are rounded to nearest.
    `biases`: the real bias per output channel of a product, by the name of the value the product's node makes.
    `channels`: how the float model was rewritten before its ranges were taken (equalization).
    """

    slots: dict[str, Slot] = field(default_factory=dict)
    quantizers: dict[str, Quantizer] = field(default_factory=dict)
    codes: dict[str, NDArray[np.int8]] = field(default_factory=dict)
    biases: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    channels: dict[str, Channels] = field(default_factory=dict)

    def copy(self) -> QuantPlan:
        """A plan to edit apart; arrays are shared, because nobody writes into them."""
        return QuantPlan(
            dict(self.slots),
            dict(self.quantizers),
            dict(self.codes),
            dict(self.biases),
            dict(self.channels),
        )

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


def files(plan: QuantPlan) -> dict[str, bytes]:
    """The plan as plan.toml and, where there are arrays, plan.npz; the same bytes for the same plan."""
    arrays: dict[str, NDArray[np.generic]] = {}
    for codes in plan.codes.values():
        arrays[text.digest(codes)] = codes
    for bias in plan.biases.values():
        arrays[text.digest(bias)] = bias
    made = {PLAN_FILE: dump(plan).encode()}
    if arrays:
        buffer = io.BytesIO()
        np.savez(buffer, **{k: arrays[k] for k in sorted(arrays)})  # type: ignore[arg-type]
        made[ARRAYS_FILE] = buffer.getvalue()
    return made


def read(path: Path) -> QuantPlan:
    """A plan from plan.toml and the plan.npz beside it; BadInput says what is wrong with them."""
    try:
        content = path.read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"cannot read the plan {path}: {e}") from e
    beside = path.with_name(ARRAYS_FILE)
    stored = open_arrays(beside) if beside.is_file() else {}
    return parse(content, {key: array.whole() for key, array in stored.items()})


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
        if name in plan.codes:
            lines.append(f'codes = "{text.digest(plan.codes[name])}"')
    for name, bias in plan.biases.items():
        lines += ["", f"[products.{_key(name)}]", f'bias = "{text.digest(bias)}"']
    for name, c in plan.channels.items():
        lines += ["", f"[channels.{_key(name)}]", f"axis = {c.axis}"]
        lines.append(f"scale = [{', '.join(repr(float(x)) for x in c.scale)}]")
        lines.append(f"shift = [{', '.join(repr(float(x)) for x in c.shift)}]")
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


def parse(content: str, arrays: Mapping[str, NDArray[np.generic]] | None = None) -> QuantPlan:
    """Read a plan that `dump` wrote or a person edited; BadInput names the tensor and the key that is wrong.

    `arrays` holds what the plan refers to by digest.
    """
    try:
        data = tomllib.loads(content)
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise BadInput(f"the plan is no TOML file: {e}") from e
    known_keys(data, ("version", "tensors", "products", "channels"), "plan")
    if data.get("version") != 1:
        raise BadInput("the plan has another version than 1; make it anew")
    plan, stored = QuantPlan(), arrays or {}
    for name, entry in _table(data, "tensors", "tensor"):
        try:
            _entry(plan, name, entry, stored)
        except (ValueError, TypeError, OverflowError) as e:
            raise BadInput(f"plan, tensor {name}: {e}") from e
    for name, entry in _table(data, "products", "product"):
        try:
            known_keys(entry, ("bias",), f"plan, product {name}")
            plan.biases[name] = _bias(entry.get("bias"), stored)
        except ValueError as e:
            raise BadInput(f"plan, product {name}: {e}") from e
    for name, entry in _table(data, "channels", "channels of"):
        try:
            known_keys(entry, ("axis", "scale", "shift"), f"plan, channels of {name}")
            axis = entry.get("axis")
            if type(axis) is not int:
                raise ValueError("axis is an integer from 0")
            scale, shift = _numbers(entry.get("scale")), _numbers(entry.get("shift"))
            plan.channels[name] = Channels(axis, tuple(scale), tuple(shift))
        except ValueError as e:
            raise BadInput(f"plan, channels of {name}: {e}") from e
    owners: dict[str, str] = {}
    for slot in plan.slots.values():
        for member in dict.fromkeys((slot.tensor, *slot.members)):
            if owners.setdefault(member, slot.tensor) != slot.tensor:
                raise BadInput(
                    f"plan, tensor {slot.tensor}: {member} belongs to {owners[member]} already"
                )
    return plan


def _table(data: Mapping[str, object], key: str, what: str) -> list[tuple[str, dict[str, object]]]:
    entries = data.get(key, {})
    if not isinstance(entries, dict):
        raise BadInput(f"the plan's [{key}] is a table of tables")
    for name, entry in entries.items():
        if not isinstance(entry, dict):
            raise BadInput(f"plan, {what} {name}: it is a table of keys and values")
    return list(entries.items())


def _array(digest: object, stored: Mapping[str, NDArray[np.generic]]) -> NDArray[np.generic]:
    """The array of a digest, whose contents must be what it says."""
    if not isinstance(digest, str) or digest not in stored:
        raise ValueError(f"{ARRAYS_FILE}, beside the plan, lacks {str(digest)[:80]}")
    if text.digest(stored[digest]) != digest:
        raise ValueError(f"{ARRAYS_FILE} is damaged: an array does not match its digest")
    return stored[digest]


def _bias(digest: object, stored: Mapping[str, NDArray[np.generic]]) -> NDArray[np.float64]:
    found = _array(digest, stored)
    if found.dtype != np.float64 or found.ndim != 1 or not np.all(np.isfinite(found)):
        raise ValueError("a bias is a row of finite float64 numbers")
    return found.astype(np.float64)


def _codes(digest: object, stored: Mapping[str, NDArray[np.generic]], fmt: Int) -> NDArray[np.int8]:
    found = _array(digest, stored)
    if found.dtype != np.int8:
        raise ValueError(f"codes are int8, not {found.dtype}")
    if found.size and (found.min() < fmt.lo or found.max() > fmt.hi):
        raise ValueError(f"its codes do not all lie in {fmt}")
    return found.astype(np.int8)


_KEYS = ("kind", "format", "members", "axis", "known_range", "scale", "zero_point", "codes")


def _entry(
    plan: QuantPlan, name: str, entry: dict[str, object], stored: Mapping[str, NDArray[np.generic]]
) -> None:
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
    if "codes" in entry:
        plan.codes[name] = _codes(entry["codes"], stored, fmt)


def _numbers(value: object) -> list[float]:
    items: list[object] = value if isinstance(value, list) else [value]
    numbers = [float(i) for i in items if isinstance(i, int | float) and not isinstance(i, bool)]
    if not items or len(numbers) != len(items):
        raise ValueError(f"'{str(value)[:40]}' is no number or list of numbers")
    return numbers
