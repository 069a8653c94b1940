"""Running the float model in onnxruntime, with any of its values as results."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from qcompile.errors import BadInput
from qcompile.onnx import weights
from qcompile.onnx.pieces import Piece, pieces

Results = dict[str, NDArray[np.float32]]

# Results kept at a time: the memory of a run does not grow with the rows it is given.
CHUNK_BYTES = 32 << 20


class FloatSession:
    """The float model in onnxruntime, on the CPU, giving the named values (inputs too) for batches of any size.

    One sequential session with all graph optimisations and deterministic kernels; `threads` inside an
    operator, by default one for each core this process may use.
    """

    def __init__(self, model: ir.Model, tensors: Sequence[str], threads: int | None = None) -> None:
        fed = {value.name: value for value in model.graph.inputs}
        self.tensors = tuple(tensors)
        self._computed = [name for name in tensors if name not in fed]
        leading = {_leading(value) for value in fed.values()} - {None}
        values = _values(model.graph)
        for name in self._computed:
            if name not in values:
                raise BadInput(f"the model has no value {name!r}")
        # Rows go through together only where every value keeps them apart on its leading axis.
        self._apart = {n for n in self._computed if _leading(values[n]) not in leading}
        self._fixed = next((n for n in leading if isinstance(n, int)), None)
        self._threads = threads
        self._inputs = [str(value.name) for value in model.graph.inputs]
        self._pieces = pieces(model, self._computed)
        # one piece stays open; of several, one at a time is
        self._session = self._opened(self._pieces[0]) if len(self._pieces) == 1 else None
        self._rows = self._fixed or 1

    def run(self, batch: Mapping[str, NDArray[np.generic]]) -> Results:
        """The values for all rows, each with the rows on its leading axis."""
        chunks = list(self.stream(batch))
        return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in self.tensors}

    def stream(self, batch: Mapping[str, NDArray[np.generic]]) -> Iterator[Results]:
        """The values for a few rows at a time, in order."""
        rows = len(batch[self._inputs[0]])
        start = 0
        while start < rows:
            end = min(start + self._rows, rows)
            piece = {name: np.ascontiguousarray(batch[name][start:end]) for name in self._inputs}
            results = self._run(piece, end - start)
            yield results
            start = end
            if not self._apart and self._fixed is None:
                row_bytes = sum(a.nbytes // max(len(a), 1) for a in results.values())
                self._rows = max(1, CHUNK_BYTES // max(row_bytes, 1))

    def _run(self, piece: dict[str, NDArray[np.generic]], rows: int) -> Results:
        fed = piece
        if self._fixed is not None and rows < self._fixed:
            missing = self._fixed - rows
            fed = {k: np.concatenate([a, a[-1:].repeat(missing, 0)]) for k, a in piece.items()}
        results = {**piece, **(self._through(fed) if self._computed else {})}
        return {
            name: np.asarray(
                results[name][np.newaxis] if name in self._apart else results[name][:rows],
                np.float32,
            )
            for name in self.tensors
        }

    def _through(self, fed: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """The computed values, piece after piece; what nobody needs any more is let go."""
        known = dict(fed)
        for i, piece in enumerate(self._pieces):
            fed = {n: known[n] for n in piece.inputs}
            # nothing holds a piece's session when the next one's is opened
            known |= (self._session or self._opened(piece)).run(fed)
            later = {n for p in self._pieces[i + 1 :] for n in p.inputs} | set(self._computed)
            known = {n: a for n, a in known.items() if n in later}
        return known

    def _opened(self, piece: Piece) -> _Session:
        return _Session(piece, self._threads, alone=len(self._pieces) == 1)


_SCALED = ("QuantizeLinear", "DequantizeLinear")


class _Session:
    """A piece in onnxruntime; large float32 weights are handed over where they lie, without a copy."""

    def __init__(self, piece: Piece, threads: int | None, alone: bool) -> None:
        proto = onnx.ModelProto()
        proto.CopyFrom(piece.proto)
        # scales are folded away, and onnxruntime then misses what it was to share
        read = {n for node in proto.graph.node if node.op_type not in _SCALED for n in node.input}
        self._shared: dict[str, onnxruntime.OrtValue] = {}
        for tensor in proto.graph.initializer:
            large = piece.large.get(tensor.name)
            if large is None:
                continue
            if large.dtype is ir.DataType.FLOAT and tensor.name in read:
                array = np.ascontiguousarray(large.numpy())
                self._shared[tensor.name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
            else:
                tensor.CopyFrom(weights.written(tensor.name, large))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.use_deterministic_compute = True
        options.log_severity_level = 3
        options.add_external_initializers(list(self._shared), list(self._shared.values()))
        if not alone:
            # packed weights are a second copy, and a session that is opened for a few rows never earns it
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.enable_cpu_mem_arena = False
        try:
            self._session = onnxruntime.InferenceSession(
                proto.SerializeToString(),
                options,
                providers=["CPUExecutionProvider"],
                # between Quantize and Dequantize it leaves a Quantize whose types do not fit
                disabled_optimizers=["MatMulAddFusion"],
            )
        except Exception as e:
            # onnxruntime's exceptions share no class of their own.
            raise BadInput(f"onnxruntime does not accept the float model: {e}") from e
        self._outputs = list(piece.outputs)

    def run(self, fed: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """The values that the piece gives."""
        try:
            given = self._session.run(self._outputs, dict(fed))
        except Exception as e:
            # onnxruntime's exceptions share no class of their own.
            raise BadInput(f"the float model does not run in onnxruntime: {e}") from e
        return dict(zip(self._outputs, given, strict=True))


def _leading(value: ir.Value) -> int | str | None:
    if value.shape is None or not len(value.shape):
        return None
    first = value.shape[0]
    return first if isinstance(first, int) else first.value


def _values(graph: ir.Graph) -> dict[str, ir.Value]:
    produced = [output for node in graph for output in node.outputs]
    return {v.name: v for v in (*graph.initializers.values(), *produced) if v.name}
