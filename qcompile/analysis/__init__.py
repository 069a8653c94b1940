"""Where a network loses accuracy when it becomes integers, why, and what to do: `qcompile analyze`."""

from __future__ import annotations

import math
import tempfile
from importlib import metadata
from pathlib import Path

from qcompile import checks, driver, folder
from qcompile.analysis.causes import Inquest, as_rows
from qcompile.analysis.findings import Meeting, meetings, weights
from qcompile.analysis.sensitivity import Probe, Sensitivity, leave_one_out, units
from qcompile.checks import Checked
from qcompile.driver import Build
from qcompile.errors import ToolchainMissing
from qcompile.job import Job
from qcompile.measure import Measured
from qcompile.pipeline import Context
from qcompile.plan import QuantPlan
from qcompile.report import facts
from qcompile.report.facts import Json
from qcompile.verify import verify

VERSION = 1


def analyze(job: Job, calibration: object, context: Context, *, rows: int) -> Json:
    """Everything that docs/report.md documents for `analyze`, as one dictionary.

    The model is compiled as `driver.compile` would; then come two runs in onnxruntime for each layer on `rows` samples,
    and a few that try remedies. The program is run where its toolchain is there.
    """
    made = driver.build(job, calibration, context)
    side, graph = made.floats, made.integerized.graph
    checked = _checked(job, made, context)
    context.log("measuring every tensor after each stage")
    measured = driver.measured_on_samples(job, made)
    probe = Probe(side.model, made.data.rows(rows), job.options.threads)
    full = probe.sqnr_db(side.plan)
    found = leave_one_out(probe, side.plan, units(made.integerized, side.plan), full, context.log)
    constants = weights(side.model, made.integerized, side.plan)
    met = meetings(side.model, side.plan, measured)
    inquest = Inquest(job, side, made.data, probe, full, measured, constants, met, context)
    causes = inquest.causes(found)
    return {
        "version": VERSION,
        "qcompile": metadata.version("qcompile"),
        "kind": "analysis",
        "model": {
            "name": job.name,
            "file": None if side.file is None else Path(side.file).name,
            "sha256": side.sha256,
        },
        "target": {"name": job.target.name, "cpu": job.cpu, "summary": job.target.summary},
        "recipe": {"name": job.recipe.name, "summary": job.recipe.summary},
        "outputs": facts.ports(graph.outputs, job.options.io_layout),
        "data": facts.data(job, made.data),
        "warnings": list(context.warnings),
        "findings": facts.findings(made.findings),
        "accuracy": facts.accuracy(graph, measured),
        "causes": as_rows(causes),
        "sensitivity": {
            "samples": probe.samples,
            "sqnr_db": _finite(full),
            "layers": [_sensitive(s) for s in found],
        },
        "inputs": _inputs(made, measured),
        "layers": facts.layers(made.integerized, side.plan, made.lowered, measured),
        "weights": facts.weights(constants),
        "joins": [_meeting(m) for m in met],
        "verification": facts.verification(checked, job.target.sanitizers),
        "stored": dict(made.lowered.stored),
    }


def _checked(job: Job, made: Build, context: Context) -> Checked:
    """The program compared with the integer graph; where its toolchain is missing, why it was not."""
    graph, o = made.integerized.graph, job.options
    rows = max(o.verify_samples, 1)
    unbuilt = checks.Memory.of(graph, made.lowered, None)
    with tempfile.TemporaryDirectory(prefix="qcompile-") as scratch:
        place = Path(scratch)
        folder.write(place, made.files)
        try:
            runner = job.target.runner(place, graph, name=job.name, cpu=job.cpu)
            batches = checks.batches(job, graph, made.data, rows)
            program = verify(graph, runner, batches, trace=max(o.trace_samples, 1))
        except ToolchainMissing as e:
            if o.require_verified:
                raise
            context.warn(f"the program was not run here: {e}")
            return Checked(None, None, str(e), 0, 0, None, str(e), unbuilt, None)
    context.log(
        f"{job.target.name} program: {program.samples} samples, {program.mismatches} mismatches"
    )
    return Checked(program, None, None, 0, 0, None, None, unbuilt, None)


def _inputs(made: Build, measured: Measured) -> list[Json]:
    rows: list[Json] = []
    plan: QuantPlan = made.floats.plan
    for port, value in made.integerized.graph.inputs:
        q, stages = plan.of(port.name), measured.tensors.get(port.name)
        if q is None:
            continue
        seen = stages.values if stages is not None else None
        rows.append(
            {
                "tensor": port.name,
                "bits": q.format.bits,
                "shape": list(value.type.shape),
                "scale": q.scale[0],
                "zero_point": q.zero_point[0],
                "clipped_percent": seen.clipped_percent if seen else None,
                "zeroed_percent": seen.zeroed_percent if seen else None,
                "histogram": facts.histogram(seen.histogram() if seen else None),
            }
        )
    return rows


def _sensitive(s: Sensitivity) -> Json:
    return {
        "layer": s.unit.layer,
        "tensors": list(s.unit.slots),
        "alone_db": _finite(s.alone_db),
        "gain_db": _finite(s.gain_db),
    }


def _meeting(m: Meeting) -> Json:
    return {
        "node": m.node,
        "operation": m.operation,
        "operand": m.operand,
        "result": m.result,
        "ratio": m.ratio,
        "lost_percent": m.lost_percent,
    }


def _finite(ratio: float) -> float | None:
    """None for what has no noise at all."""
    return ratio if math.isfinite(ratio) else None
