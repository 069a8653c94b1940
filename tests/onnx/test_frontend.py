from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.helper import make_node, make_tensor_value_info

from qcompile import job
from qcompile.errors import BadInput, QcompileError, Unsupported
from qcompile.onnx import frontend, reader, weights

ZOO = Path(os.environ.get("QCOMPILE_ZOO", Path(__file__).parents[3] / "shared" / "zoo"))
Shape = Sequence[int | str | None]


def build(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Shape],
    weights: Mapping[str, Any] | None = None,
    outputs: Mapping[str, Shape] | None = None,
    opset: int = 21,
    functions: Sequence[onnx.FunctionProto] = (),
    domains: Sequence[str] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "test",
        [make_tensor_value_info(n, 1, s) for n, s in inputs.items()],
        [make_tensor_value_info(n, 1, s) for n, s in (outputs or {"y": ["N", None]}).items()],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in (weights or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10, functions=list(functions))


def load(model: onnx.ModelProto, **options: Any) -> ir.Model:
    return frontend.load(model.SerializeToString(), isolated=False, **options)


def execute(model: onnx.ModelProto, x: NDArray[np.float32]) -> list[NDArray[np.generic]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {session.get_inputs()[0].name: x})


def keeps(original: onnx.ModelProto, shape: Sequence[int], **options: Any) -> list[str]:
    """The operators left, once the outputs equal those of the original."""
    model = load(original, **options)
    x = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    for want, got in zip(execute(original, x), execute(ir.to_proto(model), x), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    return [n.op_type for n in model.graph]


RELU = build([make_node("Relu", ["x"], ["y"])], {"x": ["N", 4]})


# --- files ---------------------------------------------------------------------------------------


def test_bytes_and_path_give_the_same_graph(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(RELU.SerializeToString())
    texts = {
        ir.to_proto(frontend.load(source, isolated=False)).SerializeToString()
        for source in (path, str(path), path.read_bytes())
    }
    assert len(texts) == 1


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x08\x0a", RELU.SerializeToString()[:-9]])
def test_garbage_and_truncated_files(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(data)
    for source in (data, path):
        with pytest.raises(BadInput):
            frontend.load(source, isolated=False)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.onnx"
    with path.open("wb") as file:
        file.truncate(2**31)
    with pytest.raises(BadInput, match="larger than 2147483647 bytes"):
        frontend.load(path)


def test_bytes_that_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_MODEL_BYTES", 10)
    with pytest.raises(BadInput, match="larger than 10 bytes"):
        frontend.load(RELU.SerializeToString())


def test_what_is_no_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for source in (tmp_path, pipe, tmp_path / "missing.onnx", "nul\0byte.onnx"):
        with pytest.raises(BadInput, match=r"not a file|does not exist|cannot be read"):
            frontend.load(source)


def external(location: str, **entries: str) -> onnx.ModelProto:
    model = build([make_node("Add", ["x", "w"], ["y"])], {"x": ["N", 4]}, {"w": np.zeros(4, "f4")})
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return model


def place(folder: Path, model: onnx.ModelProto) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


WEIGHTS = np.arange(4, dtype=np.float32)


def test_external_data_inside_the_folder(tmp_path: Path) -> None:
    path = place(tmp_path / "m", external("data/w.bin", offset="8", length="16"))
    (tmp_path / "m" / "data").mkdir()
    (tmp_path / "m" / "data" / "w.bin").write_bytes(b"12345678" + WEIGHTS.tobytes() + b"more")
    tensor = frontend.load(path).graph.initializers["w"].const_value
    assert tensor is not None
    assert tensor.numpy().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "location", ["../secret", "sub/../../secret", "ABSOLUTE", "link", "up/secret"]
)
def test_external_data_outside_the_folder(location: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(WEIGHTS.tobytes())
    folder = tmp_path / "m"
    path = place(folder, external(str(tmp_path / "secret") if location == "ABSOLUTE" else location))
    (folder / "sub").mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "up").symlink_to(tmp_path)
    with pytest.raises(BadInput, match="outside the model's folder"):
        frontend.load(path)


@pytest.mark.parametrize(
    ("location", "entries"),
    [
        ("missing", {}),
        ("", {}),
        ("a\0b", {}),
        ("w", {"offset": "-1"}),
        ("w", {"offset": "4"}),
        ("w", {"length": "17"}),
        ("w", {"length": "8"}),
        ("w", {"offset": "9" * 30}),
        ("w", {"length": "many"}),
    ],
)
def test_external_data_that_is_not_there(
    location: str, entries: dict[str, str], tmp_path: Path
) -> None:
    path = place(tmp_path / "m", external(location, **entries))
    (tmp_path / "m" / "w").write_bytes(WEIGHTS.tobytes())
    with pytest.raises(BadInput):
        frontend.load(path, isolated=False)


def test_external_data_of_a_model_given_as_bytes() -> None:
    with pytest.raises(BadInput, match="given as bytes"):
        frontend.load(external("w").SerializeToString())


def test_external_data_counts_towards_the_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = place(tmp_path / "m", external("w"))
    (tmp_path / "m" / "w").write_bytes(WEIGHTS.tobytes())
    monkeypatch.setattr(reader, "MAX_MODEL_BYTES", path.stat().st_size + 15)
    with pytest.raises(BadInput, match="larger than"):
        frontend.load(path)


def test_the_digest_covers_external_data(tmp_path: Path) -> None:
    model = external("b.bin", length="16")
    second = model.graph.initializer.add()
    second.CopyFrom(model.graph.initializer[0])
    second.name, second.external_data[0].value = "v", "a.bin"
    path = place(tmp_path, model)
    (tmp_path / "a.bin").write_bytes(bytes(16))
    (tmp_path / "b.bin").write_bytes(WEIGHTS.tobytes())
    want = hashlib.sha256(path.read_bytes() + bytes(16) + WEIGHTS.tobytes())
    assert job.sha256_of(path) == want.hexdigest()
    assert job.sha256_of(model.SerializeToString()) != want.hexdigest()


def test_external_data_in_attributes(tmp_path: Path) -> None:
    tensor = external("../secret").graph.initializer[0]
    nodes = [make_node("Constant", [], ["w"], value=tensor), make_node("Add", ["x", "w"], ["y"])]
    path = place(tmp_path / "m", build(nodes, {"x": ["N", 4]}))
    (tmp_path / "secret").write_bytes(WEIGHTS.tobytes())
    with pytest.raises(BadInput, match="outside the model's folder"):
        frontend.load(path)


def test_external_data_in_what_functions_take_by_default(tmp_path: Path) -> None:
    tensor = external("../secret").graph.initializer[0]
    model = build([make_node("Relu", ["x"], ["y"])], {"x": ["N", 4]})
    function = model.functions.add(name="f", domain="d")
    function.attribute_proto.append(onnx.helper.make_attribute("w", tensor))
    path = place(tmp_path / "m", model)
    (tmp_path / "secret").write_bytes(WEIGHTS.tobytes())
    with pytest.raises(BadInput, match="outside the model's folder"):
        frontend.load(path)


# --- what is refused -----------------------------------------------------------------------------


def test_custom_operators() -> None:
    for domain in ("com.microsoft", "ai.onnx.ml", "mine"):
        node = make_node("Gelu", ["x"], ["y"], name="layer/act", domain=domain)
        with pytest.raises(Unsupported, match=f"'layer/act' is 'Gelu' of domain '{domain}'"):
            load(build([node], {"x": ["N", 4]}, domains=[domain]))


def test_names_in_messages_are_quoted() -> None:
    node = make_node("Gelu", ["x"], ["y"], name="\x1b[2J*/\n#include", domain="mine")
    with pytest.raises(Unsupported) as caught:
        load(build([node], {"x": ["N", 4]}, domains=["mine"]))
    assert str(caught.value).isprintable()


def test_sequences() -> None:
    nodes = [
        make_node("SequenceConstruct", ["x", "x"], ["s"], name="pair"),
        make_node("ConcatFromSequence", ["s"], ["y"], axis=0),
    ]
    with pytest.raises(Unsupported, match="'pair' is a SequenceConstruct"):
        load(build(nodes, {"x": ["N", 4]}))


def test_inputs_that_are_not_float_tensors() -> None:
    for kind, word in ((8, "string"), (9, "bool"), (99, "unknown type 99")):
        model = build([make_node("Cast", ["x"], ["y"], to=1)], {"x": ["N", 4]})
        model.graph.input[0].type.tensor_type.elem_type = kind
        with pytest.raises(Unsupported, match=f"'x' is a tensor of .*{word}"):
            load(model)
    model = build([make_node("SequenceAt", ["x", "i"], ["y"])], {"x": [1]}, {"i": np.int64(0)})
    element = helper.make_tensor_type_proto(1, [2])
    model.graph.input[0].type.CopyFrom(helper.make_sequence_type_proto(element))
    with pytest.raises(Unsupported):
        load(model)


@pytest.mark.parametrize("kind", [2, 3, 5, 6, 7, 10, 11, 12, 13, 16])
def test_other_numbers_become_float32(kind: int) -> None:
    """Input, constant and output of one type; the sum has float32 inputs and no Cast."""
    made = helper.make_graph(
        [make_node("Cast", ["x"], ["c"], to=1), make_node("Add", ["c", "w"], ["y"])]
        if kind not in (1, 10, 11, 16)
        else [make_node("Add", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", kind, ["N", 3])],
        [helper.make_tensor_value_info("y", 1 if kind not in (10, 11, 16) else kind, ["N", 3])],
        [helper.make_tensor("w", 1 if kind not in (10, 11, 16) else kind, [3], [1.0, 2.0, 4.0])],
    )
    loaded = load(helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)]))
    assert [n.op_type for n in loaded.graph] == ["Add"]
    ends = (*loaded.graph.inputs, *loaded.graph.outputs, *loaded.graph.initializers.values())
    assert {v.dtype for v in ends} == {ir.DataType.FLOAT}


def test_integers_that_wrap_around_are_refused() -> None:
    made = helper.make_graph(
        [make_node("Cast", ["x"], ["y"], to=3, name="it")],
        "g",
        [helper.make_tensor_value_info("x", 6, ["N", 3])],
        [helper.make_tensor_value_info("y", 3, ["N", 3])],
    )
    with pytest.raises(Unsupported, match=r"'it'.*integers"):
        load(helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)]))


