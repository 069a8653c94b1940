"""Samples of one input in files: how many there are, and those that are asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from qcompile.errors import BadInput
from qcompile.npz import WHOLE_BYTES, ArrayFile

Block = NDArray[np.generic]


class Rows(Protocol):
    """Samples of one input; only what is asked for is read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of all samples together, their number first."""
        ...

    @property
    def counts(self) -> list[int]:
        """The number of samples in each file."""
        ...

    @property
    def row_bytes(self) -> int:
        """How much one sample takes."""
        ...

    def blocks(self, chosen: NDArray[np.int64], step: int) -> Iterator[Block]:
        """The samples of these ascending numbers, `step` at a time."""
        ...


@dataclass(frozen=True)
class ArrayRows:
    """The rows of an array in a file, or the array as one row."""

    array: ArrayFile
    single: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array, as one row where it is one."""
        return (1, *self.array.shape) if self.single else self.array.shape

    @property
    def counts(self) -> list[int]:
        """The number of rows."""
        return [self.shape[0]]

    @property
    def row_bytes(self) -> int:
        """The size of one row."""
        return math.prod(self.shape[1:]) * self.array.dtype.itemsize

    def blocks(self, chosen: NDArray[np.int64], step: int) -> Iterator[Block]:
        """The chosen rows."""
        if self.single:
            return iter([self.array.whole()[np.newaxis]] if len(chosen) else [])
        return self.array.blocks(chosen, step)


def raw_rows(path: Path, dtype: str, shape: tuple[int, ...]) -> ArrayRows:
    """A file of nothing but little-endian numbers, one sample after the other."""
    kind = np.dtype(dtype).newbyteorder("<")
    size, row = path.stat().st_size, math.prod(shape) * kind.itemsize
    if not size or size % row:
        raise BadInput(
            f"{str(path)!r} has {size} bytes, and a sample of {dtype}[{', '.join(map(str, shape))}] has {row}; "
            "a .toml description may state another dtype and shape"
        )
    return ArrayRows(ArrayFile(path, None, (size // row, *shape), kind, header=False))


@dataclass(frozen=True)
class TensorRows:
    """An ONNX TensorProto in a file."""

    path: Path
    rank: int

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor, as one row where it has no batch axis."""
        return self._read().shape

    @property
    def counts(self) -> list[int]:
        """The number of rows."""
        return [self.shape[0]]

    @property
    def row_bytes(self) -> int:
        """At most the size of one sample."""
        return math.prod(self.shape[1:]) * 8

    def blocks(self, chosen: NDArray[np.int64], step: int) -> Iterator[Block]:
        """The chosen rows."""
        rows = self._read()
        return (rows[chosen[at : at + step]] for at in range(0, len(chosen), step))

    def _read(self) -> Block:
        where = repr(str(self.path))
        try:
            if self.path.stat().st_size > WHOLE_BYTES:
                raise BadInput(f"{where} has more than {WHOLE_BYTES} bytes, too many for a sample")
            tensor = onnx.TensorProto.FromString(self.path.read_bytes())
            if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.HasField("segment"):
                raise BadInput(f"{where} keeps its values in another file, which is not read")
            if tensor.data_type == onnx.TensorProto.UNDEFINED:
                raise BadInput(f"{where} is no TensorProto; sequences and maps are not read")
            array = numpy_helper.to_array(tensor)
        except BadInput:
            raise
        except Exception as e:
            # protobuf's implementations and numpy raise different things for the same damage
            raise BadInput(f"{where} is no tensor: {e}") from e
        if array.dtype.kind not in "biuf":
            raise BadInput(f"{where} has dtype {array.dtype}; numbers are read")
        if array.ndim not in (self.rank, self.rank - 1):
            raise BadInput(f"{where} has shape {array.shape}; the input has {self.rank} axes")
        return array[np.newaxis] if array.ndim == self.rank - 1 else array


class JoinedRows:
    """The rows of several files, one file after the other."""

    def __init__(self, parts: Sequence[Rows], paths: Sequence[Path]) -> None:
        for part, path in zip(parts, paths, strict=True):
            if part.shape[1:] != parts[0].shape[1:]:
                raise BadInput(
                    f"{str(path)!r} holds samples of shape {part.shape[1:]}, and {str(paths[0])!r} of "
                    f"{parts[0].shape[1:]}: all have to be alike"
                )
        self._parts = parts
        self.counts = [n for part in parts for n in part.counts]
        self._starts = np.cumsum([0, *(part.shape[0] for part in parts)])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of all parts joined."""
        return (int(self._starts[-1]), *self._parts[0].shape[1:])

    @property
    def row_bytes(self) -> int:
        """The size of the largest row."""
        return max(part.row_bytes for part in self._parts)

    def blocks(self, chosen: NDArray[np.int64], step: int) -> Iterator[Block]:
        """The chosen rows."""
        cuts = np.searchsorted(chosen, self._starts)
        pieces = (
            piece
            for part, start, a, b in zip(self._parts, self._starts, cuts, cuts[1:], strict=False)
            if a < b
            for piece in part.blocks(chosen[a:b] - start, step)
        )
        return _regrouped(pieces, step)


def _regrouped(pieces: Iterator[Block], step: int) -> Iterator[Block]:
    """The same rows, `step` in each block but the last."""
    held: list[Block] = []
    count = 0
    for piece in pieces:
        while len(piece):
            taken = piece[: step - count]
            held.append(taken)
            count += len(taken)
            piece = piece[len(taken) :]
            if count == step:
                yield held[0] if len(held) == 1 else np.concatenate(held)
                held, count = [], 0
    if held:
        yield np.concatenate(held)
