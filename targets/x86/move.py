"""Transpose of bytes by tiles of sixteen by sixteen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qcompile.ir import Value, ops

from ..c.kernel import Layer, Scratch, Step
from ..c.nest import row_major
from ..c.text import affine, at
from .isa import Isa

_TILE = 16
_CYCLES = 48


@dataclass(frozen=True, slots=True)
class _Axes:
    """Loops over axes of the result as (extent, stride in the result, stride in the operand).

    `across` is side by side in the result, `down` in the operand.
    """

    outer: tuple[tuple[int, int, int], ...]
    down: tuple[int, int, int]
    across: tuple[int, int, int]


@dataclass(frozen=True)
class Transpose:
    """Bytes whose last axis becomes another."""

    isa: Isa

    @property
    def name(self) -> str:
        """See Kernel."""
        return f"transpose-{self.isa.name}"

    @property
    def includes(self) -> Sequence[str | Path]:
        """The headers of the instruction set."""
        return self.isa.headers

    def matches(self, step: Step) -> bool:
        """Both axes have a tile."""
        node = step.node
        if not isinstance(node.op, ops.Transpose) or node.output.type.dtype.bytes > 1:
            return False
        return _axes(step) is not None

    def cost(self, step: Step) -> int:
        """Cycles of the tiles, those of the last rows and columns whole."""
        axes = _axes(step)
        assert axes is not None
        tiles = -(-axes.down[0] // _TILE) * -(-axes.across[0] // _TILE)
        return tiles * _CYCLES * step.output.type.size // (axes.down[0] * axes.across[0])

    def scratch(self, step: Step) -> Scratch:
        """None."""
        return Scratch()

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """None: elements change places."""
        return ()

    def raster(self, step: Step) -> int | None:
        """None: tiles are in no such order."""
        return None

    def packed(self, step: Step) -> tuple[Value, ...]:
        """None."""
        return ()

    def body(self, layer: Layer) -> str:
        """Loops over tiles; the last ones overlap those before them."""
        axes = _axes(layer.step)
        assert axes is not None
        names = [f"n{i}" for i in range(len(axes.outer))]
        lines = [
            f"for (int {name} = 0; {name} < {extent}; ++{name}) {{"
            for name, (extent, _, _) in zip(names, axes.outer, strict=True)
        ]
        for name, (extent, _, _) in (("i", axes.down), ("j", axes.across)):
            lines.append(f"for (int {name}0 = 0; {name}0 < {extent}; {name}0 += {_TILE}) {{")
            last = extent - _TILE
            first = f"{name}0" if extent % _TILE == 0 else f"{name}0 < {last} ? {name}0 : {last}"
            lines.append(f"const int {name} = {first};")
        loops = [*zip(names, axes.outer, strict=True), ("i", axes.down), ("j", axes.across)]
        to = at("(uint8_t *)y", affine((name, y) for name, (_, y, _) in loops))
        x = f"(const uint8_t *){layer[layer.step.node.inputs[0]]}"
        source = at(x, affine((name, step) for name, (_, _, step) in loops))
        lines.append(f"transpose_tile({to}, {axes.down[1]}, {source}, {axes.across[2]});")
        return "\n".join([*lines, *["}"] * (len(loops))])


def _axes(step: Step) -> _Axes | None:
    """The axes of a Transpose, neighbours that stay so as one; None where no tile fits."""
    op, x = step.node.op, step.node.inputs[0].type.shape
    assert isinstance(op, ops.Transpose)
    to, source = row_major(step.output.type.shape), row_major(x)
    loops: list[tuple[int, int, int]] = []
    for axis, extent in enumerate(step.output.type.shape):
        here = (extent, to[axis], source[op.perm[axis]])
        if loops and loops[-1][2] == here[2] * extent:
            loops[-1] = (loops[-1][0] * extent, *here[1:])
        elif extent > 1:
            loops.append(here)
    if len(loops) < 2 or loops[-1][1] != 1:
        return None
    across = loops.pop()
    down = next((loop for loop in loops if loop[2] == 1), None)
    if down is None or min(down[0], across[0]) < _TILE:
        return None
    loops.remove(down)
    return _Axes(tuple(loops), down, across)
