"""Conv and MatMul as products of register tiles: some pixels by some vectors of channels, no patches copied.

In an image of channels-last pixels, the bytes that one row of a window meets lie side by side: they are one run of
the sum. So all addresses of a tile are one pointer and constants. Only an image with a border, or runs that would
be read beyond the image, are copied once; the sums stay in registers until they are stored as results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qcompile.ir import Array, Value, ops
from qcompile.ir.proof import code_range

from ..c.kernel import Layer, Scratch, Step, aligned, constant
from ..c.text import affine, at, c_type, render
from ..c.window import window_of
from .epilogue import Epilogue, fits
from .isa import HERE, Isa
from .tiles import Tile, parts, ranked
from .tunable import chosen

_FLIP = 128
_WORD = 4
"""Bytes of activations that one instruction multiplies in each lane."""

_WORTH = 1 << 16
"""Multiply-accumulates that are worth a meeting of threads."""

Span = tuple[int, int, int]
"""First and end of a loop, and how many positions each step takes."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A convolution as a matrix product; the image is a scratch copy where `copied`.

    Its rows are `pitch` elements apart and images of a batch `plane`; the window of output pixel (i, j) begins at
    `down` * i + `across` * j and is `offsets`, each the first of `run` elements that lie side by side, of which an
    instruction takes `at_once`.
    """

    batch: int
    height: int
    width: int
    pixel: int
    pitch: int
    plane: int
    down: int
    across: int
    run: int
    offsets: tuple[tuple[int, ...], ...]
    groups: int
    depth: int
    outputs: int
    copied: bool
    at_once: int

    @property
    def steps(self) -> int:
        """Products of four in one sum."""
        return len(self.offsets) * len(self.offsets[0]) * -(-self.run // self.at_once)


def problem(step: Step) -> Problem:
    """How a Conv or MatMul lies in memory."""
    node = step.node
    x, w = node.inputs[0].type, node.inputs[1].type
    outputs, at_once = w.shape[0], _WORD // x.dtype.bytes
    if isinstance(node.op, ops.MatMul):
        depth, pixels = x.shape[-1], x.size // x.shape[-1]
        copied = depth % at_once != 0
        return Problem(
            1, 1, pixels, depth, pixels * depth, pixels * depth, 0, depth, depth, ((0,),), 1, depth,
            outputs, copied, at_once,
        )  # fmt: skip
    assert isinstance(node.op, ops.Conv)
    geometry = window_of(node)
    rows, columns, channels = geometry.y, geometry.x, geometry.channels
    groups = node.op.groups
    depth = channels // groups
    joined = groups == 1 and columns.dilation == 1
    run = columns.kernel * depth if joined else depth
    copied = any(node.op.pads) or run % at_once != 0
    left, right = columns.pad, node.op.pads[-1]
    top, bottom = rows.pad, 0 if geometry.flat else node.op.pads[2]
    pitch = (columns.size + left + right) * channels
    plane = pitch * (rows.size + top + bottom)
    batch, height, width = geometry.batch, rows.out, columns.out
    if not copied and rows.kernel == columns.kernel == rows.stride == columns.stride == 1:
        batch, height, width = 1, 1, batch * height * width
    across = columns.stride * channels
    offsets = tuple(
        tuple(
            ky * rows.dilation * pitch + kx * columns.dilation * channels
            for kx in range(1 if joined else columns.kernel)
        )
        for ky in range(rows.kernel)
    )
    return Problem(
        batch, height, width, channels, pitch, plane, rows.stride * pitch, across, run, offsets, groups,
        depth, outputs // groups, copied, at_once,
    )  # fmt: skip


@dataclass(frozen=True)
class Gemm:
    """int8 weights by 8-bit or int16 activations, with the Rescale that reads the sums, by `threads` together.

    A layer whose signature is in `tuned` has that tile, every other the fastest by the model.
    """

    isa: Isa
    threads: int = 1
    tuned: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        """See Kernel."""
        return f"gemm-{self.isa.name}"

    @property
    def includes(self) -> Sequence[str | Path]:
        """The headers of the instruction set."""
        return self.isa.headers

    def matches(self, step: Step) -> bool:
        """Every Conv of one or two axes and MatMul whose Rescale vectors can do."""
        node = step.node
        if not isinstance(node.op, ops.Conv | ops.MatMul) or len(node.inputs[1].type.shape) > 4:
            return False
        kind = node.inputs[0].type.dtype
        known = kind.bytes == 1 or (kind.bytes == 2 and kind.signed)
        return known and all(v.const is not None for v in node.inputs[1:]) and fits(step)

    def shares(self, step: Step) -> bool:
        """See Shared: all but what is done sooner than threads meet."""
        return self.threads > 1 and step.macs >= _WORTH

    def cost(self, step: Step) -> int:
        """Cycles by the model, in the unit of the portable kernels' costs."""
        p = problem(step)
        _, cycles = self._ranked(step)[0]
        copied = p.batch * p.plane // 32 if p.copied else 0
        return int(cycles) * p.batch * p.groups + copied

    def scratch(self, step: Step) -> Scratch:
        """The image with its border, and what is read beyond it."""
        p = problem(step)
        kind = "uint8_t" if p.at_once == _WORD else "int16_t"
        return Scratch((("image", kind, p.batch * p.plane + p.at_once - 1),) if p.copied else ())

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """A fused Rescale's other operands, and an image that is copied first."""
        x = step.node.inputs[0]
        read = step.terms if not problem(step).copied else (x, *step.terms)
        return tuple(v for v in aligned(step, *read) if problem(step).copied or v is not x)

    def raster(self, step: Step) -> int | None:
        """None: channels are the outer loop."""
        return None

    def packed(self, step: Step) -> tuple[Value, ...]:
        """Weights and bias."""
        return step.node.inputs[1:]

    def body(self, layer: Layer) -> str:
        """See the template."""
        step, node = layer.step, layer.step.node
        p = problem(step)
        x = node.inputs[0]
        isa = _isa(self.isa, step)
        tile = chosen(self, step, self._ranked(step), self.tuned)
        weights, bias = constant(node, 1), constant(node, 2)
        byte = x.type.dtype.bytes == 1
        flip = byte and x.type.dtype.signed
        blocks = self._blocks(p, tile)
        epilogue = Epilogue(layer, self.isa, p.groups)

        def results(rows: int, columns: int, vectors: int, count: int, channel: str) -> str:
            pixels = range(rows * columns)
            sums = [[f"s{q}_{v}" for v in range(vectors)] for q in pixels]
            channels = p.groups * p.outputs
            offsets = [(q // columns * p.width + q % columns) * channels for q in pixels]
            return epilogue.render(sums, offsets, channel, count)

        return render(
            "gemm.c.j2",
            HERE,
            scratch=layer.scratch.declarations,
            copy=copy_of(step, p, layer[x], self.shares(step)) if p.copied else "",
            p=p,
            shared=self._shared(p, tile, weights.size) if self.shares(step) else "",
            x=layer[x],
            x_type="uint8_t" if byte and p.copied else c_type(x.type.dtype),
            dot=isa.dot if byte else "DOT_PAIRS",
            four="four_flipped" if flip and not p.copied else "four",
            blocks=blocks,
            channel_spans=[span for _, span in blocks],
            loop_of=lambda span, spans: span == max(spans, key=lambda s: s[1] - s[0]),
            channels=p.groups * p.outputs,
            rows=_spans(p.height, tile.rows),
            columns=_spans(p.width, tile.columns),
            lanes=self.isa.lanes,
            w_type="int8_t" if byte else "int16_t",
            row=p.steps * p.at_once,
            padded=self._padded(p.outputs),
            weights=layer.constant("weights", self._pack(p, tile, weights)),
            bias=layer.constant("bias", self._bias(p, weights, bias, flip)),
            results=results,
            affine=affine,
            at=at,
        )

    def signature(self, step: Step) -> str:
        """See Tunable."""
        p, node = problem(step), step.node
        window = f"{len(p.offsets)}x{len(p.offsets[0])}x{p.run} every {p.down}, {p.across}"
        return (
            f"{self.name} {_isa(self.isa, step).dot} {node.inputs[0].type.dtype} to {step.output.type.dtype}:"
            f" {p.batch}x{p.height}x{p.width} of {p.pixel}, window {window}, {p.outputs} outputs, groups {p.groups},"
            f" copied {int(p.copied)}, terms {len(step.terms)}, threads {self.threads}"
        )

    def tiles(self, step: Step) -> list[str]:
        """See Tunable."""
        return [str(tile) for tile, _ in self._ranked(step)]

    def _ranked(self, step: Step) -> tuple[tuple[Tile, float], ...]:
        p = problem(step)
        return ranked(_isa(self.isa, step), p.height, p.width, p.outputs, p.steps)

    def _shared(self, p: Problem, tile: Tile, weights: int) -> str:
        """The loop whose steps threads divide most evenly: over channels `o`, rows `oy` or columns `ox` of the result.

        Of several that do, each thread reads a part of what is larger, weights or image.
        """
        channels = self._padded(p.outputs) // self.isa.lanes
        loops = {
            "o": (channels, tile.vectors),
            "oy": (p.height, tile.rows),
            "ox": (p.width, tile.columns),
        }
        large = weights > p.batch * p.plane
        return max(
            loops, key=lambda v: (round(_evenness(*loops[v], self.threads), 2), (v == "o") == large)
        )

    def _padded(self, outputs: int) -> int:
        """Channels of a group, filled up to vectors."""
        return -(-outputs // self.isa.lanes) * self.isa.lanes

    def _blocks(self, p: Problem, tile: Tile) -> list[tuple[int, Span]]:
        """(vectors in each, span of channels) of the loops over blocks; a span of the last channels may be narrower."""
        lanes, first = self.isa.lanes, 0
        found: list[tuple[int, Span]] = []
        for many, vectors in parts(-(-p.outputs // lanes), tile.vectors):
            width = vectors * lanes
            whole = min(many, (p.outputs - first) // width)
            if whole:
                found.append((vectors, (first, first + whole * width, width)))
                first += whole * width
            if whole < many:
                found.append((vectors, (first, p.outputs, p.outputs - first)))
                first += width
        return found

    def _pack(self, p: Problem, tile: Tile, weights: Array) -> NDArray[np.signedinteger]:
        """[group][block of vectors][run][depths at once][channel][depth], filled with zeros."""
        taps = len(p.offsets) * len(p.offsets[0])
        kind = np.int8 if p.at_once == _WORD else np.int16
        runs = weights.reshape(p.groups, p.outputs, taps, -1).astype(kind)
        deep = -(-p.run // p.at_once) * p.at_once
        more = self._padded(p.outputs) - p.outputs
        filled = np.pad(runs, ((0, 0), (0, more), (0, 0), (0, deep - runs.shape[-1])))
        blocks = []
        for group in filled:
            first = 0
            for many, vectors in parts(len(group) // self.isa.lanes, tile.vectors):
                width = vectors * self.isa.lanes
                for _ in range(many):
                    block = group[first : first + width].reshape(width, -1, p.at_once)
                    blocks.append(block.transpose(1, 0, 2).ravel())
                    first += width
        return np.concatenate(blocks)

    def _bias(self, p: Problem, weights: Array, bias: Array, flip: bool) -> NDArray[np.int32]:
        """Of flipped activations, 128 sums of the weights are taken off; the sum wraps as the products' does."""
        rows = bias.astype(np.int64)
        if flip:
            rows = rows - _FLIP * weights.reshape(len(weights), -1).astype(np.int64).sum(axis=1)
        more = self._padded(p.outputs) - p.outputs
        filled = np.pad(rows.reshape(p.groups, -1), ((0, 0), (0, more)))
        return filled.astype(np.uint32).astype(np.int32).ravel()


def _isa(isa: Isa, step: Step) -> Isa:
    """`isa`, or `isa.small` where two neighbouring products of any activations stay in 16 bits."""
    if isa.small is None:
        return isa
    node = step.node
    x, (_, most) = node.inputs[0], code_range(node.inputs[0])
    if isinstance(node.op, ops.Conv):
        most = max(most, node.op.pad_value)
    most += _FLIP if x.type.dtype.signed else 0
    runs = constant(node, 1).astype(np.int64).reshape(-1, problem(step).run)
    pairs = np.pad(runs, ((0, 0), (0, runs.shape[1] % 2))).reshape(-1, 2)
    highest, lowest = np.maximum(pairs, 0).sum(axis=1).max(), np.minimum(pairs, 0).sum(axis=1).min()
    small = most * highest < 1 << 15 and most * lowest >= -1 << 15
    return isa.small if small else isa


def _evenness(total: int, size: int, threads: int) -> float:
    """What the work is to `threads` times the largest share: whole parts divided, the rest for the first thread."""
    whole, rest = divmod(total, size)
    shares = [(whole * (t + 1) // threads - whole * t // threads) * size for t in range(threads)]
    shares[0] += rest
    return total / (threads * max(shares))


def copy_of(step: Step, p: Problem, x: str, shared: bool = False) -> str:
    """C that copies operand `x` to `image`, uint8 and with its border; threads that share it meet when it is done."""
    node = step.node
    kind = node.inputs[0].type.dtype
    flip = _FLIP if kind.signed and kind.bytes == 1 else 0
    padded = isinstance(node.op, ops.Conv) and any(node.op.pads)
    window = window_of(node) if padded else None
    return render(
        "copy.c.j2",
        HERE,
        x=x,
        p=p,
        window=window,
        bottom=node.op.pads[2]
        if isinstance(node.op, ops.Conv) and window and not window.flat
        else 0,
        right=node.op.pads[-1] if isinstance(node.op, ops.Conv) else 0,
        border=(node.op.pad_value if isinstance(node.op, ops.Conv) else 0) + flip,
        flip=flip,
        byte=kind.bytes == 1,
        shared=shared,
        affine=affine,
        at=at,
    )


def _spans(total: int, size: int) -> list[Span]:
    """(first, end, at once) of the loops that cover `total` positions."""
    whole = total - total % size
    return [s for s in ((0, whole, size), (whole, total, total - whole)) if s[0] < s[1]]
