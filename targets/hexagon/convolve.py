"""Conv and MatMul with 32 pixels in a vector: four depths of each, multiplied by four weights of one channel.

The operand is sorted into columns first: a vector holds one word, four channels, of 32 pixels. The product of such
a vector with one word of weights then needs no other instruction, and every lane is used however many channels
there are. Windows are framed: a plane for every row and column that a tap can begin at, its border filled, so that
a tap is nothing but an offset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qcompile.ir import Array, Value, ops

from ..c.kernel import Layer, Scratch, Step, aligned
from ..c.text import affine, c_int, render
from .planes import LANES, VECTOR, Shape, power, shape_of, whole
from .requantize import Parameters, channel_word, column, requantization, splat8, splat16

HERE = Path(__file__).parent
HEADER = HERE / "hvx.h"


def fixed(step: Step) -> bool:
    """Are weights and bias constant?"""
    return all(v.const is not None for v in step.node.inputs[1:])


@dataclass(frozen=True)
class PixelLanes:
    """Conv of one group and MatMul of many rows. Operands of 16 bits are two of 8, added one above the other."""

    name: str = "hvx-pixels"
    includes: Sequence[str | Path] = (HEADER,)

    def matches(self, step: Step) -> bool:
        """A Rescale that vectors of words can compute."""
        return (
            isinstance(step.node.op, ops.Conv | ops.MatMul)
            and fixed(step)
            and requantization(step) is not None
            and shape_of(step) is not None
        )

    def cost(self, step: Step) -> int:
        """Packets, roughly."""
        shape = _shape(step)
        return shape.window.batch * shape.cost

    def scratch(self, step: Step) -> Scratch:
        """Columns, planes, and what one tile makes."""
        return Scratch((("bytes", "uint8_t", _Regions(step).size + VECTOR - 16),))

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """A fused Rescale's other operands."""
        return tuple(v for v in aligned(step, *step.terms) if v is not step.node.inputs[0])

    def raster(self, step: Step) -> int | None:
        """A tile: the whole image was sorted before."""
        return 2 * LANES

    def packed(self, step: Step) -> tuple[Value, ...]:
        """Weights and bias."""
        return step.node.inputs[1:]

    def body(self, layer: Layer) -> str:
        """See the template."""
        step = layer.step
        node, plan, shape, regions = step.node, requantization(step), _shape(step), _Regions(step)
        assert plan is not None
        x, window = node.inputs[0], shape.window
        block, padded, size = regions.block, regions.padded, shape.size
        pad_value = node.op.pad_value if isinstance(node.op, ops.Conv) else 0
        offset = 1 << (8 * size - 1) if x.type.dtype.signed else 0
        splat = splat8 if size == 1 else splat16
        rows = node.inputs[1].constant.astype(np.int64).reshape(shape.outputs, -1)
        bias = np.zeros(padded, np.int64)
        bias[: shape.outputs] = node.inputs[2].constant - offset * rows.sum(axis=1)
        strip = ((window.x.out - 1) * window.x.stride + window.x.kernel) * window.channels
        first = window.x.pad * window.channels
        return render(
            "convolve.c.j2",
            HERE,
            scratch=layer.scratch.declarations,
            regions=regions.places.items(),
            x=layer[x],
            batch=window.batch,
            image_bytes=window.y.size * window.x.size * window.channels,
            flip=c_int(splat(offset)),
            pad=c_int(splat(pad_value + offset)),
            pad_raw=c_int(splat(pad_value)),
            strips=shape.strips,
            spread=shape.spread,
            framed=shape.framed,
            lines=shape.lines,
            units=shape.units,
            phases=shape.phases,
            elements=window.x.size * (window.y.size if shape.linear else 1),
            row_bytes=window.x.size * window.channels,
            line_pitch=whole(4 * shape.units),
            pitch=shape.pitch,
            deals=shape.deals,
            piece=shape.piece,
            piece_pitch=4 * power(shape.groups),
            hop=window.x.stride * window.channels if shape.strips else shape.phases * shape.piece,
            strip_bytes=whole(strip) + VECTOR,
            strip_first=first,
            strip_copied=max(0, min(window.x.size * window.channels, strip - first)),
            groups=shape.groups,
            plane_bytes=shape.plane_bytes,
            line=shape.line,
            frames=[
                {
                    "to": i * shape.plane_bytes,
                    "rows": shape.plane_rows,
                    "source": f.source,
                    "pitch": 4 * window.y.stride * shape.row_words,
                    "top": f.top,
                    "bottom": f.bottom,
                    "left": f.left,
                    "right": f.right,
                }
                for i, f in enumerate(shape.frames)
            ],
            vectors=shape.vectors,
            chunks=shape.chunks,
            width=window.x.out,
            pixels=shape.pixels,
            lanes=shape.lanes,
            step=shape.step,
            direct=not shape.framed,
            depth=len(shape.offsets),
            offsets=layer.constant("offsets", np.array(shape.offsets, np.int32))
            if shape.framed
            else "",
            weights=layer.constant("weights", _pack(node.inputs[1].constant, shape, padded, block)),
            bias=layer.constant("bias", wrapped(bias)),
            padded=padded,
            block=block,
            sums=size * block,
            channels=shape.outputs,
            per_word=plan.per_word,
            k=regions.made,
            made_bytes=regions.made * VECTOR,
            pixel_bytes=shape.outputs * plan.out.bytes,
            terms=[
                {
                    "columns": f"term{i or ''}",
                    "name": layer[t.value],
                    "k": regions.term,
                    "bytes": regions.term * VECTOR,
                }
                for i, t in enumerate(plan.terms)
            ],
            offset=f"n * {shape.pixels} + " if window.batch > 1 else "",
            store=lambda wide: _store(layer, regions, wide),
            affine=affine,
        )


