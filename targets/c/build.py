"""Building emitted C: the files around the model, and what a compiler makes of them."""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from tempfile import mkdtemp
from types import MappingProxyType

from qcompile.errors import BadInput, QcompileError, ToolchainMissing
from qcompile.ir import Graph

from . import binary
from .text import HERE, c_type, render

C_FLAGS = ("-std=c99", "-O3")
"""How a model is compiled unless its user says otherwise; the emitted build files say the same."""

SHARED_FILES = (
    "runner.c.j2",
    "selftest.c.j2",
    "bench.c.j2",
    "profile.c.j2",
    "Makefile.j2",
    "CMakeLists.txt.j2",
    "host.h",
    "host_posix.c",
)
"""What stands around a model on a system with POSIX input and output."""

BARE = (HERE / "host_bare.h",)
"""What the host file of a program without a C library includes."""

BARE_LINUX = (*BARE, HERE / "host_linux.h")
"""The same on Linux."""

SANITIZE = (
    "-O0",
    "-g",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
)
"""Memory errors and undefined behaviour stop the program with a report; optimising this takes ten times as long."""

TRAP = ("-O1", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")
"""Undefined behaviour stops the program where there is no run-time library to report it."""

GET_CC = "install a C compiler: apt-get install gcc libc6-dev, or pip install 'qcompile[toolchain]'"
GET_ZIG = "install the cross compiler: pip install 'qcompile[toolchain]'"
GET_QEMU = "install the emulator: apt-get install qemu-user"

# A compiler may be installed without its C library's headers and start-up files: Debian only recommends them.
_NO_C_LIBRARY = re.compile(rb"fatal error: (stddef|stdint|string|unistd)\.h|cannot find (-l|S?crt)")
_COMPILE_SECONDS = 900
_REPORT_LINES = 12


@dataclass(frozen=True, slots=True)
class Choice:
    """A program among others, in the folder of its `isa`, as the build files see it."""

    isa: str
    flags: Sequence[str]
    binary: bool
    peak: bool


@dataclass(frozen=True, slots=True)
class _CPort:
    """A port as the templates see it."""

    ctype: str
    macro: str
    lo: int
    hi: int


def support_files(
    graph: Graph,
    *,
    name: str,
    family: str,
    flags: Sequence[str],
    own: Sequence[Path] = (),
    without: Sequence[str] = (),
    facts: Mapping[str, object] = MappingProxyType({}),
    model: Collection[str] = (),
    choices: Sequence[Choice] = (),
) -> dict[str, bytes]:
    """Give the files around the model: build files, self-test, runner, benchmark and their host layer.

    `flags` are what the compiler needs to know of the chip; `family` selects what a build file says. Files and
    templates of the family's `own`, which may ask for more `facts`, come in addition to the shared ones, or in
    place of one of the same name; those named in `without` are left out. `model` names the files of the model itself,
    which may choose among `choices`.
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
    known = {
        "name": name,
        "NAME": macro,
        "family": family,
        "flags": list(flags),
        "binary": binary.BINARY in model,
        "peak": any(file.stem == "peak.c" for file in own),
        "choices": choices,
        "inputs": inputs,
        "outputs": outputs,
        "arguments": ", ".join([*(f"input{i}" for i in range(len(inputs))), *results]),
        "vector_arguments": ", ".join(
            [*(f"{name}_vector_input_{i}[v]" for i in range(len(inputs))), *results]
        ),
    }
    shared = [HERE / f for f in SHARED_FILES]
    return {
        name: data
        for file in (*shared, *own)
        for name, data in [_rendered(file, {**known, **facts})]
        if name not in without
    }


def _rendered(file: Path, facts: Mapping[str, object]) -> tuple[str, bytes]:
    """The name and content of a file, a template without its suffix."""
    if file.suffix != ".j2":
        return file.name, file.read_bytes()
    return file.stem, render(file.name, file.parent, **facts).encode()


@dataclass(frozen=True, slots=True)
class Toolchain:
    """A C compiler with the flags of one chip, and what its programs need to run here.

    `link` are flags of a whole program, `shared` of a shared library, `host` is the file that implements host.h,
    `language` the flags that are not about the chip.
    """

    command: tuple[str, ...]
    flags: tuple[str, ...]
    link: tuple[str, ...] = ()
    shared: tuple[str, ...] = ("-shared",)
    host: str = "host_posix.c"
    language: tuple[str, ...] = C_FLAGS
    emulator: tuple[str, ...] = ()

    @property
    def compiler(self) -> str:
        """Which compiler it is, its version, and how it is told to optimise."""
        if "ziglang" in self.command:
            name = f"zig {metadata.version('ziglang')}"
        else:
            name = (
                call([self.command[0], "--version"], seconds=60).stdout.decode().partition("\n")[0]
            )
        return f"{name} {next((f for f in self.language if f.startswith('-O')), '')}".rstrip()


def find(*commands: str) -> tuple[str, ...] | None:
    """The first of these commands that is installed."""
    return next(((path,) for c in commands if (path := shutil.which(c)) is not None), None)


def find_zig() -> tuple[str, ...] | None:
    """The C compiler of the ziglang package, where it is installed."""
    if importlib.util.find_spec("ziglang") is None:
        return None
    return (sys.executable, "-m", "ziglang", "cc")


def workspace() -> Path:
    """A private folder of this process, removed when it ends."""
    return _workspace(os.getpid())


@cache
def _workspace(process: int) -> Path:
    folder = Path(mkdtemp(prefix="qcompile-"))

    def remove() -> None:
        if os.getpid() == process:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def call(
    command: Sequence[str],
    *,
    seconds: int,
    stdin: bytes = b"",
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end; an error where it is not installed or does not end in time."""
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


def first_lines(text: bytes) -> str:
    """What a tool said, cut to what fits an error message."""
    lines = text.decode(errors="replace").strip().splitlines()
    return "\n".join(lines[:_REPORT_LINES])


@dataclass(frozen=True)
class Build:
    """An emitted folder under one compiler: every product is made once per process, from the content it has then.

    A model that chooses among others has those as `choices`, each in a folder of its own with flags of its own.
    """

    folder: Path
    name: str
    toolchain: Toolchain
    options: tuple[str, ...] = ()
    choices: tuple[Build, ...] = ()

    @cached_property
    def _content(self) -> str:
        digest = hashlib.sha256()
        for path in sorted([*self.folder.glob("*.[chS]"), *self.folder.glob(binary.BINARY)]):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                hashlib.file_digest(file, lambda: digest)
        return digest.hexdigest()

    def _make(self, suffix: str, arguments: Sequence[str], inputs: Sequence[Path]) -> Path:
        for path in inputs:
            if not path.is_file():
                raise BadInput(f"{path} is missing: the folder is not what qcompile wrote")
        command = [*self.toolchain.command, *arguments]
        key = "\n".join([*command, *(p.name for p in inputs), self._content])
        made = workspace() / (hashlib.sha256(key.encode()).hexdigest()[:32] + suffix)
        if not made.exists():
            scratch = made.with_name(f"{threading.get_ident()}-{made.name}")
            done = call([*command, *map(str, inputs), "-o", str(scratch)], seconds=_COMPILE_SECONDS)
            if done.returncode:
                said = f"{' '.join(self.toolchain.command)} cannot build {self.name}"
                if _NO_C_LIBRARY.search(done.stderr):
                    raise ToolchainMissing(f"{said}, because its C library is missing: {GET_CC}")
                raise QcompileError(f"{said}:\n{first_lines(done.stderr)}")
            scratch.replace(made)
        return made

    def object(self, source: str, *options: str) -> Path:
        """The object of one source file."""
        flags = (*self.toolchain.language, *self.toolchain.flags, *self.options, *options)
        return self._make(".o", (*flags, "-c"), [self.folder.resolve() / source])

    def _traced(self, source: str) -> Path:
        return self.object(source, "-O1", f"-D{self.name.upper()}_TRACE")

    def _timed(self, source: str) -> Path:
        return self.object(source, f"-D{self.name.upper()}_TRACE")

    def _program(self, compiled: Callable[[Build, str], Path], *sources: str) -> Path:
        around = [compiled(self, source) for source in sources]
        models = [compiled(build, "model.c") for build in (self, *self.choices)]
        inputs = [*models, *around, *self.constants]
        return self._make("", (*self.options, *self.toolchain.link), inputs)

    @cached_property
    def model(self) -> Path:
        """The object of the model alone, as a user's build makes it, without the choices."""
        return self.object("model.c")

    @property
    def models(self) -> tuple[Path, ...]:
        """The objects of the model and its choices."""
        return tuple(build.model for build in (self, *self.choices))

    @cached_property
    def constants(self) -> tuple[Path, ...]:
        """The objects of the constants in files of their own, where there are some; their digests are checked."""
        chosen = tuple(path for choice in self.choices for path in choice.constants)
        folder = self.folder.resolve()
        if not (folder / binary.SOURCE).is_file():
            return chosen
        binary.check(folder)
        flags = (*self.toolchain.flags, "-I", str(folder), "-c")
        return (self._make(".o", flags, [folder / binary.SOURCE]), *chosen)

    @cached_property
    def program(self) -> Path:
        """The model between standard input and output."""
        return self._program(Build.object, "runner.c", self.toolchain.host)

    @cached_property
    def traced(self) -> Path:
        """The same sources, writing every stored value."""
        return self._program(Build._traced, "runner.c", self.toolchain.host)

    @cached_property
    def profile(self) -> Path:
        """The program that says how long every layer takes."""
        return self._program(Build._timed, "profile.c")

    @cached_property
    def library(self) -> Path:
        """The model as a shared library; its objects must be position-independent."""
        objects = [*self.models, *self.constants]
        return self._make(".so", (*self.options, *self.toolchain.shared), objects)

    def number(self, macro: str) -> int:
        """The value of NAME_`macro` in model.h."""
        text = (self.folder / "model.h").read_text()
        found = re.search(rf"^#define {self.name.upper()}_{macro} (\d+)u?$", text, re.MULTILINE)
        if found is None:
            raise QcompileError(f"{self.folder / 'model.h'} defines no {self.name.upper()}_{macro}")
        return int(found[1])
