"""The story of one compilation, top to bottom.

Only this file knows passes by name.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qcompile import adoption, checks, folder, manifest, pipeline, recipe
from qcompile import plan as plans
from qcompile.artifact import REPORT_FILE, Artifact, load, write_graph
from qcompile.choose import Choice, Part, choose, enough, output_sqnr
from qcompile.errors import BadInput, QcompileError, Unsupported
from qcompile.formats import Int, parse_format
from qcompile.integerized import Integerized
from qcompile.ir import Array, DType, Graph
from qcompile.job import IMPORT, INPUT_DTYPES, OUTPUT_DTYPES, Job, Model, sha256_of
from qcompile.manifest import MANIFEST_FILE
from qcompile.options import Options
from qcompile.plan import QuantPlan
from qcompile.recipe import Step
from qcompile.report import facts
from qcompile.store import Store
from qcompile.target import Tunable
from qcompile.tuning import tuned

if TYPE_CHECKING:
    import onnx
    import onnx_ir

    from qcompile.data import Dataset, InputSpec
    from qcompile.foreign import Decisions
    from qcompile.measure import Measured
    from qcompile.passes.integerize import Requant
    from qcompile.report.facts import Finding
    from qcompile.target import Lowered

Log = Callable[[str], None]

ACCURACY_SAMPLES, MEASURED_ROWS = 64, 8
SELF_TEST_ROWS, SELF_TEST_NUMBERS = 2, 2**22
POOR_SQNR_DB = 10.0
_STACK_ROUNDS = 4


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
    **chosen: object,
) -> Artifact:
    """Compile a float ONNX model to a verified integer program in a folder, and return it.

    Any field of `Options` may also be given by itself: `compile(model, weights="int4", first_last="int8")`.

    `calibration` is whatever `qcompile.data.open_data` takes; None makes a synthetic set, which every report marks.
    The folder is written beside its place and moved there at the end: nothing half done is left behind.
    """
    settings = (options or Options()).but(chosen)
    job = Job.checked(model, target, recipe, output, input_dims or {}, settings)
    folder.check(job.output, force)
    context = pipeline.Context(seed=settings.seed, log=log)

    made = build(job, calibration, context)
    with folder.staged(job.output) as place:
        folder.write(place, made.files)
        checked = checks.check(
            job,
            made.integerized.graph,
            made.lowered,
            place,
            made.data,
            context,
        )
        measured = measured_on_samples(job, made)
        worst = measured.worst_output()
        checks.gate(job, checked, worst)
        if worst is not None and worst < POOR_SQNR_DB:
            context.warn(
                f"the output is only {worst:.1f} dB from the float model: this network is damaged; "
                "try --recipe accurate or more bits; `qcompile analyze` says where it is lost"
            )
        folder.write(place, _documents(job, made, checked, measured, context))
        folder.publish(place, job.output)
    return load(job.output)


@dataclass(frozen=True, slots=True)
class Build:
    """What the stages made; `files`, program and exports, depend on model, plan, options and target only."""

    floats: FloatSide
    data: Dataset
    findings: Sequence[Finding]
    choice: Choice
    integerized: Integerized
    lowered: Lowered
    stack: int | None
    files: folder.Contents


def build(job: Job, calibration: object, context: pipeline.Context) -> Build:
    """From the float model to files, nothing run yet."""
    from qcompile.passes.proportion import ROWS, out_of_proportion

    floats = prepare(job, context)
    data = open_samples(job, floats, calibration, context)
    findings = out_of_proportion(floats.model, data.rows(ROWS))
    for finding in findings:
        context.warn(finding.sentence)
    choice = calibrate(job, floats, data, context)
    # only a run that is killed leaves its work behind
    context.store.clear()
    integerized = to_integers(job, floats)
    graph = integerized.graph
    context.log(
        f"integer graph: {len(graph.nodes)} operators, every accumulator proved below 2**31"
    )
    lowered, stack = lower(job, graph, context)
    files = folder.Contents(lowered.files)
    lowered = replace(lowered, files=files)
    files |= _export(job, floats, integerized)
    return Build(floats, data, findings, choice, integerized, lowered, stack, files)


def lower(job: Job, graph: Graph, context: pipeline.Context) -> tuple[Lowered, int | None]:
    """The program, and how much of the RAM it may take was kept for the stack.

    Buffers share that RAM with the stack, whose bound shows in the built program alone: what does not fit is arranged
    anew with the stack that was measured. Where nothing fits, the program is the smallest there is.
    """
    place, vectors = job.placement, _vectors(graph)
    if not vectors:
        context.warn(
            "the self-test has no vectors: inputs and outputs have more numbers than C source may hold"
        )
    files: dict[str, bytes] = {}
    if job.options.tune is not None and isinstance(job.target, Tunable):
        found, measured = tuned(
            job.target, graph, cpu=job.cpu, placement=place, place=job.options.tune
        )
        context.log(f"tune: {len(found.tiles)} layers have several tiles, {measured} measured now")
        place = replace(place, tiles=found.tiles)
        files[manifest.TUNING_FILE] = found.dump()

    def lowered() -> Lowered:
        made = job.target.lower(graph, name=job.name, cpu=job.cpu, vectors=vectors, placement=place)
        return replace(made, files={**made.files, **files})

    made = lowered()
    if place.max_ram is None or job.options.stack is not None:
        return made, job.options.stack
    for _ in range(_STACK_ROUNDS):
        taken = checks.measured(job, graph, made)
        stack = taken.built.stack if taken is not None and taken.built is not None else None
        if taken is None or stack is None or stack <= place.stack:
            break
        if taken.ram is not None and taken.ram <= place.max_ram:
            break
        context.log(
            f"{taken.ram} bytes of RAM are too many, {stack} of them stack: buffers are arranged anew"
        )
        place = replace(place, stack=stack)
        made = lowered()
    return made, place.stack


# --- the float side ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FloatSide:
    """The canonical float model and the plan beside it."""

    model: onnx_ir.Model
    plan: QuantPlan
    sha256: str
    file: str | None
    opset: int


def prepare(job: Job, context: pipeline.Context) -> FloatSide:
    """Load the model, bring it to its canonical form and decide where it is rounded."""
    from qcompile import foreign
    from qcompile.onnx.batch import settle_batch

    source, decisions = read_model(job.source, job.options.encodings)
    if decisions is not None and job.recipe.name != IMPORT:
        raise BadInput(
            f"the model is quantized already and recipe {job.recipe.name} would decide anew; "
            f"take --recipe {IMPORT}, or the float model"
        )
    model, plan = open_model(source, job.input_dims, context), QuantPlan()
    shaping, placing, _ = _stages(job)
    pipeline.run(passes(job, shaping), model, plan, context)
    settle_batch(model)
    pipeline.run(passes(job, placing), model, plan, context)
    if decisions is not None:
        for sentence in foreign.adopt(decisions, model, plan).sentences():
            context.log(f"import: {sentence}")
    file = None if isinstance(job.source, bytes) else str(job.source)
    return FloatSide(model, plan, sha256_of(job.source), file, model.opset_imports.get("", 0))


def open_model(
    source: onnx.ModelProto, input_dims: Mapping[str, int], context: pipeline.Context
) -> onnx_ir.Model:
    """The float model with composite operators spelled out; an open batch that it mixes is one sample."""
    from qcompile.onnx import frontend
    from qcompile.passes.decompose import Decompose, open_batch

    def opened(sizes: Mapping[str, int]) -> onnx_ir.Model:
        model = frontend.load(source, input_dims=sizes, warn=context.warn)
        pipeline.run([Decompose()], model, QuantPlan(), context)
        return model

    try:
        model = opened(input_dims)
        symbol = open_batch(model)
        if symbol is None:
            return model
    except Unsupported:
        symbol = frontend.open_batch(source)
        if symbol is None:
            raise
    single = opened({**input_dims, symbol: 1})
    context.warn(
        f"the model mixes the samples of a batch, whose size {symbol!r} is open: it is compiled for one sample; "
        f"--input-dim {symbol}=VALUE sets another number"
    )
    return single


def read_model(
    source: Model, encodings: str | os.PathLike[str] | None = None
) -> tuple[onnx.ModelProto, Decisions | None]:
    """The float model, and what another tool has decided about it where it is quantized already."""
    from qcompile import foreign
    from qcompile.onnx.reader import read

    proto = read(source, foreign.DOMAINS)
    if encodings is None:
        found = foreign.open(proto)
        return (proto, None) if found is None else found
    try:
        content = Path(encodings).read_bytes()
    except OSError as e:
        raise BadInput(f"cannot read the encodings {encodings}: {e}") from e
    return foreign.encodings(content, proto)


def examine(
    model: Model, input_dims: Mapping[str, int], context: pipeline.Context
) -> tuple[onnx_ir.Model, QuantPlan, list[tuple[str, str, str]]]:
    """The canonical model, its slots, and every node that has no integer form: name, operator, why."""
    from qcompile.onnx.batch import settle_batch
    from qcompile.passes.layers import refused

    job = Job.checked(model, "x86", "default", None, input_dims, Options())
    source, _ = read_model(model)
    floats, plan = open_model(source, input_dims, context), QuantPlan()
    shaping, placing, _ = _stages(job)
    pipeline.run(passes(job, shaping), floats, plan, context)
    settle_batch(floats)
    failed = refused(floats)
    if not failed:
        pipeline.run(passes(job, placing), floats, plan, context)
    return floats, plan, failed


def passes(job: Job, steps: Sequence[Step]) -> list[pipeline.Pass]:
    """The passes of a recipe's steps, with the options that the job sets."""
    from qcompile.passes.binary_point import BinaryPoint
    from qcompile.passes.calibrate import Calibrate
    from qcompile.passes.canonicalize import Canonicalize
    from qcompile.passes.correct import Correct
    from qcompile.passes.equalize import Equalize
    from qcompile.passes.fold import Fold
    from qcompile.passes.outline import Outline
    from qcompile.passes.place import Place
    from qcompile.passes.refine import Refine
    from qcompile.passes.round import Round
    from qcompile.passes.shift import Shift
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
    }
    everywhere = {"threads": o.jobs, "fuse_residual": job.recipe.residual == "accumulator"}
    registry: dict[str, type[pipeline.Pass]] = {
        p.name: p
        for p in (
            Fold, Outline, Canonicalize, Place, Equalize, Shift, Calibrate, Refine, Widen, BinaryPoint,
            Correct, Round,
        )
    }  # fmt: skip
    made: list[pipeline.Pass] = []
    for step in steps:
        where = f"recipe {job.recipe.name}"
        recipe.one_of(step.name, tuple(registry), f"{where}: pass")
        kind = registry[step.name]
        known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
        recipe.known_keys(step.options, tuple(known), f"{where}, pass {step.name}")
        settings: dict[str, object] = {k: v for k, v in everywhere.items() if k in known}
        for key, value in step.options.items():
            settings[key] = (
                parse_format(str(value)) if isinstance(known[key].default, Int) else value
            )
        try:
            made.append(kind(**(settings | chosen.get(step.name, {}))))
        except (TypeError, ValueError) as e:
            raise BadInput(f"{where}, pass {step.name}: {e}") from e
    return made


