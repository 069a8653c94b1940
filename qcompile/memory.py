"""Where buffers live in one arena: a pure function of who writes and reads what, and when.

Buffers are named. A name without a size lives elsewhere (the caller's memory) and counts for the order alone.
Names may be tied together at fixed distances: the parts of a value that is made piece by piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from random import Random

import networkx as nx

_ORDERS_TRIED = 64
"""Topological orders looked at beside the given and the greedy one; small graphs have no more."""

_PLACEMENTS = 20_000
"""Blocks put down while looking for a better plan: counted, not timed, so that every machine finds the same."""

_TURNS = 800
"""Plans tried where blocks are few."""

_TURNS_FOR_SPEED = 60
"""Plans tried for fewer shared bytes once the peak cannot sink."""

Tied = Mapping[str, tuple[str, int]]
"""Of a name: the tie it belongs to, and at which offset from the tie's start it lies."""


@dataclass(frozen=True, slots=True)
class Task:
    """One kernel call: it reads buffers, writes one, and needs `scratch` bytes while it runs.

    Of the buffers that nobody reads afterwards, the result may take the memory of any in `reuse` that is as large,
    and may overlap any in `trails` that begins at least so many bytes after the result does.
    """

    reads: tuple[str, ...]
    writes: str
    scratch: int = 0
    reuse: tuple[str, ...] = ()
    trails: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """Offsets of buffers and of each task's scratch in an arena of `peak` bytes.

    `taken` maps a result to the operand whose memory it took over; `crossed` holds the other pairs of a result and
    an operand that share bytes.
    """

    offsets: Mapping[str, int]
    scratch: Sequence[int]
    peak: int
    taken: Mapping[str, str]
    crossed: frozenset[tuple[str, str]]


def lifetimes(tasks: Sequence[Task]) -> dict[str, tuple[int, int]]:
    """First and last task that needs each buffer; a buffer nobody writes is there from the start."""
    spans: dict[str, tuple[int, int]] = {}
    for t, task in enumerate(tasks):
        for name in (*task.reads, task.writes):
            first = t if name == task.writes else 0
            spans[name] = (spans.get(name, (first, t))[0], t)
    return spans


def distances(tasks: Sequence[Task], sizes: Mapping[str, int]) -> dict[tuple[str, str], int]:
    """Result and dying operand that may overlap: how many bytes after the result the operand begins at least."""
    spans = lifetimes(tasks)
    found: dict[tuple[str, str], int] = {}
    for t, task in enumerate(tasks):
        for name, distance in task.trails:
            dies = name in sizes and task.writes in sizes and spans[name][1] == t
            if dies and spans[task.writes][0] == t:
                found[task.writes, name] = max(0, min(distance, sizes[task.writes]))
    return found


def takeovers(tasks: Sequence[Task], sizes: Mapping[str, int]) -> set[tuple[str, str]]:
    """Result and dying operand that may be one buffer."""
    spans = lifetimes(tasks)
    return {
        (task.writes, name)
        for t, task in enumerate(tasks)
        for name in task.reuse
        if name in sizes
        and sizes.get(task.writes) == sizes[name]
        and spans[name][1] == t == spans[task.writes][0]
    }


