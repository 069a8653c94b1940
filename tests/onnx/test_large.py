"""Weights too large for messages or memory: they stay in files, and everything comes out as if they had not."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import qcompile
from qcompile import folder, scratch
from qcompile.errors import BadInput, Unsupported
from qcompile.ir import ops, proof
from qcompile.onnx import frontend, pieces, reader, weights
from qcompile.onnx.execute import FloatSession

RNG = np.random.default_rng(0)
WIDTH = 24
Floats = NDArray[np.float32]


def crossing() -> onnx.ModelProto:
    """Five products; the first one's result is read by the last and a graph output is read again."""
    nodes, inits = [], []
    for i, source in enumerate(("x", "h0", "h1", "h1", "s3")):
        inits.append(
            numpy_helper.from_array(RNG.standard_normal((WIDTH, WIDTH)).astype(np.float32), f"w{i}")
        )
        inits.append(
            numpy_helper.from_array(RNG.standard_normal(WIDTH).astype(np.float32), f"b{i}")
        )
        nodes.append(
            helper.make_node("Gemm", [source, f"w{i}", f"b{i}"], [f"g{i}"], f"fc{i}", transB=1)
        )
        if i < 4:
            nodes.append(helper.make_node("Relu", [f"g{i}"], [f"h{i}"], f"relu{i}"))
        if i == 3:
            nodes.append(helper.make_node("Add", ["h3", "h0"], ["s3"], "sum"))
    shape = ["N", WIDTH]
    graph = helper.make_graph(
        nodes,
        "crossing",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("h1", "g4", "h2")],
        inits,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def by_hand(x: Floats, model: onnx.ModelProto) -> dict[str, NDArray[np.float64]]:
    w = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}

    def fc(i: int, v: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(v @ w[f"w{i}"].T + w[f"b{i}"])

    h0 = fc(0, x.astype(np.float64)).clip(0)
    h1 = fc(1, h0).clip(0)
    s3 = fc(3, h1).clip(0) + h0
    return {"h0": h0, "h1": h1, "h2": fc(2, h1).clip(0), "s3": s3, "g4": fc(4, s3), "w2": w["w2"]}


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix is large, and every one lies in a file."""
    monkeypatch.setattr(weights, "LARGE_BYTES", 1024)
    monkeypatch.setattr(weights, "FILED_BYTES", 1024)
    monkeypatch.setattr(weights, "BLOCK", 100)
    monkeypatch.setattr(folder, "LARGE_BYTES", 1024)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("most", [1, 3000, 5000, 1 << 20])
def test_pieces_give_what_the_whole_gives(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "WHOLE_BYTES", 0)
    monkeypatch.setattr(pieces, "PIECE_BYTES", most)
    model = crossing()
    shaped = ir.from_proto(onnx.shape_inference.infer_shapes(model, strict_mode=True))
    names = ["g4", "h0", "x", "h2", "s3"]
    cut = pieces.pieces(shaped, [n for n in names if n != "x"])
    assert len(cut) == {1: 5, 3000: 3, 5000: 2, 1 << 20: 1}[most]
    x = RNG.standard_normal((7, WIDTH)).astype(np.float32)
    got = FloatSession(shaped, names, threads=1).run({"x": x})
    wanted = by_hand(x, model)
    np.testing.assert_array_equal(got["x"], x)
    for name in set(names) - {"x"}:
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("names", [["h0"], ["h0", "h2"], ["w1"], ["w1", "h1"], ["g4", "w0", "x"]])
def test_pieces_that_nobody_asks_for(names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "WHOLE_BYTES", 0)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1)
    model = crossing()
    shaped = ir.from_proto(onnx.shape_inference.infer_shapes(model, strict_mode=True))
    x = RNG.standard_normal((3, WIDTH)).astype(np.float32)
    got = FloatSession(shaped, names, threads=1).run({"x": x})
    w = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    wanted = {"x": x, **by_hand(x, model), "w0": w["w0"], "w1": w["w1"]}
    assert set(got) == set(names)
    for name in names:
        rows = wanted[name]
        whole = np.concatenate([rows] * 3) if name.startswith("w") else rows
        np.testing.assert_allclose(
            got[name].reshape(whole.shape), whole, rtol=1e-4, atol=1e-4, err_msg=name
        )


@pytest.mark.usefixtures("large")
def test_large_scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One scale a channel is a large constant too where there are channels enough."""
    monkeypatch.setattr(weights, "LARGE_BYTES", WIDTH)
    x = RNG.standard_normal((40, WIDTH)).astype(np.float32)
    monkeypatch.setattr(weights, "WHOLE_BYTES", 0)
    made = qcompile.compile(crossing().SerializeToString(), "x86", x, output=tmp_path / "out")
    report = json.loads((made.folder / "report.json").read_text())
    assert all(row["sqnr_integer_db"] > 25 for row in report["accuracy"]["outputs"])


@pytest.mark.usefixtures("large")
def test_a_piece_makes_the_weights_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exporters put what becomes of constants in front: no piece hands over whole weights."""
    monkeypatch.setattr(weights, "WHOLE_BYTES", 0)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1)
    model = crossing()
    front = []
    for node in model.graph.node:
        if node.op_type == "Gemm":
            name = node.input[1]
            front.append(helper.make_node("Neg", [name], [f"{name}.n"], f"{name}.n"))
            front.append(helper.make_node("Neg", [f"{name}.n"], [f"{name}.nn"], f"{name}.nn"))
            node.input[1] = f"{name}.nn"
    nodes = [*front, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    shaped = ir.from_proto(onnx.shape_inference.infer_shapes(model, strict_mode=True))
    cut = pieces.pieces(shaped, ["g4", "w3.n"])
    assert len(cut) == 5
    handed = {n for piece in cut[1:] for n in piece.inputs}
    assert handed <= {"h0", "h1", "g3", "g0", "g1", "g2", "s3", "h3", "w3.n"}
    x = RNG.standard_normal((3, WIDTH)).astype(np.float32)
    got = FloatSession(shaped, ["g4", "h2"], threads=1).run({"x": x})
    wanted = by_hand(x, model)
    for name in ("g4", "h2"):
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("large")
def test_compiling_with_weights_in_files_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = crossing().SerializeToString()
    x = RNG.standard_normal((40, WIDTH)).astype(np.float32)
    opened: list[int] = []
    common = weights.common

    def counted() -> scratch.Scratch:
        opened.append(1)
        return common()

    monkeypatch.setattr(weights, "common", counted)
    small = qcompile.compile(model, "x86", x, "fast", tmp_path / "files")
    assert len(opened) >= 5
    opened.clear()
    monkeypatch.setattr(weights, "FILED_BYTES", 1 << 30)
    monkeypatch.setattr(weights, "BLOCK", 1 << 30)
    monkeypatch.setattr(folder, "LARGE_BYTES", 1 << 30)
    whole = qcompile.compile(model, "x86", x, "fast", tmp_path / "memory")
    assert not opened
    one, two = (json.loads((a.folder / "manifest.json").read_text()) for a in (small, whole))
    assert one["files"] == two["files"]


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("most", [600, 3000])
def test_a_message_in_parts_is_the_message(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "LARGE_BYTES", most)
    model = crossing()
    model.metadata_props.add(key="k", value="v")
    model.functions.add(name="f", domain="d")
    model.graph.doc_string = "between"
    whole = model.SerializeToString(deterministic=True)
    light = onnx.ModelProto()
    light.CopyFrom(model)
    large: dict[str, ir.TensorProtocol] = {}
    for tensor in light.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.nbytes >= most:
            large[tensor.name] = weights.kept(array, tensor.name)
            tensor.CopyFrom(weights.named(tensor.name, large[tensor.name]))
    assert len(large) == (5 if most == 600 else 0)
    assert b"".join(weights.streamed(light, large)) == whole
    monkeypatch.setattr(weights, "MAX_BYTES", len(whole))
    next(weights.streamed(light, large))
    monkeypatch.setattr(weights, "MAX_BYTES", len(whole) - 1)
    with pytest.raises(Unsupported, match="no message of ONNX may have more"):
        next(weights.streamed(light, large))


def placed(home: Path, size: int, length: int | None = None) -> Path:
    """A Gemm whose weights are a file of zeros without blocks on the disk."""
    home.mkdir()
    with (home / "w.data").open("wb") as file:
        file.truncate(size if length is None else length)
    rows = size // 4 // 1024
    w = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[rows, 1024])
    w.data_location = TensorProto.EXTERNAL
    w.external_data.add(key="location", value="w.data")
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w"], ["y"], "fc", transB=1)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1024])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [w],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (home / "m.onnx").write_bytes(model.SerializeToString())
    return home / "m.onnx"


def test_three_gigabytes_are_opened_in_little_memory(tmp_path: Path) -> None:
    path = placed(tmp_path / "m", 3 << 30)
    program = (
        "import sys\n"
        "from qcompile.onnx import frontend\n"
        "model = frontend.load(sys.argv[1])\n"
        "w = model.graph.initializers['w'].const_value\n"
        "assert w.nbytes == 3 << 30 and w.numpy()[-1, -1] == 0\n"
        "print(next(s for s in open('/proc/self/status') if s.startswith('VmHWM')).split()[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 1 << 20, "KiB"


def test_a_large_weight_stays_in_its_file(tmp_path: Path) -> None:
    path = placed(tmp_path / "m", 2 << 20)
    values = RNG.standard_normal((512, 1024)).astype(np.float32)
    (path.parent / "w.data").write_bytes(values.tobytes())
    (tensor,) = reader.read(path).graph.initializer
    assert not tensor.raw_data
    np.testing.assert_array_equal(weights.array(tensor), values)
    loaded = frontend.load(path, isolated=False).graph.initializers["w"].const_value
    assert loaded is not None
    np.testing.assert_array_equal(loaded.numpy(), values)


@pytest.mark.parametrize(
    ("length", "why"), [((2 << 20) - 4, "has 2097148 bytes"), ((2 << 20) + 4, "has 2097156 bytes")]
)
def test_a_large_weight_of_another_size(length: int, why: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=rf"{why}.*takes 2097152"):
        frontend.load(placed(tmp_path / "m", 2 << 20, length))


def test_no_room_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scratch.os, "pwrite", full)  # type: ignore[attr-defined]
    with pytest.raises(BadInput, match=r"No space left.*set TMPDIR"):
        weights.kept(np.zeros(weights.FILED_BYTES, np.int8), "w")
    with pytest.raises(BadInput, match=r"No space left.*set TMPDIR"):
        folder.Contents({"a": bytes(folder.LARGE_BYTES)})
    monkeypatch.setattr(scratch.tempfile, "tempdir", "/nowhere")  # type: ignore[attr-defined]
    with pytest.raises(BadInput, match=r"/nowhere.*set TMPDIR"):
        scratch.Scratch()


def test_a_file_that_changes_meanwhile(tmp_path: Path) -> None:
    path = placed(tmp_path / "m", 2 << 20)
    loaded = frontend.load(path, isolated=False).graph.initializers["w"].const_value
    assert loaded is not None
    loaded.numpy()
    data = path.parent / "w.data"
    data.write_bytes(bytes(2 << 20))
    with pytest.raises(BadInput, match="has changed since"):
        loaded.numpy()
    data.write_bytes(b"")
    with pytest.raises(BadInput, match="cannot be read any more"):
        loaded.numpy()


def test_a_forked_process_writes_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "FILED_BYTES", 1000)
    before = weights.kept(np.full(5000, 1, np.int8), "before")
    child = os.fork()
    mine = weights.kept(np.full(5000, 2 if child else 3, np.int8), "mine")
    same = bool((mine.numpy() == (2 if child else 3)).all() and (before.numpy() == 1).all())
    if not child:
        os._exit(0 if same else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert same
    assert (mine.numpy() == 2).all()


def test_threads_share_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "FILED_BYTES", 1000)

    def work(seed: int) -> bool:
        array = np.random.default_rng(seed).integers(-128, 128, 3000 + seed, np.int8)
        tensor = weights.kept(array, str(seed))
        return all(bool((tensor.numpy() == array).all()) for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(200)))


def test_asking_for_a_name_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = folder.Contents({"a": bytes(folder.LARGE_BYTES), "b": b""})
    monkeypatch.setattr(scratch.Scratch, "read", None)
    assert "a" in contents
    assert "c" not in contents
    assert list(contents) == ["a", "b"]


def test_many_weights_in_few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_latest", [])
    monkeypatch.setattr(scratch, "FULL_BYTES", 40_000)
    monkeypatch.setattr(weights, "FILED_BYTES", 1000)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    arrays = [RNG.integers(-128, 128, (50, 20 + i), np.int8) for i in range(40)]
    tensors = [weights.kept(a, f"w{i}") for i, a in enumerate(arrays)]
    for array, tensor in zip(arrays, tensors, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array)
    assert len(os.listdir("/proc/self/fd")) - before == 4
    del tensors, tensor
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("most", [1, 7, 50, 1 << 20])
def test_products_and_bounds_by_rows(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_BLOCK", most)
    monkeypatch.setattr(proof, "_BLOCK", most)
    w = RNG.integers(-128, 128, (9, 5), np.int8)
    w[:2] = -128
    b = RNG.integers(-(2**20), 2**20, 9, np.int32)
    for top in (127, 32767):
        x = RNG.integers(-top - 1, top + 1, (4, 5), np.int64).astype(np.int16)
        sums = [
            [sum(p * q for p, q in zip(r, c, strict=True)) for c in w.tolist()] for r in x.tolist()
        ]
        assert ops._exact_matmul(x, w).tolist() == sums
        bounds = [
            abs(c) + sum(map(abs, row)) * (top + 1)
            for row, c in zip(w.tolist(), b.tolist(), strict=True)
        ]
        assert proof.product_bound(w, b, -top - 1, top).tolist() == bounds
