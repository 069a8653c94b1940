"""x86-64: portable C for the compiler of this machine."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from qcompile.errors import BadInput, ToolchainMissing
from qcompile.ir import Graph
from qcompile.target import (
    ANYWHERE,
    Codes,
    FloatCertificate,
    Footprint,
    Lowered,
    Placement,
    Runner,
    Target,
)

from ..c import build, certify, emit, footprint, run

# Each cpu as gcc and clang know it, and as zig does.
_CPUS: Mapping[str, tuple[str, str]] = {
    "generic": ("-march=x86-64", "-mcpu=x86_64"),
    "native": ("-march=native", "-mcpu=native"),
}
# Costs nothing on x86-64, and lets the model be linked into a shared library.
_PIC = "-fPIC"


def _cpu(cpu: str) -> tuple[str, str]:
    if cpu not in _CPUS:
        raise BadInput(f"x86 knows no cpu '{cpu}'; choose one of {', '.join(_CPUS)}")
    return _CPUS[cpu]


def _toolchain(cpu: str) -> build.Toolchain:
    for_cc, for_zig = _cpu(cpu)
    if (cc := build.find("cc", "gcc", "clang")) is not None:
        return build.Toolchain(cc, (for_cc, _PIC))
    if (zig := build.find_zig()) is not None:
        return build.Toolchain(zig, (for_zig, _PIC), shared=("-shared", "-nostdlib"))
    raise ToolchainMissing(f"x86 has no compiler here: {build.GET_CC}")


class X86:
    """C99 for x86-64, run inside this process."""

    name = "x86"
    summary = "C99 for x86-64, run natively"
    sanitizers = "address and undefined behaviour"
    fabric = False
    cpus: Sequence[str] = tuple(_CPUS)

    def lower(
        self,
        graph: Graph,
        *,
        name: str,
        cpu: str,
        vectors: Sequence[Codes],
        placement: Placement = ANYWHERE,
    ) -> Lowered:
        """Emit the program; pure."""
        flags = (_cpu(cpu)[0], _PIC)
        model = emit.lower(graph, name=name, isa="portable", vectors=vectors, placement=placement)
        around = build.support_files(graph, name=name, family=self.name, flags=flags)
        return replace(model, files={**model.files, **around})

    def runner(
        self, folder: Path, graph: Graph, *, name: str, cpu: str, sanitize: bool = False
    ) -> Runner:
        """Build a shared library; with `sanitize`, a program that stops at the first undefined behaviour."""
        if platform.machine() not in ("x86_64", "AMD64"):
            raise ToolchainMissing("x86 programs run natively, which takes an x86-64 machine")
        toolchain = _toolchain(cpu)
        if not sanitize:
            return run.Library(build.Build(folder, name, toolchain), graph)
        if "ziglang" in toolchain.command:
            raise ToolchainMissing(
                "the sanitizers need gcc or clang: apt-get install gcc libc6-dev"
            )
        return run.Program(build.Build(folder, name, toolchain, build.SANITIZE), graph)

    def certify(self, folder: Path, *, name: str, cpu: str) -> FloatCertificate:
        """Build the model's object and look for floating point in it."""
        model = build.Build(folder, name, _toolchain(cpu)).model
        return certify.inspect(model.read_bytes(), "model.o")

    def footprint(self, folder: Path, *, name: str, cpu: str) -> Footprint:
        """Build the model's object and measure it."""
        return footprint.footprint(build.Build(folder, name, _toolchain(cpu)))

    def missing(self) -> Sequence[str]:
        """What building and running here still needs."""
        try:
            _toolchain("generic")
        except ToolchainMissing as lack:
            return (str(lack),)
        return ()


TARGETS: Mapping[str, Target] = {"x86": X86()}
"""What this family offers."""