def test_integers_are_divided_towards_zero() -> None:
    made = helper.make_graph(
        [make_node("Div", ["x", "z"], ["y"], name="it")],
        "g",
        [helper.make_tensor_value_info(n, 6, ["N", 3]) for n in "xz"],
        [helper.make_tensor_value_info("y", 6, ["N", 3])],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    x, z = np.array([[7, -7, 8]], np.int32), np.array([[2, 2, -3]], np.int32)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (wanted,) = session.run(None, {"x": x, "z": z})
    session = onnxruntime.InferenceSession(ir.to_proto(load(model)).SerializeToString())
    (got,) = session.run(None, {"x": x.astype(np.float32), "z": z.astype(np.float32)})
    np.testing.assert_array_equal(got, wanted)


def test_an_input_without_a_shape() -> None:
    model = onnx.ModelProto()
    model.CopyFrom(RELU)
    model.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(BadInput, match="'x' has no shape"):
        load(model)


@pytest.mark.parametrize("missing", ["input", "output"])
def test_a_model_without_inputs_or_outputs(missing: str) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(RELU)
    model.graph.ClearField(missing)
    with pytest.raises(BadInput, match=f"no {missing}s"):
        load(model)


def test_training_mode() -> None:
    weights = {k: np.ones(4, "f4") for k in "gbmv"}
    outputs = {"y": ["N", 4]}
    norm = make_node(
        "BatchNormalization", ["x", *"gbmv"], ["y", "m2", "v2"], name="bn", training_mode=1
    )
    with pytest.raises(Unsupported, match=r"'bn'.*training mode"):
        load(build([norm], {"x": ["N", 4]}, weights, outputs))
    drop = make_node("Dropout", ["x", "r", "t"], ["y"], name="drop")
    flags = {"r": np.float32(0.5), "t": np.bool_(True)}
    with pytest.raises(Unsupported, match=r"'drop'.*training mode"):
        load(build([drop], {"x": ["N", 4]}, flags))


def test_loops() -> None:
    body = helper.make_graph(
        [make_node("Not", ["c"], ["d"]), make_node("Relu", ["v"], ["w"])],
        "body",
        [
            make_tensor_value_info(n, t, d)
            for n, t, d in (("i", 7, []), ("c", 9, []), ("v", 1, [2, 4]))
        ],
        [make_tensor_value_info("d", 9, []), make_tensor_value_info("w", 1, [2, 4])],
    )
    node = make_node("Loop", ["n", "", "x"], ["y"], body=body, name="again")
    with pytest.raises(Unsupported, match=r"'again' .Loop. branches or loops"):
        load(build([node], {"x": [2, 4]}, {"n": np.int64(3)}))


def test_inconsistent_shapes_and_types() -> None:
    weights = {"w": np.zeros((5, 3), "f4"), "i": np.zeros(4, "i8")}
    for node in (make_node("MatMul", ["x", "w"], ["y"]), make_node("Add", ["x", "i"], ["y"])):
        with pytest.raises(BadInput, match="shapes or types"):
            load(build([node], {"x": ["N", 4]}, weights))


@pytest.mark.parametrize(
    "node",
    [
        make_node("NoSuchOperator", ["x"], ["y"]),
        make_node("Relu", ["nowhere"], ["y"]),
        make_node("Relu", ["x", "x"], ["y"]),
        make_node("Relu", ["y"], ["y"]),
        make_node("Relu", ["x"], ["y"], alpha=1.0),
    ],
)
def test_invalid_nodes(node: onnx.NodeProto) -> None:
    with pytest.raises(BadInput):
        load(build([node], {"x": ["N", 4]}))


def test_an_empty_tensor() -> None:
    node = make_node("MaxPool", ["x"], ["y"], kernel_shape=[5, 5], name="pool")
    with pytest.raises(BadInput, match="'pool'"):
        load(build([node], {"x": ["N", 3, 4, 4]}))


def test_sparse_weights() -> None:
    model = onnx.ModelProto()
    model.CopyFrom(build([make_node("Add", ["x", "w"], ["y"])], {"x": ["N", 4]}))
    values = helper.make_tensor("w", 1, [1], [1.0])
    sparse = helper.make_sparse_tensor(values, helper.make_tensor("i", 7, [1], [0]), [4])
    model.graph.sparse_initializer.append(sparse)
    with pytest.raises(Unsupported, match="sparse"):
        load(model)


def test_text_that_is_not_utf8() -> None:
    data = RELU.SerializeToString().replace(b"Relu", b"Re\xff\xfe")
    with pytest.raises(BadInput, match="not text"):
        frontend.load(data, isolated=False)


def test_a_value_known_only_at_run_time() -> None:
    nodes = [
        make_node("NonZero", ["x"], ["i"], name="where"),
        make_node("Cast", ["i"], ["y"], to=1),
    ]
    with pytest.raises(Unsupported, match=r"'where'.*only known at run time"):
        frontend.load(build(nodes, {"x": ["N", 4]}).SerializeToString())


# --- expansion -----------------------------------------------------------------------------------


def doubling(levels: int) -> onnx.ModelProto:
    """Functions of which each calls the one before twice."""
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("f", 1)]
    relu = [make_node("Relu", ["a"], ["b"])]
    functions = [helper.make_function("f", "F0", ["a"], ["b"], relu, imports)]
    for i in range(1, levels):
        calls = [
            make_node(f"F{i - 1}", ["a"], ["t"], domain="f"),
            make_node(f"F{i - 1}", ["t"], ["b"], domain="f"),
        ]
        functions.append(helper.make_function("f", f"F{i}", ["a"], ["b"], calls, imports))
    call = make_node(f"F{levels - 1}", ["x"], ["y"], domain="f")
    return build([call], {"x": ["N", 4]}, functions=functions, domains=["f"])


