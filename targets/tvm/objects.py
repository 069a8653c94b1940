"""The object files of an emitted package: built by TVM, certified, and run here as a shared library."""

from __future__ import annotations

import ctypes
import hashlib
import io
import re
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
from elftools.elf.elffile import ELFFile
from elftools.elf.relocation import RelocationSection
from elftools.elf.sections import SymbolTableSection

from qcompile.calls import Bytes, Calls
from qcompile.errors import QcompileError
from qcompile.ir import Array, Graph
from qcompile.target import Codes, FloatCertificate

from ..c import build, certify
from .emit import package_name
from .process import SECONDS, command, environment, last_lines

_HALF_PRECISION = ("__extendhfsf2", "__truncsfhf2")
"""What TVM puts into every object, for a type that no integer network has."""


@dataclass(frozen=True)
class Objects:
    """The objects of the package in a folder, made once per process from the content that the package has then."""

    folder: Path
    name: str

    @cached_property
    def place(self) -> Path:
        """Where objects, header and constants are."""
        digest = hashlib.sha256()
        for path in sorted((self.folder / package_name(self.name)).glob("*.*")):
            data = path.read_bytes()
            digest.update(f"{path.name} {len(data)}\n".encode() + data)
        return _made(self.folder, self.name, digest.hexdigest())

    def certificate(self) -> FloatCertificate:
        """What disassembling shows; TVM's routines for half precision do not count where nothing calls them."""
        instructions, findings = 0, list[str]()
        for path in sorted(self.place.glob("*.o")):
            data = path.read_bytes()
            found = certify.inspect(data, path.name)
            unused = set(_HALF_PRECISION) - _referred(data)
            instructions += found.instructions
            findings += [f for f in found.findings if not any(f" {name} " in f for name in unused)]
        return FloatCertificate(instructions, findings)

    def linked(self, compiler: tuple[str, ...]) -> Path:
        """Objects and constants as a shared library."""
        library = self.place / f"{self.name}.so"
        if not library.exists():
            ends = (".o", "_loops.o", "_constants.S")
            parts = [str(self.place / f"{self.name}{end}") for end in ends]
            include = f"-Wa,-I{self.place}"
            done = build.call(
                [*compiler, "-shared", include, *parts, "-o", str(library)], seconds=SECONDS
            )
            if done.returncode:
                raise QcompileError(
                    f"{compiler[0]} cannot link the objects of {self.name}:\n{build.first_lines(done.stderr)}"
                )
        return library

    def number(self, macro: str) -> int:
        """The value of NAME_`macro` in NAME.h."""
        text = (self.place / f"{self.name}.h").read_text()
        found = re.search(rf"^#define {self.name.upper()}_{macro} (\d+)$", text, re.MULTILINE)
        if found is None:
            raise QcompileError(f"{self.name}.h defines no {self.name.upper()}_{macro}")
        return int(found[1])

    def run(self, compiler: tuple[str, ...], graph: Graph, feeds: Codes) -> dict[str, Array]:
        """Codes in, codes out, through the plain C interface."""
        calls = Calls(graph)
        packed, rows = calls.pack(feeds)
        library = ctypes.CDLL(str(self.linked(compiler)))
        entry = library[f"{self.name}_run"]
        entry.restype = None
        constants = ctypes.c_ubyte.in_dll(library, f"{self.name}_constants")
        align = self.number("ALIGN")
        inputs = [_aligned(x.shape[1], align) for x in packed]
        outputs = [_aligned(v.type.bytes, align) for _, v in graph.outputs]
        arena = _aligned(self.number("ARENA_BYTES"), align)
        # a loop that reads what nobody wrote meets these bytes, not lucky zeros
        arena[:] = 0xA5
        places = [ctypes.c_void_p(a.ctypes.data) for a in (*inputs, *outputs, arena)]
        results = [np.empty((len(packed[0]), a.size), np.uint8) for a in outputs]
        for call in range(len(packed[0])):
            for into, x in zip(inputs, packed, strict=True):
                into[:] = x[call]
            entry(*places, ctypes.byref(constants))
            for result, y in zip(results, outputs, strict=True):
                result[call] = y
        return {
            port.name: calls.unpack(v.type, data, rows)
            for (port, v), data in zip(graph.outputs, results, strict=True)
        }


def compiler() -> tuple[str, ...] | None:
    """What links objects here."""
    return build.find("cc", "gcc", "clang")


@cache
def _made(folder: Path, name: str, content: str) -> Path:
    """The products of a package of that content."""
    place = Path(mkdtemp(dir=build.workspace()))
    done = build.call(
        command(name, "object", str(place)), seconds=SECONDS, environment=environment(folder)
    )
    if done.returncode:
        raise QcompileError(f"TVM cannot build the objects of {name}:\n{last_lines(done.stderr)}")
    return place


def _referred(data: bytes) -> set[str]:
    """Names of symbols that a relocation of an object file refers to."""
    names: set[str] = set()
    elf = ELFFile(io.BytesIO(data))
    for section in elf.iter_sections():
        symbols = elf.get_section(section["sh_link"])
        if isinstance(section, RelocationSection) and isinstance(symbols, SymbolTableSection):
            names |= {symbols.get_symbol(r["r_info_sym"]).name for r in section.iter_relocations()}
    return names


def _aligned(size: int, align: int) -> Bytes:
    whole = np.zeros(size + align, np.uint8)
    start = -whole.ctypes.data % align
    return whole[start : start + size]
