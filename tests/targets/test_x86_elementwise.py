"""Rescale, Mul, Lut and Transpose of x86 against the interpreter, with every instruction set; see test_x86_gemm."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import pytest

from qcompile.ir import DType, Graph, Port, ops
from qcompile.ir.proof import prove
from qcompile.targets.c.emit import fuse, lower
from qcompile.targets.c.kernel import Step
from qcompile.targets.c.kernels import PORTABLE
from qcompile.targets.x86 import isa
from qcompile.targets.x86.elementwise import Elementwise
from qcompile.targets.x86.move import Transpose
from qcompile.targets.x86.table import Table
from tests.native import check
from tests.strategies import NARROW
from tests.targets.test_x86_gemm import Layers, way

BYTES = (DType.I8, DType.U8, DType.I8, DType.I4)


@dataclass(frozen=True)
class Chosen(Elementwise):
    """The kernel wherever it matches, whatever it costs."""

    def cost(self, step: Step) -> int:
        return 0


@dataclass(frozen=True)
class ChosenTable(Table):
    """The same."""

    def cost(self, step: Step) -> int:
        return 0


class Elements(Layers):
    """Elementwise operators of any types, broadcast either way, with extents around those of vectors."""

    def shape(self) -> tuple[int, ...]:
        last = self.one([1, 3, 16, 31, 33, 64, self.int(1, 200)])
        return (self.one([1, 1, 2]), *self.ints(self.int(0, 2), 1, 5), last)

    def rescales(self) -> None:
        shape = self.shape()
        vals = [
            self.input(self.one(NARROW), shape if not i else self.broadcastable(shape))
            for i in range(self.int(1, 3))
        ]
        self.rescaled([], vals, shape)

    def products(self) -> None:
        shape = self.shape()
        x = self.input(self.one(BYTES), shape)
        y = self.input(self.one(NARROW), self.broadcastable(shape))
        if self.flag():
            x, y = y, x
        zeros = (self.edge(v.type.dtype.lo, v.type.dtype.hi) for v in (x, y))
        total = self.add(ops.Mul(*zeros), x, y)
        if self.int(0, 4):
            vals = [self.input(self.one(NARROW), shape) for _ in range(self.int(0, 1))]
            self.rescaled([total], vals, shape)

    def tables(self) -> None:
        x = self.input(self.one(BYTES), self.shape())
        out = self.one((DType.I8, DType.U8, DType.I4))
        self.add(ops.Lut(), x, self.const(out, (1 << x.type.dtype.bits,), out.lo, out.hi))

    def done(self) -> Graph:
        for i, v in enumerate(v for v in self.values if not v.uses):
            self.graph.add_output(Port(f"output {i}", 0.25, 0), v)
        self.graph.verify()
        prove(self.graph)
        return self.graph


def drawn(seed: int) -> Graph:
    """Layers side by side."""
    maker = Elements(seed)
    for _ in range(5):
        maker.rescales()
        maker.products()
        maker.tables()
    return maker.done()


def transposes(seed: int) -> Graph:
    """Of up to four axes, some of which have whole tiles and some a part more."""
    maker = Elements(seed)
    for perm in permutations(range(1, 4)):
        shape = [maker.one([3, 16, 21, 33, 40]) for _ in perm]
        x = maker.input(maker.one((*BYTES, DType.I16)), (maker.int(1, 2), *shape))
        maker.add(ops.Transpose((0, *perm)), x)
    for shape in ((16, 16), (17, 100), (40, 15)):
        maker.add(ops.Transpose((0, 2, 1)), maker.input(DType.I8, (2, *shape)))
    return maker.done()


def chain(seed: int) -> Graph:
    """Each result is the next one's operand, and may overwrite it, also where their types differ in size."""
    maker = Elements(seed)
    shape = (1, maker.int(1, 5), maker.int(2, 150))
    v = maker.input(DType.I8, shape)
    for _ in range(8):
        if v.type.dtype in BYTES and maker.flag():
            out = maker.one((v.type.dtype, DType.U8))
            entries = maker.const(out, (1 << v.type.dtype.bits,), out.lo, out.hi)
            v = maker.add(ops.Lut(), v, entries)
        elif v.type.dtype is DType.I32:
            v = maker.rescaled([v], [], shape)
        else:
            v = maker.rescaled([], [v], shape)
    return maker.done()


@pytest.mark.parametrize("name", [*isa.ISAS, "words"])
def test_elements_equal_the_graph(tmp_path: Path, name: str) -> None:
    graphs, here = [*map(drawn, range(3)), *map(chain, range(4)), transposes(0)], way(name)
    kernels = (Chosen(here.isa), ChosenTable(here.isa), Transpose(here.isa))
    used = check(
        graphs,
        tmp_path,
        compiler=here.compiler,
        kernels=(*kernels, *PORTABLE),
        emulator=here.emulator,
    )
    for kernel, least in zip(kernels, (40, 15, 3), strict=True):
        count = sum(kernel.matches(step) for graph in graphs for step in fuse(graph))
        assert used.count(kernel.name) == count > least


def test_results_overwrite_what_was_read() -> None:
    kernels = (Chosen(isa.AVX2), ChosenTable(isa.AVX2), *PORTABLE)
    texts = []
    for seed in range(8):
        model = lower(chain(seed), name="m", isa="x", vectors=[], kernels=kernels)
        texts.append(model.files["model.c"].decode())
    comments = [line for text in texts for line in text.splitlines() if line.startswith("/*")]
    assert any("in place (elementwise-avx2)" in line for line in comments)
    assert any("in place (table-avx2)" in line for line in comments)
    assert any("written over what has been read (elementwise-avx2)" in line for line in comments)


def test_small_axes_are_left_to_the_compiler() -> None:
    def used(*shapes: tuple[int, ...]) -> str:
        maker = Elements(0)
        values = [maker.input(DType.I8, shape) for shape in shapes]
        maker.add(ops.Mul(0, 0), *values)
        kernels = (Elementwise(isa.AVX2), *PORTABLE)
        model = lower(maker.done(), name="m", isa="x", vectors=[], kernels=kernels)
        return model.layers[0].kernel

    assert used((1, 40, 64), (1, 40, 64)) == "elementwise-avx2"
    assert used((1, 40, 64), (64,)) == "elementwise-avx2"
    assert used((1, 640, 3), (1, 640, 3)) == "elementwise-avx2"
    assert used((1, 640, 3), (3,)) == "elementwise"
