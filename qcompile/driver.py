"""The story of one compilation, top to bottom; then the other verbs.

Only this file knows passes and targets by name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qcompile import border, manifest, pipeline, recipe
from qcompile import plan as plans
from qcompile import target as targets_
from qcompile.artifact import MANIFEST_FILE, REPORT_FILE, ROWS, Artifact, load, write_graph
from qcompile.errors import AccuracyGate, BadInput, ToolchainMissing, VerificationMismatch
from qcompile.formats import Int, parse_format
from qcompile.ir import Array, DType, Graph
from qcompile.manifest import Reproduction
from qcompile.options import Options
from qcompile.plan import QuantPlan
from qcompile.recipe import Recipe
from qcompile.target import FloatCertificate, Lowered, Target
from qcompile.verify import Verification, verify

if TYPE_CHECKING:
    import onnx
    import onnx_ir

    from qcompile.data import Dataset, InputSpec
    from qcompile.measure import Measured
    from qcompile.onnx.exact import ExactSession
    from qcompile.passes.integerize import Integerized

Log = Callable[[str], None]
Model = str | os.PathLike[str] | bytes

IO_LAYOUTS = ("model", "nhwc")
INPUT_DTYPES: Mapping[str, Int] = {"int8": Int(8), "uint8": Int(8), "int16": Int(16)}
OUTPUT_DTYPES: Mapping[str, Int] = {"int8": Int(8), "int16": Int(16), "int32": Int(24)}
"""An int32 output holds 24 significant bits: what one rescale can promise."""
ACCURACY_SAMPLES = 64
SELF_TEST_ROWS = 2


def silent(line: str) -> None:
    """Log nothing."""


def compile(
    model: Model,
    target: str = "x86",
    calibration: object = None,
    recipe: str | os.PathLike[str] = "default",
    output: str | os.PathLike[str] | None = None,
    input_dims: Mapping[str, int] | None = None,
    *,
    force: bool = False,
    options: Options | None = None,
    log: Log = silent,
) -> Artifact:
    """Compile a float ONNX model to a verified integer program in a folder, and return it.

    `calibration` is whatever `qcompile.data.open_data` takes; None makes a synthetic set, which every report marks.
    The folder is written beside its place and moved there at the end: nothing half done is left behind.
    """
    job = _Job.checked(model, target, recipe, output, input_dims or {}, force, options or Options())
    context = pipeline.Context(seed=job.options.seed, log=log)

    float_side = _prepare(job, context)
    data = _open(job, float_side, calibration, context)
    _calibrate(job, float_side, data, context)
    integerized = _integerize(job, float_side)
    log(f"integer graph: {len(integerized.graph.nodes)} operators, accumulators proved below 2**31")

    lowered = job.target.lower(
        integerized.graph, name=job.name, cpu=job.cpu, vectors=_vectors(integerized.graph)
    )
    exported = _export(float_side, integerized)
    with _staged(job.output) as folder:
        files = {**lowered.files, **exported.files}
        _write(folder, files)
        verified = _verify(job, integerized.graph, folder, data, exported, context)
        certificate = _certify(job, folder, context)
        measured = _measure(job, float_side, exported, integerized, data)
        report = _report(
            job, float_side, data, integerized, lowered, verified, certificate, measured, context
        )
        _gate(job, verified, certificate, measured.worst_output())
        _write(folder, _documents(job, float_side, data, report, files))
        _publish(folder, job.output)
    return load(job.output)


# --- settings ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Job:
    """One compilation: every setting, checked before any work."""

    source: Model
    target: Target
    cpu: str
    recipe: Recipe
    output: Path
    input_dims: Mapping[str, int]
    options: Options
    name: str

    @classmethod
    def checked(
        cls,
        source: Model,
        target: str,
        recipe_name: str | os.PathLike[str],
        output: str | os.PathLike[str] | None,
        input_dims: Mapping[str, int],
        force: bool,
        options: Options,
    ) -> _Job:
        """Raise BadInput at the first setting that cannot be."""
        chosen = targets_.get(target)
        cpu = options.cpu or chosen.cpus[0]
        recipe.one_of(cpu, tuple(chosen.cpus), f"target {target}: --cpu")
        recipe.one_of(options.io_layout, ("model", "nhwc"), "--io-layout")
        recipe.one_of(options.input_dtype, tuple(INPUT_DTYPES), "--input-dtype")
        recipe.one_of(options.output_dtype, tuple(OUTPUT_DTYPES), "--output-dtype")
        for flag, text in (("--weights", options.weights), ("--first-last", options.first_last)):
            if text is not None and (not parse_format(text).signed or parse_format(text).bits > 8):
                raise BadInput(f"{flag} takes int2 to int8, not {text}")
        recipe.one_of(options.activations, ("int4", "int8"), "--activations")
        for what, count in (("--samples", options.samples), ("--threads", options.threads)):
            if count is not None and count < 1:
                raise BadInput(f"{what} is at least 1, not {count}")
        stem = "model" if isinstance(source, bytes) else Path(source).stem
        name = identifier(options.name or stem)
        place = Path(output) if output is not None else Path(f"{name}-{target}")
        _check_place(place, force)
        return cls(
            source, chosen, cpu, recipe.load(recipe_name), place, dict(input_dims), options, name
        )


def identifier(text: str) -> str:
    """A C identifier in lower case made from any text."""
    word = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:40] or "model"
    return f"m{word}" if word[0].isdigit() else word


def _check_place(place: Path, force: bool) -> None:
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    if not force:
        raise BadInput(
            f"the output folder {place} is not empty; choose another with -o or overwrite it with --force"
        )
    if not (place / MANIFEST_FILE).is_file():
        raise BadInput(f"{place} was not made by qcompile; --force overwrites only its own folders")


# --- the float side ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _FloatSide:
    """The canonical float model and the plan beside it."""

    model: onnx_ir.Model
    plan: QuantPlan
    sha256: str
    file: str | None
    opset: int


def _prepare(job: _Job, context: pipeline.Context) -> _FloatSide:
    """Load the model, bring it to its canonical form and decide where it is rounded."""
    from qcompile.onnx import frontend

    model = frontend.load(job.source, input_dims=job.input_dims, warn=context.warn)
    plan = QuantPlan()
    before, _ = _passes(job)
    pipeline.run(before, model, plan, context)
    file = None if isinstance(job.source, bytes) else str(job.source)
    return _FloatSide(model, plan, _sha256_of(job.source), file, model.opset_imports.get("", 0))


def _sha256_of(source: Model) -> str:
    if isinstance(source, bytes):
        return manifest.sha256(source)
    with open(source, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _passes(job: _Job) -> tuple[list[pipeline.Pass], list[pipeline.Pass]]:
    """The recipe's passes before and from the first that needs data."""
    from qcompile.passes.calibrate import Calibrate
    from qcompile.passes.canonicalize import Canonicalize
    from qcompile.passes.fold import Fold
    from qcompile.passes.outline import Outline
    from qcompile.passes.place import Place
    from qcompile.passes.widen import Widen

    o = job.options
    chosen: dict[str, dict[str, object]] = {
        "place": {
            "weights": parse_format(o.weights),
            "activations": parse_format(o.activations),
            "first_last": None if o.first_last is None else parse_format(o.first_last),
            "input": INPUT_DTYPES[o.input_dtype],
            "output": OUTPUT_DTYPES[o.output_dtype],
            "residual": job.recipe.residual,
            "per_channel": o.per_channel,
            "overrides": {glob: parse_format(text) for glob, text in o.overrides.items()},
        },
        "calibrate": {} if o.method is None else {"method": o.method},
        "widen": {"fuse_residual": job.recipe.residual == "accumulator"},
    }
    registry: dict[str, type[pipeline.Pass]] = {
        p.name: p for p in (Fold, Outline, Canonicalize, Place, Calibrate, Widen)
    }
    made: list[pipeline.Pass] = []
    for step in job.recipe.steps:
        where = f"recipe {job.recipe.name}"
        recipe.one_of(step.name, tuple(registry), f"{where}: pass")
        kind = registry[step.name]
        known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
        recipe.known_keys(step.options, tuple(known), f"{where}, pass {step.name}")
        settings: dict[str, object] = {}
        for key, value in step.options.items():
            settings[key] = (
                parse_format(str(value)) if isinstance(known[key].default, Int) else value
            )
        try:
            made.append(kind(**(settings | chosen.get(step.name, {}))))
        except (TypeError, ValueError) as e:
            raise BadInput(f"{where}, pass {step.name}: {e}") from e
    at = next((i for i, p in enumerate(made) if isinstance(p, Calibrate)), len(made))
    return made[:at], made[at:]


