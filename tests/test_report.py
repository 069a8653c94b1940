"""report.html and the wording shared with the terminal: everything is shown, nothing a model says is obeyed."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile import driver
from qcompile.errors import ToolchainMissing
from qcompile.options import Options
from qcompile.report import html, wording
from qcompile.report.verdict import made_up, on_target, verdicts
from qcompile.targets.x86 import X86

DOCS = Path(__file__).parent.parent / "docs" / "report.md"
HOSTILE = """*/ #include "x" <script>alert('1')</script> &amp; {{ 7919 * 6007 }} [red]x[/red]"""
VOID = {"meta", "br", "input"}
OPTIONAL = {"tr", "td", "th", "li", "p", "dt", "dd"}


def sample() -> dict[str, Any]:
    """A report in which every documented field has a value of its own."""
    return {
        "version": 1,
        "qcompile": "0.1.0",
        "model": {"name": "digits", "file": "digits.onnx", "sha256": "ab" * 32, "opset": 21, "nodes": 16,
                  "parameters": 19562, "macs": 533824},
        "target": {"name": "arm", "cpu": "cortex-a53", "summary": "C99 for AArch64"},
        "recipe": {"name": "default", "summary": "the usual", "options": {"calibrate": {"method": "mse"}},
                   "trials": [{"step": "equalize (alpha = 0.25)", "sqnr_db": 36.25, "gain_db": 2.5, "taken": True}]},
        "inputs": [{"name": "image", "shape": [1, 1, 8, 8], "dtype": "int8", "scale": 0.0625, "zero_point": -128,
                    "layout": "model"}],
        "outputs": [{"name": "logits", "shape": [1, 10], "dtype": "int16", "scale": 0.00015725176490377635,
                     "zero_point": -8656, "layout": "model"}],
        "data": {"origin": "files", "marked": False, "samples": 256, "digest": "cd" * 32,
                 "read": {"source": "calib.toml", "available": 300, "inputs": {"image": {"kind": "images"}}}},
        "warnings": ["input 'image' is 0 in every sample"],
        "findings": [{"kind": "amplifies", "layer": "stem", "tensor": "stem.w", "times": 57.5,
                      "sentence": "layer stem is out of proportion"}],
        "coverage": [
            {"layer": "stem", "operators": ["Conv", "Relu"], "integer": ["Conv", "Rescale"],
             "kernel": "dot", "fused": True, "reads": [], "inputs": ["image"]},
            {"layer": "classify", "operators": ["Gemm"], "integer": ["MatMul", "Rescale"],
             "kernel": "line", "fused": False, "reads": [0], "inputs": []},
        ],
        "float_operators": ["Einsum"],
        "layers": [
            {"name": "stem", "tensor": "relu_0", "kernel": "dot", "bits": 8, "shape": [1, 8, 8, 16], "scale": 0.011,
             "zero_point": -127, "macs": 9216, "sqnr_weights_db": 44.1,
             "sqnr_fake_quant_db": 41.5, "sqnr_integer_db": 40.9,
             "clipped_percent": 0.25, "zeroed_percent": 1.5, "multiplier_error": 1.2e-05,
             "histogram": {"lo": -0.5, "hi": 3.25, "counts": [1, 0, 40, 7]}},
            {"name": "classify", "tensor": "logits", "kernel": None, "bits": 16, "shape": [1, 10], "scale": 0.0002,
             "zero_point": 3, "macs": 320, "sqnr_weights_db": 39.1, "sqnr_fake_quant_db": 37.2,
             "sqnr_integer_db": None, "clipped_percent": None, "zeroed_percent": None,
             "histogram": {"lo": 0.0, "hi": 1.0, "counts": [4, 1]}, "multiplier_error": None},
        ],
        "weights": [{"tensor": "stem.w", "layer": "stem", "bits": 4, "channels": 16, "scale_min": 0.01,
                     "scale_max": 0.04, "sqnr_db": 21.5, "clipped_percent": 0.125, "zeroed_percent": 9.5, "spread": 3.5,
                     "crest": 4.5, "bias_bits": 22, "bias_saturated": 2, "bias_widened": 3,
                     "histogram": {"lo": -1.5, "hi": 2.25, "counts": [3, 90, 12, 1]}}],
        "accuracy": {"samples": 64, "outputs": [{"name": "logits", "sqnr_weights_db": 39.3, "sqnr_fake_quant_db": 37.4,
                                                 "sqnr_integer_db": 36.8, "agreement": 0.984375}]},
        "memory": {
            "arena_bytes": 4864, "weight_bytes": 20906, "input_bytes": 192, "output_bytes": 20, "stack_bytes": 248,
            "stack_path": ["net_run", "layer_stem"], "stack_unbounded": "stem calls itself", "code_bytes": 3344,
            "constant_bytes": 20992, "compiler": "zig 1 -O2", "ram_bytes": 5324, "flash_bytes": 24336,
            "buffers": [{"value": "relu_0", "offset": 64, "bytes": 1024, "first": 0, "last": 0}],
        },
        "program": {
            "bands": 3, "unit": "instructions", "executed": 81234,
            "layers": [{"name": "stem/1", "kernel": "dsp", "macs": 1728, "scratch_bytes": 48, "predicted": 1500,
                        "executed": 1534}],
        },
        "design": {
            "part": "xc7z020", "clock_mhz": 125.0, "latency": 71234, "interval": 65536, "latency_us": 569.872,
            "images_per_second": 1907.35, "dsp": 23, "bram18": 17, "lut": 4321, "lut_error": 0.15, "fmax_mhz": None,
            "units": [{"name": "l0_matvec", "layer": "stem/2", "kind": "MatrixVector", "pe": 3, "simd": 9,
                       "cycles": 64512, "dsp": 21, "bram18": 5, "lut": 1234}],
            "fifos": [{"name": "l0_window", "bits": 72, "depth": 33, "peak": 31}],
            "available": {"dsp": 220, "bram18": 280, "lut": 53200, "ff": 106400}, "not_run": ["a board"],
        },
        "certificates": {
            "accumulators": [{"layer": "stem", "bound": 117774, "bits": 18}],
            "no_float": {"checked": True, "instructions": 3335, "findings": ["fadd s0, s1, s2"], "reason": "odd",
                         "basis": "instructions were read"},
            "rescale": {"largest_multiplier_error": 1.21e-05, "layer": "relu_0"},
        },
        "verification": {
            "checked": True, "reason": "none", "samples": 32, "mismatches": 3, "intermediates": 11, "sanitized": True,
            "sanitizers": "address", "onnx": {"samples": 31, "mismatches": 2},
            "others": [{"name": "Verilog", "samples": 29, "mismatches": 4, "note": "slowly"}],
            "apart": {"layers": 6, "allowed": 7, "equal": 0.875, "outputs": 9},
            "first": {"layer": "stem", "value": "relu_0:acc", "row": 5, "index": [0, 1, 2, 3], "expected": 40,
                      "got": 41},
        },
        "fused": ["relu_0:acc"],
        "stored": {"relu_0": 1, "logits": 2},
    }  # fmt: skip


