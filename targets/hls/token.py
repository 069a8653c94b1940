"""Cycles of the emitted Verilog, exactly, without its data: units pass tokens by the rules of the library's handshakes.

A cycle has two halves: every unit decides by what its streams held when the cycle began, then all streams change. Units
that cannot move sleep until a neighbour does, so that a pipeline in which nobody will ever wake is found to be stuck at
once.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from . import units
from .handshake import SOFTMAX, Channel, Unit, state
from .pipeline import Pipeline
from .units import Op

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
            return op.output.pixels * (3 * op.output.channels + SOFTMAX)
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


class _Simulation:
    def __init__(self, pipeline: Pipeline, images: int) -> None:
        self._moved: list[Channel] = []
        endless = 1 << 62
        self._channels: dict[str, Channel] = {}
        for name, s in pipeline.streams.items():
            self._channels[name] = Channel(name, s.depth)
        for p in pipeline.inputs:
            # a port has no FIFO: what the test bench offers is there as long as there are images
            self._channels[p.stream.name].n = images * p.stream.words
        for p in pipeline.outputs:
            self._channels[p.stream.name].depth = endless
        self._images = images
        self._fifos = list(pipeline.fifos)
        self._outputs = [(self._channels[p.stream.name], p.stream.words) for p in pipeline.outputs]
        self._units = [self._unit(op) for op in pipeline.ops]

    def _unit(self, op: Op) -> Unit:
        ins, outs = [[self._channels[s.name] for s in side] for side in (op.inputs, op.outputs)]
        made = state(op, ins, outs, self._moved)
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
        due: list[Unit] = list(self._units)
        later: list[tuple[int, int, Unit]] = []
        order = 0
        moved = self._moved
        while due or later:
            if not due:
                now = later[0][0]
            while later and later[0][0] == now:
                due.append(heapq.heappop(later)[2])
            coming: list[Unit] = []
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