def test_functions_are_expanded() -> None:
    assert keeps(doubling(3), [2, 4]) == ["Relu"] * 4


def test_functions_that_expand_without_end() -> None:
    with pytest.raises(BadInput, match="17179869184 nodes"):
        load(doubling(35))
    with pytest.raises(BadInput, match="nested more than 100 deep"):
        load(doubling(120))
    model = doubling(2)
    model.functions[0].node[0].op_type = "F1"
    model.functions[0].node[0].domain = "f"
    with pytest.raises(BadInput, match="calls itself"):
        load(model)


@pytest.mark.parametrize("kind", ["ConstantOfShape", "Expand", "Tile", "Range", "Concat"])
def test_constants_that_would_grow_without_end_are_not_folded(kind: str) -> None:
    huge = np.array([2**20, 2**20], np.int64)
    nodes = {
        "ConstantOfShape": [make_node("ConstantOfShape", ["huge"], ["c"])],
        "Expand": [make_node("Expand", ["one", "huge"], ["c"])],
        "Tile": [make_node("Tile", ["one", "huge"], ["c"])],
        "Range": [make_node("Range", ["zero", "end", "step"], ["c"])],
        "Concat": [
            make_node("Concat", [f"c{i}" if i else "one"] * 2, [f"c{i + 1}"], axis=0)
            for i in range(45)
        ],
    }[kind]
    nodes[-1].output[0] = "c"
    nodes += [make_node("ReduceMax", ["c"], ["m"], keepdims=0), make_node("Add", ["x", "m"], ["y"])]
    weights = {
        "huge": huge,
        "one": np.ones((1, 1), "f4"),
        "zero": np.float32(0),
        "end": np.float32(1e12),
        "step": np.float32(1),
    }
    model = load(build(nodes, {"x": ["N", 4]}, weights))
    assert nodes[-3].op_type in [n.op_type for n in model.graph]


