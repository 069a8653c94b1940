"""The emitted Verilog gives the graph's codes, with and without pauses, and its test benches find planted faults."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from random import Random

import numpy as np
import pytest

from qcompile.ir import DType, Graph, MatMul, Port, Rescale, TensorType, arith
from qcompile.targets.hls import token, units, verilog
from qcompile.targets.hls.legalise import Folding, legalise
from qcompile.targets.hls.pipeline import Pipeline
from qcompile.targets.hls.rtlsim import RtlSim, icarus
from tests.targets.test_families import data, network

FOLDED: Folding = {
    "first.acc": (4, 9),
    "pool": (2, 1),
    "second.acc": (4, 8),
    "dense.acc": (5, 24),
}


def write(files: Mapping[str, bytes], folder: Path) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)
    return folder


def folded() -> Pipeline:
    return legalise(network(), FOLDED)


def test_verilator_gives_the_graphs_codes_in_the_cycles_of_the_model(tmp_path: Path) -> None:
    made, graph, codes = folded(), network(), data(32)
    with RtlSim(made, tmp_path / "rtl") as rtl:
        plain, paused = rtl.run(codes), rtl.run(codes, seed=7)
        again = rtl.run(codes, seed=7)
    assert plain.cycles == token.simulate(made, 32).cycles
    assert paused.cycles == again.cycles != plain.cycles
    for run in (plain, paused):
        assert run.complete
        assert run.mismatches == 0
        for name, want in graph.run(codes).items():
            np.testing.assert_array_equal(run.codes[name], want)


def edited(files: Mapping[str, bytes], name: str, old: str, new: str) -> dict[str, bytes]:
    text = files[name].decode()
    changed = re.sub(old, new, text, count=1)
    assert changed != text
    return {**files, name: changed.encode()}


FAULTS = {
    "a stall that is ignored": ("qc_requantize.v", r"assign en = !valid\[9\] \| m_r", "assign en = 1'b1"),
    "a stall that a window ignores": ("qc_window.v", r"wire en = !v2 \| m_r", "wire en = 1'b1"),
    "a FIFO that takes too much": ("qc_fifo.v", r"assign s_r = !full", "assign s_r = 1'b1"),
    "a ring that is a row short": ("qc_window.v", r"N = \(SPAN \+ SH\)", "N = (SPAN + SH - 2)"),
    "a ring that is written over": ("qc_window.v", r"assign s_r = !room\[A\]", "assign s_r = 1'b1"),
    "an accumulator that is too narrow": ("top.v", r"qc_matvec #\((.*?)\.AB\(\d+\)", r"qc_matvec #(\1.AB(14)"),
    "a rounding constant that is off": ("top.v", r"\.O\((\d+)'h[0-9a-f]+\)", r".O(\1'h0)"),
    "words that do not wait for their sum": ("qc_matvec.v", r"sf == 0\}", "1'b0}"),
}  # fmt: skip


@pytest.mark.parametrize("fault", ["", *FAULTS])
def test_planted_faults_are_found(tmp_path: Path, fault: str) -> None:
    files = verilog.emit(folded(), "top", data(2))
    if fault:
        files = edited(files, *FAULTS[fault])
    folder = write(files, tmp_path)
    if fault == "a stall that is ignored":
        # without pauses nobody would know
        assert icarus(folder, 0)[0] == 0
    assert any(icarus(folder, seed)[0] for seed in (1, 2)) == bool(fault)


def dense() -> Graph:
    """A dense layer whose accumulators reach their bound where all codes are the lowest."""
    g = Graph("dense")
    x = g.add_input(Port("x", 1.0, 0), TensorType(DType.I8, (1, 16)))
    w = g.constant(np.full((4, 16), 127, np.int8), TensorType(DType.I8, (4, 16)), "w")
    b = g.constant(np.zeros(4, np.int32), TensorType(DType.I32, (4,)), "b")
    acc = g.add(MatMul(), x, w, b, name="acc")
    fit = arith.fit_rescale([arith.AccOperand((Fraction(1, 10),), (1 << 24,))], [], bits=16)
    lo, hi = DType.I16.lo, DType.I16.hi
    y = g.add(Rescale(fit.accs, fit.vals, fit.f, 0, lo, hi, DType.I16), acc, name="y")
    g.add_output(Port("y", 1.0, 0), y)
    g.verify()
    return g


def test_an_accumulator_one_bit_narrower_is_found_by_make_sim(tmp_path: Path) -> None:
    made = legalise(dense())
    (unit,) = (op for op in made.ops if isinstance(op, units.MatrixVector))
    assert unit.acc_bits == (16 * 127 * 128).bit_length() + 1
    files = verilog.emit(made, "top", {"x": np.zeros((1, 16), np.int8)})
    text = files["top.v"].decode()
    narrow = re.sub(rf"\.(AB|XB)\({unit.acc_bits}\)", rf".\1({unit.acc_bits - 1})", text)
    narrow = narrow.replace(
        f"[{unit.acc_bits - 1}:0] {unit.name}_acc", f"[{unit.acc_bits - 2}:0] {unit.name}_acc"
    )
    assert sum(a != b for a, b in zip(text.split(), narrow.split(), strict=True)) == 3
    write({**files, "top.v": narrow.encode()}, tmp_path)
    for code, found in ((-63, False), (-128, True)):
        write(verilog.vector_files(made, {"x": np.full((1, 16), code, np.int8)}), tmp_path)
        done = subprocess.run(["make", "-s", "sim"], cwd=tmp_path, capture_output=True, check=False)
        assert bool(done.returncode) == found, done.stdout


WIDTHS = [
    (2, 19),
    (8, 26),
    (18, 18),
    (19, 17),
    (22, 17),
    (25, 18),
    (26, 18),
    (31, 20),
    (34, 34),
    (40, 26),
]


@pytest.mark.parametrize("wide", [18, 25])
def test_products_are_those_of_integers_however_they_are_cut(tmp_path: Path, wide: int) -> None:
    r = Random(wide)
    body, want = ["reg clk = 0; always #1 clk = !clk;"], []
    for i, (a, b) in enumerate(WIDTHS):
        body.append(
            f"reg signed [{a - 1}:0] a{i}; reg signed [{b - 1}:0] b{i}; wire signed [{a + b - 1}:0] y{i};"
            f" qc_multiply #(.A({a}), .B({b})) m{i} (clk, 1'b1, a{i}, b{i}, y{i});"
        )
    body.append("initial begin")
    for n in range(40):
        for i, widths in enumerate(WIDTHS):
            # the extremes first, then anything
            ends = [[-(1 << (w - 1)), (1 << (w - 1)) - 1, -1] for w in widths]
            x, y = (e[(n // 3**k) % 3] if n < 9 else r.randint(*e[:2]) for k, e in enumerate(ends))
            masks = [(1 << w) - 1 for w in widths]
            body.append(
                f"a{i} = {widths[0]}'h{x & masks[0]:x}; b{i} = {widths[1]}'h{y & masks[1]:x};"
            )
            want.append(x * y)
        body.append("repeat (3) @(posedge clk); #1;")
        body += [f'$display("%0d", y{i});' for i in range(len(WIDTHS))]
    text = "\n".join(["module bench;", *body, "$finish; end endmodule\n"])
    (tmp_path / "bench.v").write_text(text)
    library = [str(verilog.RTL / name) for name in verilog.LIBRARY]
    compiler = ["iverilog", "-g2005", f"-DQC_WIDE={wide}", "-s", "bench", "-o", "bench"]
    subprocess.run([*compiler, "bench.v", *library], cwd=tmp_path, check=True)
    done = subprocess.run(
        ["vvp", "-n", "bench"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    got = [int(line) for line in done.stdout.splitlines() if re.fullmatch(r"-?\d+", line)]
    assert got == want


MODULES = {
    "qc_fifo": {"W": 8, "D": 40},
    "qc_window": {"W": 16, "F": 2, "H": 6, "WD": 5, "OH": 3, "OW": 5, "SH": 2, "PT": 1, "PL": 1, "PB": 1, "PR": 1},
    "qc_lap": {"N": 3},
    "qc_matvec": {"PE": 2, "SIMD": 3, "SF": 4, "NF": 3},
    "qc_multiply": {"A": 34, "B": 20},
    "qc_depthwise": {"LANES": 2, "F": 2},
    "qc_sum_pool": {"LANES": 2},
    "qc_global_sum": {"LANES": 2, "F": 2},
    "qc_max_pool": {"LANES": 2},
    "qc_delay": {"W": 4, "N": 3},
    "qc_index": {"INNER": 2, "COUNT": 3, "IB": 2},
    "qc_words": {"W": 8, "D": 4, "IB": 2},
    "qc_scale": {"PE": 2, "D_M": 4, "D_S": 4, "IB": 2, "SB": 4},
    "qc_shift_add": {"PE": 2, "COPIES": 2, "D_S": 4, "IB": 2, "SB": 4},
    "qc_finish": {"PE": 2, "TERMS": 2, "D_O": 4, "D_S": 4, "IB": 2, "SB": 4},
    "qc_fork": {"N": 3},
    "qc_widen": {"W": 4, "N": 3},
    "qc_narrow": {"W": 4, "N": 3},
    "qc_concat": {"W": 4},
    "qc_table": {"LANES": 2, "XB": 5, "FLIP": 16},
    "qc_softmax": {"C": 5, "XB": 4},
}  # fmt: skip


def test_yosys_elaborates_every_module_without_latches_or_conflicts(tmp_path: Path) -> None:
    library = [str(verilog.RTL / name) for name in verilog.LIBRARY]
    declared = {m for p in library for m in re.findall(r"^module (\w+)", Path(p).read_text(), re.M)}
    assert declared == {*MODULES, "qc_sum"}
    for name in ("w", "b", "m", "s", "o", "t", "p"):
        (tmp_path / f"{name}.mem").write_text("01\n" * 4)
    tops = ""
    for module, parameters in MODULES.items():
        chosen = ", ".join(f".{k}({v})" for k, v in parameters.items())
        tops += f"module only_{module}; {module} #({chosen}) unit (); endmodule\n"
    (tmp_path / "tops.v").write_text(tops)
    script = [f"read_verilog -defer {' '.join(library)} tops.v", "design -save library"]
    for module in MODULES:
        script += [
            "design -load library",
            f"hierarchy -check -top only_{module}",
            "proc",
            "opt_clean",
            "select -assert-none t:$dlatch %% t:$_DLATCH_*",
            "check -assert",
        ]
    done = subprocess.run(
        ["yosys", "-q", "-p", "; ".join(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_the_files_are_the_same_every_time_and_plain(tmp_path: Path) -> None:
    codes = data(2)
    once, twice = (verilog.emit(folded(), "top", codes) for _ in range(2))
    assert once == twice
    assert {"top.v", "Makefile", "tb/sim.cpp", "tb/bench.v", "vectors/in0.hex"} <= once.keys()
    for name, text in once.items():
        assert text.isascii(), name
        assert text.endswith(b"\n"), name
        assert b"\n\n\n" not in text, name
    words = once["vectors/in0.hex"].split()
    stream = folded().inputs[0].stream
    got = stream.unpack([int(w, 16) for w in words])
    np.testing.assert_array_equal(got.reshape(2, 12, 12, 3), codes['image */ #include "x"'])
