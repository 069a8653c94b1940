"""Which fused Rescales the micro-kernels apply in registers, and the constants they take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qcompile.ir import Conv, DType, Rescale, Value
from qcompile.ir.proof import accumulator_bound, code_range, product_bound, prove_rescale

from ..c.kernel import Step, constant

HERE = Path(__file__).parent
HEADER = HERE / "dsp.h"
"""The micro-kernels."""

LIMIT = 1 << 31
"""What 32 bits do not hold."""


@dataclass(frozen=True, eq=False)
class Plain:
    """One accumulator: y = saturate(zero_point + ((acc * multiplier + 2**31) >> 32)), one SMMLAR and one SSAT.

    The contract's (((acc << p) * m) >> 32) + 2**(f-1)) >> f is floor(acc * m * 2**(p - f) / 2**32 + 1/2): nested floors
    are one. The low bits of m are zero, so m * 2**(p - f) is an integer.
    """

    multipliers: NDArray[np.int32]
    zero_point: int
    bits: int


@dataclass(frozen=True, eq=False)
class Sum:
    """An accumulator and a value: y = saturate8((constant + x * factor + high(acc << p, m)) >> fraction).

    `multipliers` hold m and p, which stands in the low bits that are zero in m.
    """

    multipliers: NDArray[np.int32]
    value: Value
    factor: int
    constant: int
    fraction: int


def _row(entries: tuple[int, ...], channels: int) -> list[int]:
    return list(entries if len(entries) > 1 else entries * channels)


def _accumulator(step: Step, kinds: tuple[DType, ...]) -> Rescale | None:
    """The Rescale of one accumulator along the channels, saturating to a whole type."""
    if step.rescale is None or not isinstance(op := step.rescale.op, Rescale):
        return None
    whole = op.out in kinds and (op.lo, op.hi) == (op.out.lo, op.out.hi)
    if len(op.accs) != 1 or not whole:
        return None
    rows = (op.f, op.accs[0].multiplier, op.accs[0].pre_shift, *(v.multiplier for v in op.vals))
    return None if op.spatial and any(len(set(r)) > 1 for r in rows) else op


def _whole(m: int, f: int, fraction: int, bound: int, steps: range) -> int | None:
    """The integer n with n * 2**-fraction rescaling each accumulator up to `bound` as m * 2**-f, if there is one.

    Where the quotient is no integer, a neighbour will do if it brings no accumulator to another step.
    """
    nearest = m >> (f - fraction)
    if m == nearest << (f - fraction):
        return nearest

    def first(step: int, m: int, f: int) -> int:
        """The smallest accumulator that reaches a step, or the bound that it lies beyond."""
        if m == 0:
            return bound + 1 if step > 0 else -bound
        return max(-bound, min(-(((1 - 2 * step) << (31 + f)) // m), bound + 1))

    for n in (nearest, nearest + 1):
        if all(first(step, m, f) == first(step, n, fraction) for step in steps):
            return n
    return None


def plain(
    step: Step, kinds: tuple[DType, ...] = (DType.I8,), fraction: int = 0, left: int = 0
) -> Plain | None:
    """The constants, where the step's Rescale has this shape; the sum is shifted left, the product right at last."""
    op = _accumulator(step, kinds)
    if op is None or op.vals or (abs(op.zero_point) + 1) << fraction >= 1 << 29:
        return None
    channels = step.output.type.shape[-1]
    bounds = _row(tuple(int(b) for b in accumulator_bound(step.node)), channels)
    steps = range(op.lo - op.zero_point + 1, op.hi - op.zero_point + 1)
    rows = (op.accs[0].multiplier, op.accs[0].pre_shift, op.f)
    found = []
    for m, p, f, bound in zip(
        *(_row(r[:1] if op.spatial else r, channels) for r in rows), bounds, strict=True
    ):
        if f + left < fraction or bound << left >= LIMIT:
            return None
        scaled = _whole(m << p, f + left, fraction, bound << left, steps)
        if scaled is None or scaled >= LIMIT:
            return None
        found.append(scaled)
    return Plain(np.array(found, np.int32), op.zero_point, op.out.bits)


