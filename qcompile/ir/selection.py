"""Operators that pick elements: from constant places, the larger of two, the place of the largest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompile.ir.op import Op, operands, want
from qcompile.ir.types import Array, DType, TensorType


@dataclass(frozen=True)
class Take(Op):
    """The elements at constant `indices` along `axis`, in any order, repeated or left out."""

    axis: int
    indices: tuple[int, ...]

    def infer(self, *ins: TensorType) -> TensorType:
        """Result type; see the class."""
        (x,) = operands(self, ins, 1)
        want(0 < self.axis < len(x.shape), f"Take along axis {self.axis} of {x}")
        want(len(self.indices) >= 1, f"Take of {x} takes no index")
        extent = x.shape[self.axis]
        low, high = min(self.indices), max(self.indices)
        want(
            low >= 0 and high < extent,
            f"Take of indices {low} to {high} leaves axis {self.axis} of {x}",
        )
        return TensorType(
            x.dtype, (*x.shape[: self.axis], len(self.indices), *x.shape[self.axis + 1 :])
        )

    def run(self, *ins: Array) -> Array:
        """Exact result; see the class."""
        (x,) = ins
        return np.take(x, np.array(self.indices, np.int64), axis=self.axis)


@dataclass(frozen=True)
class Extreme(Op):
    """The larger code of two operands, or the smaller, element by element: both have one scale and zero point."""

    largest: bool

    def infer(self, *ins: TensorType) -> TensorType:
        """Result type; see the class."""
        x, y = operands(self, ins, 2)
        want(x == y, f"Extreme wants two operands of one type, not {x} and {y}")
        return x

    def run(self, *ins: Array) -> Array:
        """Exact result; see the class."""
        x, y = ins
        result: Array = np.maximum(x, y) if self.largest else np.minimum(x, y)
        return result


@dataclass(frozen=True)
class ArgExtreme(Op):
    """Where along `axis` the largest or smallest code stands -> int32; of equal ones the first, or the last.

    The axis stays, with one entry.
    """

    axis: int
    largest: bool
    last: bool

    def infer(self, *ins: TensorType) -> TensorType:
        """Result type; see the class."""
        (x,) = operands(self, ins, 1)
        want(0 < self.axis < len(x.shape), f"ArgExtreme along axis {self.axis} of {x}")
        return TensorType(DType.I32, (*x.shape[: self.axis], 1, *x.shape[self.axis + 1 :]))

    def run(self, *ins: Array) -> Array:
        """Exact result; see the class."""
        (x,) = ins
        find = np.argmax if self.largest else np.argmin
        seen = np.flip(x, self.axis) if self.last else x
        found: Array = find(seen, axis=self.axis, keepdims=True).astype(np.int32)
        return x.shape[self.axis] - 1 - found if self.last else found
