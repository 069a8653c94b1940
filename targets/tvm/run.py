"""Running an emitted package: as TVM's virtual machine runs it, and as its objects do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from qcompile.calls import Calls
from qcompile.errors import ToolchainMissing
from qcompile.ir import Array, Graph, TensorType
from qcompile.target import Codes, Counts, Piece, Way

from .objects import Objects, compiler
from .process import Service

_ROWS = 64
"""How many rows of a verification go through the objects."""


class Module:
    """The Relax module built by TVM, rows in, rows out."""

    def __init__(self, folder: Path, graph: Graph, name: str) -> None:
        self._folder, self._graph, self._name = folder, graph, name

    @cached_property
    def _service(self) -> Service:
        return Service(self._folder, self._name)

    @property
    def pieces(self) -> Mapping[str, Piece]:
        """None: values are whole."""
        return {}

    @property
    def ways(self) -> Sequence[Way]:
        """The objects, where something here links them."""
        cc = compiler()
        if cc is None:
            return ()
        made = Objects(self._folder, self._name)
        return (Way("the objects", _ROWS, lambda feeds: (made.run(cc, self._graph, feeds), "")),)

    def run(self, feeds: Codes) -> dict[str, Array]:
        """Codes in, codes out, for any number of rows."""
        outputs = [(port.name, v.type) for port, v in self._graph.outputs]
        return dict(self._asked("run", feeds, outputs))

    def trace(self, feeds: Codes) -> dict[str, Array]:
        """Every operator's result by name, and the outputs by port name unless a result has that name."""
        values = [(node.output.name, node.output.type) for node in self._graph.nodes]
        outputs = [(port.name, v.type) for port, v in self._graph.outputs]
        return dict(self._asked("trace", feeds, [*outputs, *values]))

    def count(self, feeds: Codes) -> Counts:
        """Refused: the code runs natively, where nothing counts."""
        raise ToolchainMissing("tvm runs natively, where nothing counts instructions")

    def _asked(
        self, kind: str, feeds: Codes, results: Sequence[tuple[str, TensorType]]
    ) -> list[tuple[str, Array]]:
        calls = Calls(self._graph)
        parts, rows = calls.pack(feeds)
        packed = np.concatenate(parts, axis=1)
        sizes = [t.bytes for _, t in results]
        answer = self._service.ask(kind, len(packed), packed.tobytes(), sum(sizes))
        data = np.frombuffer(answer, np.uint8).reshape(len(packed), sum(sizes))
        cut = np.split(data, np.cumsum(sizes)[:-1], axis=1)
        return [
            (name, calls.unpack(t, part, rows))
            for (name, t), part in zip(results, cut, strict=True)
        ]
