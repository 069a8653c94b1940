"""Whole emitted programs: values, warnings, names, memory, refusals."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from qcompile.errors import Unsupported
from qcompile.ir import (
    Array,
    Conv,
    DType,
    Graph,
    Lut,
    MatMul,
    Mul,
    Port,
    Rescale,
    Reshape,
    TensorType,
    Value,
)
from qcompile.ir.arith import Acc, Val
from qcompile.ir.text import constants, dump, parse
from qcompile.target import Lowered
from qcompile.targets.c.emit import fuse, lower
from tests.native import WARNINGS, ZIG, check
from tests.strategies import feeds, graphs

BATCHES = settings(
    deadline=None,
    derandomize=True,
    max_examples=3,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
CLANG = (
    "-std=c99", "-Weverything", "-Werror", "-Wno-declaration-after-statement", "-Wno-padded",
    "-Wno-unsafe-buffer-usage", "-Wno-unused-macros",
)  # fmt: skip
HOSTILE = ('*/ #include "x"', "??/\n#error", "<script>", "\\", "int", "名", "", 'a"b%s{{ x }}')


@BATCHES
@given(st.lists(graphs(), min_size=10, max_size=10))
def test_random_programs_with_sanitizers(batch: Sequence[Graph]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(batch, Path(folder))


@settings(BATCHES, max_examples=2)
@given(st.lists(graphs(), min_size=4, max_size=4))
def test_random_programs_with_clang_and_all_its_warnings(batch: Sequence[Graph]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(batch, Path(folder), compiler=(*ZIG, "-O3"), warnings=CLANG, seed=7)


@settings(BATCHES, max_examples=2)
@given(st.lists(graphs(), min_size=8, max_size=8))
def test_random_programs_vectorised(batch: Sequence[Graph]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(batch, Path(folder), compiler=("gcc", "-O3"), seed=3)


# --------------------------------------------------------------------------------- small networks


def constant(graph: Graph, data: Array, name: str = "constant") -> Value:
    kind = DType.of(data.dtype.itemsize * 8)
    return graph.constant(data, TensorType(kind, data.shape), name)


def conv(graph: Graph, x: Value, outputs: int, name: str, size: int = 3) -> Value:
    rng = np.random.default_rng(len(graph.nodes))
    w = rng.integers(-127, 128, (outputs, size, size, x.type.shape[-1])).astype(np.int8)
    b = rng.integers(-999, 999, outputs).astype(np.int32)
    op = Conv((1, 1), (size // 2,) * 4, (1, 1), pad_value=-3)
    return graph.add(op, x, constant(graph, w), constant(graph, b), name=name)


def requantized(graph: Graph, name: str, *accs: Value, vals: Sequence[Value] = ()) -> Value:
    op = Rescale(
        accs=tuple(Acc((1 << 30,)) for _ in accs),
        vals=tuple(Val((1 << 8,), -3) for _ in vals),
        f=(9,), zero_point=-3, lo=-128, hi=127, out=DType.I8,
    )  # fmt: skip
    return graph.add(op, *accs, *vals, name=name)


def residual(names: Sequence[str] = ("net", "input", "first", "second", "skip", "out")) -> Graph:
    """Two convolutions, the second with the first's result as its skip."""
    graph = Graph(names[0])
    x = graph.add_input(Port(names[1], 0.1, -3), TensorType(DType.I8, (1, 8, 8, 4)))
    first = requantized(graph, names[2] + "_r", conv(graph, x, 4, names[2]))
    second = requantized(graph, names[3] + "_r", conv(graph, first, 4, names[3]))
    joined = requantized(graph, names[4] + "_r", conv(graph, second, 4, names[4]), vals=[first])
    last = requantized(graph, "last_r", conv(graph, joined, 2, "last", size=1))
    graph.add_output(Port(names[5], 0.1, -3), last)
    return graph


def emitted(graph: Graph, name: str = "net") -> Lowered:
    return lower(graph, name=name, isa="portable", vectors=feeds(graph, 1, 2))


def written(lowered: Lowered, folder: Path) -> Path:
    for path, data in lowered.files.items():
        (folder / path).write_bytes(data)
    return folder


def compiles(folder: Path, *flags: str) -> bool:
    command = ["gcc", *WARNINGS, *flags, "-c", "model.c", "-o", "model.o"]
    return subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 0


# ------------------------------------------------------------------------------------- promises


def test_hostile_names_stay_names(tmp_path: Path) -> None:
    cases = [residual([name] * 6) for name in HOSTILE]
    check(cases, tmp_path)
    for graph in cases:
        for path, data in emitted(graph).files.items():
            text = data.decode("ascii")
            if path == "program.json":
                assert list(json.loads(text)["values"]) == list(emitted(graph).stored)
                continue
            assert '#include "x"' not in text, path
            assert "<script>" not in text
            assert "#error" not in text
            assert "??/" not in text


