"""What the caller of an emitted program sees: model.h, and the vectors of its self-test."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qcompile.ir import Graph, Port, TensorType, Value
from qcompile.target import Codes, Placement

from .text import c_string, c_type, layout, numbers, render


@dataclass(frozen=True, slots=True)
class Interface:
    """How `name`_run is called and what it takes; `isa` says for which instructions it was made.

    `stored` values are traced. Where there are `isas`, it chooses among a program for each of these instruction sets.
    """

    graph: Graph
    name: str
    isa: str
    arena: int
    align: int
    threads: int
    stored: int
    weight_bytes: int
    placement: Placement
    isas: Sequence[str] = ()

    @property
    def facts(self) -> Mapping[str, object]:
        """What the templates of a program ask for."""
        return {
            "name": self.name,
            "NAME": self.name.upper(),
            "isa": self.isa,
            "inputs": [_port("INPUT", i, p, v) for i, (p, v) in enumerate(self.graph.inputs)],
            "outputs": [_port("OUTPUT", i, p, v) for i, (p, v) in enumerate(self.graph.outputs)],
            "signature": self._signature(),
            "arena": self.arena,
            "align": self.align,
            "threads": self.threads,
            "stored": self.stored,
            "weight_bytes": self.weight_bytes,
            "weights_section": self.placement.weights_section,
            "arena_section": self.placement.arena_section,
            "isas": self.isas,
        }

    def header(self) -> bytes:
        """The content of model.h."""
        return layout(render("model.h.j2", **self.facts)).encode()

    def vectors(self, rows: Sequence[Codes]) -> bytes:
        """The content of vectors.h: these rows and what the graph makes of them."""
        expected = [self.graph.run(row) for row in rows]
        tables = [
            {
                "type": c_type(value.type.dtype),
                "name": f"{self.name}_vector_{role}_{i}",
                "size": value.type.size,
                "rows": [numbers(row[port.name]) for row in codes] or ["0"],
            }
            for role, ports, codes in (
                ("input", self.graph.inputs, rows),
                ("output", self.graph.outputs, expected),
            )
            for i, (port, value) in enumerate(ports)
        ]
        text = render("vectors.h.j2", **self.facts, count=len(rows), tables=tables)
        return layout(text).encode()

    def _signature(self) -> str:
        ports = [
            *(
                f"const {c_type(v.type.dtype)} *input{i}"
                for i, (_, v) in enumerate(self.graph.inputs)
            ),
            *(f"{c_type(v.type.dtype)} *output{i}" for i, (_, v) in enumerate(self.graph.outputs)),
        ]
        return f"int {self.name}_run({', '.join(ports)}, void *arena)"


def _port(role: str, at: int, port: Port, value: Value) -> Mapping[str, object]:
    kind: TensorType = value.type
    scale = f"{np.float32(port.scale):.9g}"
    return {
        "macro": f"{role}_{at}",
        "pointer": f"{role.lower()}{at}",
        "name": c_string(port.name),
        "type": c_type(kind.dtype),
        "size": kind.size,
        "bytes": kind.bytes,
        "rank": len(kind.shape),
        "shape": ", ".join(map(str, kind.shape)),
        "scale": scale + ("f" if re.search(r"[.e]", scale) else ".0f"),
        "zero": port.zero_point if port.zero_point >= 0 else f"({port.zero_point})",
        "bits": kind.dtype.bits,
        "signed": int(kind.dtype.signed),
    }
