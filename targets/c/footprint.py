"""What a model takes of a chip besides its arena: flash for code and constants, and the stack of its entry function.

The stack's bound is the worst path through the calls that the object names, with the frame sizes its compiler states.
"""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from elftools.elf.constants import SH_FLAGS
from elftools.elf.elffile import ELFFile
from elftools.elf.relocation import RelocationSection
from elftools.elf.sections import Symbol, SymbolTableSection

from qcompile.errors import QcompileError
from qcompile.target import Footprint

from .build import Build, call, first_lines, workspace
from .certify import code_ranges, decoder

LIBRARY_STACK = 64
"""Bytes allowed for a routine that the C library or the compiler brings, such as memcpy; none of them calls further."""

_LIBRARY = re.compile(
    r"mem(?:cpy|set|move|cmp)|__aeabi_mem(?:cpy|set|clr|move)[48]?"
    # 32-bit division, and on Armv6-M 64-bit products and shifts: never 64-bit division
    r"|__aeabi_u?idiv(?:mod)?|__aeabi_l(?:mul|lsl|lsr|asr)|__(?:u?div|u?mod)si3|__(?:mul|ash[lr]|lshr)di3"
    r"|__hexagon_memcpy\w+|__hexagon_u?(?:div|mod)si3"
)
_SECONDS = 900


def footprint(build: Build) -> Footprint:
    """Measure the model as a user's build makes it, and bound its stack."""
    code = constants = statics = 0
    for made in (*build.models, *build.constants):
        with made.open("rb") as file:
            for section in ELFFile(file).iter_sections():
                flags, size = section["sh_flags"], section["sh_size"]
                if not flags & SH_FLAGS.SHF_ALLOC:
                    continue
                if flags & SH_FLAGS.SHF_EXECINSTR:
                    code += size
                elif flags & SH_FLAGS.SHF_WRITE:
                    statics += size
                else:
                    constants += size
    try:
        stack, deepest = _deepest(build)
    except _Unbounded as reason:
        return Footprint(code, constants, statics, None, (), str(reason), build.toolchain.compiler)
    return Footprint(code, constants, statics, stack, deepest, "", build.toolchain.compiler)


def _deepest(build: Build) -> tuple[int, tuple[str, ...]]:
    """The deepest stack of the entry function, and its path; functions of choices share names, so each goes alone."""
    calls = _calls(build, {f"{choice.name}_run": _deepest(choice) for choice in build.choices})
    return calls.worst(f"{build.name}_run")


class _Unbounded(Exception):
    """Why no bound of the stack can be stated."""


@dataclass(frozen=True, slots=True)
class _Machine:
    """How an instruction set calls and aligns, in the words of its disassembly.

    `call` is a call and `blind` a jump to where a register says. `push` takes stack for `registers` of a `word`, or
    so many `bytes`, or makes room `ahead`. `align` rounds the stack pointer down, to a `multiple`, to zeros in so
    many `bits`, or as the word of a `conjunction` says. `hidden` are the bytes of a call that the stated frame leaves
    out, `below` those that the last function may use under the stack pointer.
    """

    call: re.Pattern[str]
    blind: re.Pattern[str]
    push: re.Pattern[str]
    align: re.Pattern[str]
    word: int = 4
    hidden: int = 0
    below: int = 0


_NEVER = re.compile(r"(?!)")
_TARGET = re.compile(r"[ #](0x[0-9a-f]+|\d+)$")
_MACHINES: Mapping[str, _Machine] = {
    "EM_ARM": _Machine(
        re.compile(r"blx?\b"),
        re.compile(r"bx (?!lr)|mov pc, (?!lr)"),
        re.compile(
            r"^(?:v?push|stmdb)(?:\.w)? (?:sp!, )?\{(?P<registers>.*)\}"
            r"|^subw?(?:\.w)? sp, (?:sp, )?#(?P<bytes>\w+)|\[sp, #-(?P<ahead>\w+)\]!",
            re.M,
        ),
        re.compile(
            r"\b(?:bfc (\w+), #0|lsls (\w+), \w+), #(?P<bits>\w+)\nmov sp, (?:\1|\2)$", re.M
        ),
    ),
    "EM_AARCH64": _Machine(
        re.compile(r"blr?\b"),
        _NEVER,
        re.compile(r"^sub sp, sp, #(?P<bytes>\w+)$|\[sp, #-(?P<ahead>\w+)\]!", re.M),
        re.compile(r"^and sp, \w+, #(?P<multiple>.*)", re.M),
        word=8,
    ),
    "EM_X86_64": _Machine(
        re.compile(r"call"),
        _NEVER,
        re.compile(r"^push (?P<registers>\w+)|^sub rsp, (?P<bytes>\w+)$", re.M),
        re.compile(r"^and rsp, (?P<multiple>.*)", re.M),
        word=8,
        hidden=8,
        below=128,  # The red zone.
    ),
    # Its decoder gives words; a zero in both bits 15 and 14 means two small instructions, none of them a call.
    "EM_QDSP6": _Machine(
        re.compile(r"word (?:5[abd]\w\w|50[a-d]\w|51[0-3]\w)[4-9a-f]"),
        re.compile(r"word 5(?:2(?:8\w|9[0-9a-e]|[cd]\w)|3(?:[46]\w|[57][0-9a-e]))[4-9a-f]"),
        _NEVER,
        re.compile(r"^word (?P<conjunction>763d\w\w[13579bdf]d)$", re.M),  # r29 = and(r29, #...)
        hidden=8,  # What allocframe keeps: the frame before, and where to return.
    ),
}