def test_a_model_that_aborts_the_library_is_bad_input() -> None:
    """A window larger than its input makes a negative size, over which Slice inference falls."""
    nodes = [
        make_node("Relu", ["x"], ["r"]),
        make_node("MaxPool", ["r"], ["p"], kernel_shape=[17, 2]),
        make_node("Slice", ["p", "s", "e", "a"], ["y"]),
    ]
    weights = {"s": np.array([1]), "e": np.array([-1]), "a": np.array([2])}
    model = build(nodes, {"x": ["N", 3, 4, 4]}, weights)
    with pytest.raises(BadInput):
        frontend.load(model.SerializeToString())


def test_the_child_tells_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build([make_node("Relu", ["x", "x"], ["y"], name="odd")], {"x": ["N", 4]})
    with pytest.raises(BadInput, match="not valid ONNX"):
        frontend.load(model.SerializeToString())
    monkeypatch.setattr(frontend, "MAX_SECONDS", 0)
    with pytest.raises(BadInput, match="after 0 seconds"):
        frontend.load(RELU.SerializeToString())


@settings(deadline=None, derandomize=True, max_examples=150)
@given(data=st.data())
def test_damaged_files_are_refused_or_read_but_never_crash_the_reader(data: st.DataObject) -> None:
    content = bytearray(doubling(3).SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(QcompileError):
        frontend.load(bytes(content), warn=lambda sentence: None, isolated=False)


# --- dimensions ----------------------------------------------------------------------------------


def test_the_batch_stays_free() -> None:
    model = load(RELU)
    assert [str(d) for d in model.graph.inputs[0].shape or ()] == ["N", "4"]
    assert [str(d) for d in model.graph.outputs[0].shape or ()] == ["N", "4"]


def test_dimensions_are_set_by_name() -> None:
    model = build([make_node("Relu", ["x"], ["y"])], {"x": ["N", 3, "H", "W"]})
    with pytest.raises(BadInput, match=r"axis 2 of input 'x'.*--input-dim H=VALUE"):
        load(model)
    loaded = load(model, input_dims={"H": 5, "W": 6, "N": 2})
    assert (loaded.graph.outputs[0].shape or ir.Shape(())).numpy() == (2, 3, 5, 6)


def test_a_dimension_the_model_lacks_is_a_warning() -> None:
    warned: list[str] = []
    load(RELU, input_dims={"M": 1}, warn=warned.append)
    (sentence,) = warned
    assert "M=1" in sentence
    assert "'N'" in sentence
    with pytest.warns(UserWarning, match="M=1"):
        load(RELU, input_dims={"M": 1})


def test_dimensions_without_a_name_get_one() -> None:
    model = build([make_node("Relu", ["x"], ["y"])], {"x": [None, None]})
    with pytest.raises(BadInput, match="--input-dim x_1=VALUE"):
        load(model)
    loaded = load(model, input_dims={"x_1": 7})
    assert [str(d) for d in loaded.graph.outputs[0].shape or ()] == ["N", "7"]


def test_two_batches_are_refused() -> None:
    nodes = [make_node("Concat", ["x", "z"], ["y"], axis=0)]
    model = build(nodes, {"x": ["N", 4], "z": ["M", 4]})
    with pytest.raises(BadInput, match="'M', 'N'"):
        load(model)
    assert len(load(model, input_dims={"M": 2, "N": 2}).graph) == 1


@pytest.mark.parametrize("size", [0, -3])
def test_sizes_below_one(size: int) -> None:
    with pytest.raises(BadInput, match="at least 1"):
        load(RELU, input_dims={"N": size})
    with pytest.raises(BadInput, match=f"has size {size}"):
        load(build([make_node("Relu", ["x"], ["y"])], {"x": [1, size]}))


def test_only_the_batch_itself_leaves_the_leading_axis() -> None:
    turn = make_node("Transpose", ["x"], ["t"], perm=[1, 0], name="turn")
    model = build([turn], {"x": ["N", 4]}, outputs={"t": [4, "N"]})
    shape = load(model).graph.outputs[0].shape
    assert shape is not None
    assert [str(n) for n in shape] == ["4", "N"]
    assert keeps(model, [3, 4], input_dims={"N": 3}) == ["Transpose"]
    twice = make_node("Concat", ["t", "t"], ["y"], axis=1, name="double")
    with pytest.raises(Unsupported, match=r"'double'.*--input-dim"):
        load(build([turn, twice], {"x": ["N", 4]}, outputs={"y": [4, "M"]}))


# --- clean-up ------------------------------------------------------------------------------------


def chain(target: Sequence[onnx.NodeProto], weights: Mapping[str, Any]) -> onnx.ModelProto:
    """A Reshape whose shape is computed from the shape of its input, as exporters write it."""
    nodes = [
        make_node("Relu", ["x"], ["r"]),
        make_node("Shape", ["r"], ["s"]),
        *target,
        make_node("Reshape", ["r", "t"], ["y"]),
    ]
    constants = {"zero": np.int64(0), "axis": np.array([0]), **weights}
    return build(nodes, {"x": ["N", 3, 4, 5]}, constants)


GATHER = [
    make_node("Gather", ["s", "zero"], ["n"], axis=0),
    make_node("Unsqueeze", ["n", "axis"], ["u"]),
    make_node("Concat", ["u", "rest"], ["t"], axis=0),
]
SLICE = [
    make_node("Slice", ["s", "axis", "one"], ["u"]),
    make_node("Concat", ["u", "rest"], ["t"], axis=0),
]
COMPUTED = [
    make_node("Gather", ["s", "zero"], ["n"], axis=0),
    make_node("Gather", ["s", "two"], ["h"], axis=0),
    make_node("Mul", ["h", "three"], ["m"]),
    make_node("Unsqueeze", ["n", "axis"], ["u"]),
    make_node("Unsqueeze", ["m", "axis"], ["v"]),
    make_node("Concat", ["u", "v", "rest"], ["t"], axis=0),
]


@pytest.mark.parametrize(
    ("nodes", "rest", "shape"),
    [
        (GATHER, [-1], [0, 60]),
        (GATHER, [12, 5], [0, 12, 5]),
        (GATHER, [2, -1, 5], [0, 2, 6, 5]),
        (SLICE, [-1], [0, 60]),
        (COMPUTED, [5], [0, 12, 5]),
        (COMPUTED, [-1], [0, 12, 5]),
    ],
)
@pytest.mark.parametrize("opset", [13, 17, 21])
def test_computed_shapes_become_constants(
    nodes: list[onnx.NodeProto], rest: list[int], shape: list[int], opset: int
) -> None:
    weights = {
        "rest": np.array(rest),
        "one": np.array([1]),
        "two": np.int64(2),
        "three": np.int64(3),
    }
    model = chain(nodes, weights)
    model.opset_import[0].version = opset
    assert keeps(model, [2, 3, 4, 5]) == ["Relu", "Reshape"]
    loaded = load(model)
    assert loaded.graph[1].inputs[1].const_value.numpy().tolist() == shape


def test_rows_that_mix_with_the_batch_lead_with_minus_one() -> None:
    nodes = [
        make_node("Gather", ["s", "zero"], ["n"], axis=0),
        make_node("Mul", ["n", "three"], ["m"]),
        make_node("Unsqueeze", ["m", "axis"], ["u"]),
        make_node("Concat", ["u", "rest"], ["t"], axis=0),
    ]
    model = chain(nodes, {"three": np.int64(3), "rest": np.array([20])})
    assert keeps(model, [2, 3, 4, 5]) == ["Relu", "Reshape"]
    assert load(model).graph[1].inputs[1].const_value.numpy().tolist() == [-1, 20]


def test_constants_identities_dropout_and_dead_code_are_gone() -> None:
    nodes = [
        make_node("Constant", [], ["k"], value_float=2.0),
        make_node("Sqrt", ["k"], ["q"]),
        make_node("Identity", ["x"], ["a"]),
        make_node("Dropout", ["a", "ratio"], ["b"]),
        make_node("Exp", ["b"], ["unused"]),
        make_node("Mul", ["b", "q"], ["c"]),
        make_node("Transpose", ["wt"], ["w"]),
        make_node("MatMul", ["c", "w"], ["d"]),
        make_node("Identity", ["d"], ["y"]),
    ]
    weights = {"ratio": np.float32(0.5), "wt": np.ones((3, 4), "f4"), "spare": np.ones(9, "f4")}
    model = build(nodes, {"x": ["N", 4]}, weights)
    assert keeps(model, [2, 4]) == ["Mul", "MatMul"]
    assert sorted(load(model).graph.initializers) == ["q", "w"]


def test_a_branch_on_a_constant_is_taken() -> None:
    branches = {
        f"{k}_branch": helper.make_graph(
            [make_node(op, ["x"], ["o"])], k, [], [make_tensor_value_info("o", 1, ["N", 4])]
        )
        for k, op in (("then", "Relu"), ("else", "Neg"))
    }
    model = build([make_node("If", ["c"], ["y"], **branches)], {"x": ["N", 4]}, {"c": np.bool_(1)})
    assert keeps(model, [2, 4]) == ["Relu"]


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 17, 20, 21, 22])
def test_any_opset_becomes_21(opset: int) -> None:
    axes = [make_node("Relu", ["x"], ["r"]), make_node("GlobalAveragePool", ["r"], ["g"])]
    nodes = [*axes, make_node("Flatten", ["g"], ["f"]), make_node("Softmax", ["f"], ["y"], axis=1)]
    model = build(nodes, {"x": ["N", 3, 4, 4]}, opset=opset)
    assert set(keeps(model, [2, 3, 4, 4])) >= {"Relu", "GlobalAveragePool", "Softmax"}
    loaded = load(model)
    assert loaded.opset_imports == {"": 21}
    assert loaded.ir_version == 10


