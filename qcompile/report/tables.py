"""What each command prints, made of the facts it found."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qcompile.report.verdict import (
    MADE_UP,
    State,
    at,
    bit_exact,
    count,
    made_up,
    on_target,
    rows,
    texts,
    verdicts,
)
from qcompile.report.wording import (
    amount,
    decibel,
    duration,
    fraction,
    number,
    percent,
    shape,
    shown,
    signed,
    size,
    visible,
)
from qcompile.target import Counts

if TYPE_CHECKING:
    from qcompile.bench import Profile, Timing
    from qcompile.verify import Verification

WORST_LAYERS = 5
STATES: Mapping[State, tuple[str, str]] = {
    "pass": ("holds", "green"),
    "fail": ("FAILS", "bold red"),
    "open": ("open", "yellow"),
}


def compiled(report: Mapping[str, object], folder: Path) -> list[RenderableType]:
    """The end of a compilation: coverage, the worst layers, the verdicts, memory, files, and what to beware of."""
    target = shown(at(report, "target", "name"))
    head = (
        f"{shown(at(report, 'model', 'name'))} for {target} (cpu {shown(at(report, 'target', 'cpu'))}), "
        f"recipe {shown(at(report, 'recipe', 'name'))}"
    )
    parts: list[RenderableType] = [Text(head, "bold")]
    parts += _alarm(made_up(report))
    parts += _tried(report)
    parts += [Text(), _worst(report, target), Text(), *_accuracy(report), Text(), _claims(report)]
    if at(report, "design") is None:
        taken = (
            f"memory  {size(at(report, 'memory', 'arena_bytes'))} working, "
            f"{size(at(report, 'memory', 'weight_bytes'))} weights and tables{_chip(report)}"
        )
    else:
        taken = f"design  {_logic(at(report, 'design'))}"
    parts += [
        Text(),
        Text(taken),
        Text(f"files   {visible(str(folder))} (read report.html first)"),
    ]
    parts += [Text(f"warning: {sentence}", "yellow") for sentence in texts(report, "warnings")]
    return parts


def _chip(report: Mapping[str, object]) -> str:
    """What the built program takes, and what an inference executes, where that is known."""
    ram, flash = at(report, "memory", "ram_bytes"), at(report, "memory", "flash_bytes")
    parts = [f"{size(ram)} RAM"] if ram is not None else []
    parts += [f"{size(flash)} flash"] if flash is not None else []
    if (bands := count(report, "program", "bands")) > 1:
        parts.append(f"early layers in {bands} bands")
    if (executed := at(report, "program", "executed")) is not None:
        parts.append(f"{amount(executed)} {shown(at(report, 'program', 'unit'))} an inference")
    return f"; built: {', '.join(parts)}" if parts else ""


def designed(design: Mapping[str, object]) -> list[RenderableType]:
    """A design of logic unit by unit, then as a whole."""
    head = ("unit", "layer", "kind", "PE", "SIMD", "cycles", "DSP", "BRAM18", "LUT")
    keys = ("name", "layer", "kind", "pe", "simd", "cycles", "dsp", "bram18", "lut")
    body = [[row.get(key) for key in keys] for row in rows(design, "units")]
    return [table(head, body, head[3:]), Text(), Text(_logic(design))]


def _logic(design: object) -> str:
    """What a design of logic takes and how fast it is, before synthesis."""
    of = {
        k: f"{amount(at(design, k))} of {amount(at(design, 'available', k))}"
        for k in ("dsp", "bram18")
    }
    return (
        f"{visible(str(at(design, 'part')))} at {number(at(design, 'clock_mhz'), 4)} MHz: "
        f"latency {amount(at(design, 'latency'))} cycles, {number(at(design, 'latency_us'), 4)} us; "
        f"{number(at(design, 'images_per_second'), 4)} images/s; {of['dsp']} DSP, {of['bram18']} BRAM18, "
        f"about {amount(at(design, 'lut'))} of {amount(at(design, 'available', 'lut'))} LUT "
        f"(+- {fraction(at(design, 'lut_error'))}); Fmax not measured"
    )


def _tried(report: Mapping[str, object]) -> list[RenderableType]:
    """What was tried where the recipe leaves a choice."""
    found = rows(report, "recipe", "trials")
    if not found:
        return []
    body = (
        (
            t.get("step"),
            decibel(t.get("sqnr_db")),
            decibel(t.get("gain_db")),
            "taken" if t.get("taken") else "left",
        )
        for t in found
    )
    return [Text(), table(("tried on held-out samples", "dB", "gain", ""), body, ("dB", "gain"))]


def analyzed(report: Mapping[str, object], folder: Path | None) -> list[RenderableType]:
    """Where accuracy goes: stage by stage, the causes with their flags, the layers that cost most."""
    target, exact = shown(at(report, "target", "name")), bit_exact(report)
    fine = "adds nothing" if at(report, "verification", "apart") is None else "near"
    verified = {"pass": fine, "fail": "DIFFERS", "open": "not run"}[exact.state]
    head = (
        f"{shown(at(report, 'model', 'name'))} for {target}, "
        f"recipe {shown(at(report, 'recipe', 'name'))}: dB against float after each stage"
    )
    stages = table(
        ("output", "weights", "activations", "integer", target),
        (
            (
                output.get("name"),
                decibel(output.get("sqnr_weights_db")),
                decibel(output.get("sqnr_fake_quant_db")),
                decibel(output.get("sqnr_integer_db")),
                Text(verified, STATES[exact.state][1]),
            )
            for output in rows(report, "accuracy", "outputs")
        ),
        numbers=("weights", "activations", "integer"),
    )
    parts = [Text(head, "bold"), *_alarm(made_up(report)), Text(), stages, Text()]
    causes = rows(report, "causes")
    if not causes:
        parts.append(Text("no layer kept float would gain the outputs half a decibel", "dim"))
    for cause in causes:
        also = texts(cause, "also")
        parts.append(
            Text.assemble(
                (f"{shown(cause.get('rank')):>2}. {signed(cause.get('gain_db'))} dB", "bold"),
                (f" ({shown(cause.get('basis'))}) ", "dim"),
                f"{shown(cause.get('kind'))}: {shown(cause.get('sentence'))}",
                (f"; also {', '.join(also)}" if also else "", "dim"),
            )
        )
        if cause.get("override") is not None:
            parts.append(Text(f"    {shown(cause.get('override'))}", "green"))
    parts += [Text(), _sensitive(report)]
    if folder is not None:
        parts += [Text(), Text(f"files   {visible(str(folder))} (read report.html first)")]
    parts += [Text(f"warning: {sentence}", "yellow") for sentence in texts(report, "warnings")]
    return parts


def _sensitive(report: Mapping[str, object]) -> Table:
    def cost(row: Mapping[str, object]) -> float:
        gain = row.get("gain_db")
        return -gain if isinstance(gain, int | float) else 0.0

    listed = rows(report, "sensitivity", "layers")
    worst = sorted(listed, key=cost)[:WORST_LAYERS]
    made = table(
        ("layer", "gain kept float, dB", "rounded alone, dB"),
        (
            (
                row.get("layer"),
                signed(row.get("gain_db")),
                "exact" if row.get("alone_db") is None else decibel(row.get("alone_db")),
            )
            for row in worst
        ),
        numbers=("gain kept float, dB", "rounded alone, dB"),
    )
    made.title = Text(f"the {len(worst)} of {len(listed)} layers that cost most", "dim")
    made.title_justify = "left"
    return made


def table(
    head: Sequence[str], body: Iterable[Sequence[object]], numbers: Sequence[str] = ()
) -> Table:
    """A plain table; the columns named in `numbers` are aligned to the right."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in head:
        made.add_column(name, justify="right" if name in numbers else "left", overflow="fold")
    for row in body:
        made.add_row(*(cell if isinstance(cell, Text) else Text(shown(cell)) for cell in row))
    return made


