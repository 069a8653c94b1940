"""The network as a picture one can read down: a row for each layer, and lines that carry values from row to row.

Rows stand in order of execution, as the lines of a history of commits do; each row is a picture of its own, so that
rows can be folded away, found, and broken over printed pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from qcompile.report import pictures
from qcompile.report.verdict import finite, on_target, rows, texts
from qcompile.report.wording import visible

Facts = Mapping[str, object]

PITCH, HEIGHT, MOST_LANES = 13, 30, 16
FEWEST_IN_A_GROUP, MOST_IN_A_GROUP = 2, 40
PICTURED = 150
"""Layers with pictures of their values, those first that are furthest from float: so the page stays small."""
BANDS = ((40.0, "fine", "40 dB and more"), (30.0, "good", "30 to 40"), (20.0, "fair", "20 to 30"),
         (10.0, "poor", "10 to 20"), (float("-inf"), "lost", "less than 10 dB"))  # fmt: skip
"""The least ratio of each colour, its class and what the legend says."""
WIDTHS = ((7, "narrow", "fewer than 8 bits"), (8, "byte", "8 bits"),
          (32, "wide-codes", "more than 8 bits"))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rail:
    """Lines beside one row: `edges` while it is shown, `through` beside what it unfolds; the mark is at x."""

    width: int
    x: int
    edges: str
    through: str


@dataclass(frozen=True, slots=True)
class Layer:
    """One row: an input or a layer, with what is known of its result."""

    name: str
    operation: str
    rail: Rail
    ratio: float | None
    band: str
    bits: int | None
    width: str
    finding: Facts | None
    results: tuple[Facts, ...]
    weights: tuple[Facts, ...]
    reads: tuple[str, ...]
    gives: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that fold into one: `folded` is drawn instead of them, `rail` above them; a single row has no title."""

    title: str
    layers: tuple[Layer, ...]
    rail: Rail
    folded: Rail
    worst: float | None
    band: str
    operations: str


def network(report: Facts) -> list[Group]:
    """The rows of a report, grouped by the beginning of their names."""
    listed = _rows(report)
    return [_group(title, part) for title, part in _grouped(listed)]


def band(ratio: object) -> str:
    """The colour of a ratio in dB; of none where there is no noise or nothing was measured."""
    found = finite(ratio)
    return "none" if found is None else next(name for least, name, _ in BANDS if found >= least)


def width(bits: object) -> str:
    """The colour of a number of bits."""
    if not isinstance(bits, int):
        return "none"
    return next((name for most, name, _ in WIDTHS if bits <= most), "wide-codes")


def places(row: Facts, below: int) -> list[int]:
    """Which rows of the coverage before this one it reads."""
    found = row.get("reads")
    listed = found if isinstance(found, Sequence) else []
    return [i for i in listed if isinstance(i, int) and 0 <= i < below]


# --- rows -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Lanes:
    """Whose result is on which lane, from row to row; each leaves it at the `last` row that reads it."""

    last: Mapping[int, int]
    taken: list[int | None] = field(default_factory=list)

    def live(self) -> list[int]:
        return [lane for lane, row in enumerate(self.taken) if row is not None]

    def row(self, row: int, sources: Sequence[int]) -> Rail:
        """Draw one row and leave the lanes as the next one finds them."""
        before = list(self.taken)
        ended = [
            i
            for i, s in enumerate(before)
            if s is not None and s in sources and self.last[s] <= row
        ]
        lane = ended[0] if ended else next(
            (i for i, s in enumerate(before) if s is None), len(before)
        )  # fmt: skip
        for i in ended:
            self.taken[i] = None
        if row in self.last:
            self.taken += [None] * (lane + 1 - len(self.taken))
            self.taken[lane] = row
        x, half = _x(lane), HEIGHT // 2
        lines = []
        for i, s in enumerate(before):
            if s is None:
                continue
            at = _x(i)
            if i not in ended:
                lines.append(f"M{at} 0V{HEIGHT}")
            if s in sources:
                lines.append(
                    f"M{at} 0C{at} {half} {x} 0 {x} {half}" if at != x else f"M{x} 0V{half}"
                )
        if row in self.last:
            lines.append(f"M{x} {half}V{HEIGHT}")
        lanes = max(len(before), len(self.taken), lane + 1)
        return Rail(_across(lanes), x, "".join(dict.fromkeys(lines)), _through(self.live()))


def _rows(report: Facts) -> list[tuple[Layer, list[int], list[int]]]:
    """Every row with the lanes that are taken before it and after it."""
    entries = [str(port.get("name")) for port in rows(report, "inputs")]
    coverage = rows(report, "coverage")
    first = len(entries)
    none: list[list[int]] = [[] for _ in entries]
    sources = none + [
        [first + p for p in places(row, i)]
        + [entries.index(name) for name in map(str, _list(row, "inputs")) if name in entries]
        for i, row in enumerate(coverage)
    ]
    lanes = _Lanes({s: i for i, found in enumerate(sources) for s in found})
    named = [*entries, *(str(row.get("layer")) for row in coverage)]
    known = _Known(report)
    made = []
    for i, found in enumerate(sources):
        before = lanes.live()
        rail = lanes.row(i, found)
        feeding = tuple(dict.fromkeys(named[s] for s in found))
        row = coverage[i - first] if i >= first else None
        made.append((known.layer(named[i], row, rail, feeding), before, lanes.live()))
    return made


