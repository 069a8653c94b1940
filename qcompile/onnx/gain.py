"""How much the first layer of a network can amplify an input."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

_MOVES = ("Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Pad")
"""Operators that move values and leave them as they are."""


def gain(value: ir.Value) -> float | None:
    """The largest norm of a row of weights that an input meets first; None where it meets anything but weights."""
    norms: list[float] = []
    for node, position in _readers(value):
        weight = node.inputs[1] if node.op_type in ("Conv", "Gemm", "MatMul") else None
        tensor = None if weight is None or position != 0 else weight.const_value
        if tensor is None or len(tensor.shape) < 2:
            return None
        rows = _rows(node, np.asarray(tensor.numpy(), np.float64))
        norms.append(float(np.sqrt(np.square(rows).sum(axis=1).max(initial=0.0))))
    return max(norms, default=None)


def _rows(node: ir.Node, weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """The weights with a row for each output."""
    turned = node.attributes.get("transB")
    if node.op_type == "Conv" or (turned is not None and turned.as_int()):
        return weight.reshape(len(weight), -1)
    return np.moveaxis(weight, -2, -1).reshape(-1, weight.shape[-2])


def _readers(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Who reads a value, whatever moves it before."""
    waiting = [value]
    while waiting:
        for node, position in waiting.pop().uses():
            if node.op_type in _MOVES and position == 0:
                waiting.append(node.outputs[0])
            else:
                yield node, position
