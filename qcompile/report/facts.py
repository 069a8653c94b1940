"""Gather everything a compilation showed into the one dictionary that report.json holds (docs/report.md)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qcompile.checks import Checked, Memory
from qcompile.choose import Choice
from qcompile.integerized import Integerized
from qcompile.ir import Graph, Port, Value
from qcompile.ir.proof import prove
from qcompile.job import Job
from qcompile.target import Buffer, Counts, Design, Lowered
from qcompile.verify import Mismatch

if TYPE_CHECKING:
    from qcompile.analysis.findings import Weight
    from qcompile.data import Dataset
    from qcompile.measure import Histogram, Measured
    from qcompile.plan import QuantPlan

Json = dict[str, object]
VERSION = 1


Mark = Literal["amplifies", "drowns"]


@dataclass(frozen=True, slots=True)
class Finding:
    """A layer that stands out, by how much, and the sentence that says so to a person."""

    kind: Mark
    layer: str
    tensor: str
    times: float
    sentence: str


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
    places = {name: i for i, name in enumerate(rows)}
    entries = {value: port.name for port, value in graph.inputs}
    reads: dict[str, set[int]] = {name: set() for name in rows}
    inputs: dict[str, dict[str, None]] = {name: {} for name in rows}
    for node in graph.nodes:
        for value in node.inputs:
            if value in entries:
                inputs[node.name][entries[value]] = None
            elif value.producer is not None and value.producer.name != node.name:
                reads[node.name].add(places[value.producer.name])
    return [
        {
            "layer": name,
            "operators": list(operators.get(name, [])),
            "integer": ops,
            "kernel": ", ".join(dict.fromkeys(kernels.get(name, []))) or "view",
            "fused": len(operators.get(name, [])) > 1,
            "reads": sorted(reads[name]),
            "inputs": list(inputs[name]),
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
                "sqnr_weights_db": stage.weights.sqnr_db if stage else None,
                "sqnr_fake_quant_db": stage.fake_quant.sqnr_db if stage else None,
                "sqnr_integer_db": stage.integer.sqnr_db if stage else None,
                "clipped_percent": stage.values.clipped_percent if stage else None,
                "zeroed_percent": stage.values.zeroed_percent if stage else None,
                "histogram": histogram(stage.values.histogram() if stage else None),
                "multiplier_error": integerized.multiplier_errors.get(origin.tensor),
            }
        )
    return rows


def histogram(found: Histogram | None) -> Json | None:
    """How often values fall into equal bins from `lo` to `hi`."""
    if found is None:
        return None
    return {"lo": found.lo, "hi": found.hi, "counts": list(found.counts)}


def weights(constants: Sequence[Weight]) -> list[Json]:
    """Every quantized constant: its scales, how well its codes hold it, its biases."""
    return [
        {
            "tensor": w.tensor,
            "layer": w.layer,
            "bits": w.quantizer.format.bits,
            "channels": len(w.quantizer.scale),
            "scale_min": min(w.quantizer.scale),
            "scale_max": max(w.quantizer.scale),
            "sqnr_db": w.error.sqnr_db,
            "clipped_percent": w.values.clipped_percent,
            "zeroed_percent": w.values.zeroed_percent,
            "spread": w.spread,
            "crest": w.crest,
            "bias_bits": w.bias.bits if w.bias else None,
            "bias_saturated": w.bias.saturated if w.bias else None,
            "bias_widened": w.bias.widened if w.bias else None,
            "histogram": histogram(w.values.histogram()),
        }
        for w in constants
    ]


def findings(found: Sequence[Finding]) -> list[Json]:
    """Layers that are out of proportion, the furthest first."""
    return [asdict(f) for f in found]


def accuracy(graph: Graph, measured: Measured) -> Json:
    """How close the outputs are to the float model's."""
    rows: list[Json] = []
    for port, _ in graph.outputs:
        stage = measured.tensors[port.name]
        rows.append(
            {
                "name": port.name,
                "sqnr_weights_db": stage.weights.sqnr_db,
                "sqnr_fake_quant_db": stage.fake_quant.sqnr_db,
                "sqnr_integer_db": stage.integer.sqnr_db,
                "agreement": measured.agreement.get(port.name),
            }
        )
    return {"samples": measured.samples, "outputs": rows}


def certificates(graph: Graph, integerized: Integerized, checked: Checked) -> Json:
    """What is proved or was looked at: accumulators, float instructions, multipliers."""
    errors = integerized.multiplier_errors
    largest = max(errors, key=lambda k: errors[k], default=None)
    proof = checked.no_float
    return {
        "accumulators": [{"layer": p.node, "bound": p.bound, "bits": p.bits} for p in prove(graph)],
        "no_float": {
            "checked": proof is not None,
            "instructions": proof.instructions if proof is not None else 0,
            "basis": proof.basis if proof is not None else None,
            "findings": list(proof.findings) if proof is not None else [],
            "reason": checked.no_float_reason,
        },
        "rescale": {
            "largest_multiplier_error": errors[largest] if largest is not None else 0.0,
            "layer": largest,
        },
    }


