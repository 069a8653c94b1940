"""Rescaling in vectors of words: which of the instructions' forms compute a step's Rescale exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from qcompile.ir import DType, Rescale, Value
from qcompile.ir.proof import accumulator_bound

from ..c.kernel import Step
from ..c.text import c_int

_NARROW_BITS = 15
"""A multiplier whose lowest bits are zero, this many, is an unsigned 16-bit number: one multiplication does."""

_PACK_MOST = 15
"""How far the instruction shifts that rounds, saturates and packs two words at once."""

_LIMIT = 1 << 31


@dataclass(frozen=True, slots=True)
class Term:
    """A value of 8 bits that a Rescale adds: (x - its zero point) * factor; the zero points are in the constant."""

    value: Value
    factor: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Requantization:
    """What becomes of an accumulator `a`; rows have one entry, or one a channel.

    h = floor((a << pre_shift) * m / 2**31) where m = multiplier, or 2**15 * multiplier if `narrow`;
    t = h, or (h >> 1) + constant + terms if `halved`;
    y = clamp(((t + 2**(shift - 1)) >> shift) + zero_point, lo, hi); a halved t holds the rounding already.

    Without a `multiplier` the accumulator is stored as it is.
    """

    out: DType
    multiplier: tuple[int, ...] = ()
    pre_shift: tuple[int, ...] = (0,)
    narrow: bool = False
    halved: bool = False
    constant: tuple[int, ...] = (0,)
    terms: tuple[Term, ...] = ()
    shift: tuple[int, ...] = (0,)
    zero_point: int = 0
    lo: int = 0
    hi: int = 0

    @property
    def packs(self) -> bool:
        """Can the instruction do it that shifts, saturates and packs two words at once?"""
        return len(self.shift) == 1 and _packs(self.shift[0], self.out, self.zero_point)

    @property
    def per_word(self) -> int:
        """Results that fit a word."""
        return 4 // self.out.bytes


def requantization(step: Step) -> Requantization | None:
    """How a step's accumulators are rescaled, or None where only the portable code can."""
    if step.rescale is None:
        return Requantization(step.output.type.dtype)
    op = step.rescale.op
    assert isinstance(op, Rescale)
    out = op.out
    shape = step.output.type.shape
    terms = step.rescale.inputs[1:]
    same = all(v.type.shape == shape and v.type.dtype.bytes == 1 for v in terms)
    if op.spatial or len(op.accs) != 1 or not same:
        return None
    (acc,) = op.accs
    if not op.vals and (short := _shared(step, op)) is not None:
        return short
    zero = [-v.zero_point for v in op.vals]
    rows = [op.f, *(v.multiplier for v in op.vals)]
    entries = max(map(len, rows))
    constant = [
        (1 << (_at(op.f, c) - 1))
        + sum(z * _at(v.multiplier, c) for z, v in zip(zero, op.vals, strict=True))
        for c in range(entries)
    ]
    narrow = _narrow(acc.multiplier)
    return Requantization(
        out,
        tuple(m >> _NARROW_BITS for m in acc.multiplier) if narrow else acc.multiplier,
        acc.pre_shift,
        narrow,
        True,
        tuple((k + _LIMIT) % (2 * _LIMIT) - _LIMIT for k in constant),
        tuple(Term(v, val.multiplier) for v, val in zip(terms, op.vals, strict=True)),
        _one(op.f),
        op.zero_point,
        op.lo,
        op.hi,
    )


def _shared(step: Step, op: Rescale) -> Requantization | None:
    """One shift for all channels, rounded and packed in one instruction: what is shifted less is scaled up first."""
    (acc,) = op.accs
    if not _narrow(acc.multiplier):
        return None
    channels = step.output.type.shape[-1]
    most = max(op.f)
    bounds = [int(b) for b in accumulator_bound(step.node)]
    pre, reach = [], 0
    for c in range(channels):
        places = _at(acc.pre_shift, c) + most - _at(op.f, c)
        shifted = _at(bounds, c) << places
        pre.append(places)
        # the rounding instruction may add in 32 bits
        if shifted >= _LIMIT:
            return None
        reach = max(reach, (shifted * _at(acc.multiplier, c) >> 31) + 1 + (1 << most))
    if reach >= _LIMIT or not _packs(most + 1, op.out, op.zero_point):
        return None
    return Requantization(
        op.out,
        tuple(m >> _NARROW_BITS for m in acc.multiplier),
        _one(pre),
        narrow=True,
        shift=(most + 1,),
        zero_point=op.zero_point,
        lo=op.lo,
        hi=op.hi,
    )


def _packs(shift: int, out: DType, zero_point: int) -> bool:
    """Is the shift in reach, and does saturation to 16 bits before the zero point is added change nothing?"""
    room = zero_point == 0 if out.bytes == 2 else abs(zero_point) < 1 << 14
    return shift <= _PACK_MOST and out.bytes < 4 and room


def _narrow(multiplier: Sequence[int]) -> bool:
    return all(m % (1 << _NARROW_BITS) == 0 for m in multiplier)


def _at(row: Sequence[int], channel: int) -> int:
    return row[channel] if len(row) > 1 else row[0]


def _one(row: Sequence[int]) -> tuple[int, ...]:
    """One entry where all agree."""
    return (row[0],) if len(set(row)) == 1 else tuple(row)


