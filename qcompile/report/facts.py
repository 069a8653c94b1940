"""Gather everything a compilation showed into the one dictionary that report.json holds (docs/report.md)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING

from qcompile.ir import Graph, Port, Value
from qcompile.ir.proof import prove
from qcompile.target import FloatCertificate, Lowered
from qcompile.verify import Mismatch, Verification

if TYPE_CHECKING:
    from qcompile.measure import Measured
    from qcompile.passes.integerize import Integerized
    from qcompile.plan import QuantPlan

Json = dict[str, object]
VERSION = 1


def ports(border: Iterable[tuple[Port, Value]], layout: str) -> list[Json]:
    """Inputs or outputs as the C API has them."""
    return [
        {
            "name": port.name,
            "shape": list(value.type.shape),
            "dtype": str(value.type.dtype),
            "scale": port.scale,
            "zero_point": port.zero_point,
            "layout": layout,
        }
        for port, value in border
    ]


def coverage(graph: Graph, lowered: Lowered, operators: Mapping[str, Sequence[str]]) -> list[Json]:
    """Every layer: which float operators it stands for, which integer operators they became, which kernel runs it."""
    kernels: dict[str, list[str]] = {}
    for layer in lowered.layers:
        kernels.setdefault(layer.name, []).append(layer.kernel)
    rows: dict[str, list[str]] = {}
    for node in graph.nodes:
        rows.setdefault(node.name, []).append(type(node.op).__name__)
    return [
        {
            "layer": name,
            "operators": list(operators.get(name, [])),
            "integer": ops,
            "kernel": ", ".join(kernels.get(name, [])) or None,
            "fused": len(ops) > len(kernels.get(name, [])),
        }
        for name, ops in rows.items()
    ]


def layers(
    integerized: Integerized, plan: QuantPlan, lowered: Lowered, measured: Measured
) -> list[Json]:
    """Every rounded tensor with its format and its error after each stage."""
    kernels = {layer.name: layer for layer in lowered.layers}
    rows: list[Json] = []
    for node in integerized.graph.nodes:
        origin = integerized.origins.get(node.output.name)
        q = plan.of(origin.tensor) if origin is not None else None
        if origin is None or q is None or origin.tensor != node.output.name:
            continue
        stage = measured.tensors.get(origin.tensor)
        layer = kernels.get(node.name)
        rows.append(
            {
                "name": node.name,
                "tensor": origin.tensor,
                "kernel": layer.kernel if layer is not None else None,
                "bits": q.format.bits,
                "shape": list(node.output.type.shape),
                "scale": q.scale[0],
                "zero_point": q.zero_point[0],
                "macs": layer.macs if layer is not None else 0,
                "sqnr_fake_quant_db": stage.fake_quant.sqnr_db if stage else None,
                "sqnr_integer_db": stage.integer.sqnr_db if stage else None,
                "clipped_percent": stage.clipped_percent if stage and stage.count else None,
                "multiplier_error": integerized.multiplier_errors.get(origin.tensor),
            }
        )
    return rows


def accuracy(graph: Graph, measured: Measured) -> Json:
    """How close the outputs are to the float model's."""
    rows: list[Json] = []
    for port, _ in graph.outputs:
        stage = measured.tensors[port.name]
        rows.append(
            {
                "name": port.name,
                "sqnr_fake_quant_db": stage.fake_quant.sqnr_db,
                "sqnr_integer_db": stage.integer.sqnr_db,
                "agreement": measured.agreement.get(port.name),
            }
        )
    return {"samples": measured.samples, "outputs": rows}


def certificates(
    graph: Graph, integerized: Integerized, no_float: FloatCertificate | None, reason: str | None
) -> Json:
    """What is proved or was looked at: accumulators, float instructions, multipliers."""
    errors = integerized.multiplier_errors
    largest = max(errors, key=lambda k: errors[k], default=None)
    return {
        "accumulators": [{"layer": p.node, "bound": p.bound, "bits": p.bits} for p in prove(graph)],
        "no_float": {
            "checked": no_float is not None,
            "instructions": no_float.instructions if no_float is not None else 0,
            "findings": list(no_float.findings) if no_float is not None else [],
            "reason": reason,
        },
        "rescale": {
            "largest_multiplier_error": errors[largest] if largest is not None else 0.0,
            "layer": largest,
        },
    }


def verification(
    program: Verification | None, reason: str | None, onnx: tuple[int, int], sanitizers: str | None
) -> Json:
    """What was run and compared, and what was not and why."""
    return {
        "checked": program is not None,
        "reason": reason,
        "samples": program.samples if program is not None else 0,
        "mismatches": program.mismatches if program is not None else 0,
        "intermediates": program.intermediates if program is not None else 0,
        "sanitized": program.sanitized if program is not None else False,
        "sanitizers": sanitizers,
        "onnx": {"samples": onnx[0], "mismatches": onnx[1]},
        "first": mismatch(program.first)
        if program is not None and program.first is not None
        else None,
    }


def mismatch(first: Mismatch) -> Json:
    """One differing element."""
    return {
        "layer": first.layer,
        "value": first.value,
        "row": first.row,
        "index": list(first.index),
        "expected": first.expected,
        "got": first.got,
    }


def head() -> Json:
    """What every report begins with."""
    return {"version": VERSION, "qcompile": metadata.version("qcompile")}