def skip(step: Step) -> Sum | None:
    """The constants, where the step's Rescale has this shape."""
    op = _accumulator(step, (DType.I8,))
    if op is None or step.rescale is None or len(op.vals) != 1:
        return None
    (value,) = step.rescale.inputs[1:]
    one = len(set(op.f)) == len(set(op.vals[0].multiplier)) == 1
    kind = value.type.dtype
    alike = value.type.shape == step.output.type.shape and kind.signed and kind.bits <= 8
    if not one or not alike or value.const is not None or value is step.node.inputs[0]:
        return None
    f, n, channels = op.f[0], op.vals[0].multiplier[0], step.output.type.shape[-1]
    if prove_rescale(step.rescale) + (abs(op.zero_point) << f) >= LIMIT:
        return None
    constant = (1 << (f - 1)) + (op.zero_point << f) - op.vals[0].zero_point * n
    found = []
    rows = (op.accs[0].multiplier, op.accs[0].pre_shift)
    for m, p in zip(*(_row(r[:1] if op.spatial else r, channels) for r in rows), strict=True):
        if m % 32:
            return None
        found.append(m | p)
    return Sum(np.array(found, np.int32), value, n, wrapped(constant), f)


def wrapped(n: int) -> int:
    """The int32 that equals n modulo 2**32: what it is added to is within 32 bits again."""
    return (n + LIMIT) % (2 * LIMIT) - LIMIT


@dataclass(frozen=True, eq=False)
class Fields:
    """A `Plain` Rescale whose constants take only the bits they need, and the offset that makes the biases small.

    The offset is added to every activation: bias - offset * sum(weights) takes fewer bits.
    """

    constants: NDArray[np.uint8]
    offset: int
    bias_low: int
    bias_bits: int
    shift_bits: int
    shift_low: int
    multiplier_bits: int
    left: int
    addend: int
    fraction: int
    bits: int


_READ = 25
"""Bits that one unaligned word is sure to hold, wherever they begin in a byte."""


def packed_fields(step: Step) -> Fields | None:
    """The constants, where the step's Rescale is `plain` and they fit."""
    if step.rescale is None:
        return None
    fits = ((left, f) for left in (0, 1) for f in range(1, 17))
    for left, fraction in fits:
        if (found := plain(step, (DType.I8, DType.I16), fraction, left)) is not None:
            return _pack(step, found, fraction, left)
    return None


def _pack(step: Step, found: Plain, fraction: int, left: int) -> Fields | None:
    offset, bias = _small_bias(step)
    multipliers = [int(m) for m in found.multipliers]
    if min(multipliers) < 1:
        return None
    # every multiplier as a leading one and `width` more bits, shifted left
    width = max(m.bit_length() - (m & -m).bit_length() for m in multipliers)
    shifts = [m.bit_length() - 1 - width for m in multipliers]
    low, shift_low = int(bias.min()), min(shifts)
    bias_bits = int(bias.max() - low).bit_length()
    shift_bits = (max(shifts) - shift_low).bit_length()
    if shift_low < 0 or bias_bits > _READ or shift_bits + width > _READ:
        return None
    stream = at = 0
    for b, m, s in zip(bias.tolist(), multipliers, shifts, strict=True):
        scale = (s - shift_low) | ((m >> s) - (1 << width)) << shift_bits
        stream |= (b - low | scale << bias_bits) << at
        at += bias_bits + shift_bits + width
    # the last fields are read as a whole word
    data = np.frombuffer(stream.to_bytes(-(-at // 8) + 3, "little"), np.uint8)
    return Fields(
        data,
        offset,
        low,
        bias_bits,
        shift_bits,
        shift_low,
        width,
        left,
        (1 << (fraction - 1)) + (found.zero_point << fraction),
        fraction,
        found.bits,
    )


def _small_bias(step: Step) -> tuple[int, NDArray[np.int64]]:
    """The offset to the activations that makes the range of the biases smallest, and the biases with it."""
    node = step.node
    weights, bias = constant(node, 1), constant(node, 2).astype(np.int64)
    sums = weights.astype(np.int64).reshape(len(weights), -1).sum(axis=1)
    lo, hi = code_range(node.inputs[0])
    if isinstance(node.op, Conv):
        lo, hi = min(lo, node.op.pad_value), max(hi, node.op.pad_value)

    def shifted(offset: int) -> NDArray[np.int64]:
        moved: NDArray[np.int64] = bias - offset * sums
        return moved

    def allowed(offset: int) -> bool:
        within = -(1 << 15) <= lo + offset and hi + offset < 1 << 15
        return (
            within
            and int(product_bound(weights, shifted(offset), lo + offset, hi + offset).max()) < LIMIT
        )

    if node.inputs[0].type.dtype.bits > 8:
        return 0, bias
    # the range is convex in the offset
    first, last = -(1 << 14), 1 << 14
    while last - first > 2:
        left, right = first + (last - first) // 3, last - (last - first) // 3
        if np.ptp(shifted(left)) <= np.ptp(shifted(right)):
            last = right
        else:
            first = left
    offset = min(range(first, last + 1), key=lambda o: int(np.ptp(shifted(o))))
    return (offset, shifted(offset)) if allowed(offset) else (0, bias)
