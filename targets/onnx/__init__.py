"""ONNX files as products: `onnx` is the integer graph in standard operators, `qdq` the float model with its roundings.

Every artifact has both files; here one of them is what ships, so onnxruntime runs that very file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from qcompile.errors import BadInput, ToolchainMissing
from qcompile.ir import BatchMatMul, Conv, Graph, MatMul, Mul, Node
from qcompile.target import (
    ANYWHERE,
    Codes,
    FloatCertificate,
    Footprint,
    Layer,
    Lowered,
    Placement,
    Runner,
    Target,
)

from .floats import certify
from .integers import IntegerFile
from .rounded import RoundedFile

_CPUS = ("any",)
_INTEGER, _ROUNDED = "integer.onnx", "qdq.onnx"


@dataclass(frozen=True, slots=True)
class OnnxFile:
    """A target whose product is one ONNX file, which any onnxruntime runs on any processor."""

    name: str
    summary: str
    sanitizers: str
    fabric: bool = False
    threads: bool = False
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
        """Emit the integer graph's file; the float model's is made of model and plan, beside every program. Pure."""
        self._check(cpu)
        for flag, given in (
            ("--weights-section", placement.weights_section),
            ("--arena-section", placement.arena_section),
            ("--max-ram", placement.max_ram),
            ("--max-flash", placement.max_flash),
        ):
            if given is not None:
                raise BadInput(f"{flag} is not for {self.name}: onnxruntime places the data")
        files: dict[str, bytes] = {}
        if self.name == "onnx":
            from qcompile.onnx import integer, weights

            files[_INTEGER] = b"".join(weights.streamed(*integer.written(graph)))
        return Lowered(
            files=files,
            arena_bytes=0,
            weight_bytes=sum(v.type.bytes for v in graph.constants()),
            stored={node.output.name: i for i, node in enumerate(graph.nodes)} if files else {},
            fused=(),
            layers=_layers(graph),
        )

    def runner(
        self, folder: Path, graph: Graph, *, name: str, cpu: str, sanitize: bool = False
    ) -> Runner:
        """The file in onnxruntime; with `sanitize`, without its optimizations."""
        self._check(cpu)
        if self.name == "onnx":
            return IntegerFile(folder / _INTEGER, graph, optimized=not sanitize)
        if sanitize:
            raise ToolchainMissing("qdq has no build with sanitizers: nothing is built")
        return RoundedFile(folder / _ROUNDED, graph)

    def certify(self, folder: Path, *, name: str, cpu: str) -> FloatCertificate | None:
        """Search the integer graph's file for floats; None for the other, which is full of them."""
        return certify(folder / _INTEGER) if self.name == "onnx" else None

    def footprint(self, folder: Path, *, name: str, cpu: str) -> Footprint | None:
        """None: there are no objects."""
        return None

    def missing(self) -> Sequence[str]:
        """Nothing: onnxruntime comes with qcompile."""
        return ()

    def _check(self, cpu: str) -> None:
        if cpu not in _CPUS:
            raise BadInput(f"{self.name} knows no cpu '{cpu}'; choose one of {', '.join(_CPUS)}")


def _layers(graph: Graph) -> list[Layer]:
    """The layers of the model, each with its integer operators in order."""
    nodes: dict[str, list[Node]] = {}
    for node in graph.nodes:
        nodes.setdefault(node.name, []).append(node)
    return [
        Layer(
            name, " and ".join(type(n.op).__name__ for n in held), name, sum(map(_macs, held)), 0, 0
        )
        for name, held in nodes.items()
    ]


def _macs(node: Node) -> int:
    """Multiply-accumulates of one operator."""
    size = node.output.type.size
    match node.op:
        case Conv() | MatMul():
            return size * prod(node.inputs[1].type.shape[1:])
        case BatchMatMul():
            return size * node.inputs[0].type.shape[-1]
        case Mul():
            return size
        case _:
            return 0


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        OnnxFile(
            "onnx",
            "integer.onnx: the integer graph in standard operators, run in onnxruntime",
            "wrong optimizations, by running without them",
        ),
        OnnxFile(
            "qdq",
            "qdq.onnx: the float model with its roundings, run in onnxruntime, near the integer graph",
            "",
        ),
    )
}
"""What this family offers."""