def _stages(job: Job) -> tuple[list[Step], list[Step], list[Step]]:
    """The recipe's steps: those that shape the float model, the one that places roundings, and those after it."""
    steps = list(job.recipe.steps)
    at = next((i for i, s in enumerate(steps) if s.name == "place"), len(steps))
    for step in steps[: at + 1]:
        if len(step.variants) > 1:
            raise BadInput(
                f"recipe {job.recipe.name}, pass {step.name}: only passes after place can be optional or otherwise"
            )
    return steps[:at], steps[at : at + 1], steps[at + 1 :]


def specs(model: onnx_ir.Model) -> list[InputSpec]:
    """What the model takes, for reading data."""
    from qcompile.data import InputSpec
    from qcompile.onnx.gain import gain

    return [
        InputSpec(
            str(v.name),
            tuple(
                d if isinstance(d, int) else None
                for d in (v.shape.dims if v.shape is not None else ())
            ),
            np.dtype(np.float32) if v.dtype is None else v.dtype.numpy(),
            gain(v),
        )
        for v in model.graph.inputs
    ]


def open_samples(
    job: Job, side: FloatSide, calibration: object, context: pipeline.Context
) -> Dataset:
    """The samples; made up ones are warned about unless a plan says what they would have said."""
    from qcompile.data import open_data

    o = job.options
    data = open_data(
        calibration, specs(side.model), samples=o.samples, seed=o.seed, warn=context.warn
    )
    if data.marked and o.plan is None:
        context.warn(
            f"calibrated on {data.origin} data instead of real samples, so accuracy is unknown; "
            "give real samples with --calib"
        )
    return data