def sound() -> dict[str, Any]:
    report = sample()
    report["float_operators"], report["findings"] = [], []
    report["certificates"]["no_float"] |= {"findings": [], "reason": None}
    report["verification"] |= {
        "mismatches": 0,
        "first": None,
        "reason": None,
        "onnx": {"samples": 32, "mismatches": 0},
        "others": [],
        "apart": None,
    }
    report["design"] = None
    return report


def analysis() -> dict[str, Any]:
    """An analysis in which every documented field has a value of its own."""
    shared = (
        "version", "qcompile", "outputs", "data", "warnings", "accuracy", "layers", "verification", "target", "stored",
        "weights",
    )  # fmt: skip
    histogram = {"lo": -1.5, "hi": 2.25, "counts": [3, 90, 12, 1]}
    return {key: value for key, value in sound().items() if key in shared} | {
        "kind": "analysis",
        "findings": sample()["findings"],
        "model": {"name": "digits", "file": "digits.onnx", "sha256": "ab" * 32},
        "recipe": {"name": "default", "summary": "the usual"},
        "causes": [
            {"rank": 1, "kind": "mismatch", "layer": "sum", "tensor": "s", "sentence": "a meets b",
             "override": "--override 's=int16'", "gain_db": 12.25, "basis": "measured", "also": ["t"]},
            {"rank": 2, "kind": "rounding", "layer": None, "tensor": None, "sentence": "nothing else",
             "override": None, "gain_db": 0.75, "basis": "estimate", "also": []},
        ],
        "sensitivity": {"samples": 48, "sqnr_db": 33.3, "layers": [
            {"layer": "image", "tensors": ["image"], "alone_db": None, "gain_db": 0.1},
            {"layer": "stem", "tensors": ["relu_0", "stem.w"], "alone_db": 41.1, "gain_db": 2.75},
            {"layer": "classify", "tensors": ["logits", "classify.w"], "alone_db": 36.6, "gain_db": -0.35},
        ]},
        "inputs": [{"tensor": "image", "bits": 8, "shape": [1, 1, 8, 8], "scale": 0.0625, "zero_point": -128,
                    "clipped_percent": 0.5, "zeroed_percent": 0.75, "histogram": histogram}],
        "joins": [{"node": "sum", "operation": "Add", "operand": "a", "result": "s", "ratio": 0.001,
                   "lost_percent": 98.5}],
    }  # fmt: skip


