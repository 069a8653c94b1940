"""Rows as calls of a static batch: what a built program takes and gives, in bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qcompile.errors import BadInput
from qcompile.ir import Array, Graph, TensorType
from qcompile.target import Codes

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Calls:
    """How rows become calls; the last call is filled up with zeros."""

    graph: Graph

    def pack(self, feeds: Codes) -> tuple[list[Bytes], int]:
        """Each input as [calls, bytes], and the number of rows."""
        free = self.graph.free_batch
        packed: list[Bytes] = []
        counts: set[int] = set()
        for port, value in self.graph.inputs:
            if port.name not in feeds:
                raise BadInput(f"input {port.name} is not given")
            x, kind = np.asarray(feeds[port.name]), value.type
            lead = kind.shape[0]
            whole = bool(x.shape) and (free or len(x) % lead == 0)
            if x.dtype != kind.dtype.numpy or x.shape[1:] != kind.shape[1:] or not whole:
                raise BadInput(
                    f"input {port.name} takes {kind}, not {x.dtype} of shape {list(x.shape)}"
                )
            calls = -(-len(x) // lead)
            counts.add(len(x) if free else calls)
            full = np.zeros((calls * lead, *kind.shape[1:]), kind.dtype.numpy)
            full[: len(x)] = x
            packed.append(full.reshape(calls, kind.size).view(np.uint8))
        if len(counts) != 1:
            raise BadInput(f"the inputs have different numbers of rows: {sorted(counts)}")
        return packed, counts.pop()

    def unpack(self, kind: TensorType, data: Bytes, rows: int) -> Array:
        """Read [calls, bytes] as a tensor, rows first."""
        flat = np.ascontiguousarray(data).view(kind.dtype.numpy)
        whole = flat.reshape(len(data) * kind.shape[0], *kind.shape[1:])
        return whole[:rows] if self.graph.free_batch else whole
