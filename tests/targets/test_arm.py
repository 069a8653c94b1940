"""The NEON kernels in the emulator against the interpreter, bit for bit; no core is given what it has not."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import BadInput
from qcompile.ir import Conv, DType, Graph, MatMul, Rescale, Value
from qcompile.targets.arm import _CPUS, TARGETS, _flags
from qcompile.targets.arm.depthwise import Depthwise, _Plan
from qcompile.targets.arm.kernels import DOTPROD, I8MM, PLAIN
from qcompile.targets.arm.plan import DOT, MULTIPLY, PAIRS
from qcompile.targets.arm.products import HEADER, Products
from qcompile.targets.arm.rescale import results
from qcompile.targets.c.build import Build
from qcompile.targets.c.count import count
from qcompile.targets.c.emit import fuse
from qcompile.targets.c.kernel import Kernel, Layer, Step
from qcompile.targets.c.kernels import PORTABLE
from tests.native import ZIG, check
from tests.strategies import Draw, feeds, singles
from tests.targets.test_mve_kernels import BATCHES, Maker, drawn_options

ARM = TARGETS["arm"]
KINDS = {"cortex-a72": PLAIN, "neoverse-n1": DOTPROD, "max": I8MM}
CODES = (DType.I8, DType.I8, DType.I8, DType.I4)


def emulate(
    graphs: Sequence[Graph], cpu: str, kernels: Sequence[Kernel] | None = None
) -> list[str]:
    """`check` on an emulated core."""
    with tempfile.TemporaryDirectory() as folder:
        return check(
            graphs,
            Path(folder),
            compiler=(*ZIG, "-target", "aarch64-linux-musl", *_flags(cpu), "-O1", "-fno-stack-protector"),
            link=("-nostdlib", "-static"),
            kernels=KINDS[cpu] if kernels is None else kernels,
            host="host_linux_aarch64.c",
            emulator=("qemu-aarch64", "-cpu", _CPUS[cpu].emulated),
        )  # fmt: skip


def convolution(maker: Maker, draw: Draw) -> Value:
    """Any shape: runs that fill no vector, one pixel, odd widths, wide borders, a skip connection."""
    one = lambda *choices: draw(st.sampled_from(choices))  # noqa: E731
    flat = one(False, False, True)
    channels, outputs = one(1, 3, 4, 8, 12, 16, 24, 32), one(1, 4, 10, 16, 18, 24, 33, 64)
    size = (one(1, 2, 5, 8), one(1, 2, 3, 7, 11, 18))[1 if flat else 0 :]
    kernel = [one(1, 1, 2, 3) for _ in size]
    pads = [one(0, 0, 1, 2, 3) for _ in (*size, *size)]
    dilation = [one(1, 1, 1, 2) for _ in size]
    for i, n in enumerate(size):
        while (kernel[i] - 1) * dilation[i] + 1 > n + pads[i] + pads[len(size) + i]:
            kernel[i] -= 1
    stride = tuple(one(1, 1, 2, 3) for _ in size)
    if draw(st.integers(0, 4)) == 0:
        kernel, pads = [1] * len(size), [0] * 2 * len(size)
    dtype = one(*CODES)
    x = maker.input(dtype, (one(1, 1, 2), *size, channels))
    op = Conv(stride, tuple(pads), tuple(dilation), 1, one(dtype.lo, dtype.hi, 5))
    w = maker.weights(outputs, *kernel, channels, dtype=one(DType.I8, DType.I8, DType.I4))
    total = maker.graph.add(op, x, w, maker.bias(outputs), name="c")
    out = one(DType.I8, DType.I8, DType.I8, DType.U8, DType.I16, DType.I32)
    if out is DType.I32:
        return total
    value = None
    if out is DType.I8 and draw(st.integers(0, 1)) == 0:
        value = maker.input(DType.I8, total.type.shape)
    return maker.rescale(total, out, value=value, **drawn_options(draw, out))


def product(maker: Maker, draw: Draw) -> Value:
    """MatMul of one row or of many."""
    one = lambda *choices: draw(st.sampled_from(choices))  # noqa: E731
    depth, outputs = one(1, 8, 16, 30, 64, 80), one(1, 8, 12, 70, 130, 144)
    x = maker.input(one(*CODES), (*one((1,), (1,), (2,), (5,), (2, 3)), depth))
    w = maker.weights(outputs, depth, dtype=one(DType.I8, DType.I8, DType.I4))
    total = maker.graph.add(MatMul(), x, w, maker.bias(outputs), name="m")
    out = one(DType.I8, DType.I8, DType.U8, DType.I16, DType.I32)
    if out is DType.I32:
        return total
    return maker.rescale(total, out, **drawn_options(draw, out))


def depthwise(maker: Maker, draw: Draw) -> Value:
    """Windows narrower and wider than four columns, weights small and large, channels that fill no vector."""
    one = lambda *choices: draw(st.sampled_from(choices))  # noqa: E731
    channels = one(2, 7, 8, 16, 24, 40)
    size = (one(3, 5, 8), one(3, 4, 7, 10))[one(0, 0, 1) :]
    kernel = [one(1, 2, 3, 3, 5) for _ in size]
    pads = [one(0, 1, 1, 2) for _ in (*size, *size)]
    dilation = [1 if k > n else one(1, 1, 2) for k, n in zip(kernel, size, strict=True)]
    for i, n in enumerate(size):
        while (kernel[i] - 1) * dilation[i] + 1 > n + pads[i] + pads[len(size) + i]:
            kernel[i] -= 1
    stride = tuple(one(1, 1, 2, 3) for _ in size)
    x = maker.input(DType.I8, (one(1, 1, 2), *size, channels))
    op = Conv(stride, tuple(pads), tuple(dilation), channels, one(-128, 127))
    most = one(20, 60, 127, 128)
    data = maker.rng.integers(-most, min(most, 127) + 1, (channels, *kernel, 1))
    w, b = maker.constant(DType.I8, data), maker.bias(channels)
    total = maker.graph.add(op, x, w, b, name="d")
    value = maker.input(DType.I8, total.type.shape) if one(False, False, True) else None
    return maker.rescale(total, DType.I8, value=value, clamp=one(False, False, True))


@st.composite
def layers(draw: Draw) -> Graph:
    """Layers side by side: one program is built faster than many."""
    maker = Maker(draw(st.integers(0, 1 << 32)))
    kinds = (convolution, convolution, convolution, depthwise, depthwise, product)
    return maker.done(*(kind(maker, draw) for kind in kinds))


def extremes(lowest: int) -> Graph:
    """Nothing but ends of ranges: the sums of every run are as large as they get."""
    maker = Maker(0)
    x = maker.input(DType.I8, (1, 3, 6, 32))
    made = []
    for least in (lowest, -lowest - 1):
        w = maker.constant(DType.I8, np.full((16, 3, 3, 32), least))
        op = Conv((1, 1), (1, 1, 1, 1), (1, 1), 1, -128)
        made.append(maker.graph.add(op, x, w, maker.bias(16), name="c"))
        deep = maker.constant(DType.I8, np.full((32, 3, 3, 1), least))
        op = Conv((1, 1), (1, 1, 1, 1), (1, 1), 32, -128)
        made.append(maker.graph.add(op, x, deep, maker.bias(32), name="d"))
    return maker.done(*(maker.rescale(v, DType.I8) for v in made))


def sums() -> Graph:
    """Convolutions to which a value of some type is added, with factors of 16 bits and more."""
    maker = Maker(4)
    x = maker.input(DType.I8, (1, 3, 6, 8))
    op = Conv((1, 1), (0, 0, 0, 0), (1, 1), 1, 0)
    made = []
    for dtype, zero, factor, out, clamp in (
        (DType.U8, 200, 31000, DType.I8, False),
        (DType.U8, 0, -70000, DType.U8, False),
        (DType.I4, -8, 40000, DType.U8, True),
        (DType.I8, 127, -32768, DType.I8, True),
    ):
        total = maker.graph.add(op, x, maker.weights(20, 1, 1, 8), maker.bias(20), name="c")
        spare = maker.input(DType.I8, total.type.shape)
        drawn = maker.rescale(total, DType.I8, value=spare, clamp=clamp).producer
        assert drawn is not None
        assert isinstance(drawn.op, Rescale)
        maker.graph.erase(drawn)
        rescale = replace(
            drawn.op,
            vals=(replace(drawn.op.vals[0], zero_point=zero, multiplier=(factor,)),),
            out=out,
            lo=max(out.lo, drawn.op.lo),
            zero_point=max(out.lo, drawn.op.zero_point),
        )
        value = maker.input(dtype, total.type.shape)
        made.append(maker.graph.add(rescale, total, value, name="r"))
    return maker.done(*made)


BATCH = st.tuples(*(layers() for _ in range(3)), singles("conv"), singles("rescale"))
USED = {
    "cortex-a72": {"neon", "neon depthwise"},
    "neoverse-n1": {"dotprod", "dotprod depthwise"},
    "max": {"i8mm", "dotprod", "dotprod depthwise"},
}


@pytest.mark.parametrize("cpu", KINDS)
def test_products_and_depthwise(cpu: str) -> None:
    seen: set[str] = set()

    @settings(BATCHES, max_examples=3)
    @given(BATCH)
    def run(graphs: Sequence[Graph]) -> None:
        seen.update(emulate(graphs, cpu))

    run()
    assert USED[cpu] <= seen


@pytest.mark.parametrize("cpu", KINDS)
def test_ends_of_ranges(cpu: str) -> None:
    emulate([extremes(-127), extremes(-128)], cpu)


@pytest.mark.parametrize("cpu", KINDS)
def test_added_values(cpu: str) -> None:
    used = emulate([sums()], cpu)
    assert not {k.name for k in PORTABLE} & set(used)


# --------------------------------------------------------------------------------------------- instructions


def network() -> Graph:
    """A convolution with a skip connection, a pointwise one, a dense layer, int16 results, a depthwise one."""
    maker = Maker(7)
    x, skip = maker.input(DType.I8, (1, 6, 7, 16)), maker.input(DType.I8, (1, 6, 7, 16))
    around = Conv((1, 1), (1, 1, 1, 1), (1, 1), 1, 9)
    alone = replace(around, groups=16)
    flat = Conv((1, 1), (0, 0, 0, 0), (1, 1), 1, 9)

    def conv(op: Conv, kernel: int, name: str) -> Value:
        w = maker.weights(16, kernel, kernel, 16 // op.groups)
        return maker.graph.add(op, x, w, maker.bias(16), name=name)

    row = maker.input(DType.I8, (1, 32))
    dense = maker.graph.add(MatMul(), row, maker.weights(16, 32), maker.bias(16), name="m")
    return maker.done(
        maker.rescale(conv(around, 3, "a"), DType.I8, value=skip),
        maker.rescale(conv(flat, 1, "b"), DType.I8, sixteen=False),
        maker.rescale(conv(around, 3, "e"), DType.I16, sixteen=False),
        maker.rescale(conv(alone, 3, "d"), DType.I8),
        maker.rescale(dense, DType.I8),
    )


# Encodings of the Arm Architecture Reference Manual, C4.1: (mask, value).
DOT_PRODUCTS = ((0x9F20FC00, 0x0E009400), (0x9F00F400, 0x0F00E000))
MATRIX_PRODUCTS = ((0xDFE0FC00, 0x4E80A400), (0xFFE0FC00, 0x4E80AC00))


def words(program: bytes) -> Iterator[int]:
    """The instructions of an object."""
    for section in ELFFile(BytesIO(program)).iter_sections():
        if section["sh_flags"] & 4:
            yield from np.frombuffer(section.data(), "<u4").tolist()


def emitted(graph: Graph, cpu: str, folder: Path) -> Path:
    folder.mkdir()
    for name, data in ARM.lower(graph, name="net", cpu=cpu, vectors=()).files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("cpu", ARM.cpus)
def test_a_core_is_given_only_what_it_has(cpu: str, tmp_path: Path) -> None:
    graph = network()
    folder = emitted(graph, cpu, tmp_path / "net")
    runner = ARM.runner(folder, graph, name="net", cpu=cpu)
    for row in feeds(graph, 0):
        wanted, found = graph.run(row), runner.run(row)
        assert all(np.array_equal(found[name], wanted[name]) for name in wanted)

    model = Build(folder, "net", runner.build.toolchain).model.read_bytes()
    has = {
        kind: any(w & mask == value for w in words(model) for mask, value in encodings)
        for kind, encodings in (("dotprod", DOT_PRODUCTS), ("i8mm", MATRIX_PRODUCTS))
    }
    features = _CPUS[cpu].features
    assert has == {kind: kind in features for kind in has}
    assert ARM.certify(folder, name="net", cpu=cpu).clean


def test_the_default_runs_on_every_core() -> None:
    assert (ARM.cpus[0], _CPUS[ARM.cpus[0]].features) == ("cortex-a53", "")


def test_an_unknown_core_is_named() -> None:
    with pytest.raises(BadInput, match=r"cortex-m4.*cortex-a53"):
        ARM.lower(network(), name="net", cpu="cortex-m4", vectors=())


# --------------------------------------------------------------------------------------- plans and costs


def measured() -> Graph:
    """Layers of some ten thousand instructions each."""
    maker = Maker(3)
    x, row = maker.input(DType.I8, (1, 14, 15, 32)), maker.input(DType.I8, (1, 256))
    image = maker.input(DType.I8, (1, 24, 24, 3))
    around = Conv((1, 1), (1, 1, 1, 1), (1, 1), 1, 9)
    flat = Conv((1, 1), (0, 0, 0, 0), (1, 1), 1, 9)
    halving = Conv((2, 2), (1, 1, 1, 1), (1, 1), 32, 9)

    def conv(op: Conv, v: Value, kernel: int, name: str) -> Value:
        w = maker.weights(32, kernel, kernel, v.type.shape[-1] // op.groups)
        return maker.rescale(maker.graph.add(op, v, w, maker.bias(32), name=name), DType.I8)

    dense = maker.graph.add(MatMul(), row, maker.weights(128, 256), maker.bias(128), name="dense")
    return maker.done(
        conv(around, x, 3, "square"),
        conv(flat, x, 1, "flat"),
        conv(around, image, 3, "first"),
        conv(replace(around, groups=32), x, 3, "depthwise"),
        conv(halving, x, 3, "halving"),
        maker.rescale(dense, DType.I8),
    )


@pytest.mark.parametrize("cpu", KINDS)
def test_costs_are_what_is_counted(cpu: str, tmp_path: Path) -> None:
    graph = measured()
    folder = emitted(graph, cpu, tmp_path / "net")
    layers = ARM.lower(graph, name="net", cpu=cpu, vectors=()).layers
    build = ARM.runner(folder, graph, name="net", cpu=cpu).build
    counted = count(build, graph, feeds(graph, 0, 1)[0], layers)
    for layer, found in zip(layers, counted.layers, strict=True):
        assert abs(layer.cost / found.executed - 1) < 0.2, (layer, found)


def test_groups_of_taps_never_leave_int16() -> None:
    for most in (10, 60, 127, 128):
        maker = Maker(most)
        x = maker.input(DType.I8, (1, 5, 5, 40))
        data = maker.rng.integers(-most, min(most, 127) + 1, (40, 3, 3, 1))
        op = Conv((1, 1), (1, 1, 1, 1), (1, 1), 40, 0)
        total = maker.graph.add(op, x, maker.constant(DType.I8, data), maker.bias(40), name="d")
        step = fuse(maker.done(maker.rescale(total, DType.I8)))[0]
        groups = _Plan(step, dots=False).tap_groups
        assert sorted(tap for group in groups for tap in group) == list(range(9))
        rows = data.reshape(40, 9)
        for group in groups:
            # The codes that make a channel's sum largest, and those that make it smallest.
            high = np.where(rows > 0, 127, -128) * rows
            low = np.where(rows > 0, -128, 127) * rows
            assert high[:, group].sum(axis=1).max() <= 32767
            assert low[:, group].sum(axis=1).min() >= -32768


def step_of(dtype: DType = DType.I8, lowest: int = -127, groups: int = 1) -> Step:
    maker = Maker(1)
    x = maker.input(dtype, (1, 4, 8, 16))
    data = np.full((16, 3, 3, 16 // groups), lowest)
    op = Conv((1, 1), (0, 0, 0, 0), (1, 1), groups, 0)
    total = maker.graph.add(op, x, maker.constant(DType.I8, data), maker.bias(16), name="c")
    return fuse(maker.done(maker.rescale(total, DType.I8)))[0]


@pytest.mark.parametrize(
    ("step", "taken"),
    [
        (step_of(), {"neon", "dotprod", "i8mm"}),
        # Two products of -128 by -128 leave 16 bits.
        (step_of(lowest=-128), {"dotprod", "i8mm"}),
        (step_of(groups=16), {"neon depthwise", "dotprod depthwise"}),
        (step_of(groups=2), set()),
        (step_of(DType.U8), set()),
        (step_of(DType.I16), set()),
    ],
)
def test_which_kernel_takes_what(step: Step, taken: set[str]) -> None:
    portable = {k.name for k in PORTABLE}
    assert {k.name for k in I8MM if k.matches(step)} - portable == taken


def test_several_accumulators_are_left_to_portable_kernels() -> None:
    maker = Maker(2)
    x = maker.input(DType.I8, (1, 4, 8, 16))
    op = Conv((1, 1), (0, 0, 0, 0), (1, 1), 1, 0)
    a, b = (
        maker.graph.add(op, x, maker.weights(16, 1, 1, 16), maker.bias(16), name=n) for n in "ab"
    )
    one = maker.rescale(a, DType.I8).producer
    assert one is not None
    both = replace(one.op, accs=one.op.accs * 2)  # type: ignore[arg-type,attr-defined]
    node = maker.graph.add(both, a, b, name="both").producer
    assert b.producer is not None
    assert results(Step(b.producer, node)) is None


# ------------------------------------------------------------------------------------------ planted faults

HEADER_FAULTS = {
    "order": ("neoverse-n1", "vqmovn_high_s32(vqmovn_s32(a), b)", "vqmovn_high_s32(vqmovn_s32(b), a)"),
    "odd multipliers": ("neoverse-n1", "vuzp2q_s32(", "vuzp1q_s32("),
    "zero point": ("neoverse-n1", "vdupq_n_s16(zero)", "vdupq_n_s16((int16_t)(zero - 1))"),
    "borders": ("cortex-a72", "to = neon_fill(to, value, between)", "to = neon_fill(to, 1, between)"),
    "four sums": ("cortex-a72", "vpaddq_s32(a, b), vpaddq_s32(c, d)", "vpaddq_s32(a, b), vpaddq_s32(d, c)"),
    "second pixel": ("max", "vzip2q_s64(vreinterpretq_s64_s32(a)", "vzip1q_s64(vreinterpretq_s64_s32(a)"),
    "pairs of pixels": ("max", "vzip2q_s64(first, second)", "vzip2q_s64(first, first)"),
    "four columns": ("neoverse-n1", "vzip2q_s16(low, low2)", "vzip1q_s16(low, low2)"),
}  # fmt: skip


@pytest.mark.parametrize("family", HEADER_FAULTS)
def test_a_fault_in_the_header_is_seen(family: str, tmp_path: Path) -> None:
    cpu, right, wrong = HEADER_FAULTS[family]
    text = HEADER.read_text()
    assert right in text
    header = tmp_path / HEADER.name
    header.write_text(text.replace(right, wrong))
    kernels = [
        replace(k, includes=(header,)) if isinstance(k, Products | Depthwise) else k
        for k in KINDS[cpu]
    ]
    with pytest.raises(AssertionError, match="graph 0, vector"):
        emulate([network()], cpu, kernels)


@dataclass(frozen=True)
class Faulty:
    """A kernel with one fault in what it renders."""

    kernel: Kernel
    fault: tuple[str, str]

    def __getattr__(self, name: str) -> object:
        return getattr(self.kernel, name)

    def body(self, layer: Layer) -> str:
        """Its statements with the fault."""
        text = self.kernel.body(layer)
        return text.replace(*self.fault)


@pytest.mark.parametrize(
    ("cpu", "kernel", "fault"),
    [
        ("neoverse-n1", Products(DOT), ("a1_0, 3, w)", "a1_0, 2, w)")),
        ("neoverse-n1", Depthwise(dots=True), ("t.val[1]", "t.val[0]")),
        ("max", Products(PAIRS), ("NEON_MATRIX(pair0_1, a0_0,", "NEON_MATRIX(pair0_1, a0_1,")),
        ("cortex-a72", Products(MULTIPLY), ("vmlal_high_s8(pairs0", "vmlsl_high_s8(pairs0")),
        ("cortex-a72", Depthwise(dots=False), ("vget_low_s16(high0)", "vget_low_s16(low0)")),
        ("cortex-a72", Products(MULTIPLY), ("vrshlq_s32(", "vshlq_s32(")),
    ],
)
def test_a_fault_in_a_kernel_is_seen(cpu: str, kernel: Kernel, fault: tuple[str, str]) -> None:
    with pytest.raises(AssertionError, match="graph 0, vector"):
        emulate([network()], cpu, (Faulty(kernel, fault), *PORTABLE))  # type: ignore[list-item]


@pytest.mark.parametrize("cpu", KINDS)
def test_without_a_fault_nothing_is_seen(cpu: str) -> None:
    used = emulate([network()], cpu)
    assert not {k.name for k in PORTABLE} & set(used)
