"""How a Conv or MatMul is walked through on NEON: runs of taps, tiles of pixels by channels, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from qcompile.ir import Array, ops

from ..c.kernel import Scratch, Step
from ..c.window import Window, window_of
from .image import VECTOR, Image
from .rescale import Results, results

_REGISTERS = 32
"""Vector registers that a tile may fill."""
_MOST_PIXELS = 8


@dataclass(frozen=True)
class Way:
    """A family of instructions: so many depths of one channel side by side in a vector of weights.

    `pairs`: two pixels share a vector of activations. `sums`: vectors of partial sums for four channels of a pixel.
    `products`: instructions for sixteen depths of four channels of a pixel. `finish`: to bring four sums side by side.
    `spare`: registers for products. `lowest`: the least weight it multiplies exactly.
    """

    name: str
    depths: int
    products: int
    sums: int = 1
    finish: int = 0
    spare: int = 0
    pairs: bool = False
    lowest: int = -128


DOT = Way("dotprod", 4, 4)
PAIRS = Way("i8mm", 8, 2, finish=1, pairs=True)
# Two products of -128 by -128 do not add up in 16 bits; any others do.
MULTIPLY = Way("neon", 16, 12, sums=4, finish=4, spare=4, lowest=-127)


@dataclass(frozen=True)
class Tile:
    """Pixels of a row by vectors of four channels, all of whose sums stay in registers."""

    pixels: int
    vectors: int


class Plan:
    """One step: `runs` of taps that lie side by side, for pixels that lie `pixel_step` bytes apart.

    Where a run is not whole words, or the operand has a border, the operand is first copied to an `image` that
    may be read a vector beyond its end. Rows of `width` pixels are cut into tiles.
    """

    def __init__(self, step: Step, way: Way) -> None:
        node = step.node
        self.step, self.way = step, way
        found = results(step)
        assert found is not None
        self.results: Results = found
        self.window: Window | None = window_of(node) if isinstance(node.op, ops.Conv) else None
        self.outputs = step.output.type.shape[-1]
        self.channels = node.inputs[0].type.shape[-1]
        self.image = way.pairs or not self._direct()
        self.batch, self.height, self.width = self._extents()

    def _direct(self) -> bool:
        """Can the taps be read where they lie?"""
        w = self.window
        inside = w is None or not (w.y.inside or w.x.inside)
        return inside and self.run % self.way.depths == 0

    @property
    def flat(self) -> bool:
        """Do pixels follow each other, each read for one result only?"""
        w = self.window
        if w is None:
            return True
        return all(
            (axis.kernel, axis.stride, axis.pad) == (1, 1, 0) and axis.out == axis.size
            for axis in (w.y, w.x)
        )

    @property
    def pairs(self) -> bool:
        """Are there two pixels, whose depths come in eights?"""
        return self.width > 1 and self.channels % self.way.depths == 0

    def _extents(self) -> tuple[int, int, int]:
        """Images, rows of one, pixels of a row."""
        if self.flat or self.window is None:
            return 1, 1, self.step.output.type.size // self.outputs
        return self.window.batch, self.window.y.out, self.window.x.out

    # ---------------------------------------------------------------------------------- the taps

    @property
    def side_by_side(self) -> bool:
        """Do the taps of a kernel row lie side by side?"""
        return self.window is None or self.window.x.kernel == 1 or self.window.x.dilation == 1

    @property
    def run(self) -> int:
        """Bytes of taps side by side."""
        if self.window is not None and self.side_by_side:
            return self.window.x.kernel * self.channels
        return self.channels

    @property
    def runs(self) -> Sequence[tuple[str, int, int]]:
        """Loops over the runs of one pixel: variable, count, bytes from one to the next."""
        w = self.window
        if w is None:
            return ()
        loops = [("ky", w.y.kernel, w.y.dilation * self.pitch)]
        if not self.side_by_side:
            loops.append(("kx", w.x.kernel, w.x.dilation * self.channels * self.share))
        return [loop for loop in loops if loop[1] > 1]

    @property
    def padded(self) -> int:
        """Depths of a run with the zeros that fill it up."""
        return -(-self.run // self.way.depths) * self.way.depths

    @property
    def chunks(self) -> int:
        """Whole vectors of a run."""
        return self.padded // VECTOR

    @property
    def rest(self) -> int:
        """Depths of a run behind its whole vectors."""
        return self.padded % VECTOR

    @property
    def depth(self) -> int:
        """Weights of one channel, with the zeros."""
        return self.padded * math.prod(count for _, count, _ in self.runs)

    # ---------------------------------------------------------------------------------- the image

    @property
    def share(self) -> int:
        """Pixels that share a vector."""
        return 2 if self.way.pairs else 1

    @property
    def half(self) -> int:
        """Pixels of a row, or pairs of them: the first of a pair lies so far before the second."""
        return -(-self.width // self.share)

    @property
    def framed(self) -> Image:
        """The operand between its borders; where pixels share vectors, as wide as their pairs reach."""
        w = self.window
        assert w is not None
        reach = (w.x.kernel - 1) * w.x.dilation + 1
        return Image(w, (self.half * self.share - 1) * w.x.stride + reach)

    @property
    def pitch(self) -> int:
        """Bytes of a row of what is read."""
        w = self.window
        if w is None or self.flat:
            return self.half * self.channels * self.share
        if not self.image:
            return w.x.size * self.channels
        if not self.way.pairs:
            return self.framed.pitch
        columns = (self.half - 1) * w.x.stride + (w.x.kernel - 1) * w.x.dilation + 1
        return columns * self.channels * self.share

    @property
    def pixel_step(self) -> int:
        """Bytes from one pixel's taps to the next one's."""
        stride = 1 if self.window is None else self.window.x.stride
        return stride * self.channels * self.share

    def scratch(self) -> Scratch:
        """The image; pairs are taken from one line of it."""
        if not self.image:
            return Scratch()
        if self.window is None or self.flat:
            return Scratch((("image", "int8_t", self.pitch + VECTOR),))
        if not self.way.pairs:
            return Scratch((("image", "int8_t", self.framed.bytes),))
        image = ("image", "int8_t", self.framed.rows * self.pitch)
        return Scratch((image, ("line", "int8_t", self.framed.pitch)))

    @property
    def _copied(self) -> int:
        """Instructions that make the image."""
        if not self.image:
            return 0
        if self.window is None or self.flat:
            return self.pitch // 16 * (3 if self.way.pairs else 1)
        return self.framed.cost * (4 if self.way.pairs else 1)

    # ---------------------------------------------------------------------------------- the tiles

    @property
    def channels_first(self) -> bool:
        """Are all pixels made for some channels before the next channels? So where weights outweigh activations."""
        return self.outputs * self.depth > self.step.node.inputs[0].type.bytes

    @cached_property
    def tile(self) -> Tile:
        """The cheapest that the registers hold."""
        most = -(-self.outputs // 4)
        candidates = [
            Tile(p * self.share, v)
            for p in range(1, min(_MOST_PIXELS, self.half) + 1)
            for v in range(1, min(most, 24) + 1)
            if self._fits(p * self.share, v)
        ]
        return min(candidates, key=self._cost)

    def _fits(self, pixels: int, vectors: int) -> bool:
        return self._used(pixels, vectors, 1, 1) <= _REGISTERS

    def pixel_tiles(self, tile: Tile | None = None) -> list[tuple[int, int, int]]:
        """(first, last, how many at once) of a row's pixels, or pairs."""
        return cut(self.half, (tile or self.tile).pixels // self.share)

    def channel_blocks(self, tile: Tile | None = None) -> list[tuple[int, int, int]]:
        """(first, last, vectors) of the channels."""
        parts = cut(-(-self.outputs // 4), (tile or self.tile).vectors)
        first, last, size = parts[-1]
        if self.outputs % 4 and last - first > size:
            # A vector that is not full is not in a loop.
            parts[-1:] = [(first, last - size, size), (last - size, last, size)]
        return [(a * 4, b * 4, n) for a, b, n in parts]

    def cost(self) -> int:
        """Executed instructions, about."""
        return int(self._cost(self.tile)) + self._copied

    def _cost(self, tile: Tile) -> float:
        total = 0.0
        for first, last, pixels in self.pixel_tiles(tile):
            for low, high, vectors in self.channel_blocks(tile):
                times = (last - first) // pixels * ((high - low) // (4 * vectors))
                total += times * self._tile_cost(pixels * self.share, vectors)
        return total * self.batch * self.height

    def _tile_cost(self, pixels: int, vectors: int) -> float:
        way, sums = self.way, pixels * vectors
        runs = self.depth // self.padded
        two = self.twice(pixels, vectors)
        loads = pixels * (0.5 if two or way.pairs else 1.0)
        chunk = loads + vectors + way.products * sums
        loop = 3 if self.chunks > 1 else 0
        steps = self.chunks / (2 if two else 1)
        rest = pixels + (vectors + way.products * sums) * self.rest / VECTOR
        taps = runs * (self.chunks * chunk + loop * steps + (rest if self.rest else 0) + 3)
        ends = sums * (1 + way.finish) + pixels * self.results.cost(vectors)
        return taps + ends + 8

    def _used(self, pixels: int, vectors: int, activations: int, weights: int) -> int:
        """Registers: `activations` vectors of a pixel, `weights` loads of up to four vectors."""
        way = self.way
        loads = min(4 * weights, 4 * vectors)
        return pixels * (vectors * way.sums + activations) + loads + way.spare

    def twice(self, pixels: int, vectors: int) -> bool:
        """Is a run read two vectors at a time? One instruction loads both."""
        if self.way.pairs or self.chunks == 0 or self.chunks % 2:
            return False
        return self._used(pixels, vectors, 2, 1) <= _REGISTERS

    def ahead(self, pixels: int, vectors: int) -> bool:
        """Are weights loaded while those before them are used?"""
        return self._used(pixels, vectors, 1 + self.twice(pixels, vectors), 2) <= _REGISTERS

    # ---------------------------------------------------------------------------------- constants

    def pack(self, weights: Array) -> NDArray[np.int8]:
        """[block of channels][depths, so many side by side][channel][depth], filled with zeros."""
        rows = weights.astype(np.int8).reshape(len(weights), -1, self.run)
        channels = -(-self.outputs // 4) * 4
        filled = np.pad(
            rows, ((0, channels - len(rows)), (0, 0), (0, self.padded - self.run))
        ).reshape(channels, -1, self.way.depths)
        blocks = [
            np.ascontiguousarray(filled[at : at + 4 * vectors].transpose(1, 0, 2)).ravel()
            for first, last, vectors in self.channel_blocks()
            for at in range(first, last, 4 * vectors)
        ]
        return np.concatenate(blocks)

    def pack_bias(self, bias: Array) -> NDArray[np.int32]:
        """Filled up; where pixels share a vector of sums, each pair of channels twice."""
        filled = np.zeros(-(-self.outputs // 4) * 4, np.int32)
        filled[: len(bias)] = bias
        return np.tile(filled.reshape(-1, 2), 2).ravel() if self.way.pairs else filled


def cut(whole: int, size: int) -> list[tuple[int, int, int]]:
    """(first, last, size) of equal parts and of what is left."""
    full = whole - whole % size
    return [p for p in ((0, full, size), (full, whole, whole - full)) if p[0] < p[1]]
