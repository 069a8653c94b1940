"""The emitted accelerator behind AXI for a Zynq: AXI4-Streams, registers behind AXI4-Lite, a Python driver for PYNQ.

An image travels as whole beats of the bus. A word of at most a beat takes the smallest power-of-two number of bytes
that holds it, and as many words as fit share a beat, the first in the lowest bytes; a wider word takes as many beats as
it needs. Padding is zero and is not looked at. tlast marks the last beat of a packet of BATCH images.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from qcompile.errors import BadInput
from qcompile.ir import Graph
from qcompile.target import CLOCK_MHZ

from ..c.text import c_comment, render
from .cplusplus import HERE, PART
from .pipeline import Pipeline, Port
from .units import Stream
from .verilog import RTL

BUS = 64
"""Bits of a beat: what the high-performance ports of a Zynq-7000 carry."""

BUSES = (32, 64, 128, 256, 512, 1024)
"""The widths that AXI DMA engines have."""

ID = 0x71630001
"""What the first register reads: `qc`, and which of its register maps this is."""

REGISTERS = {
    name: 4 * at
    for at, name in enumerate(
        ("ID", "DESIGN", "CONTROL", "STATUS", "BATCH", "IMAGES", "LATENCY", "INTERVAL", "PORTS")
    )
}
PORT_BLOCK = 0x40
"""Where the first port's four registers stand: words, beats, images, word bits; inputs first, then outputs."""

_LITE = (
    ("input ", "[{a}:0] ", "awaddr"),
    ("input ", "[2:0] ", "awprot"),
    ("input ", "", "awvalid"),
    ("output", "", "awready"),
    ("input ", "[31:0] ", "wdata"),
    ("input ", "[3:0] ", "wstrb"),
    ("input ", "", "wvalid"),
    ("output", "", "wready"),
    ("output", "[1:0] ", "bresp"),
    ("output", "", "bvalid"),
    ("input ", "", "bready"),
    ("input ", "[{a}:0] ", "araddr"),
    ("input ", "[2:0] ", "arprot"),
    ("input ", "", "arvalid"),
    ("output", "", "arready"),
    ("output", "[31:0] ", "rdata"),
    ("output", "[1:0] ", "rresp"),
    ("output", "", "rvalid"),
    ("input ", "", "rready"),
)


