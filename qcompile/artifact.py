"""An output folder as an object: run it, compare it, read its report."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qcompile import border
from qcompile.errors import BadInput
from qcompile.ir import Array, Graph, text
from qcompile.manifest import MANIFEST_FILE
from qcompile.target import Codes, FloatCertificate, Runner, Target, get
from qcompile.verify import Verification, verify

GRAPH_FILE, CONSTANTS_FILE, REPORT_FILE = "integer.qir", "integer.npz", "report.json"
ROWS = 64
"""Rows that go through a program or the interpreter at a time."""


class Golden:
    """The integer graph, which every program must equal."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def run(
        self, feeds: Mapping[str, NDArray[np.generic]], raw: bool = False
    ) -> dict[str, NDArray[np.generic]]:
        """Real numbers in, real numbers (float64) out, any number of rows; `raw` returns the codes."""
        codes = border.encode(self.graph, feeds)
        return _join(
            self.graph,
            (border.run_graph(self.graph, part) for part in _parts(self.graph, codes)),
            raw,
        )


class Artifact:
    """A compiled program in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._manifest = _read_json(folder / MANIFEST_FILE)
        self._graph: Graph | None = None
        self._runners: dict[bool, Runner] = {}

    def __repr__(self) -> str:
        return f"Artifact({str(self.folder)!r})"

    @property
    def report(self) -> dict[str, object]:
        """The contents of report.json."""
        return _read_json(self.folder / REPORT_FILE)

    @property
    def manifest(self) -> dict[str, object]:
        """The contents of manifest.json."""
        return self._manifest

    @property
    def name(self) -> str:
        """The prefix of everything in the emitted C."""
        return str(self._manifest["name"])

    @property
    def cpu(self) -> str:
        """What the program was emitted for."""
        return str(self._manifest["cpu"])

    @property
    def target(self) -> Target:
        """The family it was emitted for."""
        return get(str(self._manifest["target"]))

    @property
    def graph(self) -> Graph:
        """The integer graph the program must equal."""
        if self._graph is None:
            self._graph = read_graph(self.folder)
        return self._graph

    @property
    def golden(self) -> Golden:
        """The integer graph as something to run."""
        return Golden(self.graph)

    def runner(self, sanitize: bool = False) -> Runner:
        """The built program, with sanitizers on request; ToolchainMissing says what building or running it needs."""
        if sanitize not in self._runners:
            self._runners[sanitize] = self.target.runner(
                self.folder, self.graph, name=self.name, cpu=self.cpu, sanitize=sanitize
            )
        return self._runners[sanitize]

    def run(
        self, feeds: Mapping[str, NDArray[np.generic]], raw: bool = False
    ) -> dict[str, NDArray[np.generic]]:
        """Quantize, run the emitted program natively or in its emulator, dequantize; `raw` returns the codes."""
        codes = border.encode(self.graph, feeds)
        runner = self.runner()
        return _join(self.graph, (runner.run(part) for part in _parts(self.graph, codes)), raw)

    def verify(
        self,
        samples: Iterable[Mapping[str, NDArray[np.generic]]] | Mapping[str, NDArray[np.generic]],
        *,
        sanitize: bool = False,
        trace: int = 2,
    ) -> Verification:
        """Compare the program with the integer graph on every row of `samples`; value by value on `trace` of them."""
        given = [samples] if isinstance(samples, Mapping) else samples
        batches = (
            part for feeds in given for part in _parts(self.graph, border.encode(self.graph, feeds))
        )
        return verify(self.graph, self.runner(sanitize), batches, trace=trace, sanitized=sanitize)

    def certify(self) -> FloatCertificate | None:
        """Disassemble the built objects and look for floating point."""
        return self.target.certify(self.folder, name=self.name, cpu=self.cpu)


def load(folder: str | os.PathLike[str]) -> Artifact:
    """Open an output folder; BadInput if it is none."""
    path = Path(folder)
    if not (path / MANIFEST_FILE).is_file():
        raise BadInput(f"{path} is no qcompile output folder: it has no {MANIFEST_FILE}")
    return Artifact(path)


def write_graph(graph: Graph) -> dict[str, bytes]:
    """The integer graph as files; the same bytes for the same graph."""
    import io

    buffer = io.BytesIO()
    np.savez(buffer, **text.constants(graph))  # type: ignore[arg-type]
    return {GRAPH_FILE: text.dump(graph).encode(), CONSTANTS_FILE: buffer.getvalue()}


def read_graph(folder: Path) -> Graph:
    """The integer graph of an output folder; BadInput if its files are damaged."""
    try:
        with (
            (folder / CONSTANTS_FILE).open("rb") as file,
            np.load(file, allow_pickle=False) as table,
        ):
            constants: dict[str, Array] = {key: table[key] for key in table.files}
        content = (folder / GRAPH_FILE).read_text()
    except Exception as e:
        raise BadInput(f"cannot read the integer graph in {folder}: {e}") from e
    for key, array in constants.items():
        if text.digest(array) != key:
            raise BadInput(
                f"{folder / CONSTANTS_FILE} is damaged: a constant does not match its digest"
            )
    return text.parse(content, constants)


def _read_json(path: Path) -> dict[str, object]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise BadInput(f"cannot read {path}: {e}") from e
    if not isinstance(data, dict):
        raise BadInput(f"{path} holds no JSON object")
    return data


def _parts(graph: Graph, codes: Codes) -> Iterator[dict[str, Array]]:
    """The rows of a batch, a bounded number at a time."""
    step = {port.name: value.type.shape[0] for port, value in graph.inputs}
    rows = min(len(codes[name]) // n for name, n in step.items())
    for at in range(0, rows, ROWS):
        yield {name: codes[name][at * n : (at + ROWS) * n] for name, n in step.items()}


def _join(
    graph: Graph, parts: Iterable[Mapping[str, Array]], raw: bool
) -> dict[str, NDArray[np.generic]]:
    done = list(parts)
    codes = {port.name: np.concatenate([p[port.name] for p in done]) for port, _ in graph.outputs}
    return dict(codes) if raw else dict(border.decode(graph, codes))
