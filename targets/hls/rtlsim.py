"""Running the emitted Verilog in verilator: built once, then images with or without random pauses."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

import numpy as np

from qcompile.errors import QcompileError, ToolchainMissing
from qcompile.ir import Array

from . import verilog
from .pipeline import Pipeline
from .verilog import Vectors

GET_VERILATOR = "install verilator: apt-get install verilator g++ make"
_SECONDS = 3600


@dataclass(frozen=True)
class Run:
    """What came out: codes by output port, the images that were complete, the cycle in which each was."""

    codes: Mapping[str, Array]
    mismatches: int
    cycles: tuple[int, ...]
    images: int

    @property
    def complete(self) -> bool:
        """Did every image come out? Otherwise nothing moved any more."""
        return len(self.cycles) == self.images


def can_simulate() -> bool:
    """Are verilator, make and a C++ compiler here?"""
    return all(shutil.which(tool) for tool in ("verilator", "make", "g++"))


class RtlSim:
    """A simulator of one pipeline's Verilog; `files` stand for emit's where they are given."""

    def __init__(
        self, pipeline: Pipeline, folder: Path, files: Mapping[str, bytes] | None = None
    ) -> None:
        self._pipeline, self._folder = pipeline, folder
        if not can_simulate():
            raise ToolchainMissing(f"the Verilog cannot be simulated here: {GET_VERILATOR}")
        none: dict[str, Array] = {
            p.name: np.zeros((0, *p.shape), p.dtype.numpy) for p in pipeline.inputs
        }
        for name, data in (files or verilog.emit(pipeline, pipeline.name, none)).items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        built = subprocess.run(
            ["make", "-s", "build/sim"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
        if built.returncode:
            raise QcompileError("verilator refuses the Verilog:\n" + built.stderr[-2000:])

    def run(self, vectors: Vectors, seed: int = 0) -> Run:
        """All images, one after the other; a seed other than 0 makes both sides pause at random."""
        p = self._pipeline
        count = len(next(iter(vectors.values())))
        with TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "vectors").mkdir()
            for path, data in verilog.vector_files(p, vectors).items():
                (folder / path).write_bytes(data)
            try:
                subprocess.run(
                    [self._folder.resolve() / "build/sim", folder / "vectors", str(seed)],
                    cwd=self._folder,
                    capture_output=True,
                    check=False,
                    timeout=_SECONDS,
                )
                return self._read(folder / "vectors", count)
            except (OSError, subprocess.TimeoutExpired) as e:
                raise QcompileError(f"the simulation of the Verilog did not end: {e}") from e

    def _read(self, folder: Path, count: int) -> Run:
        cycles = tuple(map(int, (folder / "cycles.txt").read_text().split()))
        codes: dict[str, Array] = {}
        bad = 0
        for k, port in enumerate(self._pipeline.outputs):
            got, want = (
                [int(line, 16) for line in (folder / f"{side}{k}.hex").read_text().split()]
                for side in ("got", "out")
            )
            bad += sum(a != b for a, b in zip(got, want, strict=False)) + len(want) - len(got)
            n = port.stream.words
            rows = [
                port.receive(port.stream.unpack(got[i * n : (i + 1) * n]))
                for i in range(len(cycles))
            ]
            empty = np.zeros((0, *port.shape), port.dtype.numpy)
            codes[port.name] = np.stack(rows) if rows else empty
        return Run(codes, bad, cycles, count)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def icarus(folder: Path, seed: int = 0) -> tuple[int, tuple[int, ...]]:
    """The emitted test bench in Icarus Verilog: how many words differ, and when each image of the first output was out.

    -1 words where they do not all come out.
    """
    if shutil.which("iverilog") is None:
        raise ToolchainMissing("the Verilog cannot be simulated here: apt-get install iverilog")
    made = subprocess.run(
        ["make", "-s", "sim-iverilog", f"SEED={seed}"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    lines = made.stdout.splitlines()
    if not lines:
        raise QcompileError("iverilog refuses the Verilog:\n" + made.stderr[-2000:])
    cycles = tuple(int(x.split()[-1]) for x in lines if x.startswith("out0 "))
    differ = [int(x.split()[0]) for x in lines if "words differ" in x]
    return (differ[0] if differ else -1), cycles
