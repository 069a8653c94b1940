"""A unit in C++: the class that configures its kernel, the tables it reads and the statement that runs it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qcompile.ir import arith

from . import units
from .requantize import AccTerm, Requantize, Row, ValTerm, signed_bits
from .units import Op, Stream

_NUMBERS_PER_LINE = 16


@dataclass(frozen=True, slots=True)
class Layer:
    """`config` is the class for parameters.h, `tables` the contents of its file of weights, empty where it has none."""

    name: str
    config: str
    tables: str
    call: str


def layer(op: Op, arguments: Mapping[str, str]) -> Layer:
    """The C++ of a unit; `arguments` says what the streams of the ports are called."""
    c = _Config(op)
    ins, outs = ([arguments.get(s.name, s.name) for s in ends] for ends in (op.inputs, op.outputs))
    match op:
        case units.Window():
            kernel, streams = "window", [*ins, *outs]
            c.window(op)
        case units.MatrixVector():
            kernel, streams = "matrix_vector", [ins[0], *outs, *ins[1:]]
            c.matrix_vector(op)
        case units.Depthwise():
            kernel, streams = "depthwise", [ins[0], *outs, *ins[1:]]
            c.depthwise(op)
        case units.SumPool():
            kernel, streams = "sum_pool", [ins[0], *outs, *ins[1:]]
            c.sum_pool(op)
        case units.GlobalSum():
            kernel, streams = "global_sum", [ins[0], *outs, *ins[1:]]
            c.global_sum(op)
        case units.MaxPool():
            kernel, streams = "max_pool", [*ins, *outs]
            c.sizes(words=op.output.words, taps=op.inputs[0].taps, lanes=op.output.lanes)
            c.type("x_t", number(op.output))
        case units.Elementwise():
            kernel, streams = "elementwise", [*outs, *ins]
            c.elementwise(op)
        case units.Table():
            kernel, streams = "table", [*ins, *outs]
            c.table(op)
        case units.Concat():
            kernel, streams = "concat", [*outs, *ins]
            c.concat(op)
        case units.ChannelPad():
            kernel, streams = "pad_channels", [*ins, *outs]
            before, words, after = op.runs
            c.sizes(
                pixels=op.output.pixels, before=before, words=words, after=after,
                lanes=op.output.lanes, bits=op.output.bits, fill=op.fill,
            )  # fmt: skip
        case units.Softmax():
            kernel, streams = "softmax", [*ins, *outs]
            c.softmax(op)
        case units.Fork():
            kernel, streams = "fork", [*ins, *outs]
            c.sizes(words=op.output.words)
        case units.Width():
            x, y = op.inputs[0], op.output
            kernel, streams = ("widen" if y.lanes > x.lanes else "narrow"), [*ins, *outs]
            c.sizes(
                words=max(x.words, y.words), ratio=max(x.lanes, y.lanes) // min(x.lanes, y.lanes)
            )
        case _:
            raise TypeError(f"{type(op).__name__} has no C++")
    call = f"qc::{kernel}<{c.name}>({', '.join(streams)});"
    return Layer(op.name, c.text(), "".join(c.tables), call)


def number(s: Stream) -> str:
    """The type of an element."""
    return _int(s.bits) if s.signed else f"ap_uint<{s.bits}>"


def literal(value: int, bits: int) -> str:
    """A constant; beyond 64 bits its two's complement pattern in a string."""
    if bits > 64:
        return f'"0x{value & ((1 << bits) - 1):x}"'
    if value == -(1 << 63):
        return "(-9223372036854775807LL - 1)"
    if value >= 1 << 63:
        raise ValueError(f"{value} is no signed number of 64 bits")
    return f"{value}LL" if not -(1 << 31) < value < 1 << 31 else str(value)


def _int(bits: int) -> str:
    return f"ap_int<{bits}>"


