"""The AXI wrapper and the driver emitted beside it give the graph's codes together, and what goes wrong is seen.

The emitted driver moves its bytes through `board`, which simulates the wrapper and stands for pynq.
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qcompile import border, ir
from qcompile.ir import Array, DType, Graph, Rescale, TensorType, Transpose, arith
from qcompile.targets.hls import axi, token, verilog
from qcompile.targets.hls.legalise import legalise
from qcompile.targets.hls.pipeline import Pipeline, Port
from qcompile.targets.hls.units import Stream
from tests.targets.board import Board, Receiver, Sender, board, pynq
from tests.targets.test_families import data, network
from tests.targets.test_hls_verilog import FOLDED

Files = dict[str, bytes]


def emitted(graph: Graph, pipeline: Pipeline, bus: int = axi.BUS) -> Files:
    """Both folders."""
    none = {p.name: np.zeros((0, *p.shape), p.dtype.numpy) for p in pipeline.inputs}
    rtl = verilog.emit(pipeline, "net", none)
    made = axi.emit(graph, pipeline, "net", rtl, bus)
    return {f"rtl/{n}": b for n, b in rtl.items()} | {f"axi/{n}": b for n, b in made.items()}


def driver(files: Mapping[str, bytes]) -> types.ModuleType:
    made = types.ModuleType("net_driver")
    # dataclasses look their module up
    sys.modules["net_driver"] = made
    exec(compile(files["axi/net_driver.py"], "net_driver.py", "exec"), made.__dict__)
    return made


def pair(dtype: DType = DType.I4) -> Graph:
    """Two inputs, one of them channels first and of another width; two outputs, one channels first."""
    g = Graph("pair")
    a = g.add_input(ir.Port("a", 0.5, 1), TensorType(dtype, (1, 3, 5, 5)))
    b = g.add_input(ir.Port("b", 0.25, 0), TensorType(DType.I16, (1, 5, 5, 3)))
    last = g.add(Transpose((0, 2, 3, 1)), a, name="last")
    vals = (arith.Val((1 << 10,), 1), arith.Val((1 << 3,)))
    total = g.add(Rescale((), vals, (9,), 0, -128, 127, DType.I8), last, b, name="total")
    half = Rescale((), (arith.Val((1 << 9,)),), (10,), 0, -64, 63, DType.I7)
    g.add_output(ir.Port("total", 0.5, 0), total)
    less = g.add(half, total, name="half")
    g.add_output(ir.Port("half", 1.0, 0), g.add(Transpose((0, 3, 1, 2)), less, name="first"))
    g.verify()
    return g


def codes_of(graph: Graph, rows: int) -> dict[str, Array]:
    rng = np.random.default_rng(rows)
    return {
        p.name: rng.integers(
            v.type.dtype.lo, v.type.dtype.hi + 1, (rows, *v.type.shape[1:])
        ).astype(v.type.dtype.numpy)
        for p, v in graph.inputs
    }


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Board], None]:
    return lambda made: monkeypatch.setitem(sys.modules, "pynq", pynq(made))


def same(got: Mapping[str, Array], want: Mapping[str, Array]) -> None:
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert got[name].dtype == x.dtype
        np.testing.assert_array_equal(got[name], x, err_msg=name)


# -------------------------------------------------------------------------------- the whole chain


def test_the_driver_gets_the_graphs_codes_in_the_cycles_of_the_model(
    tmp_path: Path, install: Callable[[Board], None]
) -> None:
    graph = network()
    made = legalise(graph, FOLDED)
    files = emitted(graph, made)
    with board(files, tmp_path) as there:
        install(there)
        accelerator = driver(files).Accelerator("net.bit", batch=3, timeout=120.0)
        codes = data(3)
        # half an image and a reset: nothing of it is left in any unit
        there.send(0, bytes(288), lambda i, n: False)
        for _ in range(300):
            there.cycle()
        assert there.read(axi.REGISTERS["STATUS"]) == 1
        accelerator.reset()
        assert there.read(axi.REGISTERS["STATUS"]) == 0
        same(accelerator.run_codes(codes), graph.run(codes))
        timing = token.simulate(made, 3)
        assert (accelerator.images, accelerator.latency) == (3, timing.latency)
        assert accelerator.interval == timing.interval
        assert there.read(axi.REGISTERS["STATUS"]) == 0


@pytest.mark.parametrize("bus", [32, 64])
def test_two_inputs_and_two_outputs_with_pauses(
    tmp_path: Path, install: Callable[[Board], None], bus: int
) -> None:
    graph = pair()
    files = emitted(graph, legalise(graph), bus)
    with board(files, tmp_path, seed=bus) as there:
        install(there)
        emitted_driver = driver(files)
        accelerator = emitted_driver.Accelerator("net.bit", batch=3)
        codes = codes_of(graph, 8)
        same(accelerator.run_codes(codes), graph.run(codes))
        real = {p.name: border.dequantize(codes[p.name], p) for p, _ in graph.inputs}
        for name, want in border.decode(graph, graph.run(border.encode(graph, real))).items():
            np.testing.assert_array_equal(accelerator.run(real)[name], want)
        assert accelerator.images == 24
        with pytest.raises(ValueError, match="different numbers of rows"):
            accelerator.run_codes({**codes, "a": codes["a"][:2]})
        empty = {name: x[:0] for name, x in codes.items()}
        assert {n: x.shape for n, x in accelerator.run_codes(empty).items()} == {
            "total": (0, 5, 5, 3),
            "half": (0, 3, 5, 5),
        }
        for k, (side, port) in enumerate(
            [("in", p) for p in emitted_driver.INPUTS]
            + [("out", p) for p in emitted_driver.OUTPUTS]
        ):
            block = axi.PORT_BLOCK + 16 * k
            words, beats, images, bits = (there.read(block + 4 * i) for i in range(4))
            assert (words, images) == (port.words, 24), side
            assert beats * bus // 8 == port.image_bytes
            assert bits * words == int(np.prod(port.shape)) * port.bits


def test_the_driver_says_what_is_wrong(
    tmp_path: Path, install: Callable[[Board], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = pair()
    files = emitted(graph, legalise(graph))
    module = driver(files)
    monkeypatch.setitem(sys.modules, "pynq", None)
    with pytest.raises(ImportError, match="runs on a board with a PYNQ image"):
        module.Accelerator("net.bit")
    codes = codes_of(graph, 2)
    with board(files, tmp_path, seed=1) as there:
        install(there)
        other = replace_text(
            files, "axi/net_driver.py", "DESIGN_VALUE = 0x", "DESIGN_VALUE = 1 + 0x"
        )
        with pytest.raises(RuntimeError, match="this driver is for"):
            driver(other).Accelerator("net.bit")
        with pytest.raises(ValueError, match="batch is 1 to 65535"):
            module.Accelerator("net.bit", batch=65536)
        accelerator = module.Accelerator("net.bit", batch=2)
        # the accelerator believes in packets of one image: tlast of two images comes late
        honest = accelerator.registers.write
        monkeypatch.setattr(
            accelerator.registers, "write", lambda at, v: honest(at, 1 if at == module.BATCH else v)
        )
        with pytest.raises(RuntimeError, match="no tlast came with the last beat"):
            accelerator.run_codes(codes)
        monkeypatch.undo()
        same(accelerator.run_codes(codes), graph.run(codes))
        accelerator.timeout = 0.0
        with pytest.raises(RuntimeError, match="nothing came back"):
            accelerator.run_codes(codes)
        accelerator.timeout = 10.0
        same(accelerator.run_codes(codes), graph.run(codes))


FAULTS = {
    "padding that takes the place of words": ("axi/net_axi.v", r"\.PER_BEAT\(4\)", ".PER_BEAT(8)"),
    "a packed word in the wrong bytes": ("axi/net_driver.py", r"= packed$", "= packed[..., ::-1]"),
    "a beat that holds too many words": ("axi/qc_axi.v", r"b_last \? FEW", "b_last ? ALL"),
    "no tlast": ("axi/qc_axi.v", r"if \(take\) last <= ends_packet", "if (take) last <= 1'b0"),
    "tlast with every image": ("axi/qc_axi.v", r"\{1'b0, image\} \+ 17'd1 >= \{1'b0, batch\}", "17'd1 != 0"),
    "a pause that is ignored": ("axi/qc_axi.v", r"assign s_r = !v \| b_r", "assign s_r = 1'b1"),
    "a slice that forgets": ("axi/qc_axi.v", r"s_r  <= run & !fills", "s_r  <= run"),
    "a ready that follows a valid": ("axi/qc_axi.v", r"_awready = !aw;", "_awready = !aw & s_axi_awvalid;"),
    "an order that is lost": ("axi/net_driver.py", r"order=_strided\(.*\)", "order=None"),
    "a sign that is lost": ("axi/net_driver.py", "if self.signed:", "if False:"),
}  # fmt: skip


def replace_text(files: Mapping[str, bytes], name: str, old: str, new: str) -> Files:
    text = files[name].decode()
    changed = re.sub(old, new, text, flags=re.M)
    assert changed != text
    return {**files, name: changed.encode()}


@pytest.mark.parametrize("fault", ["", *FAULTS])
def test_planted_faults_are_found(
    tmp_path: Path, install: Callable[[Board], None], fault: str
) -> None:
    graph = pair()
    files = emitted(graph, legalise(graph), 32)
    if fault:
        files = replace_text(files, *FAULTS[fault])
    codes = codes_of(graph, 4)
    found = ""
    with board(files, tmp_path, seed=3) as there:
        install(there)
        try:
            accelerator = driver(files).Accelerator("net.bit", batch=2, timeout=2.0)
            same(accelerator.run_codes(codes), graph.run(codes))
        except (AssertionError, RuntimeError) as e:
            found = str(e) or "an assertion"
    assert bool(found) == bool(fault), found


# --------------------------------------------------------------------------------- streams alone


def wires(stream: Stream, words: int) -> tuple[Graph, Pipeline, Port]:
    """A pipeline of nothing: what comes in goes out."""
    g = Graph("wires")
    kind = DType.I32
    x = g.add_input(ir.Port("x", 1.0, 0), TensorType(kind, (1, words, stream.lanes)))
    g.add_output(ir.Port("y", 1.0, 0), x)
    port = Port("x", stream, kind, (words, stream.lanes), None, "")
    return g, Pipeline("wires", (port,), (replace(port, name="y"),), ()), port


def line(bits: int, lanes: int, words: int, signed: bool = True) -> Stream:
    return Stream("s", bits, signed, 1, words, lanes, lanes)


def through(bits: int) -> bytes:
    """An accelerator that is a register."""
    return f"""module net (input clk, rst, input [{bits - 1}:0] in0_tdata, input in0_tvalid, output in0_tready,
      output reg [{bits - 1}:0] out0_tdata, output reg out0_tvalid, input out0_tready);
      assign in0_tready = !out0_tvalid | out0_tready;
      always @(posedge clk) begin
        if (in0_tready) out0_tdata <= in0_tdata;
        if (rst) out0_tvalid <= 0;
        else if (in0_tready) out0_tvalid <= in0_tvalid;
      end
    endmodule
    """.encode()


@pytest.mark.parametrize(
    ("bus", "bits", "lanes", "words"),
    [
        (32, 1, 1, 7),
        (32, 4, 3, 5),
        (32, 8, 4, 1),
        (32, 11, 3, 3),
        (32, 16, 7, 2),
        (64, 8, 1, 9),
        (64, 12, 2, 3),
        (64, 13, 5, 4),
        (64, 16, 9, 2),
        (128, 5, 1, 17),
    ],
)
def test_words_of_every_width_pass(
    tmp_path: Path, bus: int, bits: int, lanes: int, words: int
) -> None:
    g, made, port = wires(line(bits, lanes, words), words)
    rtl = {"net.v": through(bits * lanes)}
    files = {f"axi/{n}": b for n, b in axi.emit(g, made, "net", rtl, bus).items()}
    files["rtl/net.v"] = rtl["net.v"]
    there_driver = driver(files)
    rng = np.random.default_rng(bus + bits)
    codes = rng.integers(port.stream.lo, port.stream.hi + 1, (6, *port.shape)).astype(np.int32)
    payload = there_driver.INPUTS[0].pack(codes)
    for seed in (0, 5):
        with board(files, tmp_path / str(seed), seed) as there:
            there.write(axi.REGISTERS["BATCH"], 2)
            there.write(axi.REGISTERS["CONTROL"], 1)
            for at in (0, 2, 4):
                packet = payload[at : at + 2].tobytes()
                there.send(0, packet, lambda i, n: i == n - 1)
                there.receivers[0] = Receiver(open=True)
                start = there.clock
                there.until(lambda: not there.receivers[0].open)
                beats = there.receivers[0].beats
                step = bus // 8
                got = b"".join(b.to_bytes(step, "little") for b in beats)
                assert got == packet
                if seed == 0:
                    # a word a cycle, or a beat a cycle where beats are fewer bits than words, and the registers
                    most = max(2 * words, len(packet) // step)
                    assert there.clock - start <= most + 8
            assert there.read(axi.REGISTERS["STATUS"]) == 0


STEPS = {
    "early": (0x100, lambda i, n: i in (1, n - 1)),
    "missing": (0x200, lambda i, n: False),
}


def test_what_breaks_a_stream_is_flagged_and_a_reset_recovers(tmp_path: Path) -> None:
    g, made, _ = wires(line(8, 1, 16), 16)
    rtl = {"net.v": through(8)}
    files = {f"axi/{n}": b for n, b in axi.emit(g, made, "net", rtl, 32).items()}
    files["rtl/net.v"] = rtl["net.v"]
    image = bytes(range(16))
    r = axi.REGISTERS
    with board(files, tmp_path, seed=9) as there:

        def sends(ends: Callable[[int, int], bool], payload: bytes = image) -> None:
            there.send(0, payload, ends)
            there.until(lambda: not there.senders[0].beats)
            there.receivers[0] = Receiver(open=True)

        def works() -> None:
            there.hold(2)
            there.senders[0], there.receivers[0] = Sender(), Receiver()
            assert there.read(r["STATUS"]) == 0
            there.hold(1)
            assert [there.read(r[n]) for n in ("IMAGES", "LATENCY", "INTERVAL")] == [0, 0, 0]
            sends(lambda i, n: i == n - 1)
            there.until(lambda: not there.receivers[0].open)
            assert b"".join(b.to_bytes(4, "little") for b in there.receivers[0].beats) == image
            assert [there.read(r[n]) for n in ("STATUS", "IMAGES")] == [0, 1]

        # nothing moves before CONTROL says so
        there.send(0, image, lambda i, n: i == n - 1)
        for _ in range(20):
            there.cycle()
        assert len(there.senders[0].beats) == 4
        works()
        for flag, ends in STEPS.values():
            sends(ends)
            there.until(lambda: not there.receivers[0].open)
            assert there.read(r["STATUS"]) == flag
            works()
        there.senders[0].keep = 0b0111
        sends(lambda i, n: i == n - 1)
        there.until(lambda: not there.receivers[0].open)
        assert there.read(r["STATUS"]) == 0x400
        works()
        # half an image, then a reset while a beat waits at the output
        there.send(0, image[:8], lambda i, n: False)
        for _ in range(30):
            there.cycle()
        assert there.read(r["STATUS"]) == 1
        assert there.seen["m_axis_out0_tvalid"] == 1
        works()


def test_registers(tmp_path: Path) -> None:
    g, made, _ = wires(line(8, 1, 16), 16)
    rtl = {"net.v": through(8)}
    files = {f"axi/{n}": b for n, b in axi.emit(g, made, "net", rtl, 32).items()}
    files["rtl/net.v"] = rtl["net.v"]
    module = driver(files)
    with board(files, tmp_path, seed=2) as there:
        known = {getattr(module, n): n for n in axi.REGISTERS}
        assert list(known) == list(axi.REGISTERS.values())
        assert there.read(module.ID) == module.ID_VALUE == axi.ID
        assert there.read(module.DESIGN) == module.DESIGN_VALUE
        assert there.read(module.PORTS) == 1 << 16 | 1
        assert [there.read(0x40 + 4 * i) for i in range(8)] == [16, 4, 0, 8] * 2
        for at in (0x24, 0x3C, 0x60, 0xFFC):
            there.write(at, 0xFFFFFFFF)
            assert there.read(at) == 0
        there.write(module.BATCH, 0x12345678)
        assert there.read(module.BATCH) == there.read(module.BATCH + 3) == 0x5678
        there.write(module.BATCH, 0xABCD, strobe=0b0010)
        assert there.read(module.BATCH) == 0xAB78
        there.write(module.BATCH, 0xABCD, strobe=0b0001)
        assert there.read(module.BATCH) == 0xABCD
        there.write(module.CONTROL, 1, strobe=0b1110)
        assert there.read(module.CONTROL) == 0
        there.write(module.CONTROL, 0xFFFFFFFD)
        assert there.read(module.CONTROL) == 1
        for at in (module.ID, module.DESIGN, module.PORTS, 0x40):
            before = there.read(at)
            there.write(at, ~before & 0xFFFFFFFF)
            assert there.read(at) == before
