"""Tensor types of the integer graph: a float type cannot be written down."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.signedinteger | np.unsignedinteger]


class DType(enum.Enum):
    """An integer element type; the value is (bits, signed). Sub-byte values stand one per byte."""

    I2 = (2, True)
    I3 = (3, True)
    I4 = (4, True)
    I5 = (5, True)
    I6 = (6, True)
    I7 = (7, True)
    I8 = (8, True)
    U8 = (8, False)
    I16 = (16, True)
    I32 = (32, True)

    @property
    def bits(self) -> int:
        """Significant bits of an element."""
        return self.value[0]

    @property
    def signed(self) -> bool:
        """Can an element be negative?"""
        return self.value[1]

    @property
    def lo(self) -> int:
        """The smallest element."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def hi(self) -> int:
        """The largest element."""
        return (1 << (self.bits - int(self.signed))) - 1

    @property
    def bytes(self) -> int:
        """Bytes that one stored element takes."""
        return max(self.bits, 8) // 8

    @property
    def numpy(self) -> np.dtype[np.signedinteger | np.unsignedinteger]:
        """The numpy type an element is held in."""
        return np.dtype(f"{'i' if self.signed else 'u'}{self.bytes}")

    def __str__(self) -> str:
        return f"{'' if self.signed else 'u'}int{self.bits}"

    def __repr__(self) -> str:
        return self.name

    @classmethod
    def of(cls, bits: int, signed: bool = True) -> DType:
        """The type of that many bits; ValueError where there is none."""
        return cls((bits, signed))


@dataclass(frozen=True, slots=True)
class TensorType:
    """Element type and shape; channels stand last."""

    dtype: DType
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes the tensor takes, one sub-byte element per byte."""
        return self.size * self.dtype.bytes

    def __str__(self) -> str:
        return f"{self.dtype}[{'x'.join(map(str, self.shape))}]"