@dataclass(frozen=True, slots=True)
class Parameters:
    """How C names a channel's parameters: `vector` as words in every lane, `number` for instructions that take one.

    Without `number`, parameters differ between lanes.
    """

    vector: Callable[[str, Sequence[int], int], str]
    number: Callable[[str, Sequence[int], int], str] | None = None


def column(
    plan: Requantization,
    result: str,
    accumulators: Sequence[str],
    terms: Sequence[str],
    get: Parameters,
) -> list[str]:
    """C that makes the vector `result`: the words of `accumulators` rescaled, packed one beside the other.

    `terms` name the columns of the values that are added.
    """
    words, lines = [], []
    for i, a in enumerate(accumulators):
        made, word = _word(plan, f"{result}_{i}", a, i, terms, get)
        lines += made
        words.append(word)
    kind = plan.out
    if kind.bytes == 4:
        return [*lines, f"{result} = {_clamped(plan, words[0])};"]
    # Of two vectors the instructions put the second's words first.
    pairs = [(0, 1)] if kind.bytes == 2 else [(0, 2), (1, 3)]
    halves = []
    for low, high in pairs:
        if not plan.packs:
            half = f"Q6_Vh_vsat_VwVw({words[high]}, {words[low]})"
        else:
            rounding = "" if plan.halved else "rnd_"
            operands = f"{words[high]}, {words[low]}, {plan.shift[0]}"
            half = f"Q6_Vh_vasr_VwVwR_{rounding}sat({operands})"
        halves.append(half)
    if kind.bytes == 2:
        return [*lines, f"{result} = {_clamped(plan, halves[0])};"]
    zero = plan.zero_point if plan.packs else 0
    unsigned = not kind.signed or zero == -128
    if zero and not (kind.signed and zero == -128):
        added = f"Q6_V_vsplat_R({c_int(splat16(zero))})"
        halves = [f"Q6_Vh_vadd_VhVh_sat({half}, {added})" for half in halves]
    pack = "Q6_Vub_vsat_VhVh(" if unsigned else "Q6_Vb_vasr_VhVhR_sat("
    packed = f"{pack}{halves[1]}, {halves[0]}{')' if unsigned else ', 0)'}"
    if kind.signed and zero == -128:
        packed = f"Q6_V_vxor_VV({packed}, Q6_V_vsplat_R({splat8(128)}))"
    return [*lines, f"{result} = {_clamped(plan, packed)};"]


def _word(
    plan: Requantization, name: str, a: str, i: int, terms: Sequence[str], get: Parameters
) -> tuple[list[str], str]:
    """C of one channel's words up to the packing, and what they are called then."""
    if not plan.multiplier:
        return [], a
    if any(plan.pre_shift):
        if get.number:
            a = f"Q6_Vw_vasl_VwR({a}, {get.number('pre_shift', plan.pre_shift, i)})"
        else:
            a = f"Q6_Vw_vasl_VwVw({a}, {get.vector('pre_shift', plan.pre_shift, i)})"
    m = get.vector("multiplier", plan.multiplier, i)
    lines = [f"HVX_Vector {name} = hvx_scale{16 if plan.narrow else 32}({a}, {m});"]
    if plan.halved:
        constant = get.vector("constant", plan.constant, i)
        lines.append(f"{name} = Q6_Vw_vasracc_VwVwR({constant}, {name}, 1);")
    for at, term in enumerate(plan.terms):
        x = terms[at].format(i)
        n = get.vector(f"factor{at or ''}", term.factor, i)
        lines.append(f"{name} = Q6_Vw_vadd_VwVw({name}, hvx_multiply({x}, {n}));")
    if plan.packs:
        return lines, name
    if get.number:
        shift = f"Q6_Vw_vasr_VwR({name}, {get.number('shift', plan.shift, i)})"
    else:
        shift = f"Q6_Vw_vasr_VwVw({name}, {get.vector('shift', plan.shift, i)})"
    if plan.zero_point:
        shift = f"Q6_Vw_vadd_VwVw({shift}, Q6_V_vsplat_R({c_int(plan.zero_point)}))"
    lines.append(f"{name} = {shift};")
    return lines, name


def _clamped(plan: Requantization, vector: str) -> str:
    """The vector held inside [lo, hi], where its type does not do that already."""
    if not plan.multiplier:
        return vector
    kind = plan.out
    holds = np.iinfo(kind.numpy)
    letter = {1: "b" if kind.signed else "ub", 2: "h", 4: "w"}[kind.bytes]
    for bound, limit, name in (
        (plan.lo, int(holds.min), "max"),
        (plan.hi, int(holds.max), "min"),
    ):
        if bound != limit:
            call = f"Q6_V{letter}_v{name}_V{letter}V{letter}"
            vector = f"{call}({vector}, Q6_V_vsplat_R({c_int(_splat(bound, kind.bytes))}))"
    return vector


def _splat(n: int, size: int) -> int:
    """The word that holds n in every `size` bytes."""
    return {1: splat8(n), 2: splat16(n)}.get(size, n)


def splat8(n: int) -> int:
    """The word of four bytes n."""
    return int(np.full(4, n & 0xFF, np.uint8).view("<i4")[0])


def splat16(n: int) -> int:
    """The word of two halves n."""
    return int(np.full(2, n & 0xFFFF, np.uint16).view("<i4")[0])


def channel_word(value: Value, vector: str, place: int) -> str:
    """C of one channel of a column of four."""
    return f"hvx_{'' if value.type.dtype.signed else 'un'}signed({vector}, {place})"
