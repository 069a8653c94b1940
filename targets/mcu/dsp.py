"""Kernels for Cortex-M cores with the DSP extension: two int16 products and their sum in one SMLAD."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qcompile.ir import Value, ops

from ..c.kernel import Kernel, Layer, Scratch, Step, aligned, constant, ends, loops
from ..c.nest import Nest, row_major
from ..c.text import affine, at, c_int, c_type, render
from ..c.window import Window, pixels, window_of
from .dsp_depthwise import Channels
from .dsp_elementwise import Bytes
from .dsp_pool import Largest, Mean
from .dsp_rescale import HERE, Plain, Sum, packed_fields, plain, skip
from .dsp_scalar import SCALAR
from .dsp_weights import BLOCK, BYTES, NIBBLES, Packing, blocks_of, depth, multiplies

_TILE = 5
"""Pixels at once: five sums, five activations, two of weights and two pointers fill the registers."""


@dataclass(frozen=True)
class Pixels:
    """Conv and MatMul: the patches of five pixels, widened to int16 and interleaved, times each channel's weights.

    Weights stay packed and are widened in registers, once for five pixels. Where the fused Rescale has the shape that
    the micro-kernel knows (`dsp_rescale`), the sums are rescaled in registers too.
    """

    name: str = "dsp"
    packing: Packing = BYTES
    includes: Sequence[str | Path] = BYTES.headers

    def matches(self, step: Step) -> bool:
        """Conv of one group and MatMul, of bytes or int16."""
        return multiplies(step) and self.packing.suits(step)

    def cost(self, step: Step) -> int:
        """Instructions: 15 for 20 products, 5 for widening four activations, and what each result takes."""
        tiles, channel = -(-count(step) // _TILE), 24
        match self._rescaled(step):
            case Sum():
                channel += 25
            case None:
                channel += _TILE * stored(step)
        sums = self.packing.sums_of_five(step)
        return tiles * (80 + sums + step.output.type.shape[-1] * channel + 5 * gather_cost(step))

    def scratch(self, step: Step) -> Scratch:
        """The patches; where the last five pixels are not all there, room for their results."""
        rescaled, outputs = self._rescaled(step), step.output.type.shape[-1]
        regions = [("patch", "int32_t", _TILE * self.packing.patch_words(step)), *line(step)]
        if rescaled is None:
            regions.append(("sums", "int32_t", _TILE * outputs))
        elif self._raster(step)[1] % _TILE:
            regions.append(("rest", "int8_t", _TILE * outputs))
        return Scratch(tuple(regions))

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """A fused Rescale's other operands; never the one whose pixels are read again."""
        return tuple(v for v in aligned(step, *step.terms) if v is not step.node.inputs[0])

    def raster(self, step: Step) -> int | None:
        """Five."""
        return _TILE

    def packed(self, step: Step) -> tuple[Value, ...]:
        """Weights and bias."""
        return step.node.inputs[1:]

    def body(self, layer: Layer) -> str:
        """See the template."""
        step = layer.step
        rescaled = self._rescaled(step)
        outer, size, group = self._raster(step)
        outputs = step.output.type.shape[-1]
        nest = pixels(step, window(step))
        first = affine(
            [
                (v, s * size * outputs)
                for (v, _), s in zip(outer, row_major([n for _, n in outer]), strict=True)
            ]
            + [("first", outputs)]
        )
        weights = layer.constant("weights", self._pack(step, rescaled))
        return render(
            "dsp_pixels.c.j2",
            HERE,
            **gather_values(layer, nest, "5", 0),
            scratch=layer.scratch.declarations,
            outer=Nest(outer, {}),
            group=group,
            pixels=size,
            tile=_TILE,
            prefix=self.packing.prefix,
            first=first,
            outputs=outputs,
            weights=weights,
            plain=rescaled if isinstance(rescaled, Plain) else None,
            sum=rescaled if isinstance(rescaled, Sum) else None,
            skip=layer[rescaled.value] if isinstance(rescaled, Sum) else "",
            store=layer.store(nest.at, f"sums[{affine([('p', outputs), ('c', 1)])}]")
            if rescaled is None
            else "",
            c_int=c_int,
            loops=loops,
            ends=ends,
        )

    def _rescaled(self, step: Step) -> Plain | Sum | None:
        return plain(step) or skip(step)

    def _pack(self, step: Step, rescaled: Plain | Sum | None) -> NDArray[np.int32]:
        """For each channel its bias, four weights a word, and its multiplier."""
        columns = [constant(step.node, 2).astype(np.int32)[:, None], self.packing.pack(step)]
        if rescaled is not None:
            columns.append(rescaled.multipliers[:, None])
        return np.concatenate(columns, axis=1)

    def _raster(
        self, step: Step
    ) -> tuple[tuple[tuple[str, int], ...], int, tuple[tuple[str, int], ...]]:
        """Loops around the raster, its number of pixels, and the loops that it stands for."""
        nest = pixels(step, window(step))
        inner = 0
        if isinstance(step.node.op, ops.Conv):
            inner = sum(v != "n" for v, _ in nest.loops)
        elif nest.loops:
            inner = 1
        outer, group = nest.loops[: len(nest.loops) - inner], nest.loops[len(nest.loops) - inner :]
        return outer, int(np.prod([n for _, n in group], dtype=np.int64)), group


def window(step: Step) -> Window | None:
    """The window of a Conv."""
    return window_of(step.node) if isinstance(step.node.op, ops.Conv) else None


