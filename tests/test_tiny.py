"""Does the thing work at all: an ONNX file becomes a verified program, in seconds."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import qcompile
from qcompile import driver


def tiny(path: Path) -> Path:
    rng = np.random.default_rng(0)
    w = numpy_helper.from_array(rng.normal(size=(4, 2, 3, 3)).astype(np.float32), "w")
    v = numpy_helper.from_array(rng.normal(size=(3, 4)).astype(np.float32), "v")
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c"], ["r"]),
            helper.make_node("GlobalAveragePool", ["r"], ["p"]),
            helper.make_node("Flatten", ["p"], ["f"]),
            helper.make_node("Gemm", ["f", "v"], ["y"], transB=1),
        ],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2, 5, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        [w, v],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path
    )
    return path


def test_an_onnx_file_becomes_a_verified_program(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    samples = [{"x": rng.normal(size=(8, 2, 5, 5)).astype(np.float32)} for _ in range(4)]
    artifact = qcompile.compile(
        tiny(tmp_path / "tiny.onnx"), "x86", samples, output=tmp_path / "out"
    )
    verification = artifact.verify(samples)
    assert (verification.samples, verification.mismatches) == (32, 0)
    assert verification.intermediates >= 3
    golden, got = artifact.golden.run(samples[0])["y"], artifact.run(samples[0])["y"]
    assert np.array_equal(golden, got)
    session = onnxruntime.InferenceSession(tmp_path / "tiny.onnx")
    real = session.run(None, samples[0])[0]
    assert 10 * np.log10(np.square(real).sum() / np.square(real - got).sum()) > 30


@pytest.mark.parametrize(
    ("numbers", "vectors", "opt"),
    [(106, 2, "-O2"), (105, 1, "-O2"), (53, 1, "-O2"), (52, 0, "-O2"), (52, 0, "-O0")],
)
def test_vectors_of_the_self_test_are_no_more_than_c_source_may_hold(
    tmp_path: Path, numbers: int, vectors: int, opt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "SELF_TEST_NUMBERS", numbers)
    samples = [{"x": np.float32(np.arange(100) - 50).reshape(2, 2, 5, 5)}]
    artifact = qcompile.compile(
        tiny(tmp_path / "tiny.onnx"), "x86", samples, "fast", tmp_path / "out"
    )
    strict = f"CFLAGS=-std=c99 {opt} -Wall -Wextra -Wconversion -Wshadow -Wundef -Werror"
    command = ["make", "-C", str(artifact.folder), strict, "test"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"tiny: {vectors} vectors, 0 mismatches" in done.stdout.splitlines()
    warned = json.loads((artifact.folder / "report.json").read_text())["warnings"]
    assert any("self-test has no vectors" in w for w in warned) == (vectors == 0)
