"""Bad input: one clear sentence, the documented exit code, no output folder, nothing run."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import qcompile
from qcompile import driver
from qcompile.errors import BadInput, QcompileError, Unsupported

HOSTILE = '*/ #include "x" <script>alert(1)</script> \n\t\\" %s {{ 7*7 }} ../../etc'


def network(width: int = 4, name: str = "", op: str = "Relu") -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    w = numpy_helper.from_array(rng.normal(size=(width, 3, 3, 3)).astype(np.float32), f"w{name}")
    graph = helper.make_graph(
        [
            helper.make_node(
                "Conv",
                [f"x{name}", f"w{name}"],
                [f"c{name}"],
                name=f"conv{name}",
                pads=[1, 1, 1, 1],
            ),
            helper.make_node(op, [f"c{name}"], [f"y{name}"], name=f"act{name}"),
        ],
        f"g{name}",
        [helper.make_tensor_value_info(f"x{name}", TensorProto.FLOAT, ["N", 3, 6, 6])],
        [helper.make_tensor_value_info(f"y{name}", TensorProto.FLOAT, ["N", width, 6, 6])],
        [w],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def compile_in(
    tmp_path: Path, model: object, calibration: object = None, **named: object
) -> QcompileError:
    """The error a compilation ends with; asserts that it left nothing behind."""
    before = {p.name for p in tmp_path.iterdir()}
    with pytest.raises(QcompileError) as caught:
        driver.compile(model, "x86", calibration, output=tmp_path / "out", **named)  # type: ignore[arg-type]
    assert {p.name for p in tmp_path.iterdir()} == before
    sentence = str(caught.value)
    assert sentence
    assert "Traceback" not in sentence
    return caught.value


@pytest.mark.parametrize("cut", [0, 1, 10, 200])
def test_a_truncated_model(tmp_path: Path, cut: int) -> None:
    assert compile_in(tmp_path, network().SerializeToString()[:cut]).exit_code == 2


def test_garbage_for_a_model(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes()
    assert compile_in(tmp_path, noise).exit_code == 2


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    error = compile_in(tmp_path, tmp_path / "absent.onnx")
    assert error.exit_code == 2
    assert "absent.onnx" in str(error)


@pytest.mark.parametrize(
    "location", ["../secret.bin", "/etc/passwd", "inner/../../secret.bin", "link.bin"]
)
def test_external_data_outside_the_models_folder(tmp_path: Path, location: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(4096))
    os.symlink(tmp_path / "secret.bin", home / "link.bin")
    model = network()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    (home / "model.onnx").write_bytes(model.SerializeToString())
    assert compile_in(tmp_path, home / "model.onnx").exit_code == 2


def test_a_pickle_in_the_data_is_never_loaded(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (os.system, (f"touch {tmp_path / 'pwned'}",))

    np.savez(tmp_path / "data.npz", x=np.array([Trap()], dtype=object))
    assert compile_in(tmp_path, network().SerializeToString(), tmp_path / "data.npz").exit_code == 2
    (tmp_path / "data.npz").write_bytes(pickle.dumps(Trap()))
    assert compile_in(tmp_path, network().SerializeToString(), tmp_path / "data.npz").exit_code == 2
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("feeds", "words"),
    [
        ({"x": np.full((4, 3, 6, 6), np.nan, np.float32)}, "x"),
        ({"x": np.full((4, 3, 6, 6), np.inf, np.float32)}, "x"),
        ({"xx": np.zeros((4, 3, 6, 6), np.float32)}, "x"),
        ({"x": np.zeros((4, 3, 6, 7), np.float32)}, "x"),
        ({"x": np.zeros((0, 3, 6, 6), np.float32)}, ""),
        ({"x": np.zeros((4, 3, 6, 6), np.complex64)}, "x"),
        ({}, "x"),
    ],
)
def test_bad_samples(tmp_path: Path, feeds: dict[str, np.ndarray], words: str) -> None:
    error = compile_in(tmp_path, network().SerializeToString(), [feeds])
    assert error.exit_code == 2
    assert words in str(error)


def test_an_unsupported_operator_is_named_with_reason_and_remedy(tmp_path: Path) -> None:
    error = compile_in(tmp_path, network(op="NonZero").SerializeToString())
    assert error.exit_code in (2, 3)
    error = compile_in(tmp_path, network(op="Hardmax").SerializeToString())
    assert isinstance(error, Unsupported)
    assert "act" in str(error)
    assert "Hardmax" in str(error)


def test_a_symbolic_size_wants_input_dim(tmp_path: Path) -> None:
    model = network()
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "H"
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_param = "H"
    error = compile_in(tmp_path, model.SerializeToString())
    assert error.exit_code in (2, 3)
    assert "--input-dim" in str(error)
    artifact = qcompile.compile(
        model.SerializeToString(), output=tmp_path / "ok", input_dims={"H": 6}
    )
    assert artifact.report["inputs"][0]["shape"] == [1, 3, 6, 6]  # type: ignore[index]


@pytest.mark.parametrize("target", ["x86", "arm"])
def test_hostile_names_stay_text(tmp_path: Path, target: str) -> None:
    model = network(name=HOSTILE)
    rng = np.random.default_rng(0)
    samples = [{f"x{HOSTILE}": rng.normal(size=(4, 3, 6, 6)).astype(np.float32)}]
    artifact = qcompile.compile(model.SerializeToString(), target, samples, output=tmp_path / "out")
    verification = artifact.verify(samples)
    assert (verification.samples, verification.mismatches) == (4, 0)
    page = (artifact.folder / "report.html").read_text()
    assert "<script>alert" not in page
    assert "{{ 7*7 }}" in page  # never evaluated
    for file in artifact.folder.glob("*.[ch]"):
        assert '#include "x"' not in [line.strip() for line in file.read_text().splitlines()]
    assert qcompile.load(artifact.folder).graph.inputs[0][0].name == f"x{HOSTILE}"


@pytest.mark.parametrize("file", ["integer.qir", "integer.npz", "manifest.json", "report.json"])
@pytest.mark.parametrize("damage", ["truncate", "garbage", "remove"])
def test_a_damaged_output_folder(tmp_path: Path, file: str, damage: str) -> None:
    folder = tmp_path / "out"
    qcompile.compile(network().SerializeToString(), output=folder)
    path = folder / file
    match damage:
        case "truncate":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        case "garbage":
            path.write_bytes(b"\xff\xfe{]" * 50)
        case _:
            path.unlink()

    def use() -> None:
        artifact = qcompile.load(folder)
        _ = artifact.report
        artifact.golden.run({"x": np.zeros((1, 3, 6, 6), np.float32)})

    with pytest.raises(BadInput):
        use()


def test_the_command_line_says_one_line_and_the_code(tmp_path: Path) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"not a model")
    ran = subprocess.run(
        [sys.executable, "-m", "qcompile", str(bad), "--target=x86", "-o", str(tmp_path / "out")],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 2
    assert "error" in ran.stderr
    assert "Traceback" not in ran.stderr + ran.stdout
    assert not (tmp_path / "out").exists()
