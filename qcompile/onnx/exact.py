"""Running integer.onnx in stock onnxruntime: codes in, codes out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
import onnxruntime

from qcompile.ir import Array


class ExactSession:
    """integer.onnx in onnxruntime on the CPU, all graph optimisations on, `threads` threads."""

    def __init__(self, model: Path | bytes | onnx.ModelProto, threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model
        self._session = onnxruntime.InferenceSession(
            source, options, providers=["CPUExecutionProvider"]
        )
        self._outputs = [o.name for o in self._session.get_outputs()]

    def run(self, codes: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs' codes for one batch."""
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(codes)), strict=True))