def memory(taken: Memory, buffers: Sequence[Buffer]) -> Json:
    """The arena over time; bytes of RAM and flash, null where nothing was built here or the stack has no bound."""
    built = taken.built
    return {
        "arena_bytes": taken.arena,
        "input_bytes": taken.inputs,
        "output_bytes": taken.outputs,
        "weight_bytes": taken.weights,
        "stack_bytes": built.stack if built is not None else None,
        "stack_path": list(built.deepest) if built is not None else [],
        "stack_unbounded": (built.unbounded or None) if built is not None else None,
        "code_bytes": built.code if built is not None else None,
        "constant_bytes": built.constants if built is not None else None,
        "compiler": built.compiler if built is not None else None,
        "ram_bytes": taken.ram,
        "flash_bytes": taken.flash,
        "buffers": [asdict(buffer) for buffer in buffers],
    }


def program(lowered: Lowered, counts: Counts | None) -> Json:
    """The steps of the program in order, with what its cost model predicts and what an emulator counted."""
    executed: Sequence[int | None] = [None] * len(lowered.layers)
    if counts is not None:
        executed = [layer.executed for layer in counts.layers]
    return {
        "bands": lowered.bands,
        "unit": counts.unit if counts is not None else None,
        "executed": counts.total if counts is not None else None,
        "layers": [
            {
                "name": layer.name,
                "kernel": layer.kernel,
                "macs": layer.macs,
                "scratch_bytes": layer.scratch_bytes,
                "predicted": layer.cost if counts is not None else None,
                "executed": count,
            }
            for layer, count in zip(lowered.layers, executed, strict=True)
        ],
    }


def design(made: Design | None) -> Json | None:
    """A design of logic before synthesis, and what was not run; null for a program."""
    if made is None:
        return None
    return {
        **asdict(made),
        "available": dict(made.available),
        "latency_us": made.latency_us,
        "images_per_second": made.images_per_second,
        "not_run": ["Vitis synthesis and co-simulation", "place and route", "a board"],
        "fmax_mhz": None,
    }


def verification(checked: Checked, sanitizers: str) -> Json:
    """What was run and compared, and what was not and why."""
    program, strict = checked.program, checked.sanitized
    return {
        "checked": program is not None,
        "reason": checked.reason,
        "samples": program.samples if program is not None else 0,
        "mismatches": program.mismatches if program is not None else 0,
        "intermediates": program.intermediates if program is not None else 0,
        "sanitized": strict is not None,
        "sanitizers": sanitizers if strict is not None else None,
        "onnx": {"samples": checked.onnx_samples, "mismatches": checked.onnx_mismatches},
        "others": [asdict(other) for other in program.others] if program is not None else [],
        "apart": asdict(program.apart)
        if program is not None and program.apart is not None
        else None,
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


@dataclass(frozen=True, slots=True)
class FloatModel:
    """What a report says of the model it began with: file, digest, opset, nodes, and the operators of each layer."""

    file: str | None
    sha256: str
    opset: int
    nodes: int
    operators: Mapping[str, Sequence[str]]


def gather(
    job: Job,
    model: FloatModel,
    samples: Dataset,
    choice: Choice,
    integerized: Integerized,
    plan: QuantPlan,
    lowered: Lowered,
    checked: Checked,
    measured: Measured,
    constants: Sequence[Weight],
    found: Sequence[Finding],
    warnings: Sequence[str],
) -> Json:
    """The dictionary of report.json."""
    graph = integerized.graph
    layout = job.options.io_layout
    return {
        "version": VERSION,
        "qcompile": metadata.version("qcompile"),
        "model": {
            "name": job.name,
            "file": None if model.file is None else Path(model.file).name,
            "sha256": model.sha256,
            "opset": model.opset,
            "nodes": model.nodes,
            "parameters": sum(v.type.size for v in graph.constants()),
            "macs": sum(layer.macs for layer in lowered.layers),
        },
        "target": {"name": job.target.name, "cpu": job.cpu, "summary": job.target.summary},
        "recipe": {
            "name": job.recipe.name,
            "summary": job.recipe.summary,
            "options": {step.name: dict(step.options) for step in choice.steps},
            "trials": [asdict(trial) for trial in choice.trials],
        },
        "inputs": ports(graph.inputs, layout),
        "outputs": ports(graph.outputs, layout),
        "data": data(job, samples),
        "warnings": list(warnings),
        "findings": findings(found),
        "coverage": coverage(graph, lowered, model.operators),
        "float_operators": [],
        "layers": layers(integerized, plan, lowered, measured),
        "weights": weights(constants),
        "accuracy": accuracy(graph, measured),
        "memory": memory(checked.memory, lowered.buffers),
        "program": program(lowered, checked.counts),
        "design": design(lowered.design),
        "certificates": certificates(graph, integerized, checked),
        "verification": verification(checked, job.target.sanitizers),
        "fused": list(lowered.fused),
        "stored": dict(lowered.stored),
    }


def data(job: Job, samples: Dataset) -> Json:
    """Where the ranges come from; made-up samples are marked."""
    planned = job.options.plan is not None
    return {
        "origin": "plan" if planned else samples.origin,
        "marked": samples.marked and not planned,
        "samples": samples.count,
        "digest": None if planned else samples.digest,
        "read": None if planned else samples.about,
    }


def as_json(facts: Mapping[str, object]) -> bytes:
    """Facts as the text of a JSON file."""
    return (json.dumps(facts, indent=2, allow_nan=False) + "\n").encode()
