"""analyze: planted defects are found and ranked first, their flags keep what is promised, figures equal plain numpy."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper

from qcompile import driver
from qcompile.cli import main
from qcompile.errors import ToolchainMissing, VerificationMismatch
from qcompile.job import Job
from qcompile.measure import restricted, rounded_model
from qcompile.onnx import qdq, weights
from qcompile.options import Options
from qcompile.pipeline import Context
from qcompile.report import tables
from qcompile.targets.x86 import X86
from qcompile.verify import Mismatch, Verification
from tests.oracle import build
from tests.test_report import documented, leaves

Floats = NDArray[np.float32]
Real = NDArray[np.float64]
Run = Callable[..., dict[str, Any]]

ROWS, SIZE = 64, 8
RECIPE = """
summary = "what the tests rest on"
residual = "accumulator"
requant = "dyadic"
[[pass]]
name = "fold"
[[pass]]
name = "outline"
[[pass]]
name = "canonicalize"
[[pass]]
name = "place"
[[pass]]
name = "calibrate"
method = "minmax"
[[pass]]
name = "widen"
"""


@dataclass(frozen=True)
class Case:
    """A network with a planted defect, its data and the flags it is compiled with."""

    model: bytes
    x: Floats
    weights: Mapping[str, Floats]
    flags: tuple[str, ...] = ()


def conv(name: str, x: str, out: str) -> Any:
    return helper.make_node("Conv", [x, f"{name}.w", f"{name}.b"], [out], name=name)


def relu(x: str, out: str) -> Any:
    return helper.make_node("Relu", [x], [out], name=f"relu_{out}")


def net(nodes: list[Any], x: Floats, weights: dict[str, Floats], *flags: str) -> Case:
    """A network over `x` whose convolutions are of size 1."""
    shaped = {
        name: a.astype(np.float32).reshape(*a.shape, 1, 1) if name.endswith(".w") else a
        for name, a in weights.items()
    }
    shaped = {name: a.astype(np.float32) for name, a in shaped.items()}
    model = build(nodes, {"x": ["N", *x.shape[1:]]}, shaped)
    return Case(model, x.astype(np.float32), weights, flags)


def normal(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def plain() -> Case:
    """Nothing planted."""
    weights = {
        "c1.w": normal(20, 8, 4), "c1.b": np.zeros(8), "c2.w": normal(21, 5, 8), "c2.b": np.zeros(5),
    }  # fmt: skip
    nodes = [conv("c1", "x", "u"), relu("u", "t"), conv("c2", "t", "y")]
    return net(nodes, normal(22, ROWS, 4, SIZE, SIZE), weights)


def cancelling_weights() -> Case:
    """Channel 0 adds nothing, with weights 100 times larger than all others, which share its scale."""
    x = normal(0, ROWS, 4, SIZE, SIZE)
    x[:, 1] = x[:, 0]
    first = 0.3 * normal(1, 8, 4)
    first[0] = [100, -100, 0, 0]
    weights = {"c1.w": first, "c1.b": np.zeros(8), "c2.w": normal(2, 5, 8), "c2.b": np.zeros(5)}
    nodes = [conv("c1", "x", "u"), relu("u", "t"), conv("c2", "t", "y")]
    return net(nodes, x, weights, "--no-per-channel")


def rare_values() -> Case:
    """One channel of t is 100 times larger in one pixel of a thousand, and all but unread."""
    x = normal(3, ROWS, 4, SIZE, SIZE)
    x[:, 3] = 0
    x[::16, 3, 4, 4] = 3
    first = 0.3 * normal(4, 8, 4)
    first[:, 3] = 0
    first[7] = [0, 0, 0, 60]
    second = normal(5, 5, 8)
    second[:, 7] *= 1e-3
    weights = {"c1.w": first, "c1.b": np.zeros(8), "c2.w": second, "c2.b": np.zeros(5)}
    return net([conv("c1", "x", "u"), relu("u", "t"), conv("c2", "t", "y")], x, weights)


def giant_bias() -> Case:
    """A bias of 1e9, clipped to 6: the one weight scale must grow until no weight is left."""
    x = normal(6, ROWS, 4, SIZE, SIZE)
    bias = np.zeros(8)
    bias[0] = 1e9
    weights = {"c1.w": normal(7, 8, 4), "c1.b": bias, "c2.w": normal(8, 5, 8), "c2.b": np.zeros(5)}
    weights |= {"lo": np.array(0.0), "hi": np.array(6.0)}
    clip = helper.make_node("Clip", ["u", "lo", "hi"], ["t"], name="clip")
    nodes = [conv("c1", "x", "u"), clip, conv("c2", "t", "y")]
    return net(nodes, x, weights, "--no-per-channel")


def unlike_operands() -> Case:
    """A sum of a, around 1, and b, around 1000 in one channel that is all but unread and 0 elsewhere."""
    x = normal(9, ROWS, 4, SIZE, SIZE)
    large = np.zeros((8, 4))
    large[0] = 300 * np.abs(normal(10, 4))
    last = normal(12, 5, 8)
    last[:, 0] *= 1e-5
    weights = {
        "ca.w": 0.3 * normal(11, 8, 4), "ca.b": np.zeros(8), "cb.w": large, "cb.b": np.zeros(8),
        "c2.w": last, "c2.b": np.zeros(5),
    }  # fmt: skip
    nodes = [
        conv("ca", "x", "ua"), relu("ua", "a"), conv("cb", "x", "ub"), relu("ub", "b"),
        helper.make_node("Add", ["a", "b"], ["s"], name="sum"), conv("c2", "s", "y"),
    ]  # fmt: skip
    return net(nodes, x, weights)


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """A verb of the command line on a case, without a compiler; what it prints as JSON."""

    def lacking(*_: object, **__: object) -> None:
        raise ToolchainMissing("no compiler: install gcc")

    monkeypatch.setattr(X86, "runner", lacking)
    monkeypatch.setattr(X86, "certify", lacking)

    def call(verb: str, case: Case, *flags: str) -> dict[str, Any]:
        (tmp_path / "net.onnx").write_bytes(case.model)
        np.save(tmp_path / "x.npy", case.x)
        (tmp_path / "plain.toml").write_text(RECIPE)
        given = [verb, str(tmp_path / "net.onnx"), "--calib", str(tmp_path / "x.npy")]
        given += ["--recipe", str(tmp_path / "plain.toml"), "--json", "-q", *case.flags, *flags]
        assert main(given) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return call


@pytest.mark.parametrize(
    ("case", "kind", "tensor", "override"),
    [
        pytest.param(cancelling_weights(), "channels", "c1.w", "--per-channel", id="weights"),
        pytest.param(rare_values(), "outlier", "t", "--override 't=int16'", id="activation"),
        pytest.param(giant_bias(), "bias", "c1.w", "--per-channel", id="bias"),
        pytest.param(unlike_operands(), "mismatch", "s", "--override 's=int16'", id="add"),
    ],
)
def test_a_planted_defect_is_ranked_first_and_its_flag_keeps_the_promise(
    run: Run, tmp_path: Path, case: Case, kind: str, tensor: str, override: str
) -> None:
    found = run("analyze", case)
    first = found["causes"][0]
    assert (first["kind"], first["tensor"], first["override"]) == (kind, tensor, override)
    assert first["basis"] == "measured"
    assert first["gain_db"] > 6
    again = run("compile", case, "-o", str(tmp_path / "out"), *shlex.split(override))
    (before,), (after,) = found["accuracy"]["outputs"], again["accuracy"]["outputs"]
    gained = after["sqnr_integer_db"] - before["sqnr_integer_db"]
    assert gained == pytest.approx(first["gain_db"], abs=1.0)


def test_a_giant_bias_is_counted(run: Run) -> None:
    (weight, other) = run("analyze", giant_bias())["weights"]
    assert (weight["bias_saturated"], weight["bias_widened"]) == (1, 8)
    assert (other["bias_saturated"], other["bias_widened"]) == (0, 0)
    # widen leaves a bias 29 bits and its zero point's share
    assert weight["bias_bits"] in (30, 31)
    assert weight["zeroed_percent"] == 100.0


def test_operands_of_unlike_scales_are_listed(run: Run, tmp_path: Path) -> None:
    case = unlike_operands()
    found = run("analyze", case)
    a, b = found["joins"]
    step = {row["tensor"]: row["scale"] for row in found["layers"]}
    assert (a["operand"], a["operation"], a["result"]) == ("a", "Add", "s")
    assert a["ratio"] == pytest.approx(step["a"] / step["s"])
    assert b["ratio"] == pytest.approx(step["b"] / step["s"])
    values = np.maximum(np.einsum("oi,nihw->nohw", case.weights["ca.w"], case.x), 0)
    small = (values[values > 0] < step["s"] / 2).mean()
    assert a["lost_percent"] == pytest.approx(100 * small, abs=0.5)
    compiled = run("compile", case, "-o", str(tmp_path / "out"))
    for shared in ("accuracy", "layers", "outputs", "stored"):
        assert compiled[shared] == found[shared], shared


# --- figures against plain numpy -----------------------------------------------------------------


def rounded(x: Real, scale: float, zero: int, bits: int = 8) -> Real:
    """What a tensor of 8-bit codes holds."""
    lo, hi = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    return (np.clip(np.rint(x / scale) + zero, lo, hi) - zero) * scale


def symmetric(w: Real) -> Real:
    """Weights of 8 bits, one scale a row."""
    scale = np.float32(np.abs(w).max(axis=1, keepdims=True) / 127).astype(np.float64)
    return np.clip(np.rint(w / scale), -127, 127) * scale


def sqnr(real: Real, other: Real) -> float:
    return float(10 * np.log10(np.square(real).sum() / np.square(real - other).sum()))


def test_fractions_and_ratios_equal_plain_numpy(run: Run) -> None:
    case = plain()
    found = run("analyze", case, "--method", "percentile")
    w = {k: v.astype(np.float64) for k, v in case.weights.items()}

    def forward(
        x: Real, w1: Real, w2: Real, at: Callable[[Real], Real] = lambda t: t
    ) -> tuple[Real, Real]:
        t = np.maximum(np.einsum("oi,nihw->nohw", w1, x), 0)
        return t, np.einsum("oi,nihw->nohw", w2, at(t))

    x = case.x.astype(np.float64)
    t, y = forward(x, w["c1.w"], w["c2.w"])
    (entry,), (layer, last) = found["inputs"], found["layers"]
    for row, values in ((entry, x), (layer, t), (last, y)):
        scale, zero, lo = row["scale"], row["zero_point"], -(1 << (row["bits"] - 1))
        below = values < (lo - zero - 0.5) * scale
        above = values > (-lo - 1 - zero + 0.5) * scale
        assert row["clipped_percent"] == pytest.approx(100 * (below | above).mean(), abs=0.01)
        lost = (np.rint(values / scale) == 0)[values != 0].mean()
        assert row["zeroed_percent"] == pytest.approx(100 * lost, abs=0.05)
        histogram = row["histogram"]
        assert (histogram["lo"], histogram["hi"]) == pytest.approx(
            (values.min(), values.max()), rel=1e-5
        )
        assert sum(histogram["counts"]) == min(values.size, 64 * values[0].size)
    assert layer["clipped_percent"] > 0
    assert layer["zeroed_percent"] > 0

    def at_t(values: Real) -> Real:
        return rounded(values, layer["scale"], layer["zero_point"])

    narrow = rounded(x, entry["scale"], entry["zero_point"])
    by_layer = {row["layer"]: row for row in found["sensitivity"]["layers"]}
    alone = {
        "x": forward(narrow, w["c1.w"], w["c2.w"])[1],
        "c1": forward(x, symmetric(w["c1.w"]), w["c2.w"], at_t)[1],
    }
    for name, got in alone.items():
        assert by_layer[name]["alone_db"] == pytest.approx(sqnr(y, got), abs=0.05), name
    halves = forward(x, symmetric(w["c1.w"]), symmetric(w["c2.w"]))
    assert layer["sqnr_weights_db"] == pytest.approx(sqnr(t, halves[0]), abs=0.05)
    assert last["sqnr_weights_db"] == pytest.approx(sqnr(y, halves[1]), abs=0.05)

    def at_y(values: Real) -> Real:
        return rounded(values, last["scale"], last["zero_point"], last["bits"])

    whole = at_y(forward(narrow, symmetric(w["c1.w"]), symmetric(w["c2.w"]), at_t)[1])
    full = sqnr(y, whole)
    assert found["sensitivity"]["sqnr_db"] == pytest.approx(full, abs=0.05)
    kept = at_y(forward(x, symmetric(w["c1.w"]), symmetric(w["c2.w"]), at_t)[1])
    assert by_layer["x"]["gain_db"] == pytest.approx(sqnr(y, kept) - full, abs=0.05)
    for row in found["weights"]:
        real = w[row["tensor"]]
        assert row["sqnr_db"] == pytest.approx(sqnr(real, symmetric(real)), abs=1e-3)
        magnitude = np.abs(real).max(axis=1)
        assert row["spread"] == pytest.approx(magnitude.max() / np.median(magnitude), rel=1e-5)


# --- runs and slots ------------------------------------------------------------------------------


def built(models: Path, **options: Any) -> driver.Build:
    folder = models / "digits-resnet"
    chosen = Options(samples=16, **options)
    job = Job.checked(folder / "model.onnx", "x86", "fast", None, {}, chosen)
    return driver.build(job, folder / "calib.toml", Context())


@pytest.mark.parametrize("block", [7, weights.BLOCK])
@pytest.mark.parametrize(
    "options", [{}, {"weights": "int4", "activations": "int4", "per_channel": False}]
)
def test_the_float_form_equals_quantize_and_dequantize(
    models: Path, options: dict[str, Any], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "BLOCK", block)
    made = built(models, **options)
    side, rows = made.floats, made.data.rows(16)
    some = {n for i, n in enumerate(side.plan.quantizers) if i % 2}
    for plan in (side.plan, restricted(side.model, side.plan, some)):
        results = []
        for proto in (qdq.export(side.model, plan), ir.to_proto(rounded_model(side.model, plan))):
            settings = onnxruntime.SessionOptions()
            settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            session = onnxruntime.InferenceSession(
                proto.SerializeToString(), settings, providers=["CPUExecutionProvider"]
            )
            results.append(session.run(None, dict(rows))[0])
        assert np.abs(results[0]).max() > 1
        np.testing.assert_allclose(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_a_fixed_batch_is_measured_layer_by_layer_too(models: Path, tmp_path: Path) -> None:
    folder = models / "digits-resnet"
    proto = onnx.load(folder / "model.onnx")
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(proto, tmp_path / "two.onnx")
    found = []
    for model in (folder / "model.onnx", tmp_path / "two.onnx"):
        job = Job.checked(model, "x86", "fast", None, {}, Options(samples=16))
        made = driver.build(job, folder / "calib.toml", Context())
        measured = driver.measured_on_samples(job, made)
        rows = measured.tensors.items()
        found.append({name: stages.integer.sqnr_db for name, stages in rows if name != "image"})
        assert measured.samples == 16
    free, fixed = found
    assert len(free) >= 9
    assert None not in free.values()
    assert fixed == pytest.approx(free, rel=1e-9)


def test_an_analysis_writes_its_reports(
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, place = models / "digits-resnet", tmp_path / "why"
    given = [
        "analyze",
        str(folder / "model.onnx"),
        "--calib",
        str(folder / "calib.toml"),
        "--recipe",
        "fast",
    ]
    given += ["--samples", "16", "--rows", "8", "--weights", "int4", "-o", str(place), "-q"]
    assert main(given) == 0
    said = capsys.readouterr().out
    report = json.loads((place / "report.json").read_text())
    found = {path for path, _ in leaves(report)}
    of_a_mismatch = {path for path in documented() if path.startswith("verification.first.")}
    empty = {"warnings", "causes[].also", "causes", "findings"}
    assert documented(1) - found <= {"causes[].also[]"}
    assert found - documented(1) <= documented() | of_a_mismatch | empty | {
        "verification.first",
        "verification.apart",
    }
    assert report["verification"]["checked"]
    assert report["verification"]["mismatches"] == 0
    assert "adds nothing" in said
    assert report["causes"][0]["override"] in said
    page = (place / "report.html").read_text()
    assert page.count('class="alone"') == len(report["sensitivity"]["layers"])
    tensors = [t for row in report["sensitivity"]["layers"] for t in row["tensors"]]
    assert sorted(tensors) == sorted(built(models, weights="int4").floats.plan.quantizers)
    # an analysis replaces an analysis, and nothing else
    monkeypatch.setattr("qcompile.analysis.analyze", lambda *_, **__: report)
    assert main(given) == 2
    assert main([*given, "--force"]) == 0
    (place / "notes.txt").touch()
    assert main([*given, "--force"]) == 2


def test_a_program_that_differs_is_told_and_ends_with_5(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from qcompile import analysis

    wrong = Verification(4, 1, Mismatch("c1", "t", 0, (1, 2), 40, 41))
    monkeypatch.setattr(X86, "runner", lambda *_, **__: None)
    monkeypatch.setattr(analysis, "verify", lambda *_, **__: wrong)
    case = rare_values()
    (tmp_path / "net.onnx").write_bytes(case.model)
    np.save(tmp_path / "x.npy", case.x)
    given = [
        "analyze",
        str(tmp_path / "net.onnx"),
        "--calib",
        str(tmp_path / "x.npy"),
        "--rows",
        "2",
    ]
    assert main([*given, "--recipe", "fast", "-q"]) == VerificationMismatch.exit_code
    said = capsys.readouterr()
    assert "DIFFERS" in said.out
    assert "the integer graph has 40, the program 41" in said.err


def test_hostile_names_make_overrides_that_match_them(run: Run, tmp_path: Path) -> None:
    name = "a*'; rm -rf $(x) [1]"
    case = rare_values()
    nodes = [conv("c1", "x", "u"), relu("u", name), conv("c2", name, "y")]
    hostile = net(nodes, case.x, dict(case.weights))
    first = run("analyze", hostile)["causes"][0]
    assert first["tensor"] == name
    words = shlex.split(first["override"])
    assert len(words) == 2
    report = run("compile", hostile, "-o", str(tmp_path / "out"), *words)
    (row,) = [r for r in report["layers"] if r["tensor"] == name]
    assert row["bits"] == 16
    for part in tables.analyzed(run("analyze", hostile), None):
        assert part is not None
