"""The pages in a browser: they render, nothing complains, the pictures have their marks, and names stay inert."""

from __future__ import annotations

import re
import subprocess
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qcompile.report import html
from tests.browser import program
from tests.test_report import HOSTILE, analysis, poisoned, sample

INK = ("ink", "soft", "pass", "fail", "open")
MARKS = ("weights", "fake", "integer", "fail")


def chromium(page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Debian's Chromium without a window; the test fails where there is none."""
    quiet = ("--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run")
    profile = f"--user-data-dir={page.with_suffix('.profile')}"
    return subprocess.run(
        [
            program(),
            "--headless",
            *quiet,
            profile,
            "--enable-logging=stderr",
            *flags,
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def complaints(said: subprocess.CompletedProcess[str]) -> list[str]:
    return re.findall(r"CONSOLE.*", said.stderr)


class Marks(HTMLParser):
    """Every element of a page inside an svg: its picture, its tag, its attributes; and the page's text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.pictures: list[tuple[str, list[tuple[str, dict[str, str | None]]]]] = []
        self.inside = False
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "svg":
            self.pictures.append((found["class"] or "", []))
            self.inside = True
        elif self.inside:
            self.pictures[-1][1].append((tag, found))

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "svg"

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, picture: str) -> Iterator[tuple[str, dict[str, str | None]]]:
        for name, marks in self.pictures:
            if name == picture:
                yield from marks


def numbers(text: str | None) -> list[float]:
    return [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", text or "")]


def test_pictures_have_their_marks(tmp_path: Path) -> None:
    page, report = tmp_path / "page.html", analysis()
    report["layers"][1]["histogram"] = None
    page.write_text(html.render_analysis(report))
    said = chromium(page, "--dump-dom")
    assert complaints(said) == []
    seen = Marks(said.stdout)

    # a bar of each kind for each of three layers, and the lengths in proportion to the decibels
    bars = [a for tag, a in seen.of("bars") if tag == "rect"]
    gains = [a for a in bars if a["class"] in ("gain", "loss")]
    assert [a["class"] for a in gains] == ["gain", "gain", "loss"]
    lengths = [float(str(a["width"])) for a in gains]
    assert lengths[1] / lengths[2] == pytest.approx(2.75 / 0.35, rel=0.01)
    assert lengths[1] / lengths[0] == pytest.approx(2.75 / 0.1, rel=0.02)
    alone = [float(str(a["width"])) for a in bars if a["class"] == "alone"]
    assert alone[0] == 0
    assert alone[2] / alone[1] == pytest.approx(10 ** ((41.1 - 36.6) / 10), rel=0.01)
    start = min(float(str(a["x"])) for a in gains if a["class"] == "gain")
    (loss,) = [a for a in gains if a["class"] == "loss"]
    assert float(str(loss["x"])) + float(str(loss["width"])) == pytest.approx(start, abs=0.11)

    # a point for every ratio that was measured, the better the higher
    points = [a for tag, a in seen.of("along") if tag == "circle"]
    assert len(points) == 5
    height = {str(a["class"]): float(str(a["cy"])) for a in points[::-1]}
    assert height["weights"] < height["fake"] < height["integer"]
    lines = [numbers(a["points"]) for tag, a in seen.of("along") if tag == "polyline"]
    assert sorted(map(len, lines)) == [4, 4]

    # one picture for the input, a layer and a weight; the other layer was not measured
    assert [name for name, _ in seen.pictures].count("histogram") == 3
    assert seen.text.count("not measured") == 1
    held = [marks for name, marks in seen.pictures if name == "histogram"]
    for marks, bins in zip(held, (4, 3, 4), strict=True):
        drawn = sum(str(a["d"]).count("M") for _, a in marks if a["class"] in ("held", "cut"))
        assert drawn == bins


def test_what_the_codes_cannot_hold_is_drawn_apart(tmp_path: Path) -> None:
    # codes of scale 0.1 and 4 bits around 1 hold [-0.9, 0.6]; bins are 0.5 wide and count where their middle lies
    report = analysis()
    tensor = {"bits": 4, "scale": 0.1, "zero_point": 1}
    histogram = {"lo": -1.0, "hi": 1.5, "counts": [5, 10, 10, 5, 1]}
    report["inputs"][0] |= tensor | {"histogram": histogram}
    page = tmp_path / "page.html"
    page.write_text(html.render_analysis(report))
    seen = Marks(chromium(page, "--dump-dom").stdout)
    marks = next(marks for name, marks in seen.pictures if name == "histogram")
    shape = {a["class"]: a for _, a in marks}
    assert str(shape["held"]["d"]).count("M") == 3
    assert str(shape["cut"]["d"]).count("M") == 2
    # the axis runs from -1 to 1.5, over the width of the picture; 16 codes, 16 lines
    width = 260 / 2.5
    assert float(str(shape["inside"]["x"])) == pytest.approx(0.1 * width, abs=0.02)
    assert float(str(shape["inside"]["width"])) == pytest.approx(1.5 * width, abs=0.02)
    levels = [float(x) for x in re.findall(r"M(\S+) ", str(shape["level"]["d"]))]
    assert levels == pytest.approx([(0.1 + 0.1 * k) * width for k in range(16)], abs=0.02)
    starts = [float(x) for x in re.findall(r"M(\S+) ", str(shape["cut"]["d"]))]
    assert starts == pytest.approx([1.5 * width, 2.0 * width], abs=0.02)


@pytest.mark.parametrize("render", [html.render, html.render_analysis])
def test_hostile_names_are_inert(tmp_path: Path, render: Any) -> None:
    attack = HOSTILE + '"><img src=x onerror=console.log(1)><svg onload=console.log(2)>'
    report = analysis() if render is html.render_analysis else sample()
    page = tmp_path / "page.html"
    page.write_text(render(poisoned(report, attack) | {"stored": {attack: 1}}))
    said = chromium(page, "--dump-dom")
    assert complaints(said) == []
    assert "onload" not in {
        k for _, marks in Marks(said.stdout).pictures for _, a in marks for k in a
    }
    assert said.stdout.count("<script") == (render is html.render)
    assert "<img" not in said.stdout
    assert "<script>alert('1')</script>" in Marks(said.stdout).text


def test_a_complaint_would_be_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(html.render(sample()).replace("<h1>", "<img src='https://127.0.0.1/x'><h1>"))
    assert any("Content Security Policy" in c for c in complaints(chromium(page, "--dump-dom")))


def corner(png: bytes) -> tuple[int, ...]:
    """The color of the upper left pixel: no filter of a PNG changes it."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, data = 8, b""
    while at < len(png):
        size, kind = int.from_bytes(png[at : at + 4]), png[at + 4 : at + 8]
        data += png[at + 8 : at + 8 + size] if kind == b"IDAT" else b""
        at += 12 + size
    return tuple(zlib.decompress(data)[1:4])


def themes(source: str) -> list[dict[str, str]]:
    """The colors of the light theme and of the dark one."""
    return [
        dict(re.findall(r"--([\w-]+): (#\w+);", part))
        for part in re.findall(r":root \{(.*?)\}", source, re.S)
    ]


def channels(color: str) -> tuple[int, ...]:
    digits = color[1:] if len(color) == 7 else "".join(2 * c for c in color[1:])
    return tuple(bytes.fromhex(digits))


def contrast(a: str, b: str) -> float:
    """WCAG 2.1, 1.4.3: (L1 + 0.05) / (L2 + 0.05) of the relative luminances."""

    def luminance(color: str) -> float:
        c = [v / 255 for v in channels(color)]
        r, g, b = (v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in c)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    hi, lo = sorted((luminance(a), luminance(b)), reverse=True)
    return (hi + 0.05) / (lo + 0.05)


def test_both_themes_can_be_read(tmp_path: Path) -> None:
    source = html.render_analysis(analysis())
    light, dark = themes(source)
    assert light.keys() == dark.keys()
    for theme in (light, dark):
        for color in INK:
            back = theme.get(f"{color}-back", theme["paper"])
            assert contrast(theme[color], back) >= 4.5, color
        assert contrast(theme["soft"], theme["panel"]) >= 4.5
        for color in MARKS:
            for back in ("paper", "inside"):
                assert contrast(theme[color], theme[back]) >= 3, (color, back)
    page = tmp_path / "page.html"
    page.write_text(source)
    for scheme, theme in (("1", light), ("0", dark)):
        shot = tmp_path / f"{scheme}.png"
        preference = f"--blink-settings=preferredColorScheme={scheme}"
        chromium(page, preference, "--window-size=1280,2400", f"--screenshot={shot}")
        assert corner(shot.read_bytes()) == channels(theme["paper"])
