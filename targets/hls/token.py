"""Cycles of the emitted Verilog, exactly, without its data: units pass tokens by the rules of the library's handshakes.

A cycle has two halves: every unit decides by what its streams held when the cycle began, then all streams change. A
unit's registers move together unless its last holds a word that its reader does not take. Units that cannot move sleep
until a neighbour does, so that a pipeline in which nobody will ever wake is found to be stuck at once.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from . import pipeline as units
from .pipeline import Op, Pipeline

MATVEC, DEPTHWISE, POOL, REQUANTIZE = 6, 4, 2, 7
"""Enabled cycles from a result's last words to its accumulator, and from there to the output."""

IMAGES = 4
"""Images after which the interval is that of a steady flow, unless a caller wants more."""


@dataclass(frozen=True)
class Timing:
    """`cycles` has the cycle in which each image was complete, counted from 1 as the test bench counts.

    `peaks` has the most words that each stream held; `stuck` the streams that are full where nothing moves any more.
    """

    cycles: tuple[int, ...]
    peaks: Mapping[str, int]
    stuck: tuple[str, ...]

    @property
    def latency(self) -> int:
        """Cycles until the first image is complete."""
        return self.cycles[0]

    @property
    def interval(self) -> int:
        """Cycles between the last two images."""
        return self.cycles[-1] - self.cycles[-2]


def simulate(pipeline: Pipeline, images: int = IMAGES) -> Timing:
    """Run so many images, with inputs that are always there and readers that are always ready."""
    return _Simulation(pipeline, images).run()


def work(op: Op) -> int:
    """Cycles an image takes of a unit that never waits: no interval is shorter than the largest."""
    words = max(s.words for s in (*op.inputs, *op.outputs))
    match op:
        case units.MatrixVector():
            return op.vectors * op.weights.size // (op.pe * op.simd)
        case units.Softmax():
            return op.output.pixels * (3 * op.output.channels + _SOFTMAX)
        case units.Concat():
            return op.output.words
        case _:
            return words


def fitted(pipeline: Pipeline, images: int = IMAGES) -> Pipeline:
    """The same pipeline with the smallest FIFOs that keep all its cycles, where an arm of a fork has a deep one.

    Depths are tried one arm after the other, so no arm alone can be smaller.
    """
    wanted = simulate(pipeline, images)
    if wanted.stuck:
        raise ValueError(f"{pipeline.name} is stuck: {', '.join(wanted.stuck)} are full")
    deep = [n for n, s in pipeline.fifos.items() if s.depth > units.DEPTH]
    # a FIFO that never fills cannot be told from an endless one
    roomy = {n: max(units.DEPTH, min(pipeline.fifos[n].depth, wanted.peaks[n] + 1)) for n in deep}
    made = pipeline.with_depths(roomy)
    for name in deep:
        low, high = units.DEPTH, roomy[name]
        while low < high:
            middle = (low + high) // 2
            tried = simulate(made.with_depths({name: middle}), images)
            if tried.cycles == wanted.cycles:
                high = middle
            else:
                low = middle + 1
        made = made.with_depths({name: high})
    return made


_SOFTMAX = 56
"""Cycles between the last lookup of a row and its first quotient."""


class _Channel:
    """A FIFO, or a port: that is never empty or never full."""

    __slots__ = ("depth", "n", "name", "peak", "pop", "push", "reader", "writer")

    def __init__(self, name: str, depth: int, n: int = 0) -> None:
        self.name, self.depth, self.n = name, depth, n
        self.push = self.pop = False
        self.peak = 0
        self.reader: _Unit | None = None
        self.writer: _Unit | None = None


class _Unit:
    """A unit's state. `step` is one cycle: the cycle in which it wants the next, 0 where it waits for a neighbour."""

    def __init__(self, ins: list[_Channel], outs: list[_Channel], moved: list[_Channel]) -> None:
        self.ins, self.outs, self._moved = ins, outs, moved
        self.wake = 0

    def pops(self, c: _Channel) -> None:
        """Take a word."""
        c.pop = True
        self._moved.append(c)

    def pushes(self, c: _Channel) -> None:
        """Give a word."""
        c.push = True
        self._moved.append(c)

    def step(self, now: int) -> int:
        """See the class."""
        raise TypeError(f"{type(self).__name__} is no unit")


class _Piped(_Unit):
    """A unit with `latency` registers between a step that makes a result and its output."""

    def __init__(
        self, ins: list[_Channel], outs: list[_Channel], moved: list[_Channel], latency: int
    ) -> None:
        super().__init__(ins, outs, moved)
        self._top, self._line = 1 << (latency - 1), 0
        self._out = outs[0]
        self._until = 0

    def step(self, now: int) -> int:
        """See _Unit."""
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
        ins: list[_Channel],
        outs: list[_Channel],
        moved: list[_Channel],
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
        ins: list[_Channel],
        outs: list[_Channel],
        moved: list[_Channel],
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
    def __init__(
        self, ins: list[_Channel], outs: list[_Channel], moved: list[_Channel], op: units.Concat
    ) -> None:
        super().__init__(ins, outs, moved, 1)
        self._turns = [c for c, s in zip(ins, op.inputs, strict=True) for _ in range(s.folds)]
        self._at = 0

    def issue(self, idle: bool) -> int:
        """See _Piped."""
        source = self._turns[self._at]
        if not source.n:
            return -1
        self.pops(source)
        self._at = (self._at + 1) % len(self._turns)
        return 1


