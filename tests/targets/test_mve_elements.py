"""Helium's elementwise operators, poolings and tables in the emulator against the interpreter, and their costs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile import target as families
from qcompile.ir import DType, Graph, Lut, MaxPool, Mul, Rescale, SumPool, Value
from qcompile.ir.arith import Acc, Val
from qcompile.ir.proof import accumulator_bound, prove_rescale
from qcompile.targets import mcu
from qcompile.targets.c.build import Build
from qcompile.targets.c.count import count
from qcompile.targets.c.emit import fuse
from qcompile.targets.c.kernel import Kernel, Layer, Step
from qcompile.targets.mcu.mve import KERNELS
from qcompile.targets.mcu.mve_lanes import Elementwise
from qcompile.targets.mcu.mve_pool import Largest, Sums
from qcompile.targets.mcu.mve_portable import GatheredTable
from tests.strategies import Draw, feeds, singles
from tests.targets.test_mve_kernels import BATCHES, CORE, Maker, emulate

BYTES = (DType.I8, DType.I8, DType.I8, DType.U8, DType.I4)
NEW = {"mve elementwise", "mve largest", "mve sums", "mve table"}


class Elements(Maker):
    """Layers of elementwise operators and poolings, each on any value at hand."""

    def sum(self, values: Sequence[Value], out: DType, *, each: bool = False) -> Value:
        """A Rescale of values alone, with constants that reach both ends of the result's range."""
        channels = values[0].type.shape[-1]
        vals = []
        for v in values:
            factors = self.rng.integers(-60000, 60001, channels if each else 1)
            kind = v.type.dtype
            if kind.bits > 8:
                factors = factors // 256
            zero = int(self.rng.choice([kind.lo, kind.hi, 0, 3 % (kind.hi + 1)]))
            vals.append(Val(tuple(factors.tolist()), zero))
        f = (int(self.rng.integers(8, 17)),)
        zero = int(self.rng.choice([max(out.lo, -(1 << 30)), 0, min(out.hi, 1 << 30), 3]))
        lo = out.lo if self.rng.integers(3) else out.lo // 2
        return self._proved(Rescale((), tuple(vals), f, zero, lo, out.hi, out), *values)

    def scaled(self, total: Value, out: DType, *values: Value, each: bool = False) -> Value:
        """A Rescale of an accumulator, and of values beside it."""
        assert total.producer is not None
        bound = int(accumulator_bound(total.producer).max())
        channels = total.type.shape[-1] if each else 1
        multiplier = self.rng.integers(1 << 30, 1 << 31, channels)
        shift = max(0, 28 - bound.bit_length())
        f = max(1, ((bound << shift) >> 1).bit_length() - out.bits + int(self.rng.integers(-1, 2)))
        vals = tuple(Val((int(self.rng.integers(-999, 1000)),), v.type.dtype.lo) for v in values)
        acc = Acc(tuple(multiplier.tolist()), (shift,))
        zero = int(self.rng.choice([out.lo, 0, out.hi, 3]))
        op = Rescale((acc,), vals, (min(f, 30),), zero, out.lo, out.hi, out)
        return self._proved(op, total, *values)

    def _proved(self, op: Rescale, *values: Value) -> Value:
        made = self.graph.add(op, *values, name=f"r{len(self.graph.nodes)}")
        assert made.producer is not None
        prove_rescale(made.producer)
        return made

    def product(self, x: Value, y: Value) -> Value:
        """A Mul."""
        zeros = (int(self.rng.choice([v.type.dtype.lo, v.type.dtype.hi, 0])) for v in (x, y))
        return self.graph.add(Mul(*zeros), x, y, name=f"p{len(self.graph.nodes)}")

    def table(self, x: Value, out: DType) -> Value:
        """A Lut."""
        data = self.rng.integers(out.lo, out.hi + 1, 1 << x.type.dtype.bits)
        return self.graph.add(Lut(), x, self.constant(out, data), name=f"t{len(self.graph.nodes)}")

    def pool(self, kind: type[MaxPool | SumPool], x: Value, *window: tuple[int, ...]) -> Value:
        """Kernel, strides and pads."""
        kernel, strides, pads = window
        name = f"{kind.__name__}{len(self.graph.nodes)}"
        if kind is MaxPool:
            op = MaxPool(kernel, strides, pads, (1,) * len(kernel))
            return self.graph.add(op, x, name=name)
        zero = int(self.rng.choice([x.type.dtype.lo, x.type.dtype.hi, 0]))
        return self.graph.add(SumPool(kernel, strides, pads, zero), x, name=name)


