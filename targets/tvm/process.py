"""TVM in a process of its own, because what it cannot build may take the process down."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from typing import IO

from qcompile.errors import BadInput, VerificationMismatch

from ..c.build import first_lines
from .emit import package_name

SECONDS = 3600
"""How long building a network and running one request may take."""
_END_SECONDS = 60
_LAST_LINES = 12


def command(name: str, *arguments: str) -> list[str]:
    """A command of an emitted package; nothing is written beside it, and no other folder stands in for its own."""
    return [sys.executable, "-B", "-P", "-m", package_name(name), *arguments]


def environment(folder: Path) -> dict[str, str]:
    """What that command has to see, the package being in `folder`."""
    known = os.environ.get("PYTHONPATH")
    places = [str(folder.resolve()), *([known] if known else [])]
    return {"PYTHONPATH": os.pathsep.join(places), "TVM_NUM_THREADS": "1"}


def last_lines(said: bytes) -> str:
    """The end of what a process said, where a traceback tells what went wrong."""
    return first_lines(b"\n".join(said.strip().splitlines()[-_LAST_LINES:]))


class Service:
    """The package of a folder answering requests, in a process that ends with this object."""

    def __init__(self, folder: Path, name: str) -> None:
        package = package_name(name)
        if not (folder / package / "network.py").is_file():
            raise BadInput(f"{folder} has no package {package}: it is not what qcompile wrote")
        self._name = name
        self._said: IO[bytes] = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            command(name, "serve"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env={**os.environ, **environment(folder)},
        )
        weakref.finalize(self, _stop, self._process, self._said)

    def ask(self, kind: str, calls: int, data: bytes, size: int) -> bytes:
        """The bytes that so many calls give, `size` each; VerificationMismatch where the process ends instead."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        watch = threading.Timer(SECONDS, self._process.kill)
        watch.start()
        try:
            stdin.write(f"{kind} {calls}\n".encode() + data)
            stdin.flush()
            answer = stdout.read(calls * size)
        except BrokenPipeError:
            answer = b""
        finally:
            watch.cancel()
        if len(answer) < calls * size:
            raise VerificationMismatch(self._died())
        return answer

    def _died(self) -> str:
        status = self._process.wait(_END_SECONDS)
        how = f"died of {signal.Signals(-status).name}" if status < 0 else f"stopped with {status}"
        self._said.seek(0)
        return f"TVM's build of {self._name} {how}:\n{last_lines(self._said.read())}"


def _stop(process: subprocess.Popen[bytes], said: IO[bytes]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()
    said.close()
