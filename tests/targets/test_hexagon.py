"""Hexagon: HVX kernels, start-up and build files in the emulator against the integer graph; the decoder for floats."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from qcompile.errors import BadInput, ToolchainMissing
from qcompile.ir import DType, Graph, Port, Rescale, TensorType, Value, arith, ops
from qcompile.ir.proof import code_range, prove, prove_rescale
from qcompile.targets import hexagon
from qcompile.targets.c import build, certify, emit
from qcompile.targets.hexagon import decode, hvx
from qcompile.verify import verify
from tests import native
from tests.native import ZIG
from tests.strategies import Maker, graphs, singles
from tests.targets.test_families import NAME, data, network, same

TARGET = hexagon.TARGETS["hexagon"]
HERE = Path(hexagon.__file__).parent
HOST = HERE / "host_linux_hexagon.c"
COMPILER = (
    *ZIG, "-target", "hexagon-linux-musl", "-mcpu=hexagonv66+hvx_length128b+hvxv66", "-O2",
    "-fno-stack-protector",
)  # fmt: skip
LINK = ("-nostdlib", "-static")
# The portable kernels ask whether a window wider than its operand lies inside it.
WARNINGS = (*native.WARNINGS, "-Wno-tautological-overlap-compare")
FAMILIES = {"hvx-pixels", "hvx-dense", "hvx-windows"}
BATCHES = settings(
    deadline=None,
    derandomize=True,
    max_examples=3,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def check(made: Sequence[Graph], folder: Path) -> list[str]:
    """Every stored value in the emulator against the interpreter."""
    return native.check(
        made, folder, compiler=COMPILER, warnings=WARNINGS, link=LINK, kernels=hvx.KERNELS, host=HOST,
        emulator=("qemu-hexagon",),
    )  # fmt: skip


# ------------------------------------------------------------------------------------- random layers


class Layers(Maker):
    """Convolutions, products and pools as wide as networks have them, rescaled as passes do and at random."""

    def image_of(self, channels: Sequence[int]) -> Value:
        """One or two images of any size, mostly of bytes."""
        dtype = self.one([DType.I8, DType.I8, DType.I8, DType.U8, DType.I4, DType.I16])
        spatial = self.ints(self.one([1, 2, 2, 2]), 1, self.one([4, 9, 34]))
        if len(spatial) == 2:
            spatial = (min(spatial[0], 9), spatial[1])
        return self.input(dtype, (self.one([1, 1, 1, 2]), *spatial, self.one(channels)))

    def weights(self, *shape: int) -> Value:
        """Of 8 or fewer bits."""
        dtype = self.one([DType.I8, DType.I8, DType.I4])
        return self.const(dtype, shape, dtype.lo, dtype.hi)

    def wide_conv(self, depthwise: bool) -> Value:
        """Of one group, or with a channel a group."""
        x = self.image_of([1, 2, 3, 4, 5, 8, 12, 16, 24, 32, 40, 64, 130])
        *spatial, channels = x.type.shape[1:]
        kernel, strides, pads, dilations = self.window(tuple(spatial), dilate=True, most=5)
        outputs = channels if depthwise else self.one([1, 3, 4, 8, 10, 16, 20, 32, 44])
        w = self.weights(outputs, *kernel, 1 if depthwise else channels)
        fill = self.edge(x.type.dtype.lo, x.type.dtype.hi)
        b = self.bias(x.type.dtype, w.constant, fill)
        groups = channels if depthwise else 1
        return self.add(ops.Conv(strides, pads, dilations, groups, fill), x, w, b)

    def wide_dense(self) -> Value:
        """Few rows and many."""
        rows, depth = self.one([1, 1, 2, 5, 33, 70]), self.one([1, 3, 8, 31, 64, 130])
        x = self.input(self.one([DType.I8, DType.U8, DType.I7, DType.I16]), (rows, depth))
        w = self.weights(self.one([1, 8, 10, 32, 33, 64, 129, 200]), depth)
        return self.add(ops.MatMul(), x, w, self.bias(x.type.dtype, w.constant, 0))

    def wide_pool(self, largest: bool) -> Value:
        """Small windows and whole images."""
        x = self.image_of([1, 3, 8, 16, 24, 64, 96, 128, 140])
        kernel, strides, pads, _ = self.window(x.type.shape[1:-1], dilate=False, most=9)
        rank = len(kernel)
        if largest:
            pads = tuple(min(p, kernel[i % rank] - 1) for i, p in enumerate(pads))
            sizes = zip(kernel, x.type.shape[1:], strict=False)
            if any(k > n + pads[i] + pads[rank + i] for i, (k, n) in enumerate(sizes)):
                kernel, pads = (1,) * rank, (0,) * 2 * rank
            return self.add(ops.MaxPool(kernel, strides, pads, (1,) * rank), x)
        zero = self.edge(x.type.dtype.lo, x.type.dtype.hi)
        return self.add(ops.SumPool(kernel, strides, pads, zero), x)

    def requantized(self, acc: Value) -> Value:
        """With constants that a pass would choose, some values added, any result type."""
        channels, shape = acc.type.shape[-1], acc.type.shape
        reach = max(1, *(abs(c) for c in code_range(acc)))
        out = self.one([DType.I8, DType.I8, DType.I8, DType.U8, DType.I16, DType.I4])
        vals = [
            self.input(self.one([DType.I8, DType.U8]), shape) for _ in range(self.one([0, 0, 1, 2]))
        ]
        spread = self.one([1, 4, 64])
        scales = tuple(
            Fraction((1 << out.bits) * self.int(8, 8 * spread), reach * 16) for _ in range(channels)
        )
        operands = []
        for v in vals:
            lo, hi = code_range(v)
            operands.append(
                arith.ValOperand(Fraction(self.int(1, 40), 16), self.edge(lo, hi), lo, hi)
            )
        bits = self.one([16, 16, 24])
        try:
            fit = arith.fit_rescale(
                [arith.AccOperand(scales, (reach,))], operands, bits=bits,
                tolerance=Fraction(1 << out.bits, 64),
            )  # fmt: skip
        except arith.NoRoom:
            return self.rescaled([acc], vals, shape)
        zero = self.one([-128 if out.lo <= -128 else out.lo, 0, self.int(out.lo, out.hi)])
        lo = self.one([out.lo, max(out.lo, zero)])
        hi = self.one([out.hi, out.hi, self.int(lo, out.hi)])
        v = self.add(Rescale(fit.accs, fit.vals, fit.f, zero, lo, hi, out), acc, *vals)
        assert v.producer is not None
        try:
            prove_rescale(v.producer)
        except OverflowError:
            self.graph, self.values = Graph("again", free_batch=False), []
            return self.requantized(self.wide_dense())
        return v


@st.composite
def layers(draw: Callable[[st.SearchStrategy[object]], object], kind: str) -> Graph:
    """One layer with its Rescale, or the bare accumulator."""
    maker = Layers(draw, kind)
    match kind:
        case "conv":
            v = maker.wide_conv(depthwise=False)
        case "depthwise":
            v = maker.wide_conv(depthwise=True)
        case "dense":
            v = maker.wide_dense()
        case "sum":
            v = maker.wide_pool(largest=False)
        case _:
            v = maker.wide_pool(largest=True)
    if kind != "max" and maker.int(0, 7):
        v = maker.requantized(v) if maker.int(0, 3) else maker.rescaled([v], [], v.type.shape)
    maker.graph.add_output(Port("output", 0.25, 0), v)
    maker.graph.verify()
    prove(maker.graph)
    return maker.graph


KINDS = (*["conv"] * 6, "depthwise", "depthwise", "dense", "dense", "sum", "max")


def test_layers_in_the_emulator() -> None:
    used: set[str] = set()

    @BATCHES
    @given(st.tuples(*(layers(kind) for kind in KINDS)))
    def batch(made: Sequence[Graph]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            used.update(check(made, Path(folder)))

    batch()
    assert used >= FAMILIES


@settings(BATCHES, max_examples=2)
@given(
    st.tuples(*(singles(o) for o in ("conv", "matmul", "rescale", "sumpool", "maxpool")), graphs())
)
def test_operators_and_graphs_in_the_emulator(made: Sequence[Graph]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(made, Path(folder))


# ------------------------------------------------------------------------------------ planted faults


def layer(kind: str, channels: int = 20, outputs: int = 12, *, bits: int = 16) -> Graph:
    """One layer with a border, a stride, tails of channels and pixels, a value added and a zero point."""
    rng, g = np.random.default_rng(5), Graph(kind, free_batch=False)

    def constant(dtype: DType, *shape: int) -> Value:
        codes = rng.integers(max(dtype.lo, -999), min(dtype.hi, 999) + 1, shape)
        return g.constant(codes.astype(dtype.numpy), TensorType(dtype, shape), "constant")

    if kind == "dense":
        x = g.add_input(Port("x", 1.0, 0), TensorType(DType.I8, (1, channels)))
        w, b = constant(DType.I8, outputs, channels), constant(DType.I32, outputs)
        acc = g.add(ops.MatMul(), x, w, b, name="acc")
    else:
        x = g.add_input(Port("x", 1.0, 0), TensorType(DType.I8, (1, 7, 11, channels)))
        if kind == "sum":
            acc = g.add(ops.SumPool((3, 3), (2, 2), (1, 1, 1, 1), -3), x, name="acc")
        else:
            depth = 1 if kind == "depthwise" else channels
            outputs = channels if kind == "depthwise" else outputs
            w, b = constant(DType.I8, outputs, 3, 3, depth), constant(DType.I32, outputs)
            op = ops.Conv((2, 2), (1, 1, 1, 1), (1, 1), channels // depth, -7)
            acc = g.add(op, x, w, b, name="acc")
    channels = acc.type.shape[-1]
    reach = max(abs(c) for c in code_range(acc))
    scales = tuple(Fraction(1000 + 37 * c, reach * 2) for c in range(channels))
    operand = arith.AccOperand(scales, (reach,))
    vals: list[Value] = []
    if bits == 24:
        vals.append(g.add_input(Port("skip", 1.0, 0), TensorType(DType.I8, acc.type.shape)))
    added = [arith.ValOperand(Fraction(3, 4), -5, -128, 127) for _ in vals]
    fit = arith.fit_rescale([operand], added, bits=bits)
    op8 = Rescale(fit.accs, fit.vals, fit.f, 6, -120, 110, DType.I8)
    v = g.add(op8, acc, *vals, name="made")
    g.add_output(Port("y", 1.0, 0), v)
    g.verify()
    prove(g)
    return g


MUTANTS = [
    ("conv", 16, "hvx-pixels", r"_rnd_sat\((\w+, \w+), (\d+)\)", r"_sat(\1, \2)"),
    ("conv", 16, "hvx-pixels", r"pad = Q6_V_vsplat_R\((\w+)\)", r"pad = Q6_V_vsplat_R(\1 + 1)"),
    ("conv", 16, "hvx-pixels", r"Q6_V_vsplat_R\(393222\)", "Q6_V_vsplat_R(393221)"),
    ("conv", 16, "hvx-pixels", r"offsets\[t\]", "offsets[0]"),
    ("conv", 24, "hvx-pixels", r"hvx_scale32\(", "hvx_scale16("),
    ("conv", 24, "hvx-pixels", r"hvx_signed\((.*), 3\)", r"hvx_signed(\1, 2)"),
    ("depthwise", 16, "hvx-windows", r"_rnd_sat\((\w+, \w+), (\d+)\)", r"_sat(\1, \2)"),
    ("depthwise", 16, "hvx-windows", r"hvx_load\(from \+ \d+\)", "hvx_load(from)"),
    ("depthwise", 24, "hvx-windows", r"VwR\((\w+|hvx_load\(.*?\)), (\w+), 1\)", r"VwR(\1, \2, 2)"),
    ("sum", 16, "hvx-windows", r"Q6_V_vsplat_R\(257\)|Q6_V_vsplat_R\(1\)", "Q6_V_vsplat_R(0)"),
    ("dense", 16, "hvx-dense", r"_rnd_sat\((\w+, \w+), (\d+)\)", r"_sat(\1, \2)"),
    ("dense", 24, "hvx-dense", r"while \(\+\+t < (\d+)\)", r"while (++t < \1 - 1)"),
]  # fmt: skip


@cache
def without_fault(kind: str, bits: int) -> list[str]:
    """The kernel that computes the layer rightly."""
    with tempfile.TemporaryDirectory() as folder:
        return check([layer(kind, bits=bits)], Path(folder))


@pytest.mark.parametrize(("kind", "bits", "kernel", "right", "wrong"), MUTANTS)
def test_a_planted_fault_is_noticed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    bits: int,
    kernel: str,
    right: str,
    wrong: str,
) -> None:
    """A change of a rounding, a border, a factor, a tap: one bit of one element is enough."""
    graph = layer(kind, bits=bits)
    assert without_fault(kind, bits) == [kernel]

    def mutated(g: Graph, **more: object) -> object:
        made = emit.lower(g, **more)  # type: ignore[arg-type]
        source = made.files["model.c"].decode()
        planted = re.sub(right, wrong, source)
        assert planted != source
        return replace(made, files={**made.files, "model.c": planted.encode()})

    monkeypatch.setattr(native, "lower", mutated)
    with pytest.raises(AssertionError, match=r"value made|value acc"):
        check([graph], tmp_path)


# --------------------------------------------------------------------------------------- the target


def emitted(folder: Path, cpu: str = "hexagonv66") -> Path:
    vectors = [{k: v[i : i + 1] for k, v in data(2).items()} for i in range(2)]
    lowered = TARGET.lower(network(), name=NAME, cpu=cpu, vectors=vectors)
    for name, content in lowered.files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("cpu", TARGET.cpus)
def test_every_cpu_gives_what_the_graph_gives(tmp_path: Path, cpu: str) -> None:
    g, feeds, folder = network(), data(5), emitted(tmp_path, cpu)
    for sanitize in (False, True):
        runner = TARGET.runner(folder, g, name=NAME, cpu=cpu, sanitize=sanitize)
        assert same(runner.run(feeds), g.run(feeds))
    found = verify(g, TARGET.runner(folder, g, name=NAME, cpu=cpu), [feeds])
    assert found.ok
    assert found.intermediates >= 4


def test_the_program_is_free_of_floats(tmp_path: Path) -> None:
    found = TARGET.certify(emitted(tmp_path), name=NAME, cpu="hexagonv66")
    assert found.clean
    assert found.instructions > 500


def test_emission_repeats_and_uses_vectors(tmp_path: Path) -> None:
    first = TARGET.lower(network(), name=NAME, cpu="hexagonv66", vectors=())
    again = TARGET.lower(network(), name=NAME, cpu="hexagonv66", vectors=())
    assert first.files == again.files
    assert {layer.kernel for layer in first.layers} >= FAMILIES
    assert not {"bench.c", "host_posix.c"} & first.files.keys()


def test_unknown_cpus_and_missing_tools_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="hexagonv66"):
        TARGET.lower(network(), name=NAME, cpu="hexagonv5", vectors=())
    assert not TARGET.missing()
    monkeypatch.setattr(build, "find_zig", lambda: None)
    monkeypatch.setattr(build, "find", lambda *_: None)
    assert len(TARGET.missing()) == 2
    with pytest.raises(ToolchainMissing, match=r"zig|toolchain"):
        TARGET.certify(Path("nowhere"), name=NAME, cpu="hexagonv66")


def test_the_makefile_takes_zig_as_it_says(tmp_path: Path) -> None:
    folder = emitted(tmp_path)
    said = re.search(r"^#   (make test CC='python3.*)$", (folder / "Makefile").read_text(), re.M)
    assert said is not None
    done = subprocess.run(
        said[1].replace("python3", sys.executable),
        shell=True, cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 vectors, 0 mismatches" in done.stdout


# ----------------------------------------------------------------------------------- the host layer

_HOST_TEST = """
#include "host.h"
#include <stdint.h>
void *memmove(void *to, const void *from, size_t size);
int memcmp(const void *a, const void *b, size_t size);
void *__hexagon_memcpy_likely_aligned_min32bytes_mult8bytes(void *to, const void *from, size_t size);
static unsigned char a[300], b[300], c[300];
int main(void) {
    __attribute__((aligned(128))) volatile unsigned char local[128];
    local[0] = 1;
    if ((uintptr_t)local % 128 != 0) return 2;
    const size_t got = host_read(a, 300);
    if (got != 200) return 3;
    for (size_t from = 0; from < 5; ++from) {
        for (size_t to = 0; to < 5; ++to) {
            for (size_t size = 0; size < 40; ++size) {
                for (size_t i = 0; i < 300; ++i) b[i] = c[i] = (unsigned char)(7 * i);
                for (size_t i = 0; i < size; ++i) c[to + i] = a[from + i];
                if (memcpy(b + to, a + from, size) != b + to) return 4;
                for (size_t i = 0; i < 300; ++i) if (b[i] != c[i]) return 5;
                if (memcmp(b, c, 300) != 0) return 6;
                c[299] = (unsigned char)(c[299] + 1);
                if (memcmp(b, c, 300) >= 0 || memcmp(c, b, 300) <= 0) return 7;
                for (size_t i = 0; i < 300; ++i) b[i] = c[i] = (unsigned char)(3 * i);
                if (from < to) for (size_t i = size; i-- > 0;) c[to + i] = c[from + i];
                else for (size_t i = 0; i < size; ++i) c[to + i] = c[from + i];
                memmove(b + to, b + from, size);
                for (size_t i = 0; i < 300; ++i) if (b[i] != c[i]) return 8;
                memset(b + to, 0x1a5, size);
                for (size_t i = 0; i < 300; ++i) if (b[i] != (i >= to && i < to + size ? 0xa5 : c[i])) return 9;
            }
        }
    }
    __hexagon_memcpy_likely_aligned_min32bytes_mult8bytes(b, a, 200);
    return host_write(b, 200) == 0 ? 17 : 10;
}
"""


def test_the_host_layer_reads_writes_copies_and_aligns(tmp_path: Path) -> None:
    (tmp_path / "main.c").write_text(_HOST_TEST)
    for source in (HOST, build.HERE / "host.h", *build.BARE_LINUX):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    build_it = [*COMPILER, "-fno-builtin", "-Wall", "-Wextra", "-Wconversion", "-Werror", *LINK]
    subprocess.run([*build_it, "main.c", HOST.name, "-o", "main"], cwd=tmp_path, check=True)
    sent = bytes(range(200))
    done = subprocess.run(
        ["qemu-hexagon", "./main"], cwd=tmp_path, input=sent, capture_output=True, check=False
    )
    assert done.returncode == 17
    assert done.stdout == sent


# ------------------------------------------------------------------------------- the float decoder

FLOAT = """
    r0 = sfadd(r1,r2); r31 = sfsub(r30,r29); r5 = sfmpy(r6,r7); r5 += sfmpy(r6,r7); r5 -= sfmpy(r6,r7)
    r5 += sfmpy(r6,r7):lib; r5 -= sfmpy(r6,r7):lib; r5 += sfmpy(r6,r7,p1):scale; r5 = sfmax(r1,r2); r5 = sfmin(r1,r2)
    p0 = sfcmp.eq(r1,r2); p1 = sfcmp.gt(r1,r2); p2 = sfcmp.ge(r1,r2); p3 = sfcmp.uo(r1,r2); p0 = sfclass(r1,#3)
    r5,p1 = sfrecipa(r1,r2); r5,p2 = sfinvsqrta(r1); r5 = sffixupn(r1,r2); r5 = sffixupd(r1,r2); r5 = sffixupr(r1)
    r1:0 = dfadd(r3:2,r5:4); r1:0 = dfsub(r3:2,r5:4); p0 = dfcmp.eq(r3:2,r5:4); p0 = dfcmp.gt(r3:2,r5:4)
    p0 = dfcmp.ge(r3:2,r5:4); p0 = dfcmp.uo(r3:2,r5:4); p0 = dfclass(r3:2,#9)
    r1:0 = dfmax(r3:2,r5:4); r1:0 = dfmin(r3:2,r5:4); r1:0 = dfmpyfix(r3:2,r5:4); r1:0 = dfmpyll(r3:2,r5:4)
    r1:0 += dfmpylh(r3:2,r5:4); r1:0 += dfmpyhh(r3:2,r5:4)
    r1:0 = convert_sf2df(r2); r0 = convert_df2sf(r3:2); r0 = convert_w2sf(r1); r0 = convert_uw2sf(r1)
    r1:0 = convert_w2df(r2); r1:0 = convert_uw2df(r2); r1:0 = convert_d2df(r3:2); r1:0 = convert_ud2df(r3:2)
    r0 = convert_d2sf(r3:2); r0 = convert_ud2sf(r3:2); r0 = convert_sf2w(r1); r0 = convert_sf2w(r1):chop
    r0 = convert_sf2uw(r1); r0 = convert_sf2uw(r1):chop; r1:0 = convert_sf2d(r2); r1:0 = convert_sf2d(r2):chop
    r1:0 = convert_sf2ud(r2); r1:0 = convert_sf2ud(r2):chop; r0 = convert_df2w(r3:2); r0 = convert_df2w(r3:2):chop
    r0 = convert_df2uw(r3:2); r0 = convert_df2uw(r3:2):chop; r1:0 = convert_df2d(r3:2); r1:0 = convert_df2ud(r3:2)
    r1:0 = convert_df2d(r3:2):chop; r1:0 = convert_df2ud(r3:2):chop
    v0.sf = vadd(v1.sf,v2.sf); v0.hf = vmpy(v1.hf,v2.hf); v0.qf32 = vmpy(v1.sf,v2.sf); v0.sf = v1.qf32
    v1:0.sf = vmpy(v2.hf,v3.hf); q0 = vcmp.gt(v1.sf,v2.sf); v0.h = vcvt(v1.hf); v0.sf = vmax(v1.sf,v2.sf)
"""
INTEGER = """
    r0 = add(r1,r2); r0 += mpyi(r1,r2); r1:0 = mpy(r2,r3); r0 = mpy(r1,r2); r0 = asr(r1,#3); r0 = asr(r1,#3):rnd
    r1:0 = combine(r2,r3); p0 = cmp.gt(r1,r2); r0 = max(r1,r2); r0 = memw(r1+#4); memd(r0+#8) = r3:2; r0 = ##0x3f800000
    r0 = sfmake(#3):pos; r1:0 = dfmake(#3):neg; r0 = vsathb(r3:2); r1:0 = vrmpyh(r3:2,r5:4); r0 = normamt(r1)
    loop0(#0,#5); r0 = cl0(r1)
    v0.w += vrmpy(v1.ub,r2.b); v0.w += vrmpy(v1.b,v2.b); v0.w = vmpye(v1.w,v2.uh); v0.h = vasr(v1.w,v2.w,r3):rnd:sat
    v0.w += vmpyo(v1.w,v2.h):<<1:sat:shift; v1:0 = vdeal(v3,v2,r4); v1:0 = vshuff(v3,v2,r4); v0 = vsplat(r1)
    v0.b = vasr(v1.h,v2.h,r3):sat; v0.ub = vsat(v1.h,v2.h); v0 = vmem(r0+#1); vmemu(r0+#1) = v0; q0 = vcmp.gt(v1.w,v2.w)
    if (q0) vmem(r0+#1) = v2; v0 = vmux(q0,v1,v2); v0.b = vmax(v1.b,v2.b); v1:0.b = vshuffoe(v2.b,v3.b)
"""


def assembled(folder: Path, lines: str, packet: str = "{{ {} }}") -> certify.FloatCertificate:
    """What the certificate says about instructions, each in a packet of its own."""
    instructions = [i.strip().replace(" ", "") for i in re.split(r"[;\n]", lines) if i.strip()]
    text = "".join(packet.format(i) + "\n" for i in instructions)
    (folder / "x.s").write_text(".text\n" + text)
    chip = "-mcpu=hexagonv73+hvx_length128b+hvxv73+hvx_qfloat+hvx_ieee_fp"
    command = [*ZIG, "-target", "hexagon-freestanding-none", chip, "-c", "x.s", "-o", "x.o"]
    subprocess.run(command, cwd=folder, check=True)
    return certify.inspect((folder / "x.o").read_bytes(), "x.o")


def count(lines: str) -> int:
    return sum(bool(i.strip()) for i in re.split(r"[;\n]", lines))


def test_every_float_instruction_is_found(tmp_path: Path) -> None:
    found = assembled(tmp_path, FLOAT)
    assert found.instructions == count(FLOAT)
    assert not found.clean
    code = ELFFile(io.BytesIO((tmp_path / "x.o").read_bytes())).get_section_by_name(".text").data()
    kinds = [i.floats for i in decode.instructions(code, 0)]
    assert kinds == [True] * count(FLOAT)


def test_integer_instructions_and_moves_of_bits_are_not_found(tmp_path: Path) -> None:
    assert assembled(tmp_path, INTEGER).clean


def test_floats_are_found_wherever_in_a_packet(tmp_path: Path) -> None:
    found = assembled(tmp_path, "r3=sfadd(r4,r5)", "{{ r0=add(r1,r2)\n {}\n r6=memw(r7+#0) }}")
    assert found.instructions == 3
    assert len(found.findings) == 1


def test_code_that_ends_inside_a_packet_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "x.s").write_text(".text\n{ r0 = add(r1,r2) }\n.word 0x40004000\n")
    command = [*ZIG, "-target", "hexagon-freestanding-none", "-c", "x.s", "-o", "x.o"]
    subprocess.run(command, cwd=tmp_path, check=True)
    found = certify.inspect((tmp_path / "x.o").read_bytes(), "x.o")
    assert found.findings == ("x.o: .text does not decode at 0x4",)


def test_soft_and_hard_floats_in_c_are_found(tmp_path: Path) -> None:
    for body in ("x * y", "x / y", "(float)(int)x", "x < y"):
        (tmp_path / "x.c").write_text(f"float f(float x, float y) {{ return {body}; }}\n")
        command = [*ZIG, "-target", "hexagon-freestanding-none", "-O2", "-c", "x.c", "-o", "x.o"]
        subprocess.run(command, cwd=tmp_path, check=True)
        assert not certify.inspect((tmp_path / "x.o").read_bytes(), "x.o").clean, body
