"""Where the marks of the pictures go: plain numbers for pictures.html.j2, names untouched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qcompile.report.verdict import at, finite
from qcompile.report.wording import decibel, short

Row = Mapping[str, object]

# The last is drawn on top of the others, which it often covers, so the marks become smaller.
STAGES = (
    ("integer", "sqnr_integer_db", 4.0),
    ("fake", "sqnr_fake_quant_db", 3.0),
    ("weights", "sqnr_weights_db", 2.0),
)
WIDTH, LABELLED = 1160, 40
LEFT, TOP, PLOT, ROW = 70, 10, 230, 18
ALONG_NAME, BAR_NAME = 20, 30
MOST_POINTS = 400
"""Layers whose points have marks and titles of their own; lines say enough of more."""
HISTOGRAM_WIDTH, HISTOGRAM_HEIGHT, MOST_LEVELS = 260, 96, 32


@dataclass(frozen=True, slots=True)
class Line:
    """One stage: a point with a title for each layer that was measured, and the unbroken pieces between them."""

    stage: str
    radius: float
    points: tuple[tuple[float, float, str], ...]
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Along:
    """SQNR of each tensor in order of execution."""

    width: int
    height: int
    left: int
    bottom: float
    rules: tuple[tuple[float, str], ...]
    names: tuple[tuple[float, str], ...]
    lines: tuple[Line, ...]


def along(layers: Sequence[Row]) -> Along | None:
    """The SQNR of every layer after each stage; None where nothing was measured."""
    known = [v for row in layers for _, key, _ in STAGES if (v := finite(row.get(key))) is not None]
    if not known:
        return None
    lo, hi = (10 * math.floor(min(0.0, *known) / 10), 10 * math.ceil(max(10.0, *known) / 10))
    # a few marks of tens, however far down a ruined tensor goes
    tens = 10 * max(1, math.ceil((hi - lo) / 80))
    bottom = float(TOP + PLOT)

    def x(i: int) -> float:
        return round(LEFT + (i + 0.5) * (WIDTH - LEFT - 10) / len(layers), 1)

    def y(db: float) -> float:
        return round(TOP + (hi - db) / (hi - lo) * PLOT, 1)

    lines = []
    for stage, key, radius in STAGES:
        points, pieces = [], [list[str]()]
        for i, row in enumerate(layers):
            value = finite(row.get(key))
            if value is None:
                pieces.append([])
                continue
            if len(layers) <= MOST_POINTS:
                points.append((x(i), y(value), f"{row.get('tensor')}: {decibel(value)} dB"))
            pieces[-1].append(f"{x(i)},{y(value)}")
        paths = tuple(" ".join(p) for p in pieces if len(p) > 1)
        lines.append(Line(stage, radius, tuple(points), paths))
    every = math.ceil(len(layers) / LABELLED)
    names = tuple(
        (x(i), short(row.get("name"), ALONG_NAME)) for i, row in enumerate(layers) if i % every == 0
    )
    longest = max((len(name) for _, name in names), default=0)
    height = int(bottom + 22 + longest * 4.8)
    rules = tuple((y(v), f"{v}") for v in range(lo, hi + 1, tens))
    return Along(WIDTH, height, LEFT, bottom, rules, names, tuple(lines))


@dataclass(frozen=True, slots=True)
class Bar:
    """One layer: what keeping it float gains, and its share of the noise when it is rounded alone."""

    name: str
    short: str
    y: int
    gain: float
    gain_x: float
    gain_width: float
    gain_end: float
    alone_width: float
    alone: str


@dataclass(frozen=True, slots=True)
class Bars:
    """A bar of each kind for every layer; bars of losses reach `room` to the left of `zero`."""

    width: int
    height: int
    zero: float
    second: float
    room: float
    rows: tuple[Bar, ...]


def bars(layers: Sequence[Row]) -> Bars:
    """Leave-one-out sensitivity, in order of execution."""
    gains = [finite(row.get("gain_db")) or 0.0 for row in layers]
    alone = [finite(row.get("alone_db")) for row in layers]
    noise = [0.0 if db is None else 10 ** (-db / 10) for db in alone]
    total, loudest = sum(noise) or 1.0, max(noise, default=0.0) or 1.0
    reach = max(1e-9, max(gains, default=0.0), -min(gains, default=0.0))
    span, second_span = 330.0, 210.0
    # losses are seldom more than chance: they get the room they need and no more
    room = span * max(0.0, -min(gains, default=0.0)) / (reach + max(0.0, -min(gains, default=0.0)))
    unit = (span - room) / reach
    zero, second = 250.0 + room, 250.0 + span + 90.0
    made = []
    for i, (row, gained, db) in enumerate(zip(layers, gains, alone, strict=True)):
        width = round(abs(gained) * unit, 1)
        share = noise[i] / total
        text = f"{100 * share:.0f} %, {decibel(db if db is not None else math.inf)} dB"
        made.append(
            Bar(
                str(row.get("layer")),
                short(row.get("layer"), BAR_NAME),
                22 + i * ROW,
                gained,
                round(zero if gained >= 0 else zero - width, 1),
                width,
                round(zero + max(0.0, width if gained >= 0 else 0.0), 1),
                round(noise[i] / loudest * second_span, 1),
                text if db is not None else "exact",
            )
        )
    return Bars(WIDTH - 200, 26 + ROW * len(layers), zero, second, room, tuple(made))


def histogram(row: Row, scale: float | None = None) -> dict[str, object] | None:
    """The values of a tensor against the codes it has; None where no values were counted.

    `scale` stands for the row's own, where a weight has several.
    """
    lo, hi = finite(at(row, "histogram", "lo")), finite(at(row, "histogram", "hi"))
    counts, bits = at(row, "histogram", "counts"), row.get("bits")
    step = scale if scale is not None else finite(row.get("scale"))
    if lo is None or hi is None or not step or not isinstance(counts, Sequence):
        return None
    if not isinstance(bits, int) or not 2 <= bits <= 32:
        return None
    zero = row.get("zero_point")
    offset = zero if isinstance(zero, int) else 0
    least = (-(1 << (bits - 1)) - offset) * step
    most = ((1 << (bits - 1)) - 1 - offset) * step
    left, right = min(lo, least), max(hi, most)
    unit = HISTOGRAM_WIDTH / (right - left)
    bottom = HISTOGRAM_HEIGHT - 16

    def x(value: float) -> float:
        return round((value - left) * unit, 2)

    tallest = math.log1p(max((n for n in counts if isinstance(n, int)), default=0)) or 1.0
    width = (hi - lo) / max(len(counts), 1)
    paths: dict[bool, list[str]] = {True: [], False: []}
    for i, n in enumerate(counts):
        if not isinstance(n, int) or n <= 0:
            continue
        start = lo + i * width
        tall = round((bottom - 4) * math.log1p(n) / tallest, 1)
        middle = start + width / 2
        held = least - step / 2 <= middle <= most + step / 2
        across = max(round(width * unit, 2), 0.8)
        paths[held].append(f"M{x(start)} {bottom}v-{tall}h{across}v{tall}z")
    every = max(1, math.ceil((1 << bits) / MOST_LEVELS))
    codes = range(_first(least, step, every), round(most / step) + 1, every)
    levels = "".join(f"M{x(k * step)} 0v{bottom}" for k in codes)
    return {
        "width": HISTOGRAM_WIDTH,
        "height": HISTOGRAM_HEIGHT,
        "bottom": bottom,
        "from": x(least),
        "to": x(most),
        "levels": levels,
        "every": every,
        "held": "".join(paths[True]),
        "cut": "".join(paths[False]),
        "least": left,
        "most": right,
        # a label at the ends would cover theirs
        "origin": x(0.0) if 0.2 < x(0.0) / HISTOGRAM_WIDTH < 0.8 else None,
    }


def _first(least: float, step: float, every: int) -> int:
    """The lowest multiple of `every` codes from zero that a tensor holds."""
    return math.ceil(round(least / step) / every) * every
