"""What one inference of an emitted program takes here: its own `bench`, built and asked for the time; in an emulator,
which tells no times, the instructions it executes.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qcompile.artifact import load
from qcompile.errors import BadInput, QcompileError, ToolchainMissing
from qcompile.ir import Graph
from qcompile.manifest import MANIFEST_FILE
from qcompile.program import PROGRAM_FILE, emitted
from qcompile.target import Codes, Counts, names

MACHINES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(names(), ()),
    "x86": ("x86_64", "amd64", "i686"),
    "arm": ("aarch64", "arm64"),
}
"""Where a target's programs run without an emulator; those of all others run nowhere so."""
ANSWER_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Timing:
    """Nanoseconds per inference; `raw` without quantizing inputs and dequantizing outputs."""

    wall_ns: float
    cpu_ns: float
    raw: bool


def emulated(folder: Path) -> bool:
    """Whether the program in an output folder runs in an emulator here: ask `executed`, not `bench`."""
    here = platform.machine().lower()
    return here not in MACHINES.get(load(folder).target.name, (here,))


def design(folder: Path) -> Mapping[str, object] | None:
    """What the report says of a design of logic; None for a program, or a folder that is none of ours."""
    if not (folder / MANIFEST_FILE).is_file():
        return None
    artifact = load(folder)
    if not artifact.target.fabric:
        return None
    found = artifact.report.get("design")
    if not isinstance(found, dict):
        raise BadInput(f"the report in {folder} says nothing of a design")
    return found


def executed(folder: Path, feeds: Codes | None = None) -> Counts:
    """Run one call in the emulator and count; without `feeds`, on random codes that are always the same."""
    artifact = load(folder)
    return artifact.runner().count(any_codes(artifact.graph) if feeds is None else feeds)


def any_codes(graph: Graph) -> Codes:
    """One call's inputs, drawn over the whole range of every type; always the same."""
    draw = np.random.default_rng(0)
    return {
        port.name: draw.integers(
            value.type.dtype.lo, value.type.dtype.hi + 1, value.type.shape
        ).astype(value.type.dtype.numpy)
        for port, value in graph.inputs
    }


def bench(folder: Path, *, milliseconds: int = 1000, raw: bool = False) -> Timing:
    """Build `bench` in an output folder and run it for about so long; ToolchainMissing where that cannot be."""
    target, here = load(folder).target.name, platform.machine().lower()
    if here not in MACHINES.get(target, (here,)):
        raise ToolchainMissing(
            f"the program is for {target} and this machine is {here}: an emulator tells no times; "
            f"copy {folder} to such a machine and run `make bench` and `./bench` there"
        )
    _make(folder, "bench")
    return _ask([str((folder / "bench").resolve()), *(["raw"] if raw else [])], milliseconds, raw)


@dataclass(frozen=True, slots=True)
class LayerTime:
    """Nanoseconds of one layer in a call, in a build that looks at the clock after every layer."""

    name: str
    kernel: str
    macs: int
    ns: float


@dataclass(frozen=True, slots=True)
class Profile:
    """All layers in order; `peak` is what the processor does at most, in multiply-accumulates a nanosecond, or None."""

    layers: tuple[LayerTime, ...]
    peak: float | None


def profile(folder: Path, *, milliseconds: int = 1000) -> Profile:
    """Build `profile` in an output folder and run it for about so long; ToolchainMissing where that cannot be.

    A model that chooses among programs, each in a folder of its own, says first which one it took.
    """
    said = _said(folder, "profile", str(milliseconds), seconds=milliseconds / 1000).splitlines()
    chosen = "" if (folder / PROGRAM_FILE).is_file() or not said else said.pop(0)
    known = emitted(folder / chosen)
    times: dict[int, float] = {}
    for line in said:
        try:
            number, ns = line.split()
            times[int(number)] = float(ns)
        except ValueError:
            raise QcompileError(
                f"{folder / 'profile'} printed what is no time: {line[:80]!r}"
            ) from None
    if lack := set(known.stores) - times.keys():
        raise QcompileError(f"{folder / 'profile'} says nothing of value {min(lack)}")
    layers = tuple(
        LayerTime(layer.name, layer.kernel, layer.macs, times[value])
        for layer, value in zip(known.layers, known.stores, strict=True)
    )
    peak = f"peak_{chosen}" if chosen else "peak"
    known_peak = (folder / chosen / "peak.c").is_file()
    return Profile(layers, float(_said(folder, peak)) if known_peak else None)


def _said(folder: Path, program: str, *arguments: str, seconds: float = 0.0) -> str:
    """What a program of the folder prints, built first."""
    _make(folder, program)
    command = [str((folder / program).resolve()), *arguments]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWER_SECONDS + seconds,
        )
    except subprocess.TimeoutExpired as e:
        raise QcompileError(f"{command[0]} gave no answer in {e.timeout:.0f} s") from e
    except OSError as e:
        raise BadInput(f"{command[0]} does not run here: {e.strerror}") from e
    if done.returncode:
        raise QcompileError(f"{command[0]} failed: {_last(done.stderr)}")
    return done.stdout


def _make(folder: Path, program: str) -> None:
    make = shutil.which("make")
    if make is None:
        raise ToolchainMissing("make is not installed; install make and a C compiler")
    built = subprocess.run(
        [make, "-C", str(folder), program], capture_output=True, text=True, errors="replace"
    )
    if built.returncode:
        raise ToolchainMissing(f"`make -C {folder} {program}` failed: {_last(built.stderr)}")


def _ask(command: Sequence[str], milliseconds: int, raw: bool) -> Timing:
    """Speak the protocol: `ready`, then milliseconds in, nanoseconds out."""
    try:
        done = subprocess.run(
            command,
            input=f"{milliseconds}\n0\n",
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWER_SECONDS + milliseconds / 1000,
        )
        ready, answer = done.stdout.split("\n")[:2]
        wall, cpu = map(float, answer.split())
    except subprocess.TimeoutExpired as e:
        raise QcompileError(f"{command[0]} gave no answer in {e.timeout:.0f} s") from e
    except OSError as e:
        raise BadInput(f"{command[0]} does not run here: {e.strerror}") from e
    except ValueError as e:
        raise QcompileError(f"{command[0]} does not speak the bench protocol") from e
    if ready != "ready" or done.returncode:
        raise QcompileError(f"{command[0]} failed: {_last(done.stderr)}")
    return Timing(wall, cpu, raw)


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