def max_live(
    tasks: Sequence[Task], sizes: Mapping[str, int], align: int, tied: Tied | None = None
) -> int:
    """The most bytes that are needed at one moment: no plan can do with less."""
    spans = lifetimes(tasks)
    within = tied or {}
    # What is tied is not aligned: of its bytes, whole units of alignment are sure to be its own.
    need = {n: (s // align * align if n in within else _up(s, align)) for n, s in sizes.items()}
    least = distances(tasks, sizes) | dict.fromkeys(takeovers(tasks, sizes), 0)
    crossing: dict[str, list[tuple[int, str]]] = {}
    for (result, name), distance in least.items():
        apart = distance // align * align if result in within else _up(distance, align)
        crossing.setdefault(result, []).append((apart, name))
    born: list[list[str]] = [[] for _ in tasks]
    dead: list[list[str]] = [[] for _ in tasks]
    for name, (first, last) in spans.items():
        if name in sizes:
            born[first].append(name)
            dead[last].append(name)
    live = peak = 0
    for t, task in enumerate(tasks):
        live += sum(need[name] for name in born[t])
        here = live
        if pairs := crossing.get(task.writes):
            # operands as far down as they may lie, the least distant first: no order needs fewer bytes
            end = 0
            for distance, name in sorted(pairs):
                end = max(end, distance) + need[name]
                here -= need[name]
            here += max(end, need[task.writes]) - need[task.writes]
        peak = max(peak, here + _up(task.scratch, align))
        live -= sum(need[name] for name in dead[t])
    return peak


def order(
    tasks: Sequence[Task], sizes: Mapping[str, int], align: int = 16, tied: Tied | None = None
) -> list[int]:
    """An execution order that needs the least memory of those tried; the given one where none is better."""
    best = list(range(len(tasks)))
    least = max_live(tasks, sizes, align, tied)
    for candidate in _orders(tasks, sizes, align):
        need = max_live([tasks[i] for i in candidate], sizes, align, tied)
        if need < least:
            best, least = candidate, need
    return best


def _orders(tasks: Sequence[Task], sizes: Mapping[str, int], align: int) -> Iterator[list[int]]:
    writer = {task.writes: i for i, task in enumerate(tasks)}
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(len(tasks)))
    graph.add_edges_from(
        (writer[name], i) for i, task in enumerate(tasks) for name in task.reads if name in writer
    )
    yield _greedy(graph, tasks, sizes, align)
    yield from islice(nx.all_topological_sorts(graph), _ORDERS_TRIED)


def _greedy(
    graph: nx.DiGraph[int], tasks: Sequence[Task], sizes: Mapping[str, int], align: int
) -> list[int]:
    """Always run the ready task that leaves the least memory occupied."""
    readers: dict[str, set[int]] = {}
    for i, task in enumerate(tasks):
        for name in task.reads:
            readers.setdefault(name, set()).add(i)
    waiting = dict(graph.in_degree())
    done: list[int] = []

    def growth(i: int) -> int:
        freed = {n for n in tasks[i].reads if n in sizes and readers[n] <= {i, *done}}
        return _up(sizes.get(tasks[i].writes, 0), align) - sum(_up(sizes[n], align) for n in freed)

    while waiting:
        i = min((i for i, n in waiting.items() if n == 0), key=lambda i: (growth(i), i))
        del waiting[i]
        done.append(i)
        for after in graph.successors(i):
            waiting[after] -= 1
    return done


def plan(
    tasks: Sequence[Task], sizes: Mapping[str, int], align: int = 16, tied: Tied | None = None
) -> Plan:
    """Place every sized buffer and scratch so that no two that live at once overlap, but where a task allows it.

    What is tied together keeps its distances; everything else is aligned.
    """
    puzzle = _Puzzle(tasks, sizes, align, tied or {})
    places = puzzle.solve(max_live(tasks, sizes, align, tied))
    offsets = {
        name: places[key] + shift
        for key, pieces in puzzle.blocks.items()
        for name, shift in pieces
        if isinstance(name, str)
    }
    together = takeovers(tasks, sizes)
    taken: dict[str, str] = {}
    crossed: set[tuple[str, str]] = set()
    for result, name in sorted({*together, *distances(tasks, sizes)}):
        gap = offsets[name] - offsets[result]
        if (result, name) in together and gap == 0:
            taken[result] = name
        elif -sizes[name] < gap < sizes[result]:
            crossed.add((result, name))
    scratch = [places.get(t, 0) for t in range(len(tasks))]
    return Plan(offsets, scratch, puzzle.peak(places), taken, frozenset(crossed))


_Key = str | int
"""A buffer or a tie by name, or the scratch of a task by its number."""


@dataclass(frozen=True, slots=True)
class _Rule:
    """Of two blocks that live at once: the least offsets of one from the other, above it and below it.

    `same` is the one offset between them at which the result of a task takes its operand's memory.
    """

    other: _Key
    above: int
    below: int
    same: int | None


class _Puzzle:
    """Blocks of bytes, and how far apart each two that live at once must begin."""

    def __init__(
        self, tasks: Sequence[Task], sizes: Mapping[str, int], align: int, tied: Tied
    ) -> None:
        self._align = align
        self._spans: dict[_Key, tuple[int, int]] = {}
        self._sizes: dict[_Key, int] = {}
        self.blocks: dict[_Key, list[tuple[_Key, int]]] = {}
        for name, span in lifetimes(tasks).items():
            if name in sizes:
                tie, shift = tied.get(name, (name, 0))
                self.blocks.setdefault(tie, []).append((name, shift))
                self._spans[name], self._sizes[name] = span, sizes[name]
        for t, task in enumerate(tasks):
            if task.scratch:
                self.blocks[t] = [(t, 0)]
                self._spans[t], self._sizes[t] = (t, t), task.scratch
        self._ends = {
            key: max(shift + self._sizes[piece] for piece, shift in pieces)
            for key, pieces in self.blocks.items()
        }
        self._rules: dict[_Key, list[_Rule]] = {key: [] for key in self.blocks}
        self._pairs: list[tuple[_Key, _Rule]] = []
        self._rule(tasks, sizes)

    def _rule(self, tasks: Sequence[Task], sizes: Mapping[str, int]) -> None:
        """Write down what every two blocks owe each other."""
        trails: dict[tuple[_Key, _Key], int] = {
            (a, b): d for (a, b), d in distances(tasks, sizes).items()
        }
        together = {frozenset(pair) for pair in takeovers(tasks, sizes)}
        keys = list(self.blocks)
        for other, key in combinations(keys, 2):
            for a, shift_a in self.blocks[key]:
                for b, shift_b in self.blocks[other]:
                    if not self._meet(a, b):
                        continue
                    shift = shift_b - shift_a
                    above = trails.get((b, a), self._sizes[b]) + shift
                    below = trails.get((a, b), self._sizes[a]) - shift
                    one = frozenset((a, b)) in together
                    rule = _Rule(other, above, below, shift if one else None)
                    self._rules[key].append(rule)
                    self._rules[other].append(_Rule(key, below, above, -shift if one else None))
                    if (b, a) in trails or (a, b) in trails:
                        apart = self._sizes[b] + shift, self._sizes[a] - shift
                        self._pairs.append((key, _Rule(other, *apart, rule.same)))

    def _meet(self, a: _Key, b: _Key) -> bool:
        return self._spans[a][0] <= self._spans[b][1] and self._spans[b][0] <= self._spans[a][1]

    def peak(self, places: Mapping[_Key, int]) -> int:
        """Bytes of the arena."""
        return _up(max((at + self._ends[k] for k, at in places.items()), default=0), self._align)

    def solve(self, least: int) -> dict[_Key, int]:
        """First fit in several orders, then in orders near the best one, until nothing can be better."""
        keys = list(self.blocks)
        tried = [(self._cost(places := self._fit(keys)), keys, places) for keys in self._starts()]
        cost, keys, places = min(tried, key=lambda one: one[0])
        turns = min(_TURNS, _PLACEMENTS // len(keys)) if len(keys) > 1 else 0
        random = Random(0)
        while turns > 0 and cost != (least, 0):
            turns = min(turns - 1, _TURNS_FOR_SPEED) if cost[0] == least else turns - 1
            candidate = self._near(keys, places, random)
            fitted = self._fit(candidate)
            if (new := self._cost(fitted)) <= cost:
                cost, keys, places = new, candidate, fitted
        return places

    def _near(self, keys: Sequence[_Key], places: Mapping[_Key, int], random: Random) -> list[_Key]:
        """Another order: some turned round, or one that reaches the top, or any, moved elsewhere."""
        kind, a, b = (random.random() for _ in range(3))
        i, j = sorted((int(a * (len(keys) + 1)), int(b * (len(keys) + 1))))
        if kind < 0.25:
            return [*keys[:i], *keys[i:j][::-1], *keys[j:]]
        top = self.peak(places) - self._align
        high = [k for k in keys if places[k] + self._ends[k] > top]
        pool = high if kind < 0.625 else keys
        key = pool[int(a * len(pool))]
        rest = [k for k in keys if k != key]
        at = int(b * len(keys))
        return [*rest[:at], key, *rest[at:]]

    def _starts(self) -> list[list[_Key]]:
        """By size, by time, by life, and backwards in time; scratch in its turn, and when all else has its place."""
        life = {
            key: (
                min(self._spans[piece][0] for piece, _ in pieces),
                max(self._spans[piece][1] for piece, _ in pieces),
            )
            for key, pieces in self.blocks.items()
        }
        keys = list(self.blocks)
        orders = [
            sorted(keys, key=lambda k: (-self._ends[k], life[k][0])),
            sorted(keys, key=lambda k: (life[k][0], -self._ends[k])),
            sorted(keys, key=lambda k: (life[k][0] - life[k][1], -self._ends[k])),
            sorted(keys, key=lambda k: (-life[k][0], -self._ends[k])),
        ]
        return orders + [sorted(keys, key=lambda k: isinstance(k, int)) for keys in orders]

    def _cost(self, places: Mapping[_Key, int]) -> tuple[int, int]:
        """Bytes, then pairs that share bytes without being one buffer: their kernels are slower."""
        gaps = ((places[key] - places[rule.other], rule) for key, rule in self._pairs)
        shared = sum(-rule.below < gap < rule.above and gap != rule.same for gap, rule in gaps)
        return self.peak(places), shared

    def _fit(self, keys: Sequence[_Key]) -> dict[_Key, int]:
        """One after the other, each at the lowest place that its neighbours leave."""
        places: dict[_Key, int] = {}
        for key in keys:
            bars = [
                (at - rule.below, at + rule.above, None if rule.same is None else at + rule.same)
                for rule in self._rules[key]
                if (at := places.get(rule.other)) is not None
            ]
            places[key] = self._lowest(bars)
        return places

    def _lowest(self, bars: Sequence[tuple[int, int, int | None]]) -> int:
        """The lowest aligned place strictly inside no bar, but for the one place that a bar leaves free."""
        candidates = {0, *(max(0, _up(high, self._align)) for _, high, _ in bars)}
        candidates |= {
            one for *_, one in bars if one is not None and one >= 0 and one % self._align == 0
        }
        return next(
            at
            for at in sorted(candidates)
            if all(not low < at < high or at == one for low, high, one in bars)
        )


def _up(n: int, align: int) -> int:
    return -(-n // align) * align