def test_port_names_survive_as_strings(tmp_path: Path) -> None:
    graph = residual(["g", 'in*/"\\??/ 名\n', "a", "b", "c", "out"])
    written(emitted(graph), tmp_path)
    (tmp_path / "main.c").write_text(
        '#include <stdio.h>\n#include "model.h"\nint main(void) { fputs(NET_INPUT_0_NAME, stdout); }\n'
    )
    subprocess.run(["gcc", "-std=c99", "main.c", "-o", "main"], cwd=tmp_path, check=True)
    said = subprocess.run([tmp_path / "main"], capture_output=True, check=True).stdout
    assert said.decode() == 'in*/"\\??/ 名\n'


@settings(deadline=None, derandomize=True, max_examples=25, suppress_health_check=list(HealthCheck))
@given(graphs())
def test_the_same_graph_gives_the_same_bytes(graph: Graph) -> None:
    again = parse(dump(graph), constants(graph))
    assert emitted(graph).files == emitted(again).files


@settings(deadline=None, derandomize=True, max_examples=25, suppress_health_check=list(HealthCheck))
@given(graphs())
def test_no_float_allocation_or_division_is_written(graph: Graph) -> None:
    files = emitted(graph).files
    code = "".join(files[p].decode() for p in ("model.c", "weights.h", "arith.h"))
    code = re.sub(r"/\*.*?\*/", "", code, flags=re.DOTALL)
    assert not re.search(r"\b(float|double|malloc|free)\b|\d\.\d", code)
    assert "/" not in re.sub(r"#include.*", "", code)
    # the one remainder is the alignment of the arena
    assert [line for line in code.splitlines() if "%" in line and "ALIGN" not in line] == []


def test_fusion_is_reported() -> None:
    lowered = emitted(residual())
    assert set(lowered.fused) == {"first", "second", "skip", "last"}
    assert list(lowered.stored) == ["first_r", "second_r", "skip_r", "last_r"]
    assert list(lowered.stored.values()) == [0, 1, 2, 3]
    assert [layer.macs for layer in lowered.layers] == [64 * 4 * 36] * 3 + [64 * 8]


def test_of_two_accumulators_one_is_stored(tmp_path: Path) -> None:
    graph = Graph("two")
    x = graph.add_input(Port("x", 0.1, -3), TensorType(DType.I8, (1, 5, 5, 3)))
    y = requantized(graph, "sum", conv(graph, x, 4, "left"), conv(graph, x, 4, "right", 1))
    graph.add_output(Port("y", 0.1, -3), y)
    lowered = emitted(graph)
    assert lowered.fused == ["right"]
    assert list(lowered.stored) == ["left", "sum"]
    check([graph], tmp_path)


def test_an_accumulator_that_is_an_output_is_stored(tmp_path: Path) -> None:
    graph = Graph("both")
    x = graph.add_input(Port("x", 0.1, -3), TensorType(DType.I8, (1, 5, 5, 3)))
    acc = conv(graph, x, 4, "acc")
    graph.add_output(Port("y", 0.1, -3), requantized(graph, "y", acc))
    graph.add_output(Port("raw", 0.1, 0), acc)
    assert emitted(graph).fused == []
    check([graph], tmp_path)


def test_a_skip_is_overwritten_in_place() -> None:
    lowered = emitted(residual())
    scratch = max(layer.scratch_bytes for layer in lowered.layers)
    assert lowered.arena_bytes == 2 * 8 * 8 * 4 + scratch
    assert "in place" in lowered.files["model.c"].decode()


@pytest.mark.parametrize("alias", [False, True])
def test_a_skip_that_the_convolution_still_reads_is_not_overwritten(
    tmp_path: Path, alias: bool
) -> None:
    graph = Graph("own input")
    x = graph.add_input(Port("x", 0.1, -3), TensorType(DType.I8, (1, 8, 8, 4)))
    first = requantized(graph, "first", conv(graph, x, 4, "c0"))
    skip = graph.add(Reshape((-1, 8, 8, 4)), first, name="same") if alias else first
    second = requantized(graph, "second", conv(graph, first, 4, "c1"), vals=[skip])
    last = requantized(graph, "last", conv(graph, second, 4, "c2"))
    graph.add_output(Port("y", 0.1, -3), last)
    check([graph], tmp_path)


def test_reshape_costs_nothing(tmp_path: Path) -> None:
    graph = Graph("flat")
    x = graph.add_input(Port("x", 0.1, -3), TensorType(DType.I8, (1, 2, 2, 3)))
    first = requantized(graph, "r", conv(graph, x, 3, "c"))
    flat = graph.add(Reshape((-1, 12)), first, name="flat")
    table = constant(graph, np.arange(-128, 128)[::-1].astype(np.int8))
    graph.add_output(Port("y", 0.1, -3), graph.add(Lut(), flat, table, name="y"))
    lowered = emitted(graph)
    assert list(lowered.stored) == ["r", "flat", "y"]
    assert [layer.kernel for layer in lowered.layers] == ["dot", "table"]
    check([graph], tmp_path)


