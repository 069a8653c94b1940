"""The vector kernels of x86 against the interpreter, with every instruction set, wherever they are run.

What this machine's processor lacks is run all the same: AVX2 in the emulator, AVX-VNNI as AVX2 with its one
instruction in C, AVX-512 with all words of its header in C (`x86_words.h`). These programs are compiled for the real
instructions too, and disassembled.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from elftools.elf.elffile import ELFFile

from qcompile import target as families
from qcompile.errors import ToolchainMissing, VerificationMismatch
from qcompile.ir import Array, DType, Graph, Port, TensorType, Value, arith, ops
from qcompile.ir.proof import prove
from qcompile.targets.c import build, certify, run
from qcompile.targets.c.emit import fuse, lower
from qcompile.targets.c.kernel import Kernel, Step
from qcompile.targets.c.kernels import PORTABLE
from qcompile.targets.x86 import isa, program
from qcompile.targets.x86.gemm import Gemm, _isa
from tests.native import SANITIZED, check
from tests.strategies import WEIGHTS, Maker
from tests.targets.test_families import NAME, data, emitted, network, same
from tests.targets.test_mve_kernels import Maker as Sums

WORDS, DOT = (Path(__file__).parent / name for name in ("x86_words.h", "x86_dot.h"))
EMULATOR = ("qemu-x86_64", "-cpu", "max")
KINDS = (DType.I8, DType.U8, DType.I8, DType.U8, DType.I16)


@dataclass(frozen=True)
class Chosen(Gemm):
    """The kernel wherever it matches, whatever it costs."""

    def cost(self, step: Step) -> int:
        return 0


@dataclass(frozen=True)
class Way:
    """How programs for a cpu are built and run on this machine."""

    isa: isa.Isa
    compiler: tuple[str, ...]
    emulator: tuple[str, ...] = ()

    @property
    def kernels(self) -> Sequence[Kernel]:
        return (Chosen(self.isa), *PORTABLE)


def plain(has: isa.Isa) -> Way:
    """All words in C."""
    return Way(replace(has, headers=(WORDS, DOT)), ("gcc", f"-DLANES={has.lanes}", "-O1"))


def way(name: str) -> Way:
    if name == "words":
        return plain(isa.AVX512_VNNI)
    has, machine = isa.ISAS[name], isa.features()
    if has.needs <= machine:
        return Way(has, ("gcc", *SANITIZED, *has.flags))
    if has is isa.AVX512_VNNI:
        return plain(has)
    flags = isa.AVX2.flags
    if has is isa.AVX_VNNI:
        has = replace(has, headers=(*has.headers[:-1], DOT))
    if isa.AVX2.needs <= machine:
        return Way(has, ("gcc", *SANITIZED, *flags))
    return Way(has, ("gcc", "-O1", "-static", *flags), EMULATOR)


class Layers(Maker):
    """Convolutions and matrix products of bytes, and the Rescales that they are fused with; drawn evenly."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        super().__init__(lambda strategy: pytest.fail(f"{strategy} is not drawn from here"))

    def int(self, lo: int, hi: int) -> int:
        return self.random.randint(lo, hi)

    def one(self, choices: Sequence) -> object:
        return self.random.choice(choices)

    def flag(self) -> bool:
        return self.random.random() < 0.5

    def product(self, shape: tuple[int, ...] | None = None) -> Value:
        """A Conv or MatMul; of a wanted result shape a MatMul."""
        if shape is not None or self.int(0, 3) == 0:
            return self.matrix(shape)
        groups = self.one([1, 1, 1, self.int(2, 5)])
        depth = min(self.one([4, 8, 32, self.int(1, 70)]), 70 // groups)
        outputs = groups * self.int(1, 70 // groups)
        spatial = self.ints(self.int(1, 2), 1, 9)
        x = self.input(self.one(KINDS), (self.one([1, 1, 3]), *spatial, groups * depth))
        kernel, strides, pads, dilations = self.window(spatial, dilate=True)
        if self.flag():
            kernel = tuple(min(k, n) for k, n in zip(kernel, spatial, strict=True))
            pads, dilations = (0,) * len(pads), (1,) * len(kernel)
        dtype = self.one(WEIGHTS)
        w = self.const(dtype, (outputs, *kernel, depth), dtype.lo, dtype.hi)
        fill = self.edge(x.type.dtype.lo, x.type.dtype.hi)
        b = self.bias(x.type.dtype, w.constant, fill)
        return self.add(ops.Conv(strides, pads, dilations, groups, fill), x, w, b)

    def matrix(self, shape: tuple[int, ...] | None) -> Value:
        if shape is None:
            shape = (*self.ints(self.int(1, 2), 1, 20), self.int(1, 70))
        x = self.input(self.one(KINDS), (*shape[:-1], self.one([4, 64, self.int(1, 70)])))
        dtype = self.one(WEIGHTS)
        w = self.const(dtype, (shape[-1], x.type.shape[-1]), dtype.lo, dtype.hi)
        return self.add(ops.MatMul(), x, w, self.bias(x.type.dtype, w.constant, 0))

    def layer(self) -> Value:
        """A product, mostly with a Rescale, which may add a second accumulator and values of 8 and 16 bits."""
        accs = [self.product()]
        shape = accs[0].type.shape
        if self.int(0, 7) == 0:
            return accs[0]
        if self.int(0, 4) == 0:
            accs.append(self.product(shape))
        kinds = (DType.I8, DType.U8, DType.I16)
        vals = [self.input(self.one(kinds), shape) for _ in range(self.one([0, 0, 1, 2]))]
        return self.rescaled(accs, vals, shape)


def drawn(seed: int) -> Graph:
    """A graph of a few layers side by side."""
    maker = Layers(seed)
    for i in range(5):
        maker.graph.add_output(Port(f"output {i}", 0.25, 0), maker.layer())
    maker.graph.verify()
    prove(maker.graph)
    return maker.graph


@pytest.mark.parametrize("name", [*isa.ISAS, "words"])
def test_products_equal_the_graph(tmp_path: Path, name: str) -> None:
    graphs, here = [*map(drawn, range(9))], way(name)
    chosen, *_ = here.kernels
    used = check(
        graphs, tmp_path, compiler=here.compiler, kernels=here.kernels, emulator=here.emulator
    )
    count = sum(chosen.matches(step) for graph in graphs for step in fuse(graph))
    assert used.count(chosen.name) == count > 35


def in_place(kernel: int) -> Graph:
    """A convolution whose image nobody reads afterwards; its result has the same shape and type."""
    maker = Sums(3)

    def moved(v: Value) -> Value:
        op = ops.Rescale((), (arith.Val((3,)),), (2,), 1, -128, 127, DType.I8)
        return maker.graph.add(op, v, name="moved")

    x = moved(maker.input(DType.I8, (1, 5, 6, 200)))
    pad = kernel // 2
    w = maker.weights(200, kernel, kernel, 200)
    op = ops.Conv((1, 1), (pad,) * 4, (1, 1), 1, 1)
    acc = maker.graph.add(op, x, w, maker.bias(200), name="conv")
    y = maker.rescale(acc, DType.I8)
    return maker.done(moved(y))


def test_an_image_that_was_copied_is_overwritten(tmp_path: Path) -> None:
    here = way("words")
    made = lower(in_place(3), name="m", isa="x", vectors=[], kernels=here.kernels)
    assert f"in place ({here.kernels[0].name})" in made.files["model.c"].decode()
    check([in_place(3)], tmp_path, compiler=here.compiler, kernels=here.kernels)


def test_an_image_that_is_still_read_must_not_be_overwritten(tmp_path: Path) -> None:
    class Wrong(Chosen):
        def reuses(self, step: Step) -> tuple[Value, ...]:
            return (step.node.inputs[0],)

    here = way("words")
    made = lower(in_place(1), name="m", isa="x", vectors=[], kernels=here.kernels)
    assert f"in place ({here.kernels[0].name})" not in made.files["model.c"].decode()
    (tmp_path / "right").mkdir()
    (tmp_path / "wrong").mkdir()
    check([in_place(1)], tmp_path / "right", compiler=here.compiler, kernels=here.kernels)
    with pytest.raises(AssertionError):
        check(
            [in_place(1)],
            tmp_path / "wrong",
            compiler=here.compiler,
            kernels=(Wrong(here.isa), *PORTABLE),
        )


def written(way: Way, made: Path) -> bytes:
    """What x86_words.c writes."""
    headers = [part for header in way.isa.headers for part in ("-include", str(header))]
    source = str(WORDS.with_suffix(".c"))
    command = [*way.compiler, "-std=c99", *headers, source, "-o", str(made)]
    subprocess.run(command, check=True)
    ran = subprocess.run(
        [*way.emulator, str(made)],
        check=True,
        capture_output=True,
        env={"ASAN_OPTIONS": "detect_leaks=0"},
    )
    return ran.stdout


@pytest.mark.parametrize("name", isa.ISAS)
def test_words_make_what_they_make_in_c(tmp_path: Path, name: str) -> None:
    found = written(way(name), tmp_path / "found")
    assert len(found) > 300 * 1000
    assert found == written(plain(isa.ISAS[name]), tmp_path / "meant")


def weights(rows: Sequence[Sequence[int]], codes: tuple[DType, int]) -> Step:
    """A MatMul by these weights of activations that end at a code."""
    kind, most = codes
    graph, w = Graph("weights"), np.array(rows, np.int8)
    x = graph.add_input(Port("x", 1.0, 0), TensorType(DType.I8, (1, w.shape[1])))
    x = graph.add(ops.Rescale((), (arith.Val((2,)),), (1,), 0, kind.lo, most, kind), x, name="x")
    b = graph.constant(np.zeros(len(w), np.int32), TensorType(DType.I32, (len(w),)), "b")
    w_value = graph.constant(w, TensorType(DType.I8, w.shape), "w")
    graph.add_output(Port("y", 1.0, 0), graph.add(ops.MatMul(), x, w_value, b, name="y"))
    return fuse(graph)[-1]


@pytest.mark.parametrize(
    ("rows", "codes", "small"),
    [
        ([[64, 64], [-64, -64]], (DType.U8, 255), True),
        ([[1, 1], [64, 65]], (DType.U8, 255), False),
        ([[-64, -65]], (DType.U8, 255), False),
        ([[127, -128]], (DType.U8, 255), True),
        ([[0, 127, 127, 0]], (DType.U8, 255), True),
        ([[0, 0, 127, 2]], (DType.U8, 255), False),
        ([[127, 127]], (DType.U8, 130), False),
        ([[127, 127]], (DType.U8, 129), True),
        ([[-128, -128]], (DType.U8, 128), True),
        ([[127, 127]], (DType.I8, 0), True),
        ([[127, 127]], (DType.I8, 2), False),
    ],
)
def test_only_sums_that_stay_in_16_bits_take_the_saturating_product(
    rows: Sequence[Sequence[int]], codes: tuple[DType, int], small: bool
) -> None:
    step = weights(rows, codes)
    assert (_isa(isa.AVX2, step).dot == "DOT_SMALL") is small
    assert _isa(isa.AVX_VNNI, step).dot == "DOT"
    peak = codes[1] + (128 if codes[0].signed else 0)
    pairs = [row[i : i + 2] for row in rows for i in range(0, len(row), 2)]
    reached = [sum(a * w for a, w in zip(x, pair, strict=True)) for pair in pairs
               for x in ((0, peak), (peak, 0), (peak, peak))]  # fmt: skip
    assert all(-(1 << 15) <= r < 1 << 15 for r in reached) is small


def listing(folder: Path, has: isa.Isa | None) -> str:
    """The disassembled model."""
    decode = certify.decoder("EM_X86_64", "model.o")
    with build.Build(folder, NAME, program.toolchain(has)).model.open("rb") as file:
        sections = [s for s in ELFFile(file).iter_sections() if s["sh_flags"] & 4]
        return "\n".join(at.text for s in sections for at in decode(s.data(), 0))


VNNI = r"vpdpbusds?|vpdpwssds?"
REGISTERS = {
    "generic": (r"xmm", rf"[yz]mm|\bv\w+ |{VNNI}"),
    "avx2": (r"ymm", rf"zmm|[xy]mm(1[6-9]|[23]\d)|\bk[0-7]\b|{VNNI}"),
    "avxvnni": (VNNI, r"zmm|[xy]mm(1[6-9]|[23]\d)|\bk[0-7]\b"),
    "avx512vnni": (r"vpdpbusd zmm", r"$^"),
}
"""What a cpu's code must hold, and what it must not."""


@pytest.mark.parametrize("compiler", ["gcc", "zig"])
@pytest.mark.parametrize("cpu", REGISTERS)
def test_code_holds_what_its_cpu_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu: str, compiler: str
) -> None:
    folder, has = emitted(tmp_path, "x86", cpu), isa.ISAS.get(cpu)
    if compiler == "zig":
        monkeypatch.setenv("PATH", str(tmp_path))
    found, (holds, lacks) = listing(folder, has), REGISTERS[cpu]
    assert re.search(holds, found)
    assert not re.search(lacks, found)
    certificate = families.get("x86").certify(folder, name=NAME, cpu=cpu)
    assert certificate.findings == ()
    assert certificate.clean


def test_the_product_of_avx_vnni_takes_its_operands_in_order(tmp_path: Path) -> None:
    """By the calling convention sum, a and b lie in registers 0, 1 and 2; the last is the signed operand."""
    (tmp_path / "x.c").write_text(
        '#include "vectors_avxvnni.h"\nvec f(vec sum, vec a, vec b) { DOT(sum, a, b); return sum; }\n'
        "vec g(vec sum, vec a, vec b) { DOT_PAIRS(sum, a, b); return sum; }\n"
        "vec h(vec sum, vec a, const int8_t *b) { DOT_AT(sum, a, b); return sum; }\n"
    )
    command = ["gcc", "-O2", *isa.AVX_VNNI.flags, f"-I{isa.HERE}", "-c", "x.c", "-o", "x.o"]
    subprocess.run(command, cwd=tmp_path, check=True)
    shown = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", "-M", "intel", "x.o"],
        cwd=tmp_path, check=True, capture_output=True, text=True,
    )  # fmt: skip
    found = re.findall(r"\{vex\} (vpdp.*)", shown.stdout)
    assert [" ".join(line.split()) for line in found] == [
        "vpdpbusd ymm0,ymm1,ymm2",
        "vpdpwssd ymm0,ymm1,ymm2",
        "vpdpbusd ymm0,ymm1,YMMWORD PTR [rdi]",
    ]


