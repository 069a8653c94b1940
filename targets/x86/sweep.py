"""Windows that move over an image: its rows in a ring of working memory, registers that walk along them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qcompile.ir import Node, ops

from ..c.kernel import Scratch
from ..c.window import Window, window_of

_WORTH = 128
"""Registers of results that are worth a meeting of threads."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """Tiles of `rows` x `columns` outputs of a register of `block` channels; all rows they need are copied first.

    Where `joined`, a register holds the channels of several pixels: whatever lies side by side in a row of results.
    The rows then have their columns 0, stride, 2 * stride ... first, so that what these outputs meet at one tap lies
    side by side too. `right` columns of border end a row. `threads` share the tiles, each with a ring of its own.
    """

    window: Window
    block: int
    rows: int
    columns: int
    joined: bool
    right: int
    threads: int = 1

    @property
    def span(self) -> int:
        """Rows of the image that a tile needs."""
        y = self.window.y
        return (self.rows - 1) * y.stride + (y.kernel - 1) * y.dilation + 1

    @property
    def phases(self) -> int:
        """Parts of a row."""
        return self.window.x.stride if self.joined else 1

    @property
    def pitch(self) -> int:
        """Bytes of a row."""
        width = self.window.x.pad + self.window.x.size + self.right
        return self.phases * -(-width // self.phases) * self.window.channels

    @property
    def period(self) -> int:
        """Channels after which the registers come to the first again, in bytes of a row of results."""
        channels = self.window.channels
        if self.joined:
            return math.lcm(channels, self.block)
        return -(-channels // self.block) * self.block

    @property
    def bordered(self) -> bool:
        """Does any window reach beyond the image?"""
        x = self.window.x
        return bool(self.right or x.pad or self.window.y.pad or self.below)

    @property
    def below(self) -> bool:
        """Does a window reach below it?"""
        y = self.window.y
        return (y.out - 1) * y.stride + (y.kernel - 1) * y.dilation >= y.pad + y.size

    @property
    def registers(self) -> int:
        """Registers that walk over an image's results."""
        x, channels = self.window.x, self.window.channels
        if self.joined:
            return -(-x.out * channels // self.block) * -(-self.window.y.out // self.rows)
        tiles = -(-x.out // self.columns) * -(-self.window.y.out // self.rows)
        return tiles * -(-channels // self.block)

    @property
    def copies(self) -> int:
        """Registers that are copied of an image, with the work around each."""
        y, x, channels = self.window.y, self.window.x, self.window.channels
        if self.phases > 1:
            return 4 * y.size * x.size * -(-channels // self.block)
        return 3 * y.size * -(-x.size * channels // self.block)

    def column(self, q: int) -> int:
        """Where the pixel of a column begins in its row."""
        return (
            q % self.phases * (self.pitch // self.phases) + q // self.phases * self.window.channels
        )

    @property
    def tiles(self) -> int:
        """Rows of tiles; the last may overlap the one before."""
        return -(-self.window.y.out // self.rows)

    @property
    def shared(self) -> bool:
        """Do threads share it? A thread has two rows of tiles, so that no two threads make the same results."""
        return self.threads > 1 and self.tiles >= 2 * self.threads and self.registers >= _WORTH

    @property
    def ring(self) -> int:
        """Bytes of a ring, and of what is read beyond it."""
        return self.span * self.pitch + self.block

    @property
    def scratch(self) -> Scratch:
        """The ring, or a ring for every thread."""
        if self.shared:
            return Scratch((("rings", "uint8_t", self.threads * self.ring),))
        return Scratch((("image", "uint8_t", self.ring),))


def sweep_of(
    node: Node, block: int, rows: int, columns: int, joined: bool, threads: int = 1
) -> Sweep:
    """Of a Conv or a pooling."""
    assert isinstance(node.op, ops.Conv | ops.MaxPool | ops.SumPool)
    return Sweep(window_of(node), block, rows, columns, joined, node.op.pads[-1], threads)
