"""Every choice a user has about one compilation: the program stays exact, and the choice shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import qcompile
from qcompile import verbs
from qcompile.errors import BadInput


def evaluation(models: Path, rows: int = 16) -> dict[str, np.ndarray]:
    with np.load(models / "digits-resnet" / "eval.npz") as data:
        return {"image": data["image"][:rows]}


def compile_with(
    models: Path, place: Path, recipe: str = "default", **chosen: object
) -> qcompile.Artifact:
    folder = models / "digits-resnet"
    options = qcompile.Options(**chosen)  # type: ignore[arg-type]
    return qcompile.compile(
        folder / "model.onnx", "x86", folder / "calib.toml", recipe, place / "out", options=options
    )


CHOICES: dict[str, tuple[dict[str, object], float]] = {
    "int8 outputs": ({"output_dtype": "int8"}, 30),
    "int32 outputs": ({"output_dtype": "int32"}, 30),
    "uint8 inputs": ({"input_dtype": "uint8"}, 30),
    "int16 inputs": ({"input_dtype": "int16"}, 30),
    "per-tensor weights": ({"per_channel": False}, 25),
    "int4 weights": ({"weights": "int4", "first_last": "int8"}, 5),
    "int4 everywhere": ({"weights": "int4", "activations": "int4"}, 0),
    "int2 weights": ({"weights": "int2"}, -30),
    "an override": ({"overrides": {"*Relu_1*": "int4"}}, 3),
    "min-max": ({"method": "minmax"}, 30),
    "moving average": ({"method": "moving-average"}, 20),
    "percentile": ({"method": "percentile"}, 25),
    "entropy": ({"method": "entropy"}, 20),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_keeps_the_program_exact(models: Path, tmp_path: Path, choice: str) -> None:
    chosen, least = CHOICES[choice]
    artifact = compile_with(models, tmp_path, **chosen)
    feeds = evaluation(models)
    verification = artifact.verify([feeds])
    assert (verification.samples, verification.mismatches) == (16, 0), verification.first
    result = verbs.evaluate(artifact.folder, models / "digits-resnet" / "eval.toml", samples=64)
    (row,) = result["outputs"]  # type: ignore[misc]
    assert row["sqnr_db"] >= least
    report = artifact.report
    (port,) = report["outputs"]  # type: ignore[misc]
    assert port["dtype"] == chosen.get("output_dtype", "int16")
    (port,) = report["inputs"]  # type: ignore[misc]
    assert port["dtype"] == chosen.get("input_dtype", "int8")


def test_pixels_are_taken_over_exactly(models: Path, tmp_path: Path) -> None:
    artifact = compile_with(models, tmp_path, input_dtype="uint8")
    (port,) = artifact.report["inputs"]  # type: ignore[misc]
    assert (port["scale"], port["zero_point"]) == (0.0625, 0)


def test_channels_last_borders_hold_the_same_numbers(models: Path, tmp_path: Path) -> None:
    plain = compile_with(models, tmp_path / "a")
    last = compile_with(models, tmp_path / "b", io_layout="nhwc")
    feeds = evaluation(models)
    turned = {"image": np.moveaxis(feeds["image"], 1, -1)}
    assert np.array_equal(plain.run(feeds)["logits"], last.run(turned)["logits"])
    assert last.report["inputs"][0]["shape"] == [1, 8, 8, 1]  # type: ignore[index]
    found, _ = verbs.verify(last.folder, models / "digits-resnet" / "eval.toml", samples=8)
    assert (found.samples, found.mismatches) == (8, 0)


@pytest.mark.parametrize(
    ("residual", "requant"), [("int8", "dyadic"), ("int16", "dyadic"), ("accumulator", "shift")]
)
def test_recipe_options_change_the_graph_for_every_target(
    models: Path, tmp_path: Path, residual: str, requant: str
) -> None:
    passes = "".join(
        f'[[pass]]\nname = "{name}"\n'
        for name in ("fold", "outline", "canonicalize", "place", "calibrate", "widen")
    )
    recipe = tmp_path / "mine.toml"
    recipe.write_text(f'residual = "{residual}"\nrequant = "{requant}"\n{passes}')
    plain = compile_with(models, tmp_path / "a")
    mine = compile_with(models, tmp_path / "b", str(recipe))
    verification = mine.verify([evaluation(models)])
    assert (verification.samples, verification.mismatches) == (16, 0)
    assert (plain.folder / "integer.onnx").read_bytes() != (
        mine.folder / "integer.onnx"
    ).read_bytes()


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"weights": "int9"}, "int9"),
        ({"activations": "int7"}, "int7"),
        ({"overrides": {"nothing*": "int4"}}, "nothing"),
        ({"overrides": {"*Relu*": "int3"}}, "int3"),
        ({"input_dtype": "int4"}, "int4"),
        ({"output_dtype": "float32"}, "float32"),
        ({"io_layout": "chwn"}, "chwn"),
        ({"cpu": "pentium"}, "pentium"),
        ({"method": "mean"}, "mean"),
        ({"samples": 0}, "samples"),
        ({"plan": "absent.toml"}, "absent"),
    ],
)
def test_a_choice_there_is_not_is_refused(
    models: Path, tmp_path: Path, chosen: dict[str, object], words: str
) -> None:
    with pytest.raises(BadInput, match=words):
        compile_with(models, tmp_path, **chosen)
    assert list(tmp_path.iterdir()) == []


def test_fields_of_options_may_be_given_by_themselves(models: Path, tmp_path: Path) -> None:
    model = models / "digits-resnet" / "model.onnx"
    artifact = qcompile.compile(
        model, "x86", output=tmp_path / "out", output_dtype="int8", verify_samples=1
    )
    assert artifact.report["outputs"][0]["dtype"] == "int8"  # type: ignore[index]
    with pytest.raises(BadInput, match="did you mean 'weights'"):
        qcompile.compile(model, "x86", output=tmp_path / "none", wieghts="int4")


def test_a_fixed_batch_takes_any_multiple_of_it(models: Path, tmp_path: Path) -> None:
    folder = models / "digits-resnet"
    artifact = qcompile.compile(
        folder / "model.onnx",
        "x86",
        folder / "calib.toml",
        output=tmp_path / "out",
        input_dims={"N": 4},
    )
    assert artifact.report["inputs"][0]["shape"] == [4, 1, 8, 8]  # type: ignore[index]
    feeds = evaluation(models, 8)
    assert artifact.run(feeds)["logits"].shape == (8, 10)
    verification = artifact.verify(feeds)
    assert (verification.samples, verification.mismatches) == (8, 0)
    with pytest.raises(BadInput, match=r"4 \* N"):
        artifact.run(evaluation(models, 6))


def test_a_ruined_network_is_said(models: Path, tmp_path: Path) -> None:
    folder = models / "digits-dscnn"
    artifact = qcompile.compile(
        folder / "model.onnx",
        "x86",
        folder / "calib.toml",
        output=tmp_path / "out",
        weights="int2",
        verify_samples=1,
    )
    assert any("damaged" in w for w in artifact.report["warnings"])  # type: ignore[attr-defined]