def _specs(model: onnx_ir.Model) -> list[InputSpec]:
    from qcompile.data import InputSpec

    return [
        InputSpec(
            str(v.name),
            tuple(
                d if isinstance(d, int) else None
                for d in (v.shape.dims if v.shape is not None else ())
            ),
            np.dtype(np.float32) if v.dtype is None else v.dtype.numpy(),
        )
        for v in model.graph.inputs
    ]


def _open(job: _Job, side: _FloatSide, calibration: object, context: pipeline.Context) -> Dataset:
    """The samples; made up ones are warned about unless a plan says what they would have said."""
    from qcompile.data import open_data

    o = job.options
    data = open_data(
        calibration, _specs(side.model), samples=o.samples, seed=o.seed, warn=context.warn
    )
    if data.marked and o.plan is None:
        context.warn(
            f"calibrated on {data.origin} data instead of real samples, so accuracy is unknown; "
            "give real samples with --calib"
        )
    return data


def _calibrate(job: _Job, side: _FloatSide, data: Dataset, context: pipeline.Context) -> None:
    """Complete the plan from the data, or from a saved plan."""
    if job.options.plan is not None:
        _adopt(side.plan, Path(job.options.plan))
        return
    context.samples = data
    _, after = _passes(job)
    pipeline.run(after, side.model, side.plan, context)
    missing = [s.tensor for s in side.plan.open_slots()]
    if missing:
        raise BadInput(
            f"recipe {job.recipe.name} leaves {missing[0]} without a scale; it needs a calibrate pass"
        )