def test_an_opset_nobody_knows() -> None:
    model = build([make_node("Relu", ["x"], ["y"])], {"x": ["N", 4]}, opset=99)
    with pytest.raises(QcompileError) as caught:
        load(model)
    assert caught.value.exit_code in (2, 3)


def test_what_cannot_be_converted() -> None:
    node = make_node("RMSNormalization", ["x", "s"], ["y"], axis=-1)
    model = build([node], {"x": ["N", 4]}, {"s": np.ones(4, "f4")}, opset=23)
    with pytest.raises(Unsupported, match="opset 23 and cannot be converted to 21"):
        load(model)


def test_an_output_may_come_without_its_shape() -> None:
    model = onnx.ModelProto()
    model.CopyFrom(RELU)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    assert keeps(model, [2, 4]) == ["Relu"]


def test_weights_listed_as_inputs_are_constants() -> None:
    model = build([make_node("Add", ["x", "w"], ["y"])], {"x": ["N", 4], "w": [4]}, {"w": WEIGHTS})
    assert [v.name for v in load(model).graph.inputs] == ["x"]


@pytest.mark.parametrize("version", [1, 2, 3])
def test_old_file_versions_list_their_weights_as_inputs(version: int) -> None:
    nodes = [make_node("Relu", ["x"], ["a"]), make_node("Conv", ["a", "w"], ["y"])]
    weights = {"w": np.random.default_rng(2).standard_normal((2, 3, 1, 1)).astype("f4")}
    inputs: Mapping[str, Shape] = {"x": ["N", 3, 4, 4], "w": [2, 3, 1, 1]}
    model = build(nodes, inputs, weights, {"y": ["N", 2, 4, 4]}, opset=7)
    model.ir_version = version
    if version < 3:
        del model.opset_import[:]
        # In the first opset Relu had an attribute more, which says nothing about values.
        model.graph.node[0].attribute.append(helper.make_attribute("consumed_inputs", [0]))
    loaded = load(model)
    assert [v.name for v in loaded.graph.inputs] == ["x"]
    x = np.random.default_rng(3).standard_normal((2, 3, 4, 4)).astype("f4")
    want = np.einsum("oc,nchw->nohw", weights["w"][:, :, 0, 0], np.maximum(x, 0))
    np.testing.assert_allclose(execute(ir.to_proto(loaded), x)[0], want, rtol=1e-5, atol=1e-5)


