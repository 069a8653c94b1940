"""What is run and looked at before anything is published: program, exported model, objects; and the gates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from qcompile import border, folder
from qcompile.choose import whole_batches
from qcompile.errors import (
    AccuracyGate,
    BadInput,
    BudgetExceeded,
    ToolchainMissing,
    VerificationMismatch,
)
from qcompile.ir import Array, Graph
from qcompile.job import Job
from qcompile.pipeline import Context
from qcompile.target import Counts, FloatCertificate, Footprint, Lowered
from qcompile.verify import Verification, verify

if TYPE_CHECKING:
    from qcompile.data import Dataset
    from qcompile.onnx.exact import ExactSession

ROWS = 64
SANITIZED_ROWS = 4


@dataclass(frozen=True, slots=True)
class Checked:
    """What was compared with the integer graph, and what the objects held; reasons say what could not be run here."""

    program: Verification | None
    sanitized: Verification | None
    reason: str | None
    onnx_samples: int
    onnx_mismatches: int
    no_float: FloatCertificate | None
    no_float_reason: str | None
    memory: Memory
    counts: Counts | None


@dataclass(frozen=True, slots=True)
class Memory:
    """What a program takes, in bytes; code, constants and stack are unknown where nothing was built."""

    arena: int
    inputs: int
    outputs: int
    weights: int
    built: Footprint | None

    @classmethod
    def of(cls, graph: Graph, lowered: Lowered, built: Footprint | None) -> Memory:
        """What a lowered graph takes, its objects being measured or not."""
        inputs, outputs = (
            sum(v.type.bytes for _, v in ports) for ports in (graph.inputs, graph.outputs)
        )
        return cls(lowered.arena_bytes, inputs, outputs, lowered.weight_bytes, built)

    @property
    def ram(self) -> int | None:
        """Arena, inputs, outputs and the deepest stack; None where the stack has no bound."""
        if self.built is None or self.built.stack is None:
            return None
        return self.arena + self.inputs + self.outputs + self.built.statics + self.built.stack

    @property
    def flash(self) -> int | None:
        """Code and constants."""
        return None if self.built is None else self.built.code + self.built.constants


def check(
    job: Job,
    graph: Graph,
    lowered: Lowered,
    place: Path,
    data: Dataset,
    context: Context,
) -> Checked:
    """Run everything that was emitted into `place` against the integer graph.

    A missing compiler or emulator is a warning, or ToolchainMissing where the job asks for a verified program.
    """
    rows = max(job.options.verify_samples, 1)
    if next(batches(job, graph, data, 1), None) is None:
        lead = graph.inputs[0][1].type.shape[0]
        raise BadInput(
            f"the samples do not fill one batch of {lead} rows, so nothing can be verified; give at least {lead}"
        )
    ships = "integer.onnx" in lowered.files
    samples = mismatches = 0
    if not ships:
        samples, mismatches = _exported(
            graph, place / "integer.onnx", batches(job, graph, data, rows)
        )
        context.log(f"integer.onnx in onnxruntime: {samples} samples, {mismatches} mismatches")
    program, sanitized, reason = _attempt(
        job, context, lambda: _programs(job, graph, place, data, rows)
    )
    if program is not None:
        if ships:
            # the program is that file
            samples, mismatches = program.samples, program.mismatches
        context.log(
            f"{job.target.name} program: {program.samples} samples, {program.mismatches} mismatches, "
            f"{program.intermediates} intermediates compared"
        )
        if (apart := program.apart) is not None:
            context.log(
                f"mismatches are beyond a layer's bound: layers are at most {apart.layers} codes off, outputs "
                f"{apart.outputs} end to end, {100 * apart.equal:.3f} % of the codes are equal"
            )
        for other in program.others:
            context.log(
                f"{other.name}: {other.samples} samples, {other.mismatches} mismatches"
                + (f"; {other.note}" if other.note else "")
            )
    no_float, why, built, counts = None, reason, None, None
    if program is not None:
        built = job.target.footprint(place, name=job.name, cpu=job.cpu)
        counts = _counted(job, graph, place, next(batches(job, graph, data, 1)))
        no_float = job.target.certify(place, name=job.name, cpu=job.cpu)
        if no_float is None:
            why = "this target has no object files to disassemble"
        else:
            context.log(
                f"no-float certificate: {no_float.instructions} {no_float.basis}, "
                f"{len(no_float.findings)} findings"
            )
    taken = Memory.of(graph, lowered, built)
    return Checked(program, sanitized, reason, samples, mismatches, no_float, why, taken, counts)


def measured(job: Job, graph: Graph, lowered: Lowered) -> Memory | None:
    """What a lowered program takes as it is built here; None where it cannot be."""
    with TemporaryDirectory(prefix="qcompile-") as scratch:
        folder.write(Path(scratch), lowered.files)
        try:
            built = job.target.footprint(Path(scratch), name=job.name, cpu=job.cpu)
        except ToolchainMissing:
            return None
    return Memory.of(graph, lowered, built)


def _counted(job: Job, graph: Graph, place: Path, row: Mapping[str, Array]) -> Counts | None:
    """What one inference executes, where the target's emulator can tell."""
    try:
        return job.target.runner(place, graph, name=job.name, cpu=job.cpu).count(row)
    except ToolchainMissing:
        return None


def _attempt(
    job: Job, context: Context, run: Callable[[], tuple[Verification, Verification | None]]
) -> tuple[Verification | None, Verification | None, str | None]:
    try:
        return (*run(), None)
    except ToolchainMissing as e:
        if job.options.require_verified:
            raise
        context.warn(f"the program was not run here: {e}")
        return None, None, str(e)


