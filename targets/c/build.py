"""Building and running emitted C: the files around the model, the compilers, and the built program."""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
from numpy.typing import NDArray

from qcompile.errors import BadInput, QcompileError, ToolchainMissing, VerificationMismatch
from qcompile.ir import Array, Graph, TensorType, Value
from qcompile.target import Codes

from .text import HERE, c_type, render

Bytes = NDArray[np.uint8]

C_FLAGS = ("-std=c99", "-O3")
"""How a model is compiled unless its user says otherwise; the emitted build files say the same."""

SANITIZE = (
    "-O1",
    "-g",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
)
"""Memory errors and undefined behaviour stop the program with a report. More than -O1 takes very long to compile."""

TRAP = ("-O1", "-fsanitize=undefined", "-fsanitize-trap=undefined")
"""Undefined behaviour stops the program where there is no run-time library to report it."""

GET_CC = "install a C compiler: apt-get install gcc libc6-dev, or pip install 'qcompile[toolchain]'"
GET_ZIG = "install the cross compiler: pip install 'qcompile[toolchain]'"
GET_QEMU = "install the emulator: apt-get install qemu-user"

# A compiler may be installed without its C library's headers and start-up files: Debian only recommends them.
_NO_C_LIBRARY = re.compile(rb"fatal error: (stddef|stdint|string|unistd)\.h|cannot find (-l|S?crt)")
_COMPILE_SECONDS = 900
_RUN_SECONDS = 900
_OUTPUTS_ID = 0xFFFFFFFF
_CALLS_PER_PROCESS = 64
_TRACED_CALLS_PER_PROCESS = 8
_REPORT_LINES = 12


# ------------------------------------------------------------------------------------- the files


@dataclass(frozen=True, slots=True)
class _CPort:
    """A port as the templates see it."""

    ctype: str
    macro: str
    lo: int
    hi: int


def support_files(
    graph: Graph, *, name: str, family: str, flags: Sequence[str]
) -> dict[str, bytes]:
    """Give the files around the model: build files, self-test, runner, benchmark and their host layer.

    `flags` are what the compiler needs to know of the chip; `family` selects what a build file says.
    """
    macro = name.upper()
    ports = {
        kind: [
            _CPort(c_type(v.type.dtype), f"{macro}_{kind}_{i}", v.type.dtype.lo, v.type.dtype.hi)
            for i, (_, v) in enumerate(border)
        ]
        for kind, border in (("INPUT", graph.inputs), ("OUTPUT", graph.outputs))
    }
    inputs, outputs = ports["INPUT"], ports["OUTPUT"]
    results = [f"output{i}" for i in range(len(outputs))]
    facts = {
        "name": name,
        "NAME": macro,
        "family": family,
        "flags": list(flags),
        "inputs": inputs,
        "outputs": outputs,
        "arguments": ", ".join([*(f"input{i}" for i in range(len(inputs))), *results]),
        "vector_arguments": ", ".join(
            [*(f"{name}_vector_input_{i}[v]" for i in range(len(inputs))), *results]
        ),
    }
    rendered = ("runner.c", "selftest.c", "bench.c", "Makefile", "CMakeLists.txt")
    fixed = ["host.h", "host_posix.c", *(["host_linux_aarch64.c"] if family == "arm" else [])]
    return {
        **{f: render(f"{f}.j2", HERE, **facts).encode() for f in rendered},
        **{f: (HERE / f).read_bytes() for f in fixed},
    }


# ---------------------------------------------------------------------------------- the compiler


@dataclass(frozen=True, slots=True)
class Toolchain:
    """A C compiler with the flags of one chip, and what its programs need to run here.

    `link` are flags of a whole program, `shared` of a shared library, `host` is the file that implements host.h.
    """

    command: tuple[str, ...]
    flags: tuple[str, ...]
    link: tuple[str, ...] = ()
    shared: tuple[str, ...] = ("-shared",)
    host: str = "host_posix.c"
    emulator: tuple[str, ...] = ()


