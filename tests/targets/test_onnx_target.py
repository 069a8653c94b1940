"""The targets onnx and qdq: the file in the folder is what runs; one equals the graph, the other keeps its bounds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, parser

import qcompile
from qcompile import border
from qcompile import target as families
from qcompile.artifact import Artifact
from qcompile.errors import BadInput, ToolchainMissing, VerificationMismatch
from qcompile.ir import Graph
from qcompile.onnx import integer, links
from qcompile.onnx.links import Grid
from qcompile.target import ANYWHERE, FloatRunner, Placement
from qcompile.verbs import evaluate, reproduce
from tests.targets.test_families import data, network, same

RNG = np.random.default_rng


def model() -> bytes:
    """Two convolutions that meet, a table, a Concat, an average, a dense layer and a Softmax; two outputs."""
    rng = RNG(0)
    proto = parser.parse_model("""<ir_version: 10, opset_import: ["" : 21]>
        net (float[N,3,8,8] image) => (float[N,5] class, float[N,12,8,8] map) {
            c1 = Conv <pads = [1,1,1,1]> (image, w1, b1)
            r1 = Relu (c1)
            c2 = Conv <pads = [1,1,1,1]> (r1, w2, b2)
            c3 = Conv (r1, w3)
            met = Add (c2, c3)
            bent = Sigmoid (met)
            map = Concat <axis = 1> (bent, r1)
            mean = GlobalAveragePool (map)
            flat = Flatten (mean)
            dense = Gemm <transB = 1> (flat, w4, b4)
            class = Softmax <axis = -1> (dense)
        }""")
    shapes = {"w1": (6, 3, 3, 3), "b1": (6,), "w2": (6, 6, 3, 3), "b2": (6,), "w3": (6, 6, 1, 1), "w4": (5, 12),
              "b4": (5,)}  # fmt: skip
    proto.graph.initializer.extend(
        numpy_helper.from_array(rng.normal(0, 0.4, shape).astype(np.float32), name)
        for name, shape in shapes.items()
    )
    return proto.SerializeToString()


def images(count: int, seed: int = 1) -> NDArray[np.float32]:
    return RNG(seed).normal(0, 1, (count, 3, 8, 8)).astype(np.float32)


Compiled = Callable[..., Artifact]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Artifacts of the model above, each made once."""
    made: dict[str, Artifact] = {}

    def get(target: str, **options: object) -> Artifact:
        key = repr((target, sorted(options.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(target) / "out"
            made[key] = qcompile.compile(
                model(), target, images(48), "fast", folder, verify_samples=8, name="net", **options
            )
        return made[key]

    return get


def copied(artifact: Artifact, folder: Path) -> Artifact:
    shutil.copytree(artifact.folder, folder / "copy")
    return qcompile.load(folder / "copy")


def stock(file: Path, feeds: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
    """A file as any user runs it: from its path, all defaults."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


# --- onnx -----------------------------------------------------------------------------------------------------------


def test_the_product_is_one_file_of_the_graph_alone(tmp_path: Path) -> None:
    g, feeds = network(), data(9)
    made = families.get("onnx").lower(g, name="net", cpu="any", vectors=())
    assert list(made.files) == ["integer.onnx"]
    assert made.files == families.get("onnx").lower(g, name="net", cpu="any", vectors=()).files
    assert sum(layer.macs for layer in made.layers) == 12 * 12 * 8 * 27 + 3 * 3 * 16 * 72 + 10 * 144
    (tmp_path / "integer.onnx").write_bytes(made.files["integer.onnx"])
    values = {}
    golden = g.run(feeds, on_value=lambda v, x: values.update({v.name: x}))
    for sanitize in (False, True):
        runner = families.get("onnx").runner(tmp_path, g, name="net", cpu="any", sanitize=sanitize)
        assert same(runner.run(feeds), golden)
        traced = runner.trace(feeds)
        assert same(traced, {**golden, **values})
        assert traced.keys() >= made.stored.keys()
    assert same(stock(tmp_path / "integer.onnx", feeds), golden)


@pytest.mark.parametrize(
    "options",
    [{}, {"io_layout": "nhwc", "input_dtype": "uint8"}, {"input_dims": {"N": 3}}],
    ids=["plain", "nhwc-uint8", "batch-of-3"],
)
def test_an_artifact_is_verified_and_runs_its_file(
    compiled: Compiled, options: dict[str, object]
) -> None:
    artifact = compiled("onnx", **options)
    assert not list(artifact.folder.glob("*.[ch]"))
    verified = artifact.report["verification"]
    assert (verified["checked"], verified["mismatches"]) == (True, 0)
    assert verified["intermediates"] == len(artifact.graph.nodes)
    assert verified["sanitized"]
    # compared once, and said to be so under both names
    assert verified["onnx"] == {"samples": verified["samples"], "mismatches": 0}
    assert verified["samples"] >= 8
    assert verified["apart"] is None
    x = images(9, 2)
    given = {"image": np.moveaxis(x, 1, -1) if "io_layout" in options else x}
    assert artifact.verify(given, trace=9).ok
    codes = border.encode(artifact.graph, given)
    if artifact.graph.free_batch:
        expected = stock(artifact.folder / "integer.onnx", codes)
        assert same(artifact.run(given, raw=True), expected)
    assert same(artifact.run(given, raw=True), artifact.golden.run(given, raw=True))


def test_a_wrong_file_is_caught_where_it_goes_wrong(compiled: Compiled, tmp_path: Path) -> None:
    artifact = copied(compiled("onnx"), tmp_path)
    file = artifact.folder / "integer.onnx"
    proto = onnx.load(file)
    first = next(n for n in proto.graph.node if n.op_type.startswith("Conv"))
    bias = next(t for t in proto.graph.initializer if t.name == first.input[2])
    numbers = numpy_helper.to_array(bias).copy()
    numbers.ravel()[0] += 1 << 20
    bias.CopyFrom(numpy_helper.from_array(numbers, bias.name))
    onnx.save(proto, file)
    found = artifact.verify({"image": images(2)})
    assert not found.ok
    assert found.first is not None
    assert found.first.value.startswith("r1:acc")


def test_no_float_is_in_the_integer_file(compiled: Compiled) -> None:
    certificate = compiled("onnx").certify()
    assert certificate is not None
    assert certificate.clean
    assert "integer.onnx" in certificate.basis
    assert compiled("qdq").certify() is None


def _constant(proto: onnx.ModelProto) -> None:
    proto.graph.initializer.append(numpy_helper.from_array(np.float32([1]), "planted"))


def _cast(proto: onnx.ModelProto) -> None:
    proto.graph.node.append(helper.make_node("Cast", ["class"], ["planted"], to=TensorProto.FLOAT))


def _inside(proto: onnx.ModelProto) -> None:
    function = next(f for f in proto.functions if f.name.startswith("Conv"))
    function.node.append(helper.make_node("DequantizeLinear", ["y", "y"], ["planted"]))


def _called(proto: onnx.ModelProto) -> None:
    node = next(n for n in proto.graph.node for a in n.attribute if a.name == "to")
    next(a for a in node.attribute if a.name == "to").i = TensorProto.FLOAT16


def _value(proto: onnx.ModelProto) -> None:
    proto.graph.node.append(helper.make_node("Constant", [], ["planted"], value_float=0.5))


def _border(proto: onnx.ModelProto) -> None:
    proto.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE


@pytest.mark.parametrize("plant", [_constant, _cast, _inside, _called, _value, _border])
def test_every_kind_of_float_is_found(
    tmp_path: Path, plant: Callable[[onnx.ModelProto], None], compiled: Compiled
) -> None:
    proto = onnx.load(compiled("onnx").folder / "integer.onnx")
    plant(proto)
    onnx.save(proto, tmp_path / "integer.onnx")
    found = families.get("onnx").certify(tmp_path, name="net", cpu="any")
    assert len(found.findings) == 1
    assert not found.clean


# --- qdq ------------------------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, object]] = {
    "int8": {},
    "nhwc-uint8": {"io_layout": "nhwc", "input_dtype": "uint8"},
    "int4": {"weights": "int4", "output_dtype": "int32"},
    "batch-of-3": {"input_dims": {"N": 3}},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_layer_keeps_its_bound_and_the_report_says_float(
    compiled: Compiled, way: str
) -> None:
    artifact = compiled("qdq", **WAYS[way])
    found = artifact.verify(
        {"image": np.moveaxis(images(9, 3), 1, -1) if way == "nhwc-uint8" else images(9, 3)}
    )
    assert found.ok
    assert found.apart is not None
    assert found.apart.layers <= found.apart.allowed
    assert 0.98 < found.apart.equal <= 1
    # conv 1, the sum, table, concat, average, dense, softmax; parts of the concat are rounded in it
    assert found.intermediates >= 7
    runner = artifact.runner()
    assert isinstance(runner, FloatRunner)
    assert {"r1", "met", "bent", "map", "dense"} <= runner.slack.keys()
    assert all(runner.slack[v] == 1 for v in ("r1", "met", "bent"))
    report = artifact.report
    assert report["verification"]["apart"]["layers"] <= report["verification"]["apart"]["allowed"]
    assert not report["verification"]["sanitized"]
    assert not report["certificates"]["no_float"]["checked"]
    page = (artifact.folder / "report.html").read_text()
    assert "floating-point arithmetic, not equal bit for bit" in page
    assert "are equal bit for bit" not in page


def test_what_runs_is_the_file_as_it_is_written(compiled: Compiled) -> None:
    """Against a session of the test's own: real numbers out, as the file gives them."""
    artifact = compiled("qdq")
    x = images(11, 4)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        str(artifact.folder / "qdq.onnx"), options, providers=["CPUExecutionProvider"]
    )
    names = [port.name for port, _ in artifact.graph.outputs]
    expected = dict(zip(names, session.run(names, {"image": x}), strict=True))
    got = artifact.run({"image": x})
    for port, _ in artifact.graph.outputs:
        np.testing.assert_allclose(
            got[port.name], expected[port.name], rtol=0, atol=port.scale * 1e-3
        )
    codes = border.encode(artifact.graph, {"image": x})
    traced = artifact.runner().trace(codes)
    values = {}
    artifact.graph.run(codes, on_value=lambda v, a: values.update({v.name: a}))
    assert np.abs(traced["r1"].astype(int) - values["r1"].astype(int)).max() <= 1
    assert traced["r1"].shape == values["r1"].shape
    assert np.array_equal(np.moveaxis(traced["map"], -1, 1), artifact.runner().run(codes)["map"])


def test_eval_and_reproduce_work_as_on_any_other(compiled: Compiled, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", image=images(16, 5))
    for target in ("onnx", "qdq"):
        artifact = compiled(target)
        rows = evaluate(artifact.folder, str(tmp_path / "data.npz"), model=model())["outputs"]
        assert [row["name"] for row in rows] == ["class", "map"]
        assert all(row["sqnr_db"] > 15 for row in rows)
        assert reproduce(artifact.folder / "manifest.json", model=model()).identical
    for name in ("integer.onnx", "qdq.onnx", "integer.qir"):
        one, other = (compiled(t).folder / name for t in ("onnx", "qdq"))
        assert one.read_bytes() == other.read_bytes()


def damaged(artifact: Artifact, change: Callable[[onnx.ModelProto], None]) -> Artifact:
    proto = onnx.load(artifact.folder / "qdq.onnx")
    change(proto)
    onnx.save(proto, artifact.folder / "qdq.onnx")
    return artifact


def test_a_layer_beyond_its_bound_is_found(compiled: Compiled, tmp_path: Path) -> None:
    """Two steps in one channel of one bias: the layer is named, and those behind it are not blamed."""

    def change(proto: onnx.ModelProto) -> None:
        stored = {t.name: t for t in proto.graph.initializer}
        maker = {n.output[0]: n for n in proto.graph.node}
        conv = next(n for n in proto.graph.node if n.op_type == "Conv")
        tensor = stored[maker[conv.input[2]].input[0]]
        scale = numpy_helper.to_array(stored[maker[conv.input[2]].input[1]])
        step = next(g.grid.scale for g in links.read(proto).layers if g.value == "r1")
        codes = numpy_helper.to_array(tensor).copy()
        codes[0] += int(2.5 * step / scale[0])
        tensor.CopyFrom(numpy_helper.from_array(codes, tensor.name))

    artifact = damaged(copied(compiled("qdq"), tmp_path), change)
    found = artifact.verify({"image": images(3)})
    assert not found.ok
    assert found.first is not None
    assert found.first.value == "r1"
    assert abs(found.first.got - found.first.expected) in (2, 3)
    assert found.mismatches <= 3 * 8 * 8


def _without(proto: onnx.ModelProto) -> None:
    del proto.metadata_props[:]


def _said(text: str) -> Callable[[onnx.ModelProto], None]:
    def change(proto: onnx.ModelProto) -> None:
        (prop,) = (p for p in proto.metadata_props if p.key == links.KEY)
        said = json.loads(prop.value)
        match text:
            case "axes":
                said["layers"][0]["grid"]["axes"] = [0, 0, 1, 2]
            case "scale":
                said["layers"][0]["grid"]["scale"] = -1.0
            case "value":
                said["layers"][0]["value"] = "nobody"
            case "slack":
                said["layers"][0]["slack"] = 1 << 40
            case "ports":
                said["outputs"] = []
            case "tensor":
                said["layers"][0]["grid"]["tensor"] = "nobody"
        prop.value = json.dumps(said) if text != "json" else prop.value[:-3]

    return change


@pytest.mark.parametrize(
    "change",
    [_without, *map(_said, ("json", "axes", "scale", "value", "slack", "ports", "tensor"))],
    ids=["nothing", "json", "axes", "scale", "value", "slack", "ports", "tensor"],
)
def test_a_file_that_says_what_cannot_be_is_refused(
    compiled: Compiled, tmp_path: Path, change: Callable[[onnx.ModelProto], None]
) -> None:
    artifact = damaged(copied(compiled("qdq"), tmp_path), change)
    with pytest.raises(BadInput, match=r"qdq\.onnx"):
        artifact.verify({"image": images(1)})


def test_nothing_said_is_nothing_verified(compiled: Compiled, tmp_path: Path) -> None:
    def change(proto: onnx.ModelProto) -> None:
        (prop,) = (p for p in proto.metadata_props if p.key == links.KEY)
        prop.value = json.dumps(json.loads(prop.value) | {"layers": []})

    assert not damaged(copied(compiled("qdq"), tmp_path), change).verify({"image": images(1)}).ok


@pytest.mark.parametrize("target", ["onnx", "qdq"])
@pytest.mark.parametrize("content", [None, b"", b"\x08\x07garbage", b"\x00" * 64])
def test_a_broken_folder_is_refused_in_a_sentence(
    compiled: Compiled, tmp_path: Path, target: str, content: bytes | None
) -> None:
    artifact = copied(compiled(target), tmp_path)
    file = artifact.folder / {"onnx": "integer.onnx", "qdq": "qdq.onnx"}[target]
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BadInput, match=file.name):
        artifact.run({"image": images(1)})


@pytest.mark.parametrize("target", ["onnx", "qdq"])
def test_a_file_that_reaches_for_others_is_refused(
    compiled: Compiled, tmp_path: Path, target: str
) -> None:
    artifact = copied(compiled(target), tmp_path)
    file = artifact.folder / {"onnx": "integer.onnx", "qdq": "qdq.onnx"}[target]
    proto = onnx.load(file)
    (tmp_path / "secret").write_bytes(bytes(4096))
    tensor = max(proto.graph.initializer, key=lambda t: len(t.raw_data))
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    file.write_bytes(proto.SerializeToString())
    with pytest.raises(BadInput, match="outside the model's folder"):
        artifact.run({"image": images(1)})


def test_a_file_of_another_network_is_refused(compiled: Compiled, tmp_path: Path) -> None:
    artifact = copied(compiled("onnx"), tmp_path)
    other = Graph("other")
    kind = artifact.graph.inputs[0][1].type
    x = other.add_input(artifact.graph.inputs[0][0], kind)
    for port, _ in artifact.graph.outputs:
        other.add_output(port, x)
    (artifact.folder / "integer.onnx").write_bytes(integer.export(other).SerializeToString())
    with pytest.raises(VerificationMismatch, match=r"integer\.onnx gives int8"):
        artifact.run({"image": images(1)})


# --- both -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["onnx", "qdq"])
def test_what_does_not_apply_is_refused(tmp_path: Path, target: str) -> None:
    chosen = families.get(target)
    with pytest.raises(BadInput, match=f"{target} knows no cpu 'z80'"):
        chosen.lower(network(), name="net", cpu="z80", vectors=())
    for place in (Placement(weights_section=".x"), Placement(max_ram=1), Placement(max_flash=1)):
        with pytest.raises(BadInput, match=f"is not for {target}: onnxruntime places the data"):
            chosen.lower(network(), name="net", cpu="any", vectors=(), placement=place)
    assert chosen.lower(network(), name="net", cpu="any", vectors=(), placement=ANYWHERE).layers
    assert chosen.footprint(tmp_path, name="net", cpu="any") is None
    assert chosen.missing() == ()


def test_what_cannot_be_had_is_said(compiled: Compiled) -> None:
    for target in ("onnx", "qdq"):
        with pytest.raises(ToolchainMissing, match="counts no instructions"):
            compiled(target).runner().count({})
    with pytest.raises(ToolchainMissing, match="no build with sanitizers"):
        compiled("qdq").runner(sanitize=True)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.permutations([0, 1, 2, 3]),
    st.floats(2.0**-30, 2.0**30, width=32),
    st.integers(-128, 127),
    st.integers(0, 1 << 30),
)
def test_codes_go_through_real_numbers_and_back(
    axes: list[int], scale: float, zero: int, seed: int
) -> None:
    grid = Grid("x", tuple(axes), scale, zero, -128, 127)
    shape = tuple(RNG(seed).integers(1, 5, 4))
    codes = RNG(seed).integers(-128, 128, shape).astype(np.int8)
    real = grid.real(codes)
    assert real.dtype == np.float32
    assert real.transpose(axes).shape == codes.shape
    assert np.array_equal(grid.codes(real), codes)
    assert np.array_equal(grid.codes(real * np.float32(1e6)) == 127, codes > zero)
    with pytest.raises(ValueError, match="not finite"):
        grid.codes(np.full_like(real, np.inf))