def calibrate(job: Job, side: FloatSide, data: Dataset, context: pipeline.Context) -> Choice:
    """Complete the plan from the data, or from a saved plan; say by which steps."""
    _, _, steps = _stages(job)
    written = Choice(tuple(s.variants[0] for s in steps if s.variants[0] is not None))
    if job.options.plan is not None:
        _adopt(side, Path(job.options.plan))
        return written
    slow = context.resumable and any(s.name == "round" for s in steps)
    kept = _store(job, side, data) if slow else Store()

    def score(tried: Sequence[Step]) -> float:
        return _held_out_sqnr(job, side, data, tried, kept.under(f"held out {tried!r}"))

    choice = written
    try:
        if any(len(s.variants) > 1 for s in steps):
            if enough(data, _lead(side.model)):
                choice = choose(steps, score, context.log)
            else:
                context.warn(
                    f"recipe {job.recipe.name} chooses on held-out samples and there are too few: "
                    "it runs as it begins; give more samples"
                )
        context.samples, context.store = data, kept.under(repr(choice.steps))
        pipeline.run(passes(job, choice.steps), side.model, side.plan, context)
    except QcompileError:
        kept.clear()
        raise
    missing = [s.tensor for s in side.plan.open_slots()]
    if missing:
        raise BadInput(
            f"recipe {job.recipe.name} leaves {missing[0]} without a scale; it needs a calibrate pass"
        )
    return choice