def test_values_returned_twice_inputs_and_constants(tmp_path: Path) -> None:
    graph = Graph("odd")
    x = graph.add_input(Port("x", 0.1, -3), TensorType(DType.I8, (1, 4, 4, 2)))
    y = requantized(graph, "y", conv(graph, x, 2, "c"))
    for i, v in enumerate((y, y, x, constant(graph, np.array([[1, -2]], np.int16)))):
        graph.add_output(Port(f"o{i}", 0.1, 0), v)
    graph.add_output(Port("reshaped", 0.1, 0), graph.add(Reshape((-1, 32)), x, name="flat"))
    check([graph], tmp_path)


def test_run_refuses_null_and_misaligned(tmp_path: Path) -> None:
    lowered = emitted(residual())
    written(lowered, tmp_path)
    command = ["gcc", "-std=c99", "-shared", "-fPIC", "model.c", "-o", "net.so"]
    subprocess.run(command, cwd=tmp_path, check=True)
    run = ctypes.CDLL(str(tmp_path / "net.so")).net_run
    memory = ctypes.create_string_buffer(lowered.arena_bytes + 32)
    arena = ctypes.addressof(memory) + -ctypes.addressof(memory) % 16
    x, y = ctypes.create_string_buffer(256), ctypes.create_string_buffer(128)

    def call(*pointers: object) -> int:
        return int(run(*(ctypes.c_void_p(p) if isinstance(p, int) else p for p in pointers)))

    assert call(x, y, arena) == 0
    assert call(None, y, arena) == -1
    assert call(x, None, arena) == -1
    assert call(x, y, None) == -1
    assert call(x, y, arena + 1) == -1


def test_a_smaller_arena_does_not_compile(tmp_path: Path) -> None:
    written(emitted(residual()), tmp_path)
    header = tmp_path / "model.h"
    text = header.read_text()
    assert compiles(tmp_path)
    assert compiles(tmp_path, "-std=c11")
    arena = re.search(r"ARENA_BYTES (\d+)u", text)
    assert arena is not None
    header.write_text(text.replace(arena[1], str(int(arena[1]) - 1)))
    assert not compiles(tmp_path)
    assert not compiles(tmp_path, "-std=c11")


@settings(deadline=None, derandomize=True)
@given(st.floats(2**-40, 2**40, width=32), st.integers(-128, 127))
def test_scales_and_zero_points_round_trip(scale: float, zero: int) -> None:
    graph = Graph("port")
    x = graph.add_input(Port("x", scale, zero), TensorType(DType.I8, (1, 3)))
    graph.add_output(Port("y", scale, zero), x)
    header = emitted(graph).files["model.h"].decode()
    literal = re.search(r"NET_INPUT_0_SCALE (\S+)f$", header, re.MULTILINE)
    assert literal is not None
    assert np.float32(literal[1]) == np.float32(scale)
    assert re.fullmatch(r"\d+(\.\d+)?(e[+-]\d+)?", literal[1])
    assert "." in literal[1] or "e" in literal[1]
    assert f"NET_INPUT_0_ZERO {zero if zero >= 0 else f'({zero})'}\n" in header
    assert "#define NET_INPUT_0_SHAPE {1, 3}\n" in header


def test_what_has_no_kernel_is_refused_by_name() -> None:
    graph = Graph("cube")
    x = graph.add_input(Port("x", 0.1, 0), TensorType(DType.I8, (1, 3, 3, 3, 2)))
    w = constant(graph, np.ones((1, 1, 1, 1, 2), np.int8))
    op = Conv((1,) * 3, (0,) * 6, (1,) * 3)
    y = graph.add(op, x, w, constant(graph, np.zeros(1, np.int32)), name="the cube")
    graph.add_output(Port("y", 0.1, 0), y)
    with pytest.raises(Unsupported, match="the cube"):
        emitted(graph)


def test_variable_weights_are_refused_by_name() -> None:
    graph = Graph("attention")
    x = graph.add_input(Port("x", 0.1, 0), TensorType(DType.I8, (1, 4)))
    w = graph.add_input(Port("w", 0.1, 0), TensorType(DType.I8, (2, 4)))
    y = graph.add(MatMul(), x, w, constant(graph, np.zeros(2, np.int32)), name="the product")
    graph.add_output(Port("y", 0.1, 0), y)
    with pytest.raises(Unsupported, match="the product"):
        emitted(graph)


def test_a_product_with_its_rescale_is_one_step() -> None:
    graph = Graph("gate")
    x = graph.add_input(Port("x", 0.1, 0), TensorType(DType.I8, (1, 4, 4, 6)))
    s = graph.add_input(Port("s", 0.1, 0), TensorType(DType.I8, (1, 1, 1, 6)))
    y = requantized(graph, "y", graph.add(Mul(0, 0), x, s, name="product"))
    graph.add_output(Port("y", 0.1, 0), y)
    (step,) = fuse(graph)
    assert (step.node.name, step.output) == ("product", y)


def test_a_name_that_is_no_identifier_is_refused() -> None:
    with pytest.raises(ValueError, match="identifier"):
        lower(residual(), name="1x", isa="portable", vectors=())
