"""qdq.onnx as a program: its roundings read as the codes of the integer graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qcompile.errors import BadInput, ToolchainMissing, VerificationMismatch
from qcompile.ir import Array, Graph, TensorType
from qcompile.onnx import links
from qcompile.onnx.links import Grid
from qcompile.target import Codes, Counts, Piece, Way

from .session import Session, calls, opened


class RoundedFile:
    """The QDQ model in onnxruntime, run as it is written: optimized, onnxruntime rounds otherwise than the model says.

    What it rounds is near the integer graph's codes, layer by layer, not equal to them.
    """

    def __init__(self, file: Path, graph: Graph) -> None:
        self._file, self._graph = file, graph
        self._model = opened(file)
        try:
            self._links = links.read(self._model)
        except BadInput as e:
            raise BadInput(f"{file} is not what qcompile wrote: {e}") from e
        ports = len(self._links.inputs), len(self._links.outputs)
        if ports != (len(graph.inputs), len(graph.outputs)):
            raise BadInput(f"{file} has other inputs and outputs than the integer graph")
        kinds = {v.name: v.type for v in graph.values()}
        self._inputs = dict(zip((p.name for p, _ in graph.inputs), self._links.inputs, strict=True))
        self._outputs: dict[str, tuple[Grid, TensorType]] = {
            port.name: (grid, value.type)
            for (port, value), grid in zip(graph.outputs, self._links.outputs, strict=True)
        }
        strange = [link.value for link in self._links.layers if link.value not in kinds]
        if strange:
            raise BadInput(f"{file} names a value {strange[0]!r} that the integer graph has not")
        self._layers = {link.value: (link.grid, kinds[link.value]) for link in self._links.layers}

    @property
    def slack(self) -> Mapping[str, int]:
        """How many codes each value may be off where its layer reads the same codes."""
        return {link.value: link.slack for link in self._links.layers}

    def run(self, feeds: Codes) -> dict[str, Array]:
        """Codes in, codes out, for any number of rows."""
        return self._through(self._session, self._outputs, feeds)

    def trace(self, feeds: Codes) -> dict[str, Array]:
        """Every rounded value by name, and the outputs by port name unless a value has that name."""
        return self._through(self._tracing, {**self._outputs, **self._layers}, feeds)

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
    def _session(self) -> Session:
        return self._giving(self._outputs)

    @cached_property
    def _tracing(self) -> Session:
        return self._giving({**self._outputs, **self._layers})

    def _giving(self, wanted: Mapping[str, tuple[Grid, TensorType]]) -> Session:
        names = list(dict.fromkeys(grid.tensor for grid, _ in wanted.values()))
        return Session(self._file, self._model, names, optimized=False)

    def _through(
        self, session: Session, wanted: Mapping[str, tuple[Grid, TensorType]], feeds: Codes
    ) -> dict[str, Array]:
        """What a session makes of all rows, read as codes."""
        done = []
        for part in calls(self._graph, feeds):
            reals = {grid.tensor: grid.real(part[name]) for name, grid in self._inputs.items()}
            done.append(session.run(reals))
        return {
            name: np.concatenate(
                [self._codes(name, part[grid.tensor], grid, kind) for part in done]
            )
            for name, (grid, kind) in wanted.items()
        }

    def _codes(self, name: str, real: NDArray[np.generic], grid: Grid, kind: TensorType) -> Array:
        if real.dtype != np.float32 or real.ndim != len(kind.shape):
            raise VerificationMismatch(
                f"{self._file} gives {real.dtype} {list(real.shape)} for {name}, which is {kind}"
            )
        try:
            codes: Array = grid.codes(real.astype(np.float32)).astype(kind.dtype.numpy)
        except ValueError as e:
            raise VerificationMismatch(f"{self._file}: {e}") from e
        if codes.shape[1:] != kind.shape[1:]:
            raise VerificationMismatch(
                f"{self._file} gives codes {list(codes.shape)} for {name}, which is {kind}"
            )
        return codes