def test_the_mask_of_an_old_dropout_is_a_float() -> None:
    nodes = [
        make_node("Dropout", ["x"], ["d", "mask"], ratio=0.5),
        make_node("Relu", ["d"], ["y"]),
    ]
    assert keeps(build(nodes, {"x": ["N", 4]}, opset=9), [2, 4]) == ["Relu"]


def test_large_weights_made_of_a_shape_are_constants() -> None:
    nodes = [
        make_node("ConstantOfShape", ["s"], ["w"], value=helper.make_tensor("v", 1, [1], [0.25])),
        make_node("MatMul", ["x", "w"], ["y"]),
    ]
    model = build(nodes, {"x": ["N", 900]}, {"s": np.array([900, 800])}, {"y": ["N", 800]})
    assert keeps(model, [2, 900]) == ["MatMul"]


def test_names_are_kept_unique_and_not_empty() -> None:
    nodes = [
        make_node("Relu", ["x"], ["a"], name='*/ #include "x"'),
        make_node("Exp", ["a"], ["<script>"], name="same"),
        make_node("Neg", ["<script>"], ["c"], name="same"),
        make_node("Abs", ["c"], ["y"]),
    ]
    model = load(build(nodes, {"x": ["N", 4]}))
    names = [n.name for n in model.graph]
    assert names[:2] == ['*/ #include "x"', "same"]
    assert all(names)
    assert len(set(names)) == 4
    assert model.graph[1].outputs[0].name == "<script>"


