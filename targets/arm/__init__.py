"""AArch64: portable C and NEON dot products, run natively or in the emulator."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from ..c.kernel import Kernel
from ..c.text import HERE
from . import kernels


@dataclass(frozen=True, slots=True)
class _Cpu:
    """A core's instructions beyond armv8-a: what the compiler is told, and the kernels that use them."""

    features: str
    isa: str
    kernels: Sequence[Kernel]
    emulated: str


_PLAIN = ("", "neon", kernels.PLAIN)
_DOTPROD = ("+dotprod", "neon-dotprod", kernels.DOTPROD)
_I8MM = ("+dotprod+i8mm", "neon-i8mm", kernels.I8MM)
# The first is the default: plain armv8-a, which runs everywhere. The emulator does not know all of these cores; it
# has no SVE and no SME on, which no kernel uses.
_CPUS: Mapping[str, _Cpu] = {
    "cortex-a53": _Cpu(*_PLAIN, "cortex-a53"),
    "cortex-a55": _Cpu(*_DOTPROD, "cortex-a76"),
    "cortex-a72": _Cpu(*_PLAIN, "cortex-a72"),
    "cortex-a76": _Cpu(*_DOTPROD, "cortex-a76"),
    "neoverse-n1": _Cpu(*_DOTPROD, "neoverse-n1"),
    "max": _Cpu(*_I8MM, "max,sve=off,sme=off"),
}

_HOST = "host_linux_aarch64.c"


def _cpu(cpu: str) -> _Cpu:
    if cpu not in _CPUS:
        raise BadInput(f"arm knows no cpu '{cpu}'; choose one of {', '.join(_CPUS)}")
    return _CPUS[cpu]


def _flags(cpu: str) -> tuple[str, ...]:
    # The spelling that gcc, clang and zig have in common.
    return (f"-mcpu=generic{_cpu(cpu).features}",)


def _native() -> bool:
    return platform.system() == "Linux" and platform.machine() == "aarch64"


def _compiler() -> tuple[str, ...] | None:
    if _native() and (cc := build.find("cc", "gcc", "clang")) is not None:
        return cc
    if (zig := build.find_zig()) is not None:
        return (*zig, "-target", "aarch64-linux-musl")
    return build.find("aarch64-linux-gnu-gcc")


def _toolchain(cpu: str) -> build.Toolchain:
    """A compiler for `cpu`. Programs bring their own start-up: no C library has to be there or be built first."""
    command = _compiler()
    if command is None:
        raise ToolchainMissing(f"arm has no compiler here: {build.GET_ZIG}")
    return build.Toolchain(
        command,
        (*_flags(cpu), "-fno-stack-protector"),
        link=("-nostdlib", "-static"),
        host=_HOST,
    )


def _emulator() -> tuple[str, ...]:
    if _native():
        return ()
    emulator = build.find("qemu-aarch64", "qemu-aarch64-static")
    if emulator is None:
        raise ToolchainMissing(f"arm programs cannot run here: {build.GET_QEMU}")
    return emulator


class Arm:
    """C99 for AArch64, run natively there and in qemu-aarch64 elsewhere."""

    name = "arm"
    summary = "C99 and NEON for AArch64, run natively or in qemu-aarch64"
    sanitizers = "undefined behaviour, by traps"
    fabric = False
    threads = False
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
        core = _cpu(cpu)
        model = emit.lower(
            graph,
            name=name,
            isa=core.isa,
            vectors=vectors,
            kernels=core.kernels,
            placement=placement,
            hosted=True,
        )
        around = build.support_files(
            graph,
            name=name,
            family=self.name,
            flags=_flags(cpu),
            own=[HERE / _HOST, *build.BARE_LINUX],
            model=model.files,
        )
        return replace(model, files={**model.files, **around})

    def runner(
        self, folder: Path, graph: Graph, *, name: str, cpu: str, sanitize: bool = False
    ) -> Runner:
        """Build a static program; with `sanitize`, one that traps at undefined behaviour."""
        toolchain = _toolchain(cpu)
        emulator = _emulator()

        built = build.Build(
            folder,
            name,
            replace(
                toolchain, emulator=(*emulator, "-cpu", _cpu(cpu).emulated) if emulator else ()
            ),
            build.TRAP if sanitize else (),
        )
        return run.Program(built, graph)

    def certify(self, folder: Path, *, name: str, cpu: str) -> FloatCertificate:
        """Build the model's object and look for floating point in it."""
        model = build.Build(folder, name, _toolchain(cpu)).model
        return certify.inspect(model.read_bytes(), "model.o")

    def footprint(self, folder: Path, *, name: str, cpu: str) -> Footprint:
        """Build the model's object and measure it."""
        return footprint.footprint(build.Build(folder, name, _toolchain(cpu)))

    def missing(self) -> Sequence[str]:
        """What building and running here still needs."""
        lacks: list[str] = []
        for find in (lambda: _toolchain("cortex-a53"), _emulator):
            try:
                find()
            except ToolchainMissing as lack:
                lacks.append(str(lack))
        return lacks


TARGETS: Mapping[str, Target] = {"arm": Arm()}
"""What this family offers."""
