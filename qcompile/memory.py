"""Where buffers live in one arena: a pure function of who writes and reads what, and when.

Buffers are named. A name without a size lives elsewhere (the caller's memory) and counts for the order alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import networkx as nx

_ORDERS_TRIED = 64
"""Topological orders looked at beside the given and the greedy one; small graphs have no more."""


@dataclass(frozen=True, slots=True)
class Task:
    """One kernel call: it reads buffers, writes one, and needs `scratch` bytes while it runs.

    The result may take the memory of any buffer in `reuse` that nobody reads afterwards and that is as large.
    """

    reads: tuple[str, ...]
    writes: str
    scratch: int = 0
    reuse: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """Offsets of buffers and of each task's scratch in an arena of `peak` bytes.

    `taken` maps a result to the operand whose memory it took over.
    """

    offsets: Mapping[str, int]
    scratch: Sequence[int]
    peak: int
    taken: Mapping[str, str]


def lifetimes(tasks: Sequence[Task]) -> dict[str, tuple[int, int]]:
    """First and last task that needs each buffer; a buffer nobody writes is there from the start."""
    spans: dict[str, tuple[int, int]] = {}
    for t, task in enumerate(tasks):
        for name in (*task.reads, task.writes):
            first = t if name == task.writes else 0
            spans[name] = (spans.get(name, (first, t))[0], t)
    return spans


def takeovers(tasks: Sequence[Task], sizes: Mapping[str, int]) -> dict[str, str]:
    """Which result takes the memory of which operand."""
    spans = lifetimes(tasks)
    taken: dict[str, str] = {}
    for t, task in enumerate(tasks):
        for name in task.reuse:
            fits = name in sizes and sizes.get(task.writes) == sizes[name]
            if fits and spans[name][1] == t and task.writes not in taken:
                taken[task.writes] = name
    return taken


def max_live(tasks: Sequence[Task], sizes: Mapping[str, int], align: int) -> int:
    """The most bytes that are needed at one moment: no plan can do with less."""
    spans = lifetimes(tasks)
    handed = set(takeovers(tasks, sizes).values())
    changes = [0] * (len(tasks) + 1)
    for name, (first, last) in spans.items():
        if name in sizes:
            # an operand's memory is handed over within the task: counted there once
            end = last if name in handed else last + 1
            changes[first] += _up(sizes[name], align)
            changes[end] -= _up(sizes[name], align)
    live = peak = 0
    for task, change in zip(tasks, changes, strict=False):
        live += change
        peak = max(peak, live + _up(task.scratch, align))
    return peak


def order(tasks: Sequence[Task], sizes: Mapping[str, int], align: int = 16) -> list[int]:
    """An execution order that needs the least memory of those tried; the given one where none is better."""
    best = list(range(len(tasks)))
    least = max_live(tasks, sizes, align)
    for candidate in _orders(tasks, sizes, align):
        need = max_live([tasks[i] for i in candidate], sizes, align)
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


def plan(tasks: Sequence[Task], sizes: Mapping[str, int], align: int = 16) -> Plan:
    """Place every sized buffer and scratch so that no two that live at once overlap."""
    spans, taken = lifetimes(tasks), takeovers(tasks, sizes)
    home: dict[str, str] = {}
    for name in spans:
        root = name
        while root in taken:
            root = taken[root]
        home[name] = root
    blocks: dict[str | int, tuple[int, int, int]] = {}
    for name, (first, last) in spans.items():
        if name in sizes:
            a, b, _ = blocks.get(home[name], (first, last, 0))
            blocks[home[name]] = (min(a, first), max(b, last), _up(sizes[name], align))
    for t, task in enumerate(tasks):
        if task.scratch:
            blocks[t] = (t, t, _up(task.scratch, align))
    clashes: nx.Graph[str | int] = nx.Graph()
    clashes.add_nodes_from(blocks)
    keys = list(blocks)
    clashes.add_edges_from(
        (a, b)
        for i, a in enumerate(keys)
        for b in keys[:i]
        if blocks[a][0] <= blocks[b][1] and blocks[b][0] <= blocks[a][1]
    )
    by_size = sorted(keys, key=lambda k: (-blocks[k][2], blocks[k][0]))
    by_time = sorted(keys, key=lambda k: (blocks[k][0], -blocks[k][2]))
    by_span = sorted(keys, key=lambda k: (blocks[k][0] - blocks[k][1], -blocks[k][2]))
    peak, places = min(
        (_place(clashes, blocks, keys) for keys in (by_size, by_time, by_span)),
        key=lambda result: result[0],
    )
    return Plan(
        {name: places[home[name]] for name in spans if name in sizes},
        [places.get(t, 0) for t in range(len(tasks))],
        peak,
        taken,
    )


def _place(
    clashes: nx.Graph[str | int],
    blocks: Mapping[str | int, tuple[int, int, int]],
    keys: Sequence[str | int],
) -> tuple[int, dict[str | int, int]]:
    """One after the other, each at the lowest place free of its neighbours."""
    places: dict[str | int, int] = {}
    peak = 0
    for key in keys:
        size = blocks[key][2]
        at = 0
        for start, end in sorted(
            (places[n], places[n] + blocks[n][2]) for n in clashes[key] if n in places
        ):
            if at + size <= start:
                break
            at = max(at, end)
        places[key] = at
        peak = max(peak, at + size)
    return peak, places


def _up(n: int, align: int) -> int:
    return -(-n // align) * align