def _lead(model: onnx_ir.Model) -> int:
    """The rows that the model takes at once."""
    leads = [v.shape.dims[0] for v in model.graph.inputs if v.shape is not None and len(v.shape)]
    return max((d for d in leads if isinstance(d, int)), default=1)


def _held_out_sqnr(
    job: Job, side: FloatSide, data: Dataset, steps: Sequence[Step], kept: Store
) -> float:
    """The lowest SQNR of an output, in dB, on samples that these steps do not see."""
    tried = replace(side, model=side.model.clone(), plan=side.plan.copy())
    part = Part(data, held_out=False)
    seen = pipeline.Context(part, job.options.seed, store=kept, rehearsal=True)
    pipeline.run(passes(job, steps), tried.model, tried.plan, seen)
    graph = to_integers(job, tried).graph
    last = job.options.io_layout == "nhwc"
    return output_sqnr(
        graph, side.model, Part(data, held_out=True), job.options.jobs, channels_last=last
    )


def _store(job: Job, side: FloatSide, data: Dataset) -> Store:
    """Where finished work is kept beside the output, told apart by everything it depends on."""
    settings = [repr(sorted(job.input_dims.items())), repr(job.options), repr(job.recipe)]
    weights = {
        str(name): value.const_value.numpy()
        for name, value in side.model.graph.initializers.items()
        if value.const_value is not None
    }
    return Store.beside(job.output, [*settings, plans.dump(side.plan)], weights, data)


def _adopt(side: FloatSide, path: Path) -> None:
    """Take everything decided from a file, whose tensors must be this model's, and rewrite the model as it was then."""
    from qcompile.passes.reparametrize import reparametrize

    saved, plan = plans.read(path), side.plan
    adoption.check(side.model, plan, saved, path)
    try:
        with np.errstate(over="raise", invalid="raise"):
            reparametrize(side.model, saved.channels)
    except (ArithmeticError, KeyError, ValueError) as e:
        raise BadInput(f"the plan {path}, channels: {e}") from e
    plan.slots, plan.quantizers = saved.slots, saved.quantizers
    plan.codes, plan.biases, plan.channels = saved.codes, saved.biases, saved.channels


# --- the integer side -------------------------------------------------------------------------------------------


def to_integers(job: Job, side: FloatSide) -> Integerized:
    """The integer graph of a float side whose plan is complete."""
    from qcompile.passes.integerize import integerize

    return integerize(
        side.model,
        side.plan,
        name=job.name,
        residual=job.recipe.residual == "accumulator",
        requant=_requant(job.recipe.requant),
        digits=job.recipe.digits,
        shifts="layer" if job.recipe.shifts == "layer" else "channel",
        io_layout="nhwc" if job.options.io_layout == "nhwc" else "model",
        input_dtype=DType.U8 if job.options.input_dtype == "uint8" else None,
    )