# Tables whose keys are names of the model or of passes: documented as a whole.
OPEN_TABLES = {"stored", "recipe.options", "data.read"}


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, list[str | int]]]:
    """Documented path and place of every value; a list of numbers counts as one value."""
    if path in OPEN_TABLES or not isinstance(value, dict | list):
        yield path, []
    elif isinstance(value, dict):
        for key, inner in value.items():
            for name, place in leaves(inner, f"{path}.{key}" if path else key):
                yield name, [key, *place]
    elif all(isinstance(v, int | float) for v in value) and value:
        yield path, []
    else:
        for i, inner in enumerate(value):
            for name, place in leaves(inner, f"{path}[]"):
                yield name, [i, *place]


def documented(part: int = 0) -> set[str]:
    """The fields of a compilation's report (0), or what an analysis has besides (1)."""
    text = DOCS.read_text().split("# report.json of `qcompile analyze`")[part]
    return set(re.findall(r"^\| `([\w.\[\]]+)` \|", text, re.M)) - {
        "verification.first",
        "verification.apart",
    }


def changed(value: Any) -> Any:
    match value:
        case None:
            return 12.5
        case bool():
            return not value
        case int() | float():
            return 2 * value + 1
        case str():
            return value + "?"
        case list():
            return [v + 7 for v in value]
        case dict():
            return {f"{key}?": inner for key, inner in value.items()}
        case _:
            raise AssertionError(value)


def test_the_sample_has_every_documented_field_and_no_other() -> None:
    assert {path for path, _ in leaves(sample())} == documented()


@pytest.mark.parametrize(
    ("path", "place"),
    [pytest.param(*leaf, id="-".join(map(str, leaf[1]))) for leaf in leaves(sample())],
)
def test_every_field_is_on_the_page(path: str, place: Sequence[str | int]) -> None:
    before, after = sample(), sample()
    *way, last = place
    table: Any = after
    for step in way:
        table = table[step]
    table[last] = changed(table[last])
    if path == "verification.checked":
        before["verification"]["first"] = after["verification"]["first"] = None
    assert html.render(before) != html.render(after)


def test_the_analysis_has_every_documented_field_and_no_other() -> None:
    fields = {path for path, _ in leaves(analysis())}
    assert documented(1) <= fields
    assert fields - documented(1) <= documented() | {"verification.first", "verification.apart"}


@pytest.mark.parametrize(
    ("path", "place"),
    [
        pytest.param(*leaf, id="-".join(map(str, leaf[1])))
        for leaf in leaves(analysis())
        # the title says it is one
        if leaf[0] in documented(1) - {"kind"}
        or leaf[0].startswith("weights")
        or leaf[0] == "findings[].sentence"
    ],
)
def test_every_field_of_an_analysis_is_on_its_page(path: str, place: Sequence[str | int]) -> None:
    after = analysis()
    *way, last = place
    table: Any = after
    for step in way:
        table = table[step]
    table[last] = changed(table[last])
    assert html.render_analysis(analysis()) != html.render_analysis(after)


