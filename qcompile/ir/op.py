"""What an integer operator is, and the checks that operators share."""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.ir.types import Array, TensorType


@dataclass(frozen=True)
class Op:
    """What a node does; equal operators compare and hash equal."""

    def infer(self, *ins: TensorType) -> TensorType:
        """Give the result type, or raise TypeError saying why the operands do not fit."""
        raise TypeError(f"{type(self).__name__} is no operator")

    def run(self, *ins: Array) -> Array:
        """Compute the result exactly."""
        raise TypeError(f"{type(self).__name__} is no operator")


def want(ok: bool, sentence: str) -> None:
    """Raise TypeError with the sentence unless it is so."""
    if not ok:
        raise TypeError(sentence)


def operands(op: Op, ins: tuple[TensorType, ...], count: int) -> tuple[TensorType, ...]:
    """The operands, of which there have to be so many."""
    want(len(ins) == count, f"{type(op).__name__} takes {count} operands, not {len(ins)}")
    return ins


def is_code(z: int, x: TensorType) -> None:
    """A zero point is a code of the operand."""
    want(x.dtype.lo <= z <= x.dtype.hi, f"zero point {z} is no {x.dtype}")
