"""How every unit of the emitted Verilog moves tokens, cycle by cycle: the library's handshakes without their data.

A unit's registers move together unless its last holds a word that its reader does not take. A unit that cannot move
sleeps until a neighbour does.
"""

from __future__ import annotations

from itertools import pairwise

from . import units
from .units import Op

MATVEC, DEPTHWISE, POOL, REQUANTIZE = 8, 6, 2, 9
"""Enabled cycles from a result's last words to its accumulator, and from there to the output."""

SOFTMAX = 67
"""Cycles between the last code of a row and the first that a quotient is made in."""

_QUOTIENT = 7
"""Enabled cycles that a quotient takes."""


class Channel:
    """A FIFO, or a port: that is never empty or never full."""

    __slots__ = ("depth", "n", "name", "peak", "pop", "push", "reader", "writer")

    def __init__(self, name: str, depth: int, n: int = 0) -> None:
        self.name, self.depth, self.n = name, depth, n
        self.push = self.pop = False
        self.peak = 0
        self.reader: Unit | None = None
        self.writer: Unit | None = None


class Unit:
    """A unit's state. `step` is one cycle: the cycle in which it wants the next, 0 where it waits for a neighbour."""

    def __init__(self, ins: list[Channel], outs: list[Channel], moved: list[Channel]) -> None:
        self.ins, self.outs, self._moved = ins, outs, moved
        self.wake = 0

    def pops(self, c: Channel) -> None:
        """Take a word."""
        c.pop = True
        self._moved.append(c)

    def pushes(self, c: Channel) -> None:
        """Give a word."""
        c.push = True
        self._moved.append(c)

    def step(self, now: int) -> int:
        """See the class."""
        raise TypeError(f"{type(self).__name__} is no unit")


class _Piped(Unit):
    """A unit with `latency` registers between a step that makes a result and its output."""

    def __init__(
        self, ins: list[Channel], outs: list[Channel], moved: list[Channel], latency: int
    ) -> None:
        super().__init__(ins, outs, moved)
        self._top, self._line = 1 << (latency - 1), 0
        self._out = outs[0]
        self._until = 0

    def step(self, now: int) -> int:
        """See Unit."""
        if now < self._until:
            return self._until
        line = self._line
        if line & self._top:
            out = self._out
            if out.n >= out.depth:
                return 0
            self.pushes(out)
            line ^= self._top
        result = self.issue(line == 0)
        if result < 0:
            self._line = line << 1
            return now + 1 if line else 0
        if result > 1:
            # so many steps follow that touch no stream, and nothing is on its way
            self._line, self._until = 0, now + result
            return self._until
        self._line = line << 1 | result
        return now + 1

    def issue(self, idle: bool) -> int:
        """-1: nothing can be done; 0: a step; 1: one that makes a result; more, when idle: so many steps at once."""
        raise TypeError(f"{type(self).__name__} is no unit")


class _Matrix(_Piped):
    def __init__(
        self,
        ins: list[Channel],
        outs: list[Channel],
        moved: list[Channel],
        latency: int,
        groups: int,
        steps: int,
    ) -> None:
        super().__init__(ins, outs, moved, latency)
        self._groups, self._steps = groups, steps
        self._group = self._at = 0

    def issue(self, idle: bool) -> int:
        """See _Piped."""
        last = self._at == self._steps - 1
        if self._group == 0:
            if not self.ins[0].n:
                return -1
        elif idle and (left := self._steps - 1 - self._at) > 1:
            self._at += left
            return left
        if not last:
            if self._group == 0:
                self.pops(self.ins[0])
            self._at += 1
            return 0
        for c in self.ins[1:]:
            if not c.n:
                return -1
        if self._group == 0:
            self.pops(self.ins[0])
        for c in self.ins[1:]:
            self.pops(c)
        self._at = 0
        self._group = self._group + 1 if self._group < self._groups - 1 else 0
        return 1


