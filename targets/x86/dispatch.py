"""One model that holds a program for each instruction set and calls the fastest that the processor has.

What a compiler may use by a program's flags is asked of the processor by CPUID, and what the operating system saves of
registers by XGETBV (Intel's Software Developer's Manual, volume 2A, CPUID; volume 1, 13.3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qcompile.ir import Graph
from qcompile.target import Codes, Lowered, Placement

from ..c import binary, build
from ..c.interface import Interface
from ..c.kernel import LINE
from ..c.text import layout, render
from . import isa, program

CHOICES: Sequence[isa.Isa | None] = (*isa.ISAS.values(), None)
"""What there is a program for, the fastest first; the last one runs everywhere."""

_REGISTERS = (
    "LEAF_1_ECX",
    "LEAF_7_EBX",
    "LEAF_7_ECX",
    "LEAF_7_1_EAX",
    "LEAF_80000001_ECX",
    "XCR0",
)
_LEAF_1 = {
    "pni": 0, "ssse3": 9, "fma": 12, "cx16": 13, "sse4_1": 19, "sse4_2": 20, "movbe": 22, "popcnt": 23,
    "avx": 28, "f16c": 29,
}  # fmt: skip
_LEAF_7 = {
    "bmi1": 3, "avx2": 5, "bmi2": 8, "avx512f": 16, "avx512dq": 17, "avx512cd": 28, "avx512bw": 30,
    "avx512vl": 31,
}  # fmt: skip
_BITS: Mapping[str, tuple[str, int]] = {
    **{word: ("LEAF_1_ECX", bit) for word, bit in _LEAF_1.items()},
    **{word: ("LEAF_7_EBX", bit) for word, bit in _LEAF_7.items()},
    "avx512_vnni": ("LEAF_7_ECX", 11),
    "avx_vnni": ("LEAF_7_1_EAX", 4),
    "lahf_lm": ("LEAF_80000001_ECX", 0),
    "abm": ("LEAF_80000001_ECX", 5),
}
# Which registers the operating system saves: xmm and ymm; masks, the upper halves of zmm, and zmm16 to zmm31.
_YMM, _ZMM = 0x06, 0xE6


@dataclass(frozen=True, slots=True)
class _Row:
    """A program as the choosing code sees it: what it needs of each register, in words and in bits."""

    isa: str
    name: str
    words: str
    needs: Sequence[str]


def _row(has: isa.Isa | None, name: str) -> _Row:
    words = sorted(() if has is None else has.needs)
    needs = dict.fromkeys(_REGISTERS, 0)
    for word in words:
        register, bit = _BITS[word]
        needs[register] |= 1 << bit
    if words:
        needs["XCR0"] = _ZMM if "avx512f" in words else _YMM
    bits = [f"{needs[register]:#010x}u" for register in _REGISTERS]
    return _Row(program.title(has), _name(name, has), " ".join(words), bits)


def _name(name: str, has: isa.Isa | None) -> str:
    return f"{name}_{program.title(has)}"


def lower(
    graph: Graph, *, name: str, vectors: Sequence[Codes], placement: Placement
) -> tuple[Lowered, list[build.Choice]]:
    """Emit every program into a folder of its own, and what chooses among them; say how each is compiled.

    What is said of layers is said of the fastest.
    """
    files: dict[str, bytes] = {}
    choices: list[build.Choice] = []
    made: list[Lowered] = []
    for has in CHOICES:
        one = program.lower(graph, has, name=_name(name, has), vectors=(), placement=placement)
        own = {path: data for path, data in one.files.items() if path != "vectors.h"}
        if has is not None:
            own["peak.c"] = render(program.PEAK.name, isa.HERE, **program.peak(has)).encode()
        isa_name = program.title(has)
        files |= {f"{isa_name}/{path}": data for path, data in own.items()}
        together = ("-pthread",) if placement.threads > 1 and has is not None else ()
        choices.append(
            build.Choice(
                isa_name, (*program.flags(has), *together), binary.BINARY in own, has is not None
            )
        )
        made.append(one)
    rows = [_row(has, name) for has in CHOICES]
    interface = Interface(
        graph,
        name,
        ", ".join(row.isa for row in rows),
        arena=max(one.arena_bytes for one in made),
        align=LINE,
        threads=placement.threads,
        stored=max(len(one.stored) for one in made),
        weight_bytes=sum(one.weight_bytes for one in made),
        placement=placement,
        isas=[row.isa for row in rows],
    )
    source = render(
        "dispatch.c.j2", isa.HERE, **interface.facts, programs=rows, registers=_REGISTERS
    )
    files |= {
        "model.c": layout(source).encode(),
        "model.h": interface.header(),
        "vectors.h": interface.vectors(vectors),
    }
    whole = replace(
        made[0],
        files=files,
        arena_bytes=interface.arena,
        weight_bytes=interface.weight_bytes,
    )
    return whole, choices


def made(folder: Path, name: str, options: tuple[str, ...] = ()) -> build.Build:
    """What `lower` emitted into a folder, to be built here."""
    choices = (
        build.Build(folder / program.title(has), _name(name, has), program.toolchain(has), options)
        for has in CHOICES
    )
    return build.Build(folder, name, program.toolchain(None), options, tuple(choices))


def runnable() -> list[str]:
    """The choices that this machine can run, the one that it takes first."""
    has = isa.features()
    return [program.title(one) for one in CHOICES if one is None or one.needs <= has]
