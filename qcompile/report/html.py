"""The report as one page that needs nothing else: no script, no font, no network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from importlib import resources

from jinja2 import ChainableUndefined, Environment, Template, Undefined

from qcompile.report import wording
from qcompile.report.verdict import made_up, on_target, rows, verdicts

FULL_BAR_DB = 60.0
_FILTERS = (
    wording.amount, wording.decibel, wording.exact, wording.fraction,
    wording.number, wording.percent, wording.shape, wording.size,
)  # fmt: skip


def render(report: Mapping[str, object]) -> str:
    """The page for a report; whatever the report lacks is shown as a dash."""
    layers = [{**layer, "on_target": on_target(report, layer)} for layer in rows(report, "layers")]
    return _template().render(
        r=report, verdicts=verdicts(report), made_up=made_up(report), layers=layers
    )


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True,
        undefined=ChainableUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for shown in _FILTERS:
        environment.filters[shown.__name__] = shown
    environment.filters["bar"] = _bar
    page = resources.files("qcompile.report").joinpath("report.html.j2")
    return environment.from_string(page.read_text("utf-8"))


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