def find(*commands: str) -> tuple[str, ...] | None:
    """The first of these commands that is installed."""
    return next(((path,) for c in commands if (path := shutil.which(c)) is not None), None)


def find_zig() -> tuple[str, ...] | None:
    """The C compiler of the ziglang package, where it is installed."""
    if importlib.util.find_spec("ziglang") is None:
        return None
    return (sys.executable, "-m", "ziglang", "cc")


@cache
def _workspace(process: int) -> Path:
    """A private folder of this process, removed when it ends."""
    folder = Path(mkdtemp(prefix="qcompile-"))

    def remove() -> None:
        if os.getpid() == process:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def _call(
    command: Sequence[str],
    *,
    seconds: int,
    stdin: bytes = b"",
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            timeout=seconds,
            check=False,
            env={**os.environ, "LC_ALL": "C", **(environment or {})},
        )
    except FileNotFoundError:
        raise ToolchainMissing(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise QcompileError(f"{Path(command[0]).name} was stopped after {seconds} s") from None


def _first_lines(text: bytes) -> str:
    lines = text.decode(errors="replace").strip().splitlines()
    return "\n".join(lines[:_REPORT_LINES])


@dataclass(frozen=True)
class Build:
    """An emitted folder under one compiler: every product is made once per process, from the content it has then."""

    folder: Path
    name: str
    toolchain: Toolchain
    options: tuple[str, ...] = ()

    @cached_property
    def _content(self) -> str:
        digest = hashlib.sha256()
        for path in sorted(self.folder.glob("*.[ch]")):
            data = path.read_bytes()
            digest.update(f"{path.name} {len(data)}\n".encode() + data)
        return digest.hexdigest()

    def _make(self, suffix: str, arguments: Sequence[str], inputs: Sequence[Path]) -> Path:
        command = [*self.toolchain.command, *arguments]
        key = "\n".join([*command, *(p.name for p in inputs), self._content])
        made = _workspace(os.getpid()) / (hashlib.sha256(key.encode()).hexdigest()[:32] + suffix)
        if not made.exists():
            scratch = made.with_name(f"{threading.get_ident()}-{made.name}")
            done = _call(
                [*command, *map(str, inputs), "-o", str(scratch)], seconds=_COMPILE_SECONDS
            )
            if done.returncode:
                said = f"{' '.join(self.toolchain.command)} cannot build {self.name}"
                if _NO_C_LIBRARY.search(done.stderr):
                    raise ToolchainMissing(f"{said}, because its C library is missing: {GET_CC}")
                raise QcompileError(f"{said}:\n{_first_lines(done.stderr)}")
            scratch.replace(made)
        return made

    def object(self, source: str, *options: str) -> Path:
        """The object of one source file."""
        flags = (*C_FLAGS, *self.toolchain.flags, *self.options, *options)
        return self._make(".o", (*flags, "-c"), [self.folder.resolve() / source])

    def _program(self, *options: str) -> Path:
        sources = ("model.c", "runner.c", self.toolchain.host)
        objects = [self.object(source, *options) for source in sources]
        return self._make("", (*self.options, *self.toolchain.link), objects)

    @cached_property
    def model(self) -> Path:
        """The object of the model alone, as a user's build makes it."""
        return self.object("model.c")

    @cached_property
    def program(self) -> Path:
        """The model between standard input and output."""
        return self._program()

    @cached_property
    def traced(self) -> Path:
        """The same sources, writing every stored value."""
        return self._program(f"-D{self.name.upper()}_TRACE")

    @cached_property
    def library(self) -> Path:
        """The model as a shared library; its objects must be position-independent."""
        return self._make(".so", (*self.options, *self.toolchain.shared), [self.model])

    def number(self, macro: str) -> int:
        """The value of NAME_`macro` in model.h."""
        text = (self.folder / "model.h").read_text()
        found = re.search(rf"^#define {self.name.upper()}_{macro} (\d+)u?$", text, re.MULTILINE)
        if found is None:
            raise QcompileError(f"{self.folder / 'model.h'} defines no {self.name.upper()}_{macro}")
        return int(found[1])


# -------------------------------------------------------------------------------------- running


@dataclass(frozen=True, slots=True)
class _Border:
    """How rows become calls of the static batch; the last call is filled up with zeros."""

    graph: Graph

    def pack(self, feeds: Codes) -> tuple[list[Bytes], int]:
        """Each input as [calls, bytes], and the number of rows."""
        packed: list[Bytes] = []
        counts: set[int] = set()
        for port, value in self.graph.inputs:
            if port.name not in feeds:
                raise BadInput(f"input {port.name} is not given")
            x, kind = np.asarray(feeds[port.name]), value.type
            rows = x.shape[:1] if self.graph.free_batch else kind.shape[:1]
            if x.dtype != kind.dtype.numpy or x.shape != (*rows, *kind.shape[1:]):
                raise BadInput(
                    f"input {port.name} takes {kind}, not {x.dtype} of shape {list(x.shape)}"
                )
            counts.add(len(x))
            calls = -(-len(x) // kind.shape[0])
            whole = np.zeros((calls * kind.shape[0], *kind.shape[1:]), kind.dtype.numpy)
            whole[: len(x)] = x
            packed.append(whole.reshape(calls, kind.size).view(np.uint8))
        if len(counts) != 1:
            raise BadInput(f"the inputs have different numbers of rows: {sorted(counts)}")
        return packed, counts.pop()

    def unpack(self, kind: TensorType, data: Bytes, rows: int) -> Array:
        """Read [calls, bytes] as a tensor, rows first."""
        flat = np.ascontiguousarray(data).view(kind.dtype.numpy)
        whole = flat.reshape(len(data) * kind.shape[0], *kind.shape[1:])
        return whole[:rows] if self.graph.free_batch else whole


def _cut(data: Bytes, values: Sequence[Value]) -> list[Bytes]:
    """Cut [calls, bytes of all values] into one [calls, bytes] for each."""
    ends = np.cumsum([v.type.bytes for v in values])
    return np.split(data, ends[:-1], axis=1)


class Program:
    """The emitted program as a process of its own, natively or in an emulator."""

    def __init__(self, build: Build, graph: Graph, stored: Callable[[], Mapping[str, int]]) -> None:
        self._build = build
        self._graph = graph
        self._border = _Border(graph)
        self._stored = stored
        self._prepare()

    def _prepare(self) -> None:
        """Build what `run` needs, so that a missing tool shows before the first row."""
        _ = self._build.program

    def _speak(self, program: Path, packed: Bytes) -> bytes:
        done = _call(
            [*self._build.toolchain.emulator, str(program)],
            seconds=_RUN_SECONDS,
            stdin=packed.tobytes(),
            # Leaks are looked for with ptrace, which containers forbid; the program allocates nothing.
            environment={"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
        )
        if done.returncode == 0:
            return done.stdout
        if done.returncode < 0:
            how = f"died of {signal.Signals(-done.returncode).name}"
        else:
            how = f"stopped with exit status {done.returncode}"
        where = " ".join(self._build.toolchain.emulator)
        raise VerificationMismatch(
            f"the built program {self._build.name} {how}{f' in {where}' if where else ''}:\n"
            f"{_first_lines(done.stderr)}"
        )

    def run(self, feeds: Codes) -> dict[str, Array]:
        """Codes in, codes out, for any number of rows."""
        packed, rows = self._border.pack(feeds)
        calls = np.concatenate(packed, axis=1)
        values = [v for _, v in self._graph.outputs]
        size = sum(v.type.bytes for v in values)
        parts = [np.empty((0, size), np.uint8)]
        for at in range(0, len(calls), _CALLS_PER_PROCESS):
            block = calls[at : at + _CALLS_PER_PROCESS]
            answer = self._speak(self._build.program, block)
            if len(answer) != len(block) * size:
                raise VerificationMismatch(
                    f"the built program {self._build.name} wrote {len(answer)} bytes instead of {len(block) * size}"
                )
            parts.append(np.frombuffer(answer, np.uint8).reshape(len(block), size))
        return self._outputs(_cut(np.concatenate(parts), values), rows)

    def _outputs(self, data: Sequence[Bytes], rows: int) -> dict[str, Array]:
        return {
            port.name: self._border.unpack(value.type, part, rows)
            for (port, value), part in zip(self._graph.outputs, data, strict=True)
        }

    def trace(self, feeds: Codes) -> dict[str, Array]:
        """Every stored value by name, and the outputs by port name unless a stored value has that name."""
        packed, rows = self._border.pack(feeds)
        calls = np.concatenate(packed, axis=1)
        stored = self._stored()
        by_id = {stored[v.name]: v for v in self._graph.values() if v.name in stored}
        outputs = [v for _, v in self._graph.outputs]
        sizes = {i: v.type.bytes for i, v in by_id.items()}
        sizes[_OUTPUTS_ID] = sum(v.type.bytes for v in outputs)
        frames: dict[int, list[Bytes]] = {
            i: [np.empty((0, size), np.uint8)] for i, size in sizes.items()
        }
        for at in range(0, len(calls), _TRACED_CALLS_PER_PROCESS):
            block = calls[at : at + _TRACED_CALLS_PER_PROCESS]
            answer = self._speak(self._build.traced, block)
            for i, payload in _frames(self._build.name, answer, sizes, len(block)):
                frames[i].append(np.frombuffer(payload, np.uint8).reshape(1, -1))
        joined = {i: np.concatenate(parts) for i, parts in frames.items()}
        ports = self._outputs(_cut(joined.pop(_OUTPUTS_ID), outputs), rows)
        values = {
            by_id[i].name: self._border.unpack(by_id[i].type, d, rows) for i, d in joined.items()
        }
        return {**ports, **values}


def _frames(
    name: str, answer: bytes, sizes: Mapping[int, int], calls: int
) -> list[tuple[int, bytes]]:
    """Cut a trace into frames; every value must come once for every call."""
    frames: list[tuple[int, bytes]] = []
    at = 0
    while at + 8 <= len(answer):
        i, size = struct.unpack_from("<II", answer, at)
        if sizes.get(i) != size:
            raise VerificationMismatch(
                f"the trace of {name} has {size} bytes for value {i}, which takes {sizes.get(i, 'none')}"
            )
        frames.append((i, answer[at + 8 : at + 8 + size]))
        at += 8 + size
    seen = sorted(i for i, _ in frames)
    if at != len(answer) or seen != sorted([*sizes] * calls):
        raise VerificationMismatch(
            f"the trace of {name} does not hold every stored value once: {len(frames)} frames "
            f"instead of {len(sizes) * calls}"
        )
    return frames


class Library(Program):
    """The emitted program inside this process; only a trace runs as a process of its own."""

    def _prepare(self) -> None:
        library = ctypes.CDLL(str(self._build.library))
        self._entry = library[f"{self._build.name}_run"]
        self._entry.restype = ctypes.c_int

    def run(self, feeds: Codes) -> dict[str, Array]:
        """Codes in, codes out, for any number of rows."""
        packed, rows = self._border.pack(feeds)
        calls = len(packed[0])
        results = [np.empty((calls, v.type.bytes), np.uint8) for _, v in self._graph.outputs]
        align = self._build.number("ARENA_ALIGN")
        # A kernel that reads what nobody wrote meets these bytes, not lucky zeros.
        memory = np.full(self._build.number("ARENA_BYTES") + align, 0xA5, np.uint8)
        arena = ctypes.c_void_p(memory.ctypes.data + -memory.ctypes.data % align)
        arrays = [*packed, *results]
        starts = [a.ctypes.data for a in arrays]
        steps = [a.shape[1] for a in arrays]
        for call in range(calls):
            places = (ctypes.c_void_p(a + call * s) for a, s in zip(starts, steps, strict=True))
            if (status := self._entry(*places, arena)) != 0:
                raise VerificationMismatch(f"{self._build.name}_run returned {status}")
        return self._outputs(results, rows)