def _programs(
    job: Job, graph: Graph, place: Path, data: Dataset, rows: int
) -> tuple[Verification, Verification | None]:
    """The shipped build on all rows, the build with sanitizers, where there is one, on a few."""
    shipped = job.target.runner(place, graph, name=job.name, cpu=job.cpu)
    plain = verify(graph, shipped, batches(job, graph, data, rows), trace=job.options.trace_samples)
    if not job.target.sanitizers:
        return plain, None
    strict = job.target.runner(place, graph, name=job.name, cpu=job.cpu, sanitize=True)
    few = batches(job, graph, data, min(rows, SANITIZED_ROWS))
    return plain, verify(graph, strict, few, trace=0, sanitized=True)


def batches(job: Job, graph: Graph, data: Dataset, rows: int) -> Iterator[dict[str, Array]]:
    """The first `rows` samples as codes."""
    done = 0
    steps = {port.name: value.type.shape[0] for port, value in graph.inputs}
    for batch in whole_batches(data, max(steps.values())):
        nhwc = job.options.io_layout == "nhwc"
        whole = border.whole(graph, batch)
        if not all(len(x) for x in whole.values()):
            continue
        codes = border.encode(graph, border.to_channels_last(whole) if nhwc else whole)
        have = min(len(codes[name]) // n for name, n in steps.items())
        for at in range(0, min(have, rows - done), ROWS):
            end = min(at + ROWS, have, rows - done)
            yield {name: codes[name][at * n : end * n] for name, n in steps.items()}
        done += have
        if done >= rows:
            return


def _exported(graph: Graph, model: Path, parts: Iterator[Mapping[str, Array]]) -> tuple[int, int]:
    """Samples and differing elements of integer.onnx in onnxruntime."""
    from qcompile.onnx.exact import ExactSession

    session = ExactSession(model)
    samples = mismatches = 0
    for codes in parts:
        expected = border.run_graph(graph, codes)
        got = session.run(codes) if graph.free_batch else _one_by_one(graph, session, codes)
        samples += len(codes[graph.inputs[0][0].name])
        mismatches += sum(int((expected[p.name] != got[p.name]).sum()) for p, _ in graph.outputs)
    return samples, mismatches


def _one_by_one(
    graph: Graph, session: ExactSession, codes: Mapping[str, Array]
) -> dict[str, Array]:
    steps = {port.name: value.type.shape[0] for port, value in graph.inputs}
    count = min(len(codes[name]) // n for name, n in steps.items())
    parts = [
        session.run({k: codes[k][i * n : (i + 1) * n] for k, n in steps.items()})
        for i in range(count)
    ]
    return {port.name: np.concatenate([p[port.name] for p in parts]) for port, _ in graph.outputs}


def _budgets(job: Job, taken: Memory) -> None:
    """Stop what takes more RAM or flash than was allowed."""
    ram, flash, built = job.options.max_ram, job.options.max_flash, taken.built
    if ram is not None and taken.ram is None:
        reason = "it was not built here" if built is None else built.unbounded
        raise BudgetExceeded(
            f"the program's stack has no known bound, so --max-ram cannot be kept: {reason}"
        )
    if ram is not None and taken.ram is not None and taken.ram > ram:
        assert built is not None
        raise BudgetExceeded(
            f"the program takes {taken.ram:,} bytes of RAM (arena {taken.arena:,}, inputs {taken.inputs:,}, outputs "
            f"{taken.outputs:,}, stack {built.stack:,}), more than the {ram:,} of --max-ram; this is "
            f"the smallest that was found: --max-ram {taken.ram} would do"
        )
    if flash is not None and taken.flash is None:
        raise BudgetExceeded("the program was not built here, so --max-flash cannot be kept")
    if flash is not None and taken.flash is not None and taken.flash > flash:
        assert built is not None
        raise BudgetExceeded(
            f"the program takes {taken.flash:,} bytes of flash (code {built.code:,}, constants "
            f"{built.constants:,}), more than the {flash:,} of --max-flash; --max-flash {taken.flash} would do"
        )


def _differing(program: Verification) -> str:
    """What the other ways to run it showed, where they differ."""
    return "".join(
        f", {o.name} in {o.mismatches} over {o.samples}" for o in program.others if o.mismatches
    )


def gate(job: Job, checked: Checked, sqnr_db: float | None) -> None:
    """Stop what does not equal the integer graph, holds float, or is further from the float model than allowed."""
    if checked.onnx_mismatches:
        raise VerificationMismatch(
            f"integer.onnx differs from the integer graph in {checked.onnx_mismatches} elements over "
            f"{checked.onnx_samples} samples; this is a defect of qcompile or of onnxruntime: please report it"
        )
    for program in (checked.program, checked.sanitized):
        if program is not None and not program.ok:
            if program.apart is not None:
                raise VerificationMismatch(
                    f"layers of the {job.target.name} model are further from the integer graph than their bound in "
                    f"{program.mismatches} elements over {program.samples} samples; first at {program.first}; "
                    "this is a defect of qcompile or of onnxruntime: please report it"
                )
            raise VerificationMismatch(
                f"the {job.target.name} program differs from the integer graph in {program.mismatches} elements "
                f"over {program.samples} samples{_differing(program)}; first at {program.first}; "
                "this is a defect: please report it"
            )
    if checked.no_float is not None and not checked.no_float.clean:
        found = checked.no_float.findings[0] if checked.no_float.findings else "no instructions"
        raise VerificationMismatch(f"the built program is not free of floating point: {found}")
    _budgets(job, checked.memory)
    floor = job.options.min_sqnr
    if floor is not None and sqnr_db is not None and sqnr_db < floor:
        raise AccuracyGate(
            f"the integer program reaches {sqnr_db:.2f} dB against float, below the {floor:g} dB asked for; "
            "try another --method, --first-last int8, or an --override for the layers that lose most"
        )