@dataclass(frozen=True, slots=True)
class _Calls:
    """Who calls whom, and the frame of each function."""

    frames: Mapping[str, int]
    callees: Mapping[str, set[str]]
    below: int
    _worst: dict[str, tuple[int, tuple[str, ...]]] = field(default_factory=dict)

    def worst(self, name: str, above: tuple[str, ...] = ()) -> tuple[int, tuple[str, ...]]:
        """The deepest stack from the entry of `name` on, and its path."""
        if name in above:
            raise _Unbounded(f"{' calls '.join((*above, name))}: a recursion")
        if name not in self._worst:
            if name in self.callees:
                found = [self.worst(c, (*above, name)) for c in sorted(self.callees[name])]
                depth, path = max(found, default=(self.below, ()), key=lambda f: f[0])
                self._worst[name] = (self._frame(name) + depth, (name, *path))
            elif _LIBRARY.fullmatch(name):
                self._worst[name] = (LIBRARY_STACK, (name,))
            else:
                raise _Unbounded(f"{above[-1]} calls {name}, whose stack is not known")
        return self._worst[name]

    def _frame(self, name: str) -> int:
        # A compiler calls a specialised function f.constprop.0, and may state its frame as that of f.constprop.
        stem = name.partition(".")[0]
        if stem not in self.frames:
            raise _Unbounded(f"the compiler states no frame of {name}")
        return self.frames[stem]


def _calls(build: Build, known: Mapping[str, tuple[int, tuple[str, ...]]]) -> _Calls:
    """Compile the model with every function in a section of its own, so that relocations name all calls.

    The deepest stacks of functions in other objects are `known`.
    """
    with TemporaryDirectory(dir=workspace()) as folder:
        made, sizes = Path(folder, "model.o"), Path(folder, "model.su")
        toolchain = build.toolchain
        # zig takes -fstack-usage and drops the file; its compiler itself does not.
        zig = "ziglang" in toolchain.command
        ask = ("-Xclang", "-stack-usage-file", "-Xclang", str(sizes)) if zig else ("-fstack-usage",)
        flags = (*toolchain.language, *toolchain.flags, *build.options, *ask)
        source = build.folder.resolve() / "model.c"
        command = [*toolchain.command, *flags, "-ffunction-sections", "-c", str(source)]
        done = call([*command, "-o", str(made)], seconds=_SECONDS)
        if done.returncode:
            raise QcompileError(f"{build.name} does not compile:\n{first_lines(done.stderr)}")
        elf = ELFFile(io.BytesIO(made.read_bytes()))
        machine = _MACHINES.get(elf["e_machine"])
        if machine is None:
            raise _Unbounded(f"nobody has said how {elf['e_machine']} calls")
        stated = dict(_frames(sizes.read_text()))
    referred, pushed, rounded = _read(elf, machine)
    data = _data(build)
    callees = {name: names - data for name, names in referred.items()}
    # Inline assembly may push what the compiler does not know of.
    frames = {
        name: max(size, pushed.get(name, 0)) + rounded.get(name, 0) + machine.hidden
        for name, size in stated.items()
    }
    return _Calls(frames, callees, machine.below, dict(known))


def _data(build: Build) -> set[str]:
    """The constants that lie in an object of their own: to refer to them is no call."""
    names: set[str] = set()
    for made in build.constants:
        for table in ELFFile(io.BytesIO(made.read_bytes())).iter_sections():
            if isinstance(table, SymbolTableSection):
                names.update(
                    s.name for s in table.iter_symbols() if s["st_info"]["type"] == "STT_OBJECT"
                )
    return names


