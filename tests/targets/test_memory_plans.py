"""Results over their operands: the distance is exact, and what is emitted with it is right."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from qcompile import memory
from qcompile.ir import (
    Concat,
    Conv,
    DType,
    Graph,
    Lut,
    Port,
    Rescale,
    Slice,
    TensorType,
    Value,
    ops,
)
from qcompile.ir.arith import Acc, Val
from qcompile.targets.c.emit import lower
from qcompile.targets.c.kernel import ALIGN, Step
from qcompile.targets.c.kernels import PORTABLE
from qcompile.targets.c.storage import Storage, cheapest, fuse
from qcompile.targets.c.window import trails
from tests.native import check
from tests.strategies import Maker, feeds, singles

# ------------------------------------------------------------------- the oracle: every byte, one by one


def first_operand_reads(step: Step) -> list[set[int]]:
    """For every pixel of the result in order, the bytes of operand 0 that it is made of, by the operator's words."""
    node, (batch, *shape) = step.node, step.node.inputs[0].type.shape
    width = node.inputs[0].type.dtype.bytes
    index = np.arange(batch * int(np.prod(shape))).reshape(batch, *shape)
    out = step.output.type.shape
    match node.op:
        case ops.Conv(strides=strides, pads=pads, dilations=dilations):
            kernel = node.inputs[1].type.shape[1:-1]
        case ops.MaxPool(kernel=kernel, strides=strides, pads=pads, dilations=dilations):
            pass
        case ops.SumPool(kernel=kernel, strides=strides, pads=pads):
            dilations = (1,) * len(kernel)
        case ops.MatMul():
            rows = index.reshape(-1, shape[-1])
            return [{e * width + b for e in row for b in range(width)} for row in rows.tolist()]
        case _:
            return [{e * width + b for b in range(width)} for e in range(index.size)]
    found = []
    for n, *position in product(*(range(s) for s in out[:-1])):
        elements: set[int] = set()
        for tap in product(*(range(k) for k in kernel)):
            at = [
                o * s - p + t * d
                for o, s, p, t, d in zip(position, strides, pads, tap, dilations, strict=False)
            ]
            if all(0 <= a < size for a, size in zip(at, shape, strict=False)):
                elements.update(index[(n, *at)].tolist())
        found.append({e * width + b for e in elements for b in range(width)})
    return found


def survives(step: Step, distance: int, runs: Sequence[int]) -> bool:
    """Is every byte read before it is overwritten, with so many pixels at a time?"""
    reads = first_operand_reads(step)
    pixel = step.output.type.bytes // len(reads)
    written = at = 0
    for run in runs:
        if any(distance + byte < written for part in reads[at : at + run] for byte in part):
            return False
        at += run
        written = min(at, len(reads)) * pixel
    return at >= len(reads)


OVERLAPPING = (
    "conv", "conv", "maxpool", "sumpool", "matmul", "rescale", "lut", "conv", "extreme",
)  # fmt: skip


@settings(
    deadline=None, derandomize=True, max_examples=250, suppress_health_check=list(HealthCheck)
)
@given(st.data())
def test_the_distance_is_the_least_that_is_safe(data: st.DataObject) -> None:
    graph = data.draw(singles(data.draw(st.sampled_from(OVERLAPPING))))
    step = fuse(graph)[-1]
    x = step.node.inputs[0]
    found = trails(step)
    if x not in found:
        assert x.type.shape != step.output.type.shape
        return
    distance = found[x]
    count = len(first_operand_reads(step))
    assert survives(step, distance, [1] * count)
    assert survives(step, distance + data.draw(st.integers(0, 40)), [1] * count)
    assert distance == 0 or not survives(step, distance - 1, [1] * count)
    runs = data.draw(st.lists(st.integers(1, 5), min_size=count, max_size=count))
    assert survives(step, distance, runs)


