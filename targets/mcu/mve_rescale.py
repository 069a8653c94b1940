"""How sums become results on Helium: which vector micro-kernel of mve.h applies, and its constants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qcompile.ir import DType, Rescale, Value
from qcompile.ir.arith import Acc

from ..c.kernel import Step
from ..c.text import c_type

LANES = np.array([0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15])
"""The order of sixteen channels in four vectors from which narrowing restores their own order."""
_LARGEST_ZERO = 255
_SIXTEEN_BITS = 1 << 15
_BYTE = (-128, 127)


@dataclass(frozen=True)
class Sixteen:
    """Sixteen channels at a time to int8 in [lo, hi]; `value`, an int8 operand of the same shape, is added."""

    multiplier: NDArray[np.int16]
    before: NDArray[np.int8]
    shift: NDArray[np.int8]
    zero: int
    lo: int
    hi: int
    value: Value | None = None
    value_zero: int = 0
    factor: tuple[int, ...] = ()


@dataclass(frozen=True)
class Four:
    """Four channels at a time, of any number, to bytes or int16 between any bounds."""

    multiplier: NDArray[np.int32]
    shift: NDArray[np.int8]
    zero: int
    lo: int
    hi: int
    kind: str


def in_lanes(rows: NDArray[np.generic]) -> NDArray[np.generic]:
    """Rows of channels in the order of the lanes, filled with zeros to a multiple of sixteen."""
    filled = np.pad(rows, ((0, -len(rows) % 16), *((0, 0) for _ in rows.shape[1:])))
    blocks = filled.reshape(-1, 16, *rows.shape[1:])
    return np.ascontiguousarray(blocks[:, LANES]).reshape(filled.shape)


def sixteen(step: Step) -> Sixteen | None:
    """The constants of `Sixteen`, where the step's Rescale has that shape."""
    found = _single(step)
    if found is None or step.output.type.dtype is not DType.I8:
        return None
    op, acc = found
    if abs(op.zero_point) > _LARGEST_ZERO or any(m % _SIXTEEN_BITS for m in acc.multiplier):
        return None
    value: Value | None = None
    zero, factor = 0, tuple[int, ...]()
    if op.vals:
        if len(op.vals) > 1:
            return None
        value = step.rescale.inputs[1] if step.rescale else None
        if value is None or value.type != step.output.type or value is step.node.inputs[0]:
            return None
        zero, factor = op.vals[0].zero_point, op.vals[0].multiplier
    elif any(acc.pre_shift):
        return None
    channels = step.output.type.shape[-1]
    multiplier = np.array(_row(acc.multiplier, channels), np.int64) // _SIXTEEN_BITS
    return Sixteen(
        in_lanes(multiplier.astype(np.uint16).view(np.int16)).astype(np.int16),
        in_lanes(np.array(_row(acc.pre_shift, channels), np.int8)).astype(np.int8),
        in_lanes(-np.array(_row(op.f, channels), np.int8)).astype(np.int8),
        op.zero_point,
        op.lo,
        op.hi,
        value,
        zero,
        factor,
    )


def whole(step: Step, q: Sixteen | None) -> Sixteen | None:
    """`q` where channels come in sixteens and all of int8 is wanted."""
    fits = q is not None and (q.lo, q.hi) == _BYTE and step.output.type.shape[-1] % 16 == 0
    return q if fits else None


def four(step: Step) -> Four | None:
    """The constants of `Four`, where the step's Rescale has that shape."""
    found = _single(step)
    kind = {"int8_t": "s8", "uint8_t": "u8", "int16_t": "s16"}.get(c_type(step.output.type.dtype))
    if found is None or found[0].vals or kind is None:
        return None
    op, acc = found
    channels = step.output.type.shape[-1]
    before = np.array(_row(acc.pre_shift, channels), np.int8)
    after = np.array(_row(op.f, channels), np.int8)
    if np.any((before > 0) & (after > 1)):
        return None
    return Four(
        np.array(_row(acc.multiplier, channels), np.int32),
        before - after,
        op.zero_point,
        op.lo,
        op.hi,
        kind,
    )


def _single(step: Step) -> tuple[Rescale, Acc] | None:
    """The Rescale and its one accumulator, with parameters for channels."""
    if step.rescale is None:
        return None
    op = step.rescale.op
    assert isinstance(op, Rescale)
    if len(op.accs) != 1 or step.rescale.output.type.shape != step.node.output.type.shape:
        return None
    rows = (op.f, op.accs[0].multiplier, op.accs[0].pre_shift, *(v.multiplier for v in op.vals))
    if op.spatial and any(len(set(r)) > 1 for r in rows):
        return None
    return op, op.accs[0]


def _row(entries: Sequence[int], channels: int) -> Sequence[int]:
    return entries if len(entries) == channels else [entries[0]] * channels
