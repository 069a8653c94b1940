"""Streams and the units between them, with the exact meaning that every emitted form must have.

One image (one row of the graph's batch) is one pass of every stream. A stream carries the elements of a tensor in
row-major order, channels last, `lanes` to a word; element i of a word lies at bits [i * bits, (i + 1) * bits). Every
stream is a FIFO of `depth` words with one writer and one reader, except those of the ports, which have no FIFO. A unit
reads and writes every word of an image once, in order, and holds nothing over to the next image.

Units are `Op`s: `inputs` and `outputs` say what geometry the unit sees. A reshaped tensor is the same stream seen with
another geometry, so reader and writer of a stream agree in name, bits, sign, lanes, words and depth, not in geometry.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from qcompile.ir import ops

from .requantize import Requantize, Words

DEPTH = 2
"""Words that a FIFO holds which only decouples two neighbours."""


@dataclass(frozen=True, slots=True)
class Stream:
    """Words of `lanes` elements: `height` x `width` pixels of `taps` x `channels` elements, pixel after pixel.

    Within a pixel the elements come tap after tap; with `by_channel`, the word of `lanes` channels is the outer loop
    and the tap the inner one. `value` names the graph's value that the elements are, None for the taps of a window.
    """

    name: str
    bits: int
    signed: bool
    height: int
    width: int
    channels: int
    lanes: int
    taps: int = 1
    by_channel: bool = False
    value: str | None = None
    depth: int = DEPTH

    def __post_init__(self) -> None:
        vector = self.channels if self.by_channel else self.taps * self.channels
        if self.lanes < 1 or vector % self.lanes:
            raise ValueError(f"{self.name}: {self.lanes} lanes do not divide {vector} elements")

    @property
    def pixels(self) -> int:
        """Pixels of an image."""
        return self.height * self.width

    @property
    def folds(self) -> int:
        """Words of a pixel."""
        return self.taps * self.channels // self.lanes

    @property
    def words(self) -> int:
        """Words of an image."""
        return self.pixels * self.folds

    @property
    def word_bits(self) -> int:
        """Bits of a word."""
        return self.lanes * self.bits

    @property
    def lo(self) -> int:
        """The smallest element."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def hi(self) -> int:
        """The largest element."""
        return (1 << (self.bits - int(self.signed))) - 1

    def pack(self, words: Words) -> list[int]:
        """Words as unsigned numbers of `word_bits` bits."""
        mask = (1 << self.bits) - 1
        return [
            sum((int(x) & mask) << (i * self.bits) for i, x in enumerate(word)) for word in words
        ]

    def unpack(self, packed: Sequence[int]) -> Words:
        """The elements of packed words: [words, lanes]."""
        span, mask = 1 << self.bits, (1 << self.bits) - 1
        codes = [[(w >> (i * self.bits)) & mask for i in range(self.lanes)] for w in packed]
        a = np.array(codes, np.int64).reshape(-1, self.lanes)
        return np.where(a > self.hi, a - span, a)

    def carries(self, other: Stream) -> bool:
        """Is the other the same stream, seen with any geometry?"""
        return all(
            getattr(self, f) == getattr(other, f)
            for f in ("name", "bits", "signed", "lanes", "words", "depth")
        )


@dataclass(frozen=True, eq=False)
class Op:
    """A unit. `name` is an identifier, `layer` the graph's layer it is part of."""

    name: str
    layer: str
    inputs: tuple[Stream, ...]
    outputs: tuple[Stream, ...]

    @property
    def output(self) -> Stream:
        """The stream it writes; the first of a Fork's, which are all alike."""
        return self.outputs[0]

    @property
    def fold(self) -> tuple[int, int] | None:
        """(pe, simd): results made at once and products in each; None for a unit that a folding does not name."""
        return None

    @property
    def extent(self) -> tuple[int, int]:
        """What pe and simd must divide."""
        return (1, 1)

    def run(self, *ins: Words) -> Words:
        """The words of the output [words, lanes] for an image's words of every input."""
        raise TypeError(f"{type(self).__name__} is no unit")


