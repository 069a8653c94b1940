"""FPGA: one pipeline of streaming units as HLS C++ and as Verilog, C-simulated here with g++."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from qcompile.errors import BadInput, ToolchainMissing
from qcompile.ir import Array, Graph
from qcompile.manifest import FOLDING_FILE
from qcompile.target import (
    ANYWHERE,
    Codes,
    Fabric,
    FloatCertificate,
    Footprint,
    Layer,
    Lowered,
    Placement,
    Runner,
    Target,
)

from ..c import build
from . import axi, cplusplus, devices, folding, units, verilog
from .cplusplus_sim import GET_CXX, CSim
from .legalise import legalise
from .pipeline import Pipeline, Port
from .simulation import Simulation
from .token import work

_CPUS = ("any",)
_CPLUSPLUS_FLOAT = re.compile(r"\b(float|double|half|ap_u?fixed)\b")
_FLOATS = {
    ".cpp": _CPLUSPLUS_FLOAT,
    ".h": _CPLUSPLUS_FLOAT,
    ".v": re.compile(r"\b(real|realtime|shortreal)\b"),
}
"""Types that no source of a design may name."""


def _top(name: str) -> str:
    """What the top function and module are called: never a keyword, nor what the libraries and streams are called."""
    return f"{name}_net"


class Hls:
    """HLS C++ and Verilog-2005 of a streaming pipeline; what runs here are its simulations."""

    name = "hls"
    summary = "HLS C++ and Verilog for FPGAs, C-simulated with g++"
    sanitizers = "address and undefined behaviour, of the C simulation"
    fabric = True
    threads = False
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
        """Emit the folders hls/, rtl/ and axi/, and folding.json; pure. Unsupported names the node that has no unit."""
        _known(cpu)
        solved = folding.solve(graph, placement.fabric or Fabric())
        made, device, top = solved.pipeline, solved.device, _top(name)
        images = {p.name: _stacked(p, vectors) for p in made.inputs}
        part = devices.ordered(None if placement.fabric is None else placement.fabric.part, device)
        rtl = verilog.emit(made, top, images, device.nextpnr(solved.clock_mhz))
        folders = {
            "hls": cplusplus.emit(made, top, vectors, part, 1000 / solved.clock_mhz),
            "rtl": rtl,
            "axi": axi.emit(graph, made, top, rtl, part=part, clock_mhz=solved.clock_mhz),
        }
        carried = {s.value: None for s in made.streams.values() if s.value is not None}
        return Lowered(
            files={
                f"{folder}/{path}": data
                for folder, files in folders.items()
                for path, data in files.items()
            }
            | {FOLDING_FILE: solved.folding.dumps().encode()},
            arena_bytes=0,
            weight_bytes=sum(v.type.bytes for v in graph.constants()),
            stored={value: i for i, value in enumerate(carried)},
            fused=[v.name for v in graph.values() if v.name not in carried],
            layers=[
                Layer(op.layer, type(op).__name__, op.name, _macs(op), 0, work(op))
                for op in made.ops
                if not isinstance(op, units.Fork | units.Width)
            ],
            design=solved.design,
        )

    def runner(
        self, folder: Path, graph: Graph, *, name: str, cpu: str, sanitize: bool = False
    ) -> Runner:
        """Build the C simulation; with `sanitize`, one that stops at bad memory and undefined behaviour."""
        _known(cpu)
        if (lack := self.missing()) != ():
            raise ToolchainMissing("; ".join(lack))
        made = _folded(folder, graph)
        options = build.SANITIZE if sanitize else ()
        simulation = CSim(folder / "hls", made, _top(name), options=options)
        _ = simulation.program
        return Simulation(graph, simulation, None if sanitize else folder / "rtl")

    def certify(self, folder: Path, *, name: str, cpu: str) -> FloatCertificate | None:
        """Search every source of the design itself for floating-point types: there are no objects to disassemble."""
        sources = sorted(
            [*folder.glob("hls/firmware/**/*"), *folder.glob("rtl/*.v"), *folder.glob("axi/*.v")]
        )
        lines = [
            (path, number, line)
            for path in sources
            if path.suffix in _FLOATS
            for number, line in enumerate(path.read_text().splitlines(), 1)
        ]
        found = [
            f"{path.name}:{at}: {line.strip()}"
            for path, at, line in lines
            if _FLOATS[path.suffix].search(_code(line))
        ]
        return FloatCertificate(len(lines), found, "lines of C++ and Verilog were searched")

    def footprint(self, folder: Path, *, name: str, cpu: str) -> Footprint | None:
        """None: a design takes no RAM and flash but logic, which synthesis tells."""
        return None

    def missing(self) -> Sequence[str]:
        """What the C simulation needs."""
        return () if build.find("g++", "c++", "clang++") else (f"hls cannot run here: {GET_CXX}",)


def _known(cpu: str) -> None:
    if cpu not in _CPUS:
        raise BadInput(f"hls knows no cpu '{cpu}'; choose one of {', '.join(_CPUS)}")


def _stacked(port: Port, vectors: Sequence[Codes]) -> Array:
    """The rows of all vectors, none where there are none."""
    none = np.zeros((0, *port.shape), port.dtype.numpy)
    return np.concatenate([none, *(codes[port.name] for codes in vectors)])


def _folded(folder: Path, graph: Graph) -> Pipeline:
    """The pipeline that was emitted, by the folding.json beside it."""
    try:
        text = (folder / FOLDING_FILE).read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"cannot read {folder / FOLDING_FILE}: {e}") from e
    found = folding.Folding.loads(text)
    made = legalise(graph, found.layers)
    if found.fifos.keys() != made.fifos.keys():
        raise BadInput(f"{folder / FOLDING_FILE} names other FIFOs than the design has")
    return made.with_depths(found.fifos)


def _code(line: str) -> str:
    """A line without its comment."""
    return line.partition("//")[0]


def _macs(op: units.Op) -> int:
    match op:
        case units.MatrixVector():
            return op.vectors * op.weights.size
        case units.Depthwise():
            return op.output.pixels * op.weights.size
        case _:
            return 0


TARGETS: Mapping[str, Target] = {Hls.name: Hls()}
"""What this family offers."""
