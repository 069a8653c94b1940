"""What exporters write: float results, compiled, are onnxruntime's but for the steps of the codes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx.helper import make_node

from qcompile import border
from qcompile.ir import Graph
from qcompile.onnx import frontend
from qcompile.passes.decompose import Decompose, open_batch
from qcompile.pipeline import Context
from qcompile.plan import QuantPlan
from tests.fuzz import chain
from tests.fuzz.chain import agrees
from tests.fuzz.networks import Network
from tests.native import check
from tests.oracle import build, execute

Array = NDArray[np.float32]

WIDTHS = [{}, {"activations": "int16"}, {"weights": "int4", "activations": "int8"}]


def numbers(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- whole networks ---------------------------------------------------------------------------------------------

FILES = sorted((Path(__file__).parent / "exported").glob("*.onnx"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_network_as_it_was_exported(path: Path, tmp_path: Path) -> None:
    """tests/exported/*.py made them. Numbers differ by less than -25 dB, 9 of 10 labels are the same."""
    rows, rng = 16, np.random.default_rng(0)
    session = onnxruntime.InferenceSession(path)
    feeds: dict[str, NDArray[Any]] = {}
    for port in session.get_inputs():
        sizes = [n if isinstance(n, int) else 1 for n in port.shape[1:]]
        feeds[port.name] = rng.normal(1, 2, (rows, *sizes)).astype(np.float32)
    graph = chain.compiled(Network(path.read_bytes(), feeds, "fast", {}, ()))
    assert isinstance(graph, Graph), graph
    wanted: list[list[NDArray[Any]]] = []
    got: list[dict[str, NDArray[Any]]] = []
    for i in range(rows):
        row = {n: x[i : i + 1] for n, x in feeds.items()}
        wanted.append(session.run(None, row))
        got.append(border.decode(graph, graph.run(border.encode(graph, row))))
    for port, values in zip(session.get_outputs(), zip(*wanted, strict=True), strict=True):
        expected, actual = np.stack(values), np.stack([g[port.name] for g in got])
        assert actual.shape == expected.shape
        if expected.dtype == np.float32:
            noise = np.square(actual.astype(np.float64) - expected).sum()
            assert 10 * np.log10(np.square(expected, dtype=np.float64).sum() / noise) > 25, (
                port.name
            )
        else:
            assert (actual == expected).mean() > 0.9
    check([graph], tmp_path)


# --- zeros ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", WIDTHS[:2])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6])
def test_a_branch_that_is_silent_does_not_coarsen_the_sum(
    scale: float, options: dict[str, str]
) -> None:
    nodes = [
        make_node("Mul", ["x0", "k"], ["x"]),
        make_node("Gemm", ["x", "w", "b"], ["g"]),
        make_node("Relu", ["g"], ["r"]),
        make_node("Tanh", ["x"], ["t"]),
        make_node("Add", ["r", "t"], ["y"]),
    ]
    weights = {"k": np.float32(scale), "w": numbers(8, 8), "b": np.full(8, -30 * scale, np.float32)}
    agrees(nodes, {"x0": ["N", 8]}, weights, options=options)


@pytest.mark.parametrize("options", WIDTHS)
@pytest.mark.parametrize("scale", [1.0, 1e-4])
@pytest.mark.parametrize("residual", [False, True])
def test_weights_of_zeros_do_not_coarsen_the_bias(
    residual: bool, scale: float, options: dict[str, str]
) -> None:
    nodes = [make_node("Gemm", ["x", "w", "b"], ["g" if residual else "y"])]
    if residual:
        nodes.append(make_node("Add", ["g", "x"], ["y"]))
    weights = {"w": np.zeros((8, 8), np.float32), "b": scale * numbers(8)}
    agrees(nodes, {"x": ["N", 8]}, weights, options=options)


@pytest.mark.parametrize("options", WIDTHS)
@pytest.mark.parametrize(
    ("op", "operands", "number", "shape"),
    [
        ("Add", "sc", 0, (8,)), ("Add", "cs", 0, (8,)), ("Add", "sc", 0, (1, 5, 8)), ("Add", "cs", 0, (1, 5, 8)),
        ("Sub", "sc", 0, (8,)), ("Mul", "sc", 1, (8,)), ("Mul", "cs", 1, (8,)), ("Mul", "sc", 1, (5, 8)),
        ("Mul", "cs", 1, (5, 8)), ("Div", "sc", 1, ()),
    ],
)  # fmt: skip
def test_constants_that_change_nothing(
    op: str, operands: str, number: int, shape: tuple[int, ...], options: dict[str, str]
) -> None:
    nodes = [make_node("Sigmoid", ["x"], ["s"]), make_node(op, list(operands), ["y"])]
    agrees(nodes, {"x": ["N", 1, 8]}, {"c": np.full(shape, number, np.float32)}, options=options)


def test_a_network_that_changes_nothing() -> None:
    agrees([make_node("Add", ["c", "x"], ["y"])], {"x": ["N", 8]}, {"c": np.zeros(8, np.float32)})


# --- time in front of the batch ---------------------------------------------------------------------------------


def turned(op: str, operands: Sequence[str], weights: dict[str, Any], back: Sequence[int]) -> bytes:
    """An operator between two Transposes, the first of which takes the samples off axis 0."""
    nodes = [
        make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        make_node(op, list(operands), ["o"]),
        make_node("Transpose", ["o"], ["y"], perm=list(back)),
    ]
    return build(nodes, {"x": ["N", 4, 4]}, weights, ["y"])


@pytest.mark.parametrize(
    ("op", "operands", "shape", "leaves"),
    [
        ("Add", "ct", (4,), 0), ("Add", "tc", (4,), 0), ("Mul", "ct", (1,), 0), ("Sub", "ct", (4,), 0),
        ("Div", "ct", (4,), 0), ("Div", "tc", (4,), 0), ("MatMul", "tc", (4, 4), 0),
        ("Add", "ct", (4, 1), 2), ("Add", "ct", (4, 1, 4), 2), ("MatMul", "ct", (4, 4), 2),
        ("MatMul", "tt", (1,), 2),
    ],
)  # fmt: skip
def test_constants_on_either_side_between_transposes(
    op: str, operands: str, shape: tuple[int, ...], leaves: int
) -> None:
    weights = {"c": np.abs(numbers(*shape)) + 0.5}
    data = turned(op, list(operands), weights if "c" in operands else {}, [1, 0, 2])
    loaded = frontend.load(data, isolated=False)
    Decompose()(loaded, QuantPlan(), Context())
    assert sum(n.op_type == "Transpose" for n in loaded.graph) == leaves
    if not leaves:
        assert open_batch(loaded) is None
    x = {"x": np.abs(numbers(4, 4, 4, seed=1)) + 0.5}
    (wanted,), (got,) = execute(data, x), execute(ir.to_proto(loaded).SerializeToString(), x)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