def _requant(name: str) -> Requant:
    return "shift" if name == "shift" else "khot" if name == "khot" else "dyadic"


def _vectors(graph: Graph) -> list[dict[str, Array]]:
    """Self-test inputs: codes drawn from a hash, so that they depend on nothing but the graph's border.

    Fewer, or none, where C source with so many numbers would not compile.
    """
    numbers = sum(value.type.size for _, value in (*graph.inputs, *graph.outputs))
    rows = []
    for row in range(min(SELF_TEST_ROWS, SELF_TEST_NUMBERS // max(1, numbers))):
        feeds: dict[str, Array] = {}
        for port, value in graph.inputs:
            kind = value.type
            seed = f"{row} {port.name} {kind}".encode("utf-8", "surrogatepass")
            stream = hashlib.shake_256(seed).digest(kind.bytes)
            feeds[port.name] = np.frombuffer(stream, kind.dtype.numpy).reshape(kind.shape)
        rows.append(feeds)
    return rows


def _export(job: Job, side: FloatSide, integerized: Integerized) -> folder.Contents:
    """The models and files beside the program."""
    from qcompile.onnx import integer, links, qdq, weights

    made = folder.Contents(write_graph(integerized.graph))
    made.put("integer.onnx", weights.streamed(*integer.written(integerized.graph)))
    model, large = qdq.written(side.model, side.plan)
    links.write(model, integerized, side.plan, channels_last=job.options.io_layout == "nhwc")
    made.put("qdq.onnx", weights.streamed(model, large))
    return made | folder.Contents(plans.files(side.plan))


# --- the documents ----------------------------------------------------------------------------------------------


def measured_on_samples(job: Job, made: Build) -> Measured:
    """The error of every tensor, stage by stage, on the first samples."""
    from qcompile.measure import measure

    o, side = job.options, made.floats
    lead = made.integerized.graph.inputs[0][1].type.shape[0]
    total = -(-ACCURACY_SAMPLES // lead) * lead
    samples = made.data.rows(total)
    # all values of all rows at once would take gigabytes for a large network
    rows = -(-MEASURED_ROWS // lead) * lead
    parts = ({k: a[at : at + rows] for k, a in samples.items()} for at in range(0, total, rows))
    batches = (b for b in parts if all(len(a) and len(a) % lead == 0 for a in b.values()))
    last = o.io_layout == "nhwc"
    return measure(
        side.model,
        side.plan,
        made.integerized,
        batches,
        o.jobs,
        channels_last=last,
    )


def _about(side: FloatSide) -> facts.FloatModel:
    """What the report says of the float model."""
    from qcompile.passes.layers import operators, partition

    meaning = {x.name: operators(x) for x in partition(side.model)}
    return facts.FloatModel(
        side.file, side.sha256, side.opset, len(list(side.model.graph)), meaning
    )


def _documents(
    job: Job, made: Build, checked: checks.Checked, measured: Measured, context: pipeline.Context
) -> dict[str, bytes]:
    """Report and manifest."""
    from qcompile.analysis.findings import weights
    from qcompile.report import html

    constants = weights(made.floats.model, made.integerized, made.floats.plan)
    report = facts.gather(
        job, _about(made.floats), made.data, made.choice, made.integerized, made.floats.plan, made.lowered,
        checked, measured, constants, made.findings, context.warnings,
    )  # fmt: skip
    described = manifest.describe(
        name=job.name,
        model_file=made.floats.file,
        model_sha256=made.floats.sha256,
        input_dims=job.input_dims,
        target=job.target.name,
        cpu=job.cpu,
        recipe=job.recipe.name,
        recipe_sha256=manifest.sha256(repr(job.recipe).encode()),
        options=replace(job.options, stack=made.stack),
        data=facts.data(job, made.data),
        files=made.files,
    )
    return {
        REPORT_FILE: facts.as_json(report),
        "report.html": html.render(report).encode(),
        MANIFEST_FILE: facts.as_json(described),
    }
