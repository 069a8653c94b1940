"""An emitted design as something to run: its C simulation, and beside it the Verilog where verilator is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import mkdtemp

import numpy as np

from qcompile.errors import BadInput, QcompileError, ToolchainMissing
from qcompile.ir import Array, Graph
from qcompile.target import Codes, Counts, Piece, Way

from ..c.build import workspace
from . import token
from .cplusplus_sim import CSim
from .pipeline import Pipeline
from .rtlsim import RtlSim, can_simulate

_CYCLES = 20_000_000
"""What a verification lets the Verilog run for, with and without pauses: seconds to a minute."""
_SEED = 1
_PATHS = (".v", ".mem", "Makefile", "sim.cpp")


@dataclass(frozen=True)
class Simulation:
    """The C simulation as a program; `rtl` is the folder of the Verilog, None where it is left alone."""

    graph: Graph
    simulation: CSim
    rtl: Path | None

    @property
    def pipeline(self) -> Pipeline:
        """What both are made from."""
        return self.simulation.pipeline

    @cached_property
    def pieces(self) -> Mapping[str, Piece]:
        """None: a stream carries whole values."""
        return {}

    @cached_property
    def ways(self) -> Sequence[Way]:
        """The Verilog in verilator, where that is installed: alone and with random pauses on both sides."""
        if self.rtl is None or not can_simulate():
            return ()
        rows = max(1, _CYCLES // max(map(token.work, self.pipeline.ops)))
        return (
            Way("the Verilog in verilator", rows, lambda feeds: self._verilog(feeds, 0)),
            Way("the same with random pauses", rows, lambda feeds: self._verilog(feeds, _SEED)),
        )

    def run(self, feeds: Codes) -> dict[str, Array]:
        """Codes in, codes out, for any number of rows."""
        return self.simulation.run(self._checked(feeds))

    def trace(self, feeds: Codes) -> dict[str, Array]:
        """Every value of the graph that a stream carries, and the outputs by port name."""
        codes = self._checked(feeds)
        kinds = {v.name: v.type for v in self.graph.values()}
        rows = len(next(iter(codes.values())))
        parts: dict[str, list[Array]] = {}
        for at in range(rows):
            words = self.simulation.trace({name: x[at] for name, x in codes.items()})
            for name, stream in self.pipeline.streams.items():
                if stream.value not in kinds:
                    continue
                kind = kinds[stream.value]
                found = parts.setdefault(stream.value, [])
                # the arms of a fork carry the same value
                if len(found) == at:
                    found.append(words[name].reshape(kind.shape[1:]).astype(kind.dtype.numpy))
        values = {name: np.stack(found) for name, found in parts.items()}
        return {**self.run(codes), **values}

    def count(self, feeds: Codes) -> Counts:
        """Refused: the units of a pipeline work at the same time, so that their cycles do not add up."""
        raise ToolchainMissing(
            "the units of a design work at the same time: report.json has its latency and interval in cycles"
        )

    @cached_property
    def _simulator(self) -> RtlSim:
        """The Verilog as it was emitted, built outside its folder."""
        assert self.rtl is not None
        files = {
            str(path.relative_to(self.rtl)): path.read_bytes()
            for path in sorted(self.rtl.rglob("*"))
            if path.name.endswith(_PATHS) and "build" not in path.relative_to(self.rtl).parts
        }
        return RtlSim(self.pipeline, Path(mkdtemp(dir=workspace())), files)

    def _verilog(self, feeds: Codes, seed: int) -> tuple[dict[str, Array], str]:
        """The outputs of the Verilog; without pauses its cycles are those that were predicted."""
        codes = self._checked(feeds)
        rows = len(next(iter(codes.values())))
        done = self._simulator.run(codes, seed)
        if not done.complete:
            raise QcompileError(
                f"the Verilog of {self.simulation.name} stopped after {len(done.cycles)} of {rows} images"
            )
        if seed:
            return dict(done.codes), ""
        predicted = token.simulate(self.pipeline, rows).cycles
        if done.cycles != predicted:
            at = next(
                i for i, (a, b) in enumerate(zip(done.cycles, predicted, strict=True)) if a != b
            )
            raise QcompileError(
                f"image {at} of {self.simulation.name} is out in cycle {done.cycles[at]:,}, "
                f"and {predicted[at]:,} was predicted; this is a defect: please report it"
            )
        return dict(done.codes), "every image in the cycle that was predicted"

    def _checked(self, feeds: Codes) -> Codes:
        for port in self.pipeline.inputs:
            x = np.asarray(feeds.get(port.name))
            if x.dtype != port.dtype.numpy or x.shape[1:] != port.shape:
                raise BadInput(
                    f"input {port.name} takes {port.dtype} rows of shape {list(port.shape)},"
                    f" not {x.dtype} of shape {list(x.shape)}"
                )
        return feeds