def test_avx2_code_runs_in_the_emulator_of_a_processor_that_has_it_and_of_no_other(
    tmp_path: Path,
) -> None:
    g, folder = network(), emitted(tmp_path, "x86", "avx2")
    chain = replace(program.toolchain(isa.AVX2), link=("-static",))

    def under(cpu: str) -> Mapping[str, Array]:
        emulator = ("qemu-x86_64", "-cpu", cpu)
        made = build.Build(folder, NAME, replace(chain, emulator=emulator))
        return run.Program(made, g).run(data(2))

    assert same(under("max"), g.run(data(2)))
    with pytest.raises(VerificationMismatch, match=r"died of SIGILL in .*Nehalem"):
        under("Nehalem")


OLD = frozenset({"sse2", "ssse3"})


@pytest.mark.parametrize(
    ("has", "native"),
    [
        (OLD, None),
        (isa.AVX2.needs, isa.AVX2),
        (isa.AVX2.needs - {"movbe"}, None),
        (isa.AVX2.needs | {"avx_vnni"}, isa.AVX_VNNI),
        (isa.AVX2.needs | {"avx512f"}, isa.AVX2),
        (isa.AVX512_VNNI.needs | {"avx_vnni"}, isa.AVX512_VNNI),
    ],
)
def test_native_is_the_fastest_that_the_machine_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has: frozenset[str], native: isa.Isa | None
) -> None:
    monkeypatch.setattr(isa, "features", lambda: has)
    assert isa.native() is native
    model = (emitted(tmp_path, "x86", "native") / "model.c").read_text()
    assert f"({'portable' if native is None else native.name})." in model
    assert ("gemm-" in model) is (native is not None)


@pytest.mark.parametrize("cpu", isa.ISAS)
def test_a_program_for_more_than_the_machine_has_is_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu: str
) -> None:
    folder, target = emitted(tmp_path, "x86", cpu), families.get("x86")
    monkeypatch.setattr(isa, "features", lambda: OLD)
    said = rf"the program is for {cpu}, and this machine's processor lacks .*avx.*--cpu=generic"
    for asked in (cpu, "native"):
        for sanitize in (False, True):
            with pytest.raises(ToolchainMissing, match=said):
                target.runner(folder, network(), name=NAME, cpu=asked, sanitize=sanitize)
        assert target.certify(folder, name=NAME, cpu=asked).clean