def _frames(text: str) -> Iterator[tuple[str, int]]:
    """Name and frame of each function: a line is PLACE:NAME, bytes and whether they are known before it runs."""
    largest: dict[str, int] = {}
    for line in text.splitlines():
        place, size, kind = line.split("\t")
        name = place.rpartition(":")[2].partition(".")[0]
        if kind == "dynamic":
            raise _Unbounded(f"the frame of {name} grows as it runs")
        largest[name] = max(largest.get(name, 0), int(size))
    yield from largest.items()


def _read(
    elf: ELFFile, machine: _Machine
) -> tuple[dict[str, set[str]], dict[str, int], dict[str, int]]:
    """What every function refers to, how much it pushes, and by how much it rounds the stack pointer down."""
    owners = _owners(elf)
    callees: dict[str, set[str]] = {name: set() for names in owners.values() for name in names}
    pushed: dict[str, int] = {}
    rounded: dict[str, int] = {}
    relocated: dict[int, set[int]] = {}
    for section in elf.iter_sections():
        if isinstance(section, RelocationSection) and section["sh_info"] in owners:
            symbols = elf.get_section(section["sh_link"])
            assert isinstance(symbols, SymbolTableSection)
            for relocation in section.iter_relocations():
                relocated.setdefault(section["sh_info"], set()).add(relocation["r_offset"])
                symbol = symbols.get_symbol(relocation["r_info_sym"])
                for name in owners[section["sh_info"]]:
                    callees[name].update(_referred(symbol, owners))
    for index, names in owners.items():
        listing = "\n".join(_listing(elf, index, relocated.get(index, set()), machine, names))
        pushes = sum(_bytes(m, machine.word) for m in machine.push.finditer(listing))
        rounding = max(
            (_bytes(m, machine.word) for m in machine.align.finditer(listing)), default=0
        )
        for stem in (name.partition(".")[0] for name in names):
            pushed[stem] = max(pushed.get(stem, 0), pushes)
            rounded[stem] = max(rounded.get(stem, 0), rounding)
    return callees, pushed, rounded


def _listing(
    elf: ELFFile,
    index: int,
    relocated: Collection[int],
    machine: _Machine,
    names: Mapping[str, int],
) -> Iterator[str]:
    """The instructions of a section, none of which calls what no relocation names."""
    code = elf.get_section(index).data()
    decode = decoder(elf["e_machine"], "model.o")
    for begin, end in code_ranges(elf, index):
        for at in decode(code[begin:end], begin):
            text = " ".join(at.text.split())
            blind = machine.blind.match(text) is not None
            if machine.call.match(text) and not any(
                at.address <= r < at.address + at.size for r in relocated
            ):
                # Thumb's call is also its longest jump: within a function it calls nothing.
                target = _TARGET.search(text)
                blind = target is None or int(target[1], 0) in names.values()
            if blind:
                raise _Unbounded(f"{min(names)} calls itself or by a pointer: {text}")
            yield text


def _bytes(found: re.Match[str], word: int) -> int:
    """By how much an instruction moves the stack pointer at most."""
    kind = found.lastgroup
    assert kind is not None
    said = found[kind]
    if kind == "registers":
        return sum(8 if r.strip().startswith("d") else word for r in said.split(","))
    if kind == "conjunction":
        return (1 << 9) - (int(said, 16) >> 5 & (1 << 9) - 1)
    number = int(said, 0)
    if kind == "bits":
        return 1 << number
    return number & -number if kind == "multiple" else number


def _owners(elf: ELFFile) -> dict[int, dict[str, int]]:
    """The functions in each section of code, and where they begin."""
    odd = 1 if elf["e_machine"] == "EM_ARM" else 0
    owners: dict[int, dict[str, int]] = {}
    for table in elf.iter_sections():
        if isinstance(table, SymbolTableSection):
            for s in table.iter_symbols():
                if s["st_info"]["type"] == "STT_FUNC" and isinstance(s["st_shndx"], int):
                    owners.setdefault(s["st_shndx"], {})[s.name] = s["st_value"] & ~odd
    return owners


def _referred(symbol: Symbol, owners: Mapping[int, Mapping[str, int]]) -> list[str]:
    """The functions that a symbol may stand for."""
    kind, section = symbol["st_info"]["type"], symbol["st_shndx"]
    if kind == "STT_SECTION":
        return list(owners.get(section, {}))
    if kind == "STT_FUNC" or section == "SHN_UNDEF":
        return [symbol.name]
    return []
