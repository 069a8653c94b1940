"""A network as a Relax module: built with LLVM inside this process and run here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO
from zipfile import ZipFile

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from . import loops
from .operators import Array, Operators

CONSTANTS_FILE = "constants.npz"


@dataclass(frozen=True)
class Port:
    """An input or output: its name in the model, element type and shape, rows of one call first."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of one call."""
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape))


@dataclass(frozen=True)
class Network:
    """What a generated network.py describes; `graph` appends its operators and returns the outputs.

    `target` is how TVM calls the chip; its `mcpu` "native" is the processor that builds.
    """

    name: str
    target: Mapping[str, object]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    graph: Callable[..., Sequence[relax.Expr]]

    @cached_property
    def constants(self) -> Mapping[str, Array]:
        """Weights, tables and rescaling parameters by name."""
        with np.load(Path(__file__).parent / CONSTANTS_FILE, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}

    def module(self, trace: bool = False) -> tvm.IRModule:
        """The Relax module, whose `main` returns the outputs; with `trace`, every operator's result after them."""
        builder = relax.BlockBuilder()
        given = [
            relax.Var(f"x{i}", relax.TensorType(p.shape, p.dtype))
            for i, p in enumerate(self.inputs)
        ]
        with builder.function("main", given):
            with builder.dataflow():
                operators = Operators(builder, self.constants)
                results = list(self.graph(operators, *given))
                if trace:
                    results += operators.made
                returned = builder.emit_output(relax.Tuple(results))
            builder.emit_func_output(returned)
        return builder.get()

    def chip(self) -> tvm.target.Target:
        """The target for TVM's code generators."""
        settings = dict(self.target)
        if settings.get("mcpu") == "native":
            settings["mcpu"] = tvm.target.codegen.llvm_get_system_cpu()
        return tvm.target.Target(settings)


class Program:
    """A built network: arrays in, arrays out."""

    def __init__(self, network: Network, *, trace: bool = False) -> None:
        built = loops.executable(network.module(trace), network.chip())
        self._main = relax.VirtualMachine(built, tvm.cpu())["main"]

    def __call__(self, *inputs: Array) -> list[NDArray[np.generic]]:
        """The outputs of one call, and what is traced after them."""
        results = self._main(*(tvm.runtime.tensor(np.ascontiguousarray(x)) for x in inputs))
        return [y.numpy() for y in results]


def run(network: Network, given: Path, written: Path) -> None:
    """Run every row of an .npz file of codes by input name, and write the outputs' codes to another."""
    program = Program(network)
    with np.load(given, allow_pickle=False) as file:
        codes = [np.asarray(file[p.name], p.dtype) for p in network.inputs]
    calls = [x.reshape(-1, *p.shape) for x, p in zip(codes, network.inputs, strict=True)]
    results = [program(*row) for row in zip(*calls, strict=True)]
    with ZipFile(written, "w") as archive:
        for i, p in enumerate(network.outputs):
            with archive.open(f"{p.name}.npy", "w") as member:
                np.save(member, np.concatenate([row[i] for row in results]), allow_pickle=False)


def serve(network: Network, requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer `run N` or `trace N`, a line before the inputs of N calls, with the bytes of what these calls give."""
    programs: dict[str, Program] = {}
    size = sum(p.bytes for p in network.inputs)
    while words := requests.readline().split():
        kind, calls = words[0].decode(), int(words[1])
        if kind not in programs:
            programs[kind] = Program(network, trace=kind == "trace")
        data = requests.read(calls * size)
        for at in range(calls):
            for y in programs[kind](*_inputs(network, data[at * size : (at + 1) * size])):
                answers.write(np.ascontiguousarray(y).tobytes())
            answers.flush()


def _inputs(network: Network, data: bytes) -> list[Array]:
    arrays, at = [], 0
    for p in network.inputs:
        flat = np.frombuffer(data[at : at + p.bytes], p.dtype)
        arrays.append(flat.reshape(p.shape))
        at += p.bytes
    return arrays
