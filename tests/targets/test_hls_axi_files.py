"""The files of the AXI wrapper: a driver with the right bytes and codes, Verilog that tools accept, a script."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile import border, ir
from qcompile.errors import BadInput
from qcompile.ir import DType, TensorType
from qcompile.targets.hls import axi
from qcompile.targets.hls.legalise import legalise
from tests.targets.board import PIN
from tests.targets.test_families import network
from tests.targets.test_hls_axi import driver, emitted, line, pair, wires
from tests.targets.test_hls_verilog import FOLDED, edited, write


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(1, 32),
    lanes=st.integers(1, 5),
    words=st.integers(1, 9),
    signed=st.booleans(),
    bus=st.sampled_from(axi.BUSES),
    seed=st.integers(0, 99),
    shuffled=st.booleans(),
)
def test_bytes_are_the_words_of_the_stream(
    bits: int, lanes: int, words: int, signed: bool, bus: int, seed: int, shuffled: bool
) -> None:
    rng = np.random.default_rng(seed)
    stream = line(bits, lanes, words, signed and bits > 1)
    hi = min(stream.hi, DType.I32.hi)
    order = rng.permutation(words * lanes) if shuffled else None
    g, made, port = wires(stream, words)
    sends = replace(port, order=order)
    receives = replace(sends, name="y")
    files = axi.emit(
        g, replace(made, inputs=(sends,), outputs=(receives,)), "net", {"net.v": b""}, bus
    )
    module = driver({f"axi/{n}": b for n, b in files.items()})
    rows = rng.integers(stream.lo, hi, (3, *port.shape), endpoint=True).astype(np.int32)
    packed = [stream.pack(sends.send(row)) for row in rows]
    data = module.INPUTS[0].pack(rows)

    # the layout in numbers, as the documentation states it
    least = -(-bits * lanes // 8)
    size = next(n for n in (1 << i for i in range(12)) if n >= least)
    size = size if least <= bus // 8 else -(-least * 8 // bus) * bus // 8
    whole = -(-words * size * 8 // bus) * bus // 8
    want = [b"".join(w.to_bytes(size, "little") for w in p).ljust(whole, b"\0") for p in packed]
    assert [row.tobytes() for row in data] == want
    got = module.OUTPUTS[0].unpack(data)
    assert got.dtype == np.int32
    for row, p in zip(got, packed, strict=True):
        np.testing.assert_array_equal(row, receives.receive(stream.unpack(p)))


@settings(max_examples=50, deadline=None)
@given(
    scale=st.floats(2**-10, 2**10, width=32),
    zero=st.integers(-128, 127),
    dtype=st.sampled_from([DType.I8, DType.U8, DType.I16, DType.I4]),
    real=st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4),
)
def test_the_border_is_that_of_the_graph(
    scale: float, zero: int, dtype: DType, real: list[float]
) -> None:
    g, made, port = wires(line(dtype.bits, 2, 2, dtype.signed), 2)
    g.inputs[0] = (ir.Port("x", scale, zero), g.inputs[0][1])
    g.outputs[0] = (ir.Port("y", scale, zero), g.outputs[0][1])
    sides = replace(port, dtype=dtype), replace(port, name="y", dtype=dtype)
    files = axi.emit(g, replace(made, inputs=sides[:1], outputs=sides[1:]), "net", {"net.v": b""})
    module = driver({f"axi/{n}": b for n, b in files.items()})
    x = np.array(real).reshape(1, 2, 2)
    want = border.quantize(x, g.inputs[0][0], TensorType(dtype, (1, 2, 2)))
    got = module.INPUTS[0].quantize(x)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)
    exact = [float((Fraction(int(c)) - zero) * Fraction(scale)) for c in got.reshape(-1)]
    np.testing.assert_allclose(module.OUTPUTS[0].dequantize(got).reshape(-1), exact, rtol=1e-15)
    with pytest.raises(ValueError, match="NaN or infinity"):
        module.INPUTS[0].quantize(x * np.nan)
    if dtype is DType.I4:
        with pytest.raises(ValueError, match="takes codes -8 to 7"):
            module.INPUTS[0].pack(want * 0 + 8)
    with pytest.raises(ValueError, match=r"takes .* rows of shape"):
        module.INPUTS[0].pack(want[:, :1])


@given(st.permutations(range(4)), st.lists(st.integers(1, 4), min_size=4, max_size=4))
def test_transpositions_are_written_as_loops(perm: list[int], shape: list[int]) -> None:
    order = np.arange(np.prod(shape)).reshape(shape).transpose(perm).reshape(-1)
    text = axi._order(order)
    if np.array_equal(order, np.arange(order.size)):
        assert text == "None"
        return
    assert text.startswith("_strided(")
    sizes, strides = eval(text.removeprefix("_strided"))
    np.testing.assert_array_equal(
        np.array(strides) @ np.indices(sizes).reshape(len(sizes), -1), order
    )


# ------------------------------------------------------------------------------------ the files


@pytest.mark.parametrize("bus", [32, 64])
def test_verilator_and_yosys_accept_the_wrapper(tmp_path: Path, bus: int) -> None:
    graph, folding = (pair(), None) if bus == 32 else (network(), FOLDED)
    write(emitted(graph, legalise(graph, folding), bus), tmp_path)
    for goal in ("lint", "check"):
        done = subprocess.run(
            ["make", "-s", goal], cwd=tmp_path / "axi", capture_output=True, text=True
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_lint_sees_the_wrapper(tmp_path: Path) -> None:
    files = emitted(pair(), legalise(pair()))
    write(edited(files, "axi/net_axi.v", r"reg  \[15:0\] batch", "reg  [14:0] batch"), tmp_path)
    done = subprocess.run(["make", "-s", "lint"], cwd=tmp_path / "axi", capture_output=True)
    assert done.returncode != 0


def test_the_files_are_the_same_every_time_and_plain() -> None:
    graph = network()
    once, twice = (emitted(graph, legalise(graph, FOLDED)) for _ in range(2))
    assert once == twice
    made = {n: b for n, b in once.items() if n.startswith("axi/")}
    assert made.keys() == {
        f"axi/{n}"
        for n in (
            "net_axi.v", "qc_axi.v", "qc_axi.vlt", "net_driver.py", "vivado.tcl", "Makefile", "README.md",
        )
    }  # fmt: skip
    for name, text in made.items():
        assert text.isascii(), name
        assert text.endswith(b"\n"), name
        assert b"\n\n\n\n" not in text, name
        assert b'#include "x"' not in text or name == "axi/net_driver.py", name
    for name in ("vivado.tcl", "README.md", "net_driver.py"):
        assert re.search(rb"not run|has been run|never run", made[f"axi/{name}"], re.I), name


def test_the_script_for_vivado_is_tcl_and_connects_everything(tmp_path: Path) -> None:
    graph = pair()
    folder = write(emitted(graph, legalise(graph)), tmp_path) / "axi"
    for made in ("net.runs/impl_1/top.bit", "net.gen/sources_1/bd/system/hw_handoff/system.hwh"):
        (folder / "build" / made).parent.mkdir(parents=True)
        (folder / "build" / made).write_text(made)
    # every command of Vivado prints itself and gives its last word
    (folder / "vivado.sh.tcl").write_text(
        "proc unknown args { puts $args; return [lindex $args end] }\n"
        "set argc 1; set argv xc7z010clg400-1; set info vivado.tcl\n"
        "source vivado.tcl\n"
    )
    done = subprocess.run(
        ["yosys", "-q", "-c", "vivado.sh.tcl"], cwd=folder, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "net.bit").read_text().endswith("top.bit")
    assert (folder / "net.hwh").read_text().endswith("system.hwh")
    lines = done.stdout.splitlines()
    streams = [x for x in lines if x.startswith("connect_bd_intf_net")]
    assert streams == [
        "connect_bd_intf_net in0_dma/M_AXIS_MM2S accelerator/s_axis_in0",
        "connect_bd_intf_net in1_dma/M_AXIS_MM2S accelerator/s_axis_in1",
        "connect_bd_intf_net accelerator/m_axis_out0 out0_dma/S_AXIS_S2MM",
        "connect_bd_intf_net accelerator/m_axis_out1 out1_dma/S_AXIS_S2MM",
    ]
    ends = [re.findall(r"Master (\S+) Slave (\S+) .* (\S+)$", x) for x in lines if "Clk_xbar" in x]
    slaves = ["accelerator/s_axi", *(f"{p}_dma/S_AXI_LITE" for p in ("in0", "in1", "out0", "out1"))]
    masters = [f"in{k}_dma/M_AXI_MM2S" for k in (0, 1)]
    masters += [f"out{k}_dma/M_AXI_S2MM" for k in (0, 1)]
    assert [x for (x,) in ends] == [
        *(("/ps/M_AXI_GP0", f"/{s}", s) for s in slaves),
        *((f"/{m}", "/ps/S_AXI_HP0", m if i else "ps/S_AXI_HP0") for i, m in enumerate(masters)),
    ]


def test_every_pin_of_a_bus_says_so() -> None:
    graph = pair()
    text = emitted(graph, legalise(graph))["axi/net_axi.v"].decode()
    info = r'_INFO = "xilinx.com:\w+:(\w+):1.0 (\w+) (\w+)" \*\)\n(?:.*_PARAMETER.*\n)?.* (\w+),?$'
    said = re.findall(info, text, re.M)
    assert {pin for *_, pin in said} == {n for _, _, n in PIN.findall(text)}
    for kind, bus, pin, name in said:
        if kind in ("axis", "aximm"):
            assert name == f"{bus}_{pin.lower()}"


def test_what_cannot_be_is_refused() -> None:
    g, made, _ = wires(line(8, 1, 16), 16)
    with pytest.raises(BadInput, match="choose one of 32, 64"):
        axi.emit(g, made, "net", {"net.v": b""}, 48)
    with pytest.raises(ValueError, match="no module"):
        axi.emit(g, made, "net", {})
