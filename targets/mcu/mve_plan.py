"""How a Conv or MatMul is laid out for Helium: chunks of depth, blocks of channels, runs of pixels, strips."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from qcompile.ir import ops
from qcompile.ir.proof import accumulator_bound

from ..c.kernel import Scratch, Step, constant
from ..c.text import c_type
from ..c.window import Window, pixels, window_of
from .mve_rescale import four, in_lanes, sixteen, whole

_VECTOR = 16
_SUMS_BYTES = 2048
"""About how much working memory sums of pixels take: so many pixels are rescaled together."""
_ROW_OF_SUMS = 128
"""Channels of a pixel alone that are rescaled together."""
_FLIP = 0x80
_NIBBLE = 4
_SIXTEENTH = 1 << 27
"""Sixteen times a sum below this one stays in 32 bits."""


class Plan:
    """One step: its shape in the terms of mve.h.

    A pixel's taps are `chunks` vectors side by side, either where the operand lies or in a strip: all input rows under
    one row of results, column by column. Around rows of `width` pixels stand the loops `outer`; `run` pixels (`run`
    channels of a pixel alone) are rescaled together.
    """

    def __init__(self, step: Step) -> None:
        node = step.node
        x = node.inputs[0].type
        self.step = step
        self.wide = x.dtype.bits > 8
        self.size = 2 if self.wide else 1
        self.flip = 0 if x.dtype.signed else _FLIP
        narrow = node.inputs[1].type.dtype.bits <= _NIBBLE and node.inputs[1].const is not None
        self.nibbles = narrow and int(accumulator_bound(node).max()) < _SIXTEENTH
        self.window: Window | None = window_of(node) if isinstance(node.op, ops.Conv) else None
        self.outputs = step.output.type.shape[-1]
        self.depth = math.prod(node.inputs[1].type.shape[1:])
        self.channels = x.shape[-1]
        self.chunks = -(-self.depth * self.size // _VECTOR)
        self.strip = not self._direct()
        self.sixteen = whole(step, sixteen(step))
        self.four = None if self.sixteen else four(step)
        self.nest = pixels(step, self.window)
        self.flat = self._flat()
        self.width = 1
        self.outer = self.nest.loops
        if self.flat and self.window is not None:
            # Rows follow each other: all pixels are one row.
            self.outer = ()
            self.width = self.window.batch * self.window.y.out * self.window.x.out
        elif self.nest.loops and (self.window is None or self.window.x.out > 1):
            self.outer, (_, self.width) = self.nest.loops[:-1], self.nest.loops[-1]
        self.pairs = self.width > 1
        if not self.pairs and self.sixteen is not None and self.sixteen.value is not None:
            self.sixteen = None
        self.lanes = 4 if self.pairs else 8
        self.padded = -(-self.outputs // self.lanes) * self.lanes
        self.run = min(self.padded, _ROW_OF_SUMS)
        if self.pairs:
            fit = _SUMS_BYTES // (8 * self.padded) * 2
            self.run = max(2, min(fit, self.width + self.width % 2))

    def _direct(self) -> bool:
        """Are a pixel's taps whole vectors side by side in the operand?"""
        if self.flip or self.depth * self.size % _VECTOR:
            return False
        return self.window is None or (
            self.window.y.kernel == 1 and not self.window.y.inside and not self.window.x.inside
        )

    def _flat(self) -> bool:
        """May all pixels be walked through as one row, none of their neighbours being told apart?"""
        if self.strip or (self.sixteen is None and self.four is None):
            return False
        if self.window is None:
            return len(self.nest.loops) == 1
        return self.window.x.kernel == self.window.x.stride == self.window.y.stride == 1

    @property
    def kind(self) -> str:
        """The micro-kernel's element type, and how its weights stand."""
        return ("s16" if self.wide else "s8") + ("_nibbles" if self.nibbles else "")

    @property
    def pixel_step(self) -> int:
        """Elements from one pixel's taps to the next one's."""
        if self.window is None:
            return self.channels
        rows = self.window.y.kernel if self.strip else 1
        return self.window.x.stride * rows * self.channels

    @property
    def block_words(self) -> int:
        """Words of weights in one block of channels."""
        taps = self.chunks * _VECTOR // self.size
        return self.lanes + taps * self.lanes // (8 if self.nibbles else 4)

    @property
    def columns(self) -> int:
        """Columns of the strip: the border before, and what the last window reaches."""
        if self.window is None:
            return self.width
        x = self.window.x
        return max((x.out - 1) * x.stride + x.kernel, x.pad + 1)

    @property
    def rows(self) -> int:
        """Rows of the strip."""
        return self.window.y.kernel if self.window else 1

    @property
    def border(self) -> bool:
        """Does any window reach into the border?"""
        return self.window is not None and bool(self.window.y.inside or self.window.x.inside)

    def scratch(self) -> Scratch:
        """Sums, the strip with the vector that may be read past it, one pixel of border."""
        sums = (self.run + self.run % 2) * self.padded if self.pairs else self.run
        regions = [("acc", "int32_t", sums)]
        if self.strip:
            kind = "int16_t" if self.wide else "int8_t"
            elements = self.columns * self.rows * self.channels + _VECTOR // self.size
            regions.append(("strip", kind, elements))
        if self.border:
            kind = c_type(self.step.node.inputs[0].type.dtype)
            regions.append(("border", kind, self.channels))
        return Scratch(tuple(regions))

    def cost(self) -> int:
        """Executed instructions: those of the assembly, and what clang's code around it was counted to take."""
        turns = 2 * -(-self.chunks // 4)
        # Two nibbles take a shift each, the lower one of 16 bits two; a load falls away.
        shifts = (1, 2)[self.wide] if self.nibbles else 0
        whole = 4 if self.nibbles else 0
        rows = math.prod(n for _, n in self.outer)
        vectors = self.outputs / 16 if self.sixteen else self.outputs / 4
        total = -(-self.width // self.run) * 75.0
        if self.pairs:
            each = 9 + (14 + 2 * shifts) * self.chunks + turns + whole
            pair = 11 + self.padded // 4 * each
            total += -(-self.width // 2) * pair + self.width * (6 + vectors * self._rescaling())
        else:
            each = 8 + (17 + 4 * shifts) * self.chunks + turns + whole
            channels = self.padded // 8 * each
            total += channels + vectors * self._rescaling()
        if self.strip:
            inner = self.window.x.size if self.window else self.width
            bytes_ = self.channels * self.size
            column = 2 if bytes_ == 1 else 8 + 3 * -(-bytes_ // _VECTOR)
            total += self.rows * (40 + inner * column)
        return int(rows * total)

    def _rescaling(self) -> int:
        """Instructions of one vector of results."""
        if self.sixteen is not None:
            factors = len(set(self.sixteen.factor))
            return 27 if factors == 0 else 58 if factors == 1 else 66
        return 18 if self.four is not None else 90

    def pack(self) -> NDArray[np.int32]:
        """For each block of channels its biases, then chunk by chunk the weights of every channel."""
        node = self.step.node
        weights: NDArray[np.generic] = constant(node, 1)
        bias: NDArray[np.generic] = constant(node, 2).astype(np.int64)
        if self.strip and self.window is not None:
            kernel = (self.window.y.kernel, self.window.x.kernel)
            weights = weights.reshape(len(weights), *kernel, -1).transpose(0, 2, 1, 3)
        taps: NDArray[np.int8] = weights.reshape(len(weights), -1).astype(np.int8)
        if self.flip:
            bias = bias.astype(np.int64) + 128 * taps.astype(np.int64).sum(axis=1)
        chunk = _VECTOR // self.size
        missing = (0, self.padded - len(taps))
        taps = np.pad(taps, (missing, (0, -taps.shape[1] % chunk)))
        bias = np.pad(bias, missing)
        if self.sixteen is not None:
            taps, bias = in_lanes(taps).astype(np.int8), in_lanes(bias)
        blocks = taps.reshape(-1, self.lanes, self.chunks, chunk).transpose(0, 2, 1, 3)
        bias = bias.astype(np.int64).reshape(-1, self.lanes)
        if self.nibbles:
            blocks = (blocks[:, :, ::2] << _NIBBLE | blocks[:, :, 1::2] & 0xF).astype(np.int8)
            bias = bias * np.tile([1, 16], self.lanes // 2)
        words = np.ascontiguousarray(blocks).reshape(len(blocks), -1).view("<i4")
        # A bias of flipped codes, or 16 times one, may leave 32 bits; the sum comes back into them.
        return np.concatenate([bias.astype(np.int32), words], axis=1)