@dataclass(frozen=True)
class Framing:
    """How a stream's words stand in beats of `bus` bits: several in one, or one in several."""

    stream: Stream
    bus: int

    @property
    def word_bytes(self) -> int:
        """Bytes from one word to the next."""
        least, beat = -(-self.stream.word_bits // 8), self.bus // 8
        return 1 << (least - 1).bit_length() if least <= beat else -(-least // beat) * beat

    @property
    def per_beat(self) -> int:
        """Words that share a beat; 1 where a word takes one beat or more."""
        return max(1, self.bus // 8 // self.word_bytes)

    @property
    def per_word(self) -> int:
        """Beats of a word; 1 where words share beats."""
        return max(1, self.word_bytes * 8 // self.bus)

    @property
    def beats(self) -> int:
        """Beats of an image."""
        return -(-self.stream.words * self.per_word // self.per_beat)

    @property
    def image_bytes(self) -> int:
        """Bytes of an image."""
        return self.beats * self.bus // 8


@dataclass(frozen=True)
class _Side:
    """A port as the templates see it."""

    port: Port
    framing: Framing
    sent: bool
    index: int
    at: int
    scale: float
    zero_point: int

    @property
    def name(self) -> str:
        return f"{'in' if self.sent else 'out'}{self.index}"

    @property
    def axi(self) -> str:
        return f"{'s' if self.sent else 'm'}_axis_{self.name}"

    @property
    def comment(self) -> str:
        return c_comment(self.port.name)

    @property
    def words(self) -> int:
        return self.port.stream.words

    @property
    def word_bits(self) -> int:
        return self.port.stream.word_bits

    @property
    def beats(self) -> int:
        return self.framing.beats

    @property
    def per_beat(self) -> int:
        return self.framing.per_beat

    @property
    def per_word(self) -> int:
        return self.framing.per_word

    @property
    def pins(self) -> list[tuple[str, str, str]]:
        """Direction, range and name of the pins of its AXI4-Stream."""
        there, back = ("input ", "output") if self.sent else ("output", "input ")
        bus = self.framing.bus
        return [
            (there, f"[{bus - 1}:0] ", "tdata"),
            (there, f"[{bus // 8 - 1}:0] ", "tkeep"),
            (there, "", "tlast"),
            (there, "", "tvalid"),
            (back, "", "tready"),
        ]

    @property
    def python(self) -> dict[str, str]:
        """The fields of the driver's Port, as Python expressions."""
        p, s = self.port, self.port.stream
        return {
            "name": ascii(p.name),
            "shape": repr(p.shape),
            "dtype": repr(p.dtype.numpy.name),
            "codes": repr((p.dtype.lo, p.dtype.hi)),
            "scale": repr(self.scale),
            "zero_point": repr(self.zero_point),
            "bits": repr(s.bits),
            "signed": repr(s.signed),
            "words": repr(s.words),
            "word_bytes": repr(self.framing.word_bytes),
            "image_bytes": repr(self.framing.image_bytes),
            "order": _order(p.order),
        }


def emit(
    graph: Graph,
    pipeline: Pipeline,
    top: str,
    rtl: Mapping[str, bytes],
    bus: int = BUS,
    part: str = PART,
    clock_mhz: float = CLOCK_MHZ,
) -> dict[str, bytes]:
    """The files of the folder axi/ beside rtl/, whose files are `rtl` and whose top module is `top`.

    The script for Vivado is for a Zynq-7000 `part`, and missing for others.
    """
    if bus not in BUSES:
        raise BadInput(f"an AXI4-Stream of {bus} bits; choose one of {', '.join(map(str, BUSES))}")
    if f"{top}.v" not in rtl:
        raise ValueError(f"{top} is no module of the Verilog")
    sides = _sides(graph, pipeline, bus)
    inputs, outputs = ([s for s in sides if s.sent is sent] for sent in (True, False))
    address_bits = max(12, (PORT_BLOCK + 16 * len(sides) - 1).bit_length())
    design = _design(sides, bus, rtl)
    reads = {
        "ID": f"32'h{ID:08x}",
        "DESIGN": f"32'h{design:08x}",
        "CONTROL": "{30'd0, hold, run}",
        "STATUS": "{21'd0, faults, 7'd0, busy}",
        "BATCH": "{16'd0, batch}",
        "IMAGES": "images",
        "LATENCY": "latency",
        "INTERVAL": "interval",
        "PORTS": f"{{16'd{len(outputs)}, 16'd{len(inputs)}}}",
    }
    facts: dict[str, object] = {
        "top": top,
        "part": part,
        "mhz": f"{clock_mhz:g}",
        "bus": bus,
        "ports": sides,
        "inputs": inputs,
        "outputs": outputs,
        "registers": REGISTERS,
        "port_block": PORT_BLOCK,
        "id": ID,
        "design": design,
        "address_bits": address_bits,
        "lite": [(d, r.format(a=address_bits - 1), pin) for d, r, pin in _LITE],
        "reads": list(reads.items()),
        "memory": [f"{s.name}_dma/M_AXI_{'MM2S' if s.sent else 'S2MM'}" for s in sides],
    }
    texts = {
        f"{top}_axi.v": render("axi.v.j2", RTL, **facts),
        f"{top}_driver.py": render("axi_driver.py.j2", HERE, **facts),
        "Makefile": render("axi.mk.j2", HERE, **facts),
        "README.md": render("axi.md.j2", HERE, **facts),
    }
    if part.startswith("xc7z"):
        texts["vivado.tcl"] = render("axi.tcl.j2", HERE, **facts)
    files = {path: text.encode() for path, text in texts.items()}
    return files | {name: (RTL / name).read_bytes() for name in ("qc_axi.v", "qc_axi.vlt")}


def _design(sides: Sequence[_Side], bus: int, rtl: Mapping[str, bytes]) -> int:
    """A number that changes with the logic, with how its ports travel and with what their codes mean."""
    logic = [rtl[n] for n in sorted(rtl) if n.endswith((".v", ".mem")) and "/" not in n]
    return zlib.crc32(b"".join([*logic, repr([bus, *(s.python for s in sides)]).encode()]))


def _sides(graph: Graph, pipeline: Pipeline, bus: int) -> list[_Side]:
    borders = {True: graph.inputs, False: graph.outputs}
    made: list[_Side] = []
    for sent, ports in ((True, pipeline.inputs), (False, pipeline.outputs)):
        for index, (port, (border, _)) in enumerate(zip(ports, borders[sent], strict=True)):
            at = PORT_BLOCK + 16 * len(made)
            framing = Framing(port.stream, bus)
            made.append(
                _Side(port, framing, sent, index, at, float(border.scale), border.zero_point)
            )
    return made


def _order(order: NDArray[np.int64] | None) -> str:
    """A Python expression for a permutation: a transposition's sizes and strides, where it is one."""
    if order is None or np.array_equal(order, np.arange(order.size)):
        return "None"
    sizes, strides = _strides(order)
    grid = np.indices(sizes).reshape(len(sizes), -1)
    if np.array_equal(np.array(strides) @ grid, order):
        return f"_strided({sizes}, {strides})"
    return f"np.array({order.tolist()})"


def _strides(order: NDArray[np.int64]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The nested loops that make the order, the outermost first, as far as loops do."""
    sizes: list[int] = []
    strides: list[int] = []
    rest = order.tolist()
    while len(rest) > 1:
        step = rest[1] - rest[0]
        run = next(
            (i for i, (a, b) in enumerate(pairwise(rest), start=1) if b - a != step), len(rest)
        )
        sizes.insert(0, run)
        strides.insert(0, step)
        rest = rest[::run]
    return tuple(sizes), tuple(strides)
