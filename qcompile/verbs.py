"""What can be asked besides compiling: look at a model, quantize only, evaluate, reproduce, list what there is."""

from __future__ import annotations

import math
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qcompile import border, driver, folder, manifest, pipeline, recipe
from qcompile import plan as plans
from qcompile import target as targets_
from qcompile.artifact import REPORT_FILE, Artifact, load
from qcompile.data import InputSpec, open_data
from qcompile.driver import Log, silent
from qcompile.errors import BadInput
from qcompile.job import Job, Model, sha256_of
from qcompile.manifest import Reproduction
from qcompile.options import Options
from qcompile.verify import Verification

METRICS = ("top1",)
PAGE_FILE = "report.html"


def inspect(model: Model, *, input_dims: Mapping[str, int] | None = None) -> dict[str, object]:
    """What a model is to qcompile: size, operators, what has no integer form and why, where it is rounded."""
    context = pipeline.Context()
    floats, plan, failed = driver.examine(model, input_dims or {}, context)
    nodes = list(floats.graph)
    counted = Counter(f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in nodes)
    return {
        "inputs": [
            {"name": s.name, "shape": list(s.shape), "dtype": str(s.dtype)}
            for s in driver.specs(floats)
        ],
        "outputs": [
            {
                "name": str(v.name),
                "shape": [
                    d if isinstance(d, int) else None for d in (v.shape.dims if v.shape else ())
                ],
            }
            for v in floats.graph.outputs
        ],
        "nodes": len(nodes),
        "operators": dict(sorted(counted.items())),
        "parameters": sum(
            math.prod(v.shape.numpy())
            for v in floats.graph.initializers.values()
            if v.shape is not None
        ),
        "unsupported": [{"node": n, "operator": op, "reason": why} for n, op, why in failed],
        "slots": [
            {
                "tensor": s.tensor,
                "kind": s.kind.value,
                "format": str(s.format),
                "members": list(s.members),
            }
            for s in plan.slots.values()
        ],
        "warnings": list(context.warnings),
    }


def quantize(
    model: Model,
    calibration: object,
    output: str | os.PathLike[str],
    recipe: str | os.PathLike[str] = "default",
    input_dims: Mapping[str, int] | None = None,
    options: Options | None = None,
    *,
    force: bool = False,
    log: Log = silent,
) -> Path:
    """Write the QDQ model (`qdq.onnx`) and the plan (`plan.toml`) to a folder, without any target."""
    from qcompile.onnx import qdq, weights

    job = Job.checked(model, "x86", recipe, output, input_dims or {}, options or Options())
    folder.check(job.output, force)
    context = pipeline.Context(seed=job.options.seed, log=log)
    side = driver.prepare(job, context)
    data = driver.open_samples(job, side, calibration, context)
    driver.calibrate(job, side, data, context)
    context.store.clear()
    with folder.staged(job.output) as place:
        files = folder.Contents(plans.files(side.plan))
        files.put("qdq.onnx", weights.streamed(*qdq.written(side.model, side.plan)))
        folder.write(place, files)
        folder.publish(place, job.output)
    return job.output


def analyze(
    model: Model,
    target: str = "x86",
    calibration: object = None,
    recipe: str | os.PathLike[str] = "default",
    output: str | os.PathLike[str] | None = None,
    input_dims: Mapping[str, int] | None = None,
    options: Options | None = None,
    *,
    rows: int = driver.ACCURACY_SAMPLES,
    force: bool = False,
    log: Log = silent,
) -> dict[str, object]:
    """Where a network loses accuracy as integers, why and what to do; with `output`, also a folder with the report."""
    from qcompile import analysis
    from qcompile.report import facts, html

    job = Job.checked(model, target, recipe, output, input_dims or {}, options or Options())
    if output is not None and not (force and _only_reports(job.output)):
        folder.check(job.output, force)
    found = analysis.analyze(
        job,
        calibration,
        pipeline.Context(seed=job.options.seed, log=log, resumable=False),
        rows=rows,
    )
    if output is not None:
        with folder.staged(job.output) as place:
            written = {
                REPORT_FILE: facts.as_json(found),
                PAGE_FILE: html.render_analysis(found).encode(),
            }
            folder.write(place, written)
            folder.publish(place, job.output)
    return found


def _only_reports(place: Path) -> bool:
    """Is this the folder of an analysis?"""
    return place.is_dir() and {f.name for f in place.iterdir()} == {REPORT_FILE, PAGE_FILE}