def count(step: Step) -> int:
    """Pixels, or rows of a MatMul."""
    return step.output.type.size // step.output.type.shape[-1]


def whole_words(step: Step) -> bool:
    """Every tap has whole words of four channels: rows are widened where they lie."""
    return step.node.inputs[0].type.shape[-1] % 4 == 0


def line(step: Step) -> list[tuple[str, str, int]]:
    """Where the taps of a pixel are collected before they are widened."""
    if whole_words(step):
        return []
    return [("line", c_type(step.node.inputs[0].type.dtype), BLOCK * blocks_of(step))]


def stored(step: Step) -> int:
    """Instructions that rescale and store one sum in C."""
    terms = len(step.terms) if step.rescale else 0
    return 13 + 8 * terms


def gather_cost(step: Step) -> int:
    """Instructions that widen one pixel's taps."""
    geometry, words, whole = window(step), blocks_of(step), whole_words(step)
    rows = 10
    if geometry is not None and geometry.taps > 1:
        wide = not whole and step.node.inputs[0].type.dtype.bytes > 1
        rows = 20 + (50 if wide else 35) * geometry.y.kernel
    return rows + (5 if whole else 9) * words


def gather_values(layer: Layer, nest: Nest, lanes: str, offset: int) -> dict[str, object]:
    """What the template's gather needs: `lanes` is how many pixels lie interleaved."""
    step, node = layer.step, layer.step.node
    x = node.inputs[0]
    kind = c_type(x.type.dtype)
    return {
        "window": window(step),
        "x": layer[x],
        "x_at": nest.at.get("x", "0"),
        "x_type": kind,
        "pad_value": node.op.pad_value if isinstance(node.op, ops.Conv) else 0,
        "spread": f"dsp_spread{lanes}_{'s' if x.type.dtype.signed else 'u'}{x.type.dtype.bytes * 8}",
        "fill": f"dsp_fill{lanes}",
        "offset": offset,
        "whole": whole_words(step),
        "depth": depth(step),
        "blocks": blocks_of(step),
        "at": at,
        "affine": affine,
    }


@dataclass(frozen=True)
class Dense:
    """Conv and MatMul of few pixels: four channels at once, their weights interleaved."""

    name: str = "dsp dense"
    packing: Packing = BYTES
    includes: Sequence[str | Path] = BYTES.headers

    def matches(self, step: Step) -> bool:
        """Conv of one group and MatMul, of bytes or int16."""
        return multiplies(step) and self.packing.suits(step)

    def cost(self, step: Step) -> int:
        """Instructions: 18 for 16 products, and what each result takes."""
        outputs = step.output.type.shape[-1]
        each, at_once = (26, 32) if packed_fields(step) else (8 + stored(step), outputs)
        sums = self.packing.sums_of_one(step, at_once)
        pixel = 40 + sums + each * outputs + gather_cost(step)
        return count(step) * pixel

    def scratch(self, step: Step) -> Scratch:
        """The patch of one pixel and its sums."""
        regions = [("patch", "int32_t", self.packing.patch_words(step)), *line(step)]
        if packed_fields(step) is None:
            regions.append(("sums", "int32_t", 4 * self._groups(step)))
        return Scratch(tuple(regions))

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """A fused Rescale's other operands; never the one whose pixels are read again."""
        return tuple(v for v in aligned(step, *step.terms) if v is not step.node.inputs[0])

    def raster(self, step: Step) -> int | None:
        """One."""
        return 1

    def packed(self, step: Step) -> tuple[Value, ...]:
        """Weights and bias."""
        return step.node.inputs[1:]

    def body(self, layer: Layer) -> str:
        """See the template."""
        step = layer.step
        nest = pixels(step, window(step))
        fields = packed_fields(step)
        return render(
            "dsp_dense.c.j2",
            HERE,
            **gather_values(layer, nest, "", fields.offset if fields else 0),
            scratch=layer.scratch.declarations,
            nest=nest,
            prefix=self.packing.prefix,
            outputs=step.output.type.shape[-1],
            groups=self._groups(step),
            weights=layer.constant("weights", self._pack(step)),
            fields=fields,
            constants=layer.constant("constants", fields.constants) if fields else "",
            bias="" if fields else layer.constant("bias", constant(step.node, 2)),
            y=affine([(nest.at["y"].removesuffix("c").rstrip(" +") or "0", 1)]),
            store="" if fields else layer.store(nest.at, "sum"),
            loops=loops,
            ends=ends,
        )

    def _groups(self, step: Step) -> int:
        return -(-step.output.type.shape[-1] // 4)

    def _pack(self, step: Step) -> NDArray[np.int32]:
        """For each four channels, word by word those of the four."""
        missing = (0, 4 * self._groups(step) - step.output.type.shape[-1])
        rows = np.pad(self.packing.pack(step), (missing, (0, 0)))
        rows = rows.reshape(self._groups(step), 4, -1)
        return np.ascontiguousarray(rows.transpose(0, 2, 1))


KERNELS: tuple[Kernel, ...] = (
    Pixels(), Pixels("dsp int4", NIBBLES, NIBBLES.headers),
    Dense(), Dense("dsp dense int4", NIBBLES, NIBBLES.headers),
    Channels(), Bytes(), Largest(), Mean(), *SCALAR,
)  # fmt: skip
"""For cores with the DSP extension; what has no kernel here is portable."""