@dataclass(frozen=True, eq=False)
class Window(Op):
    """For each output pixel, the input's words under the kernel: rows of taps, taps, channel words.

    `pads` are top, left, bottom, right; a negative left one leaves columns out. Elements outside the image are `fill`.
    With the output's `by_channel`, channel words are the outer loop, then rows of taps, then taps.
    """

    kernel: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilations: tuple[int, int]
    fill: int

    @cached_property
    def sources(self) -> NDArray[np.int64]:
        """Which input word each output word is; -1 where it is all `fill`."""
        x, y = self.inputs[0], self.output
        rows = (
            np.arange(y.height)[:, None] * self.strides[0]
            + np.arange(self.kernel[0]) * self.dilations[0]
            - self.pads[0]
        )
        columns = (
            np.arange(y.width)[:, None] * self.strides[1]
            + np.arange(self.kernel[1]) * self.dilations[1]
            - self.pads[1]
        )
        r, c = rows[:, None, :, None], columns[None, :, None, :]
        inside = (r >= 0) & (r < x.height) & (c >= 0) & (c < x.width)
        pixel = np.where(inside, r * x.width + c, -1).reshape(y.pixels, y.taps)
        word = pixel[..., None] * x.folds + np.arange(x.folds)
        word = np.where(pixel[..., None] < 0, -1, word)
        return np.ascontiguousarray(word.swapaxes(1, 2) if y.by_channel else word).reshape(-1)

    def run(self, *ins: Words) -> Words:
        """See Op."""
        at = self.sources
        return np.where(at[:, None] < 0, np.int64(self.fill), ins[0][at])


@dataclass(frozen=True, eq=False)
class Sum(Op):
    """A unit with accumulators of `acc_bits` bits that no partial sum leaves, in any order.

    With `requantize` the accumulator is its only accumulator and the inputs after the first, which have as many lanes
    as the output, are its values in order; without, the output is the accumulator itself.
    """

    acc_bits: int
    requantize: Requantize | None

    def finish(self, acc: Words, values: Sequence[Words]) -> Words:
        """Requantize accumulators [pixels, channels] and cut them into words."""
        most = 1 << (self.acc_bits - 1)
        if acc.size and not (-most <= int(acc.min()) and int(acc.max()) < most):
            raise OverflowError(f"{self.name}: an accumulator leaves {self.acc_bits} bits")
        if self.requantize is not None:
            acc = self.requantize.run([acc], [v.reshape(acc.shape) for v in values])
        return acc.reshape(-1, self.output.lanes)


@dataclass(frozen=True, eq=False)
class MatrixVector(Sum):
    """Every vector of K elements times `weights` [O, K], plus `bias` [O]: a pixel with its taps, or a whole map.

    `pe` results at once, `simd` products in each: the vector's K / simd words are read once and kept, the O / pe groups
    of results are made one after the other from them, K / simd steps each.
    """

    weights: NDArray[np.int64]
    bias: NDArray[np.int64]
    weight_bits: int

    @property
    def pe(self) -> int:
        """Results at once: the output's lanes."""
        return self.output.lanes

    @property
    def simd(self) -> int:
        """Products in each at once: the input's lanes."""
        return self.inputs[0].lanes

    @property
    def vectors(self) -> int:
        """Vectors of an image."""
        return self.output.pixels

    @property
    def fold(self) -> tuple[int, int]:
        """See Op."""
        return self.pe, self.simd

    @property
    def extent(self) -> tuple[int, int]:
        """See Op."""
        return self.weights.shape[0], self.weights.shape[1]

    def run(self, *ins: Words) -> Words:
        """See Op."""
        x = ins[0].reshape(-1, self.weights.shape[1]).astype(np.float64)
        # exact: every partial sum is below 2**31
        products = (x @ self.weights.T.astype(np.float64)).astype(np.int64)
        return self.finish(products + self.bias, ins[1:])


@dataclass(frozen=True, eq=False)
class Lanewise(Op):
    """A unit that does the same in every lane: all its streams have as many lanes."""

    @property
    def fold(self) -> tuple[int, int] | None:
        """See Op."""
        return self.output.lanes, 1

    @property
    def extent(self) -> tuple[int, int]:
        """See Op."""
        return math.gcd(*(s.channels for s in self.inputs)), 1


