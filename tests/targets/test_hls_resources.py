"""DSP blocks, block RAMs and LUTs that are foretold, against what yosys makes of the Verilog."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks import fpga_resources
from qcompile.errors import BadInput
from qcompile.targets.hls import devices, memories, resources, units
from qcompile.targets.hls.legalise import legalise
from qcompile.targets.hls.memories import Memory, placed
from qcompile.targets.hls.multipliers import Family, dsps
from tests.targets.test_families import network
from tests.targets.test_hls_verilog import FOLDED
from tests.targets.test_pipeline import residual


def verilog_of(name: str, m: Memory, folder: Path) -> str:
    """A module that is one memory, read a cycle after its address."""
    address = (m.depth - 1).bit_length() - 1
    ports = f"input clk, input [{address}:0] r, output reg [{m.width - 1}:0] q"
    if m.written:
        ports += f", input we, input [{address}:0] w, input [{m.width - 1}:0] d"
        body = "if (we) mem[w] <= d;"
        start = ""
    else:
        rng = np.random.default_rng(m.depth)
        words = rng.integers(0, 2, (m.depth, m.width))
        lines = [f"{int(''.join(map(str, word)), 2):x}" for word in words]
        (folder / f"{name}.mem").write_text("\n".join(lines) + "\n")
        body, start = "", f'initial $readmemh("{name}.mem", mem);'
    return (
        f"(* keep_hierarchy *) module {name} ({ports});\n"
        f"reg [{m.width - 1}:0] mem [0:{m.depth - 1}]; {start}\n"
        f"always @(posedge clk) begin {body} q <= mem[r]; end\nendmodule\n"
    )


CELLS: dict[Family, dict[str, tuple[int, int]]] = {
    "xc7": {"RAMB18E1": (1, 0), "RAMB36E1": (2, 0), "RAM32M": (0, 4), "RAM64M": (0, 4)},
    "ecp5": {"DP16KD": (1, 0), "TRELLIS_DPR16X4": (0, 6)},
}
SCRIPTS: dict[Family, str] = {
    "xc7": "read_verilog -lib +/xilinx/cells_sim.v; hierarchy -top top;"
    " synth_xilinx -family xc7 -top top -run prepare:map_ffram",
    "ecp5": "read_verilog -lib +/ecp5/cells_sim.v +/ecp5/cells_bb.v; hierarchy -top top;"
    " synth_ecp5 -top top -run coarse:map_ffram",
}


def mapped(found: Sequence[Memory], family: Family, folder: Path) -> list[tuple[int, int]]:
    """18-kbit blocks and LUTs of distributed RAM that yosys makes of each memory."""
    text, body = "", ""
    width, depth = max(m.width for m in found), max(m.depth for m in found).bit_length()
    for i, m in enumerate(found):
        text += verilog_of(f"memory{i}", m, folder)
        at = (m.depth - 1).bit_length() - 1
        written = f", .we(we), .w(a[{at}:0]), .d(d[{m.width - 1}:0])" if m.written else ""
        body += f"wire [{m.width - 1}:0] q{i};\n"
        body += f"memory{i} m{i} (.clk(clk), .r(b[{at}:0]), .q(q{i}){written});\n"
    every = " ^ ".join(f"q{i}" for i in range(len(found)))
    ports = (
        f"input clk, we, input [{depth}:0] a, b, input [{width - 1}:0] d, output [{width - 1}:0] q"
    )
    text += f"module top ({ports});\n{body}assign q = {every};\nendmodule\n"
    (folder / "top.v").write_text(text)
    done = subprocess.run(
        ["yosys", "-p", f"read_verilog top.v; {SCRIPTS[family]}; tee -o cells.txt stat"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    taken = [(0, 0)] * len(found)
    at = -1
    for line in (folder / "cells.txt").read_text().splitlines():
        if begun := re.match(r"=== (\S+) ===", line):
            name = re.fullmatch(r"memory(\d+)", begun[1])
            at = int(name[1]) if name else -1
        elif (
            at >= 0
            and (cell := re.fullmatch(r"\s+(\w+)\s+(\d+)", line))
            and cell[1] in CELLS[family]
        ):
            blocks, luts = CELLS[family][cell[1]]
            n = int(cell[2])
            taken[at] = taken[at][0] + n * blocks, taken[at][1] + n * luts
    return taken


# on both sides of what becomes a block RAM, and shapes of all widths
SHAPES = (
    (8, 1024, True), (8, 64, True), (36, 64, True), (36, 80, True), (18, 700, True), (40, 911, True), (10, 1100, True),
    (17, 30, True), (16, 500, False), (16, 530, False), (72, 220, False), (20, 501, False), (12, 60, False),
)  # fmt: skip


@pytest.mark.parametrize("family", ["xc7", "ecp5"])
def test_memories_go_where_yosys_puts_them(family: Family, tmp_path: Path) -> None:
    found = [Memory(*shape) for shape in SHAPES]
    taken = mapped(found, family, tmp_path)
    for m, (blocks, luts) in zip(found, taken, strict=True):
        said = placed(m, family)
        assert said.bram18 == blocks, m
        assert (said.lut if said.kind == "distributed" else 0) == luts, m
    kinds = {placed(m, family).kind for m in found}
    assert kinds == {"block", "distributed", "logic"}


def test_a_memory_has_a_known_number_of_blocks() -> None:
    # the shapes of a RAMB18E1, and what is a little more than one
    for (width, depth), blocks in {
        (1, 16384): 1, (2, 8192): 1, (4, 4096): 1, (9, 2048): 1, (18, 1024): 1, (36, 512): 1,
        (1, 16385): 2, (36, 1024): 2, (72, 512): 2, (72, 513): 4,
    }.items():  # fmt: skip
        assert placed(Memory(width, depth, written=True), "xc7").bram18 == blocks, (width, depth)
    assert placed(Memory(300, 1, written=False), "xc7") == memories.Placed("logic")


@pytest.mark.parametrize("family", ["xc7", "ecp5"])
def test_a_network_takes_what_is_foretold(family: Family) -> None:
    made = legalise(residual(), {"conv": (2, 4)})
    taken = fpga_resources.synthesize_pipeline(made, family)
    said = resources.total(made, family)
    assert (said.dsp, said.bram18) == (taken.dsp, taken.bram18)
    band = resources.lut_model(family).error
    assert abs(said.lut / taken.lut - 1) <= band, (said.lut, taken.lut)


UNITS = {"l2_matvec": 0.25, "l2_window": 0.25}


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_takes_what_is_foretold(name: str) -> None:
    made = legalise(network(), {"second.acc": (2, 3)})
    (op,) = (op for op in made.ops if op.name == name)
    taken = fpga_resources.synthesize_pipeline(fpga_resources.alone(op), "xc7")
    said = resources.cost(op, "xc7")
    assert (said.dsp, said.bram18) == (taken.dsp, taken.bram18)
    assert said.dsp == dsps(op, "xc7")
    assert abs(said.lut / taken.lut - 1) <= UNITS[name], (said.lut, taken.lut)


def test_the_model_was_fitted_and_says_how_far_it_is_off() -> None:
    medians: dict[Family, float] = {"xc7": 0.12, "ecp5": 0.25}
    for family, median in medians.items():
        model = resources.lut_model(family)
        assert model.tool.startswith("yosys ")
        assert model.fitted > 2 * model.held_out > 20
        assert 0 < model.median < median
        assert model.median < model.largest
        assert 0 < model.network < 0.2
        assert all(c > 0 for c in model.coefficients.values())


def test_every_unit_and_fifo_is_counted_once() -> None:
    made = legalise(network(), FOLDED)
    listed = resources.estimate(made, devices.DEFAULT)
    assert [u.name for u in listed] == [op.name for op in made.ops]
    fifos = sum((resources.fifo_cost(s, "xc7") for s in made.fifos.values()), resources.Cost())
    said = resources.total(made, "xc7")
    assert said.dsp == sum(u.dsp for u in listed)
    assert said.bram18 == sum(u.bram18 for u in listed) + fifos.bram18
    assert abs(said.lut - sum(u.lut for u in listed) - fifos.lut) <= len(listed)
    by_name = {u.name: u for u in listed}
    for op in made.ops:
        if isinstance(op, units.MatrixVector):
            unit = by_name[op.name]
            assert (unit.pe, unit.simd) == FOLDED[op.layer]
            assert unit.cycles == op.vectors * op.weights.size // (unit.pe * unit.simd)


# ------------------------------------------------------------------------------ parts


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("xc7z020clg400-1", "xc7z020"),
        ("XC7Z020-1CLG400C", "xc7z020"),
        ("xc7z007sclg225-1", "xc7z007s"),
        ("xc7a35ticsg324-1L", "xc7a35t"),
        ("xc7a100tcsg324-1", "xc7a100t"),
        ("xc7k325tffg900-2", "xc7k325t"),
        (" LFE5U-45F-6BG381C ", "lfe5u-45f"),
        ("lfe5um-85f-8bg756i", "lfe5um-85f"),
    ],
)
def test_a_part_is_found_by_its_ordering_code(text: str, name: str) -> None:
    assert devices.find(text).name == name


def test_every_part_is_found_by_its_name_and_no_other() -> None:
    assert all(devices.find(name) is d for name, d in devices.DEVICES.items())
    for text, near in {"xc7z021": "xc7z020", "lfe5-45f": "lfe5u-45f", "xc7a35": "xc7a35t"}.items():
        with pytest.raises(BadInput, match=f"did you mean {near}"):
            devices.find(text)
    for text in ("", "xczu3eg", "xc7z020!", "xc7z020clg400-1; rm", "x" * 10_000):
        with pytest.raises(BadInput, match="there is no part"):
            devices.find(text)