class _Window(_Unit):
    def __init__(
        self, ins: list[_Channel], outs: list[_Channel], moved: list[_Channel], op: units.Window
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
        """See _Unit."""
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


class _Fork(_Unit):
    def __init__(self, ins: list[_Channel], outs: list[_Channel], moved: list[_Channel]) -> None:
        super().__init__(ins, outs, moved)
        self._left = list(outs)

    def step(self, now: int) -> int:
        """See _Unit."""
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


class _Narrow(_Unit):
    def __init__(
        self, ins: list[_Channel], outs: list[_Channel], moved: list[_Channel], pieces: int
    ) -> None:
        super().__init__(ins, outs, moved)
        self._pieces, self._n = pieces, 0

    def step(self, now: int) -> int:
        """See _Unit."""
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


class _Softmax(_Unit):
    """Loads a row, works for a fixed time, writes the row."""

    def __init__(
        self, ins: list[_Channel], outs: list[_Channel], moved: list[_Channel], channels: int
    ) -> None:
        super().__init__(ins, outs, moved)
        self._channels = channels
        self._state = self._n = self._line = 0

    def step(self, now: int) -> int:
        """See _Unit."""
        out, moves = self.outs[0], True
        if self._line & 8:
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
            self._n += 1
            busy = True
            if self._n == self._channels + _SOFTMAX:
                self._state, self._n = 2, 0
        elif moves:
            issued, busy = 1, True
            self._n += 1
            if self._n == self._channels:
                self._state = self._n = 0
        if moves:
            self._line = (self._line << 1 & 15) | issued
        return now + 1 if busy else 0


class _Simulation:
    def __init__(self, pipeline: Pipeline, images: int) -> None:
        self._moved: list[_Channel] = []
        endless = 1 << 62
        self._channels: dict[str, _Channel] = {}
        for name, s in pipeline.streams.items():
            self._channels[name] = _Channel(name, s.depth)
        for p in pipeline.inputs:
            # a port has no FIFO: what the test bench offers is there as long as there are images
            self._channels[p.stream.name].n = images * p.stream.words
        for p in pipeline.outputs:
            self._channels[p.stream.name].depth = endless
        self._images = images
        self._fifos = list(pipeline.fifos)
        self._outputs = [(self._channels[p.stream.name], p.stream.words) for p in pipeline.outputs]
        self._units = [self._unit(op) for op in pipeline.ops]

    def _unit(self, op: Op) -> _Unit:
        ins, outs = [[self._channels[s.name] for s in side] for side in (op.inputs, op.outputs)]
        made = _state(op, ins, outs, self._moved)
        for c in ins:
            c.reader = made
        for c in outs:
            c.writer = made
        return made

    def run(self) -> Timing:
        """Cycle after cycle until all images are out or nothing is left to do."""
        now = 1
        cycles: list[int] = []
        given = dict.fromkeys((c.name for c, _ in self._outputs), 0)
        due: list[_Unit] = list(self._units)
        later: list[tuple[int, int, _Unit]] = []
        order = 0
        moved = self._moved
        while due or later:
            if not due:
                now = later[0][0]
            while later and later[0][0] == now:
                due.append(heapq.heappop(later)[2])
            coming: list[_Unit] = []
            for unit in due:
                # a unit may have been woken twice
                if unit.wake == -now:
                    continue
                unit.wake = -now
                at = unit.step(now)
                if at == now + 1:
                    coming.append(unit)
                elif at:
                    order += 1
                    heapq.heappush(later, (at, order, unit))
            for c in moved:
                if c.push:
                    c.n += 0 if c.pop else 1
                    if c.reader is not None:
                        coming.append(c.reader)
                    else:
                        given[c.name] += 1
                if c.pop:
                    c.n -= 0 if c.push else 1
                    if c.writer is not None:
                        coming.append(c.writer)
                c.push = c.pop = False
                c.peak = max(c.peak, c.n)
            moved.clear()
            done = min(given[c.name] // words for c, words in self._outputs)
            while len(cycles) < done:
                cycles.append(now)
            if done == self._images:
                break
            due = coming
            now += 1
        stuck = [n for n in self._fifos if self._channels[n].n >= self._channels[n].depth]
        peaks = {n: self._channels[n].peak for n in self._fifos}
        return Timing(tuple(cycles), peaks, tuple(stuck) if done < self._images else ())


def _state(op: Op, ins: list[_Channel], outs: list[_Channel], moved: list[_Channel]) -> _Unit:
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
            return _Concat(ins, outs, moved, op)
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
