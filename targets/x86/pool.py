"""MaxPool of bytes: registers of channels, of several pixels where channels are few. SumPool is in `depthwise`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qcompile.ir import Node, Value, ops

from ..c.kernel import Layer, Scratch, Step
from ..c.text import affine, at, render
from ..c.window import window_of
from .isa import HERE, Isa
from .sweep import Sweep, sweep_of

_FEW_TAPS = 4
_MOST_TAPS = 256


@dataclass(frozen=True)
class MaxPool:
    """The largest byte under each window."""

    isa: Isa
    threads: int = 1

    @property
    def name(self) -> str:
        """See Kernel."""
        return f"maxpool-{self.isa.name}"

    @property
    def includes(self) -> Sequence[str | Path]:
        """The headers of the instruction set."""
        return self.isa.headers

    def matches(self, step: Step) -> bool:
        """Bytes over one or two axes."""
        op, x = step.node.op, step.node.inputs[0].type
        if not isinstance(op, ops.MaxPool) or len(op.kernel) > 2 or x.dtype.bytes > 1:
            return False
        window = window_of(step.node)
        # Of few taps and without a border, compilers make as good code, and the image is not copied.
        worth = window.taps > _FEW_TAPS or self._sweep(step.node).bordered
        return worth and window.taps <= _MOST_TAPS

    def shares(self, step: Step) -> bool:
        """See Shared."""
        return self._sweep(step.node).shared

    def cost(self, step: Step) -> int:
        """Cycles: loads of the taps, and the copies of the image."""
        return self._cost(self._sweep(step.node))

    def scratch(self, step: Step) -> Scratch:
        """The rows of the image that a row of results needs."""
        return self._sweep(step.node).scratch

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """None: the result may trail its operand, as `raster` says."""
        return ()

    def raster(self, step: Step) -> int | None:
        """A row: all it needs is copied first."""
        return window_of(step.node).x.out

    def packed(self, step: Step) -> tuple[Value, ...]:
        """None."""
        return ()

    def body(self, layer: Layer) -> str:
        """See the template."""
        node = layer.step.node
        x, sweep = node.inputs[0], self._sweep(node)
        rows, columns = sweep.window.y, sweep.window.x
        used = [ky * rows.dilation for ky in range(rows.kernel)]
        return render(
            "pool.c.j2",
            HERE,
            scratch=layer.scratch.declarations,
            x=layer[x],
            sweep=sweep,
            used=used,
            border=x.type.dtype.signed * 128,
            taps=[
                (row, sweep.column(kx * columns.dilation))
                for row in used
                for kx in range(columns.kernel)
            ],
            kind="i8" if x.type.dtype.signed else "u8",
            affine=affine,
            at=at,
        )

    def _sweep(self, node: Node) -> Sweep:
        block = 4 * self.isa.lanes
        ways = (sweep_of(node, block, 1, 1, joined, self.threads) for joined in (False, True))
        return min(ways, key=self._cost)

    def _cost(self, sweep: Sweep) -> int:
        cycles = sweep.registers * (sweep.window.taps + 2) + sweep.copies
        return int(cycles * self.isa.load_cost) * sweep.window.batch
