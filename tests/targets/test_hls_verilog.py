"""The emitted Verilog gives the graph's codes, with and without pauses, and its test benches find planted faults."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from qcompile.targets.hls import token, verilog
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
    "a ring that is written over": ("qc_window.v", r"assign s_r = held != N", "assign s_r = 1'b1"),
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
    "qc_table": {"LANES": 2, "FLIP": 128},
    "qc_softmax": {"C": 5},
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
