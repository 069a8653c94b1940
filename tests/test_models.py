"""The shipped networks are complete, are what their READMEs say, and never saw their test data."""

from __future__ import annotations

import runpy
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

MODELS = Path(__file__).parents[1] / "models"
SHIPPED = sorted(script.parent for script in MODELS.glob("*/train.py"))
DIGITS = [folder for folder in SHIPPED if folder.name.startswith("digits")]
KEYWORDS = MODELS / "keywords-gru"
FILES = {
    "README.md",
    "calib.npz",
    "calib.toml",
    "eval.npz",
    "eval.toml",
    "model.onnx",
    "model.toml",
    "train.py",
}

each_model = pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
each_digits = pytest.mark.parametrize("folder", DIGITS, ids=lambda folder: folder.name)


def toml(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def rows(images: NDArray[np.generic]) -> set[bytes]:
    return {image.tobytes() for image in images}


def logits(folder: Path, images: NDArray[np.generic], name: str = "image") -> NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    (result,) = session.run(["logits"], {name: images})
    return np.asarray(result)


def operators(folder: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(folder / "model.onnx").graph.node)


def test_three_networks_ship() -> None:
    names = [folder.name for folder in SHIPPED]
    assert names == ["digits-dscnn", "digits-resnet", "keywords-gru"]


def test_together_they_are_small() -> None:
    sizes = [path.stat().st_size for folder in SHIPPED for path in folder.glob("*.*")]
    assert sum(sizes) < 600_000


@each_model
def test_the_folder_is_complete(folder: Path) -> None:
    assert FILES <= {path.name for path in folder.iterdir()}
    assert (folder / "model.onnx").stat().st_size < 100_000


@each_digits
def test_the_model_is_opset_17_with_a_free_batch(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {"image": ["N", 1, 8, 8], "logits": ["N", 10]}


def test_the_resnet_has_two_skips_one_of_them_projected_and_no_batchnorm() -> None:
    assert operators(MODELS / "digits-resnet") == {
        "Conv": 6,
        "Relu": 5,
        "Add": 2,
        "GlobalAveragePool": 1,
        "Flatten": 1,
        "Gemm": 1,
    }


def test_the_dscnn_keeps_batchnorm_and_hard_swish() -> None:
    assert operators(MODELS / "digits-dscnn") == {
        "Conv": 9,
        "BatchNormalization": 9,
        "HardSwish": 9,
        "GlobalAveragePool": 1,
        "Flatten": 1,
        "Gemm": 1,
    }


@each_digits
def test_the_descriptions_name_what_is_in_the_files(folder: Path) -> None:
    assert toml(folder / "calib.toml") == {
        "file": "calib.npz",
        "inputs": {"image": {"key": "image"}},
    }
    assert toml(folder / "eval.toml") == {
        "file": "eval.npz",
        "labels": "y",
        "metric": "top1",
        "inputs": {"image": {"key": "image"}},
    }
    assert set(arrays(folder / "calib.npz")) == {"image"}
    assert set(arrays(folder / "eval.npz")) == {"image", "y"}


@each_digits
def test_the_stated_accuracy_is_reproduced_exactly(folder: Path) -> None:
    stated = toml(folder / "model.toml")["accuracy"]
    data = arrays(folder / "eval.npz")
    correct = int((logits(folder, data["image"]).argmax(axis=1) == data["y"]).sum())
    assert stated == {"metric": "top1", "correct": correct, "samples": len(data["y"])}
    assert correct / len(data["y"]) >= 0.97
    sentence = f"{100 * correct / len(data['y']):.2f} % ({correct} of {len(data['y'])})"
    assert sentence in (folder / "README.md").read_text(encoding="utf-8")


@each_digits
def test_any_batch_size_gives_the_same_logits(folder: Path) -> None:
    images = arrays(folder / "eval.npz")["image"][:5]
    together = logits(folder, images)
    alone = np.concatenate([logits(folder, image[None]) for image in images])
    np.testing.assert_allclose(alone, together, rtol=0, atol=1e-4)


@each_digits
def test_calibration_and_evaluation_are_the_two_sides_of_the_split(folder: Path) -> None:
    digits = runpy.run_path(str(MODELS / "digits.py"))
    images, labels = digits["samples"]()
    train, held_out = digits["split"]()
    calib, evaluation = arrays(folder / "calib.npz"), arrays(folder / "eval.npz")

    assert calib["image"].dtype == evaluation["image"].dtype == np.float32
    assert evaluation["y"].dtype == np.int64
    np.testing.assert_array_equal(calib["image"], images[train[: len(calib["image"])]])
    np.testing.assert_array_equal(evaluation["image"], images[held_out])
    np.testing.assert_array_equal(evaluation["y"], labels[held_out])
    assert len(calib["image"]) == 256
    assert len(evaluation["image"]) >= 360


def test_training_never_saw_an_evaluation_sample() -> None:
    digits = runpy.run_path(str(MODELS / "digits.py"))
    images, _ = digits["samples"]()
    train, held_out = digits["split"]()
    assert sorted([*train, *held_out]) == list(range(1797))
    assert not rows(images[train]) & rows(images[held_out])


@each_digits
def test_pixels_lie_on_the_lattice_of_sixteenths(folder: Path) -> None:
    for name in ("calib.npz", "eval.npz"):
        codes = arrays(folder / name)["image"].astype(np.float64) * 16
        assert set(np.unique(codes)) == set(range(17))
