"""Arrays in .npy and .npz files, read in rows: memory stays flat and nothing is ever unpickled."""

from __future__ import annotations

import io
import math
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
    """One array of a file; only its header has been read."""

    path: Path
    member: str | None
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    fortran: bool

    @property
    def nbytes(self) -> int:
        """The size of the array in memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    def whole(self) -> NDArray[np.generic]:
        """The array in one piece; `BadInput` above `WHOLE_BYTES`."""
        if self.nbytes > WHOLE_BYTES:
            raise BadInput(f"{self} is too large to be read in one piece ({self.nbytes} bytes)")
        with _reading(str(self)), _opened(self.path, self.member) as file:
            _header(file)
            flat = self._take(file, math.prod(self.shape))
        return flat.reshape(self.shape[::-1]).T if self.fortran else flat.reshape(self.shape)

    def blocks(self, rows: int) -> Iterator[NDArray[np.generic]]:
        """The array in pieces of at most `rows` rows of its leading axis."""
        if self.fortran and len(self.shape) > 1:
            array = self.whole()
            for start in range(0, len(array), rows):
                yield np.ascontiguousarray(array[start : start + rows])
            return
        with _reading(str(self)), _opened(self.path, self.member) as file:
            _header(file)
            for start in range(0, self.shape[0], rows):
                shape = (min(rows, self.shape[0] - start), *self.shape[1:])
                yield self._take(file, math.prod(shape)).reshape(shape)

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
        return f"{str(self.path)!r}" + ("" if self.member is None else f", array {self.member!r},")


def open_arrays(path: Path) -> dict[str, ArrayFile]:
    """The arrays of a .npz file by name, or the one of a .npy file under the name ''."""
    with _reading(repr(str(path))):
        if path.suffix == ".npy":
            with path.open("rb") as file:
                return {"": _describe(path, None, file)}
        arrays = {}
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                large = info.file_size > BOMB_BYTES
                if large and info.file_size > BOMB_RATIO * max(info.compress_size, 1):
                    raise BadInput(
                        f"{str(path)!r}: array {name!r} says it unpacks from {info.compress_size} "
                        f"to {info.file_size} bytes; that is refused, save it uncompressed"
                    )
                with archive.open(info) as member:
                    array = _describe(path, name, member)
                if array.nbytes > info.file_size:
                    raise BadInput(f"{array} is truncated: its header promises {array.nbytes} bytes")
                arrays[name] = array
        return arrays


def _describe(path: Path, name: str | None, file: IO[bytes]) -> ArrayFile:
    shape, fortran, dtype = _header(file)
    array = ArrayFile(path, name, shape, dtype, fortran)
    if dtype.hasobject:
        raise BadInput(f"{array} holds pickled Python objects, which are never loaded; save numbers")
    if dtype.kind not in "biuf":
        raise BadInput(f"{array} has dtype {dtype}; integers, floats and booleans are read")
    return array


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    version = np.lib.format.read_magic(file)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"format version {version} is not one of plain arrays")
    shape, fortran, dtype = read(file)
    if any(n < 0 for n in shape):
        raise ValueError("its shape is negative")
    return tuple(int(n) for n in shape), bool(fortran), dtype


@contextmanager
def _opened(path: Path, member: str | None) -> Iterator[IO[bytes]]:
    if member is None:
        with path.open("rb") as file:
            yield file
        return
    with zipfile.ZipFile(path) as archive:
        inside = member if member in archive.namelist() else f"{member}.npy"
        with archive.open(inside) as raw:
            yield io.BufferedReader(raw)  # type: ignore[type-var]


@contextmanager
def _reading(what: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as e:
        raise BadInput(f"{what} does not exist") from e
    except (
        EOFError,
        KeyError,
        NotImplementedError,
        OSError,
        RuntimeError,
        ValueError,
        zipfile.BadZipFile,
        zlib.error,
    ) as e:
        raise BadInput(f"{what} cannot be read: {e}") from e
