"""Every operator's emitted C against `Op.run`, bit for bit."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from qcompile.ir import Graph
from qcompile.targets.arm.dotprod import KERNELS
from qcompile.targets.c.kernels import PORTABLE
from tests.native import ZIG, check
from tests.strategies import OPERATORS, singles

# A batch is one build, so shrinking would build for minutes; a failure prints the one graph.
BATCHES = settings(
    deadline=None,
    derandomize=True,
    max_examples=4,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@BATCHES
@given(st.tuples(*(singles(o) for o in (*OPERATORS, "conv", "rescale", "conv", "rescale"))))
def test_every_operator_with_sanitizers(graphs: Sequence[Graph]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        used = check(graphs, Path(folder))
    assert len(used) >= len(graphs) - 1


@settings(BATCHES, max_examples=3)
@given(st.tuples(*(singles(o) for o in ("conv", "matmul", "rescale", "conv", "rescale"))))
def test_dot_product_kernels_in_the_emulator(graphs: Sequence[Graph]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(
            graphs,
            Path(folder),
            compiler=(*ZIG, "-target", "aarch64-linux-musl", "-mcpu=generic+dotprod", "-O2",
                      "-fno-stack-protector"),
            link=("-nostdlib", "-static"),
            kernels=KERNELS,
            host="host_linux_aarch64.c",
            emulator=("qemu-aarch64", "-cpu", "max"),
        )  # fmt: skip


@settings(BATCHES, max_examples=200)
@given(st.data())
def test_some_kernel_takes_every_operator(data: st.DataObject) -> None:
    from qcompile.targets.c.emit import fuse

    graph = data.draw(singles(data.draw(st.sampled_from(OPERATORS))))
    for step in fuse(graph):
        assert any(kernel.matches(step) for kernel in PORTABLE)