@settings(
    deadline=None, derandomize=True, max_examples=200, suppress_health_check=list(HealthCheck)
)
@given(st.data())
def test_the_distance_of_dilated_windows_in_wide_borders(data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    height, width = draw(1, 5), draw(1, 5)
    kernel, dilation = (draw(1, 3), draw(1, 3)), (draw(1, 3), draw(1, 3))
    pads = tuple(
        max(draw(0, 4), (k - 1) * d + 1 - n)
        for k, d, n in (*zip(kernel, dilation, (height, width), strict=True),) * 2
    )
    graph = Graph("one")
    shape = (draw(1, 2), height, width, draw(1, 3))
    x = graph.add_input(Port("x", 0.1, 0), TensorType(DType.I8, shape))
    w = np.ones((draw(1, 6), *kernel, shape[-1]), np.int8)
    weights = graph.constant(w, TensorType(DType.I8, w.shape), "w")
    bias = graph.constant(np.zeros(len(w), np.int32), TensorType(DType.I32, (len(w),)), "b")
    op = Conv((draw(1, 3), draw(1, 3)), pads, dilation)
    y = rescaled(graph, graph.add(op, x, weights, bias, name="acc"), "y")
    graph.add_output(Port("y", 0.1, 0), y)
    (step,) = fuse(graph)
    distance = trails(step)[x]
    count = len(first_operand_reads(step))
    assert survives(step, distance, [1] * count)
    assert distance == 0 or not survives(step, distance - 1, [1] * count)


@pytest.mark.parametrize(
    ("kernel", "stride", "pads", "outputs", "distance"),
    [
        (1, 1, (0, 0, 0, 0), 8, 0),
        (1, 1, (0, 0, 0, 0), 6, 0),
        (1, 1, (0, 0, 0, 0), 9, 99),  # all pixels but the last, a byte each
        (3, 1, (1, 1, 1, 1), 8, (10 + 1) * 8),  # a row and a pixel
        (3, 2, (0, 0, 1, 1), 8, 0),
        (3, 2, (1, 1, 1, 1), 16, 8),  # the second window begins one pixel in
    ],
)
def test_distances_of_common_layers(
    kernel: int, stride: int, pads: tuple[int, ...], outputs: int, distance: int
) -> None:
    graph = Graph("one")
    x = graph.add_input(Port("x", 0.1, 0), TensorType(DType.I8, (1, 10, 10, 8)))
    y = rescaled(graph, conv(graph, x, outputs, kernel, stride, pads), "y")
    graph.add_output(Port("y", 0.1, 0), y)
    (step,) = fuse(graph)
    assert trails(step) == {x: distance}


# ------------------------------------------------------------------------------------ emitted programs


def conv(
    graph: Graph,
    x: Value,
    outputs: int,
    kernel: int,
    stride: int,
    pads: tuple[int, ...],
    groups: int = 1,
) -> Value:
    rng = np.random.default_rng(len(graph.nodes))
    w = rng.integers(-127, 128, (outputs, kernel, kernel, x.type.shape[-1] // groups)).astype(
        np.int8
    )
    b = rng.integers(-999, 999, outputs).astype(np.int32)
    op = Conv((stride, stride), pads, (1, 1), groups, pad_value=-3)
    weights = graph.constant(w, TensorType(DType.I8, w.shape), "w")
    bias = graph.constant(b, TensorType(DType.I32, b.shape), "b")
    return graph.add(op, x, weights, bias, name=f"acc {len(graph.nodes)}")


def rescaled(graph: Graph, acc: Value, name: str, vals: Sequence[Value] = ()) -> Value:
    op = Rescale(
        accs=(Acc((1 << 30,)),), vals=tuple(Val((1 << 8,), -3) for _ in vals),
        f=(9,), zero_point=-3, lo=-128, hi=127, out=DType.I8,
    )  # fmt: skip
    return graph.add(op, acc, *vals, name=name)


def mobile(blocks: int = 3) -> Graph:
    """A convolution, then depthwise and pointwise ones, as keyword spotters are built."""
    graph = Graph("mobile")
    x = graph.add_input(Port("x", 0.1, -3), TensorType(DType.I8, (1, 12, 9, 2)))
    v = rescaled(graph, conv(graph, x, 16, 3, 1, (1, 1, 1, 1)), "first")
    for i in range(blocks):
        v = rescaled(graph, conv(graph, v, 16, 3, 1, (1, 1, 1, 1), groups=16), f"depthwise {i}")
        v = rescaled(graph, conv(graph, v, 16, 1, 1, (0, 0, 0, 0)), f"pointwise {i}")
    graph.add_output(Port("y", 0.1, -3), rescaled(graph, conv(graph, v, 4, 1, 1, (0,) * 4), "last"))
    return graph


def test_depthwise_and_pointwise_layers_share_one_buffer() -> None:
    graph = mobile()
    storage = Storage(graph, PORTABLE)
    size, distance = 12 * 9 * 16, (9 + 1) * 16
    scratch = max(PORTABLE[0].scratch(step).bytes for step in storage.steps)
    peak = storage.plan().peak
    assert size + distance <= peak <= size + 3 * distance + scratch
    lowered = lower(graph, name="net", isa="test", vectors=feeds(graph, 1, 1))
    assert lowered.arena_bytes == peak
    text = lowered.files["model.c"].decode()
    assert "written over what has been read" in text
    for line in text.splitlines():
        if "depthwise" in line and "static" in line:
            assert line.count("restrict") == 1, "only the scratch is alone"


class Chain(Maker):
    """Every operator reads the last result."""

    def image(self, dtypes: Sequence[DType], channels: int = 9) -> Value:
        return self.values[-1]

    def tensor(self, dtypes: Sequence[DType], ranks: tuple[int, int], most: int = 6) -> Value:
        return self.values[-1]

    def operand(self, dtypes: Sequence[DType], shape: tuple[int, ...]) -> Value:
        fit = [v for v in self.values if v.type.dtype in dtypes and v.type.shape == shape]
        return self.one(fit) if fit and self.flag() else super().operand(dtypes, shape)  # type: ignore[return-value]


NARROW = (DType.I8, DType.U8, DType.I16)


@st.composite
def chains(draw: st.DrawFn, most: int = 5, batch: tuple[int, ...] = (1, 1, 2)) -> Graph:
    """Layers in a row, each a product with its Rescale, a pool or a table: operands die where they are read."""
    maker = Chain(draw, "chain")
    shape = (maker.one(batch), maker.int(3, 9), maker.int(2, 7), maker.int(1, 6))
    maker.values.append(negated(maker.graph, maker.input(DType.I8, shape), "first"))
    for _ in range(maker.int(2, most)):
        kinds = ["conv", "conv", "conv", "sumpool", "maxpool", "matmul"]
        if maker.values[-1].type.dtype.bits == 8:
            kinds += ["lut", "mul"]
        v = getattr(maker, maker.one(kinds))()
        if v.producer is not None and not isinstance(v.producer.op, ops.Lut | ops.MaxPool):
            skips = [maker.operand(NARROW, v.type.shape)] if maker.int(0, 2) == 0 else []
            v = maker.rescaled([v], skips, v.type.shape)
        if v.type.dtype not in NARROW:
            break
    if maker.values[-1].type.dtype is DType.I8:
        maker.values.append(negated(maker.graph, maker.values[-1], "last"))
    maker.graph.add_output(Port("output", 0.25, 0), maker.values[-1])
    maker.graph.verify()
    return maker.graph


BATCHES = settings(
    deadline=None,
    derandomize=True,
    max_examples=2,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def test_chains_do_overlap() -> None:
    """So the tests below test what they say."""
    crossed: list[bool] = []

    @settings(BATCHES, max_examples=60)
    @given(chains())
    def look(graph: Graph) -> None:
        crossed.append(bool(Storage(graph, PORTABLE).plan().crossed))

    look()
    assert sum(crossed) >= 12


@BATCHES
@given(st.lists(chains(), min_size=14, max_size=14))
def test_overlapping_programs_with_sanitizers(batch: Sequence[Graph]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check([*batch, mobile()], Path(folder))


@settings(BATCHES, max_examples=2)
@given(st.lists(chains(), min_size=10, max_size=10))
def test_overlapping_programs_vectorised(batch: Sequence[Graph]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check([*batch, mobile(5)], Path(folder), compiler=("gcc", "-O3"), seed=5)


def test_a_distance_too_short_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: operands a row too near."""
    honest = memory.plan

    def near(
        tasks: Sequence[memory.Task], sizes: dict[str, int], align: int, tied: memory.Tied
    ) -> memory.Plan:
        closer = [
            memory.Task(
                t.reads, t.writes, t.scratch, t.reuse, tuple((n, d - 9 * 16) for n, d in t.trails)
            )
            for t in tasks
        ]
        return honest(closer, sizes, align, tied)

    monkeypatch.setattr(memory, "plan", near)
    with pytest.raises(AssertionError):
        check([mobile()], tmp_path)


def test_every_portable_kernel_says_how_it_walks() -> None:
    storage = Storage(mobile(), PORTABLE)
    assert all((cheapest(s, PORTABLE).raster(s) or 0) >= 1 for s in storage.steps)


# --------------------------------------------------------------------------------------------- views


def image(graph: Graph, name: str = "x", rows: int = 6, channels: int = 4) -> Value:
    return graph.add_input(Port(name, 0.1, 0), TensorType(DType.I8, (1, rows, 5, channels)))


def negated(graph: Graph, x: Value, name: str) -> Value:
    table = np.arange(-128, 128)[::-1].astype(np.int8)
    return graph.add(
        Lut(), x, graph.constant(table, TensorType(DType.I8, (256,)), "table"), name=name
    )


def rows(graph: Graph, x: Value, first: int, last: int, name: str) -> Value:
    _, width, channels = x.type.shape[1:]
    return graph.add(Slice((first, 0, 0), (last, width, channels), (1, 1, 1)), x, name=name)


def kernels_of(graph: Graph) -> list[str]:
    lowered = lower(graph, name="net", isa="test", vectors=feeds(graph, 1, 1))
    return [layer.kernel for layer in lowered.layers]


def halves(nested: bool = False) -> Graph:
    """Rows cut, changed, and put together again, upside down."""
    graph = Graph("halves")
    v = negated(graph, image(graph), "v")
    top = rescaled(graph, conv(graph, rows(graph, v, 0, 3, "top"), 4, 3, 1, (1,) * 4), "t")
    low = rescaled(graph, conv(graph, rows(graph, v, 2, 6, "low"), 4, 3, 1, (1,) * 4), "l")
    whole = graph.add(Concat(1), low, top, name="whole")
    if nested:
        whole = graph.add(Concat(1), negated(graph, v, "w"), whole, name="tower")
    y = rescaled(graph, conv(graph, whole, 3, 3, 1, (1,) * 4), "y")
    graph.add_output(Port("y", 0.1, 0), y)
    return graph


@pytest.mark.parametrize("nested", [False, True])
def test_rows_are_cut_and_joined_without_a_copy(nested: bool, tmp_path: Path) -> None:
    graph = halves(nested)
    assert "move" not in kernels_of(graph)
    stored = lower(graph, name="net", isa="test", vectors=feeds(graph, 1, 1)).stored
    assert {"top", "low", "whole"} <= stored.keys()
    check([graph], tmp_path)


def test_what_lies_before_the_rows_that_are_read_may_be_overwritten() -> None:
    graph = Graph("lower half")
    v = negated(graph, image(graph, rows=8), "v")
    y = rescaled(graph, conv(graph, rows(graph, v, 4, 8, "low"), 4, 3, 1, (1,) * 4), "y")
    graph.add_output(Port("z", 0.1, 0), negated(graph, y, "z"))
    storage = Storage(graph, PORTABLE)
    scratch = PORTABLE[0].scratch(storage.steps[1]).bytes
    assert storage.plan().peak == 8 * 5 * 4 + scratch


def test_what_cannot_be_a_view_is_copied(tmp_path: Path) -> None:
    cases = []
    for case in range(6):
        graph = Graph(f"case {case}")
        x = image(graph)
        v, w = negated(graph, x, "v"), negated(graph, image(graph, "x2"), "w")
        if case == 0:  # the same part twice
            y = graph.add(Concat(1), v, v, name="y")
        elif case == 1:  # a part that is an output
            y = graph.add(Concat(1), v, w, name="y")
            graph.add_output(Port("v", 0.1, 0), v)
        elif case == 2:  # a part that is an input
            y = graph.add(Concat(1), x, v, name="y")
        elif case == 3:  # channels lie between each other
            y = graph.add(Concat(3), v, w, name="y")
        elif case == 4:  # columns are not side by side
            y = graph.add(Slice((0, 1, 0), (6, 4, 4), (1, 1, 1)), v, name="y")
        else:  # rows that are an output themselves
            y = rows(graph, v, 1, 4, "y")
        if case < 5:
            y = negated(graph, y, "z")
        graph.add_output(Port("y", 0.1, 0), y)
        assert "move" in kernels_of(graph), case
        cases.append(graph)
    check(cases, tmp_path)


def test_parts_are_written_straight_to_the_output(tmp_path: Path) -> None:
    graph = Graph("outputs")
    v = negated(graph, image(graph), "v")
    parts = [negated(graph, rows(graph, v, i, i + 2, f"r{i}"), f"p{i}") for i in (3, 0)]
    y = graph.add(Concat(1), *parts, name="y")
    graph.add_output(Port("y", 0.1, 0), y)
    graph.add_output(Port("again", 0.1, 0), y)
    graph.add_output(Port("more", 0.1, 0), negated(graph, rows(graph, y, 1, 3, "cut"), "more"))
    assert "move" not in kernels_of(graph)
    check([graph], tmp_path)


def test_a_join_that_nobody_reads_is_stored_whole(tmp_path: Path) -> None:
    graph = halves()
    v = next(n.output for n in graph.nodes if n.name == "v")
    graph.add(Concat(1), negated(graph, v, "a"), negated(graph, v, "b"), name="unread")
    check([graph], tmp_path)


def test_equal_layers_are_one_function() -> None:
    graph = Graph("twins")
    v = negated(graph, image(graph), "v")
    parts = [negated(graph, rows(graph, v, i, i + 2, f"r{i}"), f"p{i}") for i in (0, 2, 4)]
    y = graph.add(Concat(1), *parts, name="y")
    graph.add_output(Port("y", 0.1, 0), y)
    text = (
        lower(graph, name="net", isa="test", vectors=feeds(graph, 1, 1)).files["model.c"].decode()
    )
    assert text.count("static LAYER void") == 2
    assert text.count("    layer_p0(") == 3


def test_the_arena_is_aligned_whatever_the_parts(tmp_path: Path) -> None:
    graph = halves()
    plan = Storage(graph, PORTABLE).plan()
    assert plan.offsets["t"] - plan.offsets["l"] == 4 * 5 * 4
    assert plan.offsets["l"] % ALIGN == 0
