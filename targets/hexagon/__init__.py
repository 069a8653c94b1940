"""Hexagon: C with the vectors of HVX, run in qemu-hexagon."""

from __future__ import annotations

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
from . import hvx

_HERE = Path(__file__).parent
_HOST = "host_linux_hexagon.c"
_FILES = (_HOST, "Makefile.j2", "CMakeLists.txt.j2")

# Of each cpu, the version of its vectors; the first is the default. The emulator knows no later instructions than
# v67's, and runs what is built for v68 as that.
_CPUS: Mapping[str, str] = {"hexagonv66": "v66", "hexagonv67": "v67", "hexagonv68": "v68"}
_EMULATED = "v67"


def _version(cpu: str) -> str:
    if cpu not in _CPUS:
        raise BadInput(f"hexagon knows no cpu '{cpu}'; choose one of {', '.join(_CPUS)}")
    return _CPUS[cpu]


def _flags(cpu: str) -> tuple[str, ...]:
    """As clang and the compiler of the Hexagon SDK spell them."""
    return (f"-m{_version(cpu)}", "-mhvx", "-mhvx-length=128b")


def _zig(cpu: str) -> tuple[str, ...]:
    """As zig spells them."""
    version = _version(cpu)
    chip = f"-mcpu=hexagon{version}+hvx_length128b+hvx{version}"
    return ("-target", "hexagon-freestanding-none", chip)


def _toolchain(cpu: str) -> build.Toolchain:
    """A compiler for `cpu`. Programs bring their own start-up: no C library has to be there or be built first."""
    if (zig := build.find_zig()) is not None:
        command = (*zig, *_zig(cpu))
        return build.Toolchain(command, (), link=("-nostdlib", "-static"), host=_HOST)
    clang, linker = build.find("clang-19", "clang"), build.find("ld.lld-19", "ld.lld")
    if clang is None or linker is None:
        raise ToolchainMissing(f"hexagon has no compiler here: {build.GET_ZIG}")
    command = (*clang, "--target=hexagon-unknown-linux-musl")
    return build.Toolchain(
        command,
        (*_flags(cpu), "-ffreestanding", "-fno-stack-protector"),
        link=("-nostdlib", "-static", "-fuse-ld=lld", f"--ld-path={linker[0]}"),
        host=_HOST,
    )


def _emulator() -> tuple[str, ...]:
    found = build.find("qemu-hexagon", "qemu-hexagon-static")
    if found is None:
        raise ToolchainMissing(f"hexagon programs cannot run here: {build.GET_QEMU}")
    return (*found, "-cpu", _EMULATED)


class Hexagon:
    """C99 and HVX intrinsics, run in qemu-hexagon."""

    name = "hexagon"
    summary = "C99 and HVX (128-byte vectors) for Hexagon DSPs, run in qemu-hexagon"
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
        flags = _flags(cpu)
        model = emit.lower(
            graph,
            name=name,
            isa="hvx",
            vectors=vectors,
            kernels=hvx.KERNELS,
            placement=placement,
        )
        around = build.support_files(
            graph,
            name=name,
            family=self.name,
            flags=flags,
            own=[*(_HERE / f for f in _FILES), *build.BARE_LINUX],
            without=("bench.c", "profile.c", "host_posix.c"),
            facts={"zig": _zig(cpu), "emulated": _EMULATED},
        )
        return replace(model, files={**model.files, **around})

    def runner(
        self, folder: Path, graph: Graph, *, name: str, cpu: str, sanitize: bool = False
    ) -> Runner:
        """Build a static program; with `sanitize`, one that traps at undefined behaviour."""
        toolchain = replace(_toolchain(cpu), emulator=_emulator())

        options = build.TRAP if sanitize else ()
        return run.Program(build.Build(folder, name, toolchain, options), graph)

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
        for find in (lambda: _toolchain(self.cpus[0]), _emulator):
            try:
                find()
            except ToolchainMissing as lack:
                lacks.append(str(lack))
        return lacks


TARGETS: Mapping[str, Target] = {Hexagon.name: Hexagon()}
"""The targets of this family by name."""
