"""The keyword network that ships: its data are its script's, it trains by true gradients, and as integers it keeps its
accuracy in a program that is small although 49 steps are unrolled.
"""

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

import qcompile
from qcompile import checks

FOLDER = Path(__file__).parents[1] / "models" / "keywords-gru"
Floats = NDArray[np.float32]


@pytest.fixture(scope="module")
def words() -> dict[str, Any]:
    return runpy.run_path(str(FOLDER.parent / "keywords.py"))


def arrays(name: str) -> dict[str, NDArray[np.generic]]:
    with np.load(FOLDER / name, allow_pickle=False) as archive:
        return dict(archive)


def logits(features: Floats) -> Floats:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(FOLDER / "model.onnx", options)
    (found,) = session.run(["logits"], {"features": features})
    return np.asarray(found)


def test_the_model_is_a_gru_with_a_free_batch() -> None:
    model = onnx.load(FOLDER / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 21)]
    assert Counter(n.op_type for n in model.graph.node) == Counter(
        ["Transpose", "GRU", "Squeeze", "Gemm"]
    )
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {"features": ["N", 49, 10], "logits": ["N", 12]}


def test_the_stated_accuracy_is_reproduced_exactly() -> None:
    stated = tomllib.loads((FOLDER / "model.toml").read_text())["accuracy"]
    data, scale = arrays("eval.npz"), 0.25
    assert tomllib.loads((FOLDER / "eval.toml").read_text())["inputs"]["features"]["scale"] == scale
    found = logits(np.asarray(data["x"] * np.float32(scale), np.float32))
    correct = int((found.argmax(axis=1) == data["y"]).sum())
    assert stated == {"metric": "top1", "correct": correct, "samples": len(data["y"])}
    sentence = f"{100 * correct / len(data['y']):.2f} % ({correct} of {len(data['y'])})"
    assert sentence in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_the_data_are_the_scripts(words: dict[str, Any]) -> None:
    codes, labels = words["samples"]()
    train, calib = words["TRAIN_SAMPLES"], arrays("calib.npz")
    evaluation = arrays("eval.npz")
    np.testing.assert_array_equal(evaluation["y"], labels[train:])
    # another processor's exp and log may differ in the last bit, and a code then by one
    pairs = [(calib["x"], codes[: len(calib["x"])]), (evaluation["x"], codes[train:])]
    for shipped, made in pairs:
        apart = np.abs(shipped.astype(int) - made)
        assert apart.max() <= 1
        assert apart.mean() < 1e-3
    seen = {sample.tobytes() for sample in codes[:train]}
    assert not seen & {sample.tobytes() for sample in codes[train:]}


def test_gradients_are_difference_quotients() -> None:
    train = runpy.run_path(str(FOLDER / "train.py"))
    rng = np.random.default_rng(0)
    weights = {k: v.astype(np.float64) for k, v in train["initial"](rng).items()}
    x, y = rng.normal(size=(3, 49, 10)), np.array([0, 5, 11])
    _, found = train["gradients"](weights, x, y)
    for name, array in weights.items():
        at = tuple(int(rng.integers(n)) for n in array.shape)
        kept, losses = array[at], []
        for step in (1e-2, -1e-2):
            array[at] = kept + step
            losses.append(train["gradients"](weights, x, y)[0])
        array[at] = kept
        # the script computes in float32
        assert found[name][at] == pytest.approx((losses[0] - losses[1]) / 2e-2, rel=2e-2, abs=1e-4)


def test_as_integers_it_keeps_its_accuracy_in_a_small_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # onnxruntime takes half a minute to open 10,000 nodes; test_recurrent.py compares a shorter network there
    monkeypatch.setattr(checks, "_exported", lambda *_: (0, 0))
    artifact = qcompile.compile(
        FOLDER / "model.onnx", "x86", FOLDER / "calib.toml", output=tmp_path / "out", samples=32
    )
    stated = tomllib.loads((FOLDER / "model.toml").read_text())["accuracy"]
    data = arrays("eval.npz")
    features = np.asarray(data["x"] * np.float32(0.25), np.float32)
    found = artifact.run({"features": features})["logits"]
    correct = int((found.argmax(axis=1) == data["y"]).sum())
    assert correct >= stated["correct"] - stated["samples"] / 100
    np.testing.assert_array_equal(found, artifact.golden.run({"features": features})["logits"])
    # the model has 4,416 weights, of which 3,072 would be there 48 times if each step had its own
    memory = artifact.report["memory"]
    assert isinstance(memory, dict)
    assert memory["weight_bytes"] < 10_000
    assert (artifact.folder / "model.c").read_text().count("static LAYER") < 60
