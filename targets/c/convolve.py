"""Convolutions and matrix products: a dot product for each channel, or all channels of a pixel side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from qcompile.ir import Array, Value, ops

from .kernel import Layer, Scratch, Step, aligned, constant, ends, loops
from .nest import Nest
from .text import HERE, affine, at, c_type, render
from .window import Window, pixels, window_of

_NINE_TAPS = 9
"""More taps than a 3 x 3 window's are looped over, not written out."""


@dataclass(frozen=True)
class Dot:
    """Conv and MatMul: the taps of a few pixels side by side, widened to int16, times the rows of the weights.

    int16 by int8 with an int32 sum is what compilers turn into multiply-add instructions; a few pixels share each
    row of weights.
    """

    name: str = "dot"
    includes: Sequence[str | Path] = ()
    template: str = "dot.c.j2"
    folder: Path = HERE
    patch: str = "int16_t"
    lanes: ClassVar[int] = 8

    def matches(self, step: Step) -> bool:
        """Every Conv and MatMul."""
        return isinstance(step.node.op, ops.Conv | ops.MatMul)

    def cost(self, step: Step) -> int:
        """Products, and the copies of each group's patch."""
        pixels = step.output.type.size // step.output.type.shape[-1]
        return step.macs + 8 * pixels * self.groups(step) * self.depth(step)

    def scratch(self, step: Step) -> Scratch:
        """Patches and accumulators of the pixels of one block."""
        block = self._block(step)
        return Scratch(
            (
                ("patch", self.patch, block * self.padded(step)),
                ("acc", "int32_t", block * self.outputs(step)),
            )
        )

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """A fused Rescale's other operands; never the one whose pixels are read again."""
        return tuple(v for v in aligned(step, *step.terms) if v is not step.node.inputs[0])

    def raster(self, step: Step) -> int | None:
        """A block: its patches are gathered first."""
        return self._block(step)

    def packed(self, step: Step) -> tuple[Value, ...]:
        """Weights and bias."""
        return step.node.inputs[1:]

    def body(self, layer: Layer) -> str:
        """See the template."""
        step = layer.step
        x = step.node.inputs[0]
        conv = step.node.op if isinstance(step.node.op, ops.Conv) else None
        geometry = self._window(step)
        block = self._block(step)
        nest = self._nest(step)
        accumulator = affine([("pixel" if block > 1 else "0", self.outputs(step)), ("c", 1)])
        weights, bias = constant(step.node, 1), constant(step.node, 2)
        return render(
            self.template,
            self.folder,
            scratch=layer.scratch.declarations,
            nest=nest,
            window=geometry,
            x=layer[x],
            x_type=c_type(x.type.dtype),
            type=self.patch,
            block=block,
            depth=self.depth(step),
            padded=self.padded(step),
            groups=self.groups(step),
            g="g" if self.groups(step) > 1 else "0",
            channels=len(weights) // self.groups(step),
            outputs=self.outputs(step),
            passes=self.passes(step),
            pad_value=conv.pad_value if conv else 0,
            weights=layer.constant("weights", self.pack(step, weights)),
            bias=layer.constant("bias", self.pack_bias(step, bias)),
            store=layer.store(nest.at, f"acc[{accumulator}]"),
            affine=affine,
            at=at,
        )

    def pack(self, step: Step, weights: Array) -> NDArray[np.int8]:
        """One row for each output channel, filled with zeros to whole vectors."""
        rows = weights.reshape(len(weights), -1).astype(np.int8)
        return np.pad(rows, ((0, 0), (0, self.padded(step) - rows.shape[1])))

    def pack_bias(self, step: Step, bias: Array) -> NDArray[np.int32]:
        """As it is."""
        return bias.astype(np.int32)

    def passes(self, step: Step) -> list[tuple[int, int, int]]:
        """(first, last, how many at once) of the channels of a group."""
        channels = step.output.type.shape[-1] // self.groups(step)
        width = 4 if self._block(step) == 1 else 2
        full = channels - channels % width
        return [p for p in ((0, full, width), (full, channels, channels - full)) if p[0] < p[1]]

    def _block(self, step: Step) -> int:
        """Pixels at once: the number that wastes least at the end of a row."""
        nest = self._nest(step)
        row = nest.loops[-1][1] if nest.loops else 1
        cost = {4: 10, 2: 12, 1: 16}
        return min(cost, key=lambda p: -(-row // p) * p * cost[p])

    def _window(self, step: Step) -> Window | None:
        return window_of(step.node) if isinstance(step.node.op, ops.Conv) else None

    def _nest(self, step: Step) -> Nest:
        return pixels(step, self._window(step))

    def groups(self, step: Step) -> int:
        """Groups of channels."""
        return step.node.op.groups if isinstance(step.node.op, ops.Conv) else 1

    def depth(self, step: Step) -> int:
        """Products in one sum."""
        return math.prod(step.node.inputs[1].type.shape[1:])

    def padded(self, step: Step) -> int:
        """The same, filled up to whole vectors."""
        return -(-self.depth(step) // self.lanes) * self.lanes

    def outputs(self, step: Step) -> int:
        """Accumulators of one pixel."""
        return step.output.type.shape[-1]


@dataclass(frozen=True)
class Depthwise:
    """Conv with one input channel a group: all channels of a pixel side by side, a row of pad values for the border."""

    name: str = "depthwise"
    includes: Sequence[str | Path] = ()

    def matches(self, step: Step) -> bool:
        """One input channel in every group."""
        op = step.node.op
        return isinstance(op, ops.Conv) and op.groups == step.node.inputs[0].type.shape[-1]

    def cost(self, step: Step) -> int:
        """Products; several outputs a channel do not vectorise."""
        return step.macs * (2 if self._times(step) == 1 else 8)

    def scratch(self, step: Step) -> Scratch:
        """One pixel's accumulators, and the row of pad values."""
        x, geometry = step.node.inputs[0], window_of(step.node)
        acc = ("acc", "int32_t", step.output.type.shape[-1])
        border = ("border", c_type(x.type.dtype), geometry.channels)
        return Scratch((acc, border) if self._border(geometry) else (acc,))

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """A fused Rescale's other operands."""
        return tuple(v for v in aligned(step, *step.terms) if v is not step.node.inputs[0])

    def raster(self, step: Step) -> int | None:
        """One: it is stored when all its taps are summed."""
        return 1

    def packed(self, step: Step) -> tuple[Value, ...]:
        """Weights and bias."""
        return step.node.inputs[1:]

    def body(self, layer: Layer) -> str:
        """See the template."""
        step, node = layer.step, layer.step.node
        assert isinstance(node.op, ops.Conv)
        geometry = window_of(node)
        nest = pixels(step, geometry)
        whole = geometry.taps <= _NINE_TAPS
        columns_unrolled = whole or geometry.x.kernel <= _NINE_TAPS
        weights = constant(node, 1)
        return render(
            "depthwise.c.j2",
            scratch=layer.scratch.declarations,
            nest=nest,
            window=geometry,
            border=self._border(geometry),
            whole=whole,
            rows_unrolled=whole,
            columns_unrolled=columns_unrolled,
            rows=geometry.y.unrolled() if whole else geometry.y.looped(),
            columns=geometry.x.unrolled() if columns_unrolled else geometry.x.looped(),
            x=layer[node.inputs[0]],
            type=c_type(node.inputs[0].type.dtype),
            pad_value=node.op.pad_value,
            outputs=len(weights),
            times=self._times(step),
            weights=layer.constant("weights", weights.reshape(len(weights), -1).T.astype(np.int8)),
            bias=layer.constant("bias", constant(node, 2)),
            store=layer.store(nest.at, "acc[c]"),
            affine=affine,
            at=at,
            loops=loops,
            ends=ends,
        )

    def _times(self, step: Step) -> int:
        return step.output.type.shape[-1] // step.node.inputs[0].type.shape[-1]

    def _border(self, geometry: Window) -> bool:
        return bool(geometry.y.inside or geometry.x.inside)
