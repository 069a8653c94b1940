"""Results at once and products in each for every layer, so that an image takes no more than so many cycles.

A layer's choices are the divisors of its results and products, each with the cycles its units are busy and what they
take. Between two layers of unlike lanes stand width converters, which count too. For an interval every layer first
takes what is cheapest after the layers before it, then whatever is cheaper still beside its neighbours, until no single
layer can do better. Where that does not fit, what it has too much of becomes dearer and the layers choose again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from qcompile.ir import Graph

from . import units
from .devices import Device
from .legalise import Folding, legalise
from .pipeline import Pipeline
from .resources import Cost, cost, fifo_cost
from .token import work
from .units import Op, Stream

_DEARER = 8
"""How often the layers choose again with other prices."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that a design may take."""

    dsp: int
    bram18: int
    lut: int

    @property
    def half(self) -> Limits:
        """Half of everything."""
        return Limits(self.dsp // 2, self.bram18 // 2, self.lut // 2)

    def hold(self, taken: Cost) -> bool:
        """Does it fit?"""
        return not self.exceeded(taken)

    def exceeded(self, taken: Cost) -> dict[str, tuple[int, int]]:
        """What it takes and what there is, of everything that there is too little of."""
        pairs = {
            "DSP blocks": (taken.dsp, self.dsp),
            "18-kbit block RAMs": (taken.bram18, self.bram18),
            "LUTs": (round(taken.lut), self.lut),
        }
        return {name: (has, most) for name, (has, most) in pairs.items() if has > most}

    def less(self, taken: Cost) -> Limits:
        """What is left."""
        return Limits(
            max(0, self.dsp - taken.dsp),
            max(0, self.bram18 - taken.bram18),
            max(0, self.lut - math.ceil(taken.lut)),
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to fold a layer: cycles an image takes, the lanes of what it reads and writes, what it takes.

    The FIFOs between its units, and those that its output goes into, are part of what it takes.
    """

    fold: tuple[int, int]
    work: int
    reads: tuple[int, ...]
    lanes: int
    taken: Cost


@dataclass(frozen=True, slots=True)
class Edge:
    """What a layer reads in one of its slots from another's output; `stream` has one lane.

    With `port_slot` it is a port of the graph that two read: it has the lanes of what `source`, its first reader, reads
    in that slot.
    """

    source: str
    sink: str
    slot: int
    stream: Stream
    port_slot: int | None = None


@dataclass
class Rates:
    """The layers of a graph, their choices and how they are joined."""

    graph: Graph
    device: Device
    _joined: dict[tuple[str, int, int, int], tuple[Cost, int]] = field(default_factory=dict)

    @cached_property
    def plain(self) -> Pipeline:
        """Every layer with one of each."""
        return legalise(self.graph)

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """Every stream from a layer to another; a port has the lanes that its first reader wants."""
        writers: dict[str, str] = {}
        ports: dict[str, list[str]] = {}
        first: dict[str, tuple[str, int]] = {}
        found = []
        for op in self.plain.ops:
            if isinstance(op, units.Fork):
                root = op.inputs[0].name
                for s in op.outputs:
                    if root in writers:
                        writers[s.name] = writers[root]
                    else:
                        ports[s.name] = [a.name for a in op.outputs]
                continue
            for slot, s in enumerate(op.inputs):
                source = writers.get(s.name)
                if s.name in ports:
                    reader, at = first.setdefault(ports[s.name][0], (op.layer, slot))
                    if s.name != ports[s.name][0]:
                        found.append(Edge(reader, op.layer, slot, s, at))
                # a window's taps come from the layer itself
                elif source is not None and source != op.layer:
                    found.append(Edge(source, op.layer, slot, s))
            writers |= {s.name: op.layer for s in op.outputs}
        return tuple(found)

    @cached_property
    def choices(self) -> Mapping[str, tuple[Choice, ...]]:
        """The choices of every layer, in the order of the layers."""
        extents = {op.layer: op.extent for op in self.plain.ops if op.fold is not None}
        folds = {
            layer: [(p, s) for p in divisors(o) for s in divisors(k)]
            for layer, (o, k) in extents.items()
        }
        found: dict[str, list[Choice]] = {}
        for i in range(max(map(len, folds.values()), default=1)):
            # one pipeline has a choice of every layer; what a layer's units take does not depend on the others'
            folding = {n: f[i] for n, f in folds.items() if i < len(f)}
            made = legalise(self.graph, folding)
            layers: dict[str, list[Op]] = {}
            for layer, op in _inside(made):
                layers.setdefault(layer, []).append(op)
            for layer, ops in layers.items():
                if layer in folding or (i == 0 and layer not in folds):
                    found.setdefault(layer, []).append(
                        self._choice(folding.get(layer, (1, 1)), ops, made)
                    )
        return {layer: tuple(c) for layer, c in found.items()}

    def _choice(self, fold: tuple[int, int], ops: list[Op], pipeline: Pipeline) -> Choice:
        family, fifos = self.device.family, pipeline.fifos
        taken = sum((cost(op, family) for op in ops), Cost())
        made = [s for op in ops for s in op.outputs]
        shallow = [replace(s, depth=units.DEPTH) for s in made if s.name in fifos]
        taken = sum((fifo_cost(s, family) for s in shallow), taken)
        computing = [op for op in ops if not isinstance(op, units.Fork)]
        own = {s.name for op in computing for s in op.outputs}
        reads = tuple(s.lanes for op in computing for s in op.inputs if s.name not in own)
        return Choice(fold, max(map(work, ops)), reads, computing[-1].output.lanes, taken)

    def joint(self, edge: Edge, source: Choice, sink: Choice) -> tuple[Cost, int]:
        """What converters between two layers take, and the cycles of the slower one."""
        lanes = source.lanes if edge.port_slot is None else source.reads[edge.port_slot]
        wanted, words = sink.reads[edge.slot], edge.stream.words
        key = (edge.stream.name, edge.stream.channels, lanes, wanted)
        if key not in self._joined:
            taken, family = Cost(), self.device.family
            common = math.gcd(lanes, edge.stream.channels, wanted)
            # reader and writer may see the elements in different geometries
            flat = replace(edge.stream, height=1, width=1, channels=words, depth=units.DEPTH)
            for a, b in ((lanes, common), (common, wanted)):
                if a != b:
                    ends = [replace(flat, lanes=n) for n in (a, b)]
                    unit = units.Width("width", edge.sink, (ends[0],), (ends[1],))
                    taken += cost(unit, family) + fifo_cost(ends[1], family)
            self._joined[key] = taken, 0 if common == min(lanes, wanted) else words // common
        return self._joined[key]

    def total(self, chosen: Mapping[str, Choice]) -> Cost:
        """What all layers and the converters between them take."""
        made = sum((c.taken for c in chosen.values()), Cost())
        for e in self.edges:
            made += self.joint(e, chosen[e.source], chosen[e.sink])[0]
        return made

    @cached_property
    def intervals(self) -> list[int]:
        """Every interval that is some layer's work, and that all layers can keep; rising."""
        least = max(min(c.work for c in found) for found in self.choices.values())
        return sorted({c.work for found in self.choices.values() for c in found if c.work >= least})

    def choose(self, interval: int, limits: Limits) -> Mapping[str, Choice] | None:
        """Choices that keep the interval and the limits, cheap by what there is least of; None where none is found."""
        prices = [1 / max(1, n) for n in (limits.dsp, limits.bram18, limits.lut)]
        for _ in range(_DEARER):
            chosen = self._cheapest(interval, prices)
            if chosen is None:
                return None
            taken = self.total(chosen)
            if limits.hold(taken):
                return chosen
            pairs = (
                (taken.dsp, limits.dsp),
                (taken.bram18, limits.bram18),
                (taken.lut, limits.lut),
            )
            for i, (has, most) in enumerate(pairs):
                if has > most:
                    prices[i] *= 1.5 * min(4.0, has / max(1, most))
        return None

    def _cheapest(self, interval: int, prices: list[float]) -> Mapping[str, Choice] | None:
        around: dict[str, list[Edge]] = {layer: [] for layer in self.choices}
        for e in self.edges:
            for layer in {e.source, e.sink}:
                around[layer].append(e)

        def price(c: Cost) -> float:
            return c.dsp * prices[0] + c.bram18 * prices[1] + c.lut * prices[2]

        def beside(layer: str, choice: Choice, chosen: dict[str, Choice]) -> float:
            """The price of a choice, with what it takes to join it to the neighbours that have one."""
            sum_ = price(choice.taken)
            for e in around[layer]:
                pair = chosen | {layer: choice}
                if e.source in pair and e.sink in pair:
                    taken, cycles = self.joint(e, pair[e.source], pair[e.sink])
                    if cycles > interval:
                        return math.inf
                    sum_ += price(taken)
            return sum_

        open_ = {n: [c for c in found if c.work <= interval] for n, found in self.choices.items()}
        if not all(open_.values()):
            return None
        chosen: dict[str, Choice] = {}
        for layer, found in open_.items():
            chosen[layer] = min(found, key=lambda c: beside(layer, c, chosen))
        changed = True
        while changed:
            changed = False
            for layer, found in open_.items():
                best = min(found, key=lambda c: beside(layer, c, chosen))
                if beside(layer, best, chosen) < beside(layer, chosen[layer], chosen):
                    chosen[layer], changed = best, True
        joints = (self.joint(e, chosen[e.source], chosen[e.sink])[1] for e in self.edges)
        return chosen if all(cycles <= interval for cycles in joints) else None

    def fastest(self, limits: Limits) -> tuple[int, Mapping[str, Choice]] | None:
        """The smallest interval for which choices fit, and these; None where nothing does."""
        low, high = 0, len(self.intervals) - 1
        best = None
        while low <= high:
            middle = (low + high) // 2
            chosen = self.choose(self.intervals[middle], limits)
            if chosen is None:
                low = middle + 1
            else:
                best, high = (self.intervals[middle], chosen), middle - 1
        return best

    def folding(self, chosen: Mapping[str, Choice]) -> Folding:
        """The folding that these choices are."""
        folds = {op.layer for op in self.plain.ops if op.fold is not None}
        return {layer: c.fold for layer, c in chosen.items() if layer in folds}


def divisors(n: int) -> list[int]:
    """All of them, rising."""
    return [d for d in range(1, n + 1) if n % d == 0]


def _inside(made: Pipeline) -> Iterator[tuple[str, Op]]:
    """The units of each layer, with its forks and those of ports it reads first; no converters between layers."""
    windows: set[str] = set()
    ports = {p.stream.name for p in made.inputs}
    readers = {s.name: op.layer for op in reversed(made.ops) for s in op.inputs}
    for op in made.ops:
        if isinstance(op, units.Window):
            windows.add(op.output.name)
        if isinstance(op, units.Fork) and op.inputs[0].name in ports:
            yield readers[op.output.name], op
        elif not isinstance(op, units.Width) or op.inputs[0].name in windows:
            yield op.layer, op
