"""MaxPool of x86 against the interpreter, with every instruction set; see test_x86_gemm and test_x86_depthwise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from qcompile.ir import DType, Graph, Value, ops
from qcompile.targets.c.emit import fuse, lower
from qcompile.targets.c.kernel import Step
from qcompile.targets.c.kernels import PORTABLE
from qcompile.targets.x86 import isa
from qcompile.targets.x86.pool import MaxPool
from tests.native import check
from tests.targets.test_x86_depthwise import BYTES, Layers
from tests.targets.test_x86_gemm import way


@dataclass(frozen=True)
class Chosen(MaxPool):
    """The kernel wherever it matches, whatever it costs."""

    def cost(self, step: Step) -> int:
        return 0


class Pools(Layers):
    """Windows none of which lies wholly in the border."""

    def largest(self, x: Value) -> Value:
        while True:
            op = ops.MaxPool(*self.window(x.type.shape[1:-1], dilate=True))
            try:
                return self.graph.add(op, x, name="largest")
            except TypeError:
                continue


def drawn(seed: int) -> Graph:
    """Layers side by side."""
    maker = Pools(seed)
    return maker.done(*(maker.largest(maker.image(maker.one(*BYTES))) for _ in range(6)))


def chain(seed: int) -> Graph:
    """Each result is the next one's image: it may be overwritten while it is read."""
    maker = Pools(seed)
    x = maker.input(DType.I8, (int(maker.one(1, 2)), 12, 9, int(maker.one(8, 24, 70))))
    for _ in range(5):
        x = maker.largest(x)
    return maker.done(x)


@pytest.mark.parametrize("name", [*isa.ISAS, "words"])
def test_pools_equal_the_graph(tmp_path: Path, name: str) -> None:
    graphs, here = [*map(drawn, range(4)), *map(chain, range(4))], way(name)
    kernel = Chosen(here.isa)
    used = check(
        graphs,
        tmp_path,
        compiler=here.compiler,
        kernels=(kernel, *PORTABLE),
        emulator=here.emulator,
    )
    count = sum(kernel.matches(step) for graph in graphs for step in fuse(graph))
    assert used.count(kernel.name) == count > 20


def test_results_overwrite_what_was_read() -> None:
    texts = []
    for seed in range(16):
        model = lower(
            chain(seed), name="m", isa="x", vectors=[], kernels=(Chosen(isa.AVX2), *PORTABLE)
        )
        texts.append(model.files["model.c"].decode())
    assert sum("written over what has been read (maxpool-avx2)" in text for text in texts) >= 3


def test_what_compilers_do_as_well_is_left_to_them() -> None:
    def matched(kernel: tuple[int, int], pads: tuple[int, ...], x: DType = DType.I8) -> bool:
        maker = Pools(0)
        image = maker.input(x, (1, 8, 8, 16))
        made = maker.graph.add(ops.MaxPool(kernel, (2, 2), pads, (1, 1)), image, name="p")
        (step,) = fuse(maker.done(made))
        return MaxPool(isa.AVX2).matches(step)

    assert matched((3, 3), (1, 1, 1, 1))
    assert matched((2, 2), (0, 0, 1, 1))
    assert not matched((2, 2), (0, 0, 0, 0))
    assert not matched((3, 3), (1, 1, 1, 1), DType.I16)