def window(draw: Draw, spatial: Sequence[int], border: bool) -> tuple[tuple[int, ...], ...]:
    kernel = [min(n, draw(st.sampled_from([1, 2, 3, 3, n]))) for n in spatial]
    strides = [draw(st.integers(1, 3)) for _ in spatial]
    pads = [draw(st.integers(0, k - 1)) if border else 0 for k in (*kernel, *kernel)]
    return tuple(kernel), tuple(strides), tuple(pads)


@st.composite
def chains(draw: Draw) -> Graph:
    """Layers on each other's results, so that they are computed in place and into overlapping buffers."""
    maker = Elements(draw(st.integers(0, 1 << 32)))
    one = lambda *choices: draw(st.sampled_from(choices))  # noqa: E731
    channels = one(1, 3, 7, 8, 9, 16, 20, 32, 33, 40)
    spatial = (one(1, 2, 5, 8), one(1, 3, 4, 7))[one(0, 0, 1) :]
    shape = (one(1, 1, 2), *spatial, channels)
    dtype = one(*BYTES)
    x = maker.input(dtype, shape)
    first = maker.sum([x], one(DType.I8, DType.I8, DType.U8))
    other = maker.input(one(*BYTES, DType.I16), one(shape, shape, (1,) * len(shape), shape[-1:]))
    kind = one(DType.I8, DType.I8, DType.U8, DType.I16, DType.I32)
    added = maker.sum([first, other], kind, each=draw(st.integers(0, 3)) == 0)
    gate = maker.input(
        one(*BYTES, DType.I16), one(shape, (1,) * (len(shape) - 1) + (channels,), (1,))
    )
    total = maker.product(first, gate)
    more = [first] if draw(st.integers(0, 2)) == 0 else []
    gated = maker.scaled(total, DType.I8, *more, each=draw(st.integers(0, 3)) == 0)
    looked = maker.table(gated, one(DType.I8, DType.U8, DType.I16))
    made = [added, looked]
    for _ in range(2):
        largest = maker.pool(MaxPool, looked, *window(draw, spatial, border=one(True, False)))
        sums = maker.pool(SumPool, gated, *window(draw, spatial, border=one(True, False)))
        made += [largest, maker.scaled(sums, one(DType.I8, DType.U8, DType.I16))]
    return maker.done(*made)


@BATCHES
@given(
    st.tuples(*(chains() for _ in range(6)), *(singles(o) for o in ("mul", "rescale", "lut") * 3))
)
def test_every_element(graphs: Sequence[Graph]) -> None:
    assert "mve elementwise" in emulate(graphs)


@settings(BATCHES, max_examples=2)
@given(st.tuples(*(chains() for _ in range(6)), *(singles(o) for o in ("maxpool", "sumpool") * 4)))
def test_with_gcc(graphs: Sequence[Graph]) -> None:
    assert "mve elementwise" in emulate(graphs, build="gcc")


# ---------------------------------------------------------------------------------------- planted faults


def one_of_each() -> Graph:
    """Sums of one and two, a product, poolings with and without a border, a table; tails everywhere."""
    maker = Elements(11)
    x, y = (maker.input(DType.I8, (1, 5, 7, 20)) for _ in range(2))
    pixels = maker.input(DType.U8, (1, 5, 7, 20))
    around, alone = ((3, 3), (2, 2), (1, 1, 1, 1)), ((2, 2), (2, 2), (0, 0, 0, 0))
    sums = [maker.pool(SumPool, x, *w) for w in (around, alone)]
    return maker.done(
        maker.sum([x, y], DType.I8),
        maker.sum([pixels], DType.U8),
        maker.sum([x], DType.I8, each=True),
        maker.scaled(maker.product(x, y), DType.I8),
        maker.pool(MaxPool, x, *around),
        maker.table(x, DType.I8),
        *(maker.scaled(total, DType.I8) for total in sums),
    )


@dataclass(frozen=True)
class Faulty:
    """A kernel with one fault in what it renders, or in its header."""

    kernel: Kernel
    fault: tuple[str, str]

    def __getattr__(self, name: str) -> object:
        return getattr(self.kernel, name)

    def body(self, layer: Layer) -> str:
        """Its statements with the fault."""
        return self.kernel.body(layer).replace(*self.fault)


FAULTS: dict[str, tuple[Kernel, tuple[str, str]]] = {
    "rounding": (Elementwise(), ("vrshrq_n_s32", "vshrq_n_s32")),
    "odd elements": (Elementwise(), ("vmovltq_s16", "vmovlbq_s16")),
    "products": (Elementwise(), ("vmulltq_int_s16", "vmullbq_int_s16")),
    "the tail's lanes": (Elementwise(), ("vctp16q(4u)", "vctp16q(3u)")),
    "a factor for each channel": (Elementwise(), ("from1 += 4", "from1 += 0")),
    "largest in the border": (Largest(), ("clamp(oy * 2 - 1, 0, 4)", "oy * 2")),
    "largest of a tail": (Largest(), ("vctp8q(4u)", "vctp8q(3u)")),
    "sums in a border": (Sums(), ("first_x = ix < 0 ? 0 : ix", "first_x = 1")),
    "sums without one": (Sums(), ("vaddq_s16(v0, ", "vsubq_s16(v0, ")),
    "table": (GatheredTable(), (", 128)", ", 127)")),
}  # fmt: skip


