"""Layers in bands of rows: the same values, in less memory."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from qcompile.ir import Array, Conv, DType, Graph, Lut, Port, Rescale, TensorType, Value, ops
from qcompile.ir.arith import Acc, Val
from qcompile.ir.proof import prove
from qcompile.ir.text import dump
from qcompile.targets.c import bands
from qcompile.targets.c.emit import lower
from qcompile.targets.c.kernels import PORTABLE
from qcompile.targets.c.storage import Storage, fuse
from tests.native import check
from tests.strategies import Maker, feeds

NARROW = (DType.I8, DType.U8, DType.I16)
MOVES = (
    ops.Lut
    | ops.MaxPool
    | ops.Slice
    | ops.Pad
    | ops.Concat
    | ops.Take
    | ops.Extreme
    | ops.Normalize
)


class Image(Maker):
    """Every operator reads the last result; other operands are earlier results, new inputs and constants."""

    def image(self, dtypes: Sequence[DType], channels: int = 9) -> Value:
        return self.values[-1]

    def tensor(self, dtypes: Sequence[DType], ranks: tuple[int, int], most: int = 6) -> Value:
        return self.values[-1]


@st.composite
def images(draw: st.DrawFn) -> Graph:
    """A few layers over one or two spatial axes, some with skips and spatial parameters."""
    maker = Image(draw, "image")
    spatial = (maker.int(2, 14), *((maker.int(1, 5),) if maker.int(0, 3) else ()))
    maker.values.append(maker.input(DType.I8, (1, *spatial, maker.int(1, 4))))
    for _ in range(maker.int(1, 4)):
        kinds = ["conv", "conv", "conv", "sumpool", "maxpool", "matmul", "slice", "pad", "concat"]
        kinds += ["take", "extreme", "normalize"]
        if maker.values[-1].type.dtype.bits == 8:
            kinds += ["lut", "mul"]
        v = getattr(maker, maker.one(kinds))()
        if v.producer is not None and not isinstance(v.producer.op, MOVES):
            skips = [maker.operand(NARROW, v.type.shape)] if maker.flag() else []
            v = maker.rescaled([v], skips, v.type.shape)
        if v.type.dtype not in NARROW:
            break
    maker.graph.add_output(Port("output", 0.25, 0), maker.values[-1])
    maker.graph.verify()
    return maker.graph


def splits(graph: Graph, count: int) -> list[bands.Banded]:
    found = (bands.split(graph, step.output, count) for step in fuse(graph))
    return [made for made in found if made is not None]


def assert_equal_values(graph: Graph, made: bands.Banded, seed: int) -> None:
    """Outputs, and every piece against its rows of the value it stands for."""
    made.graph.verify()
    prove(made.graph)
    for row in feeds(graph, seed, 2):
        whole: dict[str, Array] = {}
        parts: dict[str, Array] = {}
        expected = graph.run(row, on_value=lambda v, a, seen=whole: seen.update({v.name: a}))  # type: ignore[misc]
        got = made.graph.run(row, on_value=lambda v, a, seen=parts: seen.update({v.name: a}))  # type: ignore[misc]
        whole |= {v.name: row[port.name] for port, v in graph.inputs}
        assert expected.keys() == got.keys()
        assert all(np.array_equal(expected[name], got[name]) for name in expected)
        for name, array in parts.items():
            piece = made.pieces.get(name)
            wanted = (
                whole[name] if piece is None else whole[piece.value][:, piece.first : piece.last]
            )
            assert np.array_equal(array, wanted), (name, dump(graph))


PROPERTY = settings(
    deadline=None, derandomize=True, max_examples=150, suppress_health_check=list(HealthCheck)
)


@PROPERTY
@given(images(), st.integers(2, 6))
def test_bands_keep_every_value(graph: Graph, count: int) -> None:
    before = dump(graph)
    for made in splits(graph, count):
        assert_equal_values(graph, made, 3)
    assert dump(graph) == before


def test_most_images_can_be_split() -> None:
    """So the test above tests what it says."""
    found: list[set[str]] = []

    @settings(PROPERTY, max_examples=250)
    @given(images())
    def look(graph: Graph) -> None:
        for made in splits(graph, 2):
            found.append({type(node.op).__name__ for node in made.graph.nodes})

    look()
    assert len(found) >= 60
    assert set().union(*found) >= {
        "Conv",
        "MaxPool",
        "SumPool",
        "MatMul",
        "Mul",
        "Lut",
        "Rescale",
        "Slice",
        "Pad",
        "Concat",
        "Take",
        "Extreme",
        "Normalize",
    }


@settings(PROPERTY, max_examples=2, phases=[Phase.explicit, Phase.generate])
@given(st.lists(st.tuples(images(), st.integers(2, 4)), min_size=5, max_size=5))
def test_bands_as_emitted_with_sanitizers(cases: Sequence[tuple[Graph, int]]) -> None:
    banded = [made.graph for graph, count in cases for made in splits(graph, count)[-1:]]
    with tempfile.TemporaryDirectory() as folder:
        check([*banded, *(made.graph for made in splits(residual(), 4))], Path(folder))


@pytest.mark.parametrize(
    ("op", "splits"),
    [
        (ops.Take(1, (3, 2, 1, 0)), False),
        (ops.Take(2, (2, 0)), True),
        (ops.ArgExtreme(1, True, False), False),
        (ops.ArgExtreme(3, True, False), True),
    ],
)
def test_what_picks_rows_is_not_split(op: ops.Op, splits: bool) -> None:
    graph = Graph("picks", free_batch=False)
    x = graph.add_input(Port("x", 1.0, 0), TensorType(DType.I8, (1, 4, 3, 2)))
    largest = graph.add(ops.MaxPool((3, 1), (1, 1), (1, 0, 1, 0), (1, 1)), x, name="largest")
    y = graph.add(op, largest, name="y")
    graph.add_output(Port("y", 1.0, 0), y)
    made = bands.split(graph, y, 2)
    assert (made is not None) == splits
    if made is not None:
        assert_equal_values(graph, made, 0)


# ----------------------------------------------------------------------------------- a residual network


def conv(
    graph: Graph, x: Value, outputs: int, stride: int, name: str, vals: Sequence[Value] = ()
) -> Value:
    rng = np.random.default_rng(len(graph.nodes))
    w = rng.integers(-127, 128, (outputs, 3, 3, x.type.shape[-1])).astype(np.int8)
    b = rng.integers(-999, 999, outputs).astype(np.int32)
    acc = graph.add(
        Conv((stride, stride), (2 - stride, 2 - stride, 1, 1), (1, 1), pad_value=-3), x,
        graph.constant(w, TensorType(DType.I8, w.shape), "w"),
        graph.constant(b, TensorType(DType.I32, b.shape), "b"),
        name=name + " acc",
    )  # fmt: skip
    op = Rescale(
        accs=(Acc((1 << 30,)),), vals=tuple(Val((1 << 8,), -3) for _ in vals),
        f=(9,), zero_point=-3, lo=-128, hi=127, out=DType.I8,
    )  # fmt: skip
    return graph.add(op, acc, *vals, name=name)


def residual(batch: int = 1) -> Graph:
    """A stem, a residual block, a halving, a pool over what is left."""
    graph = Graph("residual", free_batch=batch == 1)
    x = graph.add_input(Port("x", 0.1, -3), TensorType(DType.I8, (batch, 16, 16, 2)))
    stem = conv(graph, x, 8, 1, "stem")
    first = conv(graph, stem, 8, 1, "first")
    joined = conv(graph, first, 8, 1, "joined", [stem])
    half = conv(graph, joined, 8, 2, "half")
    last = conv(graph, half, 4, 2, "last")
    graph.add_output(Port("y", 0.1, -3), last)
    return graph


def value(graph: Graph, name: str) -> Value:
    return next(v for v in graph.values() if v.name == name)


def arena(graph: Graph) -> int:
    return lower(graph, name="net", isa="test", vectors=()).arena_bytes


def test_rows_of_a_residual_block() -> None:
    graph = residual()
    made = bands.split(graph, value(graph, "joined"), 4)
    assert made is not None
    # rows 4 to 8 need one more on each side for each convolution before
    assert {"joined[4:8]", "first[3:9]", "stem[2:10]", "stem[4:8]", "x[1:11]"} <= made.pieces.keys()
    assert {"joined[0:4]", "first[0:5]", "stem[0:6]", "x[0:7]"} <= made.pieces.keys()
    assert made.pieces["first[3:9]"] == bands.Piece("first", 3, 9)
    third = 16 * 8 * 9
    more = (6 + 8 + 8 + 6) * 16 * (8 * 9 * 2) - 16 * third * 2
    more += (5 + 6 + 6 + 5) * 16 * 8 * 9 * 8 - 16 * third * 8
    assert made.macs - bands.Banded(graph).macs == more
    assert_equal_values(graph, made, 1)


def test_nothing_is_copied_and_the_arena_shrinks() -> None:
    graph = residual()
    made = bands.split(graph, value(graph, "half"), 4)
    assert made is not None
    lowered = lower(made.graph, name="net", isa="test", vectors=())
    assert "move" not in {layer.kernel for layer in lowered.layers}
    assert lowered.arena_bytes < arena(graph) * 3 // 4
    text = lowered.files["model.c"].decode()
    # the first, the last, and the two between them, which are equal
    assert text.count("static LAYER void layer_first") == 3


def test_what_cannot_be_split_is_left_alone() -> None:
    graph = residual()
    assert bands.split(graph, value(graph, "stem"), 17) is None, "more bands than rows"
    assert bands.split(graph, value(graph, "stem"), 1) is None
    assert bands.split(graph, value(graph, "first"), 2) is None, "the stem is read behind it"
    assert bands.split(graph, value(graph, "x"), 2) is None, "nothing to compute"
    two = residual(batch=2)
    assert bands.split(two, value(two, "joined"), 2) is None, (
        "rows of two images are not side by side"
    )
    assert bands.smallest(two, PORTABLE).graph is two


def test_a_region_begins_behind_what_only_moves() -> None:
    """A flat input, as some networks have it."""
    graph = Graph("flat")
    x = graph.add_input(Port("x", 0.1, -3), TensorType(DType.I8, (1, 8 * 6 * 2)))
    tall = graph.add(ops.Reshape((-1, 2, 8, 6)), x, name="tall")
    tall = graph.add(ops.Transpose((0, 2, 3, 1)), tall, name="channels last")
    y = conv(graph, conv(graph, tall, 3, 1, "first"), 3, 1, "y")
    graph.add_output(Port("y", 0.1, -3), y)
    made = bands.split(graph, y, 4)
    assert made is not None
    assert "channels last[0:4]" in made.pieces
    assert_equal_values(graph, made, 1)


def test_a_region_may_begin_later() -> None:
    graph = residual()
    made = bands.split(graph, value(graph, "half"), 2, value(graph, "joined"))
    assert made is not None
    assert {name.split("[")[0] for name in made.pieces} == {"joined", "half acc", "half"}
    assert_equal_values(graph, made, 1)


@pytest.fixture(scope="module")
def every() -> list[tuple[int, int]]:
    """Arena and products of every configuration."""
    found = bands.configurations(residual())
    return [(Storage(made.graph, PORTABLE).plan().peak, made.macs) for made in found]


def test_the_smallest_is_the_smallest_of_all(every: list[tuple[int, int]]) -> None:
    graph = residual()
    found = bands.smallest(graph, PORTABLE)
    assert (arena(found.graph), found.macs) == min(every)
    assert arena(found.graph) < arena(graph)


@pytest.mark.parametrize("share", [1.0, 0.75, 0.6, 0.1])
def test_a_limit_is_kept_at_the_least_cost(every: list[tuple[int, int]], share: float) -> None:
    graph = residual()
    ports = 16 * 16 * 2 + 4 * 4 * 4
    limit = int((arena(graph) + ports) * share)
    made = bands.fit(graph, PORTABLE, limit)
    fitting = [macs for peak, macs in every if peak + ports <= limit]
    if fitting:
        assert arena(made.graph) + ports <= limit
        assert made.macs == min(fitting)
    else:
        assert share == 0.1
        assert arena(made.graph) == min(every)[0]


def test_a_window_of_pads_alone_is_left_alone() -> None:
    """The first rows would read nothing."""
    graph = Graph("pads")
    x = graph.add_input(Port("x", 0.1, 0), TensorType(DType.I8, (1, 3, 3, 1)))
    w = graph.constant(np.ones((1, 1, 1, 1), np.int8), TensorType(DType.I8, (1, 1, 1, 1)), "w")
    b = graph.constant(np.zeros(1, np.int32), TensorType(DType.I32, (1,)), "b")
    y = graph.add(Conv((1, 1), (2, 0, 2, 0), (1, 1)), x, w, b, name="y")
    graph.add_output(Port("y", 0.1, 0), y)
    assert bands.split(graph, y, 7) is None
    assert bands.split(graph, y, 2) is not None


def test_what_broadcasts_is_not_cut() -> None:
    graph = Graph("gate")
    x = graph.add_input(Port("x", 0.1, 0), TensorType(DType.I8, (1, 6, 4, 2)))
    gate = graph.add_input(Port("gate", 0.1, 0), TensorType(DType.I8, (1, 1, 1, 2)))
    table = graph.constant(np.arange(-128, 128).astype(np.int8), TensorType(DType.I8, (256,)), "t")
    product = graph.add(ops.Mul(0, 0), graph.add(Lut(), x, table, name="v"), gate, name="product")
    graph.add_output(Port("y", 0.1, 0), product)
    made = bands.split(graph, product, 3)
    assert made is not None
    assert "gate" not in {piece.value for piece in made.pieces.values()}
    assert_equal_values(graph, made, 1)
