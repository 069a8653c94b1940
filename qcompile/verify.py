"""Does an emitted program equal the integer graph? Every output on every sample, every stored intermediate on some.

What computes with floats need not equal it: there every layer is held to its bound, on every sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qcompile.border import run_graph
from qcompile.ir import Array, Graph, Value
from qcompile.target import Codes, FloatRunner, Piece, Runner, Way


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The first element that differs: in which layer, and both values."""

    layer: str
    value: str
    row: int
    index: tuple[int, ...]
    expected: int
    got: int

    def __str__(self) -> str:
        where = ", ".join(map(str, self.index))
        return (
            f"layer {self.layer}: value {self.value}[{where}] of sample {self.row} is {self.got}, "
            f"the integer graph says {self.expected}"
        )


@dataclass(frozen=True, slots=True)
class Other:
    """Another way to run what was emitted: how many samples were compared, what differed, what else was seen."""

    name: str
    samples: int
    mismatches: int
    note: str


@dataclass(frozen=True, slots=True)
class Apart:
    """How far what computes with floats is from the integer graph, in codes.

    `layers` is the most that was seen of a layer whose operands are the same on both sides, `allowed` the largest bound
    of one, `equal` the share of elements that do not differ; `outputs` is the most end to end, where there is no bound.
    """

    layers: int
    allowed: int
    equal: float
    outputs: int


@dataclass(frozen=True, slots=True)
class Verification:
    """How many samples were compared and how many elements differed; `intermediates` counts compared values.

    `others` tells the same of every other way to run it. With `apart`, elements within the bound of their layer do not
    count as mismatches.
    """

    samples: int
    mismatches: int
    first: Mismatch | None
    intermediates: int = 0
    sanitized: bool = False
    others: tuple[Other, ...] = ()
    apart: Apart | None = None

    @property
    def ok(self) -> bool:
        """Was anything compared, and did all of it agree?"""
        return (
            self.samples > 0
            and self.mismatches == 0
            and (self.apart is None or self.intermediates > 0)
            and all(o.samples > 0 and o.mismatches == 0 for o in self.others)
        )


