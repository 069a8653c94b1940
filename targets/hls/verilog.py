"""The pipeline as Verilog-2005: a top module of library units and FIFOs, memories, test benches, a Makefile.

Every stream is tdata, tvalid and tready as in AXI-Stream: a word moves in the cycles in which both are high. The ports
are in0, in1, ... and out0, out1, ...; `rst` is synchronous. Every unit's registers move together, unless its output
waits for its reader; `token` counts cycles by the same rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qcompile.ir import Array, arith

from ..c.text import Names, c_comment, render
from . import units
from .handshake import DEPTHWISE, MATVEC, POOL
from .pipeline import Pipeline
from .requantize import Copy, Requantize, Row, entry
from .token import work
from .units import Op, Stream

RTL = Path(__file__).parent / "rtl"
NEXTPNR = "--45k --speed 6 --freq 100"
"""The ECP5 part of place and route where the design is for none."""

Vectors = Mapping[str, Array]
"""Images by input port name, stacked."""

LIBRARY = (
    "qc_fifo.v",
    "qc_window.v",
    "qc_matvec.v",
    "qc_multiply.v",
    "qc_taps.v",
    "qc_requantize.v",
    "qc_shift_add.v",
    "qc_route.v",
    "qc_softmax.v",
)


def emit(
    pipeline: Pipeline, name: str, vectors: Vectors, nextpnr: str = NEXTPNR
) -> dict[str, bytes]:
    """The files of the folder rtl/; `name` is the top module, in none of the library's files.

    Vectors are images by input port name; `nextpnr` chooses the ECP5 part and the clock that its router aims at.
    """
    top = Names(("bench",)).fresh(name) or "top"
    files = {f: (RTL / f).read_bytes() for f in LIBRARY}
    if f"{top}.v" in files:
        raise ValueError(f"{top} is a file of the library")
    made = _Top(pipeline)
    files[f"{top}.v"] = made.text(top).encode()
    files |= {n: t.encode() for n, t in made.memories.items()}
    count = len(next(iter(vectors.values())))
    streams = {
        "inputs": [p.stream for p in pipeline.inputs],
        "outputs": [p.stream for p in pipeline.outputs],
    }
    files |= vector_files(pipeline, vectors)
    for template, path in (
        ("sim.cpp.j2", "tb/sim.cpp"),
        ("bench.v.j2", "tb/bench.v"),
        ("Makefile.j2", "Makefile"),
    ):
        text = render(
            template,
            RTL,
            top=top,
            images=count,
            patience=_patience(pipeline),
            ecp5=nextpnr,
            **streams,
        )
        files[path] = text.encode()
    return files


def _patience(pipeline: Pipeline) -> int:
    """More cycles than any image can take: a test bench gives up when nothing moved at the ports for so long."""
    return 1000 + 2 * sum(map(work, pipeline.ops))


def vector_files(pipeline: Pipeline, vectors: Vectors) -> dict[str, bytes]:
    """What goes in and what must come out, one word a line."""
    lines: dict[str, list[str]] = {}
    for i in range(len(next(iter(vectors.values())))):
        env = pipeline.trace({n: a[i] for n, a in vectors.items()})
        for side, ports in (("in", pipeline.inputs), ("out", pipeline.outputs)):
            for k, p in enumerate(ports):
                packed = p.stream.pack(env[p.stream.name])
                text = lines.setdefault(f"vectors/{side}{k}.hex", [])
                text += [_hex(w, p.stream.word_bits) for w in packed]
    return {n: ("\n".join(t) + "\n").encode() for n, t in lines.items()}


def _hex(word: int, bits: int) -> str:
    return f"{word:0{-(-bits // 4)}x}"


def _pack(elements: Sequence[int], bits: int) -> int:
    mask = (1 << bits) - 1
    return sum((x & mask) << (i * bits) for i, x in enumerate(elements))


def _literal(elements: Sequence[int], bits: int) -> str:
    """A sized constant of the elements, the first in the lowest bits."""
    width = bits * len(elements)
    return f"{width}'h{_hex(_pack(elements, bits), width)}"


@dataclass(frozen=True)
class _Wire:
    """Names of one end of a stream."""

    d: str
    v: str
    r: str


@dataclass
class _Top:
    """The text of the top module, unit by unit."""

    pipeline: Pipeline
    memories: dict[str, str] = field(default_factory=dict)
    _wires: list[str] = field(default_factory=list)
    _body: list[str] = field(default_factory=list)
    _writes: dict[str, _Wire] = field(default_factory=dict)
    _reads: dict[str, _Wire] = field(default_factory=dict)

    def text(self, top: str) -> str:
        """The module."""
        ports = ["input  wire clk", "input  wire rst"]
        for k, p in enumerate(self.pipeline.inputs):
            n, bits = f"in{k}", p.stream.word_bits
            ports += [
                f"input  wire [{bits - 1}:0] {n}_tdata",
                f"input  wire {n}_tvalid",
                f"output wire {n}_tready",
            ]
            self._reads[p.stream.name] = _Wire(f"{n}_tdata", f"{n}_tvalid", f"{n}_tready")
        for k, p in enumerate(self.pipeline.outputs):
            n, bits = f"out{k}", p.stream.word_bits
            ports += [
                f"output wire [{bits - 1}:0] {n}_tdata",
                f"output wire {n}_tvalid",
                f"input  wire {n}_tready",
            ]
            self._writes[p.stream.name] = _Wire(f"{n}_tdata", f"{n}_tvalid", f"{n}_tready")
        for s in self.pipeline.fifos.values():
            self._fifo(s)
        for op in self.pipeline.ops:
            self._body.append(f"\n  // {c_comment(op.layer)}: {type(op).__name__}")
            self._unit(op)
        head = f"module {top} (\n    " + ",\n    ".join(ports) + ");\n"
        comment = "// The accelerator: streams in, streams out; a word moves where tvalid and tready are both high.\n"
        body = "\n".join([*self._wires, *self._body])
        return f"{comment}`default_nettype none\n{head}{body}\nendmodule\n`default_nettype wire\n"

    def _wire(self, name: str, bits: int = 1) -> str:
        self._wires.append(f"  wire {f'[{bits - 1}:0] ' if bits > 1 else ''}{name};")
        return name

    def _end(self, name: str, bits: int) -> _Wire:
        wide = f"[{bits - 1}:0] "
        self._wires.append(f"  wire {wide}{name}_d; wire {name}_v, {name}_r;")
        return _Wire(f"{name}_d", f"{name}_v", f"{name}_r")

    def _fifo(self, s: Stream) -> None:
        i, o = self._end(f"{s.name}_i", s.word_bits), self._end(f"{s.name}_o", s.word_bits)
        self._writes[s.name], self._reads[s.name] = i, o
        self._instance(
            "qc_fifo", f"{s.name}_fifo", {"W": s.word_bits, "D": s.depth}, _source(i) | _sink(o)
        )

    def _instance(
        self,
        module: str,
        name: str,
        parameters: Mapping[str, object],
        ports: Mapping[str, str],
        reset: bool = True,
    ) -> None:
        pins = {"clk": "clk"} | ({"rst": "rst"} if reset else {}) | dict(ports)
        given = ", ".join(f".{k}({v})" for k, v in parameters.items())
        joined = ", ".join(f".{k}({v})" for k, v in pins.items())
        self._body.append(f"  {module} #({given}) {name} (\n      {joined});")

    def _memory(self, name: str, words: Sequence[Sequence[int]], bits: int) -> str:
        """A memory's file, one word a line, as a string literal."""
        width = bits * len(words[0])
        self.memories[f"{name}.mem"] = "".join(_hex(_pack(w, bits), width) + "\n" for w in words)
        return f'"{name}.mem"'

    # -------------------------------------------------------------------------------- units

    def _unit(self, op: Op) -> None:
        ins = [self._reads[s.name] for s in op.inputs]
        outs = [self._writes[s.name] for s in op.outputs]
        x, y = op.inputs[0], op.output
        both = _source(ins[0]) | _sink(outs[0])
        p: dict[str, object]
        match op:
            case units.Window():
                self._instance("qc_window", op.name, _window(op), both)
            case units.MatrixVector() | units.Depthwise() | units.SumPool() | units.GlobalSum():
                self._sum(op, ins, outs[0])
            case units.Elementwise():
                self._elementwise(op, ins, outs[0])
            case units.MaxPool():
                p = {"LANES": x.lanes, "TAPS": x.taps, "XB": x.bits, "XS": int(x.signed)}
                self._instance("qc_max_pool", op.name, p, both)
            case units.Table():
                file = self._memory(f"{op.name}_table", op.table.reshape(-1, 1).tolist(), y.bits)
                p = {"LANES": x.lanes, "XB": x.bits, "FLIP": -x.lo, "OB": y.bits, "FILE": file}
                self._instance("qc_table", op.name, p, both)
            case units.Concat():
                p = {
                    "W": y.word_bits,
                    "N": len(ins),
                    "COUNTS": _literal([s.folds for s in op.inputs], 32),
                }
                self._instance("qc_concat", op.name, p, _sources(ins) | _sink(outs[0]))
            case units.ChannelPad():
                self._channel_pad(op, ins[0], outs[0])
            case units.Fork():
                m = {"m_v": _join(w.v for w in outs), "m_r": _join(w.r for w in outs)}
                s = {"s_v": ins[0].v, "s_r": ins[0].r}
                self._instance("qc_fork", op.name, {"N": len(outs)}, s | m)
                self._body += [f"  assign {w.d} = {ins[0].d};" for w in outs]
            case units.Width():
                wide = y.lanes > x.lanes
                n = max(x.lanes, y.lanes) // min(x.lanes, y.lanes)
                p = {"W": min(x.word_bits, y.word_bits), "N": n}
                self._instance("qc_widen" if wide else "qc_narrow", op.name, p, both)
            case units.Softmax():
                file = self._memory(f"{op.name}_table", op.table.reshape(-1, 1).tolist(), 32)
                p = {
                    "C": y.channels,
                    "XB": x.bits,
                    "XS": int(x.signed),
                    "OB": y.bits,
                    "LINE": f"34'sd{int(arith.LINE_CONSTANT)}",
                    "SLOPE": f"34'sd{int(arith.LINE_SLOPE)}",
                    "FILE": file,
                }
                self._instance("qc_softmax", op.name, p, both)
            case _:
                raise AssertionError(type(op).__name__)

    def _channel_pad(self, op: units.ChannelPad, x: _Wire, out: _Wire) -> None:
        """A concatenation whose other parts are constants that are always there."""
        y = op.output
        fill = _literal([op.fill] * y.lanes, y.bits)
        sources = ((fill, "1'b1"), (x.d, x.v), (fill, "1'b1"))
        parts = [(d, v, n) for (d, v), n in zip(sources, op.runs, strict=True) if n]
        ready = self._wire(f"{op.name}_ready", len(parts))
        p = {
            "W": y.word_bits,
            "N": len(parts),
            "COUNTS": _literal([n for *_, n in parts], 32),
        }
        ports = {
            "s_d": _join(d for d, *_ in parts),
            "s_v": _join(v for _, v, _ in parts),
            "s_r": ready,
        }
        self._instance("qc_concat", op.name, p, ports | _sink(out))
        self._body.append(f"  assign {x.r} = {ready}[{int(op.runs[0] > 0)}];")

    def _sum(self, op: units.Sum, ins: Sequence[_Wire], out: _Wire) -> None:
        """A unit's core, then its requantization; the values that join it wait beside the core."""
        x, y, n = op.inputs[0], op.output, op.name
        lanes, acc = y.lanes, op.acc_bits
        p: dict[str, object] = {"XB": x.bits, "XS": int(x.signed), "AB": acc}
        match op:
            case units.MatrixVector():
                module, latency = "qc_matvec", MATVEC
                o, k = op.weights.shape
                nf, sf = o // op.pe, k // op.simd
                rows = op.weights.reshape(nf, op.pe, sf, op.simd).transpose(0, 2, 1, 3)
                p |= {"PE": op.pe, "SIMD": op.simd, "SF": sf, "NF": nf, "WB": op.weight_bits}
                p |= self._weights(op, rows.reshape(nf * sf, -1).tolist(), op.bias.tolist())
            case units.Depthwise():
                module, latency = "qc_depthwise", DEPTHWISE
                w = op.weights.reshape(-1, lanes, x.taps).transpose(0, 2, 1)
                p |= {"LANES": lanes, "TAPS": x.taps, "F": len(w), "WB": op.weight_bits}
                p |= self._weights(op, w.reshape(-1, lanes).tolist(), op.bias.tolist())
            case units.SumPool():
                module, latency = "qc_sum_pool", POOL
                p |= {"LANES": lanes, "TAPS": x.taps, "ZERO": op.zero_point}
            case units.GlobalSum():
                module, latency = "qc_global_sum", POOL
                folds = x.channels // x.lanes
                p |= {"LANES": lanes, "PIXELS": x.words // folds, "F": folds, "ZERO": op.zero_point}
            case _:
                raise AssertionError(type(op).__name__)
        en = self._wire(f"{n}_en")
        o_d, o_v = self._wire(f"{n}_acc", lanes * acc), self._wire(f"{n}_done")
        terms = ins[1:]
        k_r = self._wire(f"{n}_take")
        core = {"en": en, **_source(ins[0]), "o_d": o_d, "o_v": o_v, "k_r": k_r}
        core["k_v"] = " & ".join(t.v for t in terms) if terms else "1'b1"
        self._instance(module, f"{n}_core", p, core)
        if op.requantize is None:
            self._body.append(f"  assign {en} = !{o_v} | {out.r};")
            self._body.append(f"  assign {out.d} = {o_d};\n  assign {out.v} = {o_v};")
            return
        values = []
        for i, (t, s) in enumerate(zip(terms, op.inputs[1:], strict=True)):
            self._body.append(f"  assign {t.r} = {k_r};")
            d = self._wire(f"{n}_skip{i}", s.word_bits)
            ports = {"en": en, "d": t.d, "q": d}
            self._instance(
                "qc_delay", f"{n}_wait{i}", {"W": s.word_bits, "N": latency}, ports, reset=False
            )
            values.append((d, s.bits, s.signed))
        self._requantize(op, op.requantize, [(o_d, acc, True)], values, o_v, en, out)

    def _weights(
        self, op: Op, words: Sequence[Sequence[int]], bias: Sequence[int]
    ) -> dict[str, object]:
        assert isinstance(op, units.MatrixVector | units.Depthwise)
        lanes = op.output.lanes
        rows = [bias[i : i + lanes] for i in range(0, len(bias), lanes)]
        return {
            "WEIGHTS": self._memory(f"{op.name}_weights", words, op.weight_bits),
            "BIAS": self._memory(f"{op.name}_bias", rows, op.acc_bits),
        }

    def _elementwise(self, op: units.Elementwise, ins: Sequence[_Wire], out: _Wire) -> None:
        n = op.name
        en, v = self._wire(f"{n}_en"), self._wire(f"{n}_all")
        self._body.append(f"  assign {v} = {' & '.join(w.v for w in ins)};")
        self._body += [f"  assign {w.r} = {en} & {v};" for w in ins]
        operands = [(w.d, s.bits, s.signed) for w, s in zip(ins, op.inputs, strict=True)]
        split = len(op.requantize.accs)
        self._requantize(op, op.requantize, operands[:split], operands[split:], v, en, out)

    def _requantize(
        self,
        op: Op,
        r: Requantize,
        accs: Sequence[tuple[str, int, bool]],
        vals: Sequence[tuple[str, int, bool]],
        v: str,
        en: str,
        out: _Wire,
    ) -> None:
        """Terms, each of a multiplication or shifted copies, and a shift; then their sum."""
        n, y = op.name, op.output
        folds = y.channels // y.lanes
        words = y.pixels if r.spatial else folds
        bits = max(1, (words - 1).bit_length())
        index = self._wire(f"{n}_index", bits)
        if not index_needed(r, words):
            self._body.append(f"  assign {index} = 0;")
        else:
            counts = {"INNER": folds if r.spatial else 1, "COUNT": words, "IB": bits}
            self._instance("qc_index", f"{n}_at", counts, {"step": f"{v} & {en}", "index": index})

        def words_of(entries: Row) -> list[list[int]]:
            return [
                [entry(entries, i if r.spatial else i * y.lanes + k) for k in range(y.lanes)]
                for i in range(words if len(entries) > 1 else 1)
            ]

        def row(kind: str, entries: Row, width: int, letter: str) -> dict[str, object]:
            """Parameters of one field: a constant, or a memory of one word for each index."""
            table = words_of(entries)
            size = {f"D_{letter}": len(table)}
            if len(table) == 1:
                return {**size, letter: _literal(table[0], width)}
            return {**size, f"{kind.upper()}S": self._memory(f"{n}_{kind}", table, width)}

        def read(kind: str, entries: Row, width: int) -> str:
            """A wire that carries one field, a cycle after its index."""
            table, q = words_of(entries), self._wire(f"{n}_{kind}", y.lanes * width)
            size: dict[str, object] = {"W": y.lanes * width, "D": len(table), "IB": bits}
            if len(table) == 1:
                size["CONSTANT"] = _literal(table[0], width)
            else:
                size["FILE"] = self._memory(f"{n}_{kind}", table, width)
            ports = {"en": en, "index": index, "q": q}
            self._instance("qc_words", f"{n}_{kind}s", size, ports, reset=False)
            return q

        terms: list[str] = []
        p: dict[str, object]
        scaled: list[tuple[tuple[str, int, bool], Row, int, Row, tuple[Copy, ...], int]] = []
        for a, operand in zip(r.accs, accs, strict=True):
            scaled.append((operand, a.multiplier, a.m_bits + 1, a.shift, a.copies, a.product_bits))
        for b, operand in zip(r.vals, vals, strict=True):
            scaled.append((operand, b.multiplier, b.n_bits, (0,), b.copies, b.product_bits))
        for i, ((d, xb, xs), m, mb, shift, copies, pb) in enumerate(scaled):
            t = self._wire(f"{n}_t{i}", y.lanes * r.t_bits)
            sb = max(1, max(shift).bit_length())
            p = {"PE": y.lanes, "XB": xb, "XS": int(xs), "SB": sb, "TB": r.t_bits, "IB": bits}
            fields = row(f"t{i}_shift", shift, sb, "S")
            ports = {"en": en, "index": index, "x": d, "t": t}
            if copies:
                module = "qc_shift_add"
                kb = max(1, *(max(c.position).bit_length() for c in copies))
                p |= {"PB": pb, "COPIES": len(copies), "KB": kb}
                for kind, width, rows in (
                    ("position", kb, [c.position for c in copies]),
                    ("sign", 2, [c.sign for c in copies]),
                ):
                    parts = [read(f"t{i}_{kind}{k}", x, width) for k, x in enumerate(rows)]
                    ports[kind] = _join(parts)
            else:
                module = "qc_scale"
                p["MB"] = mb
                fields |= row(f"t{i}_multiplier", m, mb, "M")
            p |= {k.removeprefix(f"T{i}_"): x for k, x in fields.items()}
            self._instance(module, f"{n}_scale{i}", p, ports, reset=False)
            terms.append(t)
        sb = max(1, max(r.shift).bit_length())
        p = {
            "PE": y.lanes, "TERMS": len(terms), "TB": r.t_bits, "SB": sb, "OB": y.bits, "ZERO": r.zero,
            "LO": r.lo, "HI": r.hi, "IB": bits,
        }  # fmt: skip
        p |= row("offset", r.offset, r.t_bits, "O") | row("shift", r.shift, sb, "S")
        ports = {"en": en, "index": index, "v": v, "t": _join(terms), **_sink(out)}
        self._instance("qc_finish", f"{n}_finish", p, ports)


def index_needed(r: Requantize, words: int) -> bool:
    """Does any parameter differ from word to word?"""
    rows = [r.offset, r.shift, *(x for a in r.accs for x in (a.multiplier, a.shift))]
    rows += [b.multiplier for b in r.vals]
    return words > 1 and any(len(x) > 1 for x in rows)


def _window(op: units.Window) -> dict[str, object]:
    x, y = op.inputs[0], op.output
    top, left, bottom, right = op.pads
    return {
        "W": x.word_bits, "F": x.channels // x.lanes, "H": x.height, "WD": x.width,
        "OH": y.height, "OW": y.width,
        "KH": op.kernel[0], "KW": op.kernel[1], "SH": op.strides[0], "SW": op.strides[1],
        "DH": op.dilations[0], "DW": op.dilations[1],
        "PT": top, "PL": left, "PB": bottom, "PR": right,
        "BY_CHANNEL": int(y.by_channel), "FILL": _literal([op.fill] * x.lanes, x.bits),
    }  # fmt: skip


def _source(w: _Wire) -> dict[str, str]:
    return {"s_d": w.d, "s_v": w.v, "s_r": w.r}


def _sources(ws: Sequence[_Wire]) -> dict[str, str]:
    return {
        "s_d": _join(w.d for w in ws),
        "s_v": _join(w.v for w in ws),
        "s_r": _join(w.r for w in ws),
    }


def _sink(w: _Wire) -> dict[str, str]:
    return {"m_d": w.d, "m_v": w.v, "m_r": w.r}


def _join(names: Iterable[str]) -> str:
    """The first in the lowest bits."""
    return "{" + ", ".join(reversed(list(names))) + "}"
