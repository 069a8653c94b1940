"""Every shipped recipe through every stage: verified, reproducible from its plan, and as accurate as it promises."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)

import qcompile
from qcompile import plan as plans
from qcompile import recipe, verbs
from qcompile.cli import main
from qcompile.errors import BadInput
from qcompile.job import Job
from qcompile.options import Options

NAME = "digits-dscnn"
# Decibels of signal over noise, per recipe; what is not listed reaches 29.
FLOOR = {"data-free": 12, "fast": 27, "fixed-point": 26, "fixed-point-khot": 23}


def evaluation(models: Path) -> dict[str, np.ndarray]:
    with np.load(models / NAME / "eval.npz") as data:
        return {"image": data["image"][:256]}


def sqnr(models: Path, artifact: qcompile.Artifact, model: Path) -> float:
    """Of the first output against onnxruntime on the float model."""
    feeds = evaluation(models)
    got = next(iter(artifact.golden.run(feeds).values()))
    real = onnxruntime.InferenceSession(model).run(None, feeds)[0].astype(np.float64)
    return float(10 * np.log10(np.square(real).sum() / np.square(real - got).sum()))


@pytest.mark.parametrize("name", [n for n in recipe.names() if n != "import"])
def test_a_recipe_compiles_verifies_and_reproduces(models: Path, tmp_path: Path, name: str) -> None:
    model = models / NAME / "model.onnx"
    data = None if name == "data-free" else models / NAME / "calib.toml"
    artifact = qcompile.compile(model, "x86", data, name, tmp_path / "out")
    verification = artifact.verify([evaluation(models)])
    assert (verification.samples, verification.mismatches) == (256, 0)
    reproduction = verbs.reproduce(tmp_path / "out" / "manifest.json")
    assert reproduction.identical, reproduction.files
    assert "plan.npz" in dict(reproduction.files)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert sqnr(models, artifact, model) > FLOOR.get(name, 29)
    trials = artifact.report["recipe"]["trials"]  # type: ignore[index]
    assert bool(trials) == (name in ("accurate", "auto"))
    if trials:
        assert {t["taken"] for t in trials} <= {True, False}
        assert trials[0]["gain_db"] == 0


def test_a_damaged_plan_is_said(models: Path, tmp_path: Path) -> None:
    model = models / NAME / "model.onnx"
    data = models / NAME / "calib.toml"
    place = verbs.quantize(model, data, tmp_path / "plan")
    plan = place / "plan.toml"
    content = bytearray((place / "plan.npz").read_bytes())
    with np.load(place / "plan.npz") as stored:
        largest = max((stored[k] for k in stored.files), key=lambda a: a.nbytes)
    content[content.index(largest.tobytes())] ^= 1
    (place / "plan.npz").write_bytes(content)
    with pytest.raises(BadInput, match=r"plan\.npz"):
        qcompile.compile(model, "x86", data, output=tmp_path / "out", plan=plan)
    (place / "plan.npz").unlink()
    with pytest.raises(BadInput, match=r"plan\.npz, beside the plan, lacks"):
        qcompile.compile(model, "x86", data, output=tmp_path / "out", plan=plan)


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, images: np.ndarray) -> None:
        self.images = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self.images, None)
        return None if image is None else {"image": image[np.newaxis]}


@pytest.fixture(scope="module")
def quantized(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network as onnxruntime quantizes it."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    place = tmp_path_factory.mktemp("qdq")
    quant_pre_process(models / NAME / "model.onnx", place / "ready.onnx", skip_symbolic_shape=True)
    with np.load(models / NAME / "calib.npz") as data:
        images = data["image"][:64]
    quantize_static(
        place / "ready.onnx", place / "model.onnx", Reader(images), quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, per_channel=True,
    )  # fmt: skip
    return place / "model.onnx"


def test_a_quantized_model_just_works_and_keeps_its_codes(
    quantized: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calib = models / NAME / "calib.toml"
    out = tmp_path / "out"
    assert main([str(quantized), "--calib", str(calib), "-o", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["recipe"]["name"] == "import"
    artifact = qcompile.load(out)
    assert artifact.verify([evaluation(models)]).mismatches == 0
    theirs = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(quantized).graph.initializer}
    codes = {
        a.tobytes()
        for a in theirs.values()
        if a.dtype == np.int8 and a.ndim in (2, 4) and a.size > 16
    }
    with np.load(out / "plan.npz") as stored:
        mine = {stored[k].tobytes() for k in stored.files if stored[k].dtype == np.int8}
    assert codes
    assert codes <= mine
    reproduction = verbs.reproduce(out / "manifest.json")
    assert reproduction.identical, reproduction.files
    got = verbs.evaluate(out, models / NAME / "eval.toml")
    (row,) = got["outputs"]  # type: ignore[misc]
    assert row["sqnr_db"] > 25


def test_another_recipe_for_a_quantized_model_is_refused(quantized: Path, models: Path) -> None:
    with pytest.raises(BadInput, match="quantized already and recipe fast would decide anew"):
        qcompile.compile(quantized, "x86", models / NAME / "calib.toml", "fast", "nowhere")


def test_a_model_that_only_speaks_of_quantization_is_rounded_as_any_other(models: Path) -> None:
    model = onnx.load(models / NAME / "model.onnx")
    model.doc_string = "made without QuantizeLinear"
    job = Job.checked(model.SerializeToString(), "x86", "default", None, {}, Options())
    assert job.recipe.name == "default"


@pytest.mark.parametrize("damage", ["codes", "bias", "activation", "product"])
def test_a_plan_whose_arrays_do_not_fit_is_refused(
    models: Path, tmp_path: Path, damage: str
) -> None:
    model, data = models / NAME / "model.onnx", models / NAME / "calib.toml"
    place = verbs.quantize(model, data, tmp_path / "plan")
    plan = plans.read(place / "plan.toml")
    weight, product = next(iter(plan.codes)), next(iter(plan.biases))
    match damage:
        case "codes":
            plan.codes[weight] = plan.codes[weight].reshape(-1)
        case "bias":
            plan.biases[product] = plan.biases[product][1:]
        case "activation":
            tensor = next(s.tensor for s in plan.slots.values() if s.kind is plans.Kind.ACTIVATION)
            plan.codes[tensor] = np.zeros(3, np.int8)
        case "product":
            plan.biases["nobody"] = np.zeros(3)
    for name, content in plans.files(plan).items():
        (place / name).write_bytes(content)
    with pytest.raises(BadInput, match=r"has codes of shape|has a bias of"):
        qcompile.compile(model, "x86", data, output=tmp_path / "out", plan=place / "plan.toml")
    assert not (tmp_path / "out").exists()


def test_fewer_samples_than_the_batch_are_said(models: Path, tmp_path: Path) -> None:
    with np.load(models / NAME / "calib.npz") as stored:
        images = stored["image"][:40]
    with pytest.raises(BadInput, match="do not fill one batch of 64 rows"):
        qcompile.compile(
            models / NAME / "model.onnx", "x86", {"image": images}, "accurate", tmp_path / "out",
            input_dims={"N": 64},
        )  # fmt: skip
    assert not list(tmp_path.iterdir())
