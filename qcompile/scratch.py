"""Bytes that are not needed just now, in a temporary file instead of memory."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterable

from qcompile.errors import BadInput


class Scratch:
    """A temporary file (in TMPDIR) without a name, which is gone with this object; BadInput where it has no room."""

    def __init__(self, content: Iterable[bytes | memoryview]) -> None:
        self.file = tempfile.TemporaryFile(prefix="qcompile-")
        weakref.finalize(self, self.file.close)
        try:
            for part in content:
                self.file.write(part)
            self.file.flush()
        except OSError as e:
            where = tempfile.gettempdir()
            raise BadInput(
                f"there is no room for temporary files in {where}: {e}; set TMPDIR to a folder with more"
            ) from e

    def read(self) -> bytes:
        """All of it."""
        self.file.seek(0)
        return self.file.read()