class Page(HTMLParser):
    """Tags, attributes and text of a page that is well nested."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = self.script = ""
        self.feed(page)
        self.close()
        while self.open and self.open[-1] in OPTIONAL:
            self.open.pop()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open[-1] != tag:
            assert self.open.pop() in OPTIONAL
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "script" in self.open:
            self.script += data
        elif "style" not in self.open:
            self.text += data


PAGES = pytest.mark.parametrize(
    ("render", "content"), [(html.render, sample), (html.render_analysis, analysis)]
)
Render = Callable[[dict[str, Any]], str]
Content = Callable[[], dict[str, Any]]


@PAGES
def test_the_page_is_well_formed_and_needs_nothing_else(render: Render, content: Content) -> None:
    source = render(content())
    page = Page(source)
    assert source.startswith("<!DOCTYPE html>")
    assert not {"link", "img", "iframe", "object", "embed", "form", "base"} & set(page.tags)
    assert not {"src", "href", "onclick", "onload"} & {name for name, _ in page.attributes}
    assert not re.search(r"https?:|url\(|@import|//[a-z]", source, re.I)
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", source)


def allowed(page: Page) -> str | None:
    """The digest of the one script that the page's policy lets run."""
    (policy,) = [v for k, v in page.attributes if k == "content" and "default-src" in str(v)]
    rules = dict(rule.strip().split(" ", 1) for rule in str(policy).split(";"))
    assert (rules.pop("default-src"), rules.pop("base-uri")) == ("'none'", "'none'")
    assert (rules.pop("form-action"), rules.pop("style-src")) == ("'none'", "'unsafe-inline'")
    script = rules.pop("script-src", None)
    assert not rules
    return script


def test_no_script_runs_but_the_one_that_finds() -> None:
    page = Page(html.render(sample()))
    digest = hashlib.sha256((Path(html.__file__).parent / "find.js").read_bytes()).digest()
    assert page.tags.count("script") == 1
    assert hashlib.sha256(page.script.encode()).digest() == digest
    assert allowed(page) == f"'sha256-{base64.b64encode(digest).decode()}'"
    assert not {name for name, _ in page.attributes if name.startswith("on")}
    analyzed = Page(html.render_analysis(analysis()))
    assert "script" not in analyzed.tags
    assert allowed(analyzed) is None


@PAGES
def test_it_says_what_is_missing_with_dashes(render: Render, content: Content) -> None:
    assert wording.NOTHING in Page(render({})).text


def poisoned(value: Any, poison: str) -> Any:
    match value:
        case str():
            return poison
        case list():
            return [poisoned(v, poison) for v in value]
        case dict():
            return {key: poisoned(inner, poison) for key, inner in value.items()}
        case _:
            return value


def test_hostile_names_stay_text() -> None:
    report = poisoned(sample(), HOSTILE)
    report["stored"] = {HOSTILE: 1}
    report["recipe"]["options"] = {HOSTILE: {HOSTILE: HOSTILE}}
    source = html.render(report)
    page = Page(source)
    # as long, and with slashes where names are told apart
    plain = Page(html.render(poisoned(sample(), re.sub("[^/]", "x", HOSTILE))))
    assert page.tags.count("script") == 1
    assert page.script == plain.script
    assert sorted(page.tags) == sorted(plain.tags)
    assert page.text.count(HOSTILE) > 30
    assert "47569433" not in page.text


def test_hostile_names_stay_text_in_an_analysis() -> None:
    source = html.render_analysis(poisoned(analysis(), HOSTILE) | {"stored": {HOSTILE: 1}})
    page = Page(source)
    assert "script" not in page.tags
    assert sorted(page.tags) == sorted(Page(html.render_analysis(poisoned(analysis(), "x"))).tags)
    assert page.text.count(HOSTILE) > 20
    assert "47569433" not in page.text


@settings(deadline=None, derandomize=True, max_examples=40)
@given(name=st.text(st.characters(exclude_categories=()), max_size=40))
def test_any_name_leaves_the_page_as_it_is_built(name: str) -> None:
    report = poisoned(sample(), name)
    page = Page(html.render(report))
    assert page.tags.count("table") == Page(html.render(sample())).tags.count("table")
    page.text.encode()
    analyzed = Page(html.render_analysis(poisoned(analysis(), name)))
    assert analyzed.tags.count("svg") == Page(html.render_analysis(analysis())).tags.count("svg")
    analyzed.text.encode()


