"""A program for one instruction set: which kernels it has and how it is compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from qcompile.errors import ToolchainMissing
from qcompile.ir import Graph
from qcompile.target import Codes, Lowered, Placement

from ..c import build, emit
from ..c.kernel import Kernel
from ..c.kernels import PORTABLE
from . import isa
from .depthwise import Depthwise
from .elementwise import Elementwise
from .gemm import Gemm
from .move import Transpose
from .pool import MaxPool
from .table import Table

PEAK = isa.HERE / "peak.c.j2"
"""Says what a processor does at most."""

# As gcc and clang know the generic cpu, and as zig does.
_GENERIC = ("-march=x86-64",)
_GENERIC_ZIG = "-mcpu=x86_64"
# Costs nothing on x86-64, and lets the model be linked into a shared library.
_PIC = "-fPIC"


def title(has: isa.Isa | None) -> str:
    """What a program is called by its vectors."""
    return "portable" if has is None else has.name


def flags(has: isa.Isa | None) -> tuple[str, ...]:
    """What the compiler needs to know of the processor."""
    return (*(_GENERIC if has is None else has.flags), _PIC)


def toolchain(has: isa.Isa | None) -> build.Toolchain:
    """The compiler of this machine."""
    if (cc := build.find("cc", "gcc", "clang")) is not None:
        return build.Toolchain(cc, flags(has), link=("-pthread",), shared=("-shared", "-pthread"))
    if (zig := build.find_zig()) is not None:
        cpu = _GENERIC_ZIG if has is None else has.zig
        return build.Toolchain(zig, (cpu, _PIC), shared=("-shared", "-nostdlib"))
    raise ToolchainMissing(f"x86 has no compiler here: {build.GET_CC}")


def peak(has: isa.Isa) -> Mapping[str, object]:
    """What the template PEAK asks for."""
    return {
        "isa": has.name,
        "headers": [h.name for h in has.headers],
        "sums": min(12, has.sums),
    }


def lower(
    graph: Graph,
    has: isa.Isa | None,
    *,
    name: str,
    vectors: Sequence[Codes],
    placement: Placement,
) -> Lowered:
    """Emit the program for these vectors, without the files around it; portable code runs on one thread."""
    place = replace(placement, threads=1) if has is None else placement
    return emit.lower(
        graph,
        name=name,
        isa=title(has),
        vectors=vectors,
        kernels=kernels(has, place.threads, place.tiles),
        placement=place,
        hosted=True,
    )


def kernels(
    has: isa.Isa | None, threads: int = 1, tuned: Mapping[str, str] = MappingProxyType({})
) -> Sequence[Kernel]:
    """What computes the layers, `tuned` ones with the tiles of their signatures."""
    if has is None:
        return PORTABLE
    return (
        Gemm(has, threads, tuned),
        Depthwise(has, threads, tuned),
        MaxPool(has, threads),
        Elementwise(has, threads),
        Table(has),
        Transpose(has),
        *PORTABLE,
    )
