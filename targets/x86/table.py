"""Lut of bytes by shuffles: sixteen entries at a time, for a register of codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qcompile.ir import Array, Value, ops

from ..c.kernel import Layer, Scratch, Step, aligned, constant
from .isa import Isa

_ENTRIES = 256
_CYCLES = 32.0


@dataclass(frozen=True)
class Table:
    """One entry of a table of bytes for every byte."""

    isa: Isa

    @property
    def name(self) -> str:
        """See Kernel."""
        return f"table-{self.isa.name}"

    @property
    def includes(self) -> Sequence[str | Path]:
        """The headers of the instruction set."""
        return self.isa.headers

    def matches(self, step: Step) -> bool:
        """Bytes to bytes by a table that is known."""
        node = step.node
        if not isinstance(node.op, ops.Lut) or node.inputs[1].const is None:
            return False
        return all(v.type.dtype.bytes == 1 for v in (*node.inputs, node.output))

    def cost(self, step: Step) -> int:
        """Cycles, but never fewer than those of one register."""
        return int(-(-step.output.type.size // (4 * self.isa.lanes)) * _CYCLES)

    def scratch(self, step: Step) -> Scratch:
        """None."""
        return Scratch()

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """The operand, where the table keeps its type."""
        return aligned(step, step.node.inputs[0])

    def raster(self, step: Step) -> int | None:
        """A register."""
        return 4 * self.isa.lanes

    def packed(self, step: Step) -> tuple[Value, ...]:
        """The table."""
        return step.node.inputs[1:]

    def body(self, layer: Layer) -> str:
        """One loop; the table is in the order of the codes as uint8."""
        node = layer.step.node
        x = node.inputs[0]
        block, size = 4 * self.isa.lanes, x.type.size
        table = layer.constant("table", _by_byte(constant(node, 1), x.type.dtype.signed))
        look_up = f"look_up({table}, load_some({layer[x]} + i, left))"
        return (
            f"for (int i = 0; i < {size}; i += {block}) {{\n"
            f"const int left = {size} - i;\n"
            f"store_bytes(y + i, {look_up}, left);\n}}"
        )


def _by_byte(entries: Array, signed: bool) -> NDArray[np.uint8]:
    """The table with an entry for every byte, zeros for those that are no code."""
    lowest = -(len(entries) // 2) if signed else 0
    table = np.zeros(_ENTRIES, np.uint8)
    codes = np.arange(lowest, lowest + len(entries)).astype(np.uint8)
    table[codes] = entries.astype(np.int64).astype(np.uint8)
    return table