@settings(deadline=None, derandomize=True, max_examples=300)
@given(text=st.text(st.characters(exclude_categories=())))
def test_visible_text_is_one_printable_line(text: str) -> None:
    seen = wording.visible(text)
    assert not re.search(
        "[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]", seen
    )
    assert len(seen.splitlines()) <= 1
    assert wording.visible(seen) == seen
    if text.isascii() and text.isprintable():
        assert seen == text


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (wording.size(0), "0 B"),
        (wording.size(1023), "1023 B"),
        (wording.size(1024), "1.00 KiB"),
        (wording.size(1024 * 1024 - 1), "1.00 MiB"),
        (wording.size(5_000_000_000_000_000), "4547.5 TiB"),
        (wording.amount(999), "999"),
        (wording.amount(1_000_000), "1.00 M"),
        (wording.amount(533_824), "533.8 k"),
        (wording.amount(None), "–"),
        (wording.decibel(37.46), "37.5"),
        (wording.decibel(float("inf")), "exact"),
        (wording.decibel(None), "–"),
        (wording.decibel(float("nan")), "–"),
        (wording.percent(0.254), "0.25 %"),
        (wording.fraction(0.984375), "98.44 %"),
        (wording.signed(-0.5), "-0.50"),
        (wording.signed(0.0), "+0.00"),
        (wording.duration(812.0), "812 ns"),
        (wording.duration(37_800.0), "37.8 us"),
        (wording.exact(0.00015725176490377635), "0.00015725176490377635"),
        (wording.exact(-8656), "-8656"),
        (wording.number(1.2345e-5, 3), "1.23e-05"),
        (wording.number(float("-inf")), "-∞"),
        (wording.shape([None, 3, "H"]), "N×3×H"),
        (wording.shape([]), "scalar"),
        (wording.shown(True), "yes"),
        (wording.shown(1234567), "1,234,567"),
        (wording.shown(["a", "b"]), "a, b"),
        (wording.shown([3, 1, 2, 5, 4]), "1 … 5 (5 values)"),
        (wording.shown([]), "–"),
    ],
)
def test_wording(said: str, meant: str) -> None:
    assert said == meant


def states(report: dict[str, Any]) -> dict[str, str]:
    return {v.claim: v.state for v in verdicts(report)}


def test_a_sound_program_holds_every_claim() -> None:
    assert set(states(sound()).values()) == {"pass"}
    assert len(verdicts(sound())) == 5
    assert [on_target(sound(), layer) for layer in sound()["layers"]] == ["identical", "identical"]
    assert 'class="alarm"' not in html.render(sound())


@pytest.mark.parametrize(
    ("claim", "path", "value", "state"),
    [
        ("integer only", "float_operators", ["Einsum"], "fail"),
        ("program = integer graph", "verification.mismatches", 1, "fail"),
        ("program = integer graph", "verification.checked", False, "open"),
        ("integer.onnx = integer graph", "verification.onnx.mismatches", 1, "fail"),
        ("integer.onnx = integer graph", "verification.onnx.samples", 0, "open"),
        ("no float instruction", "certificates.no_float.findings", ["fadd"], "fail"),
        ("no float instruction", "certificates.no_float.checked", False, "open"),
        ("no accumulator overflows", "certificates.accumulators", [], "open"),
        ("no accumulator overflows", "certificates.accumulators", [{"layer": "a", "bits": 33}], "fail"),
    ],
)  # fmt: skip
def test_one_thing_wrong_changes_one_claim(
    claim: str, path: str, value: object, state: str
) -> None:
    report = sound()
    *way, last = path.split(".")
    table = report
    for step in way:
        table = table[step]
    table[last] = value
    assert states(report) == states(sound()) | {claim: state}
    assert html.render(report).count('class="alarm"') == (state == "fail")


