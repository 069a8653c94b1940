"""Bytes that are not needed just now, in temporary files instead of memory."""

from __future__ import annotations

import ctypes
import mmap
import tempfile
import threading
import weakref
from collections.abc import Iterable

from qcompile.errors import BadInput

FULL_BYTES = 1 << 30
"""A file of many contents that is larger takes no more."""


class Scratch:
    """A temporary file (in TMPDIR) without a name, which is gone with this object."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile(prefix="qcompile-")
        self.size = 0
        self._lock = threading.Lock()
        weakref.finalize(self, self.file.close)

    def append(self, parts: Iterable[bytes | memoryview]) -> int:
        """Where the parts, one after the other, begin: at a page; BadInput where there is no room."""
        with self._lock:
            start = -(-self.size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
            try:
                self.file.seek(start)
                for part in parts:
                    self.file.write(part)
                self.file.flush()
                self.size = self.file.tell()
            except OSError as e:
                where = tempfile.gettempdir()
                raise BadInput(
                    f"there is no room for temporary files in {where}: {e}; set TMPDIR to a folder with more"
                ) from e
        return start

    def read(self) -> bytes:
        """All of it."""
        with self._lock:
            self.file.seek(0)
            return self.file.read()


def give_back() -> None:
    """From now on freed blocks of 1 MiB and more go back to the system at once, where the C library is glibc.

    Its allocator learns from what is freed to keep blocks of up to 32 MiB in a heap, which one small block holds up.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_MMAP_THRESHOLD, 1 << 20)


_MMAP_THRESHOLD = -3
"""M_MMAP_THRESHOLD of glibc's malloc.h."""

_latest: list[weakref.ref[Scratch]] = []


def common() -> Scratch:
    """A file for many contents, so that these do not take a descriptor each; it lasts while one of them is held."""
    found = _latest[-1]() if _latest else None
    if found is None or found.size > FULL_BYTES:
        found = Scratch()
        _latest[:] = [weakref.ref(found)]
    return found
