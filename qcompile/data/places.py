"""Where the files of a data set are, in which order, and what they hold."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qcompile.data import images
from qcompile.data.description import Description, did_you_mean
from qcompile.errors import BadInput

LIST = ".txt"
LIST_BYTES = 1 << 26
MOST_FILES = 1 << 20
"""A folder or a list with more files is a mistake."""
_TENSOR = re.compile(r"input_(\d{1,4})\.pb")


class Kind(Enum):
    """What files hold."""

    ARRAYS = "arrays"
    IMAGES = "images"
    AUDIO = "audio"
    TABLES = "tables"
    RAW = "raw numbers"
    TENSORS = "ONNX tensors"


_SUFFIXES = {
    **dict.fromkeys((".npy", ".npz"), Kind.ARRAYS),
    **dict.fromkeys(images.SUFFIXES, Kind.IMAGES),
    ".wav": Kind.AUDIO,
    **dict.fromkeys((".csv", ".tsv"), Kind.TABLES),
    **dict.fromkeys((".raw", ".bin"), Kind.RAW),
    ".pb": Kind.TENSORS,
}


@dataclass(frozen=True, slots=True)
class Place:
    """The files that feed an input, in order; `many` if there are other ones for other inputs, or arrays by name."""

    source: Path
    kind: Kind
    paths: tuple[Path, ...]
    many: bool

    def __str__(self) -> str:
        return repr(str(self.source))

    def classes(self) -> NDArray[np.int64]:
        """The number of the folder that each file lies in, in the order of their names."""
        names = [p.parent.name for p in self.paths]
        order = sorted(set(names))
        return np.array([order.index(n) for n in names], np.int64)


def find(source: Path, description: Description, names: Sequence[str], position: int) -> Place:
    """The files of the input at a position among those that the source feeds."""
    many = False
    if os.path.isdir(source):
        paths = _folder(source)
        for path in paths:
            if path.is_symlink():
                description.contained(repr(str(source)), path.parent, path.name)
        if not paths:
            raise BadInput(f"the folder {str(source)!r} holds no {', '.join(_SUFFIXES)} file")
        if all(p.suffix == ".pb" for p in paths):
            return Place(source, Kind.TENSORS, _tensors(source, paths, names, position), True)
    elif source.suffix == LIST:
        many = len(names) > 1
        paths = list(_listed(source, description, names, position))
    else:
        paths = [source]
    kinds = sorted({kind.value for kind in map(_kind, paths)})
    if len(kinds) > 1:
        raise BadInput(f"{str(source)!r} holds {' and '.join(kinds)}: give one kind at a time")
    for path in paths:
        if not os.path.isfile(path):
            raise BadInput(f"{str(path)!r} does not exist or is not a file")
    kind = _kind(paths[0])
    return Place(source, kind, tuple(paths), many or kind is Kind.ARRAYS)


def numbers(path: Path) -> NDArray[np.int64]:
    """A text file with a whole number in each line."""
    try:
        return np.array([int(line) for line in _lines(path)], np.int64)
    except (ValueError, OverflowError) as e:
        raise BadInput(f"{str(path)!r} does not hold a whole number in each line: {e}") from e


def _kind(path: Path) -> Kind:
    kind = _SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise BadInput(
            f"{str(path)!r}: data come as {', '.join(_SUFFIXES)}, a .txt list of them, a .toml description or "
            f"a folder, not {path.suffix or 'this'}"
        )
    return kind


def _folder(folder: Path) -> list[Path]:
    """The data files of a folder and the folders in it, by name; what is hidden and linked folders are left out."""
    found: list[tuple[tuple[str, ...], Path]] = []
    try:
        for at, inside, files in os.walk(folder, onerror=_raise):
            inside[:] = [name for name in inside if not name.startswith(".")]
            for name in files:
                path = Path(at) / name
                if name.startswith(".") or path.suffix.lower() not in _SUFFIXES:
                    continue
                found.append((path.relative_to(folder).parts, path))
                if len(found) > MOST_FILES:
                    raise BadInput(
                        f"the folder {str(folder)!r} holds more than {MOST_FILES:,} files"
                    )
    except OSError as e:
        raise BadInput(f"the folder {str(folder)!r} cannot be read: {e}") from e
    return [path for _, path in sorted(found)]


def _raise(error: OSError) -> None:
    raise error


def _tensors(
    folder: Path, paths: Sequence[Path], names: Sequence[str], position: int
) -> tuple[Path, ...]:
    """In every folder of a set the file of the input at a position; sets in the order of their numbers."""
    sets = {p.parent for p in paths if _TENSOR.fullmatch(p.name)}
    if not sets:
        raise BadInput(f"the folder {str(folder)!r} holds .pb files, but no input_0.pb")
    ordered = sorted(sets, key=lambda s: [_natural(part) for part in s.relative_to(folder).parts])
    for one in ordered:
        found = {int(m[1]) for p in paths if p.parent == one and (m := _TENSOR.fullmatch(p.name))}
        if found != set(range(len(names))):
            raise BadInput(
                f"{str(one)!r} holds tensors for inputs {', '.join(map(str, sorted(found)))}, and the model has "
                f"{len(names)}: {', '.join(map(repr, names))}"
            )
    return tuple(one / f"input_{position}.pb" for one in ordered)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(t), "") if t.isdecimal() else (-1, t) for t in re.split(r"([0-9]{1,18})", name)]


def _listed(
    path: Path, description: Description, names: Sequence[str], position: int
) -> Iterator[Path]:
    """The paths of a list that are for one input: one in each line, one for each input, or NAME:=PATH."""
    folder = description.root or path.resolve().parent
    empty = True
    for number, line in enumerate(_lines(path)):
        where = f"{str(path)!r}, entry {number + 1}"
        words = [line] if len(names) == 1 and ":=" not in line else line.split()
        named = dict(word.split(":=", 1) for word in words if ":=" in word)
        for name in named:
            if name not in names:
                raise BadInput(
                    f"{where}: the model has no input {name!r}{did_you_mean(name, names)}"
                )
        if len(words) != len(names) or len(named) not in (0, len(names)):
            raise BadInput(
                f"{where} has {len(words)} paths, and there are {len(names)} inputs: "
                f"{', '.join(map(repr, names))}"
            )
        text = named[names[position]] if named else words[position]
        yield description.contained(where, folder, text)
        empty = False
    if empty:
        raise BadInput(f"the list {str(path)!r} is empty: it names a file in each line")


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file, empty ones and comments left out."""
    try:
        if not os.path.isfile(path):
            raise BadInput(f"{str(path)!r} does not exist or is not a file")
        if path.stat().st_size > LIST_BYTES:
            raise BadInput(f"{str(path)!r} has more than {LIST_BYTES} bytes, which no list has")
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"{str(path)!r} cannot be read: {e}") from e
    for number, line in enumerate(lines):
        if number >= MOST_FILES:
            raise BadInput(f"{str(path)!r} has more than {MOST_FILES:,} lines")
        if line.strip() and not line.startswith(("#", "%")):
            yield line.strip()
