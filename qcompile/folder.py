"""The output folder: made beside its place, moved there when all is done, so that nothing half done is ever seen."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from qcompile.errors import BadInput
from qcompile.manifest import MANIFEST_FILE
from qcompile.scratch import Scratch

LARGE_BYTES = 32 << 20
"""Smaller contents are held in memory."""


class Contents(Mapping[str, bytes]):
    """Contents of files by relative path; large ones are in temporary files until they are asked for."""

    def __init__(self, contents: Mapping[str, bytes]) -> None:
        self._held = {name: _put_away(contents[name]) for name in contents}

    def __or__(self, other: Contents) -> Contents:
        """Both; the other's where a path is in both."""
        both = Contents({})
        both._held = self._held | other._held
        return both

    def put(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """Add a file whose content comes in parts."""
        put_away = self._held[name] = Scratch()
        put_away.append(parts)

    def __getitem__(self, name: str) -> bytes:
        content = self._held[name]
        return content if isinstance(content, bytes) else content.read()

    def __contains__(self, name: object) -> bool:
        return name in self._held

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


def _put_away(content: bytes) -> bytes | Scratch:
    if len(content) < LARGE_BYTES:
        return content
    put_away = Scratch()
    put_away.append([content])
    return put_away


def check(place: Path, force: bool) -> None:
    """Raise BadInput unless `place` may be written: it is empty, or qcompile made it and `force` says so."""
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        above = next(p for p in place.absolute().parents if p.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise BadInput(f"cannot write {place}: {above} is no folder that can be written to")
        return
    if not force:
        raise BadInput(
            f"the output folder {place} is not empty; choose another with -o or overwrite it with --force"
        )
    if not (place / MANIFEST_FILE).is_file():
        raise BadInput(f"{place} was not made by qcompile; --force overwrites only its own folders")


@contextlib.contextmanager
def staged(place: Path) -> Iterator[Path]:
    """A folder beside `place` that is gone afterwards unless it was moved."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    except OSError as e:
        raise BadInput(f"cannot write beside {place}: {e}") from e
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Put files, by relative path, into a folder."""
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[name])


def copy(file: Path, folder: Path) -> Path:
    """A copy of a file in another folder; BadInput where there is none."""
    try:
        return Path(shutil.copy(file, folder))
    except OSError as e:
        raise BadInput(f"cannot read {file}: {e.strerror}") from e


def publish(folder: Path, place: Path) -> None:
    """Put a finished folder in its place; what was there goes only then."""
    try:
        if place.exists():
            old = folder.with_name(f"{folder.name}.old")
            os.replace(place, old)
            os.replace(folder, place)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(folder, place)
    except OSError as e:
        raise BadInput(f"cannot write {place}: {e}") from e
