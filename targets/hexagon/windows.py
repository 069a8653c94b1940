"""Depthwise Conv and pools: channels in the lanes, several pixels of few channels in a vector.

The operand is copied into a frame of border first, the columns of a stride apart from each other, so that the bytes of
neighbouring results begin next to each other for every tap. Four taps at a time become the four bytes of a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qcompile.ir import Array, Value, ops

from ..c.kernel import Layer, Scratch, Step, aligned
from ..c.text import affine, at, c_int, render
from ..c.window import Window, window_of
from .channels import Lanes
from .convolve import HEADER, HERE
from .planes import LANES, VECTOR, whole
from .requantize import requantization, splat8

_UNROLLED = 3
"""More groups of four taps than this are looped over."""

_MOST_COMPARED = 49
"""More taps of a MaxPool are left to the portable code."""


@dataclass(frozen=True)
class Frame:
    """The operand with its border, a plane of columns for each place in a stride that a tap begins at."""

    window: Window

    @cached_property
    def phases(self) -> list[int]:
        """The first column of each plane, in the padded operand."""
        x = self.window.x
        return sorted({k * x.dilation % x.stride for k in range(x.kernel)})

    @property
    def columns(self) -> int:
        """Of a plane."""
        x = self.window.x
        return x.out + (x.kernel - 1) * x.dilation // x.stride

    @property
    def line(self) -> int:
        """Bytes of a plane's row."""
        return self.columns * self.window.channels

    @property
    def rows(self) -> int:
        """Of a plane."""
        y = self.window.y
        return (y.out - 1) * y.stride + (y.kernel - 1) * y.dilation + 1

    @property
    def bytes(self) -> int:
        """All planes, and what is read and written behind them."""
        return whole(len(self.phases) * self.rows * self.line) + 2 * VECTOR

    @property
    def around(self) -> dict[str, int]:
        """Rows of border above and below those of the operand."""
        y = self.window.y
        above = min(y.pad, self.rows)
        inside = min(y.size, self.rows - above)
        return {"above": above, "inside": inside, "below": self.rows - above - inside}

    def plane(self, phase: int) -> dict[str, int]:
        """Of a row: bytes of border before and behind, pixels of the operand, and where they come from."""
        x, channels = self.window.x, self.window.channels
        first = max(0, -(-(x.pad - phase) // x.stride))
        last = min(self.columns, (x.size - 1 + x.pad - phase) // x.stride + 1)
        count = max(0, last - first)
        if count == 0:
            first = self.columns
        return {
            "left": first * channels,
            "right": (self.columns - first - count) * channels,
            "count": count,
            "source": (first * x.stride + phase - x.pad) * channels if count else 0,
        }

    @property
    def bordered(self) -> bool:
        """Is there any border?"""
        rows = self.around
        planes = [self.plane(phase) for phase in self.phases]
        return any((rows["above"], rows["below"], *(p["left"] + p["right"] for p in planes)))

    @cached_property
    def offsets(self) -> list[int]:
        """Bytes from a result's place to what each tap reads."""
        y, x = self.window.y, self.window.x
        found = []
        for ky in range(y.kernel):
            for kx in range(x.kernel):
                across, phase = divmod(kx * x.dilation, x.stride)
                row = self.phases.index(phase) * self.rows + ky * y.dilation
                found.append(row * self.line + across * self.window.channels)
        return found

    @property
    def beside(self) -> int:
        """Pixels of the result in a vector."""
        return max(1, VECTOR // self.window.channels)

    @property
    def groups(self) -> int:
        """Vectors of a pixel of many channels."""
        return -(-self.window.channels // VECTOR)

    @property
    def lanes(self) -> Lanes:
        """Four neighbouring bytes of a vector lie in the four accumulators."""
        channels = self.window.channels
        byte = np.arange(self.groups * VECTOR).reshape(self.groups, LANES, 4).transpose(0, 2, 1)
        if self.groups > 1:
            return Lanes(np.where(byte < channels, byte, -1))
        return Lanes(np.where(byte < self.beside * channels, byte % channels, -1))


@dataclass(frozen=True)
class Windows:
    """Conv with one input and one output channel a group, SumPool and MaxPool of bytes."""

    name: str = "hvx-windows"
    includes: Sequence[str | Path] = (HEADER,)

    def matches(self, step: Step) -> bool:
        """8-bit operands, one or two spatial axes."""
        x, out = step.node.inputs[0].type, step.output.type
        if x.dtype.bytes != 1 or len(x.shape) > 4:
            return False
        match step.node.op:
            case ops.Conv(groups=groups):
                fixed = all(v.const is not None for v in step.node.inputs[1:])
                if not fixed or groups != x.shape[-1] or groups != out.shape[-1]:
                    return False
            case ops.SumPool():
                pass
            case ops.MaxPool():
                return window_of(step.node).taps <= _MOST_COMPARED
            case _:
                return False
        return requantization(step) is not None

    def cost(self, step: Step) -> int:
        """Packets, roughly."""
        window = window_of(step.node)
        frame = Frame(window)
        vectors = frame.groups * window.y.out * -(-window.x.out // frame.beside)
        if window.x.stride == 1:
            copies = frame.rows * (10 + frame.line // 64)
        else:
            copies = len(frame.phases) * frame.rows * frame.columns * 2 * frame.groups
        each = 5 + window.taps if isinstance(step.node.op, ops.MaxPool) else 30 + 3 * window.taps
        return window.batch * (copies + vectors * each)

    def scratch(self, step: Step) -> Scratch:
        """The framed operand."""
        size = Frame(window_of(step.node)).bytes
        return Scratch((("bytes", "uint8_t", size + VECTOR - 16),))

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """A fused Rescale's other operands."""
        if Frame(window_of(step.node)).groups > 1:
            return ()
        return tuple(v for v in aligned(step, *step.terms) if v is not step.node.inputs[0])

    def raster(self, step: Step) -> int | None:
        """Some pixels of a row: the whole image was copied before."""
        frame = Frame(window_of(step.node))
        return frame.beside if frame.groups == 1 else None

    def packed(self, step: Step) -> tuple[Value, ...]:
        """Weights and bias."""
        return step.node.inputs[1:]

    def body(self, layer: Layer) -> str:
        """See the template."""
        step, node = layer.step, layer.step.node
        window = window_of(node)
        frame, channels, kind = Frame(window), window.channels, step.output.type.dtype
        x = node.inputs[0]
        groups = frame.groups
        match node.op:
            case ops.Conv(pad_value=value):
                pad = value
            case ops.SumPool(zero_point=value):
                pad = value
            case _:
                pad = int(np.iinfo(x.type.dtype.numpy).min)
        n, g = "n" if window.batch > 1 else "0", "g" if groups > 1 else "0"
        row = window.x.out * channels
        place = affine([(n, window.y.out * row), ("oy", row), ("ox", channels), (g, VECTOR)])
        if groups > 1:
            rest = channels - (groups - 1) * VECTOR
            count = f"(g < {groups - 1} ? {VECTOR} : {rest})" if rest < VECTOR else str(VECTOR)
            full = rest == VECTOR
        else:
            even = window.x.out % frame.beside == 0
            some = f"({window.x.out} - ox < {frame.beside} ? {window.x.out} - ox : {frame.beside})"
            count = str(frame.beside * channels) if even else f"{some} * {channels}"
            full = even and frame.beside * channels == VECTOR
        most = min(VECTOR, frame.beside * channels if groups == 1 else VECTOR)
        vectors = -(-most * kind.bytes // VECTOR)
        facts = _Products(layer, frame, g) if not isinstance(node.op, ops.MaxPool) else None
        return render(
            "windows.c.j2",
            HERE,
            scratch=layer.scratch.declarations,
            bordered=frame.bordered,
            pad=c_int(splat8(pad)),
            batch=window.batch,
            x=layer[x],
            signed=x.type.dtype.signed,
            kind="b" if x.type.dtype.signed else "ub",
            image_bytes=window.y.size * window.x.size * channels,
            row_bytes=window.x.size * channels,
            phases=[frame.plane(phase) for phase in frame.phases],
            rows=frame.around,
            line_bytes=frame.line,
            stride=window.x.stride,
            channels=channels,
            groups=groups,
            height=window.y.out,
            width=window.x.out,
            beside=frame.beside,
            hop=window.y.stride * frame.line,
            offsets=frame.offsets,
            largest=facts is None,
            bias=facts.bias if facts else [],
            quads=facts.quads if facts else [],
            table=facts.table if facts else "",
            factor=facts.factor if facts else None,
            terms=facts.terms if facts else [],
            store=facts.store(vectors) if facts else [],
            place=place,
            used=count,
            vectors=vectors,
            always=full,
            count=count if kind.bytes == 1 else f"{count} * {kind.bytes}",
            affine=affine,
            at=at,
        )


class _Products:
    """What the template asks for where taps are multiplied and summed."""

    def __init__(self, layer: Layer, frame: Frame, group: str) -> None:
        step = layer.step
        plan = requantization(step)
        assert plan is not None
        self._layer, self._plan, self._group = layer, plan, group
        self._lanes = frame.lanes
        taps = len(frame.offsets)
        count = -(-taps // 4)
        places: list[int | None] = [*frame.offsets, *[None] * (4 * count - taps)]
        self.quads = [places[i : i + 4] for i in range(0, len(places), 4)]
        self.table = ""
        if count > _UNROLLED:
            self.table = layer.constant("offsets", np.array([p or 0 for p in places], np.int32))
        conv = isinstance(step.node.op, ops.Conv)
        channels = frame.window.channels
        if isinstance(step.node.op, ops.SumPool):
            bias = [-step.node.op.zero_point * taps] * channels
        else:
            bias = [int(b) for b in step.node.inputs[2].constant]
        self.bias = [self._row(bias, a) for a in range(4)]
        ones = np.arange(4 * count) < taps
        self._ones = ones.astype(np.int8).view("<i4").tolist()
        self._weights = ""
        if conv:
            packed = _pack(step.node.inputs[1].constant, frame.lanes, count)
            self._weights = layer.constant("weights", packed)
        elif self.table:
            self._weights = layer.constant("weights", np.array(self._ones, np.int32))
        self._conv, self._count = conv, count
        self.terms = [
            {"name": f"term{i or ''}", "x": layer[t.value]} for i, t in enumerate(plan.terms)
        ]

    def _row(self, row: list[int], accumulator: int) -> str:
        if len(set(row)) == 1:
            return f"Q6_V_vsplat_R({c_int(row[0])})"
        return self._lanes.parameter(self._layer, "bias", row, self._group, accumulator)

    def factor(self, t: str | int, accumulator: int) -> str:
        """C of what a group of four taps is multiplied with."""
        if not self._conv:
            one = f"{self._weights}[{t}]" if self.table else str(self._ones[int(t)])
            return f"Q6_V_vsplat_R({one})"
        part = 4 * VECTOR
        place = affine([(self._group, self._count * part), (str(t), part)], accumulator * VECTOR)
        return f"hvx_load({at(self._weights, place)})"

    def store(self, vectors: int) -> list[str]:
        """C that makes the vectors of results, made0 first, as many as hold any."""
        wide = self._plan.out.bytes

        if wide == 1:
            return self._made("made0", [0, 1, 2, 3])
        if wide == 2:
            lines = [*self._made("even", [0, 1]), *self._made("odd", [2, 3])]
            pairs = [("made", "odd", "even")]
        else:
            lines = [line for i in range(4) for line in self._made(f"word{i}", [i])]
            pairs = [("left", "word2", "word0"), ("right", "word3", "word1")]
            halves = ("lo", "hi") if vectors > 2 else ("lo",)
            pairs += [(f"made{h}", f"Q6_V_{h}_W(right)", f"Q6_V_{h}_W(left)") for h in halves]
        for name, high, low in pairs:
            lines.append(f"const HVX_VectorPair {name} = Q6_W_vshuff_VVR({high}, {low}, -4);")
        last = ["made"] if wide == 2 else ["madelo", "madehi"]
        names = [f"Q6_V_{half}_W({pair})" for pair in last for half in ("lo", "hi")][:vectors]
        return [*lines, *(f"const HVX_Vector made{i} = {name};" for i, name in enumerate(names))]

    def _made(self, name: str, accumulators: Sequence[int]) -> list[str]:
        return self._lanes.store(
            self._layer, self._plan, name, accumulators, self._group, lambda i: f"term{i or ''}"
        )


def _pack(weights: Array, lanes: Lanes, count: int) -> NDArray[np.int8]:
    """[group][four taps][accumulator][lane], four taps each, filled with zeros."""
    rows = weights.reshape(len(weights), -1).astype(np.int8)
    filled = np.pad(rows, ((0, 1), (0, 4 * count - rows.shape[1])))
    found = filled.reshape(len(filled), count, 4)[lanes.channel]
    return np.ascontiguousarray(found.transpose(0, 3, 1, 2, 4))
