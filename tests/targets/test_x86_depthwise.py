"""Depthwise Conv and SumPool of x86 against the interpreter, with every instruction set; see test_x86_gemm."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from qcompile.ir import DType, Graph, Value, ops
from qcompile.targets.c.emit import fuse, lower
from qcompile.targets.c.kernel import Step
from qcompile.targets.c.kernels import PORTABLE
from qcompile.targets.c.window import window_of
from qcompile.targets.x86 import isa
from qcompile.targets.x86.depthwise import Depthwise, ranked
from tests.native import check
from tests.targets.test_mve_kernels import Maker
from tests.targets.test_x86_gemm import way

BYTES = (DType.I8, DType.U8, DType.I8, DType.I4)


class Layers(Maker):
    """Depthwise Conv and SumPool with any window, and the Rescale that reads their sums; drawn evenly."""

    def one(self, *choices: object) -> object:
        return choices[self.rng.integers(len(choices))]

    def window(self, size: tuple[int, ...], dilate: bool) -> tuple[tuple[int, ...], ...]:
        """Kernel, strides, pads, dilations that fit."""
        rng = self.rng
        kernel = [int(self.one(1, 2, 3, 3, 3, 5, 7)) for _ in size]
        dilations = [int(self.one(1, 1, 1, 2, 3)) if dilate else 1 for _ in size]
        pads = [int(p) for p in rng.integers(0, 4, 2 * len(size)) * rng.integers(2)]
        for i, n in enumerate(size):
            while (kernel[i] - 1) * dilations[i] + 1 > n + pads[i] + pads[len(size) + i]:
                kernel[i] -= 1
        return (
            tuple(kernel),
            tuple(int(self.one(1, 1, 2, 3)) for _ in size),
            tuple(pads),
            tuple(dilations),
        )

    def image(self, dtype: DType) -> Value:
        channels = int(self.one(1, 3, 8, 16, 24, 32, 40, 63, 64, 65, 96, 128, 150))
        size = self.rng.integers(1, 11, self.one(1, 2, 2, 2)).tolist()
        return self.input(dtype, (int(self.one(1, 1, 2)), *size, channels))

    def depthwise(self, x: Value) -> Value:
        kernel, strides, pads, dilations = self.window(x.type.shape[1:-1], dilate=True)
        fill, channels = int(self.one(x.type.dtype.lo, x.type.dtype.hi, 1)), x.type.shape[-1]
        w = self.weights(channels, *kernel, 1, dtype=self.one(DType.I8, DType.I8, DType.I4))
        op = ops.Conv(strides, pads, dilations, channels, fill)
        return self.graph.add(op, x, w, self.bias(channels), name="depthwise")

    def sums(self, x: Value) -> Value:
        kernel, strides, pads, _ = self.window(x.type.shape[1:-1], dilate=False)
        zero = int(self.one(x.type.dtype.lo, x.type.dtype.hi, 3))
        return self.graph.add(ops.SumPool(kernel, strides, pads, zero), x, name="sums")

    def layer(self, x: Value, out: DType) -> Value:
        total = self.sums(x) if self.rng.integers(4) == 0 else self.depthwise(x)
        options = {"clamp": bool(self.rng.integers(2)), "uniform": self.rng.integers(3) == 0}
        return self.rescale(total, out, **options)


def drawn(seed: int) -> Graph:
    """Layers side by side."""
    maker = Layers(seed)
    kinds = [maker.one(*BYTES) for _ in range(4)]
    return maker.done(*(maker.layer(maker.image(k), maker.one(*BYTES, DType.I16)) for k in kinds))


def chain(seed: int) -> Graph:
    """Each layer's result is the next one's image: it may be overwritten while it is read."""
    maker = Layers(seed)
    x = maker.input(DType.I8, (int(maker.one(1, 2)), 12, 9, int(maker.one(8, 24, 70))))
    for _ in range(5):
        x = maker.layer(x, DType.I8)
    return maker.done(x)


@dataclass(frozen=True)
class Chosen(Depthwise):
    """The kernel wherever it matches, whatever it costs."""

    def cost(self, step: Step) -> int:
        return 0


@pytest.mark.parametrize("name", [*isa.ISAS, "words"])
def test_layers_equal_the_graph(tmp_path: Path, name: str) -> None:
    graphs = [*map(drawn, range(3)), *map(chain, (2, 3)), extremes()]
    here, kernel = way(name), Chosen(way(name).isa)
    used = check(
        graphs,
        tmp_path,
        compiler=here.compiler,
        kernels=(kernel, *PORTABLE),
        emulator=here.emulator,
    )
    count = sum(kernel.matches(step) for graph in graphs for step in fuse(graph))
    assert used.count(kernel.name) == count > 15


def extremes() -> Graph:
    """The largest sums of flipped bytes: all ends of ranges."""
    maker = Maker(1)
    values = []
    for lowest in (-128, 127):
        x = maker.input(DType.I8, (1, 5, 6, 65))
        w = maker.constant(DType.I8, np.full((65, 7, 7, 1), lowest))
        op = ops.Conv((1, 1), (3, 3, 3, 3), (1, 1), 65, -128)
        values.append(maker.graph.add(op, x, w, maker.bias(65), name="d"))
    return maker.done(*(maker.rescale(v, DType.I8) for v in values))


def test_results_overwrite_what_was_read() -> None:
    texts = []
    for seed in range(8):
        model = lower(
            chain(seed), name="m", isa="x", vectors=[], kernels=(Depthwise(isa.AVX2), *PORTABLE)
        )
        texts.append(model.files["model.c"].decode())
    assert sum("written over what has been read (depthwise-avx2)" in text for text in texts) >= 3


def test_a_small_image_has_the_channels_of_several_pixels_in_a_register() -> None:
    def tile(channels: int, stride: int = 1) -> tuple[bool, int]:
        maker = Layers(0)
        x = maker.input(DType.I8, (1, 24, 24, channels))
        op = ops.Conv((stride, stride), (1, 1, 1, 1), (1, 1), channels, 0)
        w, b = maker.weights(channels, 3, 3, 1), maker.bias(channels)
        total = maker.graph.add(op, x, w, b, name="d")
        assert total.producer is not None
        found, _ = ranked(isa.AVX512_VNNI, window_of(total.producer))[0]
        return found.joined, len(found.weights)

    assert tile(8)[0]
    assert tile(16, 2)[0]
    assert not tile(64)[0]
    # Three taps a row; of two neighbours they stand at two places.
    assert tile(64) == (False, 6)


def test_other_sums_are_left_to_other_kernels() -> None:
    def steps(x: DType, out: DType, times: int, residual: bool) -> Step:
        maker = Layers(3)
        image = maker.input(x, (1, 4, 4, 8))
        op = ops.Conv((1, 1), (0, 0, 0, 0), (1, 1), 8, 0)
        w = maker.weights(8 * times, 3, 3, 1)
        total = maker.graph.add(op, image, w, maker.bias(8 * times), name="d")
        other = maker.input(DType.I8, total.type.shape) if residual else None
        (step,) = fuse(maker.done(maker.rescale(total, out, value=other)))
        return step

    kernel = Depthwise(isa.AVX2)
    assert kernel.matches(steps(DType.I8, DType.I8, 1, residual=False))
    assert not kernel.matches(steps(DType.I16, DType.I8, 1, residual=False))
    assert kernel.matches(steps(DType.I8, DType.I16, 1, residual=False))
    assert not kernel.matches(steps(DType.I8, DType.I8, 2, residual=False))
    assert not kernel.matches(steps(DType.I8, DType.I8, 1, residual=True))
