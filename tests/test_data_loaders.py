"""Loaders of other frameworks, and what a pass over samples warns of."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import qcompile.data as opened
from qcompile import driver
from qcompile.data import Dataset, InputSpec, open_data
from qcompile.errors import BadInput
from qcompile.onnx import frontend
from qcompile.onnx.gain import gain

F32 = np.dtype(np.float32)
X = InputSpec("x", ("N", 3), F32)
Z = InputSpec("z", ("N", 2, 2), F32)
PIXELS = np.random.default_rng(0).integers(0, 256, (64, 3)).astype(np.float32)


def drain(data: Dataset, name: str = "x") -> NDArray[np.generic]:
    return np.concatenate([batch[name] for batch in data])


def noise(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


class Tensor:
    """What a tensor with a history, on a device, lets one do: nothing before it is detached and copied."""

    def __init__(self, values: object, state: str = "on device") -> None:
        self._values, self._state = np.asarray(values), state

    def __array__(self, *arguments: object) -> None:
        raise RuntimeError("call detach() and cpu() first")

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, row: int) -> Tensor:
        return Tensor(self._values[row])

    def detach(self) -> Tensor:
        return Tensor(self._values, "detached")

    def cpu(self) -> Tensor:
        assert self._state == "detached"
        return Tensor(self._values, "on host")

    def numpy(self) -> NDArray[np.generic]:
        assert self._state == "on host"
        return self._values


class Loader:
    """Batches in another order each time, as torch.utils.data.DataLoader gives them with shuffle=True."""

    def __init__(self, batches: list[object]) -> None:
        self._batches, self.passes = batches, 0

    def __iter__(self) -> Iterator[object]:
        self.passes += 1
        rng = np.random.default_rng(self.passes)
        return iter([self._batches[i] for i in rng.permutation(len(self._batches))])


A, B = noise(4, 3), noise(4, 2, 2, seed=1)
LABEL = Tensor(np.arange(4))


@pytest.mark.parametrize(
    "batch",
    [
        {"x": Tensor(A), "z": Tensor(B)},
        {"x": Tensor(A), "z": Tensor(B.astype(np.float64)), "labels": LABEL},
        (Tensor(A), Tensor(B)),
        [Tensor(A), Tensor(B), LABEL],
        ([Tensor(A), Tensor(B)], LABEL),
        ((A, B), 7),
    ],
)
def test_batches_of_tensors_with_or_without_labels(batch: object) -> None:
    data = open_data(Loader([batch]), [X, Z])
    np.testing.assert_array_equal(drain(data), A)
    np.testing.assert_array_equal(drain(data, "z"), B)
    assert "torch" not in sys.modules


@pytest.mark.parametrize(
    "batch", [A, Tensor(A), (Tensor(A), LABEL), [A, ["cat"] * 4], {"x": A, "label": "cat"}, [A]]
)
def test_batches_for_one_input(batch: object) -> None:
    for source in (Loader([batch]), [batch], iter([batch])):
        np.testing.assert_array_equal(drain(open_data(source, [X])), A)


def test_an_array_or_tensor_by_itself_is_one_batch() -> None:
    for source in (A, Tensor(A)):
        np.testing.assert_array_equal(drain(open_data(source, [X])), A)
        with pytest.raises(BadInput, match="several inputs"):
            open_data(source, [X, Z])


def test_every_pass_sees_the_samples_of_the_first_however_a_loader_shuffles() -> None:
    loader = Loader([(Tensor(noise(2, 3, seed=i)), None) for i in range(9)])
    data = open_data(loader, [X], samples=11)
    first = drain(data)
    assert (len(first), loader.passes) == (11, 1)
    np.testing.assert_array_equal(drain(data), first)
    np.testing.assert_array_equal(data.rows(11)["x"], first)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((A, A, A), "a tuple of 3, and the inputs are 'x'"),
        ("abc", "of type str"),
        (7, "of type int"),
        ((), "a tuple of 0"),
        ((7, A), "a tuple of 2"),
        ([[1.0, 2.0], [3.0, 4.0]], "a list of 2"),
        ({"x": Tensor(A), "y": LABEL}, "no input 'y'"),
        ({"labels": LABEL}, "lacks input 'x'"),
        (Tensor(noise(4, 4)), r"shape \(4, 4\)"),
        (Tensor(np.array(["a", "b", "c"])), "no numbers"),
        ({"x": [Tensor(A)]}, "no array"),
    ],
)
def test_batches_that_are_none(batch: object, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        open_data(Loader([batch]), [X])


def test_what_is_copied_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opened, "SPILLED_BYTES", 10_000)
    with pytest.raises(BadInput, match="take fewer samples with --samples"):
        open_data(Loader([A] * 500), [X])
    assert open_data(Loader([A] * 500), [X], samples=8).count == 8


# warnings


def warned(source: object, spec: InputSpec = X, samples: int | None = None) -> list[str]:
    said: list[str] = []
    data = open_data(source, [spec], samples=samples, warn=said.append)
    assert not said
    for _ in range(2):
        drain(data, spec.name)
    return said


def test_few_samples_and_copies_are_warned_about_once() -> None:
    assert warned({"x": noise(32, 3)}) == []
    (few,) = warned({"x": noise(31, 3)})
    assert few.startswith("there are only 31 samples: ranges from fewer than 32 depend on chance")
    (one,) = warned({"x": noise(1, 3)})
    assert one.startswith("there is only 1 sample:")
    x = noise(300, 3)
    x[200] = x[7]
    assert warned({"x": x}) == []
    x[[3, 100, 299]] = x[5]
    (copies,) = warned([{"x": x[:150]}, {"x": x[150:]}])
    assert copies.startswith("4 of 300 samples are copies of others")
    # equal in one input alone is no copy
    said: list[str] = []
    pair = {"x": np.ones((40, 3)) * [1, 2, 3], "z": noise(40, 2, 2)}
    drain(open_data(pair, [X, Z], warn=said.append))
    assert said == []
    assert warned("random") == warned(None) == []


def test_pixels_for_a_first_layer_that_does_not_divide_them() -> None:
    (said,) = warned({"x": PIXELS}, InputSpec("x", ("N", 3), F32, gain=1.0))
    assert said.startswith("input 'x' goes from 0 to 255 like pixels that are not normalized")
    for given, amplifies in (
        (PIXELS, 1 / 255),  # divided inside the network
        (PIXELS, 0.05),
        (PIXELS, None),
        (PIXELS / 255, 1.0),
        (PIXELS - 128, 1.0),
        (PIXELS + 0.5, 1.0),
        (PIXELS * 300, 1.0),
    ):
        assert warned({"x": given}, InputSpec("x", ("N", 3), F32, gain=amplifies)) == []


@pytest.mark.parametrize(
    ("values", "stated", "words"),
    [
        (PIXELS, "mean = 0.5\nstd = 0.25", "after the stated mean and std, which look made for smaller"),
        (PIXELS / 255, "scale = 0.0039\nmean = 0.5\nstd = 0.25", "stated scale, mean and std: the samples seem"),
        (PIXELS / 255, "scale = 0.0039", "stated scale: the samples seem to be normalized already"),
        (PIXELS, "scale = 0.0039\nmean = 0.5\nstd = 0.25", None),
        (PIXELS / 255, "mean = 0.5\nstd = 0.25", None),
        (PIXELS, "scale = 0.5847029\nzero_point = 83", None),
        (PIXELS, "mean = 128", None),
    ],
)  # fmt: skip
def test_ranges_other_than_the_stated_preparation_gives(
    tmp_path: Path, values: NDArray[np.float32], stated: str, words: str | None
) -> None:
    np.save(tmp_path / "x.npy", values)
    (tmp_path / "data.toml").write_text(f'file = "x.npy"\n[inputs.x]\n{stated}\n')
    said = warned(tmp_path / "data.toml", InputSpec("x", ("N", 3), F32, gain=1.0))
    assert len(said) == (words is not None)
    assert words is None or words in said[0]


def model(*nodes: onnx.NodeProto, **weights: NDArray[np.float32]) -> onnx_ir.Model:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(w, name) for name, w in weights.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return onnx_ir.serde.deserialize_model(made)


def test_the_gain_is_the_largest_norm_of_a_row_of_the_first_weights() -> None:
    w, k = noise(5, 4), noise(6, 1, 3, 3)
    node = helper.make_node
    norms = {
        "w": np.sqrt((w.astype(float) ** 2).sum(1)).max(),
        "k": np.sqrt((k.astype(float) ** 2).sum((1, 2, 3))).max(),
    }
    flat = node("Flatten", ["x"], ["f"], axis=2)
    for nodes, weights, wanted in (
        ([flat, node("Gemm", ["f", "w"], ["y"], transB=1)], {"w": w}, norms["w"]),
        ([flat, node("Gemm", ["f", "w"], ["y"])], {"w": w.T.copy()}, norms["w"]),
        ([node("MatMul", ["x", "w"], ["y"])], {"w": w.T.copy()}, norms["w"]),
        ([node("Transpose", ["x"], ["t"]), node("Conv", ["t", "k"], ["y"])], {"k": k}, norms["k"]),
        ([node("Conv", ["x", "k"], ["a"]), node("Conv", ["x", "l"], ["y"])], {"k": k, "l": 3 * k}, 3 * norms["k"]),
        ([node("Conv", ["x", "k"], ["a"]), node("Relu", ["x"], ["y"])], {"k": k}, None),
        ([node("Relu", ["x"], ["y"])], {}, None),
        ([node("MatMul", ["w", "x"], ["y"])], {"w": w}, None),
        ([node("MatMul", ["x", "x"], ["y"])], {}, None),
    ):  # fmt: skip
        found = gain(model(*nodes, **weights).graph.inputs[0])
        assert found == (None if wanted is None else pytest.approx(wanted, rel=1e-6))


@pytest.mark.zoo
@pytest.mark.parametrize(
    ("name", "raw"), [("resnet20-cifar10", False), ("mlperf-tiny-ic-resnet8", True)]
)
def test_networks_that_take_pixels_and_those_that_do_not(zoo: Path, name: str, raw: bool) -> None:
    source, _ = driver.read_model(zoo / name / "model.onnx")
    (spec,) = driver.specs(frontend.load(source, input_dims={}, warn=driver.silent))
    shape = tuple(n for n in spec.shape[1:] if isinstance(n, int))
    pixels = np.random.default_rng(0).integers(0, 256, (40, *shape)).astype(np.float32)
    assert [("not normalized" in s) for s in warned({spec.name: pixels}, spec)] == [True] * (
        not raw
    )