@pytest.mark.parametrize("family", FAULTS)
def test_a_fault_is_seen(family: str) -> None:
    kernel, fault = FAULTS[family]
    kernels = [Faulty(k, fault) if k == kernel else k for k in KERNELS]
    bodies = [kernel.body(_layer(s)) for s in fuse(one_of_each()) if kernel.matches(s)]
    assert any(fault[0] in body for body in bodies), bodies
    with pytest.raises(AssertionError, match="graph 0, vector"):
        emulate([one_of_each()], kernels=kernels)


def _layer(step: Step) -> Layer:
    return Layer(step, {v: "x" for v in step.reads}, lambda role, _: role)


@pytest.mark.parametrize("fault", [("low(sum)), less", "low(sum)), less + 1"), ("high(sum)", "low(sum)"),
                                   ("row += pitch", "row += pitch - 1")])  # fmt: skip
def test_a_fault_in_the_sums_is_seen(fault: tuple[str, str], tmp_path: Path) -> None:
    (source,) = (h for h in Sums().includes if isinstance(h, Path))
    text = source.read_text()
    assert fault[0] in text
    header = tmp_path / source.name
    header.write_text(text.replace(*fault))
    kernels = [replace(k, includes=(header,)) if isinstance(k, Sums) else k for k in KERNELS]
    with pytest.raises(AssertionError, match="graph 0, vector"):
        emulate([one_of_each()], kernels=kernels)


def test_without_a_fault_nothing_is_seen() -> None:
    assert set(emulate([one_of_each()])) == NEW


# ------------------------------------------------------------------------------------------------ costs


def measured() -> Graph:
    """Layers of a thousand instructions and more."""
    maker = Elements(3)
    x, y = (maker.input(DType.I8, (1, 12, 12, 64)) for _ in range(2))
    gate = maker.input(DType.I8, (1, 1, 1, 64))
    around, alone = ((3, 3), (2, 2), (1, 1, 1, 1)), ((2, 2), (2, 2), (0, 0, 0, 0))
    whole = ((12, 12), (1, 1), (0, 0, 0, 0))
    return maker.done(
        maker.sum([x, y], DType.I8),
        maker.sum([x], DType.I8),
        maker.scaled(maker.product(x, y), DType.I8),
        maker.scaled(maker.product(x, gate), DType.I8),
        maker.table(x, DType.I8),
        maker.pool(MaxPool, x, *around),
        maker.pool(MaxPool, x, *alone),
        *(maker.scaled(maker.pool(SumPool, x, *w), DType.I8) for w in (alone, whole)),
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
        assert abs(layer.cost / found.executed - 1) < 0.06, (layer, found)


# ---------------------------------------------------------------------------------------- the self-test


@pytest.mark.parametrize("out", [DType.I8, DType.U8, DType.I16])
def test_the_self_test_builds_with_zig(tmp_path: Path, out: DType) -> None:
    maker = Elements(2)
    graph = maker.done(maker.sum([maker.input(DType.I8, (1, 4, 4, 16))], out))
    found = families.get("cortex-m55")
    lowered = found.lower(graph, name="net", cpu="cortex-m55", vectors=feeds(graph, 0, 2))
    for name, content in lowered.files.items():
        (tmp_path / name).write_bytes(content)
    zig = f"{sys.executable} -m ziglang cc {' '.join(CORE.zig)}"
    tools = (f"CC={zig}", f"AR={sys.executable} -m ziglang ar", "LINK=-nostdlib")
    done = subprocess.run(
        ["make", "-C", str(tmp_path), "test", *tools, "TARGET_FLAGS=", "FLOAT_ABI="],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "net: 2 vectors, 0 mismatches" in done.stdout


def test_what_is_left_to_portable_code() -> None:
    maker = Elements(1)
    x = maker.input(DType.I8, (1, 17, 17, 4))
    spread = maker.graph.add(MaxPool((2, 2), (1, 1), (0, 0, 0, 0), (2, 2)), x, name="spread")
    many = maker.pool(SumPool, x, (17, 17), (1, 1), (0, 0, 0, 0))
    beyond = maker.pool(SumPool, x, (1, 1), (2, 2), (1, 1, 1, 1))
    kernels = (Largest(), Sums())
    graph = maker.done(spread, *(maker.scaled(v, DType.I8) for v in (many, beyond)))
    assert not any(k.matches(step) for k in kernels for step in fuse(graph))
    assert set(emulate([graph])) == {"pool"}
