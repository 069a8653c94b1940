"""Operators of attention: products of two activations, and standardisation of rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompile.ir import arith
from qcompile.ir.op import Op, is_code, operands, want
from qcompile.ir.types import Array, DType, TensorType


@dataclass(frozen=True)
class BatchMatMul(Op):
    """x [N, ..., M, K], y [N, ..., K, P] -> int32 [N, ..., M, P]: sum over K of (x - zero_x) * (y - zero_y).

    Both are activations, with the same leading axes.
    """

    zero_x: int
    zero_y: int

    def infer(self, *ins: TensorType) -> TensorType:
        """Result type; see the class."""
        x, y = operands(self, ins, 2)
        want(x.dtype.bits <= 8 and y.dtype.bits <= 8, f"BatchMatMul of {x} and {y}: at most 8 bits")
        want(
            len(x.shape) == len(y.shape) >= 3
            and x.shape[:-2] == y.shape[:-2]
            and x.shape[-1] == y.shape[-2],
            f"BatchMatMul of {x} by {y} does not fit",
        )
        is_code(self.zero_x, x)
        is_code(self.zero_y, y)
        depth = x.shape[-1]
        want(
            depth * reach(x.dtype, self.zero_x) * reach(y.dtype, self.zero_y) < arith.ACC_LIMIT,
            f"BatchMatMul of {x} by {y}: a sum of {depth} products may leave 32 bits",
        )
        return TensorType(DType.I32, (*x.shape[:-1], y.shape[-1]))

    def run(self, *ins: Array) -> Array:
        """Exact result; see the class: every partial sum is an integer that float64 holds."""
        x, y = (
            a.astype(np.float64) - z for a, z in zip(ins, (self.zero_x, self.zero_y), strict=True)
        )
        return (x @ y).astype(np.int32)


def reach(dtype: DType, zero: int) -> int:
    """The largest |code - zero| of a type."""
    return max(dtype.hi - zero, zero - dtype.lo)


@dataclass(frozen=True)
class Normalize(Op):
    """Each row of n entries less its mean, over its standard deviation: result of scale 2**-fraction and zero point 0.

    With S the sum of a row and V = n * (sum of squares) - S**2 + epsilon, an entry becomes
    (n * x - S) / sqrt(V) * 2**fraction, by one `arith.inverse_root` a row, one multiplication and one rounding shift
    an entry. For a variance of v + e, epsilon is n**2 * e / scale**2 of the operand, rounded, and at least 1.
    Before it is rounded half up, a result of y is off by less than 2**-28 * |y|, 2**-13 units of 16 bits at most.
    Measured over rows of extremes: 2**-14 units, so that a result lies within 0.50007 units of the exact one.
    """

    fraction: int
    epsilon: int
    out: DType

    def infer(self, *ins: TensorType) -> TensorType:
        """Result type; see the class."""
        (x,) = operands(self, ins, 1)
        want(len(x.shape) >= 2, f"Normalize wants rows, not {x}")
        want(
            x.dtype.bits <= 16 and self.out in (DType.I8, DType.I16),
            f"Normalize of {x} to {self.out}",
        )
        want(0 <= self.fraction <= 15, f"Normalize has 0..15 fractional bits, not {self.fraction}")
        want(self.epsilon >= 1, f"Normalize wants an epsilon of at least 1, not {self.epsilon}")
        n, peak = x.shape[-1], max(-x.dtype.lo, x.dtype.hi)
        # deviations below 7 * 2**29 times a root below 2**30, and the half that rounds, stay below 2**62
        want(
            n * (x.dtype.hi - x.dtype.lo) < 7 << 29 and (n * peak) ** 2 + self.epsilon < 1 << 62,
            f"Normalize over {n} entries of {x} with epsilon {self.epsilon} may leave 64 bits",
        )
        return TensorType(self.out, x.shape)

    def run(self, *ins: Array) -> Array:
        """Exact result; see the class."""
        x = ins[0].astype(np.int64)
        n = x.shape[-1]
        total = x.sum(axis=-1, keepdims=True)
        spread = n * (x * x).sum(axis=-1, keepdims=True) - total * total + self.epsilon
        root, halvings = arith.inverse_root(spread)
        shift = arith.ROOT_BITS + halvings - self.fraction
        y = ((n * x - total) * root + (np.int64(1) << (shift - 1))) >> shift
        codes: Array = np.clip(y, self.out.lo, self.out.hi).astype(self.out.numpy)
        return codes