def test_loading_is_deterministic() -> None:
    model = chain(GATHER, {"rest": np.array([-1])})
    assert len({ir.to_proto(load(model)).SerializeToString() for _ in range(3)}) == 1


@pytest.mark.zoo
def test_a_trained_network_is_the_same_in_isolation() -> None:
    path = ZOO / "mlperf-tiny-kws-dscnn" / "model.onnx"
    here, elsewhere = frontend.load(path, isolated=False), frontend.load(path)
    assert ir.to_proto(here).SerializeToString() == ir.to_proto(elsewhere).SerializeToString()


@pytest.mark.zoo
def test_a_language_model_is_refused_for_its_input() -> None:
    with pytest.raises(Unsupported, match=r"Gather.*looks up by integers that are fed"):
        frontend.load(ZOO / "stories260k-llama" / "model.onnx")


def test_outputs_joined_by_an_identity_stay_two() -> None:
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Relu", ["x"], ["y"]),
            onnx.helper.make_node("Identity", ["y"], ["z"]),
        ],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 4])],
        [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["N", 4]) for n in "yz"],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
    )
    loaded = frontend.load(model.SerializeToString(), isolated=False)
    assert [v.name for v in loaded.graph.outputs] == ["y", "z"]
    x = np.array([[-1, 2, -3, 4]], np.float32)
    session = onnxruntime.InferenceSession(ir.to_proto(loaded).SerializeToString())
    for result in session.run(None, {"x": x}):
        assert result.tolist() == [[0, 2, 0, 4]]


