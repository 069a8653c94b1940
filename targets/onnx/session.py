"""One ONNX file in onnxruntime, with any of its tensors as results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from qcompile.errors import BadInput
from qcompile.ir import Array, Graph
from qcompile.onnx.reader import read
from qcompile.target import Codes

Tensors = dict[str, NDArray[np.generic]]

ROWS = 8
"""Rows that go through together, where the file takes any number: memory does not grow with what is asked for."""


class Session:
    """A file on the CPU, one thread, giving the named tensors.

    The file is not trusted: it is read as a stranger's model is, and onnxruntime gets bytes, not a path from which to
    follow others.
    """

    def __init__(
        self, file: Path, model: onnx.ModelProto, tensors: Sequence[str], *, optimized: bool
    ) -> None:
        self._file = file
        self._tensors = list(tensors)
        shown = onnx.ModelProto()
        shown.CopyFrom(model)
        given = {v.name for v in shown.graph.output}
        for name in dict.fromkeys(tensors):
            if name not in given:
                shown.graph.output.add(name=name)
        levels = onnxruntime.GraphOptimizationLevel
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        options.graph_optimization_level = (
            levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
        )
        try:
            self._session = onnxruntime.InferenceSession(
                shown.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as e:
            # onnxruntime's exceptions share no class of their own.
            raise BadInput(f"onnxruntime does not take {file}: {e}") from e

    def run(self, feeds: Mapping[str, NDArray[np.generic]]) -> Tensors:
        """The tensors for one batch."""
        try:
            results = self._session.run(self._tensors, dict(feeds))
        except Exception as e:
            raise BadInput(f"{self._file} does not run in onnxruntime: {e}") from e
        return dict(zip(self._tensors, results, strict=True))


def opened(file: Path) -> onnx.ModelProto:
    """The model in a file of an output folder."""
    if not file.is_file():
        raise BadInput(f"{file} is missing: the folder is not what qcompile wrote")
    return read(file)


def calls(graph: Graph, feeds: Codes) -> list[dict[str, Array]]:
    """The rows of a batch, in pieces that a file of this graph takes."""
    pieces = []
    step = {port.name: value.type.shape[0] for port, value in graph.inputs}
    together = ROWS if graph.free_batch else 1
    count = max(-(-len(feeds[name]) // n) for name, n in step.items())
    for at in range(0, count, together):
        end = at + together
        pieces.append({name: feeds[name][at * n : end * n] for name, n in step.items()})
    return pieces