class _Reduce(_Piped):
    """Reads a word a step; the last `results` of every `steps` make results, with a word of every other input."""

    def __init__(
        self,
        ins: list[Channel],
        outs: list[Channel],
        moved: list[Channel],
        latency: int,
        steps: int = 1,
        results: int = 1,
    ) -> None:
        super().__init__(ins, outs, moved, latency)
        self._steps, self._quiet = steps, steps - results
        self._at = 0

    def issue(self, idle: bool) -> int:
        """See _Piped."""
        makes = self._at >= self._quiet
        for c in self.ins if makes else self.ins[:1]:
            if not c.n:
                return -1
        for c in self.ins if makes else self.ins[:1]:
            self.pops(c)
        self._at = self._at + 1 if self._at < self._steps - 1 else 0
        return int(makes)


class _Concat(_Piped):
    """Words in a fixed order; None among the `turns` is one that is always there."""

    def __init__(
        self,
        ins: list[Channel],
        outs: list[Channel],
        moved: list[Channel],
        turns: list[Channel | None],
    ) -> None:
        super().__init__(ins, outs, moved, 1)
        self._turns, self._at = turns, 0

    def issue(self, idle: bool) -> int:
        """See _Piped."""
        source = self._turns[self._at]
        if source is not None:
            if not source.n:
                return -1
            self.pops(source)
        self._at = (self._at + 1) % len(self._turns)
        return 1


class _Window(Unit):
    def __init__(
        self, ins: list[Channel], outs: list[Channel], moved: list[Channel], op: units.Window
    ) -> None:
        super().__init__(ins, outs, moved)
        x, y = op.inputs[0], op.output
        self._needs: list[int] = op.sources.tolist()
        row = x.width * x.folds
        span = (op.kernel[0] - 1) * op.dilations[0] + 1
        self._room = (span + op.strides[0]) * row
        first = [min(max(r * op.strides[0] - op.pads[0], 0), x.height) for r in range(y.height)] + [
            x.height
        ]
        self._drops = [(b - a) * row for a, b in pairwise(first)]
        self._per_row = y.words // y.height
        self._image = x.words
        # words written and dropped in all, and where the image that is read begins
        self._written = self._base = self._begin = 0
        self._at = self._row_end = self._row = 0
        self._row_end = self._per_row - 1
        self._v1 = self._v2 = False

    def step(self, now: int) -> int:
        """See Unit."""
        out, written, go = self.outs[0], self._written, False
        takes = self.ins[0].n > 0 and written - self._base < self._room
        waits = self._v2 and out.n >= out.depth
        if takes:
            self.pops(self.ins[0])
            self._written = written + 1
        if waits:
            return now + 1 if takes else 0
        if self._v2:
            self.pushes(out)
        need = self._needs[self._at]
        if need < 0 or self._begin + need < written:
            if self._at < self._row_end:
                go = True
                self._at += 1
            elif self._base + self._drops[self._row] <= written:
                go = True
                self._next_row()
        changed = takes or go or self._v1 or self._v2
        self._v1, self._v2 = go, self._v1
        return now + 1 if changed else 0

    def _next_row(self) -> None:
        self._base += self._drops[self._row]
        self._row += 1
        self._at += 1
        if self._row == len(self._drops):
            self._row = self._at = 0
            self._begin += self._image
        self._row_end = self._at + self._per_row - 1


class _Fork(Unit):
    def __init__(self, ins: list[Channel], outs: list[Channel], moved: list[Channel]) -> None:
        super().__init__(ins, outs, moved)
        self._left = list(outs)

    def step(self, now: int) -> int:
        """See Unit."""
        if not self.ins[0].n:
            return 0
        left = []
        for c in self._left:
            if c.n < c.depth:
                self.pushes(c)
            else:
                left.append(c)
        self._left = left
        if left:
            return 0
        self.pops(self.ins[0])
        self._left = list(self.outs)
        return now + 1


