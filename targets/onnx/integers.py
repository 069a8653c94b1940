"""integer.onnx as a program: codes in, codes out, every value of the graph on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from qcompile.errors import BadInput, ToolchainMissing, VerificationMismatch
from qcompile.ir import Array, Graph, Value
from qcompile.target import Codes, Counts, Piece, Way

from .session import Session, calls, opened


class IntegerFile:
    """The integer graph's file in onnxruntime; every element equals the graph's."""

    def __init__(self, file: Path, graph: Graph, *, optimized: bool) -> None:
        self._file, self._graph, self._optimized = file, graph, optimized
        self._model = opened(file)
        self._outputs = {port.name: (port.name, value) for port, value in graph.outputs}
        self._session = Session(
            file, self._model, [name for name, _ in self._outputs.values()], optimized=optimized
        )

    def run(self, feeds: Codes) -> dict[str, Array]:
        """Codes in, codes out, for any number of rows."""
        return self._through(self._session, self._outputs, feeds)

    def trace(self, feeds: Codes) -> dict[str, Array]:
        """Every value of the graph by name, and the outputs by port name unless a value has that name."""
        return self._through(self._tracing, {**self._outputs, **self._values}, feeds)

    def count(self, feeds: Codes) -> Counts:
        """ToolchainMissing: onnxruntime counts nothing."""
        raise ToolchainMissing("onnxruntime runs the file natively and counts no instructions")

    @property
    def pieces(self) -> Mapping[str, Piece]:
        """None: values are whole."""
        return {}

    @property
    def ways(self) -> Sequence[Way]:
        """None: the file is what ships."""
        return ()

    @cached_property
    def _values(self) -> dict[str, tuple[str, Value]]:
        """The tensor of every node's value: the file has one node for each, in the same order."""
        nodes = self._model.graph.node
        if len(nodes) < len(self._graph.nodes):
            raise BadInput(f"{self._file} has fewer operators than its integer graph")
        return {
            mine.output.name: (theirs.output[0], mine.output)
            for mine, theirs in zip(self._graph.nodes, nodes, strict=False)
        }

    @cached_property
    def _tracing(self) -> Session:
        wanted = {**self._outputs, **self._values}
        names = list(dict.fromkeys(name for name, _ in wanted.values()))
        return Session(self._file, self._model, names, optimized=self._optimized)

    def _through(
        self, session: Session, wanted: Mapping[str, tuple[str, Value]], feeds: Codes
    ) -> dict[str, Array]:
        """What a session makes of all rows, each result of its value's type."""
        done = [session.run(part) for part in calls(self._graph, feeds)]
        results: dict[str, Array] = {}
        for name, (tensor, value) in wanted.items():
            parts = [np.asarray(part[tensor]) for part in done]
            kind = value.type
            for got in parts:
                if got.dtype != kind.dtype.numpy or got.shape[1:] != kind.shape[1:]:
                    raise VerificationMismatch(
                        f"{self._file} gives {got.dtype} {list(got.shape)} for {name}, which is {kind}"
                    )
            results[name] = np.concatenate(parts)
        return results