def _adopt(plan: QuantPlan, path: Path) -> None:
    """Take every slot and quantizer from a file; its tensors must be this model's."""
    try:
        saved = plans.parse(path.read_text())
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"cannot read the plan {path}: {e}") from e
    strangers = sorted(set(saved.slots) ^ set(plan.slots))
    if strangers:
        raise BadInput(
            f"the plan {path} is for another model or other options: {strangers[0]} is in only one of the two"
        )
    for name, slot in saved.slots.items():
        if name not in saved.quantizers:
            raise BadInput(f"the plan {path} has no scale for {name}")
        channels = len(saved.quantizers[name].scale)
        if (slot.axis is None) != (channels == 1) and slot.axis is None:
            raise BadInput(f"the plan {path}: {name} has {channels} scales but no axis")
    plan.slots, plan.quantizers = saved.slots, saved.quantizers


# --- the integer side -------------------------------------------------------------------------------------------


def _integerize(job: _Job, side: _FloatSide) -> Integerized:
    from qcompile.passes.integerize import integerize

    return integerize(
        side.model,
        side.plan,
        name=job.name,
        residual=job.recipe.residual == "accumulator",
        requant="shift" if job.recipe.requant == "shift" else "dyadic",
        io_layout="nhwc" if job.options.io_layout == "nhwc" else "model",
        input_dtype=DType.U8 if job.options.input_dtype == "uint8" else None,
    )


def _vectors(graph: Graph) -> list[dict[str, Array]]:
    """Self-test inputs: codes drawn from a hash, so that they depend on nothing but the graph's border."""
    rows = []
    for row in range(SELF_TEST_ROWS):
        feeds: dict[str, Array] = {}
        for port, value in graph.inputs:
            kind = value.type
            seed = f"{row} {port.name} {kind}".encode("utf-8", "surrogatepass")
            stream = hashlib.shake_256(seed).digest(kind.bytes)
            feeds[port.name] = np.frombuffer(stream, kind.dtype.numpy).reshape(kind.shape)
        rows.append(feeds)
    return rows


@dataclass(frozen=True, slots=True)
class _Exported:
    """The models and files beside the program."""

    integer: onnx.ModelProto
    qdq: onnx.ModelProto
    files: Mapping[str, bytes]


def _export(side: _FloatSide, integerized: Integerized) -> _Exported:
    from qcompile.onnx import integer, qdq

    exact = integer.export(integerized.graph)
    fake = qdq.export(side.model, side.plan)
    files = write_graph(integerized.graph) | {
        "integer.onnx": exact.SerializeToString(deterministic=True),
        "qdq.onnx": fake.SerializeToString(deterministic=True),
        "plan.toml": plans.dump(side.plan).encode(),
    }
    return _Exported(exact, fake, files)