def test_a_mismatch_names_its_place() -> None:
    report = sample()
    report["verification"]["onnx"]["mismatches"] = 0
    report["verification"]["apart"] = None
    sentence = next(v.sentence for v in verdicts(report) if v.claim == "program = integer graph")
    assert "layer 'stem', value 'relu_0:acc', row 5, element [0, 1, 2, 3]" in sentence
    assert "the integer graph has 40, the program 41" in sentence
    assert [on_target(report, layer) for layer in report["layers"]] == ["differs", "unknown"]


def test_what_was_not_compared_is_not_called_identical() -> None:
    report = sound()
    report["stored"] = {"logits": 2}
    assert [on_target(report, layer) for layer in report["layers"]] == ["fused", "identical"]
    report = sound()
    report["verification"]["intermediates"] = 0
    assert [on_target(report, layer) for layer in report["layers"]] == ["not traced", "identical"]
    report["verification"]["checked"] = False
    assert [on_target(report, layer) for layer in report["layers"]] == ["not run", "not run"]


def test_a_model_that_computes_with_floats_is_near_at_best() -> None:
    report = sound()
    report["verification"]["apart"] = {"layers": 1, "allowed": 2, "equal": 0.9375, "outputs": 3}
    (near,) = (v for v in verdicts(report) if v.claim == "layers near integer graph")
    assert near.state == "pass"
    assert "not equal bit for bit" in near.sentence
    assert "11 layers are at most 1 codes off (2 allowed)" in near.sentence
    assert "93.75 % of the codes are equal" in near.sentence
    assert [on_target(report, layer) for layer in report["layers"]] == ["near", "near"]
    for key, value in {"mismatches": 4, "intermediates": 0}.items():
        wrong = copy.deepcopy(report)
        wrong["verification"][key] = value
        assert states(wrong)["layers near integer graph"] == "fail"


def test_another_way_that_differs_fails_the_program() -> None:
    report = sound()
    other = {"name": "Verilog", "samples": 7, "mismatches": 0, "note": ""}
    report["verification"]["others"] = [other]
    assert states(report)["program = integer graph"] == "pass"
    report["verification"]["others"] = [other | {"mismatches": 1}]
    assert states(report)["program = integer graph"] == "fail"


@pytest.mark.parametrize(("origin", "word"), [("random", "random noise"), ("synthetic", "made up")])
def test_made_up_data_are_an_alarm(origin: str, word: str) -> None:
    report = sound()
    report["data"] |= {"origin": origin, "marked": True}
    assert word in str(made_up(report))
    assert html.render(report).count('class="alarm"') == 1
    assert word in Page(html.render(report)).text
    assert made_up(sound()) is None


def test_a_real_report_has_the_documented_fields(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*_: object, **__: object) -> None:
        raise ToolchainMissing("no compiler: install gcc")

    monkeypatch.setattr(X86, "runner", lacking)
    monkeypatch.setattr(X86, "certify", lacking)
    network = models / "digits-resnet"
    artifact = driver.compile(
        network / "model.onnx", "x86", network / "calib.toml", "fast", tmp_path / "out",
        options=Options(samples=8, verify_samples=2),
    )  # fmt: skip
    report = copy.deepcopy(artifact.report)
    found = {path for path, _ in leaves(report)}
    of_a_mismatch = {path for path in documented() if path.startswith("verification.first.")}
    empty = {
        "warnings[]",
        "float_operators[]",
        "certificates.no_float.findings[]",
        "memory.stack_path[]",
        "recipe.trials[]",
        "findings[]",
    }
    of_a_finding = {path for path in documented() if path.startswith("findings[].")}
    of_a_trial = {path for path in documented() if path.startswith("recipe.trials[].")}
    of_a_design = {path for path in documented() if path.startswith("design.")}
    of_a_design |= {path for path in documented() if path.startswith("verification.others")}
    of_floats = {path for path in documented() if path.startswith("verification.apart.")}
    absent = {"verification.first", "verification.apart", "design", "verification.others"}
    assert found - documented() <= absent | {name[:-2] for name in empty}
    assert (
        documented() - found
        <= of_a_mismatch | of_a_finding | of_a_trial | of_a_design | of_floats | empty
    )
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert states(report)["program = integer graph"] == "open"
    assert states(report)["no float instruction"] == "open"
    assert (
        "not checked: no compiler: install gcc"
        in Page((tmp_path / "out/report.html").read_text()).text
    )
