"""Does an emitted program equal the integer graph? Every output on every sample, every stored intermediate on some."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from qcompile.border import run_graph
from qcompile.ir import Array, Graph, Value
from qcompile.target import Codes, Runner


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
class Verification:
    """How many samples were compared and how many elements differed; `intermediates` counts compared values."""

    samples: int
    mismatches: int
    first: Mismatch | None
    intermediates: int = 0
    sanitized: bool = False

    @property
    def ok(self) -> bool:
        """Was anything compared, and did all of it agree?"""
        return self.samples > 0 and self.mismatches == 0


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
    samples = mismatches = intermediates = 0
    lead = graph.inputs[0][1].type.shape[0]
    first: Mismatch | None = None
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
        samples += rows * lead
        progress(samples)
    return Verification(samples, mismatches, first, intermediates, sanitized)


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
    # an output that differs is counted where outputs are compared
    outputs = {value for _, value in graph.outputs}
    for row in range(rows):
        one = _cut(graph, batch, row, row + 1)

        def compare(value: Value, expected: Array, row: int = row) -> None:
            nonlocal found, compared, first
            if value.name not in got:
                return
            lead = value.type.shape[0]
            mine = got[value.name][row * lead : (row + 1) * lead].reshape(expected.shape)
            compared += row == 0
            differs = mine != expected
            if differs.any():
                found += 0 if value in outputs else int(differs.sum())
                at = tuple(int(i) for i in np.argwhere(differs)[0])
                first = first or _mismatch(value, at, done + row * lead, expected, mine)

        graph.run(one, on_value=compare)
    return found, compared, first


def _locate(graph: Graph, runner: Runner, batch: Codes, row: int, done: int) -> Mismatch | None:
    """The first diverging layer of one row."""
    return _trace(graph, runner, _cut(graph, batch, row, row + 1), done + row)[2]


def _mismatch(
    value: Value, at: tuple[int, ...], done: int, expected: Array, got: Array
) -> Mismatch:
    layer = value.producer.name if value.producer is not None else value.name
    return Mismatch(layer, value.name, done + at[0], at[1:], int(expected[at]), int(got[at]))