@dataclass(slots=True)
class _Config:
    op: Op
    lines: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.op.name}_config"

    def text(self) -> str:
        """The class, laid out by the caller."""
        body = "\n".join(self.lines)
        return f"/* {type(self.op).__name__} of {comment(self.op.layer)} */\nstruct {self.name} {{\n{body}\n}};\n"

    # ------------------------------------------------------------------------ pieces

    def sizes(self, **values: int) -> None:
        self.lines += [f"static const int {k} = {literal(v, 32)};" for k, v in values.items()]

    def flag(self, name: str, value: bool) -> None:
        self.lines.append(f"static const bool {name} = {'true' if value else 'false'};")

    def type(self, name: str, kind: str) -> None:
        self.lines.append(f"typedef {kind} {name};")

    def function(self, result: str, signature: str, body: Sequence[str]) -> None:
        self.lines += ["", f"static {result} {signature} {{", "#pragma HLS INLINE", *body, "}"]

    def rom(self, what: str, kind: str, bits: int, rows: Sequence[Sequence[int]]) -> str:
        """A table of one row for each lane; the rows are memories of their own."""
        name = f"{self.op.name}_{what}"
        texts = (_wrapped([literal(v, bits) for v in row]) for row in rows)
        lines = ",\n".join("{" + t + "}" for t in texts)
        self.tables.append(
            f"static const qc::rom<{kind} >::type {name}[{len(rows)}][{len(rows[0])}] = {{\n{lines}}};\n"
        )
        return name

    def table_function(
        self, what: str, kind: str, bits: int, rows: Sequence[Sequence[int]], index: str
    ) -> None:
        """An access to a table by lane and `index`."""
        name = self.rom(f"{what}_table", kind, bits, rows)
        self.function(
            kind,
            f"{what}(int lane, int {index})",
            [_partition(name), f"return {kind}({name}[lane][{index}]);"],
        )

    # ------------------------------------------------------------------------- units

    def window(self, op: units.Window) -> None:
        x, y = op.inputs[0], op.output
        below = (op.kernel[0] - 1) * op.dilations[0]
        rows = min(x.height, below + 1 + op.strides[0])
        first = min(max(below + 1 - op.pads[0], 0), x.height)
        row_words, out_row_words = x.width * x.folds, y.width * y.folds
        self.sizes(
            lanes=x.lanes,
            bits=x.bits,
            fill=op.fill,
            height=x.height,
            width=x.width,
            folds=x.folds,
            out_height=y.height,
            kernel_height=op.kernel[0],
            kernel_width=op.kernel[1],
            stride_height=op.strides[0],
            stride_width=op.strides[1],
            dilation_height=op.dilations[0],
            dilation_width=op.dilations[1],
            pad_top=op.pads[0],
            pad_left=op.pads[1],
            below=below,
            row_words=row_words,
            out_row_words=out_row_words,
            row_steps=max(out_row_words, min(op.strides[0], x.height) * row_words),
            ring_words=rows * row_words,
            first_rows=first,
            first_top=-op.pads[0] % rows * row_words,
            stride_at=op.strides[0] % rows * row_words,
            dilation_at=op.dilations[0] % rows * row_words,
        )
        self.flag("by_channel", y.by_channel)

    def matrix_vector(self, op: units.MatrixVector) -> None:
        outputs, depth = op.weights.shape
        groups, steps = outputs // op.pe, depth // op.simd
        self.sizes(lanes=op.pe, simd=op.simd, pixels=op.vectors, groups=groups, steps=steps)
        self._accumulate(op)
        self.type("w_t", _int(op.weight_bits))
        words = op.weights.reshape(groups, op.pe, steps, op.simd).transpose(1, 0, 2, 3)
        bits = op.simd * op.weight_bits
        rows = [_packed(w.reshape(-1, op.simd), op.weight_bits) for w in words]
        if bits == 64:
            rows = [[v - (v >> 63 << 64) for v in row] for row in rows]
        self.table_function("weights", f"ap_uint<{bits}>", bits, rows, "at")
        self._bias(op.bias, op)
        self._finish(op)

    def depthwise(self, op: units.Depthwise) -> None:
        lanes = op.output.lanes
        self._lanewise_sum(op)
        self._accumulate(op)
        w = op.weights.reshape(-1, lanes, op.weights.shape[1]).transpose(1, 0, 2)
        rows = w.reshape(lanes, -1).tolist()
        self.table_function("weight", _int(op.weight_bits), op.weight_bits, rows, "at")
        self._bias(op.bias, op)
        self._finish(op)

    def sum_pool(self, op: units.SumPool) -> None:
        self._lanewise_sum(op)
        self._accumulate(op)
        self._zero(op.zero_point)
        self._finish(op)

    def global_sum(self, op: units.GlobalSum) -> None:
        x = op.inputs[0]
        self.sizes(lanes=x.lanes, pixels=x.pixels, groups=x.channels // x.lanes)
        self._accumulate(op)
        self._zero(op.zero_point)
        self._finish(op)

    def _lanewise_sum(self, op: units.Sum) -> None:
        x, y = op.inputs[0], op.output
        self.sizes(lanes=y.lanes, pixels=y.pixels, groups=y.channels // y.lanes, taps=x.taps)

    def _accumulate(self, op: units.Sum) -> None:
        self.type("x_t", number(op.inputs[0]))
        self.type("acc_t", _int(op.acc_bits))

    def _zero(self, zero: int) -> None:
        self.sizes(zero=zero)
        self.type("zero_t", _int(signed_bits(min(zero, 0), max(zero, 0))))

    def _bias(self, bias: NDArray[np.int64], op: units.Sum) -> None:
        rows = bias.reshape(-1, op.output.lanes).T.tolist()
        bits = signed_bits(int(bias.min()), int(bias.max()))
        self.table_function("bias", _int(bits), bits, rows, "group")

    def elementwise(self, op: units.Elementwise) -> None:
        y = op.output
        self.sizes(lanes=y.lanes, pixels=y.pixels, groups=y.channels // y.lanes)
        operands = [number(s) for s in op.inputs]
        self._requantize(op.requantize, operands, y)
        words = [f"const {word(s)} &word{i}" for i, s in enumerate(op.inputs)]
        lanes = [f"qc::lane<{kind} >(word{i}, lane)" for i, kind in enumerate(operands)]
        self._lanes("apply", words, lanes, y)

    def table(self, op: units.Table) -> None:
        x, y = op.inputs[0], op.output
        self.sizes(lanes=y.lanes, words=y.words, lowest=x.lo)
        self.type("x_t", number(x))
        # a memory for each lane, so that all are read at once
        self.table_function("entry", number(y), y.bits, [op.table.tolist()] * y.lanes, "at")

    def concat(self, op: units.Concat) -> None:
        self.sizes(words=op.output.words, parts=len(op.inputs))
        tests = [f"if (part == {i}) return {s.folds};" for i, s in enumerate(op.inputs[:-1])]
        self.function(
            "int",
            f"folds(int{' part' if tests else ''})",
            [*tests, f"return {op.inputs[-1].folds};"],
        )

    def softmax(self, op: units.Softmax) -> None:
        x, y = op.inputs[0], op.output
        self.sizes(
            channels=y.channels,
            pixels=y.pixels,
            lowest=x.lo,
            shift=31 - op.op.out.bits,
            y_lo=op.op.out.lo,
            y_hi=op.op.out.hi,
            newton_steps=arith.NEWTON_STEPS,
        )
        for what, value in ("constant", arith.LINE_CONSTANT), ("slope", arith.LINE_SLOPE):
            self.lines.append(f"static const long long line_{what} = {literal(int(value), 64)};")
        self.type("x_t", number(x))
        self.type("y_t", number(y))
        name = self.rom("exponentials", "ap_uint<31>", 31, [op.table.tolist()])
        self.function("ap_uint<31>", "exponential(int at)", [f"return ap_uint<31>({name}[0][at]);"])

    # ----------------------------------------------------------------- requantization

    def _finish(self, op: units.Sum) -> None:
        """What becomes of a word of accumulators."""
        acc, values, y = _int(op.acc_bits), op.inputs[1:], op.output
        if op.requantize is not None:
            self._requantize(op.requantize, [acc, *map(number, values)], y)
        else:
            signature = f"requantize(int, int, int, {acc} x0)"
            self.function(number(y), signature, [f"return {number(y)}(x0);"])
        words = [f"const {word(s)} &word{i}" for i, s in enumerate(values)]
        lanes = [f"qc::lane<{number(s)} >(word{i}, lane)" for i, s in enumerate(values)]
        self._lanes("finish", [f"const {acc} acc[{y.lanes}]", *words], ["acc[lane]", *lanes], y)

    def _lanes(self, name: str, takes: Iterable[str], lanes: Iterable[str], y: Stream) -> None:
        operands = ", ".join(["lane", "group", "pixel", *lanes])
        self.function(
            word(y),
            f"{name}(int group, int pixel, {', '.join(takes)})",
            [
                f"{word(y)} result = 0;",
                f"for (int lane = 0; lane < {y.lanes}; lane++) {{",
                "#pragma HLS UNROLL",
                f"qc::set_lane(result, lane, requantize({operands}));",
                "}",
                "return result;",
            ],
        )

    def _requantize(self, q: Requantize, operands: Sequence[str], y: Stream) -> None:
        """One element: products, one sum, one shift and a clamp, each as wide as is proved."""
        body: list[str] = []
        lanes = y.lanes
        used = {"group": False, "pixel": False}

        def constant(what: str, row: Row, kind: str, bits: int) -> str:
            if len(row) == 1:
                return f"{kind}({literal(row[0], bits)})"
            if q.spatial:
                name, index = self.rom(what, kind, bits, [row]), "[0][pixel]"
                used["pixel"] = True
            else:
                rows = [row[lane::lanes] for lane in range(lanes)]
                name, index = self.rom(what, kind, bits, rows), "[lane][group]"
                body.append(_partition(name))
                used["group"] = True
            return f"{kind}({name}{index})"

        def moved(x: str, what: str, row: Row) -> str:
            if row == (0,):
                return x
            if len(row) == 1:
                return f"({x} >> {row[0]})"
            bits = max(row).bit_length()
            # a shift by a table: constant for each channel, a shifter in hardware
            return f"({x} >> {constant(what, row, f'ap_uint<{bits}>', bits)}.to_int())"

        def product(i: int, term: AccTerm | ValTerm, kind: str, bits: int) -> list[str]:
            wide = _int(term.product_bits)
            if not term.copies:
                m = constant(f"multiplier{i}", term.multiplier, kind, bits)
                return [f"const {wide} product{i} = x{i} * {m};"]
            lines = [f"const {wide} wide{i} = x{i};", f"{wide} product{i} = 0;"]
            for k, copy in enumerate(term.copies):
                shifted = f"wide{i}"
                if len(copy.position) > 1:
                    most = max(copy.position).bit_length()
                    at = constant(f"position{i}_{k}", copy.position, f"ap_uint<{most}>", most)
                    shifted = f"(wide{i} << {at}.to_int())"
                elif copy.position[0]:
                    shifted = f"(wide{i} << {copy.position[0]})"
                if len(copy.sign) == 1:
                    lines.append(f"product{i} {'+' if copy.sign[0] > 0 else '-'}= {shifted};")
                    continue
                sign = f"sign{i}_{k}"
                lines.append(
                    f"const ap_int<2> {sign} = {constant(sign, copy.sign, 'ap_int<2>', 2)};"
                )
                for test, step in ((">", "+"), ("<", "-")):
                    lines += [f"if ({sign} {test} 0) {{", f"product{i} {step}= {shifted};", "}"]
            return lines

        total = _int(q.t_bits)
        sums = [f"{total} total = {constant('offset', q.offset, total, q.t_bits)};"]
        for i, a in enumerate(q.accs):
            sums += product(i, a, f"ap_uint<{a.m_bits}>", a.m_bits)
            sums.append(f"total += {moved(f'product{i}', f'shift{i}', a.shift)};")
        for j, v in enumerate(q.vals):
            at = len(q.accs) + j
            sums += product(at, v, _int(v.n_bits), v.n_bits)
            sums.append(f"total += product{at};")
        left = max(1, q.t_bits - min(q.shift))
        zero_bits = signed_bits(min(q.zero, 0), max(q.zero, 0))
        wide = max(left, zero_bits) + 1
        wide = max(wide, signed_bits(min(q.lo, 0), max(q.hi, 0)))
        sums.append(f"{_int(wide)} y = {moved('total', 'shift', q.shift)};")
        if q.zero:
            sums.append(f"y += {_int(zero_bits)}({literal(q.zero, zero_bits)});")
        lo, hi = (f"{_int(wide)}({literal(v, wide)})" for v in (q.lo, q.hi))
        for test, bound in (("<", lo), (">", hi)):
            sums += [f"if (y {test} {bound}) {{", f"y = {bound};", "}"]
        group, pixel = (f"int {k}" if used[k] else "int" for k in ("group", "pixel"))
        lane = "int lane" if used["group"] else "int"
        takes = [f"{kind} x{i}" for i, kind in enumerate(operands)]
        self.function(
            number(y),
            f"requantize({', '.join([lane, group, pixel, *takes])})",
            [*body, *sums, f"return {number(y)}(y);"],
        )


def word(s: Stream) -> str:
    """The type of a stream's words."""
    return f"ap_uint<{s.word_bits}>"


def _packed(words: NDArray[np.int64], bits: int) -> list[int]:
    mask = (1 << bits) - 1
    packed = [0] * len(words)
    for i, column in enumerate((words & mask).T.tolist()):
        packed = [p | x << (i * bits) for p, x in zip(packed, column, strict=True)]
    return packed


def _partition(name: str) -> str:
    return f"#pragma HLS ARRAY_PARTITION variable={name} complete dim=1"


def _wrapped(texts: Sequence[str]) -> str:
    parts = (texts[i : i + _NUMBERS_PER_LINE] for i in range(0, len(texts), _NUMBERS_PER_LINE))
    return ",\n".join(map(", ".join, parts))


def comment(text: str) -> str:
    """Text fit for the inside of a comment."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "_.:/ -") else "_" for c in text)[:80]
