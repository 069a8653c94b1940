"""Real numbers to codes by a quantizer, and the integer types that hold them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qcompile.formats import Int
from qcompile.ir import DType
from qcompile.plan import Quantizer

from .layers import Clamp


def storage(fmt: Int) -> DType:
    """The type that holds codes of a signed format; TypeError for an unsigned one."""
    if not fmt.signed:
        raise TypeError(f"{fmt} codes have no integer form here, only signed ones")
    return DType.of(fmt.bits) if fmt.bits <= 8 else DType.I16 if fmt.bits <= 16 else DType.I32


def quantize(x: NDArray[np.float64], q: Quantizer) -> NDArray[np.int64]:
    """Codes of real numbers: round half to even, saturate; per channel of q.axis."""
    scale, zero = np.array(q.scale, np.float64), np.array(q.zero_point, np.float64)
    if q.axis is not None:
        row = [-1 if i == q.axis else 1 for i in range(x.ndim)]
        scale, zero = scale.reshape(row), zero.reshape(row)
    return np.clip(np.rint(x / scale) + zero, q.format.lo, q.format.hi).astype(np.int64)


def clamp_codes(clamp: Clamp, q: Quantizer) -> tuple[int, int]:
    """The codes a clamp in real numbers leaves."""

    def code(real: float | None, otherwise: int) -> int:
        if real is None or not np.isfinite(real):
            return otherwise
        steps = np.rint(np.float64(real) / q.scale[0]) + q.zero_point[0]
        return int(np.clip(steps, q.format.lo, q.format.hi))

    lo, hi = code(clamp.lo, q.format.lo), code(clamp.hi, q.format.hi)
    return min(lo, hi), hi
