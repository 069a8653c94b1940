"""A layer whose weights were scaled by 100 is found, named first on the page, and nothing is said of sound networks.

In a network of products, rectifiers and sums such damage leaves the ratio of signal to quantization noise as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from qcompile import driver
from qcompile.errors import ToolchainMissing
from qcompile.job import Job
from qcompile.options import Options
from qcompile.passes.proportion import ROWS, gains, out_of_proportion
from qcompile.pipeline import Context
from qcompile.report.facts import Finding
from qcompile.report.verdict import headline
from qcompile.targets.x86 import X86
from tests.browser import Browser
from tests.oracle import build

Floats = NDArray[np.float32]
SHIPPED = ("digits-dscnn", "digits-resnet")


def samples(models: Path, name: str) -> Floats:
    with np.load(models / name / "calib.npz") as data:
        return np.asarray(data["image"][:ROWS], np.float32)


def scaled(source: Path, tensor: str, factor: float) -> bytes:
    """The model file with one constant multiplied."""
    model = onnx.load(source)
    (found,) = (t for t in model.graph.initializer if t.name == tensor)
    array = numpy_helper.to_array(found) * np.float32(factor)
    found.CopyFrom(numpy_helper.from_array(array, tensor))
    return model.SerializeToString()


def prepared(model: Path | bytes) -> ir.Model:
    """The float model as it is before anything is rounded."""
    return driver.prepare(Job.checked(model, "x86", "fast", None, {}, Options()), Context()).model


def damaged(model: ir.Model, x: Floats, factor: float) -> Iterator[tuple[str, list[Finding]]]:
    """For each product with weights, what is found when these are scaled and nothing else is."""
    feed = {str(model.graph.inputs[0].name): x}
    assert out_of_proportion(model, feed) == []
    for gain in list(gains(model, feed)):
        constant = model.graph.initializers[gain.weight]
        assert constant.const_value is not None
        kept = constant.const_value
        constant.const_value = ir.tensor(kept.numpy() * np.float32(factor), name=gain.weight)
        yield gain.node, out_of_proportion(model, feed)
        constant.const_value = kept


def named(found: list[Finding]) -> list[str]:
    """The nodes that findings speak of."""
    said = (
        re.match(r"layer (.*?)(?:, which reads the network's input,)? is out of", f.sentence)
        for f in found
    )
    return [match[1] for match in said if match is not None]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as started:
        yield started


def compiled(models: Path, name: str, model: Path, place: Path) -> dict[str, Any]:
    driver.compile(
        model, "x86", models / name / "calib.toml", "fast", place, options=Options(samples=32, verify_samples=2)
    )  # fmt: skip
    report: dict[str, Any] = json.loads((place / "report.json").read_text())
    return report


def beginning(browser: Browser, page: Path) -> list[str]:
    """What a reader sees without scrolling, line by line."""
    browser.open(page)
    text = browser.see(
        "[...document.querySelectorAll('main *')].filter(e => e.checkVisibility() && !e.children.length"
        " || e.matches('p')).filter(e => e.getBoundingClientRect().bottom < innerHeight)"
        ".map(e => e.innerText).filter(t => t)"
    )
    return [str(line) for line in text]


@pytest.mark.parametrize(
    ("name", "tensor", "node"),
    [
        ("digits-resnet", "onnx::Conv_71", "/block2/conv1/Conv"),
        ("digits-dscnn", "stem.conv.weight", "/stem/conv/Conv"),
    ],
)
def test_the_page_of_a_damaged_network_says_first_which_layer_and_why(
    browser: Browser, models: Path, tmp_path: Path, name: str, tensor: str, node: str
) -> None:
    source = models / name / "model.onnx"
    (tmp_path / "damaged.onnx").write_bytes(scaled(source, tensor, 100))
    report = compiled(models, name, tmp_path / "damaged.onnx", tmp_path / "out")
    # nothing else shows it: the program is right, and as close to float as ever
    assert report["verification"]["mismatches"] == 0
    assert report["accuracy"]["outputs"][0]["sqnr_integer_db"] > 20
    assert [f["layer"] for f in report["findings"]] == [node]
    title, subtitle, first, *_ = beginning(browser, tmp_path / "out" / "report.html")
    assert (title, subtitle[:3]) == ("damaged on x86", "C99")
    assert first.lower().startswith(f"worst layer. layer {node.lower()}")
    assert "out of proportion" in first
    assert "weights that were scaled by mistake" in first
    assert "times its" in first
    back = browser.see("getComputedStyle(document.querySelector('#first')).backgroundColor")
    assert back == "rgb(252, 230, 231)"
    # and the layer is marked where it stands
    marked = browser.see("[...document.querySelectorAll('.worst > summary')].map(e => e.innerText)")
    assert len(marked) == 1
    assert node in marked[0]
    assert "out of proportion" in marked[0]
    assert any(node in warning for warning in report["warnings"])


def test_the_page_of_a_sound_network_says_that_nothing_stands_out(
    browser: Browser, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*_: object, **__: object) -> None:
        raise ToolchainMissing("no compiler: install gcc")

    monkeypatch.setattr(X86, "runner", lacking)
    monkeypatch.setattr(X86, "certify", lacking)
    name = "digits-resnet"
    report = compiled(models, name, models / name / "model.onnx", tmp_path / "out")
    assert report["findings"] == []
    _, _, first, *_ = beginning(browser, tmp_path / "out" / "report.html")
    worst = min(report["layers"], key=lambda row: float(row["sqnr_integer_db"]))
    assert first.startswith("No layer stands out.")
    assert f"is {worst['name']} with {worst['sqnr_integer_db']:.1f} dB" in first
    again = compiled(models, name, models / name / "model.onnx", tmp_path / "again")
    assert again == report
    pages = [(tmp_path / at / "report.html").read_bytes() for at in ("out", "again")]
    assert pages[0] == pages[1]


@pytest.mark.parametrize("name", SHIPPED)
def test_any_layer_scaled_by_100_is_the_one_that_is_found(models: Path, name: str) -> None:
    model, x = prepared(models / name / "model.onnx"), samples(models, name)
    seen = list(damaged(model, x, 100))
    assert len(seen) >= 7
    for node, found in seen:
        assert named(found) == [node]
        assert found[0].times > 50
    # what training may do to a layer is no damage
    for factor in (0.01, 8.0):
        assert not any(found for _, found in damaged(model, x, factor))


@pytest.mark.zoo
@pytest.mark.parametrize(
    "folder", ["mlperf-tiny-ic-resnet8", "mlperf-tiny-kws-dscnn", "resnet20-cifar10"]
)
def test_any_layer_of_a_trained_network_scaled_by_100_is_the_one_that_is_found(
    zoo: Path, folder: str
) -> None:
    source = zoo / folder / "model.onnx"
    about = json.loads((source.parent / "META.json").read_text())
    with np.load(zoo / Path(about.get("data", folder)).name / "calib.npz") as data:
        x = data["x"][:ROWS].astype(np.float32)
    if "kws" in folder:
        x = ((x - 83) * np.float32(0.5847029)).transpose(0, 3, 1, 2)
    elif "resnet20" in folder:
        mean, std = (
            np.array(v, np.float32) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        )
        x = ((x / 255 - mean) / std).transpose(0, 3, 1, 2)
    x = np.ascontiguousarray(x)
    seen = list(damaged(prepared(source), x, 100))
    assert len(seen) >= 10
    for node, found in seen:
        assert named(found) == [node]


def test_gains_equal_plain_numpy() -> None:
    rng = np.random.default_rng(5)
    x = rng.normal(size=(ROWS, 3, 6, 6)).astype(np.float32)
    w = [rng.normal(size=s).astype(np.float32) for s in ((4, 3, 1, 1), (5, 4, 1, 1), (7, 5))]
    b = [rng.normal(size=n).astype(np.float32) for n in (4, 5)]
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["c"], name="first"),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("Conv", ["r", "w1", "b1"], ["d"], name="second"),
        helper.make_node("GlobalAveragePool", ["d"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "w2"], ["y"], name="third", transB=1),
    ]
    constants = {"w0": w[0], "w1": w[1], "w2": w[2], "b0": b[0], "b1": b[1]}
    model = build(nodes, {"x": ["N", 3, 6, 6]}, constants)
    found = list(gains(prepared(model), {"x": x}))

    def rms(values: NDArray[np.floating[Any]]) -> float:
        return float(np.sqrt(np.square(values.astype(np.float64)).mean()))

    product = np.einsum("oi,nihw->nohw", w[0][:, :, 0, 0], x)
    real = np.maximum(product + b[0][:, None, None], 0)
    second = np.einsum("oi,nihw->nohw", w[1][:, :, 0, 0], real)
    pooled = (second + b[1][:, None, None]).mean(axis=(2, 3))
    wanted = [
        (product, x, rms(product + b[0][:, None, None]) / rms(b[0]), True),
        (second, real, rms(second + b[1][:, None, None]) / rms(b[1]), False),
        (pooled @ w[2].T, pooled, None, False),
    ]
    assert [g.node for g in found] == ["first", "second", "third"]
    for g, matrix, (result, operand, biases, first) in zip(found, w, wanted, strict=True):
        assert g.gain == pytest.approx(rms(result) / rms(operand), rel=1e-4)
        norms = [np.linalg.norm(row.ravel()) for row in matrix]
        assert g.norm == pytest.approx(np.median(norms), rel=1e-5)
        assert g.biases == (None if biases is None else pytest.approx(biases, rel=1e-4))
        assert g.first is first


def report_of(ratios: dict[str, float | None], output: float) -> dict[str, Any]:
    """A chain of layers with their ratios in dB."""
    return {
        "coverage": [
            {"layer": name, "reads": [i - 1] if i else []} for i, name in enumerate(ratios)
        ],
        "layers": [{"name": name, "sqnr_integer_db": db} for name, db in ratios.items()],
        "accuracy": {"outputs": [{"name": "y", "sqnr_integer_db": output, "agreement": 0.5}]},
    }


def test_a_program_far_from_float_names_the_layer_in_which_most_is_lost() -> None:
    ratios = {"a": 40.0, "view": None, "b": 31.0, "c": 9.0, "d": 6.5}
    first = headline(report_of(ratios, 6.5))
    assert first is not None
    assert first.state == "fail"
    assert "Only 6.5 dB are left of output y" in first.sentence
    assert "in layer c, where 31.0 dB become 9.0 dB" in first.sentence
    sound = headline(report_of(ratios | {"c": 30.0, "d": 29.0}, 29.0))
    assert sound is not None
    assert (sound.state, "is d with 29.0 dB" in sound.sentence) == ("pass", True)
    assert "50.00 % of the samples" in sound.sentence
    assert headline({}) is None
