"""The C simulation of an emitted folder: built once per process, codes in, codes out, every stream on request."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from qcompile.errors import QcompileError, ToolchainMissing, VerificationMismatch
from qcompile.ir import Array
from qcompile.targets.c.build import call, find, first_lines, workspace

from .pipeline import Pipeline
from .requantize import Words
from .units import Stream

GET_CXX = "install a C++ compiler: apt-get install g++"
_SECONDS = 900
_LANGUAGE = ("-std=c++14", "-O2")


@dataclass(frozen=True)
class CSim:
    """The folder hls/ of a pipeline under g++; `headers` is another folder that has ap_int.h and hls_stream.h."""

    folder: Path
    pipeline: Pipeline
    name: str
    headers: Path | None = None
    options: tuple[str, ...] = ()

    @cached_property
    def program(self) -> Path:
        """Images between standard input and output."""
        return self._built()

    @cached_property
    def traced(self) -> Path:
        """The same, writing every stream before the outputs."""
        return self._built("-DQC_TRACE_STREAMS")

    def run(self, codes: Mapping[str, Array]) -> dict[str, Array]:
        """The graph's outputs for any number of rows."""
        outputs = [p.stream for p in self.pipeline.outputs]
        images = self._speak(self.program, codes, outputs)
        return {
            p.name: np.stack([p.receive(words[i]) for words in images])
            for i, p in enumerate(self.pipeline.outputs)
        }

    def trace(self, row: Mapping[str, Array]) -> dict[str, Words]:
        """The words of every stream for one image, as Pipeline.trace gives them."""
        made = [s for op in self.pipeline.ops for s in op.outputs]
        outputs = [p.stream for p in self.pipeline.outputs]
        codes = {name: x[None] for name, x in row.items()}
        (words,) = self._speak(self.traced, codes, [*made, *outputs])
        sent = {p.stream.name: p.send(row[p.name]) for p in self.pipeline.inputs}
        return sent | dict(zip([s.name for s in made], words, strict=False))

    def _speak(
        self, program: Path, codes: Mapping[str, Array], streams: list[Stream]
    ) -> list[list[Words]]:
        """For every image the words of the streams that the program writes."""
        ports = self.pipeline.inputs
        count = len(codes[ports[0].name])
        sent = b"".join(
            _bytes(p.stream, p.send(codes[p.name][i])) for i in range(count) for p in ports
        )
        done = call(
            [str(program)],
            seconds=_SECONDS,
            stdin=sent,
            environment={"ASAN_OPTIONS": "detect_leaks=0"},
        )
        if done.returncode:
            raise VerificationMismatch(
                f"the C simulation of {self.name} stopped with status {done.returncode}:\n"
                f"{first_lines(done.stderr)}"
            )
        sizes = [s.words * _size(s) for s in streams]
        if len(done.stdout) != count * sum(sizes):
            raise VerificationMismatch(
                f"the C simulation of {self.name} wrote {len(done.stdout)} bytes instead of {count * sum(sizes)}"
            )
        data = np.frombuffer(done.stdout, np.uint8).reshape(count, sum(sizes))
        cuts = np.cumsum(sizes)[:-1]
        return [
            [_words(s, part) for s, part in zip(streams, np.split(row, cuts), strict=True)]
            for row in data
        ]

    def _built(self, *options: str) -> Path:
        compiler = find("g++", "c++", "clang++")
        if compiler is None:
            raise ToolchainMissing(GET_CXX)
        headers = self.headers or self.folder / "shim"
        flags = (*_LANGUAGE, *self.options, *options)
        digest = hashlib.sha256("\n".join([*compiler, *flags, self.name]).encode())
        for path in sorted(
            [*self.folder.rglob("*.h"), *self.folder.rglob("*.cpp"), *headers.glob("*.h")]
        ):
            data = path.read_bytes()
            digest.update(f"{path.name} {len(data)}\n".encode() + data)
        made = workspace() / f"{digest.hexdigest()[:32]}-csim"
        if not made.exists():
            scratch = made.with_name(f"{threading.get_ident()}-{made.name}")
            sources = [
                self.folder / f"{self.name}_run.cpp",
                self.folder / f"firmware/{self.name}.cpp",
            ]
            done = call(
                [*compiler, *flags, f"-I{headers}", *map(str, sources), "-o", str(scratch)],
                seconds=_SECONDS,
            )
            if done.returncode:
                raise QcompileError(
                    f"{compiler[0]} cannot build {self.name}:\n{first_lines(done.stderr)}"
                )
            scratch.replace(made)
        return made


def _size(s: Stream) -> int:
    return -(-s.word_bits // 8)


def _bytes(s: Stream, words: Words) -> bytes:
    return b"".join(w.to_bytes(_size(s), "little") for w in s.pack(words))


def _words(s: Stream, data: Array) -> Words:
    packed = [int.from_bytes(row.tobytes(), "little") for row in data.reshape(s.words, _size(s))]
    return s.unpack(packed)