def _shape(step: Step) -> Shape:
    shape = shape_of(step)
    assert shape is not None
    return shape


def _pack(weights: Array, shape: Shape, padded: int, block: int) -> NDArray[np.int32]:
    """[block of channels][word of the sum][part of the operand][channel], four depths a word, filled with zeros."""
    size, steps = shape.size, len(shape.offsets)
    rows = weights.astype(np.int8).reshape(len(weights), -1, shape.piece // size)
    parts = np.zeros((size, padded, rows.shape[1], 4 * shape.groups), np.int8)
    for part in range(size):
        parts[part, : len(rows), :, part : shape.piece : size] = rows
    blocks = parts.reshape(size, -1, block, steps, 4).transpose(1, 3, 0, 2, 4)
    return np.ascontiguousarray(blocks).view("<i4").reshape(-1)


def wrapped(row: NDArray[np.int64]) -> NDArray[np.int32]:
    """Modulo 2**32: sums that leave 32 bits on the way come back."""
    return (row & 0xFFFFFFFF).astype(np.uint32).view(np.int32)


class _Regions:
    """Where everything lies in the working memory."""

    def __init__(self, step: Step) -> None:
        shape, plan = _shape(step), requantization(step)
        assert plan is not None
        self.padded = -(-shape.outputs // 4) * 4
        self.block = 8 if self.padded % 8 == 0 and shape.size == 1 else 4
        self.made = power(self.padded // plan.per_word)
        self.term = power(self.padded // 4)
        wide = 2 if shape.vectors > 1 else 1
        window = shape.window
        front = whole(4 * window.x.pad) if shape.framed and not shape.strips else 0
        strip = ((window.x.out - 1) * window.x.stride + window.x.kernel) * window.channels
        sorting = {
            "columns": front + shape.deals * shape.pitch + VECTOR,
            "strip": whole(strip) + 2 * VECTOR if shape.strips else 0,
        }
        tile = {"made": wide * self.made * VECTOR}
        for i, _ in enumerate(plan.terms):
            tile[f"term{i or ''}"] = wide * self.term * VECTOR
        pieces = max(LANES * shape.phases * 4 * power(shape.groups), 2 * self.made * VECTOR)
        pieces = max(pieces, self.term * VECTOR if plan.terms else 0) + VECTOR
        spare = 2 * VECTOR * max(shape.deals, self.made, self.term if plan.terms else 0)
        self.places: dict[str, int] = {}
        at = 0
        if shape.framed:
            self.places["planes"] = at
            at += whole(shape.groups * len(shape.frames) * shape.plane_bytes) + 2 * VECTOR
        ends = []
        for together in (sorting, tile):
            end = at
            for name, size in together.items():
                if size:
                    self.places[name] = end + (front if name == "columns" else 0)
                    end += whole(size)
            ends.append(end)
            if not shape.framed:
                at = end
        if not shape.framed:
            self.places["planes"] = self.places["columns"]
        at = max(ends)
        for name, size in (("pieces", pieces), ("spare", spare)):
            self.places[name] = at
            at += whole(size)
        self.size = at


def _store(layer: Layer, regions: _Regions, wide: int) -> list[str]:
    """C that rescales a tile's accumulators and stores them as columns."""
    plan = requantization(layer.step)
    assert plan is not None
    step = plan.per_word
    lines = []
    named: set[str] = set()

    def number(first: int, role: str, row: Sequence[int], i: int) -> str:
        if len(row) == 1:
            return c_int(row[0])
        name = layer.constant(role, np.array([*row, *[row[0]] * (regions.padded - len(row))], "i4"))
        return f"{name}[{affine([('o', 1)], first + i)}]"

    def vector(first: int, role: str, row: Sequence[int], i: int) -> str:
        name = f"{role}_{first + i if len(row) > 1 else 'all'}"
        if name not in named:
            named.add(name)
            lines.append(f"const HVX_Vector {name} = Q6_V_vsplat_R({number(first, role, row, i)});")
        return name

    for first in range(0, regions.block, step):
        for p in range(wide):
            terms = [f"x{i}_{p}_{first}_{{0}}" for i, _ in enumerate(plan.terms)]
            for i, term in enumerate(plan.terms):
                for c in range(first, first + step):
                    place = (
                        f"term{i or ''} + {p * regions.term * VECTOR} + (o + {c}) / 4 * {VECTOR}"
                    )
                    word = channel_word(term.value, f"hvx_load({place})", c % 4)
                    lines.append(f"const HVX_Vector {terms[i].format(c - first)} = {word};")
            get = Parameters(partial(vector, first), partial(number, first))
            made = f"r{p}_{first}"
            lines.append(f"HVX_Vector {made};")
            names = [f"a{p}{first + c}" for c in range(step)]
            lines += column(plan, made, names, terms, get)
            lines.append(f"hvx_store(to{p} + {first // step * VECTOR}, {made});")
    return lines