@dataclass(frozen=True, eq=False)
class Depthwise(Sum, Lanewise):
    """Every channel's taps times its row of `weights` [C, taps], plus `bias` [C]; the input is by channel."""

    weights: NDArray[np.int64]
    bias: NDArray[np.int64]
    weight_bits: int

    def run(self, *ins: Words) -> Words:
        """See Op."""
        s = self.inputs[0]
        x = ins[0].reshape(s.pixels, s.channels // s.lanes, s.taps, s.lanes)
        w = self.weights.reshape(s.channels // s.lanes, s.lanes, s.taps)
        acc = np.einsum("pftl,flt->pfl", x, w).reshape(s.pixels, s.channels)
        return self.finish(acc + self.bias, ins[1:])


@dataclass(frozen=True, eq=False)
class SumPool(Sum, Lanewise):
    """The sum of (x - zero_point) over every channel's taps; the input is by channel."""

    zero_point: int

    def run(self, *ins: Words) -> Words:
        """See Op."""
        s = self.inputs[0]
        x = ins[0].reshape(s.pixels, s.channels // s.lanes, s.taps, s.lanes)
        acc = (x - self.zero_point).sum(axis=2).reshape(s.pixels, s.channels)
        return self.finish(acc, ins[1:])


@dataclass(frozen=True, eq=False)
class GlobalSum(Sum, Lanewise):
    """The sum of (x - zero_point) over all pixels, for every channel: one accumulator a channel."""

    zero_point: int

    def run(self, *ins: Words) -> Words:
        """See Op."""
        x = ins[0].reshape(-1, self.inputs[0].channels)
        return self.finish((x - self.zero_point).sum(axis=0, keepdims=True), ins[1:])


@dataclass(frozen=True, eq=False)
class MaxPool(Lanewise):
    """The largest of every channel's taps; the input is by channel."""

    def run(self, *ins: Words) -> Words:
        """See Op."""
        s = self.inputs[0]
        most: Words = ins[0].reshape(-1, s.taps, s.lanes).max(axis=1)
        return most


@dataclass(frozen=True, eq=False)
class Elementwise(Lanewise):
    """A Requantize of streams: first its accumulators, then its values, in order."""

    requantize: Requantize

    def run(self, *ins: Words) -> Words:
        """See Op."""
        flat = [x.reshape(-1, self.output.channels) for x in ins]
        split = len(self.requantize.accs)
        return self.requantize.run(flat[:split], flat[split:]).reshape(-1, self.output.lanes)


@dataclass(frozen=True, eq=False)
class Table(Lanewise):
    """table[x - lowest code of x]."""

    table: NDArray[np.int64]

    def run(self, *ins: Words) -> Words:
        """See Op."""
        return self.table[ins[0] - self.inputs[0].lo]


@dataclass(frozen=True, eq=False)
class Concat(Lanewise):
    """For each pixel the words of the first input, then those of the second, and so on."""

    def run(self, *ins: Words) -> Words:
        """See Op."""
        parts = [x.reshape(s.pixels, s.channels) for x, s in zip(ins, self.inputs, strict=True)]
        return np.concatenate(parts, axis=1).reshape(-1, self.output.lanes)


@dataclass(frozen=True, eq=False)
class ChannelPad(Lanewise):
    """For each pixel `before` channels of `fill`, the input's channels, `after` channels of `fill`."""

    before: int
    after: int
    fill: int

    @property
    def extent(self) -> tuple[int, int]:
        """See Op."""
        return math.gcd(self.inputs[0].channels, self.before, self.after), 1

    @property
    def runs(self) -> tuple[int, int, int]:
        """Words of each part of a pixel."""
        lanes = self.output.lanes
        return self.before // lanes, self.inputs[0].folds, self.after // lanes

    def run(self, *ins: Words) -> Words:
        """See Op."""
        x = ins[0].reshape(-1, self.inputs[0].channels)
        widths = ((0, 0), (self.before, self.after))
        return np.pad(x, widths, constant_values=self.fill).reshape(-1, self.output.lanes)


@dataclass(frozen=True, eq=False)
class Softmax(Op):
    """`qcompile.ir.ops.Softmax` over the channels of each pixel, one lane."""

    op: ops.Softmax
    table: NDArray[np.int64]

    def run(self, *ins: Words) -> Words:
        """See Op."""
        codes = self.op.run(ins[0].reshape(-1, self.output.channels), self.table)
        return codes.astype(np.int64).reshape(-1, 1)


@dataclass(frozen=True, eq=False)
class Fork(Op):
    """The same words into every output."""

    def run(self, *ins: Words) -> Words:
        """See Op."""
        return ins[0]


@dataclass(frozen=True, eq=False)
class Width(Op):
    """The same elements in wider or narrower words; one number of lanes divides the other."""

    def run(self, *ins: Words) -> Words:
        """See Op."""
        return ins[0].reshape(-1, self.output.lanes)