class _Narrow(Unit):
    def __init__(
        self, ins: list[Channel], outs: list[Channel], moved: list[Channel], pieces: int
    ) -> None:
        super().__init__(ins, outs, moved)
        self._pieces, self._n = pieces, 0

    def step(self, now: int) -> int:
        """See Unit."""
        out, source = self.outs[0], self.ins[0]
        gives = self._n > 0 and out.n < out.depth
        takes = source.n > 0 and (self._n == 0 or (self._n == 1 and gives))
        if gives:
            self.pushes(out)
            self._n -= 1
        if takes:
            self.pops(source)
            self._n = self._pieces
        return now + 1 if gives or takes else 0


class _Softmax(Unit):
    """Loads a row, works for a fixed time, writes the row."""

    def __init__(
        self, ins: list[Channel], outs: list[Channel], moved: list[Channel], channels: int
    ) -> None:
        super().__init__(ins, outs, moved)
        self._channels = channels
        self._state = self._n = self._line = 0

    def step(self, now: int) -> int:
        """See Unit."""
        out, moves = self.outs[0], True
        if self._line >> (_QUOTIENT - 1):
            if out.n < out.depth:
                self.pushes(out)
            else:
                moves = False
        issued = 0
        busy = moves and self._line != 0
        if self._state == 0:
            if self.ins[0].n:
                self.pops(self.ins[0])
                self._n += 1
                busy = True
                if self._n == self._channels:
                    self._state, self._n = 1, 0
        elif self._state == 1:
            # the row before must have been shifted when this one's sum is complete
            if self._n != self._channels + 3 or not self._line & 31:
                self._n += 1
                busy = True
            if self._n == self._channels + SOFTMAX:
                self._state, self._n = 2, 0
        elif moves:
            issued, busy = 1, True
            self._n += 1
            if self._n == self._channels:
                self._state = self._n = 0
        if moves:
            self._line = (self._line << 1 & (1 << _QUOTIENT) - 1) | issued
        return now + 1 if busy else 0


def state(op: Op, ins: list[Channel], outs: list[Channel], moved: list[Channel]) -> Unit:
    """A unit before its first cycle; what it moves it appends to `moved`."""
    tail = REQUANTIZE if isinstance(op, units.Sum) and op.requantize is not None else 0
    x, y = op.inputs[0], op.output
    match op:
        case units.Window():
            return _Window(ins, outs, moved, op)
        case units.MatrixVector():
            groups, steps = op.weights.shape[0] // op.pe, op.weights.shape[1] // op.simd
            return _Matrix(ins, outs, moved, MATVEC + tail, groups, steps)
        case units.Depthwise():
            return _Reduce(ins, outs, moved, DEPTHWISE + tail, x.taps)
        case units.SumPool():
            return _Reduce(ins, outs, moved, POOL + tail, x.taps)
        case units.GlobalSum():
            return _Reduce(ins, outs, moved, POOL + tail, x.words, y.words)
        case units.MaxPool():
            return _Reduce(ins, outs, moved, POOL, x.taps)
        case units.Elementwise():
            return _Reduce(ins, outs, moved, REQUANTIZE)
        case units.Table():
            return _Reduce(ins, outs, moved, POOL)
        case units.Concat():
            words = [[c] * s.folds for c, s in zip(ins, op.inputs, strict=True)]
            return _Concat(ins, outs, moved, [c for part in words for c in part])
        case units.ChannelPad():
            before, read, after = op.runs
            turns = [*[None] * before, *[ins[0]] * read, *[None] * after]
            return _Concat(ins, outs, moved, turns)
        case units.Fork():
            return _Fork(ins, outs, moved)
        case units.Width() if y.lanes > x.lanes:
            return _Reduce(ins, outs, moved, 1, y.lanes // x.lanes)
        case units.Width():
            return _Narrow(ins, outs, moved, x.lanes // y.lanes)
        case units.Softmax():
            return _Softmax(ins, outs, moved, y.channels)
        case _:
            raise AssertionError(type(op).__name__)
