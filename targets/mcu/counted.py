"""The portable kernels of selection and attention with what they take on Cortex-M, in instructions as counted."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from qcompile.ir import ops

from ..c import attention, selection
from ..c.kernel import Kernel, Step


@dataclass(frozen=True)
class Taken(selection.Taken):
    """Copies of runs."""

    def cost(self, step: Step) -> int:
        """For each piece a call that copies words, for each lone element three."""
        op, out = step.node.op, step.output.type
        assert isinstance(op, ops.Take)
        inner = prod(out.shape[op.axis + 1 :])
        total = 0
        for _, count in selection.pieces(op.indices):
            length = count * inner * out.dtype.bytes
            total += 3 if count * inner == 1 else 14 + length // 4 * 5 + length % 4 * 4
        return 20 + prod(out.shape[: op.axis]) * total


@dataclass(frozen=True)
class Larger(selection.Larger):
    """One comparison for each element, `element` and `byte` being tenths of an instruction."""

    element: int = 64
    byte: int = 0

    def cost(self, step: Step) -> int:
        """For each element and each of its bytes."""
        out = step.output.type
        return 20 + (out.size * self.element + out.bytes * self.byte) // 10


@dataclass(frozen=True)
class Places(selection.Places):
    """One pass along the axis, `element` being tenths of an instruction."""

    element: int = 77

    def cost(self, step: Step) -> int:
        """For each element looked at."""
        return 20 + step.node.inputs[0].type.size * self.element // 10


@dataclass(frozen=True)
class Products(attention.Products):
    """Rows of sums: tenths of an instruction for a product, and more of them for a zero point of the right operand."""

    product: int = 37
    zero: int = 12

    def cost(self, step: Step) -> int:
        """For each product, and for each result."""
        op = step.node.op
        assert isinstance(op, ops.BatchMatMul)
        each = self.product + (self.zero if op.zero_y else 0)
        return 20 + step.macs * each // 10 + 4 * step.output.type.size


@dataclass(frozen=True)
class Standardized(attention.Standardized):
    """Two passes over a row and an inverse root between them, which takes 150."""

    entry: int = 29

    def cost(self, step: Step) -> int:
        """For each row and each entry."""
        shape = step.output.type.shape
        return 20 + prod(shape[:-1]) * (150 + self.entry * shape[-1])


SCALAR: tuple[Kernel, ...] = (Taken(), Larger(), Places(), Products(), Standardized())
"""On cores without vectors."""

HELIUM: tuple[Kernel, ...] = (
    Taken(), Larger(element=0, byte=3), Places(element=64), Products(product=17, zero=3), Standardized(entry=22),
)  # fmt: skip
"""On cores with Helium, whose compilers vectorise some of them."""
