"""Large constants as a file that an assembler takes as it is: compilers take minutes and gigabytes for initialisers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from qcompile.errors import BadInput
from qcompile.ir import Array, Graph

from .text import array_type, render

BINARY = "weights.bin"
"""The constants, little-endian."""

SOURCE = "weights.S"
"""Puts BINARY into the program, under the names that weights.h declares."""

DIGEST = "weights.sha256"
"""The SHA-256 of BINARY, as sha256sum writes and checks it."""

_ALL_BYTES, _EACH_BYTES = 1 << 20, 1 << 16
_LINE = 64
"""Bytes of a cache line, on which every array begins."""


def threshold(graph: Graph) -> int | None:
    """The bytes from which on an array goes to BINARY; None where so few are constant that C holds them all."""
    return _EACH_BYTES if sum(v.type.bytes for v in graph.constants()) > _ALL_BYTES else None


class Binary:
    """Named arrays one after the other; `rows` say what and where each is."""

    def __init__(self, arrays: Sequence[tuple[str, Array]]) -> None:
        self.rows: list[Mapping[str, str | int]] = []
        parts: list[bytes | memoryview] = []
        at = 0
        for name, data in arrays:
            little = np.ascontiguousarray(data, data.dtype.newbyteorder("<"))
            raw = little.reshape(-1).view(np.uint8).data
            self.rows.append(
                {
                    "name": name,
                    "type": array_type(data),
                    "size": data.size,
                    "at": at,
                    "bytes": len(raw),
                }
            )
            parts += [raw, bytes(-len(raw) % _LINE)]
            at += len(raw) + len(parts[-1])
        self._content = b"".join(parts)

    def files(self, name: str, section: str | None) -> dict[str, bytes]:
        """The binary, its digest and the assembler file; nothing where there are no arrays."""
        if not self.rows:
            return {}
        digest = hashlib.sha256(self._content).hexdigest()
        source = render(
            "weights.S.j2",
            name=name,
            weights_section=section,
            align=_LINE,
            arrays=self.rows,
            digest=digest,
        )
        return {
            BINARY: self._content,
            SOURCE: source.encode(),
            DIGEST: f"{digest}  {BINARY}\n".encode(),
        }


def check(folder: Path) -> None:
    """Raise BadInput where a folder's BINARY is not the one its DIGEST tells of."""
    try:
        said = (folder / DIGEST).read_text().split()
        with (folder / BINARY).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"{folder} is not what qcompile wrote: {e}") from e
    if said != [found, BINARY]:
        raise BadInput(
            f"{folder / BINARY} is damaged or another network's: its SHA-256 is {found}, "
            f"and {DIGEST} says {' '.join(said[:1])[:64]}"
        )