def facts(pairs: Iterable[tuple[str, object]]) -> Table:
    """Names and what they stand for, one to a line."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    made.add_column(style="dim", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in pairs:
        made.add_row(Text(visible(name)), value if isinstance(value, Text) else Text(shown(value)))
    return made


def verdict_text(state: State) -> Text:
    """One word for a verdict, in its colour."""
    return Text(*STATES[state])


def _alarm(sentence: str | None) -> list[RenderableType]:
    if sentence is None:
        return []
    return [Padding(Text(f"MADE-UP DATA: {sentence}", "bold red"), (1, 0, 0, 0))]


def _worst(report: Mapping[str, object], target: str) -> Table:
    def noise(layer: Mapping[str, object]) -> float:
        ratio = layer.get("sqnr_integer_db")
        return ratio if isinstance(ratio, int | float) and ratio == ratio else math.inf

    layers = rows(report, "layers")
    worst = sorted(layers, key=noise)[:WORST_LAYERS]
    made = table(
        ("layer", "kernel", "bits", "MACs", "fake-quant dB", "integer dB", target, "clipped"),
        (
            (
                layer.get("name"),
                layer.get("kernel"),
                layer.get("bits"),
                amount(layer.get("macs")),
                decibel(layer.get("sqnr_fake_quant_db")),
                decibel(layer.get("sqnr_integer_db")),
                on_target(report, layer),
                percent(layer.get("clipped_percent")),
            )
            for layer in worst
        ),
        numbers=("bits", "MACs", "fake-quant dB", "integer dB", "clipped"),
    )
    made.title = Text(
        f"the {len(worst)} of {len(layers)} layers that are furthest from the float network", "dim"
    )
    made.title_justify = "left"
    return made


def _accuracy(report: Mapping[str, object]) -> list[Text]:
    samples = count(report, "accuracy", "samples")
    return [
        Text(
            f"output {shown(output.get('name'))}: {decibel(output.get('sqnr_integer_db'))} dB against float "
            f"(fake-quantized {decibel(output.get('sqnr_fake_quant_db'))} dB), "
            f"agreement {fraction(output.get('agreement'))}, on {samples} samples"
        )
        for output in rows(report, "accuracy", "outputs")
    ]


def _claims(report: Mapping[str, object]) -> Table:
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for column in ("claim", "state", "sentence"):
        made.add_column(no_wrap=column != "sentence")
    for v in verdicts(report):
        made.add_row(Text(v.claim), verdict_text(v.state), Text(v.sentence))
    return made


def ports(title: str, listed: Iterable[Mapping[str, object]]) -> Table:
    """Inputs or outputs of a model."""
    return table(
        (title, "shape", "type"),
        ((port.get("name"), shape(port.get("shape")), port.get("dtype")) for port in listed),
    )


def inspected(found: Mapping[str, object], *, every_slot: bool) -> list[RenderableType]:
    """A model: its border, size, operators, what has no integer form and why."""
    operators = found.get("operators")
    counted = operators.items() if isinstance(operators, Mapping) else ()
    refused, slots = rows(found, "unsupported"), rows(found, "slots")
    parts: list[RenderableType] = [
        ports("input", rows(found, "inputs")),
        ports("output", rows(found, "outputs")),
        Text(),
        facts(
            [
                ("nodes", found.get("nodes")),
                ("parameters", found.get("parameters")),
                ("operators", ", ".join(f"{visible(str(op))} {n}" for op, n in counted)),
                ("quantized tensors", len(slots)),
            ]
        ),
    ]
    if refused:
        body = [(row.get("node"), row.get("operator"), row.get("reason")) for row in refused]
        parts += [Text(), table(("no integer form: node", "operator", "reason"), body)]
    elif every_slot:
        body = [(row.get("tensor"), row.get("kind"), row.get("format")) for row in slots]
        parts += [Text(), table(("tensor", "kind", "format"), body)]
    parts += [Text(f"warning: {sentence}", "yellow") for sentence in texts(found, "warnings")]
    return parts


def verified(found: Verification, origin: str) -> RenderableType:
    """The outcome of a verification in a line."""
    origin = {"random": "random", "synthetic": "made-up"}.get(origin, "given")
    if (apart := found.apart) is not None:
        return Text.assemble(
            verdict_text("pass" if found.ok else "fail"),
            f"  {found.samples:,} {origin} samples, floating-point arithmetic: {found.mismatches:,} elements beyond "
            f"the bound of their layer; {found.intermediates:,} layers compared on the same codes, at most "
            f"{apart.layers} codes off ({apart.allowed} allowed), {percent(100 * apart.equal, 3)} equal; "
            f"outputs at most {apart.outputs} codes off end to end",
        )
    return Text.assemble(
        verdict_text("pass" if found.ok else "fail"),
        f"  {found.samples:,} {origin} samples, {found.mismatches:,} elements differ; "
        f"{found.intermediates:,} intermediate values compared; "
        f"sanitizers {'found nothing' if found.sanitized else 'not run (--sanitize)'}",
        *(
            f"\n      {visible(o.name)}: {o.samples:,} of these samples, {o.mismatches:,} elements differ"
            + (f"; {visible(o.note)}" if o.note else "")
            for o in found.others
        ),
    )


def evaluated(found: Mapping[str, object]) -> list[RenderableType]:
    """Float against integer, one line for each output."""
    origin = str(found.get("origin"))
    return [
        *_alarm(MADE_UP.get(origin) if found.get("marked") else None),
        table(
            ("output", "samples", "SQNR dB", "agreement", "metric", "float", "integer", "points"),
            (
                (
                    row.get("name"),
                    row.get("samples"),
                    decibel(row.get("sqnr_db")),
                    fraction(row.get("agreement")),
                    row.get("metric"),
                    fraction(row.get("float")),
                    fraction(row.get("integer")),
                    signed(row.get("delta_points")),
                )
                for row in rows(found, "outputs")
            ),
            numbers=("samples", "SQNR dB", "agreement", "float", "integer", "points"),
        ),
    ]


def timed(timing: Timing) -> RenderableType:
    """Time per inference."""
    kind = "integers in, integers out" if timing.raw else "float in, float out"
    return Text(
        f"{duration(timing.cpu_ns)} of CPU time per inference ({duration(timing.wall_ns)} elapsed), {kind}"
    )


def profiled(found: Profile) -> RenderableType:
    """What every layer takes, its rate, and that rate as a share of the processor's."""
    head = ("layer", "kernel", "MACs", "time", "GMAC/s", "of the peak")
    body = []
    for layer in found.layers:
        rate = layer.macs / layer.ns if layer.macs and layer.ns else None
        share = "" if rate is None or found.peak is None else f"{100 * rate / found.peak:.0f} %"
        body.append(
            (
                visible(layer.name),
                layer.kernel,
                f"{layer.macs:,}" if layer.macs else "",
                duration(layer.ns),
                "" if rate is None else f"{rate:.1f}",
                share,
            )
        )
    macs, ns = sum(layer.macs for layer in found.layers), sum(layer.ns for layer in found.layers)
    share = f"{100 * macs / ns / found.peak:.0f} %" if found.peak and ns else ""
    body.append(
        ("all layers", "", f"{macs:,}", duration(ns), f"{macs / ns:.1f}" if ns else "", share)
    )
    return table(head, body, head[2:])


def counted(counts: Counts) -> RenderableType:
    """What every layer executes, beside what its cost model said."""
    head = ("layer", "kernel", "MACs", "predicted", counts.unit, "per MAC")
    body = [
        (
            visible(layer.name),
            layer.kernel,
            f"{layer.macs:,}" if layer.macs else "",
            f"{layer.predicted:,}",
            f"{layer.executed:,}",
            f"{layer.per_mac:.2f}" if layer.per_mac is not None else "",
        )
        for layer in counts.layers
    ]
    rate = f"{counts.total / counts.macs:.2f}" if counts.macs else ""
    body.append(("between layers", "", "", "", f"{counts.entry:,}", ""))
    body.append(("total", "", f"{counts.macs:,}", "", f"{counts.total:,}", rate))
    return table(head, body, head[2:])


def examined(found: Sequence[tuple[str, Sequence[str]]]) -> RenderableType:
    """What is missing for each target."""
    return table(
        ("target", "", "missing"),
        (
            (
                name,
                Text("ready", "green") if not lacks else Text("not ready", "yellow"),
                "; ".join(lacks),
            )
            for name, lacks in found
        ),
    )
