"""Conv and MatMul with the Armv8.2 dot product: four int8 products and their sum in each lane of one instruction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from qcompile.ir import Array

from ..c.convolve import Dot
from ..c.kernel import Kernel, Step
from ..c.kernels import PORTABLE

_CHANNELS = 8
"""Output channels at once: two vectors of four sums for every pixel."""


@dataclass(frozen=True)
class DotProduct(Dot):
    """int8 by int8: four depths of eight channels lie side by side, a pixel's four depths are one lane."""

    name: str = "dotprod"
    includes: Sequence[str | Path] = ("<arm_neon.h>",)
    template: str = "dotprod.c.j2"
    folder: Path = Path(__file__).parent
    patch: str = "int8_t"
    lanes: ClassVar[int] = 16

    def matches(self, step: Step) -> bool:
        """One group, signed bytes."""
        x = step.node.inputs[0].type.dtype if step.node.inputs else None
        return (
            super().matches(step)
            and self.groups(step) == 1
            and x is not None
            and x.signed
            and x.bits <= 8
        )

    def cost(self, step: Step) -> int:
        """Sixteen products an instruction."""
        return super().cost(step) // 16

    def outputs(self, step: Step) -> int:
        """Channels, filled up to whole blocks."""
        return -(-super().outputs(step) // _CHANNELS) * _CHANNELS

    def pack(self, step: Step, weights: Array) -> NDArray[np.int8]:
        """[block of channels][four depths][channel][depth], filled with zeros."""
        rows = super().pack(step, weights)
        filled = np.pad(rows, ((0, self.outputs(step) - len(rows)), (0, 0)))
        blocks = filled.reshape(-1, _CHANNELS, self.padded(step) // 4, 4)
        return np.ascontiguousarray(blocks.transpose(0, 2, 1, 3))

    def pack_bias(self, step: Step, bias: Array) -> NDArray[np.int32]:
        """Filled with zeros."""
        return np.pad(super().pack_bias(step, bias), (0, self.outputs(step) - len(bias)))


KERNELS: tuple[Kernel, ...] = (DotProduct(), *PORTABLE)
"""For CPUs with the dot product; the rest is portable."""
