"""The closed set of integer operators: each is a frozen value that knows its types and its exact meaning.

Activations are channels-last: [N, *spatial, C]. `infer` gives the result type or raises TypeError with a
sentence; `run` is the meaning every backend must equal to the last bit, for any number of rows on axis 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from qcompile.ir import arith
from qcompile.ir.arith import Acc, Val
from qcompile.ir.attention import BatchMatMul, Normalize
from qcompile.ir.op import Op, is_code, operands, want
from qcompile.ir.selection import ArgExtreme, Extreme, Take
from qcompile.ir.types import Array, DType, TensorType

_CHUNK_BYTES = 1 << 26
"""An im2col buffer in the interpreter is cut along the rows to about this size."""


def _windows(
    spatial: tuple[int, ...],
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    pads: tuple[int, ...],
    dilations: tuple[int, ...],
) -> tuple[int, ...]:
    """Output extents of a sliding window; pads are all begins, then all ends."""
    rank = len(spatial)
    want(rank >= 1, "a window needs spatial axes: the operand is [N, *spatial, C]")
    want(
        len(kernel) == len(strides) == len(dilations) == rank and len(pads) == 2 * rank,
        f"a window over {rank} spatial axes needs {rank} kernel sizes, strides and dilations and {2 * rank} pads",
    )
    want(min(*strides, *dilations, *kernel) >= 1 and min(pads) >= 0, "window sizes are positive")
    out = tuple(
        (s + pads[i] + pads[rank + i] - (kernel[i] - 1) * dilations[i] - 1) // strides[i] + 1
        for i, s in enumerate(spatial)
    )
    want(min(out) >= 1, f"the window {kernel} does not fit the padded input {spatial}")
    return out


def _padded(x: Array, pads: tuple[int, ...], value: int) -> Array:
    if not any(pads):
        return x
    rank = x.ndim - 2
    widths = [(0, 0), *((pads[i], pads[rank + i]) for i in range(rank)), (0, 0)]
    return np.pad(x, widths, constant_values=value)


def _taps(
    x: Array,
    out: tuple[int, ...],
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
) -> Iterator[Array]:
    """For each kernel position in order, the input elements it meets: [N, *out, C]."""
    for tap in product(*(range(k) for k in kernel)):
        window = tuple(
            slice(t * d, t * d + (o - 1) * s + 1, s)
            for t, d, o, s in zip(tap, dilations, out, strides, strict=True)
        )
        yield x[(slice(None), *window)]


_BLOCK = 1 << 22
"""Weights that are floats at a time."""


def _exact_matmul(x: Array, w: Array) -> NDArray[np.int32]:
    """Multiply x by w.T in integers through the float unit: exact, because every partial sum fits the mantissa."""
    peak = max(abs(int(x.min(initial=0))), abs(int(x.max(initial=0))))
    step = max(1, _BLOCK // max(w.shape[1], 1))
    result = np.empty((*x.shape[:-1], len(w)), np.int32)
    for at in range(0, len(w), step):
        part = w[at : at + step]
        reach = int(np.abs(part.astype(np.int64)).sum(axis=1).max(initial=0)) * peak
        if reach < 1 << 24:
            sums = (x.astype(np.float32) @ part.astype(np.float32).T).astype(np.int32)
        else:
            wide = x.astype(np.float64) @ part.astype(np.float64).T
            sums = wide.astype(np.int64).astype(np.int32)
        result[..., at : at + step] = sums
    return result


@dataclass(frozen=True)
class Conv(Op):
    """x [N, *S, C], w [O, *K, C/groups], b int32 [O] -> int32 [N, *S', O]: sum of stored codes times weights plus b.

    Zero points do not appear: they are folded into b, and the border is filled with `pad_value`, the code of 0.
    """

    strides: tuple[int, ...]
    pads: tuple[int, ...]
    dilations: tuple[int, ...]
    groups: int = 1
    pad_value: int = 0

    def infer(self, *ins: TensorType) -> TensorType:
        """Result type; see the class."""
        x, w, b = operands(self, ins, 3)
        want(x.dtype.bits <= 16 and w.dtype.bits <= 8 and w.dtype.signed, f"Conv of {x} by {w}")
        want(len(x.shape) == len(w.shape) >= 3, f"Conv wants equal ranks, not {x} and {w}")
        channels, outputs = x.shape[-1], w.shape[0]
        want(
            channels == w.shape[-1] * self.groups and outputs % self.groups == 0,
            f"{channels} channels in {self.groups} groups do not fit weights {w}",
        )
        want(
            b == TensorType(DType.I32, (outputs,)), f"Conv wants int32[{outputs}] as bias, not {b}"
        )
        want(
            x.dtype.lo <= self.pad_value <= x.dtype.hi,
            f"pad value {self.pad_value} is no {x.dtype}",
        )
        out = _windows(x.shape[1:-1], w.shape[1:-1], self.strides, self.pads, self.dilations)
        return TensorType(DType.I32, (x.shape[0], *out, outputs))

    def run(self, *ins: Array) -> Array:
        """Exact result; see the class."""
        x, w, b = ins
        kernel = w.shape[1:-1]
        out = _windows(x.shape[1:-1], kernel, self.strides, self.pads, self.dilations)
        x = _padded(x, self.pads, self.pad_value)
        if self.groups == x.shape[-1] and w.shape[-1] == 1:
            return self._depthwise(x, w, b, out)
        y = np.empty((x.shape[0], *out, w.shape[0]), np.int32)
        depth, width = w.shape[-1], w.shape[0] // self.groups
        rows = max(1, _CHUNK_BYTES // (8 * math.prod(out) * math.prod(w.shape[1:])))
        for at in range(0, x.shape[0], rows):
            part = x[at : at + rows]
            for g in range(self.groups):
                patch = np.stack(
                    list(
                        _taps(
                            part[..., g * depth : (g + 1) * depth],
                            out,
                            kernel,
                            self.strides,
                            self.dilations,
                        )
                    ),
                    axis=-2,
                ).reshape(-1, math.prod(w.shape[1:]))
                block = w[g * width : (g + 1) * width].reshape(width, -1)
                y[at : at + rows, ..., g * width : (g + 1) * width] = _exact_matmul(
                    patch, block
                ).reshape(len(part), *out, width)
        return y + b

    def _depthwise(self, x: Array, w: Array, b: Array, out: tuple[int, ...]) -> Array:
        times = w.shape[0] // x.shape[-1]
        y = np.broadcast_to(b, (x.shape[0], *out, w.shape[0])).astype(np.int32)
        for at, part in enumerate(_taps(x, out, w.shape[1:-1], self.strides, self.dilations)):
            wide = np.repeat(part, times, axis=-1) if times > 1 else part
            y += wide.astype(np.int32) * w[..., 0].reshape(len(w), -1).T[at].astype(np.int32)
        return y


@dataclass(frozen=True)
class MatMul(Op):
    """x [..., K], w [O, K], b int32 [O] -> int32 [..., O]: x @ w.T + b on stored codes."""

    def infer(self, *ins: TensorType) -> TensorType:
        """Result type; see the class."""
        x, w, b = operands(self, ins, 3)
        want(x.dtype.bits <= 16 and w.dtype.bits <= 8 and w.dtype.signed, f"MatMul of {x} by {w}")
        want(
            len(w.shape) == 2 and len(x.shape) >= 2 and x.shape[-1] == w.shape[1],
            f"MatMul of {x} by {w} does not fit",
        )
        want(
            b == TensorType(DType.I32, (w.shape[0],)),
            f"MatMul wants int32[{w.shape[0]}] as bias, not {b}",
        )
        return TensorType(DType.I32, (*x.shape[:-1], w.shape[0]))

    def run(self, *ins: Array) -> Array:
        """Exact result; see the class."""
        x, w, b = ins
        return _exact_matmul(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], len(w)) + b


@dataclass(frozen=True)
class Rescale(Op):
    """The only rescaling: accumulators first, then values, summed at `f` fractional bits and rounded once (see arith).

    Parameters with several entries go along the last axis, or over all spatial positions where `spatial` is set.
    """

    accs: tuple[Acc, ...]
    vals: tuple[Val, ...]
    f: tuple[int, ...]
    zero_point: int
    lo: int
    hi: int
    out: DType
    spatial: bool = False

    def infer(self, *ins: TensorType) -> TensorType:
        """Result type; see the class."""
        want(
            len(ins) == len(self.accs) + len(self.vals) >= 1,
            f"Rescale of {len(self.accs)} accumulators and {len(self.vals)} values got {len(ins)} operands",
        )
        accs, vals = ins[: len(self.accs)], ins[len(self.accs) :]
        want(all(a.dtype is DType.I32 for a in accs), "an accumulator is int32")
        want(all(v.dtype.bits <= 16 for v in vals), "a value has at most 16 bits")
        try:
            shape = np.broadcast_shapes(*(t.shape for t in ins))
        except ValueError:
            raise TypeError(f"{', '.join(map(str, ins))} do not broadcast") from None
        want(len(shape) >= 1, "Rescale wants at least one axis")
        want(all(a.shape == shape for a in accs), "an accumulator is never broadcast")
        entries = math.prod(shape[1:-1]) if self.spatial else shape[-1]
        rows = [self.f, *(r for a in self.accs for r in (a.multiplier, a.pre_shift))]
        rows += [v.multiplier for v in self.vals]
        want(
            all(len(r) in (1, entries) for r in rows),
            f"Rescale parameters have 1 or {entries} entries",
        )
        want(all(arith.F_MIN <= f <= arith.F_MAX for f in self.f), f"f lies in 1..30, not {self.f}")
        want(
            all(1 << 30 <= m < 1 << 31 for a in self.accs for m in a.multiplier),
            "an accumulator's multiplier lies in [2**30, 2**31)",
        )
        want(
            all(0 <= p <= 31 for a in self.accs for p in a.pre_shift),
            "an accumulator is shifted left by 0..31 first",
        )
        want(
            all(abs(n) < 1 << 31 for v in self.vals for n in v.multiplier),
            "a value's multiplier has 32 bits",
        )
        for v, kind in zip(self.vals, vals, strict=True):
            is_code(v.zero_point, kind)
        want(
            abs(self.zero_point) <= 1 << 30,
            f"adding the zero point {self.zero_point} may leave 32 bits",
        )
        want(
            self.out.lo <= self.lo <= self.hi <= self.out.hi,
            f"[{self.lo}, {self.hi}] is not in {self.out}",
        )
        return TensorType(self.out, shape)

    def parameter_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """How a parameter row of several entries broadcasts against a result of `shape`."""
        return (1, *shape[1:-1], 1) if self.spatial else (shape[-1],)

    def run(self, *ins: Array) -> Array:
        """Exact result; see the class."""
        shape = self.parameter_shape(np.broadcast_shapes(*(x.shape for x in ins)))
        f = np.array(self.f, np.int64)
        y = arith.rescale(
            [(a, x.astype(np.int32)) for a, x in zip(self.accs, ins, strict=False)],
            list(zip(self.vals, ins[len(self.accs) :], strict=True)),
            f if len(self.f) == 1 else f.reshape(shape),
            self.zero_point,
            self.lo,
            self.hi,
            shape,
        )
        return y.astype(self.out.numpy)


@dataclass(frozen=True)
class Mul(Op):
    """(x - zero_x) * (y - zero_y) -> int32, broadcast; one operand may have up to 16 bits."""

    zero_x: int
    zero_y: int

    def infer(self, *ins: TensorType) -> TensorType:
        """Result type; see the class."""
        x, y = operands(self, ins, 2)
        # 17 bits with their zero point times 9: the product fits int32 whatever the codes are
        few, many = sorted((x.dtype.bits, y.dtype.bits))
        want(few <= 8 and many <= 16, f"Mul of {x} and {y}: at most 16 bits by at most 8 bits")
        is_code(self.zero_x, x)
        is_code(self.zero_y, y)
        try:
            return TensorType(DType.I32, np.broadcast_shapes(x.shape, y.shape))
        except ValueError:
            raise TypeError(f"{x} and {y} do not broadcast") from None

    def run(self, *ins: Array) -> Array:
        """Exact result; see the class."""
        x, y = ins
        return (x.astype(np.int32) - self.zero_x) * (y.astype(np.int32) - self.zero_y)


@dataclass(frozen=True)
class Lut(Op):
    """table[x - lowest code of x]: any unary function of an 8-bit tensor, without approximation."""

    def infer(self, *ins: TensorType) -> TensorType:
        """Result type; see the class."""
        x, table = operands(self, ins, 2)
        want(x.dtype.bits <= 8, f"a table wants at most 8 bits, not {x}")
        want(
            table.shape == (1 << x.dtype.bits,),
            f"a table for {x.dtype} has {1 << x.dtype.bits} entries",
        )
        return TensorType(table.dtype, x.shape)

    def run(self, *ins: Array) -> Array:
        """Exact result; see the class."""
        x, table = ins
        lowest = 0 if x.dtype == np.uint8 else -(len(table) // 2)
        return np.asarray(table[x.astype(np.int64) - lowest])


@dataclass(frozen=True)
class MaxPool(Op):
    """The largest code under each window; the border never wins."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    dilations: tuple[int, ...]

    def infer(self, *ins: TensorType) -> TensorType:
        """Result type; see the class."""
        (x,) = operands(self, ins, 1)
        spatial = x.shape[1:-1]
        out = _windows(spatial, self.kernel, self.strides, self.pads, self.dilations)
        want(
            all(self._meets_input(i, size, out[i]) for i, size in enumerate(spatial)),
            "a pooling window may not lie wholly in the border",
        )
        return TensorType(x.dtype, (x.shape[0], *out, x.shape[-1]))

    def _meets_input(self, axis: int, size: int, outputs: int) -> bool:
        """Does every window along an axis hold an element that is no border?"""
        step, stride, begin = self.dilations[axis], self.strides[axis], self.pads[axis]
        reach = (self.kernel[axis] - 1) * step
        starts = range(-begin, outputs * stride - begin, stride)
        # a window that starts at a < 0 first leaves the border at a % step
        return all(a + reach >= 0 and (a % step if a < 0 else a) < size for a in starts)

    def run(self, *ins: Array) -> Array:
        """Exact result; see the class."""
        (x,) = ins
        out = _windows(x.shape[1:-1], self.kernel, self.strides, self.pads, self.dilations)
        padded = _padded(x, self.pads, int(np.iinfo(x.dtype).min))
        y: Array | None = None
        for part in _taps(padded, out, self.kernel, self.strides, self.dilations):
            y = part.copy() if y is None else np.maximum(y, part)
        assert y is not None
        return y


@dataclass(frozen=True)
class SumPool(Op):
    """The sum of (x - zero_point) under each window -> int32; the border counts as 0."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    zero_point: int

    def infer(self, *ins: TensorType) -> TensorType:
        """Result type; see the class."""
        (x,) = operands(self, ins, 1)
        want(x.dtype.bits <= 16, f"SumPool of {x}: at most 16 bits")
        is_code(self.zero_point, x)
        ones = (1,) * len(self.kernel)
        out = _windows(x.shape[1:-1], self.kernel, self.strides, self.pads, ones)
        return TensorType(DType.I32, (x.shape[0], *out, x.shape[-1]))

    def run(self, *ins: Array) -> Array:
        """Exact result; see the class."""
        (x,) = ins
        ones = (1,) * len(self.kernel)
        out = _windows(x.shape[1:-1], self.kernel, self.strides, self.pads, ones)
        padded = _padded(x.astype(np.int32) - self.zero_point, self.pads, 0)
        y = np.zeros((x.shape[0], *out, x.shape[-1]), np.int32)
        for part in _taps(padded, out, self.kernel, self.strides, ones):
            y += part
        return y


@dataclass(frozen=True)
class Softmax(Op):
    """Softmax over the last axis: exponentials by table, one Newton reciprocal per row, one rounding.

    x, table int32 [2**bits of x], table[k] = exp of -k input steps with `fraction` fractional bits, so that the sum
    of a row stays below 2**31. The result has scale 2**-b and zero point -2**(b-1) for an output of b bits.
    """

    fraction: int
    out: DType

    def infer(self, *ins: TensorType) -> TensorType:
        """Result type; see the class."""
        x, table = operands(self, ins, 2)
        want(len(x.shape) >= 1, "Softmax wants at least one axis")
        want(0 <= self.fraction <= 30, f"exponentials have 0..30 bits, not {self.fraction}")
        want(
            x.dtype.bits <= 8 and self.out in (DType.I8, DType.I16), f"Softmax of {x} to {self.out}"
        )
        want(table == TensorType(DType.I32, (1 << x.dtype.bits,)), f"Softmax table {table}")
        want(
            x.shape[-1] << self.fraction < 1 << 31, f"Softmax over {x.shape[-1]} overflows its sum"
        )
        return TensorType(self.out, x.shape)

    def run(self, *ins: Array) -> Array:
        """Exact result; see the class."""
        x, table = ins
        wide = x.astype(np.int64)
        e = table[wide.max(axis=-1, keepdims=True) - wide].astype(np.int64)
        total = e.sum(axis=-1, keepdims=True)
        top = np.frexp(total.astype(np.float64))[1].astype(np.int64) - 1
        inverse = arith.reciprocal(total << (30 - top))
        shift = 31 + top - self.out.bits
        y = ((e * inverse + (np.int64(1) << (shift - 1))) >> shift) + self.out.lo
        codes: Array = np.clip(y, self.out.lo, self.out.hi).astype(self.out.numpy)
        return codes


@dataclass(frozen=True)
class Concat(Op):
    """The operands one after the other along `axis`."""

    axis: int

    def infer(self, *ins: TensorType) -> TensorType:
        """Result type; see the class."""
        want(len(ins) >= 1, "Concat takes operands")
        first = ins[0]
        want(0 < self.axis < len(first.shape), f"Concat along axis {self.axis} of {first}")
        around = [
            (t.dtype, len(t.shape), t.shape[: self.axis], t.shape[self.axis + 1 :]) for t in ins
        ]
        want(len(set(around)) == 1, f"Concat of {', '.join(map(str, ins))} does not fit")
        shape = list(first.shape)
        shape[self.axis] = sum(t.shape[self.axis] for t in ins)
        return TensorType(first.dtype, tuple(shape))

    def run(self, *ins: Array) -> Array:
        """Exact result; see the class."""
        return np.concatenate(ins, axis=self.axis)


@dataclass(frozen=True)
class Slice(Op):
    """x[starts:ends:steps] on every axis after the first; bounds are non-negative, steps positive."""

    starts: tuple[int, ...]
    ends: tuple[int, ...]
    steps: tuple[int, ...]

    def infer(self, *ins: TensorType) -> TensorType:
        """Result type; see the class."""
        (x,) = operands(self, ins, 1)
        rest = x.shape[1:]
        want(len(self.starts) == len(self.ends) == len(self.steps) == len(rest), f"Slice of {x}")
        want(
            all(
                0 <= a < b <= n and s >= 1
                for a, b, s, n in zip(self.starts, self.ends, self.steps, rest, strict=True)
            ),
            f"Slice [{self.starts}:{self.ends}] leaves {x}",
        )
        shape = (
            -(-(b - a) // s) for a, b, s in zip(self.starts, self.ends, self.steps, strict=True)
        )
        return TensorType(x.dtype, (x.shape[0], *shape))

    def run(self, *ins: Array) -> Array:
        """Exact result; see the class."""
        (x,) = ins
        cut = (slice(a, b, s) for a, b, s in zip(self.starts, self.ends, self.steps, strict=True))
        return np.ascontiguousarray(x[(slice(None), *cut)])


@dataclass(frozen=True)
class Pad(Op):
    """x with `value` around it: pads are begins of every axis after the first, then ends."""

    pads: tuple[int, ...]
    value: int

    def infer(self, *ins: TensorType) -> TensorType:
        """Result type; see the class."""
        (x,) = operands(self, ins, 1)
        rank = len(x.shape) - 1
        want(
            len(self.pads) == 2 * rank and all(n >= 0 for n in self.pads),
            f"Pad of {x} by {self.pads}",
        )
        want(x.dtype.lo <= self.value <= x.dtype.hi, f"pad value {self.value} is no {x.dtype}")
        shape = (n + self.pads[i] + self.pads[rank + i] for i, n in enumerate(x.shape[1:]))
        return TensorType(x.dtype, (x.shape[0], *shape))

    def run(self, *ins: Array) -> Array:
        """Exact result; see the class."""
        (x,) = ins
        rank = x.ndim - 1
        widths = [(0, 0), *((self.pads[i], self.pads[rank + i]) for i in range(rank))]
        return np.pad(x, widths, constant_values=self.value)


@dataclass(frozen=True)
class Reshape(Op):
    """The same elements in the same order; a leading -1 stands for whatever the rows give."""

    shape: tuple[int, ...]

    def infer(self, *ins: TensorType) -> TensorType:
        """Result type; see the class."""
        (x,) = operands(self, ins, 1)
        want(
            len(self.shape) >= 1 and all(n >= 1 for n in self.shape[1:]),
            f"Reshape of {x} to {self.shape}",
        )
        rest = math.prod(self.shape[1:])
        lead = x.size // rest if self.shape[0] == -1 else self.shape[0]
        want(lead * rest == x.size, f"{x} cannot be reshaped to {self.shape}")
        return TensorType(x.dtype, (lead, *self.shape[1:]))

    def run(self, *ins: Array) -> Array:
        """Exact result; see the class."""
        return ins[0].reshape(self.shape)


@dataclass(frozen=True)
class Transpose(Op):
    """Axis i of the result is axis perm[i] of x; the first axis stays."""

    perm: tuple[int, ...]

    def infer(self, *ins: TensorType) -> TensorType:
        """Result type; see the class."""
        (x,) = operands(self, ins, 1)
        want(sorted(self.perm) == list(range(len(x.shape))), f"Transpose of {x} by {self.perm}")
        want(self.perm[:1] == (0,), f"Transpose by {self.perm} moves the rows")
        return TensorType(x.dtype, tuple(x.shape[i] for i in self.perm))

    def run(self, *ins: Array) -> Array:
        """Exact result; see the class."""
        return np.ascontiguousarray(ins[0].transpose(self.perm))


OPS: tuple[type[Op], ...] = (
    Conv, MatMul, Rescale, Mul, Lut, MaxPool, SumPool, Softmax, Concat, Slice, Pad, Reshape, Transpose,
    Take, Extreme, ArgExtreme, BatchMatMul, Normalize,
)  # fmt: skip
"""The closed set."""

__all__ = [
    "OPS",
    "ArgExtreme",
    "BatchMatMul",
    "Concat",
    "Conv",
    "Extreme",
    "Lut",
    "MatMul",
    "MaxPool",
    "Mul",
    "Normalize",
    "Op",
    "Pad",
    "Rescale",
    "Reshape",
    "Slice",
    "Softmax",
    "SumPool",
    "Take",
    "Transpose",
]
