"""What each command prints, made of the facts it found."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qcompile.report.verdict import State, at, count, made_up, on_target, rows, texts, verdicts
from qcompile.report.wording import amount, decibel, percent, shape, shown, size, visible

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
    parts += [Text(), _worst(report, target), Text(), *_accuracy(report), Text(), _claims(report)]
    parts += [
        Text(),
        Text(
            f"memory  {size(at(report, 'memory', 'arena_bytes'))} working, "
            f"{size(at(report, 'memory', 'weight_bytes'))} weights and tables"
        ),
        Text(f"files   {visible(str(folder))} (read report.html first)"),
    ]
    parts += [Text(f"warning: {sentence}", "yellow") for sentence in texts(report, "warnings")]
    return parts


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
            f"agreement {shown(output.get('agreement'))}, on {samples} samples"
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
