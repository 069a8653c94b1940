"""x86-64: portable C, or C with vectors, for the compiler of this machine."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from qcompile.errors import BadInput, ToolchainMissing
from qcompile.ir import Graph
from qcompile.options import DISPATCH
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

from ..c import build, certify, footprint, run
from . import dispatch, isa, program, tune

_CPUS: Sequence[str] = ("generic", "native", *isa.ISAS, DISPATCH)


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


def _build(folder: Path, name: str, cpu: str, options: tuple[str, ...] = ()) -> build.Build:
    if cpu == DISPATCH:
        return dispatch.made(folder, name, options)
    return build.Build(folder, name, program.toolchain(_emitted(folder, cpu)), options)


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
        choices: Sequence[build.Choice] = ()
        if cpu == DISPATCH:
            model, choices = dispatch.lower(graph, name=name, vectors=vectors, placement=placement)
        elif has is None and placement.threads > 1:
            raise BadInput(
                f"--threads needs vectors, and --cpu={cpu} means portable C here, which runs on one processor"
                f" core; choose one of {', '.join((*isa.ISAS, DISPATCH))}"
            )
        else:
            model = program.lower(graph, has, name=name, vectors=vectors, placement=placement)
        around = build.support_files(
            graph,
            name=name,
            family=self.name,
            flags=(*program.flags(has), *(("-pthread",) if placement.threads > 1 else ())),
            own=() if has is None else (program.PEAK,),
            facts={} if has is None else program.peak(has),
            model=model.files,
            choices=choices,
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
        if sanitize and "ziglang" in program.toolchain(has).command:
            raise ToolchainMissing(
                "the sanitizers need gcc or clang: apt-get install gcc libc6-dev"
            )
        made = _build(folder, name, cpu, build.SANITIZE if sanitize else ())
        way = run.Program if sanitize else run.Library
        if cpu != DISPATCH:
            return way(made, graph)
        first, *others = dispatch.runnable()
        return way(made, graph, first, others)

    def certify(self, folder: Path, *, name: str, cpu: str) -> FloatCertificate:
        """Build the model's objects and look for floating point in them."""
        made = _build(folder, name, cpu)
        found = [
            certify.inspect(path.read_bytes(), label)
            for path, label in zip(made.models, _labels(made), strict=True)
        ]
        return FloatCertificate(
            sum(f.instructions for f in found), tuple(line for f in found for line in f.findings)
        )

    def footprint(self, folder: Path, *, name: str, cpu: str) -> Footprint:
        """Build the model's objects and measure them."""
        return footprint.footprint(_build(folder, name, cpu))

    def machine(self) -> str:
        """Processor and compiler."""
        return f"{isa.processor()}; {program.toolchain(None).compiler}"

    def tune(
        self, graph: Graph, *, cpu: str, placement: Placement, known: Mapping[str, str]
    ) -> dict[str, str]:
        """The tiles of every program that this machine can run."""
        has = _isa(cpu)
        if cpu == DISPATCH:
            wanted = [one for one in isa.ISAS.values() if one.needs <= isa.features()]
        elif has is None:
            raise BadInput(
                f"--tune is for programs with vectors, and --cpu={cpu} means portable C here; choose one of"
                f" {', '.join((*isa.ISAS, DISPATCH))}"
            )
        else:
            wanted = [has]
        tiles: dict[str, str] = {}
        for one in wanted:
            tiles |= tune.tune(graph, one, placement=placement, known=known)
        return tiles

    def missing(self) -> Sequence[str]:
        """What building and running here still needs."""
        try:
            program.toolchain(None)
        except ToolchainMissing as lack:
            return (str(lack),)
        return ()


def _labels(made: build.Build) -> list[str]:
    """What the objects are called in findings."""
    return ["model.o", *(f"{choice.folder.name}/model.o" for choice in made.choices)]


TARGETS: Mapping[str, Target] = {"x86": X86()}
"""What this family offers."""