def verify(
    graph: Graph,
    runner: Runner,
    batches: Iterable[Codes],
    *,
    trace: int = 2,
    sanitized: bool = False,
    progress: Callable[[int], None] = lambda rows: None,
) -> Verification:
    """Compare a program with the integer graph on batches of codes; `trace` rows are compared value by value.

    On a mismatch the first diverging layer is found by tracing the row in which it showed.
    """
    if isinstance(runner, FloatRunner):
        return _near(graph, runner, batches, sanitized, progress)
    samples = mismatches = intermediates = 0
    lead = graph.inputs[0][1].type.shape[0]
    first: Mismatch | None = None
    others = {way.name: Other(way.name, 0, 0, "") for way in runner.ways}
    for batch in batches:
        rows = _rows(graph, batch)
        if samples < trace:
            found, compared, worst = _trace(
                graph,
                runner,
                _cut(graph, batch, 0, min(rows, -(-(trace - samples) // lead))),
                samples,
            )
            mismatches += found
            intermediates = max(intermediates, compared)
            first = first or worst
        expected, got = run_graph(graph, batch), runner.run(batch)
        for port, value in graph.outputs:
            differs = expected[port.name] != got[port.name]
            if not differs.any():
                continue
            mismatches += int(differs.sum())
            if first is None:
                at = tuple(int(i) for i in np.argwhere(differs)[0])
                first = _locate(
                    graph, runner, batch, at[0] // value.type.shape[0], samples
                ) or _mismatch(value, at, samples, expected[port.name], got[port.name])
        for way in runner.ways:
            others[way.name], differing = _also(graph, way, batch, expected, others[way.name])
            first = first or differing
        samples += rows * lead
        progress(samples)
    return Verification(
        samples, mismatches, first, intermediates, sanitized, tuple(others.values())
    )


def _near(
    graph: Graph,
    runner: FloatRunner,
    batches: Iterable[Codes],
    sanitized: bool,
    progress: Callable[[int], None],
) -> Verification:
    """Compare layer by layer: each of the integer graph's reads the codes that the program gave its operands."""
    samples = mismatches = elements = differing = 0
    worst = end = 0
    seen: set[str] = set()
    slack = runner.slack
    lead = graph.inputs[0][1].type.shape[0]
    first: Mismatch | None = None
    for batch in batches:
        rows = _rows(graph, batch)
        expected, results = run_graph(graph, batch), runner.run(batch)
        for port, _ in graph.outputs:
            distance = _distance(expected[port.name], results[port.name])
            end = max(end, int(distance.max(initial=0)))
        for row in range(rows):
            one = _cut(graph, batch, row, row + 1)
            traced = runner.trace(one)
            # an output may be called as a value that has its axes in another order
            got = {name: traced[name] for name in slack}
            for value, array in _layers(graph, one, got):
                if value.name not in got:
                    continue
                distance = _distance(array, got[value.name])
                seen.add(value.name)
                elements += distance.size
                differing += int((distance > 0).sum())
                worst = max(worst, int(distance.max(initial=0)))
                beyond = distance > slack[value.name]
                if beyond.any():
                    mismatches += int(beyond.sum())
                    at = tuple(int(i) for i in np.argwhere(beyond)[0])
                    done = samples + row * lead
                    first = first or _mismatch(value, at, done, array, got[value.name])
        samples += rows * lead
        progress(samples)
    equal = 1 - differing / max(elements, 1)
    apart = Apart(worst, max(slack.values(), default=0), equal, end)
    return Verification(samples, mismatches, first, len(seen), sanitized, (), apart)


def _layers(graph: Graph, batch: Codes, got: Codes) -> Iterator[tuple[Value, Array]]:
    """Every node's result on one batch; where `got` has a value, it is what later nodes read."""
    env: dict[Value, Array] = {value: batch[port.name] for port, value in graph.inputs}
    last = {v: node for node in graph.nodes for v in node.inputs}
    for node in graph.nodes:
        made = node.op.run(*(env[v] if v.const is None else v.const for v in node.inputs))
        yield node.output, made
        env[node.output] = got.get(node.output.name, made)
        for v in node.inputs:
            if last[v] is node:
                env.pop(v, None)


def _distance(a: Array, b: Array) -> NDArray[np.int64]:
    return np.abs(a.astype(np.int64) - b.astype(np.int64))


def _also(
    graph: Graph, way: Way, batch: Codes, expected: Mapping[str, Array], done: Other
) -> tuple[Other, Mismatch | None]:
    """One more batch of another way, as far as its rows go."""
    lead = graph.inputs[0][1].type.shape[0]
    rows = min(_rows(graph, batch), max(way.rows - done.samples, 0) // lead)
    if not rows:
        return done, None
    got, note = way.run(_cut(graph, batch, 0, rows))
    wrong, first = 0, None
    for port, value in graph.outputs:
        wanted = expected[port.name][: rows * value.type.shape[0]]
        differs = got[port.name] != wanted
        if differs.any():
            wrong += int(differs.sum())
            at = tuple(int(i) for i in np.argwhere(differs)[0])
            first = first or _mismatch(value, at, done.samples, wanted, got[port.name])
    return replace(
        done,
        samples=done.samples + rows * lead,
        mismatches=done.mismatches + wrong,
        note=note,
    ), first


def _rows(graph: Graph, batch: Codes) -> int:
    port, value = graph.inputs[0]
    return len(batch[port.name]) // value.type.shape[0]


def _cut(graph: Graph, batch: Codes, begin: int, end: int) -> dict[str, Array]:
    """Rows begin to end of a batch."""
    return {
        port.name: batch[port.name][begin * value.type.shape[0] : end * value.type.shape[0]]
        for port, value in graph.inputs
    }


def _trace(
    graph: Graph, runner: Runner, batch: Mapping[str, Array], done: int
) -> tuple[int, int, Mismatch | None]:
    """Mismatching elements, values compared, and the first mismatch in execution order."""
    got = runner.trace(batch)
    found = compared = 0
    first: Mismatch | None = None
    rows = _rows(graph, batch)
    # a value is stored whole, in bands of its rows, or not at all
    views: dict[str, list[tuple[str, Piece | None]]] = {
        v.name: [(v.name, None)] for v in graph.values()
    }
    for name, piece in runner.pieces.items():
        views.setdefault(piece.value, []).append((name, piece))
    # an output that differs is counted where outputs are compared
    outputs = {value for _, value in graph.outputs}
    for row in range(rows):
        one = _cut(graph, batch, row, row + 1)

        def compare(value: Value, expected: Array, row: int = row) -> None:
            nonlocal found, compared, first
            lead = value.type.shape[0]
            stored = [(name, at) for name, at in views.get(value.name, ()) if name in got]
            compared += bool(stored) and row == 0
            for name, rows in stored:
                wanted = expected if rows is None else expected[:, rows.first : rows.last]
                mine = got[name][row * lead : (row + 1) * lead].reshape(wanted.shape)
                differs = mine != wanted
                if differs.any():
                    found += 0 if value in outputs else int(differs.sum())
                    at = tuple(int(i) for i in np.argwhere(differs)[0])
                    begin = 0 if rows is None else rows.first
                    first = first or _mismatch(value, at, done + row * lead, wanted, mine, begin)

        graph.run(one, on_value=compare)
    return found, compared, first


def _locate(graph: Graph, runner: Runner, batch: Codes, row: int, done: int) -> Mismatch | None:
    """The first diverging layer of one row."""
    return _trace(graph, runner, _cut(graph, batch, row, row + 1), done + row)[2]


def _mismatch(
    value: Value, at: tuple[int, ...], done: int, expected: Array, got: Array, begin: int = 0
) -> Mismatch:
    """The element at `at`; axis 1 of both arrays begins at row `begin` of the value."""
    layer = value.producer.name if value.producer is not None else value.name
    index = (at[1] + begin, *at[2:]) if begin else at[1:]
    return Mismatch(layer, value.name, done + at[0], index, int(expected[at]), int(got[at]))
