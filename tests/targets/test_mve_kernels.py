"""The Helium kernels in the emulator against the interpreter, bit for bit."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from qcompile.ir import Conv, DType, Graph, MatMul, Port, Rescale, TensorType, Value
from qcompile.ir.arith import Acc, Val
from qcompile.ir.proof import accumulator_bound, prove, prove_rescale
from qcompile.targets import mcu
from qcompile.targets.c.build import Build
from qcompile.targets.c.count import count
from qcompile.targets.c.emit import fuse
from qcompile.targets.c.kernel import Kernel, Layer, Step
from qcompile.targets.c.text import render
from qcompile.targets.mcu.mve import HEADER, KERNELS, Products
from qcompile.targets.mcu.mve_depthwise import Depthwise, tap_groups
from qcompile.targets.mcu.mve_plan import Plan
from tests.native import WARNINGS, ZIG, check
from tests.strategies import Draw, feeds, singles

HERE = Path(mcu.__file__).parent
CORE = mcu._FAMILIES["cortex-m55"]["cortex-m55"]
FIRMWARE = ("-O2", "-fno-stack-protector", "-fno-unwind-tables", "-fno-asynchronous-unwind-tables")
# For the test's own main, as no C library comes with these compilers; clang 22 cannot always select instructions for
# its comparisons of a few bytes when it vectorises them for MVE. Only main includes host.h: the layers stay optimised.
STRING_H = """
#if defined(__clang__) && defined(QCOMPILE_HOST_H)
#pragma clang optimize off
#endif
#include <stddef.h>
void *memcpy(void *restrict to, const void *restrict from, size_t size);
void *memset(void *to, int value, size_t size);
"""
BUILDS = {
    "zig": ((*ZIG, *CORE.zig, *FIRMWARE), ("-nostdlib",)),
    "gcc": (
        ("arm-none-eabi-gcc", *CORE.gcc, CORE.float_abi, *FIRMWARE),
        ("-nostartfiles", "-nolibc"),
    ),
}

WEIGHTS = (DType.I8, DType.I8, DType.I4, DType.I4, DType.I2)

# A batch is one build, so shrinking would build for minutes; a failure prints the one graph.
BATCHES = settings(
    deadline=None,
    derandomize=True,
    max_examples=3,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def emulate(
    graphs: Sequence[Graph], kernels: Sequence[Kernel] = KERNELS, build: str = "zig"
) -> list[str]:
    """`check` on the emulated Cortex-M55."""
    compiler, link = BUILDS[build]
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "emulator.ld")
        Path(folder, "string.h").write_text(STRING_H)
        memory = {"rom": CORE.machine.rom, "constants": CORE.machine.constants}
        script.write_text(
            render(
                "emulator.ld.j2",
                HERE,
                **memory,
                ram=CORE.machine.ram,
                machine=CORE.machine.name,
                weights_section="",
                arena_section="",
            )
        )
        return check(
            graphs,
            Path(folder),
            compiler=(*compiler, f"-I{folder}"),
            warnings=WARNINGS,
            link=(*link, "-static", "-Wl,--entry=reset", "-T", str(script)),
            kernels=kernels,
            host=HERE / "host_cortex_m.c",
            emulator=mcu.emulator(CORE.machine),
        )


class Maker:
    """A graph of one Conv or MatMul and its Rescale, with constants that provably fit."""

    def __init__(self, seed: int) -> None:
        self.graph = Graph("g", free_batch=False)
        self.rng = np.random.default_rng(seed)

    def constant(self, dtype: DType, data: np.ndarray) -> Value:
        return self.graph.constant(data.astype(dtype.numpy), TensorType(dtype, data.shape), "c")

    def weights(self, *shape: int, dtype: DType = DType.I8) -> Value:
        lo, hi = max(dtype.lo, -127), dtype.hi
        wild = self.rng.integers(3) == 0
        data = self.rng.choice([lo, hi], shape) if wild else self.rng.integers(lo, hi + 1, shape)
        return self.constant(dtype, data)

    def bias(self, outputs: int) -> Value:
        return self.constant(DType.I32, self.rng.integers(-9999, 10000, outputs))

    def input(self, dtype: DType, shape: tuple[int, ...]) -> Value:
        port = Port(f"input {len(self.graph.inputs)}", 0.1, 0)
        return self.graph.add_input(port, TensorType(dtype, shape))

    def rescale(
        self,
        sum_: Value,
        out: DType,
        *,
        value: Value | None = None,
        sixteen: bool = True,
        clamp: bool = False,
        uniform: bool = False,
    ) -> Value:
        """Constants under which results reach both ends of their range."""
        rng, channels = self.rng, sum_.type.shape[-1]
        assert sum_.producer is not None
        bound = accumulator_bound(sum_.producer)
        m, p, f = [], [], []
        most = 24 if value is not None else 30
        for b in np.broadcast_to(bound, channels).tolist():
            scale = int(rng.integers(1 << 15, 1 << 16)) << 15
            if not sixteen:
                scale = int(rng.integers(1 << 30, 1 << 31))
            shift = max(0, 28 - int(b).bit_length()) if value is not None else 0
            reach = ((int(b) << shift) * scale) >> 32
            wanted = reach.bit_length() - out.bits + int(rng.integers(-1, 3))
            m.append(scale)
            p.append(shift)
            f.append(int(np.clip(wanted, 1, most)))
        if value is not None:
            f = [16] * channels
        if uniform:
            m, p, f = [m[0]] * channels, [min(p)] * channels, [max(f)] * channels
        factors = rng.integers(-70000, 70000, 1 if rng.integers(2) else channels)
        vals = (Val(tuple(factors.tolist()), int(rng.integers(-128, 128))),)
        lo, hi = (out.lo // 2, out.hi // 3) if clamp else (out.lo, out.hi)
        zero = int(rng.choice([out.lo, 0 if out.signed else 128, out.hi, 3]))
        op = Rescale(
            (Acc(tuple(m), tuple(p)),), vals if value is not None else (), tuple(f), zero, lo, hi, out
        )  # fmt: skip
        made = self.graph.add(op, sum_, *([value] if value is not None else []), name="r")
        assert made.producer is not None
        prove_rescale(made.producer)
        return made

    def done(self, *values: Value) -> Graph:
        for i, v in enumerate(values):
            self.graph.add_output(Port(f"output {i}", 0.25, 0), v)
        self.graph.verify()
        prove(self.graph)
        return self.graph


def drawn_options(draw: Draw, out: DType) -> dict[str, bool]:
    return {
        "sixteen": out is not DType.I16 and draw(st.integers(0, 4)) > 0,
        "clamp": draw(st.integers(0, 4)) == 0,
        "uniform": draw(st.integers(0, 4)) == 0,
    }  # type: ignore[operator]


@st.composite
def convolutions(draw: Draw) -> Graph:
    """Any shape: channels and depths that fill no vector, one pixel, odd widths, borders, a skip connection."""
    maker = Maker(draw(st.integers(0, 1 << 32)))
    one = lambda *choices: draw(st.sampled_from(choices))  # noqa: E731
    dtype = one(DType.I8, DType.I8, DType.I8, DType.U8, DType.I16)
    flat = one(False, False, True)
    channels, outputs = one(1, 3, 8, 16, 20, 32), one(1, 4, 10, 16, 16, 32, 48)
    size = (one(1, 2, 5, 8), one(1, 2, 3, 7, 34))[1 if flat else 0 :]
    kernel = [one(1, 1, 2, 3) for _ in size]
    pads = [one(0, 0, 1, 2) for _ in (*size, *size)]
    dilation = [1 if i == len(size) - 1 else one(1, 1, 2) for i in range(len(size))]
    for i, n in enumerate(size):
        while (kernel[i] - 1) * dilation[i] + 1 > n + pads[i] + pads[len(size) + i]:
            kernel[i] -= 1
    stride = tuple(one(1, 1, 2, 3) for _ in size)
    if draw(st.integers(0, 5)) == 0:
        kernel, pads = [1] * len(size), [0] * 2 * len(size)
    x = maker.input(dtype, (one(1, 1, 2), *size, channels))
    op = Conv(stride, tuple(pads), tuple(dilation), 1, one(dtype.lo, dtype.hi, 5))
    w = maker.weights(outputs, *kernel, channels, dtype=one(*WEIGHTS))
    total = maker.graph.add(op, x, w, maker.bias(outputs), name="c")
    out = one(DType.I8, DType.I8, DType.I8, DType.U8, DType.I16, DType.I32)
    if out is DType.I32:
        return maker.done(total)
    value = None
    if out is DType.I8 and draw(st.integers(0, 2)) == 0:
        value = maker.input(DType.I8, total.type.shape)
    return maker.done(maker.rescale(total, out, value=value, **drawn_options(draw, out)))


@st.composite
def products(draw: Draw) -> Graph:
    """MatMul of one row and of many."""
    maker = Maker(draw(st.integers(0, 1 << 32)))
    one = lambda *choices: draw(st.sampled_from(choices))  # noqa: E731
    dtype = one(DType.I8, DType.I8, DType.U8, DType.I16)
    depth, outputs = one(1, 8, 16, 30, 64, 80), one(1, 8, 12, 16, 48, 130, 144)
    x = maker.input(dtype, (*one((1,), (1,), (2,), (5,), (2, 3)), depth))
    w = maker.weights(outputs, depth, dtype=one(*WEIGHTS))
    total = maker.graph.add(MatMul(), x, w, maker.bias(outputs), name="m")
    out = one(DType.I8, DType.I8, DType.U8, DType.I16, DType.I32)
    if out is DType.I32:
        return maker.done(total)
    return maker.done(maker.rescale(total, out, **drawn_options(draw, out)))


@st.composite
def depthwise(draw: Draw) -> Graph:
    """Weights small and large, so that taps add up in one group or in many."""
    maker = Maker(draw(st.integers(0, 1 << 32)))
    one = lambda *choices: draw(st.sampled_from(choices))  # noqa: E731
    dtype = one(DType.I8, DType.I8, DType.U8, DType.I4)
    channels = one(2, 7, 16, 24, 64)
    size = (one(3, 5, 8), one(3, 4, 7))[one(0, 0, 1) :]
    kernel = [one(1, 2, 3, 3, 3) for _ in size]
    pads = [one(0, 1, 1, 2) for _ in (*size, *size)]
    dilation = [1 if k > n else one(1, 1, 2) for k, n in zip(kernel, size, strict=True)]
    for i, n in enumerate(size):
        while (kernel[i] - 1) * dilation[i] + 1 > n + pads[i] + pads[len(size) + i]:
            kernel[i] -= 1
    stride = tuple(one(1, 1, 2, 3) for _ in size)
    x = maker.input(dtype, (one(1, 1, 2), *size, channels))
    op = Conv(stride, tuple(pads), tuple(dilation), channels, one(dtype.lo, dtype.hi))
    most = one(20, 60, 127, 128)
    data = maker.rng.integers(-most, min(most, 127) + 1, (channels, *kernel, 1))
    w, b = maker.constant(DType.I8, data), maker.bias(channels)
    total = maker.graph.add(op, x, w, b, name="d")
    return maker.done(maker.rescale(total, DType.I8, clamp=one(False, False, True)))


def extremes() -> Graph:
    """Nothing but ends of ranges: the sums of every chunk are as large as they get."""
    maker = Maker(0)
    x = maker.input(DType.I8, (1, 3, 5, 32))
    w = maker.constant(DType.I8, np.full((16, 3, 3, 32), -128))
    op = Conv((1, 1), (1, 1, 1, 1), (1, 1), 1, -128)
    total = maker.graph.add(op, x, w, maker.bias(16), name="c")
    half = maker.constant(DType.I4, np.full((16, 3, 3, 32), -8))
    halves = maker.graph.add(op, x, half, maker.bias(16), name="h")
    deep = maker.constant(DType.I8, np.full((32, 3, 3, 1), -128))
    op = Conv((1, 1), (1, 1, 1, 1), (1, 1), 32, -128)
    sums = maker.graph.add(op, x, deep, maker.bias(32), name="d")
    return maker.done(*(maker.rescale(v, DType.I8) for v in (total, halves, sums)))


BATCH = st.tuples(
    *(convolutions() for _ in range(8)), *(products() for _ in range(4)), *(depthwise() for _ in range(4))
)  # fmt: skip


@BATCHES
@given(BATCH)
def test_products_and_depthwise(graphs: Sequence[Graph]) -> None:
    used = emulate([*graphs, extremes()])
    assert {"mve", "mve depthwise"} <= set(used)


@settings(BATCHES, max_examples=2)
@given(BATCH)
def test_with_gcc(graphs: Sequence[Graph]) -> None:
    assert {"mve", "mve depthwise"} <= set(emulate([*graphs, extremes()], build="gcc"))


@settings(BATCHES, max_examples=2)
@given(st.tuples(*(singles(o) for o in ("conv", "matmul", "rescale") * 4)))
def test_any_convolution_and_rescale(graphs: Sequence[Graph]) -> None:
    emulate(graphs)


@pytest.mark.parametrize(("wide", "outputs"), [(False, 16), (True, 16), (False, 20), (True, 20)])
def test_four_bit_weights_take_half_the_flash(wide: bool, outputs: int) -> None:
    def packed(dtype: DType, bias: int) -> int:
        maker = Maker(5)
        x = maker.input(DType.I16 if wide else DType.I8, (1, 3, 3, 32))
        w = maker.constant(dtype, np.full((outputs, 3, 3, 32), 3))
        b = maker.constant(DType.I32, np.full(outputs, bias))
        op = Conv((1, 1), (1, 1, 1, 1), (1, 1), 1, 0)
        total = maker.graph.add(op, x, w, b, name="c")
        out = maker.rescale(total, DType.I8, sixteen=outputs == 16)
        return Plan(fuse(maker.done(out))[0]).pack().nbytes - 4 * outputs

    assert packed(DType.I8, 0) == outputs * 9 * 32
    assert packed(DType.I4, 0) == outputs * 9 * 32 // 2
    # Sixteen times this sum would leave 32 bits.
    assert packed(DType.I4, 1 << 27) == outputs * 9 * 32


def test_groups_of_taps_never_leave_int16() -> None:
    for most in (10, 60, 127, 128):
        maker = Maker(most)
        x = maker.input(DType.I8, (1, 5, 5, 40))
        data = maker.rng.integers(-most, min(most, 127) + 1, (40, 3, 3, 1))
        op = Conv((1, 1), (1, 1, 1, 1), (1, 1), 40, 0)
        total = maker.graph.add(op, x, maker.constant(DType.I8, data), maker.bias(40), name="d")
        groups = tap_groups(fuse(maker.done(maker.rescale(total, DType.I8)))[0])
        assert sorted(tap for group in groups for tap in group) == list(range(9))
        rows = data.reshape(40, 9)
        for group in groups:
            # The codes that make a channel's sum largest, and those that make it smallest.
            high = np.where(rows > 0, 127, -128) * rows
            low = np.where(rows > 0, -128, 127) * rows
            assert high[:, group].sum(axis=1).max() <= 32767
            assert low[:, group].sum(axis=1).min() >= -32768
        assert len(groups) == {10: 1}.get(most, len(groups))


# ---------------------------------------------------------------------------------------- planted faults


@dataclass(frozen=True)
class Faulty(Depthwise):
    """The depthwise kernel with one fault in what it renders."""

    fault: tuple[str, str] = ("", "")

    def body(self, layer: Layer) -> str:
        """Its statements with the fault."""
        text = super().body(layer)
        assert self.fault[0] in text
        return text.replace(*self.fault)


def one_of_each() -> Graph:
    """A convolution with a skip connection, a plain one of bytes, a dense layer, int16 results, a depthwise one."""
    maker = Maker(7)
    x, skip = maker.input(DType.I8, (1, 4, 5, 16)), maker.input(DType.I8, (1, 4, 5, 16))
    pixels = maker.input(DType.U8, (1, 4, 5, 3))
    op = Conv((1, 1), (1, 1, 1, 1), (1, 1), 1, 9)

    def conv(v: Value, name: str, dtype: DType = DType.I8) -> Value:
        w = maker.weights(16, 3, 3, v.type.shape[-1], dtype=dtype)
        return maker.graph.add(op, v, w, maker.bias(16), name=name)

    made = [
        maker.rescale(conv(x, "a"), DType.I8, value=skip),
        maker.rescale(conv(pixels, "b"), DType.I8),
        maker.rescale(conv(x, "e"), DType.I16, sixteen=False),
        maker.rescale(conv(x, "h", DType.I4), DType.I8),
    ]
    row = maker.input(DType.I8, (1, 32))
    for dtype in (DType.I8, DType.I4):
        w = maker.weights(16, 32, dtype=dtype)
        dense = maker.graph.add(MatMul(), row, w, maker.bias(16), name=f"m{dtype}")
        made.append(maker.rescale(dense, DType.I8))
    alone = Conv((1, 1), (1, 1, 1, 1), (1, 1), 16, 9)
    w = maker.weights(16, 3, 3, 1)
    made.append(maker.rescale(maker.graph.add(alone, x, w, maker.bias(16), name="d"), DType.I8))
    return maker.done(*made)


HEADER_FAULTS = {
    "products of two pixels": ('" r10, q1, q3', '" r10, q0, q3'),
    "products of one pixel": ('" r12, q0, q1', '" r12, q0, q2'),
    "nibbles of two pixels": ('" r8, q1, q3\\n" \\\n    w " q3', '" r8, q1, q2\\n" \\\n    w " q3'),
    "nibbles of one pixel": ('" " first ", q0, q3', '" " first ", q0, " q "'),
    "sixteenths": ('"asr.w lr, lr, #4', '"asr.w lr, lr, #3'),
    "next pair of pixels": ("2 * step * (int)sizeof *x", "2 * step * (int)sizeof *x + 1"),
    "rounding": ("return vrshlq_s32(", "return vshlq_s32("),
    "zero point": ("vqmovntq_s32(half, top), zero)", "vqmovntq_s32(half, top), (int16_t)(zero - 1))"),
    "skip connection": ("vmovltq_s8(value), (int16_t)x_zero", "vmovltq_s8(value), (int16_t)(x_zero + 1)"),
    "int16 results": ("vsubq_s32(places, before)), zero)", "vsubq_s32(places, before)), zero + 1)"),
    "unsigned bytes": ("vdupq_n_u8(flip)", "vdupq_n_u8(flip & 0x40)"),
    "taps of a channel": ("vmulltq_int_s8(x, w)", "vmullbq_int_s8(x, w)"),
}  # fmt: skip


@pytest.mark.parametrize("family", HEADER_FAULTS)
def test_a_fault_in_a_micro_kernel_is_seen(family: str, tmp_path: Path) -> None:
    text = HEADER.read_text()
    assert HEADER_FAULTS[family][0] in text
    header = tmp_path / HEADER.name
    header.write_text(text.replace(*HEADER_FAULTS[family]))
    kernels = [replace(k, includes=(header,)) for k in (Products(), Depthwise())]
    with pytest.raises(AssertionError, match="graph 0, vector"):
        emulate([one_of_each()], kernels=(*kernels, *KERNELS[2:]))


@pytest.mark.parametrize(
    "fault", [("x1 += 16;", ""), ("next % 3", "next % 2"), ("b + 12", "b + 8")]
)
def test_a_fault_in_the_depthwise_kernel_is_seen(fault: tuple[str, str]) -> None:
    with pytest.raises(AssertionError, match="graph 0, vector"):
        emulate([one_of_each()], kernels=(Products(), Faulty(fault=fault), *KERNELS[2:]))


def measured() -> Graph:
    """Layers of a few thousand instructions each."""
    maker = Maker(3)
    x, row = maker.input(DType.I8, (1, 12, 12, 32)), maker.input(DType.I8, (1, 256))
    bytes_ = maker.input(DType.U8, (1, 12, 12, 3))
    around = Conv((1, 1), (1, 1, 1, 1), (1, 1), 1, 9)
    flat = Conv((1, 1), (0, 0, 0, 0), (1, 1), 1, 9)
    alone = Conv((1, 1), (1, 1, 1, 1), (1, 1), 32, 9)

    def conv(op: Conv, v: Value, name: str, most: int = 127, dtype: DType = DType.I8) -> Value:
        kernel = (1, 1) if op is flat else (3, 3)
        data = maker.rng.integers(-most, most + 1, (32, *kernel, v.type.shape[-1] // op.groups))
        w, b = maker.constant(dtype, data), maker.bias(32)
        return maker.graph.add(op, v, w, b, name=name)

    wide = maker.input(DType.I16, (1, 12, 12, 32))

    def dense(dtype: DType) -> Value:
        w = maker.weights(64, 256, dtype=dtype)
        return maker.graph.add(MatMul(), row, w, maker.bias(64), name=f"dense {dtype}")

    return maker.done(
        maker.rescale(conv(around, x, "square"), DType.I8),
        maker.rescale(conv(flat, x, "flat"), DType.I8),
        maker.rescale(conv(around, bytes_, "first"), DType.I8),
        maker.rescale(conv(alone, x, "depthwise"), DType.I8),
        maker.rescale(conv(alone, x, "light", most=20), DType.I8),
        maker.rescale(dense(DType.I8), DType.I8),
        maker.rescale(dense(DType.I4), DType.I8),
        maker.rescale(conv(around, x, "nibbles", 7, DType.I4), DType.I8),
        maker.rescale(conv(around, wide, "wide", 127), DType.I8),
        maker.rescale(conv(around, wide, "wide nibbles", 7, DType.I4), DType.I8),
    )


def test_costs_are_what_is_counted(tmp_path: Path) -> None:
    target, graph = mcu.TARGETS["cortex-m55"], measured()
    lowered = target.lower(graph, name="cost", cpu="cortex-m55", vectors=())
    for name, data in lowered.files.items():
        (tmp_path / name).write_bytes(data)
    assert isinstance(target, mcu.CortexM)
    toolchain = replace(
        target._toolchain("cortex-m55", tmp_path), emulator=mcu.emulator(CORE.machine)
    )
    built = Build(tmp_path, "cost", toolchain)
    counted = count(built, graph, feeds(graph, 0, 1)[0], lowered.layers)
    for layer, found in zip(lowered.layers, counted.layers, strict=True):
        assert abs(layer.cost / found.executed - 1) < 0.1, (layer, found)


def test_without_a_fault_nothing_is_seen() -> None:
    assert sorted(emulate([one_of_each()])) == ["mve"] * 6 + ["mve depthwise"]


@pytest.mark.parametrize("groups", [1, 2])
def test_what_it_does_not_take(groups: int) -> None:
    maker = Maker(1)
    x = maker.input(DType.I8, (1, 4, 8, 6))
    op = Conv((1, 1), (0, 0, 0, 0), (1, 2), groups, 0)
    w = maker.weights(4, 3, 3, 6 // groups)
    step: Step = fuse(maker.done(maker.graph.add(op, x, w, maker.bias(4), name="c")))[0]
    assert not any(k.matches(step) for k in (Products(), Depthwise()))