class _Known:
    """What a report has to say of each layer, by the layer's name."""

    def __init__(self, report: Facts) -> None:
        self.report = report
        self.results = _by_name(rows(report, "layers"), "name")
        self.weights = _by_name(rows(report, "weights"), "layer")
        self.findings = _by_name(rows(report, "findings"), "layer")
        self.outputs = {str(port.get("name")) for port in rows(report, "outputs")}
        least = {name: _least(found) for name, found in self.results.items()}
        far = sorted(least, key=lambda name: (least[name] is None, least[name] or 0.0))
        first = dict.fromkeys([*self.findings, *far, *self.weights])
        self.pictured = set(list(first)[:PICTURED])

    def layer(self, name: str, row: Facts | None, rail: Rail, reads: tuple[str, ...]) -> Layer:
        """The row of an input or of a layer."""
        if row is None:
            return Layer(name, "input", rail, None, "none", None, "none", None, (), (), reads, ())
        shown, found = name in self.pictured, self.results.get(name, [])
        results = tuple(
            {
                **r,
                "on_target": on_target(self.report, r),
                "pictured": shown,
                "picture": pictures.histogram(r) if shown else None,
            }
            for r in found
        )
        weights = tuple(
            {
                **w,
                "pictured": shown,
                "picture": pictures.histogram(w, finite(w.get("scale_max"))) if shown else None,
            }
            for w in self.weights.get(name, [])
        )  # fmt: skip
        ratio = _least(found)
        bits = next((b for r in found[::-1] if isinstance(b := r.get("bits"), int)), None)
        what = texts(row, "operators") or texts(row, "integer")
        standing_out = self.findings.get(name, [None])[0]
        gives = tuple(t for r in found if (t := str(r.get("tensor"))) in self.outputs)
        return Layer(
            name, " + ".join(what), rail, ratio, band(ratio), bits, width(bits), standing_out, results, weights, reads,
            gives,
        )  # fmt: skip


def _by_name(listed: Sequence[Facts], key: str) -> dict[str, list[Facts]]:
    found: dict[str, list[Facts]] = {}
    for row in listed:
        found.setdefault(str(row.get(key)), []).append(row)
    return found


def _least(results: Sequence[Facts]) -> float | None:
    """The lowest ratio in dB of a layer's results."""
    ratios = (finite(r.get("sqnr_integer_db")) for r in results)
    return min((r for r in ratios if r is not None), default=None)


# --- groups -----------------------------------------------------------------------------------------------------

_Row = tuple[Layer, list[int], list[int]]


def _grouped(listed: Sequence[_Row], depth: int = 1) -> Iterator[tuple[str, Sequence[_Row]]]:
    """Runs of rows whose names begin alike; long runs are told apart further down their names."""
    start = 0
    while start < len(listed):
        head, end = _head(listed[start][0].name, depth), start + 1
        while end < len(listed) and _head(listed[end][0].name, depth) == head:
            end += 1
        part = listed[start:end]
        deeper = {_head(layer.name, depth + 1) for layer, _, _ in part}
        if len(part) > MOST_IN_A_GROUP and 1 < len(deeper) <= len(part) // FEWEST_IN_A_GROUP:
            yield from _grouped(part, depth + 1)
        elif head and len(part) >= FEWEST_IN_A_GROUP:
            yield head, part
        else:
            yield from (("", [row]) for row in part)
        start = end


def _head(name: str, depth: int) -> str:
    """The first parts of a name; none where it has no further ones."""
    parts = name.strip("/").split("/")
    return "/".join(parts[:depth]) if len(parts) > depth else ""


def _group(title: str, part: Sequence[_Row]) -> Group:
    layers = tuple(layer for layer, _, _ in part)
    before, after = part[0][1], part[-1][2]
    # what passes by all rows of the group is on the same lane before and after
    kept = set(before) & set(after)
    for _, _, live in part:
        kept &= set(live)
    x = layers[-1].rail.x
    half = HEIGHT // 2
    lines = [f"M{_x(i)} 0V{HEIGHT}" for i in sorted(kept)]
    for i in before:
        if i not in kept:
            lines.append(f"M{_x(i)} 0C{_x(i)} {half} {x} 0 {x} {half}")
    for i in after:
        if i not in kept:
            lines.append(f"M{x} {half}C{x} {HEIGHT} {_x(i)} {half} {_x(i)} {HEIGHT}")
    through = _through(before)
    ratios = [layer.ratio for layer in layers if layer.ratio is not None]
    worst = min(ratios, default=None)
    operations = dict.fromkeys(visible(layer.operation) for layer in layers)
    lanes = _across(max((*before, *after, 0)) + 1)
    return Group(
        title, layers, Rail(lanes, x, through, through), Rail(max(lanes, x + PITCH // 2 + 1), x, "".join(lines), ""),
        worst, band(worst), ", ".join(operations),
    )  # fmt: skip


def _x(lane: int) -> int:
    """The middle of a lane; the last one holds all that find no other."""
    return min(lane, MOST_LANES - 1) * PITCH + PITCH // 2 + 1


def _across(lanes: int) -> int:
    return min(max(lanes, 1), MOST_LANES) * PITCH + 1


def _through(lanes: Sequence[int]) -> str:
    return "".join(dict.fromkeys(f"M{_x(i)} 0V{HEIGHT}" for i in lanes))


def _list(row: Facts, key: str) -> Sequence[object]:
    found = row.get(key)
    return found if isinstance(found, Sequence) and not isinstance(found, str) else ()
