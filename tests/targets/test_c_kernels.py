"""Every operator's emitted C against `Op.run`, bit for bit."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from qcompile.ir import Conv, DType, Graph, MatMul, Port, TensorType, Value, ops
from qcompile.ir.arith import inverse_root
from qcompile.targets.arm.kernels import DOTPROD as KERNELS
from qcompile.targets.c.emit import fuse, lower
from qcompile.targets.c.kernels import PORTABLE
from qcompile.targets.hexagon import hvx
from qcompile.targets.mcu import dsp, mve
from tests.ir.test_attention import roots
from tests.native import SANITIZED, ZIG, check
from tests.strategies import OPERATORS, singles

# A batch is one build, so shrinking would build for minutes; a failure prints the one graph.
BATCHES = settings(
    deadline=None,
    derandomize=True,
    max_examples=4,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def wide(x_type: DType = DType.I8) -> Graph:
    """Sums over several vectors, a last block of channels and of pixels that is not full."""
    graph, rng = Graph("wide", free_batch=False), np.random.default_rng(0)

    def constant(dtype: DType, *shape: int) -> Value:
        data = rng.integers(max(dtype.lo, -9999), min(dtype.hi, 9999) + 1, shape)
        return graph.constant(data.astype(dtype.numpy), TensorType(dtype, shape), "constant")

    x = graph.add_input(Port("x", 1.0, 0), TensorType(x_type, (2, 7, 6, 20)))
    conv = Conv((1, 1), (1, 1, 1, 1), (1, 1), pad_value=5)
    w = constant(DType.I8, 13, 3, 3, 20)
    graph.add_output(Port("conv", 1.0, 0), graph.add(conv, x, w, constant(DType.I32, 13), name="c"))
    v = graph.add_input(Port("v", 1.0, 0), TensorType(x_type, (3, 50)))
    y = graph.add(MatMul(), v, constant(DType.I8, 21, 50), constant(DType.I32, 21), name="m")
    graph.add_output(Port("product", 1.0, 0), y)
    deep = Conv((1, 1), (2, 2, 2, 2), (1, 1), groups=20, pad_value=-7)
    w = constant(DType.I8, 20, 5, 5, 1)
    y = graph.add(deep, x, w, constant(DType.I32, 20), name="d")
    graph.add_output(Port("depthwise", 1.0, 0), y)
    return graph


def picks() -> Graph:
    """Take in every form: runs, pieces of one length, single elements, tables of every type; ArgExtreme of any axis."""
    graph = Graph("picks", free_batch=False)
    x = graph.add_input(Port("x", 1.0, 0), TensorType(DType.I8, (2, 6, 3, 2)))
    long = graph.add_input(Port("long", 1.0, 0), TensorType(DType.I16, (1, 40000)))
    swapped = tuple(i ^ 2 for i in range(512))
    made: list[tuple[ops.Op, Value]] = [
        (ops.Take(1, (3, 4, 5, 0, 1)), x),
        (ops.Take(2, (2, 1)), x),
        (ops.Take(3, (1,)), x),
        (ops.Take(1, (4, 5, 2, 3, 0, 1, 4, 5, 0, 1)), x),
        (ops.Take(1, (5, 4, 3, 2, 1, 0)), x),
        (ops.Take(3, (0, 0, 1, 1, 0, 0, 1)), x),
        (ops.Take(1, swapped), long),
        (ops.Take(1, tuple(range(39999, 0, -4321))), long),
        *((ops.ArgExtreme(axis, axis != 2, axis == 3), x) for axis in (1, 2, 3)),
    ]
    for i, (op, v) in enumerate(made):
        graph.add_output(Port(f"y{i}", 1.0, 0), graph.add(op, v, name=f"y{i}"))
    return graph


@BATCHES
@given(st.tuples(*(singles(o) for o in (*OPERATORS, "conv", "rescale", "conv", "rescale"))))
def test_every_operator_with_sanitizers(graphs: Sequence[Graph]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        used = check([*graphs, wide(), wide(DType.I16), picks()], Path(folder))
    assert {kernel.name for kernel in PORTABLE} == set(used)


@settings(BATCHES, max_examples=3)
@given(st.tuples(*(singles(o) for o in ("conv", "matmul", "rescale", "conv", "rescale"))))
def test_dot_product_kernels_in_the_emulator(graphs: Sequence[Graph]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        used = check(
            [*graphs, wide()],
            Path(folder),
            compiler=(*ZIG, "-target", "aarch64-linux-musl", "-mcpu=generic+dotprod", "-O2",
                      "-fno-stack-protector"),
            link=("-nostdlib", "-static"),
            kernels=KERNELS,
            host="host_linux_aarch64.c",
            emulator=("qemu-aarch64", "-cpu", "max"),
        )  # fmt: skip
    assert "dotprod" in used


def test_the_inverse_root_in_c_is_the_interpreters(tmp_path: Path) -> None:
    values = np.array(roots(), np.int64)
    graph = Graph("root")
    x = graph.add_input(Port("x", 1.0, 0), TensorType(DType.I8, (1, 1)))
    graph.add_output(Port("y", 1.0, 0), x)
    made = lower(graph, name="root", isa="test", vectors=[])
    (tmp_path / "arith.h").write_bytes(made.files["arith.h"])
    (tmp_path / "main.c").write_text(
        '#include "arith.h"\n#include <stdio.h>\n'
        "int main(void) { int64_t v[3]; int k = 0; while (fread(v, 8, 1, stdin) == 1) {"
        " v[1] = inverse_root(v[0], &k); v[2] = k; fwrite(v, 8, 3, stdout); } return 0; }"
    )
    subprocess.run(["gcc", *SANITIZED, "main.c", "-o", "main"], cwd=tmp_path, check=True)
    ran = subprocess.run(
        [tmp_path / "main"], input=values.tobytes(), capture_output=True, check=True
    )
    found = np.frombuffer(ran.stdout, np.int64).reshape(-1, 3).T
    for got, want in zip(found, (values, *inverse_root(values)), strict=True):
        np.testing.assert_array_equal(got, want)


@settings(BATCHES, max_examples=200)
@given(st.data())
def test_some_kernel_takes_every_operator(data: st.DataObject) -> None:
    graph = data.draw(singles(data.draw(st.sampled_from(OPERATORS))))
    for step in fuse(graph):
        for kernels in (PORTABLE, KERNELS, dsp.KERNELS, hvx.KERNELS, mve.KERNELS):
            assert any(kernel.matches(step) for kernel in kernels)
