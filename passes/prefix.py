"""The network run layer by layer over all samples, in float and as it is quantized so far, side by side.

What comes before a layer is already quantized when its weights are decided (the quantized prefix): its operands carry
the errors that the chip will have, its target is what the float network makes there. The simulation differs from the
integer graph only by the multipliers of its rescales.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.errors import BadInput
from qcompile.pipeline import Batch, Samples
from qcompile.plan import TIED, Quantizer, QuantPlan

from .codes import clamp_codes, quantize, real_bias, weight_codes
from .held import Held
from .layers import (
    Clamp,
    Layer,
    Linear,
    Operand,
    Rescaled,
    initializer,
    partition,
)
from .operators import Operators, constant_operands, operands
from .unfold import unfold

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Codes = NDArray[np.signedinteger]

CHUNK_ROWS = 32
BIAS_STEPS = 2.0**30
"""A fitted bias has at most this many steps of its accumulator."""


@dataclass(frozen=True, slots=True)
class Site:
    """A product whose weights are to be decided: its place, its quantizers and what it sees and should make."""

    prefix: Prefix
    layer: Rescaled
    term: Linear
    x: Quantizer
    w: Quantizer
    y: Quantizer

    @property
    def weight(self) -> str:
        """The name of the weight tensor."""
        return str(self.term.weight.name)

    @property
    def product(self) -> str:
        """The name of the value that the product's node makes."""
        return str(self.term.node.outputs[0].name)

    @property
    def groups(self) -> int:
        """How many groups the channels fall into."""
        node = self.term.node
        return node.attributes.get_int("group", 1) if node.op_type == "Conv" else 1

    @property
    def kernel(self) -> tuple[int, ...]:
        """The size of a convolution's kernel; empty for Gemm and MatMul."""
        array = initializer(self.term.weight)
        assert array is not None
        return tuple(array.shape[2:])

    @property
    def weights(self) -> Doubles:
        """The float weights as [groups, outputs per group, inputs per group]."""
        array = initializer(self.term.weight)
        assert array is not None
        return self.grouped(np.asarray(array, np.float64))

    @property
    def scale(self) -> Doubles:
        """The weight scales as [groups, outputs per group]."""
        shape = self.weights.shape[:2]
        return np.broadcast_to(np.array(self.w.scale), (shape[0] * shape[1],)).reshape(shape)

    def grouped(self, array: Doubles) -> Doubles:
        """An array in the shape of the weight tensor as [groups, outputs per group, inputs per group]."""
        rows = np.moveaxis(array, self.term.channel_axis, 0)
        return rows.reshape(self.groups, len(rows) // self.groups, -1)

    def shaped(self, codes: Doubles) -> NDArray[np.int8]:
        """Codes as [groups, outputs per group, inputs per group] in the shape of the weight tensor."""
        array = initializer(self.term.weight)
        assert array is not None
        rows = np.moveaxis(array, self.term.channel_axis, 0).shape
        return np.ascontiguousarray(
            np.moveaxis(codes.reshape(rows), 0, self.term.channel_axis), dtype=np.int8
        )

    def rows(self, limit: int) -> Iterator[tuple[Floats, Floats]]:
        """Operand rows [groups, rows, inputs] and what product and bias should make of them [groups, rows, outputs].

        At most about `limit` positions, drawn alike from every sample; operands are real numbers.
        """
        yield from self.prefix.rows(self, limit)


@dataclass(slots=True)
class Prefix:
    """Float and quantized values of every tensor that is still needed, layer by layer."""

    model: ir.Model
    plan: QuantPlan
    samples: Iterable[Batch]
    seed: int = 0
    threads: int = 1
    fuse_residual: bool = True
    fit_bias: bool = False
    real: dict[str, Held] = field(default_factory=dict)
    codes: dict[str, Held] = field(default_factory=dict)
    chunks: int = 0
    _size: int = CHUNK_ROWS
    _spare: int = 0
    _sums: Held | None = None
    _folder: Path = Path()
    _budget: list[int] = field(default_factory=lambda: [0])
    _operators: Operators = field(init=False)

    def __post_init__(self) -> None:
        self._operators = Operators(self.model, self.threads)

    def steps(self) -> Iterator[tuple[Layer, list[Site]]]:
        """Each layer with the products to decide in it; once the next is asked for, it is quantized as decided.

        With `fit_bias` every product's bias becomes the one for which the mean of the layer's sum is the float one.
        """
        layers = partition(self.model, fuse_residual=self.fuse_residual)
        last = {name: i for i, layer in enumerate(layers) for name in operands(layer)}
        with tempfile.TemporaryDirectory(prefix="qcompile-") as scratch:
            self._folder = Path(scratch)
            self._take_inputs()
            for i, layer in enumerate(layers):
                linear = isinstance(layer, Rescaled) and any(
                    isinstance(t, Linear) for t in layer.terms
                )
                if linear:
                    assert isinstance(layer, Rescaled)
                    self._sum(layer)
                    yield layer, self._sites(layer)
                    self._requantize(layer)
                else:
                    yield layer, []
                    self._pass_on(layer)
                for name in [n for n in self.real if last.get(n, -1) <= i]:
                    self.real.pop(name).drop()
                    self.codes.pop(name).drop()
            for name in list(self.real):
                self.real.pop(name).drop()
                self.codes.pop(name).drop()

    # --- what is held -------------------------------------------------------------------------------------------

    def _hold(self) -> Held:
        return Held(self._folder, self._budget)

    def _take_inputs(self) -> None:
        fixed = {
            v.shape.dims[0]
            for v in self.model.graph.inputs
            if v.shape is not None and len(v.shape) and isinstance(v.shape.dims[0], int)
        }
        size = self._size = max(fixed, default=0) or CHUNK_ROWS
        names = [str(v.name) for v in self.model.graph.inputs]
        for name in names:
            self.real[name], self.codes[name] = self._hold(), self._hold()
        pending: dict[str, list[NDArray[np.generic]]] = {n: [] for n in names}
        for batch in (*self.samples, None):
            if batch is not None:
                for name in names:
                    pending[name].append(batch[name])
            have = sum(len(a) for a in pending[names[0]])
            whole = have // size * size if batch is not None else have
            if not whole:
                continue
            joined = {n: np.concatenate(pending[n]) for n in names}
            for at in range(0, whole, size):
                count = min(size, whole - at)
                for name in names:
                    piece = np.asarray(joined[name][at : at + count], np.float32)
                    if fixed and count < size:
                        # the network takes no fewer rows at once
                        self._spare = size - count
                        piece = np.concatenate([piece, piece[-1:].repeat(self._spare, 0)])
                    self.real[name].append(np.ascontiguousarray(piece))
                    self.codes[name].append(codes_of(piece, self._quantizer(name)))
                self.chunks += 1
            pending = {n: [joined[n][whole:]] for n in names}
        if not self.chunks:
            raise BadInput("rounding needs at least one sample; the data set is empty")

    def _samples(self, array: Floats, chunk: int) -> slice:
        """Where on the leading axis of a chunk's values the samples lie, and not what only fills a fixed batch."""
        if not self._spare or chunk < self.chunks - 1:
            return slice(None)
        # a reshape may change how many leading indices a sample has, but not the samples' order
        return slice(-(-len(array) * (self._size - self._spare) // self._size))

    def _quantizer(self, name: str) -> Quantizer:
        q = self.plan.of(name)
        assert q is not None, f"{name} has no quantizer"
        return q

    def _real_codes(self, name: str, chunk: int) -> Floats:
        """What the codes of a tensor stand for."""
        q = self._quantizer(name)
        codes = self.codes[name][chunk].astype(np.float32)
        return (codes - np.float32(q.zero_point[0])) * np.float32(q.scale[0])

    # --- layers with weights ------------------------------------------------------------------------------------

    def _sites(self, layer: Rescaled) -> list[Site]:
        y = self._quantizer(str(layer.out.name))
        return [
            Site(
                self,
                layer,
                t,
                self._quantizer(str(t.x.name)),
                self._quantizer(str(t.weight.name)),
                y,
            )
            for t in layer.terms
            if isinstance(t, Linear)
        ]

    def _sum(self, layer: Rescaled) -> None:
        """The float sum before its clamp, and the float result."""
        self._sums, out = self._hold(), str(layer.out.name)
        self.real[out] = self._hold()
        weights = [self._float_weight(t) if isinstance(t, Linear) else None for t in layer.terms]
        for chunk in range(self.chunks):
            total: Floats = np.zeros((), np.float32)
            for term, w in zip(layer.terms, weights, strict=True):
                if isinstance(term, Linear):
                    assert w is not None
                    x = np.asarray(self.real[str(term.x.name)][chunk], np.float32)
                    bias = None if term.bias is None else initializer(term.bias)
                    made = self._operators.product(term, x, w)
                    if bias is not None:
                        made = made + channels(
                            np.asarray(bias, np.float32).ravel(), made.ndim, term
                        )
                    total = total + made
                else:
                    assert isinstance(term, Operand)
                    total = total + np.float32(term.sign) * self._float_operand(term, chunk)
            self._sums.append(total)
            self.real[out].append(clamped(total, layer.clamp))

    def _float_operand(self, term: Operand, chunk: int) -> Floats:
        constant = initializer(term.value)
        if constant is not None:
            return np.asarray(constant, np.float32)
        return np.asarray(self.real[str(term.value.name)][chunk], np.float32)

    def _operand(self, term: Operand, chunk: int) -> Floats:
        if initializer(term.value) is not None:
            return self._real_constant(term.value)
        return self._real_codes(str(term.value.name), chunk)

    def _real_constant(self, value: ir.Value) -> Floats:
        """What the codes of a constant operand stand for."""
        q = self._quantizer(str(value.name))
        codes = quantize(np.asarray(initializer(value), np.float64), q)
        return ((codes - q.zero_point[0]) * q.scale[0]).astype(np.float32)

    def _float_weight(self, term: Linear) -> Floats:
        array = initializer(term.weight)
        assert array is not None
        return np.asarray(array, np.float32)

    def _coded(self, term: Linear) -> tuple[Floats, Doubles]:
        """The decided (or nearest) codes of a weight as floats, and the real step of its accumulator per channel."""
        w, x = self._quantizer(str(term.weight.name)), self._quantizer(str(term.x.name))
        codes = weight_codes(term, w, self.plan)
        count = codes.shape[term.channel_axis]
        step = np.broadcast_to(np.array(w.scale), (count,)) * x.scale[0]
        return codes.astype(np.float32), step

    def _accumulate(self, term: Linear, codes: Floats, step: Doubles, chunk: int) -> Floats:
        """The product of codes as a real number, without its bias."""
        q = self._quantizer(str(term.x.name))
        x = self.codes[str(term.x.name)][chunk].astype(np.float32) - np.float32(q.zero_point[0])
        made = self._operators.product(term, x, codes)
        made *= channels(step.astype(np.float32), made.ndim, term)
        return made

    def rows(self, site: Site, limit: int) -> Iterator[tuple[Floats, Floats]]:
        """See `Site.rows`."""
        assert self._sums is not None
        term, layer = site.term, site.layer
        generator = np.random.default_rng(
            [self.seed, len(site.product), *site.product.encode()[-64:]]
        )
        coded = {
            id(t): self._coded(t) for t in layer.terms if isinstance(t, Linear) and t is not term
        }
        each = max(1, -(-limit // max(self.chunks, 1)))
        for chunk in range(self.chunks):
            target = np.asarray(self._sums[chunk], np.float32)
            for other in layer.terms:
                if isinstance(other, Operand):
                    target = target - np.float32(other.sign) * self._operand(other, chunk)
                elif isinstance(other, Linear) and other is not term:
                    made = self._accumulate(other, *coded[id(other)], chunk)
                    bias = np.broadcast_to(real_bias(other, self.plan), coded[id(other)][1].shape)
                    target = target - made - channels(bias.astype(np.float32), made.ndim, other)
            x = self._real_codes(str(term.x.name), chunk)
            x, target = x[self._samples(x, chunk)], target[self._samples(target, chunk)]
            yield unfold(term.node, site.kernel, x, target, each, generator)

    def _requantize(self, layer: Rescaled) -> None:
        """The layer's result in codes, with every decision made so far."""
        assert self._sums is not None
        out = str(layer.out.name)
        q = self._quantizer(out)
        linear = [t for t in layer.terms if isinstance(t, Linear)]
        coded = [self._coded(t) for t in linear]
        partial = self._hold()
        shift: Doubles | None = None
        count = 0
        # a bias of its own would make every step of a loop another program
        fits = self.fit_bias and TIED not in layer.out.metadata_props
        for chunk in range(self.chunks):
            total: Floats = np.zeros((), np.float32)
            for term, (codes, step) in zip(linear, coded, strict=True):
                total = total + self._accumulate(term, codes, step, chunk)
            for other in layer.terms:
                if isinstance(other, Operand):
                    total = total + np.float32(other.sign) * self._operand(other, chunk)
            partial.append(total)
            if fits:
                kept = self._samples(total, chunk)
                gap = np.asarray(self._sums[chunk][kept], np.float64) - total[kept]
                axis = channel_axis(linear[-1], gap.ndim)
                over = tuple(a for a in range(gap.ndim) if a != axis)
                shift = gap.sum(axis=over) + (0.0 if shift is None else shift)
                count += gap.size // gap.shape[axis]
        biases = [
            np.broadcast_to(real_bias(t, self.plan), s.shape)
            for t, (_, s) in zip(linear, coded, strict=True)
        ]
        if shift is not None:
            fitted = shift / count - sum(biases[:-1], np.zeros(1))
            # a channel of all but no weights keeps its bias inside 32 bits
            fitted = np.clip(fitted, -BIAS_STEPS * coded[-1][1], BIAS_STEPS * coded[-1][1])
            self.plan.biases[str(linear[-1].node.outputs[0].name)] = np.ascontiguousarray(fitted)
            biases[-1] = fitted
        self.codes[out] = self._hold()
        for chunk in range(self.chunks):
            total = np.asarray(partial[chunk], np.float32)
            for term, (_, step), bias in zip(linear, coded, biases, strict=True):
                rounded = np.rint(bias / step) * step
                total = total + channels(rounded.astype(np.float32), total.ndim, term)
            self.codes[out].append(codes_of(total, q, layer.clamp))
        partial.drop()
        self._sums.drop()

    # --- everything else ----------------------------------------------------------------------------------------

    def _pass_on(self, layer: Layer) -> None:
        """Run a layer's float operators on float values and on what the codes stand for, of constant operands too."""
        out = str(layer.out.name)
        names = list(dict.fromkeys(operands(layer)))
        fixed = constant_operands(layer)
        run = self._operators.layer(layer, [*names, *fixed])
        floats = {n: np.asarray(initializer(v), np.float32) for n, v in fixed.items()}
        rounded = {n: self._real_constant(v) for n, v in fixed.items()}
        q = self._quantizer(out)
        clamp = layer.clamp if isinstance(layer, Rescaled) else Clamp()
        self.real[out], self.codes[out] = self._hold(), self._hold()
        for chunk in range(self.chunks):
            given = {n: np.asarray(self.real[n][chunk]) for n in names}
            self.real[out].append(run(given | floats))
            given = {n: self._real_codes(n, chunk) for n in names}
            self.codes[out].append(codes_of(run(given | rounded), q, clamp))


def channel_axis(term: Linear, rank: int) -> int:
    """The axis of a product's result that counts output channels."""
    return 1 if term.node.op_type == "Conv" else rank - 1


def channels(row: Floats, rank: int, term: Linear) -> Floats:
    """A row of numbers, one per output channel, shaped to meet a product's result."""
    shape = [1] * rank
    shape[channel_axis(term, rank)] = -1
    return row.reshape(shape)


def clamped(x: Floats, clamp: Clamp) -> Floats:
    """Real numbers inside a clamp."""
    if clamp.lo is None and clamp.hi is None:
        return x
    return np.clip(x, clamp.lo, clamp.hi).astype(np.float32, copy=False)


def codes_of(x: Floats, q: Quantizer, clamp: Clamp | None = None) -> Codes:
    """Real numbers as codes, rounded half up as a Rescale does, in the smallest type that holds the format."""
    lo, hi = (q.format.lo, q.format.hi) if clamp is None else clamp_codes(clamp, q)
    steps = np.floor(x * np.float32(1.0 / q.scale[0]) + np.float32(0.5))
    steps += np.float32(q.zero_point[0])
    dtype = np.int8 if q.format.bits <= 8 else np.int16 if q.format.bits <= 16 else np.int32
    codes: Codes = np.clip(steps, lo, hi).astype(dtype)
    return codes


def spread(samples: Samples, count: int) -> Iterator[Batch]:
    """At most `count` samples at equal distances over all, in order."""
    total = sum(len(next(iter(batch.values()))) for batch in samples)
    wanted = np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.int64))
    done = 0
    for batch in samples:
        size = len(next(iter(batch.values())))
        kept: NDArray[np.int64] = wanted[(wanted >= done) & (wanted < done + size)] - done
        if len(kept):
            yield {name: array[kept] for name, array in batch.items()}
        done += size
