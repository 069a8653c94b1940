"""Executed instructions of an emitted program's layers, counted in the emulator that runs it.

The count is exact and the same in every run: it says nothing of stalls, and on Hexagon it counts packets.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from qcompile.errors import BadInput, QcompileError, ToolchainMissing
from qcompile.ir import Graph
from qcompile.target import Codes, Counts, Layer, LayerCount

from .build import GET_CC, Build, call, find, find_zig, first_lines, workspace
from .text import HERE

_SECONDS = 900
_RUN_ITSELF = -1
# QEMU 9.0 dropped version 1 of the plugin interface; what this plugin uses of it stayed as it was.
_SECOND_INTERFACE = 9


def count(build: Build, graph: Graph, feeds: Codes, layers: Sequence[Layer]) -> Counts:
    """Run one call of the program in its emulator and count; `layers` are those that were emitted, in order."""
    if not build.toolchain.emulator:
        raise ToolchainMissing(f"{build.name} runs natively here: only an emulator can count")
    emulator, *arguments = build.toolchain.emulator
    program = build.program
    watch = _watch(program, build.name)
    with TemporaryDirectory(dir=workspace()) as folder:
        points, result = Path(folder, "watch"), Path(folder, "result")
        points.write_text("".join(f"{line}\n" for line in watch.lines))
        options = [plugin(emulator), f"watch={points}", f"out={result}"]
        # QEMU reads a comma as the end of a value unless it is doubled.
        value = ",".join(str(option).replace(",", ",,") for option in options)
        command = [emulator, "-plugin", value, *arguments, str(program)]
        done = call(command, seconds=_SECONDS, stdin=_one_call(graph, feeds))
        if done.returncode:
            said = first_lines(done.stderr)
            if b"plugin" in done.stderr:
                raise ToolchainMissing(f"{emulator} takes no plugin, so it cannot count: {said}")
            raise QcompileError(f"{build.name} does not run in {emulator}: {said}")
        parts = _parts(result.read_text())
    return _assign(build.name, parts, layers, watch)


@cache
def plugin(emulator: str) -> Path:
    """The plugin for this emulator, built once with the C compiler of this machine."""
    version = 2 if _major(emulator) >= _SECOND_INTERFACE else 1
    compiler = find("cc", "gcc", "clang") or find_zig()
    if compiler is None:
        raise ToolchainMissing(f"the instruction counter has no compiler here: {GET_CC}")
    made = workspace() / f"count-{version}.so"
    flags = ("-std=c99", "-O2", "-shared", "-fPIC", "-fvisibility=hidden")
    command = [*compiler, *flags, f"-DPLUGIN_VERSION={version}", str(HERE / "count.c")]
    scratch = made.with_name(f"{threading.get_ident()}-{made.name}")
    done = call([*command, "-o", str(scratch)], seconds=_SECONDS)
    if done.returncode:
        raise ToolchainMissing(
            f"{' '.join(compiler)} cannot build the instruction counter; {GET_CC}:\n"
            f"{first_lines(done.stderr)}"
        )
    return scratch.replace(made)


def _major(emulator: str) -> int:
    said = call([emulator, "--version"], seconds=60).stdout.decode(errors="replace")
    found = re.search(r"version (\d+)\.", said)
    if found is None:
        raise ToolchainMissing(f"{emulator} does not say which version of QEMU it is")
    return int(found[1])


@dataclass(frozen=True, slots=True)
class _Watch:
    """Where a program's code lies, as the plugin reads it; what the functions of its layer lines are called."""

    lines: Sequence[str]
    functions: Sequence[set[str]]
    unit: str


def _watch(program: Path, name: str) -> _Watch:
    with program.open("rb") as file:
        elf = ELFFile(file)
        if elf["e_type"] != "ET_EXEC":
            raise QcompileError(f"{name} is linked to run anywhere, so its layers have no address")
        # A Thumb function's address is odd, its instructions' are not.
        odd = 1 if elf["e_machine"] == "EM_ARM" else 0
        functions = {n: (at & ~odd, size) for n, at, size in _functions(elf)}
        unit = "packets" if elf["e_machine"] == "EM_QDSP6" else "instructions"
    lines = []
    for role, symbol in (("main", "main"), ("run", f"{name}_run")):
        at, size = functions.get(symbol, (0, 0))
        if size == 0:
            raise QcompileError(f"the program of {name} has no function {symbol}")
        lines.append(f"{role} {at:x} {at + size:x}")
    starts: dict[int, set[str]] = {}
    for symbol, (at, _) in functions.items():
        if symbol.startswith("layer_"):
            # a compiler calls a specialised function f.constprop.0
            starts.setdefault(at, set()).add(symbol.partition(".")[0])
    places = sorted(starts)
    lines += [f"layer {at:x}" for at in places]
    return _Watch(lines, [starts[at] for at in places], unit)


def _functions(elf: ELFFile) -> Iterator[tuple[str, int, int]]:
    for table in elf.iter_sections():
        if isinstance(table, SymbolTableSection):
            for s in table.iter_symbols():
                if s["st_info"]["type"] == "STT_FUNC" and s["st_shndx"] != "SHN_UNDEF":
                    yield s.name, s["st_value"], s["st_size"]


def _one_call(graph: Graph, feeds: Codes) -> bytes:
    parts = []
    for port, value in graph.inputs:
        x, kind = np.asarray(feeds.get(port.name)), value.type
        if x.dtype != kind.dtype.numpy or x.shape != kind.shape:
            raise BadInput(
                f"one call takes {kind} for {port.name}, not {x.dtype} of shape {list(x.shape)}"
            )
        parts.append(x.tobytes())
    return b"".join(parts)


def _parts(text: str) -> list[tuple[int, int]]:
    """The parts of the one inference there was: (layer or -1, executed)."""
    rows = [tuple(map(int, line.split())) for line in text.splitlines()]
    ends = sum(part == _RUN_ITSELF for _, part, _ in rows)
    if ends != 1 or rows[-1][1] != _RUN_ITSELF:
        raise QcompileError(f"the emulator saw {ends} whole inferences instead of one")
    return [(part, executed) for _, part, executed in rows]


def _assign(
    program: str, parts: Sequence[tuple[int, int]], layers: Sequence[Layer], watch: _Watch
) -> Counts:
    """Give every part its layer: functions are called in the order of the layers.

    A compiler may make one of equal functions, and drop the call of one that changes nothing.
    """
    *calls, (_, entry) = parts
    found = [executed for _, executed in calls]
    if len(calls) != len(layers):
        found, at = [], 0
        for layer in layers:
            mine = at < len(calls) and layer.function in watch.functions[calls[at][0]]
            found.append(calls[at][1] if mine else 0)
            at += mine
        if at < len(calls):
            raise QcompileError(
                f"{program} called {len(calls)} layer functions, not those of its {len(layers)} layers"
            )
    counted = (
        LayerCount(layer.name, layer.kernel, layer.macs, layer.cost, executed)
        for layer, executed in zip(layers, found, strict=True)
    )
    return Counts(watch.unit, entry, tuple(counted))
