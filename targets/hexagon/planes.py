"""How the operand of a convolution lies in vectors: pieces of pixels, columns of words, planes for every tap."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from qcompile.ir import ops

from ..c.kernel import Step
from ..c.window import Axis, Window, window_of

VECTOR = 128
"""Bytes of a vector."""

LANES = 32
"""Words of a vector."""

_PHASES = (1, 2, 4)
"""Strides along a row whose pixels the sorting can tell apart."""


def words(count: int) -> int:
    """Words that hold so many bytes."""
    return -(-count // 4)


def power(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()


def whole(count: int) -> int:
    """Filled up to whole vectors of bytes."""
    return -(-count // VECTOR) * VECTOR


@dataclass(frozen=True, slots=True)
class Frame:
    """One plane: of its rows and columns, which come from where in a column of words; the rest is border."""

    source: int
    top: int
    bottom: int
    left: int
    right: int


@dataclass(frozen=True)
class Shape:
    """How a window's operand lies in memory, in columns and in planes; `split` makes a plane of every tap's column.

    The window's channels are bytes: one a channel of the operand, or two, each multiplied on its own (`size`).
    Split planes are as wide as the result, so that vectors run through all rows; the others hold a row and its border,
    and vectors begin anew at every row.
    """

    window: Window
    outputs: int
    size: int
    split: bool = True

    @cached_property
    def strips(self) -> bool:
        """Is a row of taps one piece of bytes? Few channels then fill words that they would not fill alone."""
        x, channels = self.window.x, self.window.channels
        return x.dilation == 1 and words(x.kernel * channels) < x.kernel * words(channels)

    @property
    def piece(self) -> int:
        """Bytes that lie together: of a pixel, or of a row of taps."""
        return self.window.channels * (self.window.x.kernel if self.strips else 1)

    @property
    def phases(self) -> int:
        """Neighbouring pixels that become one unit of the columns."""
        return 1 if self.strips else self.window.x.stride

    @property
    def groups(self) -> int:
        """Words of a piece."""
        return words(self.piece)

    @property
    def deals(self) -> int:
        """Columns: words of a unit, filled up."""
        return self.phases * power(self.groups)

    @property
    def linear(self) -> bool:
        """Do units run from row to row without a gap?"""
        return not self.strips and self.window.x.size % self.phases == 0

    @property
    def spread(self) -> bool:
        """Must pieces be moved apart before they are sorted?"""
        return not self.linear or self.piece != 4 * power(self.groups)

    @property
    def lines(self) -> int:
        """Runs of units."""
        return 1 if self.linear else self.window.y.size

    @property
    def units(self) -> int:
        """Units of a line."""
        w = self.window
        if self.strips:
            return w.x.out
        return w.x.size * w.y.size // self.phases if self.linear else -(-w.x.size // self.phases)

    @property
    def row_words(self) -> int:
        """From row to row in a column."""
        return self.window.x.size // self.phases if self.linear else whole(4 * self.units) // 4

    @property
    def pitch(self) -> int:
        """Bytes from column to column."""
        return self.lines * whole(4 * self.units)

    @property
    def framed(self) -> bool:
        """Are there planes, or are the columns themselves read?"""
        w = self.window
        border = w.y.kernel > 1 or w.y.stride > 1 or w.y.pad > 0 or w.y.out != w.y.size
        if not self.strips:
            border = border or w.x.kernel > 1 or w.x.pad > 0 or w.x.out != self.row_words
        return border or self.row_words != w.x.out

    @cached_property
    def _rows(self) -> list[int]:
        """The first row of each kind of plane, in the padded operand."""
        y = self.window.y
        return sorted({k * y.dilation % y.stride for k in range(y.kernel)})

    @cached_property
    def _columns(self) -> list[int]:
        """The first column of each kind of plane, in the padded operand."""
        x = self.window.x
        if self.strips:
            return [0]
        starts = [k * x.dilation for k in range(x.kernel)]
        return sorted(set(starts) if self.split else {s % x.stride for s in starts})

    @cached_property
    def line(self) -> int:
        """Words of a plane's row."""
        x = self.window.x
        if self.split or self.strips or not self.framed:
            return x.out
        return x.out + (x.kernel - 1) * x.dilation // x.stride

    @cached_property
    def plane_rows(self) -> int:
        """Rows of a plane."""
        y = self.window.y
        return y.out + (y.kernel - 1) * y.dilation // y.stride

    @property
    def plane_bytes(self) -> int:
        """Bytes of a plane."""
        return 4 * self.line * self.plane_rows

    @cached_property
    def frames(self) -> list[Frame]:
        """The planes of one group of channels; rows, then columns."""
        return [self._frame(row, column) for row in self._rows for column in self._columns]

    def _frame(self, row: int, start: int) -> Frame:
        y, x = self.window.y, self.window.x
        top = max(0, -(-(y.pad - row) // y.stride))
        bottom = min(self.plane_rows, (y.size - 1 + y.pad - row) // y.stride + 1)
        source = (top * y.stride + row - y.pad) * self.row_words
        left, right, phase = 0, self.line, 0
        if not self.strips:
            left = max(0, -(-(x.pad - start) // x.stride))
            right = min(self.line, (x.size - 1 + x.pad - start) // x.stride + 1)
            unit, phase = divmod(start - x.pad, x.stride)
            source += unit
        return Frame(
            4 * source + phase * power(self.groups) * self.pitch,
            min(top, self.plane_rows),
            max(bottom, 0),
            min(left, self.line),
            max(right, 0),
        )

    @cached_property
    def offsets(self) -> list[int]:
        """Bytes from a vector of the result to what each word of weights multiplies."""
        y, x = self.window.y, self.window.x
        if not self.framed:
            return [g * self.pitch for g in range(self.groups)]
        found = []
        for ky in range(y.kernel):
            down, row = divmod(ky * y.dilation, y.stride)
            for kx in range(1 if self.strips else x.kernel):
                across, start = 0, kx * x.dilation
                if not self.split:
                    across, start = divmod(start, x.stride)
                kind = self._rows.index(row) * len(self._columns)
                kind += 0 if self.strips else self._columns.index(start)
                place = 4 * (down * self.line + across) + kind * self.plane_bytes
                group = len(self.frames) * self.plane_bytes
                found += [place + g * group for g in range(self.groups)]
        return found

    @property
    def chunks(self) -> int:
        """Vectors of a row that begin anew at every row; 1 where they run on."""
        return -(-self.window.x.out // LANES) if not self._runs_on else 1

    @property
    def _runs_on(self) -> bool:
        return self.split or self.strips or not self.framed

    @property
    def lanes(self) -> int:
        """Pixels of a vector."""
        return LANES if self._runs_on else min(LANES, self.window.x.out)

    @property
    def step(self) -> int:
        """Bytes from vector to vector, where each is one more."""
        return VECTOR if self._runs_on else 4 * self.line

    @property
    def pixels(self) -> int:
        """Of one image of the result."""
        return self.window.y.out * self.window.x.out

    @property
    def vectors(self) -> int:
        """Vectors of pixels."""
        if self._runs_on:
            return -(-self.pixels // LANES)
        return self.chunks * self.window.y.out

    @property
    def cost(self) -> int:
        """Packets, roughly."""
        columns = self.lines * -(-self.units // LANES) * 3 * self.deals
        if self.spread:
            columns += self.lines * self.units * self.phases * 2 * -(-self.piece // VECTOR)
        frames = 0
        if self.framed:
            row = 6 + 3 * -(-self.line // LANES)
            frames = self.groups * len(self.frames) * self.plane_rows * row
        products = self.vectors * (
            len(self.offsets) * self.outputs * self.size // 2 + 3 * self.outputs
        )
        return columns + frames + products


def shape_of(step: Step) -> Shape | None:
    """The cheaper layout for a Conv of one group or a MatMul; None where neither is possible."""
    node = step.node
    outputs, size = step.output.type.shape[-1], node.inputs[0].type.dtype.bytes
    match node.op:
        case ops.Conv(groups=1) if len(node.inputs[0].type.shape) <= 4:
            window = window_of(node)
        case ops.MatMul():
            x = node.inputs[0].type
            rows = x.size // x.shape[-1]
            one = Axis(1, 1, 1, 1, 0, 1, "y")
            window = Window(1, x.shape[-1], one, Axis(rows, rows, 1, 1, 0, 1, "x"), True)
        case _:
            return None
    window = replace(window, channels=window.channels * size)
    shapes = [Shape(window, outputs, size, split) for split in (True, False)]
    if shapes[0].phases not in _PHASES:
        return None
    return min(shapes, key=lambda s: s.cost)
