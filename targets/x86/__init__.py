"""x86-64: portable C, or C with vectors, for the compiler of this machine."""

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
from ..c.kernel import Kernel
from ..c.kernels import PORTABLE
from . import isa
from .depthwise import Depthwise
from .elementwise import Elementwise
from .gemm import Gemm
from .isa import HERE
from .move import Transpose
from .pool import MaxPool
from .table import Table

_CPUS: Sequence[str] = ("generic", "native", *isa.ISAS)
# As gcc and clang know the generic cpu, and as zig does.
_GENERIC = ("-march=x86-64",)
_GENERIC_ZIG = "-mcpu=x86_64"
# Costs nothing on x86-64, and lets the model be linked into a shared library.
_PIC = "-fPIC"


def _isa(cpu: str) -> isa.Isa | None:
    """The vectors that a cpu has; None where the code is portable."""
    if cpu not in _CPUS:
        raise BadInput(f"x86 knows no cpu '{cpu}'; choose one of {', '.join(_CPUS)}")
    return isa.native() if cpu == "native" else isa.ISAS.get(cpu)


def _emitted(folder: Path, cpu: str) -> isa.Isa | None:
    """The vectors of an emitted program: `native` may have been another machine when it was emitted."""
    known = _isa(cpu)
    if cpu != "native":
        return known
    there = (i for i in isa.ISAS.values() if (folder / i.headers[-1].name).is_file())
    return next(there, known)


def _flags(has: isa.Isa | None) -> tuple[str, ...]:
    return (*(_GENERIC if has is None else has.flags), _PIC)


def _toolchain(has: isa.Isa | None) -> build.Toolchain:
    if (cc := build.find("cc", "gcc", "clang")) is not None:
        return build.Toolchain(cc, _flags(has), link=("-pthread",), shared=("-shared", "-pthread"))
    if (zig := build.find_zig()) is not None:
        cpu = _GENERIC_ZIG if has is None else has.zig
        return build.Toolchain(zig, (cpu, _PIC), shared=("-shared", "-nostdlib"))
    raise ToolchainMissing(f"x86 has no compiler here: {build.GET_CC}")


def _kernels(has: isa.Isa | None, threads: int) -> Sequence[Kernel]:
    if has is None:
        return PORTABLE
    return (
        Gemm(has, threads),
        Depthwise(has, threads),
        MaxPool(has, threads),
        Elementwise(has, threads),
        Table(has),
        Transpose(has),
        *PORTABLE,
    )


class X86:
    """C99 for x86-64, run inside this process."""

    name = "x86"
    summary = "C99 for x86-64, run natively"
    sanitizers = "address and undefined behaviour"
    fabric = False
    threads = True
    cpus: Sequence[str] = _CPUS

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
        has = _isa(cpu)
        if has is None and placement.threads > 1:
            raise BadInput(
                f"--threads needs vectors, and --cpu={cpu} means portable C here, which runs on one processor"
                f" core; choose one of {', '.join(isa.ISAS)}"
            )
        model = emit.lower(
            graph,
            name=name,
            isa="portable" if has is None else has.name,
            vectors=vectors,
            kernels=_kernels(has, placement.threads),
            placement=placement,
            hosted=True,
        )
        peak = (
            {}
            if has is None
            else {
                "isa": has.name,
                "headers": [h.name for h in has.headers],
                "sums": min(12, has.sums),
            }
        )
        around = build.support_files(
            graph,
            name=name,
            family=self.name,
            flags=(*_flags(has), *(("-pthread",) if placement.threads > 1 else ())),
            own=() if has is None else (HERE / "peak.c.j2",),
            facts=peak,
            model=model.files,
        )
        return replace(model, files={**model.files, **around})

    def runner(
        self, folder: Path, graph: Graph, *, name: str, cpu: str, sanitize: bool = False
    ) -> Runner:
        """Build a shared library; with `sanitize`, a program that stops at the first undefined behaviour."""
        if platform.machine() not in ("x86_64", "AMD64"):
            raise ToolchainMissing("x86 programs run natively, which takes an x86-64 machine")
        has = _emitted(folder, cpu)
        if has is not None and (lacks := sorted(has.needs - isa.features())):
            raise ToolchainMissing(
                f"the program is for {has.name}, and this machine's processor lacks {', '.join(lacks)}:"
                " compile for --cpu=native or --cpu=generic"
            )
        toolchain = _toolchain(has)
        if not sanitize:
            return run.Library(build.Build(folder, name, toolchain), graph)
        if "ziglang" in toolchain.command:
            raise ToolchainMissing(
                "the sanitizers need gcc or clang: apt-get install gcc libc6-dev"
            )
        return run.Program(build.Build(folder, name, toolchain, build.SANITIZE), graph)

    def certify(self, folder: Path, *, name: str, cpu: str) -> FloatCertificate:
        """Build the model's object and look for floating point in it."""
        model = build.Build(folder, name, _toolchain(_emitted(folder, cpu))).model
        return certify.inspect(model.read_bytes(), "model.o")

    def footprint(self, folder: Path, *, name: str, cpu: str) -> Footprint:
        """Build the model's object and measure it."""
        return footprint.footprint(build.Build(folder, name, _toolchain(_emitted(folder, cpu))))

    def missing(self) -> Sequence[str]:
        """What building and running here still needs."""
        try:
            _toolchain(None)
        except ToolchainMissing as lack:
            return (str(lack),)
        return ()


TARGETS: Mapping[str, Target] = {"x86": X86()}
"""What this family offers."""
