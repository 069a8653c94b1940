"""Arrays in .npy and .npz files, read in rows: memory stays flat and nothing is ever unpickled."""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from qcompile.errors import BadInput

# A compressed array may declare 4 GiB, or more if it is no more than 100 times its size in the file:
# above both it is a decompression bomb rather than data.
BOMB_BYTES = 1 << 32
BOMB_RATIO = 100
# What is read in one piece (labels, indices, Fortran-ordered arrays) may be this large.
WHOLE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class ArrayFile:
    """One array of a file; only its header, where it has one, has been read."""

    path: Path
    member: str | None
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    fortran: bool = False
    header: bool = True

    @property
    def nbytes(self) -> int:
        """The size of the array in memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    def whole(self) -> NDArray[np.generic]:
        """The array in one piece; `BadInput` above `WHOLE_BYTES`."""
        if self.nbytes > WHOLE_BYTES:
            raise BadInput(f"{self} is too large to be read in one piece ({self.nbytes} bytes)")
        with _reading(str(self)), _opened(self.path, self.member) as file:
            self._begin(file)
            flat = self._take(file, math.prod(self.shape))
        return flat.reshape(self.shape[::-1]).T if self.fortran else flat.reshape(self.shape)

    def blocks(self, chosen: NDArray[np.int64], step: int) -> Iterator[NDArray[np.generic]]:
        """The rows of these ascending numbers, `step` at a time; what lies between them is skipped."""
        groups = (chosen[start : start + step] for start in range(0, len(chosen), step))
        if self.fortran and len(self.shape) > 1:
            array = self.whole()
            yield from (np.ascontiguousarray(array[group]) for group in groups)
            return
        row = math.prod(self.shape[1:])
        with _reading(str(self)), _opened(self.path, self.member) as file:
            origin, at = self._begin(file), 0
            for group in groups:
                pieces = []
                for run in np.split(group, np.flatnonzero(np.diff(group) != 1) + 1):
                    if run[0] != at:
                        file.seek(origin + int(run[0]) * row * self.dtype.itemsize)
                    pieces.append(self._take(file, len(run) * row))
                    at = int(run[-1]) + 1
                flat = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
                yield flat.reshape(len(group), *self.shape[1:])

    def _begin(self, file: IO[bytes]) -> int:
        """Where the first row lies."""
        if self.header:
            _header(file)
        return file.tell()

    def _take(self, file: IO[bytes], count: int) -> NDArray[np.generic]:
        wanted = count * self.dtype.itemsize
        data = bytearray()
        while len(data) < wanted:
            piece = file.read(wanted - len(data))
            if not piece:
                raise BadInput(f"{self} is truncated: its header promises {self.nbytes} bytes")
            data += piece
        return np.frombuffer(data, self.dtype)

    def __str__(self) -> str:
        inside = "" if self.member is None else f", array {_name(self.member)!r},"
        return f"{str(self.path)!r}{inside}"


def open_arrays(path: Path) -> dict[str, ArrayFile]:
    """The arrays of a .npz file by name, or the one of a .npy file under the name ''."""
    if not path.is_file():
        raise BadInput(f"{str(path)!r} does not exist or is not a file")
    with _reading(repr(str(path))):
        if path.suffix == ".npy":
            with path.open("rb") as file:
                array = _describe(path, None, file)
            if array.nbytes > path.stat().st_size:
                raise BadInput(f"{array} is truncated: its header promises {array.nbytes} bytes")
            return {"": array}
        arrays = {}
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.filename.endswith(".npy"):
                    continue
                large = info.file_size > BOMB_BYTES
                if large and info.file_size > BOMB_RATIO * max(info.compress_size, 1):
                    raise BadInput(
                        f"{str(path)!r}: {_name(info.filename)!r} unpacks from "
                        f"{info.compress_size} to {info.file_size} bytes; save it uncompressed"
                    )
                with archive.open(info) as member:
                    array = _describe(path, info.filename, member)
                if array.nbytes > info.file_size:
                    raise BadInput(
                        f"{array} is truncated: its header promises {array.nbytes} bytes"
                    )
                arrays[_name(info.filename)] = array
        return arrays


def _name(member: str) -> str:
    return member.removesuffix(".npy")


def _describe(path: Path, member: str | None, file: IO[bytes]) -> ArrayFile:
    shape, fortran, dtype = _header(file)
    array = ArrayFile(path, member, shape, dtype, fortran)
    if dtype.hasobject:
        raise BadInput(
            f"{array} holds pickled Python objects, which are never loaded; save numbers"
        )
    if dtype.kind not in "biuf":
        raise BadInput(f"{array} has dtype {dtype}; integers, floats and booleans are read")
    return array


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    # Later versions exist for headers above 64 KiB, which no array of plain numbers has.
    if (version := np.lib.format.read_magic(file)) != (1, 0):
        raise ValueError(f"arrays of plain numbers have format version (1, 0), not {version}")
    try:
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception as e:
        # numpy reads a header as Python source, and what is wrong with one is whatever its parsers raise
        raise ValueError(f"its header is damaged: {e}") from e
    if any(n < 0 for n in shape):
        raise ValueError("its shape is negative")
    return tuple(int(n) for n in shape), bool(fortran), dtype


@contextmanager
def _opened(path: Path, member: str | None) -> Iterator[IO[bytes]]:
    if member is None:
        with path.open("rb") as file:
            yield file
    else:
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            yield file


@contextmanager
def _reading(what: str) -> Iterator[None]:
    try:
        yield
    except (
        EOFError,
        KeyError,
        # Python's parser raises it, and RecursionError, where a header nests too deep
        MemoryError,
        NotImplementedError,
        OSError,
        OverflowError,
        RuntimeError,
        SyntaxError,
        ValueError,
        tokenize.TokenError,
        zipfile.BadZipFile,
        zlib.error,
    ) as e:
        raise BadInput(f"{what} cannot be read: {e}") from e
