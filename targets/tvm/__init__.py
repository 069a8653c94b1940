"""TVM: the integer graph as a Relax module with integer operators only, built by LLVM and run as a second opinion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

from . import emit
from .objects import Objects
from .package.versions import lacks
from .run import Module

INSTALL = "pip install 'qcompile[tvm]'"

CPUS: Mapping[str, Mapping[str, object]] = {
    "generic": {"kind": "llvm"},
    "native": {"kind": "llvm", "mcpu": "native"},
    "aarch64": {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon"]},
    "cortex-m4": {"kind": "llvm", "mtriple": "thumbv7em-none-eabi", "mcpu": "cortex-m4"},
    "cortex-m55": {"kind": "llvm", "mtriple": "thumbv8.1m.main-none-eabi", "mcpu": "cortex-m55"},
    "hexagon": {"kind": "llvm", "mtriple": "hexagon", "mcpu": "hexagonv68"},
    "riscv64": {"kind": "llvm", "mtriple": "riscv64-unknown-elf", "mattr": ["+m"]},
}
"""Each cpu as TVM calls it."""

_HERE = ("generic", "native")
"""What the machine that builds can run itself."""


def _chip(cpu: str) -> Mapping[str, object]:
    if cpu not in CPUS:
        raise BadInput(f"tvm knows no cpu '{cpu}'; choose one of {', '.join(CPUS)}")
    return CPUS[cpu]


class Tvm:
    """A Python package that builds the graph with TVM; it runs in a process of its own."""

    name = "tvm"
    summary = "a Relax module for TVM, built with LLVM and run here"
    sanitizers = ""
    fabric = False
    threads = False
    cpus: Sequence[str] = tuple(CPUS)

    def lower(
        self,
        graph: Graph,
        *,
        name: str,
        cpu: str,
        vectors: Sequence[Codes],
        placement: Placement = ANYWHERE,
    ) -> Lowered:
        """Emit the package; pure, and without TVM."""
        for flag, given in (
            ("--weights-section", placement.weights_section),
            ("--arena-section", placement.arena_section),
            ("--max-ram", placement.max_ram),
            ("--max-flash", placement.max_flash),
        ):
            if given is not None:
                raise BadInput(f"{flag} is not for {self.name}: TVM places the data")
        return emit.lower(graph, name=name, target=_chip(cpu))

    def runner(
        self, folder: Path, graph: Graph, *, name: str, cpu: str, sanitize: bool = False
    ) -> Runner:
        """Build in a process of its own."""
        _chip(cpu)
        if sanitize:
            raise ToolchainMissing("tvm has no build with sanitizers")
        self._check()
        if cpu not in _HERE:
            raise ToolchainMissing(f"what TVM builds for {cpu} is not run here: take --cpu generic")
        return Module(folder, graph, name)

    def certify(self, folder: Path, *, name: str, cpu: str) -> FloatCertificate | None:
        """Build the objects and look for floating point in them."""
        _chip(cpu)
        self._check()
        return Objects(folder, name).certificate()

    def footprint(self, folder: Path, *, name: str, cpu: str) -> Footprint | None:
        """None: how deep TVM's loops use the stack is not known."""
        return None

    def _check(self) -> None:
        if lack := self.missing():
            raise ToolchainMissing("; ".join(lack))

    def missing(self) -> Sequence[str]:
        """What building and running here still needs."""
        found = lacks()
        return (f"tvm cannot run here: {'; '.join(found)}: {INSTALL}",) if found else ()


TARGETS: Mapping[str, Target] = {Tvm.name: Tvm()}
"""What this family offers."""