@pytest.mark.parametrize("name", ["squeezenet", "shufflenet"])
def test_networks_of_the_first_file_versions(name: str) -> None:
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    original = onnx.load(folder / f"light_{name}.onnx")
    assert (original.ir_version, original.opset_import[0].version) == (3, 9)
    assert "ConstantOfShape" not in keeps(original, [1, 3, 224, 224])


LARGE = np.random.default_rng(5).standard_normal((700, 500)).astype(np.float32)
"""More than what the ONNX libraries are shown."""


def test_large_weights_do_not_go_through_the_libraries() -> None:
    nodes = [
        make_node("MatMul", ["x", "w"], ["a"]),
        make_node("Transpose", ["w"], ["t"]),
        make_node("MatMul", ["a", "t"], ["y"]),
    ]
    model = build(nodes, {"x": ["N", 700]}, {"w": LARGE}, {"y": ["N", 700]})
    small, large = weights.detach(model)
    assert len(small.SerializeToString()) < 1000
    np.testing.assert_array_equal(large["w"].numpy(), LARGE)
    assert model.graph.initializer[0].raw_data == LARGE.tobytes()
    # What is made of them alone is a constant all the same.
    assert keeps(model, [2, 700]) == ["MatMul", "MatMul"]
    assert frontend.load(model).graph.initializers["w"].const_value.numpy().shape == (700, 500)


def test_large_weights_that_are_results_or_unused() -> None:
    nodes = [make_node("Relu", ["x"], ["y"])]
    model = build(
        nodes, {"x": ["N", 4]}, {"w": LARGE, "v": LARGE}, {"y": ["N", 4], "w": LARGE.shape}
    )
    loaded = load(model)
    assert [v.name for v in loaded.graph.inputs] == ["x"]
    assert sorted(loaded.graph.initializers) == ["w"]
    for want, got in zip(
        execute(model, np.ones((2, 4), "f4")),
        execute(ir.to_proto(loaded), np.ones((2, 4), "f4")),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("fault", ["short", "long", "small", "negative", "twice"])
def test_large_weights_that_are_damaged(fault: str) -> None:
    node = make_node("MatMul", ["x", "w"], ["y"])
    model = build([node], {"x": ["N", 700]}, {"w": LARGE}, {"y": ["N", 500]})
    tensor = model.graph.initializer[0]
    match fault:
        case "short":
            tensor.raw_data = tensor.raw_data[:-4]
        case "long":
            tensor.raw_data += bytes(4)
        case "small":
            tensor.CopyFrom(numpy_helper.from_array(LARGE[:700, :1], "w"))
            tensor.raw_data += bytes(4)
        case "negative":
            tensor.dims[:] = [-700, -500]
        case _:
            model.graph.initializer.append(tensor)
    with pytest.raises(BadInput):
        load(model)
