"""FPGA: one pipeline of streaming units as HLS C++ and as Verilog, C-simulated here with g++."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from qcompile.errors import BadInput, ToolchainMissing
from qcompile.ir import Array, Graph
from qcompile.target import (
    ANYWHERE,
    Codes,
    Counts,
    FloatCertificate,
    Footprint,
    Layer,
    Lowered,
    Piece,
    Placement,
    Runner,
    Target,
)

from ..c import build
from . import cplusplus, units, verilog
from .cplusplus_sim import GET_CXX, CSim
from .legalise import legalise
from .pipeline import Port
from .token import work

_CPUS = ("any",)
_RESERVED = frozenset({"qc", "hls", "bench", "top"})


def _top(name: str) -> str:
    """What the top function and module are called: never what the libraries hold already."""
    return f"{name}_net" if name in _RESERVED else name


class Hls:
    """HLS C++ and Verilog-2005 of a streaming pipeline; `run` is the C simulation under g++."""

    name = "hls"
    summary = "HLS C++ and Verilog for FPGAs, C-simulated with g++"
    sanitizers = "address and undefined behaviour, of the C simulation"
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
        """Emit the folders hls/ and rtl/; pure. Raises Unsupported naming the node that has no unit."""
        _known(cpu)
        made = legalise(graph)
        images = {p.name: _stacked(p, vectors) for p in made.inputs}
        folders = {
            "hls": cplusplus.emit(made, _top(name), vectors),
            "rtl": verilog.emit(made, _top(name), images),
        }
        carried = {s.value: None for s in made.streams.values() if s.value is not None}
        return Lowered(
            files={
                f"{folder}/{path}": data
                for folder, files in folders.items()
                for path, data in files.items()
            },
            arena_bytes=0,
            weight_bytes=sum(v.type.bytes for v in graph.constants()),
            stored={value: i for i, value in enumerate(carried)},
            fused=[v.name for v in graph.values() if v.name not in carried],
            layers=[
                Layer(op.layer, type(op).__name__, op.name, _macs(op), 0, work(op))
                for op in made.ops
                if not isinstance(op, units.Fork | units.Width)
            ],
        )

    def runner(
        self, folder: Path, graph: Graph, *, name: str, cpu: str, sanitize: bool = False
    ) -> Runner:
        """Build the C simulation; with `sanitize`, one that stops at bad memory and undefined behaviour."""
        _known(cpu)
        if (lack := self.missing()) != ():
            raise ToolchainMissing("; ".join(lack))
        options = build.SANITIZE if sanitize else ()
        simulation = CSim(folder / "hls", legalise(graph), _top(name), options=options)
        _ = simulation.program
        return Simulation(graph, simulation)

    def certify(self, folder: Path, *, name: str, cpu: str) -> FloatCertificate | None:
        """None: a design has no object files to disassemble; its types are integers of stated widths."""
        return None

    def footprint(self, folder: Path, *, name: str, cpu: str) -> Footprint | None:
        """None: a design takes no RAM and flash but logic, which synthesis tells."""
        return None

    def missing(self) -> Sequence[str]:
        """What the C simulation needs."""
        return () if build.find("g++", "c++", "clang++") else (f"hls cannot run here: {GET_CXX}",)


@dataclass(frozen=True)
class Simulation:
    """The C simulation as a program."""

    graph: Graph
    simulation: CSim

    @cached_property
    def pieces(self) -> Mapping[str, Piece]:
        """None: a stream carries whole values."""
        return {}

    def run(self, feeds: Codes) -> dict[str, Array]:
        """Codes in, codes out, for any number of rows."""
        return self.simulation.run(self._checked(feeds))

    def trace(self, feeds: Codes) -> dict[str, Array]:
        """Every value of the graph that a stream carries, and the outputs by port name."""
        codes = self._checked(feeds)
        kinds = {v.name: v.type for v in self.graph.values()}
        streams = self.simulation.pipeline.streams
        parts: dict[str, list[Array]] = {}
        rows = len(next(iter(codes.values())))
        for at in range(rows):
            words = self.simulation.trace({name: x[at] for name, x in codes.items()})
            for name, stream in streams.items():
                if stream.value in kinds:
                    kind = kinds[stream.value]
                    flat = words[name].reshape(kind.shape[1:]).astype(kind.dtype.numpy)
                    parts.setdefault(stream.value, [])
                    if len(parts[stream.value]) == at:
                        parts[stream.value].append(flat)
        values = {name: np.stack(found) for name, found in parts.items()}
        return {**self.run(codes), **values}

    def count(self, feeds: Codes) -> Counts:
        """Cycles are the Verilog's: its test bench tells them."""
        raise ToolchainMissing("a C simulation tells no cycles: `make sim` in rtl/ does")

    def _checked(self, feeds: Codes) -> Codes:
        for port in self.simulation.pipeline.inputs:
            x = np.asarray(feeds.get(port.name))
            if x.dtype != port.dtype.numpy or x.shape[1:] != port.shape:
                raise BadInput(
                    f"input {port.name} takes {port.dtype} rows of shape {list(port.shape)},"
                    f" not {x.dtype} of shape {list(x.shape)}"
                )
        return feeds


def _known(cpu: str) -> None:
    if cpu not in _CPUS:
        raise BadInput(f"hls knows no cpu '{cpu}'; choose one of {', '.join(_CPUS)}")


def _stacked(port: Port, vectors: Sequence[Codes]) -> Array:
    """The rows of all vectors, none where there are none."""
    none = np.zeros((0, *port.shape), port.dtype.numpy)
    return np.concatenate([none, *(codes[port.name] for codes in vectors)])


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
