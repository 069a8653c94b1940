"""The network on the page: what a person sees, finds, folds and prints; lines lead from each result to its readers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.report import html
from qcompile.report.network import HEIGHT, MOST_LANES, PICTURED, Rail, network
from qcompile.report.timeline import timeline
from tests.browser import Browser
from tests.test_page import contrast, corner
from tests.test_report import sample, sound

LAYERS = {
    "/stem/Conv": (45.0, 8, []),
    "/block1/conv1/Conv": (35.0, 8, [0]),
    "/block1/conv2/Conv": (25.0, 4, [1]),
    "/block1/Add": (15.0, 8, [0, 2]),
    "/pool/GlobalAveragePool": (5.0, 16, [3]),
}  # fmt: skip
COLOURS = {
    45.0: (255, 255, 224),
    35.0: (254, 217, 142),
    25.0: (254, 153, 41),
    15.0: (184, 80, 10),
    5.0: (102, 37, 6),
}


def residual() -> dict[str, Any]:
    """A sound report of five layers, one for each colour, with a residual connection and an arena."""
    report = sound()
    (first, _), (weight,), (step,) = (
        report["layers"],
        report["weights"],
        report["program"]["layers"],
    )
    report["layers"] = [
        first | {"name": name, "tensor": f"{name}_output", "sqnr_integer_db": db, "bits": bits}
        for name, (db, bits, _) in LAYERS.items()
    ]
    report["weights"] = [weight | {"layer": "/block1/conv2/Conv", "tensor": "onnx::Conv_17"}]
    report["coverage"] = [
        {"layer": name, "operators": [name.rsplit("/", 1)[1]], "integer": ["Conv"], "kernel": "dot",
         "fused": False, "reads": reads, "inputs": [] if reads else ["image"]}
        for name, (_, _, reads) in LAYERS.items()
    ]  # fmt: skip
    report["outputs"][0]["name"] = "/pool/GlobalAveragePool_output"
    report["program"]["layers"] = [step | {"name": name} for name in LAYERS]
    report["memory"]["arena_bytes"] = 400
    report["memory"]["buffers"] = [
        {"value": "stem", "offset": 0, "bytes": 100, "first": 0, "last": 3},
        {"value": "conv1", "offset": 100, "bytes": 100, "first": 1, "last": 2},
        {"value": None, "offset": 200, "bytes": 200, "first": 2, "last": 2},
        {"value": "conv2", "offset": 200, "bytes": 100, "first": 2, "last": 3},
        {"value": "add", "offset": 300, "bytes": 100, "first": 3, "last": 4},
    ]
    return report


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as started:
        yield started


@pytest.fixture
def shown(browser: Browser, tmp_path: Path) -> Browser:
    """A browser that shows the page of `residual`."""
    page = tmp_path / "page.html"
    page.write_text(html.render(residual()))
    browser.complaints.clear()
    browser.ask("Emulation.setEmulatedMedia", media="screen",
                features=[{"name": "prefers-color-scheme", "value": "light"}])  # fmt: skip
    browser.open(page)
    return browser


def visible(browser: Browser) -> list[str]:
    """The names of the layers that can be seen."""
    found: list[str] = browser.see(
        "[...document.querySelectorAll('.layer > summary')]"
        ".filter(e => e.checkVisibility({contentVisibilityAuto: true}) && e.getBoundingClientRect().height > 0)"
        ".map(e => e.querySelector('.name').innerText)"
    )
    return found


def row(name: str) -> str:
    return f'.layer:has(> summary > .name[title="{name}"])'


def test_every_layer_shows_bits_and_error_in_words_and_colour(shown: Browser) -> None:
    assert visible(shown) == ["image", *LAYERS]
    for name, (db, bits, _) in LAYERS.items():
        line = shown.see(f"document.querySelector('{row(name)} > summary').innerText").split()
        assert f"{db:.1f} dB" in " ".join(line)
        assert f"{bits} bit" in " ".join(line)
        x, y = shown.middle(f"{row(name)} circle")
        assert corner(shown.picture(x, y)) == COLOURS[db]
    assert "→ /pool/GlobalAveragePool_output" in shown.see(
        "document.querySelector('#graph').innerText"
    )
    assert shown.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_leave_their_words_readable(shown: Browser, scheme: str) -> None:
    shown.ask("Emulation.setEmulatedMedia", media="screen",
              features=[{"name": "prefers-color-scheme", "value": scheme}])  # fmt: skip
    pairs = shown.see(
        "[...document.querySelectorAll('.chip:not(.none), .headline, .alarm, .tools input')].map(e =>"
        " [getComputedStyle(e).color, getComputedStyle(e).backgroundColor])"
    )
    assert len(pairs) >= 2 * len(LAYERS)
    for words, back in pairs:
        colours = [
            "#" + bytes(int(n) for n in re.findall(r"\d+", c)[:3]).hex() for c in (words, back)
        ]
        assert contrast(*colours) >= 4.5, colours


def test_a_search_leaves_what_matches(shown: Browser) -> None:
    shown.press("/", *"conv")
    assert shown.see("document.activeElement.id") == "find"
    assert visible(shown) == ["/stem/Conv", "/block1/conv1/Conv", "/block1/conv2/Conv"]
    assert shown.see("document.querySelector('#found').innerText") == "3 of 6 rows"
    shown.press(" ", *"onnx::conv_17")
    assert visible(shown) == ["/block1/conv2/Conv"]
    shown.press("Escape")
    assert visible(shown) == ["image", *LAYERS]
    assert shown.see("document.querySelector('#found').innerText") == ""
    assert shown.complaints == []


def test_a_page_opens_with_the_search_that_its_address_names(
    shown: Browser, tmp_path: Path
) -> None:
    shown.open(tmp_path / "page.html", "#find=globalaverage%20pool")
    assert visible(shown) == ["/pool/GlobalAveragePool"]
    shown.open(tmp_path / "page.html", "#find=%")
    assert visible(shown) == ["image", *LAYERS]


def test_the_keyboard_reaches_and_opens_every_row(shown: Browser) -> None:
    focused = "document.activeElement.querySelector('.name')?.innerText"
    shown.see("document.querySelector('#fold').focus()")
    shown.press("Tab")
    seen = [shown.see(focused)]
    for _ in range(6):
        shown.press("ArrowDown")
        seen.append(shown.see(focused))
    assert seen == ["image", "/stem/Conv", "block1", *list(LAYERS)[1:]]
    shown.press("ArrowUp", "ArrowUp")
    assert shown.see(focused) == "/block1/conv2/Conv"
    outline = shown.see("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    drawn = f"document.querySelectorAll('{row('/block1/conv2/Conv')} .histogram')"
    heights = f"[...{drawn}].map(e => e.checkVisibility() ? e.getBoundingClientRect().height : 0)"
    assert shown.see(heights) == [0, 0]
    shown.press("Enter")
    assert all(height > 50 for height in shown.see(heights))
    words = shown.see(f"document.querySelector('{row('/block1/conv2/Conv')} .inside').innerText")
    assert "reads /block1/conv1/Conv" in words
    assert "onnx::Conv_17" in words
    shown.press("Enter")
    assert shown.see(heights) == [0, 0]


def test_groups_fold_and_paper_unfolds_them(shown: Browser) -> None:
    shown.click("#fold")
    folded = ["image", "/stem/Conv", "/pool/GlobalAveragePool"]
    assert visible(shown) == folded
    # the group stands for its worst layer
    x, y = shown.middle(".group > summary > .folded circle")
    assert corner(shown.picture(x, y)) == COLOURS[15.0]
    line = shown.see("document.querySelector('.group > summary').innerText")
    assert "3 layers, at worst 15.0 dB" in line
    shown.ask("Emulation.setEmulatedMedia", media="print")
    assert visible(shown) == ["image", *LAYERS]
    table = "document.querySelector('#layers details td').getBoundingClientRect().height"
    assert shown.see(table) > 0
    assert shown.see("getComputedStyle(document.querySelector('#tools')).display") == "none"
    assert shown.ask("Page.printToPDF", printBackground=True)["data"].startswith("JVBERi")
    shown.ask("Emulation.setEmulatedMedia", media="screen")
    assert visible(shown) == folded
    shown.click("#unfold")
    assert visible(shown) == ["image", *LAYERS]


def test_without_its_script_the_page_says_the_same(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(html.render(residual()))
    browser.ask("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(page)
        assert visible(browser) == ["image", *LAYERS]
        assert browser.see("document.querySelector('#tools').checkVisibility()") is False
    finally:
        browser.ask("Emulation.setScriptExecutionDisabled", value=False)


def test_blocks_of_the_arena_lie_where_their_bytes_are(shown: Browser) -> None:
    boxes = shown.see(
        "(() => { const p = document.querySelector('.timeline .peak').getBoundingClientRect();"
        " return [...document.querySelectorAll('.timeline g')].map(g => { const"
        " b = g.querySelector('rect').getBoundingClientRect(), w = p.width, h = p.height / 400;"
        " return [(b.left - p.left) / w + 2, b.width / w, (p.bottom - b.bottom) / h, b.height / h,"
        " g.querySelector('title').textContent] }) })()"
    )
    assert len(boxes) == 5
    for (first, steps, offset, tall, title), b in zip(
        boxes, residual()["memory"]["buffers"], strict=True
    ):
        assert first == pytest.approx(b["first"], abs=0.02)
        assert steps == pytest.approx(b["last"] - b["first"] + 1, abs=0.02)
        assert offset == pytest.approx(b["offset"], abs=2)
        assert tall == pytest.approx(b["bytes"], abs=3)
        assert str(b["value"] or "scratch") in title
    # conv2 and the scratch memory share 100 bytes, which count once
    chart = timeline(residual())
    assert chart is not None
    assert (chart.fullest, chart.live) == ("/block1/conv2/Conv", 400)


# --- lines ---------------------------------------------------------------------------------------


def links(rail: Rail) -> tuple[set[int], set[int], set[int]]:
    """Where lines enter a row from above and end at its mark, pass it, and leave its mark for below."""
    middle = HEIGHT // 2
    joins, passes, leaves = set(), set(), set()
    for piece in re.findall(r"M[^M]+", rail.edges):
        if found := re.fullmatch(rf"M(\d+) 0V{HEIGHT}", piece):
            passes.add(int(found[1]))
        elif found := re.fullmatch(rf"M(\d+) 0C\1 {middle} (\d+) 0 \2 {middle}", piece):
            assert int(found[2]) == rail.x
            joins.add(int(found[1]))
        elif re.fullmatch(rf"M{rail.x} 0V{middle}", piece):
            joins.add(rail.x)
        else:
            assert piece == f"M{rail.x} {middle}V{HEIGHT}"
            leaves.add(rail.x)
    return joins, passes, leaves


@st.composite
def graphs(draw: st.DrawFn) -> list[list[int]]:
    """For each layer some layers before it, as many at a time as lanes are drawn."""
    rows = draw(st.integers(1, MOST_LANES - 2))
    return [
        sorted(draw(st.sets(st.integers(0, i - 1), max_size=4))) if i else [] for i in range(rows)
    ]


@settings(deadline=None, derandomize=True, max_examples=200)
@given(reads=graphs())
def test_lines_lead_from_each_result_to_its_readers_and_nowhere_else(
    reads: list[list[int]],
) -> None:
    report = {
        "inputs": [{"name": "x"}],
        "coverage": [
            {"layer": f"l{i}", "reads": found, "inputs": [] if found else ["x"]}
            for i, found in enumerate(reads)
        ],
    }
    drawn = [layer.rail for group in network(report) for layer in group.layers]
    assert len(drawn) == len(reads) + 1
    wanted = {(s + 1, i + 1) for i, found in enumerate(reads) for s in found}
    wanted |= {(0, i + 1) for i, found in enumerate(reads) if not found}
    seen: set[tuple[int, int]] = set()
    lanes: dict[int, int] = {}
    for i, rail in enumerate(drawn):
        joins, passes, leaves = links(rail)
        assert joins | passes == lanes.keys()
        seen |= {(lanes[x], i) for x in joins}
        lanes = {x: lanes[x] for x in passes}
        assert not leaves & lanes.keys()
        lanes |= dict.fromkeys(leaves, i)
    assert not lanes
    assert seen == wanted


def test_a_row_never_reads_a_later_one() -> None:
    coverage = [{"layer": "a", "reads": [0, 1, -1, "x"], "inputs": ["nobody"]}, {"layer": "b"}]
    assert [g.layers[0].reads for g in network({"coverage": coverage})] == [(), ()]


@pytest.mark.parametrize(("depth", "most"), [(130, 1_500_000), (500, 3_000_000)])
def test_a_large_network_stays_a_page_that_can_be_opened(depth: int, most: int) -> None:
    report = sample()
    layer, weight, row = report["layers"][0], report["weights"][0], report["coverage"][0]
    counts = [9999 - i for i in range(48)]
    histogram = {"lo": -2.34567, "hi": 3.45678, "counts": counts}
    report["layers"], report["weights"], report["coverage"], report["findings"] = [], [], [], []
    for i in range(depth):
        name = f"/layer{i // 50}/layer{i // 50}.{i % 50}/conv/Conv"
        made = {"name": name, "tensor": f"{name}_output_0", "histogram": histogram}
        report["layers"].append(layer | made | {"sqnr_integer_db": 20 + i / 50})
        report["weights"].append(
            weight | {"layer": name, "tensor": f"onnx::Conv_{i}", "histogram": histogram}
        )
        reads = {"reads": [i - 1] if i else [], "inputs": [] if i else ["image"]}
        report["coverage"].append(row | {"layer": name} | reads)
    page = html.render(report)
    assert page.count('class="histogram"') == 2 * min(depth, PICTURED)
    assert page.index("onnx::Conv_0</b>") > 0
    assert len(page) < most
    groups = [f"layer{i}" for i in range(-(-depth // 50))]
    assert [g.title for g in network(report)] == ["", *groups]