# --- files ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _staged(place: Path) -> Iterator[Path]:
    """A folder beside `place` that is gone afterwards unless it was moved."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    except OSError as e:
        raise BadInput(f"cannot write beside {place}: {e}") from e
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _publish(folder: Path, place: Path) -> None:
    """Put a finished folder in its place; what was there goes only then."""
    try:
        if place.exists():
            old = folder.with_name(f"{folder.name}.old")
            os.replace(place, old)
            os.replace(folder, place)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(folder, place)
    except OSError as e:
        raise BadInput(f"cannot write {place}: {e}") from e


# --- verification -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Verified:
    """What was compared with the integer graph: the program, if it could be built, and integer.onnx."""

    program: Verification | None
    reason: str | None
    onnx: tuple[int, int]


def _batches(graph: Graph, data: Dataset, rows: int) -> Iterator[dict[str, Array]]:
    """The first `rows` samples as codes."""
    done = 0
    for batch in data:
        codes = border.encode(graph, batch)
        steps = {port.name: value.type.shape[0] for port, value in graph.inputs}
        have = min(len(codes[name]) // n for name, n in steps.items())
        for at in range(0, min(have, rows - done), ROWS):
            end = min(at + ROWS, have, rows - done)
            yield {name: codes[name][at * n : end * n] for name, n in steps.items()}
        done += have
        if done >= rows:
            return


def _verify(
    job: _Job,
    graph: Graph,
    folder: Path,
    data: Dataset,
    exported: _Exported,
    context: pipeline.Context,
) -> _Verified:
    rows = max(job.options.verify_samples, 1)
    exact = _verify_onnx(graph, exported.integer, _batches(graph, data, rows))
    context.log(f"integer.onnx in onnxruntime: {exact[0]} samples, {exact[1]} mismatches")
    sanitize = job.target.name == "x86"
    try:
        runner = job.target.runner(folder, graph, name=job.name, cpu=job.cpu, sanitize=sanitize)
        checked = verify(
            graph,
            runner,
            _batches(graph, data, rows),
            trace=job.options.trace_samples,
            sanitized=sanitize,
        )
    except ToolchainMissing as e:
        if job.options.require_verified:
            raise
        context.warn(f"the program was not run here: {e}")
        return _Verified(None, str(e), exact)
    context.log(
        f"{job.target.name} program: {checked.samples} samples, {checked.mismatches} mismatches, "
        f"{checked.intermediates} intermediates compared"
    )
    return _Verified(checked, None, exact)


def _verify_onnx(
    graph: Graph, model: onnx.ModelProto, batches: Iterator[Mapping[str, Array]]
) -> tuple[int, int]:
    """Samples and differing elements of integer.onnx in onnxruntime against the integer graph."""
    from qcompile.onnx.exact import ExactSession

    session = ExactSession(model)
    samples = mismatches = 0
    for codes in batches:
        expected = border.run_graph(graph, codes)
        got = session.run(codes) if graph.free_batch else _one_by_one(graph, session, codes)
        samples += len(next(iter(codes.values()))) // graph.inputs[0][1].type.shape[0]
        mismatches += sum(
            int((expected[port.name] != got[port.name]).sum()) for port, _ in graph.outputs
        )
    return samples, mismatches


def _one_by_one(
    graph: Graph,
    session: ExactSession,
    codes: Mapping[str, Array],
) -> dict[str, Array]:
    steps = {port.name: value.type.shape[0] for port, value in graph.inputs}
    count = min(len(codes[name]) // n for name, n in steps.items())
    parts = [
        session.run({k: codes[k][i * n : (i + 1) * n] for k, n in steps.items()})
        for i in range(count)
    ]
    return {port.name: np.concatenate([p[port.name] for p in parts]) for port, _ in graph.outputs}


def _certify(
    job: _Job, folder: Path, context: pipeline.Context
) -> tuple[FloatCertificate | None, str | None]:
    """The no-float certificate, or why it could not be made."""
    try:
        certificate = job.target.certify(folder, name=job.name, cpu=job.cpu)
    except ToolchainMissing as e:
        if job.options.require_verified:
            raise
        return None, str(e)
    context.log(
        f"no-float certificate: {certificate.instructions} instructions, {len(certificate.findings)} findings"
    )
    return certificate, None


def _gate(
    job: _Job,
    verified: _Verified,
    certificate: tuple[FloatCertificate | None, str | None],
    sqnr_db: float | None,
) -> None:
    """Stop before anything is published that does not equal the integer graph, holds float or is not good enough."""
    program, proof = verified.program, certificate[0]
    if verified.onnx[1]:
        raise VerificationMismatch(
            f"integer.onnx differs from the integer graph in {verified.onnx[1]} elements over {verified.onnx[0]} "
            "samples; this is a defect of qcompile or of onnxruntime: please report it"
        )
    if program is not None and not program.ok:
        raise VerificationMismatch(
            f"the {job.target.name} program differs from the integer graph in {program.mismatches} elements over "
            f"{program.samples} samples; first at {program.first}; this is a defect: please report it"
        )
    if proof is not None and not proof.clean:
        found = proof.findings[0] if proof.findings else "no instructions"
        raise VerificationMismatch(f"the built program is not free of floating point: {found}")
    if job.options.min_sqnr is not None and sqnr_db is not None and sqnr_db < job.options.min_sqnr:
        raise AccuracyGate(
            f"the integer program reaches {sqnr_db:.2f} dB against float, below the {job.options.min_sqnr:g} dB asked "
            "for; try another --method, --first-last int8 or an --override for the worst layers of `qcompile inspect`"
        )


# --- the report -------------------------------------------------------------------------------------------------


def _measure(
    job: _Job, side: _FloatSide, exported: _Exported, integerized: Integerized, data: Dataset
) -> Measured:
    from qcompile.measure import measure

    batches = (
        {k: a[:ACCURACY_SAMPLES] for k, a in batch.items()}
        for batch in [data.rows(ACCURACY_SAMPLES)]
    )
    return measure(side.model, exported.qdq, side.plan, integerized, batches, job.options.threads)


def _report(
    job: _Job,
    side: _FloatSide,
    data: Dataset,
    integerized: Integerized,
    lowered: Lowered,
    verified: _Verified,
    certificate: tuple[FloatCertificate | None, str | None],
    measured: Measured,
    context: pipeline.Context,
) -> dict[str, object]:
    """The dictionary of report.json."""
    from qcompile.passes.layers import operators, partition
    from qcompile.report import facts

    graph = integerized.graph
    layout = job.options.io_layout
    fused = job.recipe.residual == "accumulator"
    meaning = {x.name: operators(x) for x in partition(side.model, fuse_residual=fused)}
    parameters = sum(v.const.size for v in graph.constants() if v.const is not None)
    return facts.head() | {
        "model": {
            "name": job.name,
            "file": None if side.file is None else Path(side.file).name,
            "sha256": side.sha256,
            "opset": side.opset,
            "nodes": len(list(side.model.graph)),
            "parameters": parameters,
            "macs": sum(layer.macs for layer in lowered.layers),
        },
        "target": {"name": job.target.name, "cpu": job.cpu, "summary": job.target.summary},
        "recipe": {"name": job.recipe.name, "summary": job.recipe.summary,
                   "options": {s.name: dict(s.options) for s in job.recipe.steps}},
        "inputs": facts.ports(graph.inputs, layout),
        "outputs": facts.ports(graph.outputs, layout),
        "data": _data_facts(job, data),
        "warnings": list(context.warnings),
        "coverage": facts.coverage(graph, lowered, meaning),
        "float_operators": [],
        "layers": facts.layers(integerized, side.plan, lowered, measured),
        "accuracy": facts.accuracy(graph, measured),
        "memory": {"arena_bytes": lowered.arena_bytes, "weight_bytes": lowered.weight_bytes},
        "certificates": facts.certificates(graph, integerized, *certificate),
        "verification": facts.verification(
            verified.program, verified.reason, verified.onnx,
            "address, undefined behaviour" if verified.program and verified.program.sanitized else None,
        ),
        "fused": list(lowered.fused),
        "stored": dict(lowered.stored),
    }  # fmt: skip


def _data_facts(job: _Job, data: Dataset) -> dict[str, object]:
    planned = job.options.plan is not None
    return {
        "origin": "plan" if planned else data.origin,
        "marked": data.marked and not planned,
        "samples": data.count,
        "digest": None if planned else data.digest,
    }


def _documents(
    job: _Job,
    side: _FloatSide,
    data: Dataset,
    report: dict[str, object],
    files: Mapping[str, bytes],
) -> dict[str, bytes]:
    """Report and manifest."""
    from qcompile.report import html

    described = manifest.describe(
        name=job.name,
        model_file=side.file,
        model_sha256=side.sha256,
        input_dims=job.input_dims,
        target=job.target.name,
        cpu=job.cpu,
        recipe=job.recipe.name,
        recipe_sha256=manifest.sha256(repr(job.recipe).encode()),
        options=job.options,
        data=_data_facts(job, data),
        files=files,
    )
    return {
        REPORT_FILE: _json(report),
        "report.html": html.render(report).encode(),
        MANIFEST_FILE: _json(described),
    }


def _json(data: Mapping[str, object]) -> bytes:
    return (json.dumps(data, indent=2, allow_nan=False) + "\n").encode()


# --- the other verbs --------------------------------------------------------------------------------------------


def inspect(model: Model, *, input_dims: Mapping[str, int] | None = None) -> dict[str, object]:
    """What a model is to qcompile: size, operators, what has no integer form and why, where it is rounded."""
    from collections import Counter

    from qcompile.passes.layers import initializer, refused

    job = _Job.checked(
        model,
        "x86",
        "default",
        Path(os.devnull).parent / "none",
        input_dims or {},
        False,
        Options(),
    )
    context = pipeline.Context()
    slots: list[dict[str, object]] = []
    failed: list[tuple[str, str, str]] = []
    from qcompile.onnx import frontend

    floats = frontend.load(model, input_dims=input_dims or {}, warn=context.warn)
    plan = QuantPlan()
    before, _ = _passes(job)
    pipeline.run([p for p in before if p.name != "place"], floats, plan, context)
    failed = refused(floats)
    if not failed:
        pipeline.run([p for p in before if p.name == "place"], floats, plan, context)
        slots = [
            {
                "tensor": s.tensor,
                "kind": s.kind.value,
                "format": str(s.format),
                "members": list(s.members),
            }
            for s in plan.slots.values()
        ]
    nodes = list(floats.graph)
    weights = [initializer(v) for v in floats.graph.initializers.values()]
    return {
        "inputs": [{"name": s.name, "shape": list(s.shape), "dtype": str(s.dtype)} for s in _specs(floats)],
        "outputs": [{"name": str(v.name), "shape": [d if isinstance(d, int) else None for d in v.shape.dims] if v.shape else []}
                    for v in floats.graph.outputs],
        "nodes": len(nodes),
        "operators": dict(sorted(Counter(f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in nodes).items())),
        "parameters": sum(int(w.size) for w in weights if w is not None),
        "unsupported": [{"node": n, "operator": op, "reason": why} for n, op, why in failed],
        "slots": slots,
        "warnings": list(context.warnings),
    }  # fmt: skip


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
    from qcompile.onnx import qdq

    job = _Job.checked(model, "x86", recipe, output, input_dims or {}, force, options or Options())
    context = pipeline.Context(seed=job.options.seed, log=log)
    side = _prepare(job, context)
    data = _open(job, side, calibration, context)
    _calibrate(job, side, data, context)
    with _staged(job.output) as folder:
        exported = qdq.export(side.model, side.plan).SerializeToString(deterministic=True)
        _write(folder, {"qdq.onnx": exported, "plan.toml": plans.dump(side.plan).encode()})
        _publish(folder, job.output)
    return job.output


def evaluate(
    folder: str | os.PathLike[str],
    data: object,
    *,
    model: Model | None = None,
    samples: int | None = None,
) -> dict[str, object]:
    """Metric (where labels are), agreement and SQNR of a compiled program against the float model it came from."""
    from qcompile.data import open_data
    from qcompile.onnx import frontend
    from qcompile.onnx.execute import FloatSession

    artifact = load(folder)
    floats = frontend.load(
        _original(artifact.manifest, model), input_dims=_dims_of(artifact.manifest), warn=silent
    )
    dataset = open_data(data, _specs(floats), samples=samples)
    outputs = [port.name for port, _ in artifact.graph.outputs]
    session = FloatSession(floats, outputs)
    real: dict[str, list[Array]] = {name: [] for name in outputs}
    mine: dict[str, list[Array]] = {name: [] for name in outputs}
    for batch in dataset:
        f, q = session.run(batch), artifact.run(batch)
        for name in outputs:
            real[name].append(f[name])  # type: ignore[arg-type]
            mine[name].append(q[name])  # type: ignore[arg-type]
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
        raise BadInput(f"the float model {source or ''} is not there; name it with --model")
    if _sha256_of(source) != about.get("sha256"):
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
    with tempfile.TemporaryDirectory(prefix="qcompile-") as scratch:
        again = Path(scratch) / "again"
        options = replace(
            manifest.options_of(data, plan), verify_samples=1, trace_samples=0, min_sqnr=None
        )
        options = replace(options, name=str(data["name"]), cpu=str(data["cpu"]))
        compile(source, str(data["target"]), calibration, str(recorded["name"]), again, _dims_of(data),
                options=options, log=log)  # fmt: skip
        return manifest.compare(data, again)


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
