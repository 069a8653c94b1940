"""A streaming accelerator: units in order, and the ports through which images come and go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qcompile.ir import Array, DType

from .requantize import Words
from .units import Op, Stream


@dataclass(frozen=True, eq=False)
class Port:
    """An input or output of the graph and its stream: one row has `shape`, row-major.

    Element i of an input stream is element order[i] of the row; element i of an output row is element order[i] of the
    stream. None: as they stand. `layout` says it in words for whoever writes the host's side.
    """

    name: str
    stream: Stream
    dtype: DType
    shape: tuple[int, ...]
    order: NDArray[np.int64] | None
    layout: str

    def send(self, row: Array) -> Words:
        """The words of one row of an input."""
        flat = row.reshape(-1).astype(np.int64)
        return (flat if self.order is None else flat[self.order]).reshape(-1, self.stream.lanes)

    def receive(self, words: Words) -> Array:
        """The row that an output's words are."""
        flat = words.reshape(-1)
        ordered = flat if self.order is None else flat[self.order]
        return ordered.reshape(self.shape).astype(self.dtype.numpy)


@dataclass(frozen=True, eq=False)
class Pipeline:
    """Units in an order in which every stream is written before it is read; it has one writer and one reader."""

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    ops: tuple[Op, ...]

    def __post_init__(self) -> None:
        open_ = {p.stream.name: p.stream for p in self.inputs}
        made = set(open_)
        for op in self.ops:
            for s in op.inputs:
                if s.name not in open_ or not open_.pop(s.name).carries(s):
                    raise ValueError(f"{op.name} reads {s.name}, which is not there for it")
            for s in op.outputs:
                if s.name in made:
                    raise ValueError(f"{s.name} is written twice")
                made.add(s.name)
                open_[s.name] = s
        for p in self.outputs:
            if p.stream.name not in open_ or not open_.pop(p.stream.name).carries(p.stream):
                raise ValueError(f"output {p.name} reads {p.stream.name}, which is not there")
        if open_:
            raise ValueError(f"nobody reads {', '.join(open_)}")

    @property
    def streams(self) -> dict[str, Stream]:
        """Every stream by name, as its writer sees it."""
        made = [p.stream for p in self.inputs] + [s for op in self.ops for s in op.outputs]
        return {s.name: s for s in made}

    @property
    def fifos(self) -> dict[str, Stream]:
        """The streams between two units: those that are FIFOs."""
        ends = {p.stream.name for p in (*self.inputs, *self.outputs)}
        return {n: s for n, s in self.streams.items() if n not in ends}

    @property
    def folding(self) -> dict[str, tuple[int, int]]:
        """(pe, simd) of every layer that has them."""
        return {op.layer: op.fold for op in self.ops if op.fold is not None}

    def with_depths(self, depths: Mapping[str, int]) -> Pipeline:
        """The same pipeline with other FIFO depths, by stream name."""

        def deep(streams: tuple[Stream, ...]) -> tuple[Stream, ...]:
            return tuple(replace(s, depth=depths.get(s.name, s.depth)) for s in streams)

        def port(p: Port) -> Port:
            return replace(p, stream=deep((p.stream,))[0])

        return replace(
            self,
            inputs=tuple(map(port, self.inputs)),
            outputs=tuple(map(port, self.outputs)),
            ops=tuple(replace(o, inputs=deep(o.inputs), outputs=deep(o.outputs)) for o in self.ops),
        )

    def trace(self, row: Mapping[str, Array]) -> dict[str, Words]:
        """The words [words, lanes] of every stream for one image: one row, without the batch axis, of every input."""
        env: dict[str, Words] = {}

        def put(s: Stream, words: Words) -> None:
            if words.shape != (s.words, s.lanes):
                raise ValueError(f"{s.name} has {s.words} words of {s.lanes}, not {words.shape}")
            if int(words.min()) < s.lo or int(words.max()) > s.hi:
                raise OverflowError(f"{s.name}: an element leaves {s.bits} bits")
            env[s.name] = words

        for p in self.inputs:
            put(p.stream, p.send(row[p.name]))
        for op in self.ops:
            words = op.run(*(env[s.name] for s in op.inputs))
            for s in op.outputs:
                put(s, words)
        return env

    def run(self, codes: Mapping[str, Array]) -> dict[str, Array]:
        """The graph's outputs for any number of rows, image after image."""
        rows = [
            self.trace({p.name: codes[p.name][i] for p in self.inputs})
            for i in range(len(codes[self.inputs[0].name]))
        ]
        return {
            p.name: np.stack([p.receive(env[p.stream.name]) for env in rows]) for p in self.outputs
        }

    def values(self, row: Mapping[str, Array]) -> dict[str, Words]:
        """Every value of the graph that a stream carries, by name: the flat elements of one image in stream order."""
        env = self.trace(row)
        return {s.value: env[n].reshape(-1) for n, s in self.streams.items() if s.value is not None}
