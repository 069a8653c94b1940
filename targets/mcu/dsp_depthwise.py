"""Depthwise convolution with the DSP extension: four channels of a tap in each word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qcompile.ir import Value, ops

from ..c.kernel import Layer, Scratch, Step, aligned, constant, ends, loops
from ..c.text import at, render
from ..c.window import pixels, window_of
from .dsp_rescale import HEADER, HERE, Plain, plain

_TAPS = 3
"""Taps whose addresses are loaded at once."""


@dataclass(frozen=True)
class Channels:
    """Conv with one channel a group: a list of addresses of taps, the border being a line of pad values."""

    name: str = "dsp depthwise"
    includes: Sequence[str | Path] = (HEADER,)

    def matches(self, step: Step) -> bool:
        """Signed bytes, whole words of channels, and a Rescale of one accumulator to int8."""
        node = step.node
        if not isinstance(node.op, ops.Conv):
            return False
        x, channels = node.inputs[0].type, node.inputs[0].type.shape[-1]
        return (
            node.op.groups == channels == step.output.type.shape[-1]
            and channels % 4 == 0
            and x.dtype.signed
            and x.dtype.bits <= 8
            and plain(step) is not None
        )

    def cost(self, step: Step) -> int:
        """Instructions: 28 for three taps of four channels, 25 for the results; and the addresses of the taps."""
        channels, geometry = step.output.type.shape[-1], window_of(step.node)
        taps = self._taps(step)
        checks = len(geometry.y.inside) + len(geometry.x.inside)
        pixel = 24 + (2 + checks) * geometry.taps + channels // 4 * (25 + 28 * taps // _TAPS)
        return step.output.type.size // channels * pixel

    def scratch(self, step: Step) -> Scratch:
        """The results of one pixel; a line of pad values."""
        channels = step.output.type.shape[-1]
        line, border = ("line", "int8_t", channels), ("border", "int8_t", channels)
        return Scratch((line, border) if self._border(step) else (line,))

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """None but what is read again."""
        return tuple(v for v in aligned(step, *step.terms) if v is not step.node.inputs[0])

    def raster(self, step: Step) -> int | None:
        """One: its results wait until all is read."""
        return 1

    def packed(self, step: Step) -> tuple[Value, ...]:
        """Weights and bias."""
        return step.node.inputs[1:]

    def body(self, layer: Layer) -> str:
        """See the template."""
        step, node = layer.step, layer.step.node
        rescaled = plain(step)
        assert rescaled is not None
        assert isinstance(node.op, ops.Conv)
        geometry = window_of(node)
        nest = pixels(step, geometry)
        index = nest.at["y"].removesuffix("c").removesuffix(" + ")
        return render(
            "dsp_depthwise.c.j2",
            HERE,
            scratch=layer.scratch.declarations,
            window=geometry,
            nest=nest,
            border=self._border(step),
            pad_value=node.op.pad_value,
            channels=step.output.type.shape[-1],
            taps=self._taps(step),
            x=layer[node.inputs[0]],
            y=at("y", index or "0"),
            weights=layer.constant("weights", self._pack(step, rescaled)),
            zero_point=rescaled.zero_point,
            at=at,
            loops=loops,
            ends=ends,
        )

    def _taps(self, step: Step) -> int:
        return -(-window_of(step.node).taps // _TAPS) * _TAPS

    def _border(self, step: Step) -> bool:
        geometry = window_of(step.node)
        return bool(geometry.y.inside or geometry.x.inside)

    def _pack(self, step: Step, rescaled: Plain) -> NDArray[np.int32]:
        """For each four channels: biases, the pairs (0, 2) and (1, 3) of every tap, multipliers."""
        weights = constant(step.node, 1)
        groups = len(weights) // 4
        rows = weights.reshape(groups, 4, -1).astype(np.int64)
        rows = np.pad(rows, ((0, 0), (0, 0), (0, self._taps(step) - rows.shape[2])))
        pairs = (rows[:, :2] & 0xFFFF | rows[:, 2:] << 16).transpose(0, 2, 1)
        bias = constant(step.node, 2).reshape(groups, 4)
        scale = rescaled.multipliers.reshape(groups, 4)
        return np.concatenate([bias, pairs.reshape(groups, -1), scale], axis=1).astype(np.int32)
