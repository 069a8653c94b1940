"""Shipped networks through every stage: verified, reproducible, and a verification that can fail."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import qcompile
from qcompile import verbs
from qcompile.errors import AccuracyGate, BadInput

NETWORKS = ("digits-resnet", "digits-dscnn")


@pytest.fixture(scope="module")
def compiled(
    tmp_path_factory: pytest.TempPathFactory, models: Path
) -> dict[tuple[str, str], qcompile.Artifact]:
    root = tmp_path_factory.mktemp("compiled")
    return {
        (name, target): qcompile.compile(
            models / name / "model.onnx",
            target,
            models / name / "calib.toml",
            output=root / f"{name}-{target}",
        )
        for name in NETWORKS
        for target in ("x86", "arm")
    }


def evaluation(models: Path, name: str, rows: int) -> dict[str, np.ndarray]:
    with np.load(models / name / "eval.npz") as data:
        return {"image": data["image"][:rows]}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("target", "rows"), [("x86", 400), ("arm", 32)])
def test_every_output_and_intermediate_is_exact(
    compiled: dict[tuple[str, str], qcompile.Artifact],
    models: Path,
    name: str,
    target: str,
    rows: int,
) -> None:
    verification = compiled[name, target].verify([evaluation(models, name, rows)], trace=2)
    assert verification.samples == rows
    assert verification.mismatches == 0, verification.first
    assert verification.intermediates >= 9


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("core", ["cortex-m4", "cortex-m7", "cortex-m55", "hexagon"])
def test_every_embedded_core_is_exact(
    compiled: dict[tuple[str, str], qcompile.Artifact],
    models: Path,
    tmp_path: Path,
    name: str,
    core: str,
) -> None:
    plan = compiled[name, "x86"].folder / "plan.toml"
    artifact = qcompile.compile(
        models / name / "model.onnx", core, models / name / "calib.toml",
        output=tmp_path / "out", plan=plan, samples=32,
    )  # fmt: skip
    verification = artifact.verify([evaluation(models, name, 32)], trace=2)
    assert (verification.samples, verification.mismatches) == (32, 0), verification.first
    assert verification.intermediates >= 9
    assert artifact.certify().clean
    graph = (compiled[name, "x86"].folder / "integer.onnx").read_bytes()
    assert (artifact.folder / "integer.onnx").read_bytes() == graph


@pytest.mark.parametrize("name", NETWORKS)
def test_sanitizers_find_nothing(
    compiled: dict[tuple[str, str], qcompile.Artifact], models: Path, name: str
) -> None:
    verification = compiled[name, "x86"].verify([evaluation(models, name, 32)], sanitize=True)
    assert verification.sanitized
    assert verification.mismatches == 0


@pytest.mark.parametrize("name", NETWORKS)
def test_both_targets_come_from_the_same_integer_graph(
    compiled: dict[tuple[str, str], qcompile.Artifact], name: str
) -> None:
    x86, arm = compiled[name, "x86"].folder, compiled[name, "arm"].folder
    for file in ("integer.onnx", "integer.qir", "integer.npz", "qdq.onnx", "plan.toml"):
        assert (x86 / file).read_bytes() == (arm / file).read_bytes(), file


@pytest.mark.parametrize("name", NETWORKS)
def test_accuracy_is_kept(
    compiled: dict[tuple[str, str], qcompile.Artifact], models: Path, name: str
) -> None:
    result = verbs.evaluate(compiled[name, "x86"].folder, models / name / "eval.toml")
    (row,) = result["outputs"]  # type: ignore[misc]
    assert row["samples"] == 400
    assert row["delta_points"] >= -0.5
    assert row["sqnr_db"] >= 25


def test_outputs_are_the_models_own_names_and_types(
    compiled: dict[tuple[str, str], qcompile.Artifact], models: Path
) -> None:
    artifact = compiled["digits-resnet", "x86"]
    feeds = evaluation(models, "digits-resnet", 5)
    codes, reals = artifact.run(feeds, raw=True), artifact.run(feeds)
    (port,) = artifact.report["outputs"]  # type: ignore[misc]
    assert port["name"] == "logits"
    assert codes["logits"].dtype == np.int16
    assert np.array_equal(
        (codes["logits"].astype(np.float64) - port["zero_point"]) * port["scale"], reals["logits"]
    )
    assert np.array_equal(artifact.golden.run(feeds)["logits"], reals["logits"])


def test_two_compilations_from_one_plan_are_the_same_bytes(
    compiled: dict[tuple[str, str], qcompile.Artifact], models: Path, tmp_path: Path
) -> None:
    first = compiled["digits-dscnn", "arm"]
    options = qcompile.Options(plan=first.folder / "plan.toml")
    model = models / "digits-dscnn" / "model.onnx"
    folders = [
        qcompile.compile(model, "arm", output=tmp_path / n, options=options).folder
        for n in ("one", "two")
    ]
    hashed = json.loads((first.folder / "manifest.json").read_text())["files"]
    assert {"model.c", "model.h", "integer.onnx", "plan.toml"} <= set(hashed)
    for file in hashed:
        contents = {(f / file).read_bytes() for f in (first.folder, *folders)}
        assert len(contents) == 1, file


def test_reproduce_confirms_a_manifest_and_notices_a_change(
    compiled: dict[tuple[str, str], qcompile.Artifact], tmp_path: Path
) -> None:
    folder = compiled["digits-dscnn", "x86"].folder
    assert verbs.reproduce(folder / "manifest.json").identical
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    data = json.loads((copy / "manifest.json").read_text())
    data["files"]["model.c"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(data))
    again = verbs.reproduce(copy / "manifest.json")
    assert not again.identical
    assert ("model.c", "differs") in again.files


# --- a verification that can fail -------------------------------------------------------------------------------

MUTATIONS = {
    "the rounding constant is gone": ("arith.h", r"\(1 << \(places - 1\)\)", "0"),
    "the border is filled with 0 in a convolution": ("model.c", r"to\[k\] = -\d+;", "to[k] = 0;"),
    "the border is filled with 0 in a depthwise convolution": (
        "model.c",
        r"border\[c\] = -\d+;",
        "border[c] = 0;",
    ),
    "one result is one LSB up": (
        "model.c",
        r"(multiplier\[c\]\);\n\s+y\[[^;]*)(, -128, 127\))",
        r"\1 + (c == 0)\2",
    ),
    "a bias is off by one": (
        "weights.h",
        r"(_bias\[\d+\] = \{\s*)(-?\d+)",
        lambda m: f"{m[1]}{int(m[2]) + 1}",
    ),
    "a weight is off by one": (
        "weights.h",
        r"(_weights\[\d+\] = \{\s*)(-?\d+)",
        lambda m: f"{m[1]}{int(m[2]) ^ 1}",
    ),
    "a zero point is off by one": (
        "model.c",
        r"(round_shift\([^;]*\]\)) ([+-]) (\d+),",
        r"\1 \2 \3 + 1,",
    ),
}


@pytest.mark.parametrize("what", MUTATIONS)
def test_verify_catches_a_mutation(
    compiled: dict[tuple[str, str], qcompile.Artifact], models: Path, tmp_path: Path, what: str
) -> None:
    copy = tmp_path / "mutant"
    shutil.copytree(compiled["digits-dscnn", "x86"].folder, copy)
    file, pattern, replacement = MUTATIONS[what]
    text = (copy / file).read_text()
    mutated = re.sub(pattern, replacement, text, count=1)
    assert mutated != text, "the mutation did not apply"
    (copy / file).write_text(mutated)
    verification = qcompile.load(copy).verify([evaluation(models, "digits-dscnn", 64)], trace=64)
    assert verification.mismatches > 0
    assert verification.first is not None
    assert verification.first.expected != verification.first.got


def test_a_mismatch_names_the_first_diverging_layer(
    compiled: dict[tuple[str, str], qcompile.Artifact], models: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "mutant"
    shutil.copytree(compiled["digits-dscnn", "x86"].folder, copy)
    text = (copy / "weights.h").read_text()
    at = text.index("block3_depthwise_conv_Conv_bias")
    head, tail = text[:at], text[at:]
    tail = re.sub(r"(\{\s*)(-?\d+)", lambda m: f"{m[1]}{int(m[2]) + 100000}", tail, count=1)
    (copy / "weights.h").write_text(head + tail)
    verification = qcompile.load(copy).verify([evaluation(models, "digits-dscnn", 4)], trace=0)
    assert verification.first is not None
    assert "block3/depthwise" in verification.first.layer
    assert "block3/depthwise" in str(verification.first)


# --- gates and refusals -----------------------------------------------------------------------------------------


def test_the_accuracy_gate_leaves_nothing_behind(models: Path, tmp_path: Path) -> None:
    with pytest.raises(AccuracyGate, match="dB"):
        qcompile.compile(
            models / "digits-resnet" / "model.onnx",
            "x86",
            models / "digits-resnet" / "calib.toml",
            output=tmp_path / "out",
            options=qcompile.Options(min_sqnr=80.0),
        )
    assert list(tmp_path.iterdir()) == []


def test_force_overwrites_only_what_qcompile_made(models: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(BadInput, match="mine"):
            qcompile.compile(models / "digits-resnet" / "model.onnx", output=mine, force=force)
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_inspecting_minds_no_output_folder(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = tmp_path / "digits_resnet-x86"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    monkeypatch.chdir(tmp_path)
    found = verbs.inspect(models / "digits-resnet" / "model.onnx")
    assert found["unsupported"] == []
    with pytest.raises(BadInput, match="not empty"):
        qcompile.compile(models / "digits-resnet" / "model.onnx")


def test_made_up_data_is_marked_in_every_report(models: Path, tmp_path: Path) -> None:
    artifact = qcompile.compile(models / "digits-resnet" / "model.onnx", output=tmp_path / "out")
    assert artifact.report["data"]["marked"] is True  # type: ignore[index]
    assert any("synthetic" in w for w in artifact.report["warnings"])  # type: ignore[attr-defined]
    assert "synthetic" in (artifact.folder / "report.html").read_text()
