"""The report as one page that needs nothing else: no font, no network, and no script but the one that searches it."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping
from functools import cache
from importlib import resources

from jinja2 import ChainableUndefined, Environment, FunctionLoader, Template, Undefined

from qcompile.report import network, pictures, wording
from qcompile.report.timeline import timeline
from qcompile.report.verdict import (
    at,
    bit_exact,
    finite,
    headline,
    made_up,
    on_target,
    rows,
    verdicts,
)

FULL_BAR_DB = 60.0
SCRIPT = "find.js"
_FILTERS = (
    wording.amount, wording.decibel, wording.exact, wording.fraction,
    wording.number, wording.percent, wording.shape, wording.shown, wording.signed, wording.size,
)  # fmt: skip


def render(report: Mapping[str, object]) -> str:
    """The page for a report; whatever the report lacks is shown as a dash."""
    script, groups = _source(SCRIPT), network.network(report)
    return _template("report.html.j2").render(
        r=report,
        first=headline(report),
        verdicts=verdicts(report),
        made_up=made_up(report),
        network=groups,
        rail=max((row.rail.width for group in groups for row in group.layers), default=0),
        bands=network.BANDS,
        widths=network.WIDTHS,
        layers=_layers(report),
        along=pictures.along(rows(report, "layers")),
        arena=timeline(report),
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def render_analysis(report: Mapping[str, object]) -> str:
    """The page for what `analyze` found, with its pictures."""
    inputs = [{**row, "picture": pictures.histogram(row)} for row in rows(report, "inputs")]
    layers = [{**row, "picture": pictures.histogram(row)} for row in _layers(report)]
    weights = [
        {**row, "picture": pictures.histogram(row, finite(row.get("scale_max")))}
        for row in rows(report, "weights")
    ]
    return _template("analysis.html.j2").render(
        r=report,
        exact=bit_exact(report),
        made_up=made_up(report),
        first=headline(report),
        inputs=inputs,
        layers=layers,
        weights=weights,
        along=pictures.along(rows(report, "layers")),
        bars=pictures.bars(rows(report, "sensitivity", "layers")),
        total=at(report, "sensitivity", "sqnr_db"),
    )


def _layers(report: Mapping[str, object]) -> list[dict[str, object]]:
    return [{**layer, "on_target": on_target(report, layer)} for layer in rows(report, "layers")]


@cache
def _environment() -> Environment:
    environment = Environment(
        autoescape=True,
        loader=FunctionLoader(_source),
        undefined=ChainableUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for shown in _FILTERS:
        environment.filters[shown.__name__] = shown
    environment.filters |= {"bar": _bar, "px": _px}
    return environment


def _source(name: str) -> str:
    return resources.files("qcompile.report").joinpath(name).read_text("utf-8")


def _template(name: str) -> Template:
    return _environment().get_template(name)


def _finalize(value: object) -> object:
    """Every value on the page passes here, so no name reaches it with control characters.

    Text that is markup already was made by the template itself.
    """
    if isinstance(value, Undefined) or value is None:
        return wording.NOTHING
    if hasattr(value, "__html__"):
        return value
    return wording.shown(value)


def _bar(value: object) -> str:
    """The length of a bar for a ratio in dB, in percent."""
    if not isinstance(value, int | float) or value != value:
        return "0"
    return f"{100 * min(max(value / FULL_BAR_DB, 0.0), 1.0) if value != math.inf else 100:.0f}"


def _px(value: float) -> str:
    """A coordinate: digits and a point, whatever its size."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
