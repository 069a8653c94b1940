"""The arena over time: which bytes each value holds from which step to which."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qcompile.report.verdict import at, count, rows
from qcompile.report.wording import short, shown, size

WIDTH, LEFT, TOP, PLOT = 1160, 76, 8, 250
LABELLED, NAME = 40, 20
MOST_BLOCKS = 500
"""Blocks that are drawn, those first that hold most bytes for most steps: what they take on the page is bounded."""
ROOM = 6.9
"""Width of a character of the names in blocks."""


@dataclass(frozen=True, slots=True)
class Block:
    """A rectangle with a title, and where there is room with the name of the step that makes it."""

    kind: str
    x: float
    y: float
    width: float
    height: float
    title: str
    label: str


@dataclass(frozen=True, slots=True)
class Timeline:
    """Blocks above the names of the steps; `fullest` is the step with most live bytes, which lies at `peak`."""

    width: int
    height: int
    left: int
    top: int
    bottom: float
    rules: tuple[tuple[float, str], ...]
    names: tuple[tuple[float, str], ...]
    blocks: tuple[Block, ...]
    left_out: int
    fullest: str
    live: int
    peak: tuple[float, float]


def timeline(report: Mapping[str, object]) -> Timeline | None:
    """The picture of `memory.buffers`; None where there are none."""
    steps = [str(row.get("name")) for row in rows(report, "program", "layers")]
    found = [b for b in rows(report, "memory", "buffers") if _drawn(b, len(steps))]
    arena = max((count(b, "offset") + count(b, "bytes") for b in found), default=0)
    arena = max(arena, count(report, "memory", "arena_bytes"))
    if not found:
        return None
    across = (WIDTH - LEFT - 10) / len(steps)

    def x(step: float) -> float:
        return round(LEFT + step * across, 1)

    def y(byte: float) -> float:
        return round(TOP + PLOT * (1 - byte / arena), 1)

    def area(b: Mapping[str, object]) -> int:
        return count(b, "bytes") * (count(b, "last") - count(b, "first") + 1)

    largest = sorted(range(len(found)), key=lambda i: -area(found[i]))[:MOST_BLOCKS]
    blocks = []
    for i in sorted(largest):
        b = found[i]
        offset, taken, first, last = (count(b, key) for key in ("offset", "bytes", "first", "last"))
        name = b.get("value")
        when = steps[first] if first == last else f"{steps[first]} … {steps[last]}"
        what = "scratch" if name is None else str(name)
        wide, tall = x(last + 1) - x(first), y(offset) - y(offset + taken)
        letters = int((wide - 8) / ROOM)
        blocks.append(
            Block(
                "scratch" if name is None else "value",
                x(first),
                y(offset + taken),
                round(max(wide - 1, 0.5), 1),
                round(max(tall - 0.6, 0.4), 1),
                f"{what}: {shown(taken)} bytes from {shown(offset)}, during {when}",
                short(what if name is None else steps[first], letters)
                if letters >= 4 and tall >= 12
                else "",
            )
        )
    during: list[list[tuple[int, int]]] = [[] for _ in steps]
    for b in found:
        start = count(b, "offset")
        for spans in during[count(b, "first") : count(b, "last") + 1]:
            spans.append((start, start + count(b, "bytes")))
    lives = [_covered(spans) for spans in during]
    fullest = lives.index(max(lives))
    every = math.ceil(len(steps) / LABELLED)
    names = tuple((x(i + 0.5), short(name, NAME)) for i, name in enumerate(steps) if i % every == 0)
    longest = max(len(name) for _, name in names)
    return Timeline(
        WIDTH, int(TOP + PLOT + 22 + longest * 4.8), LEFT, TOP, float(TOP + PLOT),
        tuple((y(arena * k / 4), size(round(arena * k / 4))) for k in range(5)),
        names, tuple(blocks), len(found) - len(blocks), steps[fullest], lives[fullest], (x(fullest), round(across, 1)),
    )  # fmt: skip


def _drawn(b: Mapping[str, object], steps: int) -> bool:
    """Does it make sense: bytes that lie somewhere, steps that there are?"""
    first, last = count(b, "first"), count(b, "last")
    return 0 <= first <= last < steps and count(b, "bytes") > 0 and at(b, "offset") is not None


def _covered(spans: Sequence[tuple[int, int]]) -> int:
    """Bytes in any of these spans; what several share is counted once."""
    end = total = 0
    for lo, hi in sorted(spans):
        total += max(0, hi - max(lo, end))
        end = max(end, hi)
    return total