def evaluate(
    compiled: str | os.PathLike[str],
    data: object,
    *,
    model: Model | None = None,
    samples: int | None = None,
) -> dict[str, object]:
    """Metric (where labels are), agreement and SQNR of a compiled program against the float model it came from."""
    from qcompile.onnx.execute import FloatSession

    artifact = load(compiled)
    nhwc = _channels_last(artifact)
    encodings = manifest.options_of(artifact.manifest, None).encodings
    source, _ = driver.read_model(_original(artifact.manifest, model), encodings)
    floats = driver.open_model(source, _dims_of(artifact.manifest), pipeline.Context())
    dataset = open_data(data, driver.specs(floats), samples=samples)
    if dataset.metric is not None:
        recipe.one_of(dataset.metric, METRICS, "the data set's metric")
    outputs = [port.name for port, _ in artifact.graph.outputs]
    session = FloatSession(floats, outputs)
    real: dict[str, list[NDArray[np.generic]]] = {name: [] for name in outputs}
    mine: dict[str, list[NDArray[np.generic]]] = {name: [] for name in outputs}
    for given in dataset:
        batch = border.whole(artifact.graph, given)
        if not all(len(x) for x in batch.values()):
            continue
        f = session.run(batch)
        q = (
            border.to_channels_first(artifact.run(border.to_channels_last(batch)))
            if nhwc
            else artifact.run(batch)
        )
        for name in outputs:
            real[name].append(border.end_to_end(f[name], q[name]))
            mine[name].append(q[name])
    rows: list[dict[str, object]] = []
    for name in outputs:
        a = np.concatenate(real[name]).astype(np.float64)
        b = np.concatenate(mine[name]).astype(np.float64)
        noise, signal = float(np.square(a - b).sum()), float(np.square(a).sum())
        row: dict[str, object] = {
            "name": name,
            "samples": len(a),
            "sqnr_db": float(10 * np.log10(signal / noise)) if noise > 0 and signal > 0 else None,
            "agreement": float((a.argmax(-1) == b.argmax(-1)).mean()),
        }
        if dataset.labels is not None and dataset.metric == "top1" and a.ndim == 2:
            truth = dataset.labels[: len(a)]
            before, after = (
                float((a.argmax(-1) == truth).mean()),
                float((b.argmax(-1) == truth).mean()),
            )
            row |= {
                "metric": "top1",
                "float": before,
                "integer": after,
                "delta_points": 100 * (after - before),
            }
        rows.append(row)
    return {
        "outputs": rows,
        "samples": dataset.count,
        "origin": dataset.origin,
        "marked": dataset.marked,
    }


def _dims_of(data: Mapping[str, object]) -> dict[str, int]:
    about = data.get("model")
    dims = about.get("input_dims", {}) if isinstance(about, dict) else {}
    return {str(k): int(v) for k, v in dims.items()} if isinstance(dims, dict) else {}


def _original(data: Mapping[str, object], given: Model | None) -> Model:
    """The float model a folder was compiled from; BadInput if it is gone or another one."""
    about = data["model"]
    assert isinstance(about, dict)
    source = given if given is not None else about.get("file")
    if source is None or (not isinstance(source, bytes) and not Path(source).is_file()):
        what = "it was compiled from bytes" if source is None else f"{source} is not there"
        raise BadInput(f"the float model is needed and {what}; name it with --model")
    if sha256_of(source) != about.get("sha256"):
        shown = "the given model" if isinstance(source, bytes) else str(source)
        raise BadInput(f"{shown} is not the model this was compiled from (its sha256 differs)")
    checked: Model = source
    return checked


def reproduce(
    path: str | os.PathLike[str],
    *,
    model: Model | None = None,
    calibration: object = None,
    log: Log = silent,
) -> Reproduction:
    """Compile again from a manifest, by its plan or (with `calibration`) by the data; compare every hashed file."""
    file = Path(path)
    data = manifest.read(file)
    source = _original(data, model)
    plan = file.parent / "plan.toml" if calibration is None else None
    recorded = data["recipe"]
    assert isinstance(recorded, dict)
    recorded_options = manifest.options_of(data, plan)
    followed = None if recorded_options.folding is None else file.parent / manifest.FOLDING_FILE
    with tempfile.TemporaryDirectory(prefix="qcompile-") as scratch:
        again = Path(scratch) / "again"
        tune = None
        if recorded_options.tune is not None:
            # what a changed file lacks would be measured and added to it
            tune = folder.copy(file.parent / manifest.TUNING_FILE, Path(scratch))
        options = replace(
            recorded_options,
            name=str(data["name"]),
            cpu=str(data["cpu"]),
            features=None,
            folding=followed,
            tune=tune,
        )
        job = Job.checked(
            source,
            str(data["target"]),
            str(recorded["name"]),
            again,
            _dims_of(data),
            options,
        )
        if manifest.sha256(repr(job.recipe).encode()) != recorded.get("sha256"):
            raise BadInput(
                f"the recipe {job.recipe.name} is not the one the manifest was made with"
            )
        context = pipeline.Context(seed=options.seed, log=log, resumable=False)
        made = driver.build(job, calibration, context)
        folder.write(again, made.files)
        return manifest.compare(data, again)


def verify(
    compiled: str | os.PathLike[str],
    data: object,
    *,
    samples: int | None = None,
    seed: int = 0,
    trace: int = 2,
    sanitize: bool = False,
) -> tuple[Verification, str]:
    """Compare a compiled program with its integer graph, on data in the model's layout; also the data's origin."""
    artifact = load(compiled)
    nhwc = _channels_last(artifact)
    specs = []
    for port, value in artifact.graph.inputs:
        shape = value.type.shape[1:]
        shape = (shape[-1], *shape[:-1]) if nhwc and len(shape) > 1 else shape
        specs.append(InputSpec(port.name, (None, *shape), np.dtype(np.float32)))
    opened = open_data(data, specs, samples=samples, seed=seed)
    cut = (border.whole(artifact.graph, b) for b in opened)
    batches = (
        border.to_channels_last(b) if nhwc else b for b in cut if all(len(x) for x in b.values())
    )
    return artifact.verify(batches, sanitize=sanitize, trace=trace), opened.origin


def _channels_last(artifact: Artifact) -> bool:
    options = artifact.manifest.get("options")
    return isinstance(options, dict) and options.get("io_layout") == "nhwc"


def doctor() -> list[tuple[str, Sequence[str]]]:
    """For every target, what is missing to build and run it here."""
    return [(name, targets_.get(name).missing()) for name in targets_.names()]


def targets() -> list[tuple[str, str, Sequence[str]]]:
    """Every target: name, summary, what --cpu takes (the first is the default)."""
    found = [targets_.get(name) for name in targets_.names()]
    return [(t.name, t.summary, t.cpus) for t in found]


def recipes() -> list[tuple[str, str]]:
    """Every shipped recipe and what it does."""
    return [(name, recipe.load(name).summary) for name in recipe.names()]
