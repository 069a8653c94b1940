"""Bytes that are not needed just now, in temporary files instead of memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Iterable

from qcompile.errors import BadInput

FULL_BYTES = 1 << 30
"""A file of many contents that is larger takes no more."""


class Scratch:
    """A temporary file (in TMPDIR) without a name, gone with this object; BadInput where none can be made."""

    def __init__(self) -> None:
        try:
            self._file = tempfile.TemporaryFile(prefix="qcompile-", buffering=0)
        except OSError as e:
            raise BadInput(_no_room(e)) from e
        self.size = 0
        self._lock = threading.Lock()
        weakref.finalize(self, self._file.close)

    def append(self, parts: Iterable[bytes | memoryview]) -> int:
        """Where the parts, one after the other, begin: at a page; BadInput where there is no room."""
        with self._lock:
            start = at = -(-self.size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
            try:
                for part in parts:
                    left = memoryview(part)
                    while left:
                        written = os.pwrite(self._file.fileno(), left, at)
                        left, at = left[written:], at + written
            except OSError as e:
                raise BadInput(_no_room(e)) from e
            self.size = at
        return start

    def mapped(self, start: int, size: int) -> memoryview:
        """What was appended at `start`, in memory as far as it is looked at."""
        return memoryview(
            mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_READ, offset=start)
        )

    def read(self) -> bytes:
        """All of it."""
        return bytes(self.mapped(0, self.size)) if self.size else b""


def _no_room(why: OSError) -> str:
    where = tempfile.gettempdir()
    return (
        f"there is no room for temporary files in {where}: {why}; set TMPDIR to a folder with more"
    )


def give_back() -> None:
    """From now on freed blocks of 1 MiB and more go back to the system at once, where the C library is glibc.

    Its allocator learns from what is freed to keep blocks of up to 32 MiB in a heap, which one small block holds up.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_MMAP_THRESHOLD, 1 << 20)


_MMAP_THRESHOLD = -3
"""M_MMAP_THRESHOLD of glibc's malloc.h."""

_latest: list[weakref.ref[Scratch]] = []
# a forked process would write where this one does
os.register_at_fork(after_in_child=_latest.clear)


def common() -> Scratch:
    """A file for many contents, so that these do not take a descriptor each; it lasts while one of them is held."""
    found = _latest[-1]() if _latest else None
    if found is None or found.size > FULL_BYTES:
        found = Scratch()
        _latest[:] = [weakref.ref(found)]
    return found
