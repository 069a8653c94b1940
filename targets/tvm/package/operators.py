"""The operators of an integer graph in Relax: integer types only, every constant with its type stated.

Activations are channels-last. Rescaling is spelled out in int64, where no product or sum of a proved graph overflows,
so that nothing hangs on how TVM's simplifier treats an int32 that wraps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from tvm import relax

Array = NDArray[np.signedinteger | np.unsignedinteger]
Number = int | str
"""An integer, or the name of a constant that broadcasts against the operands."""

_op = relax.op
_CONV = {
    1: (_op.nn.conv1d, "NWC", "OWI"),
    2: (_op.nn.conv2d, "NHWC", "OHWI"),
    3: (_op.nn.conv3d, "NDHWC", "ODHWI"),
}
_MAX_POOL = {
    1: (_op.nn.max_pool1d, "NWC"),
    2: (_op.nn.max_pool2d, "NHWC"),
    3: (_op.nn.max_pool3d, "NDHWC"),
}

# 1 / s by Newton's iteration: minimax line 48/17 - 32/17 s in Q30, then three steps
LINE_CONSTANT, LINE_SLOPE, NEWTON_STEPS = 3031741621, 2021161080, 3

# 1 / sqrt(s) by Newton's iteration: minimax line 273/128 - 39/32 s in Q29, then four steps
ROOT_CONSTANT, ROOT_SLOPE, ROOT_STEPS = 1145044992, 654311424, 4


def typed(array: Array) -> relax.Expr:
    """A constant of the array's own type: left to itself, relax.const makes int64 an int32 and cuts its values."""
    return relax.const(np.array(array, order="C"), str(array.dtype))


class Operators:
    """Appends operators to the Relax function that `builder` is in; `made` has every result in order."""

    def __init__(self, builder: relax.BlockBuilder, constants: Mapping[str, Array]) -> None:
        self._builder = builder
        self._constants = constants
        self.made: list[relax.Expr] = []

    def constant(self, name: str) -> relax.Expr:
        """The constant of that name."""
        return typed(self._constants[name])

    def _emit(self, result: relax.Expr) -> relax.Expr:
        return self._builder.emit(result)

    def _result(self, result: relax.Expr) -> relax.Expr:
        self.made.append(self._emit(result))
        return self.made[-1]

    def _wide(self, number: Number) -> relax.Expr:
        array = self._constants[number] if isinstance(number, str) else np.array(number)
        return typed(array.astype(np.int64))

    # ----------------------------------------------------------------------------- accumulators

    def conv(
        self,
        x: relax.Expr,
        weights: str,
        bias: str,
        *,
        strides: Sequence[int],
        pads: Sequence[int],
        dilations: Sequence[int],
        groups: int,
        pad_value: int,
    ) -> relax.Expr:
        """Codes times weights plus bias, int32; `pads` are all begins, then all ends, of the code of zero."""
        function, layout, kernel_layout = _CONV[len(strides)]
        if any(pads):
            x = self._emit(
                self._framed(x, (*pads[: len(strides)], 0, *pads[len(strides) :], 0), pad_value)
            )
        sums = function(
            x,
            self.constant(weights),
            strides=list(strides),
            padding=0,
            dilation=list(dilations),
            groups=groups,
            data_layout=layout,
            kernel_layout=kernel_layout,
            out_dtype="int32",
        )
        return self._result(_op.add(self._emit(sums), self.constant(bias)))

    def matmul(self, x: relax.Expr, weights: str, bias: str) -> relax.Expr:
        """Codes times transposed weights plus bias, int32."""
        columns = typed(self._constants[weights].astype(np.int32).T)
        sums = _op.matmul(self._emit(_op.astype(x, "int32")), columns, out_dtype="int32")
        return self._result(_op.add(self._emit(sums), self.constant(bias)))

    def mul(self, x: relax.Expr, y: relax.Expr, *, zero_x: int, zero_y: int) -> relax.Expr:
        """(x - zero_x) * (y - zero_y), int32."""
        return self._result(_op.multiply(self._centred(x, zero_x), self._centred(y, zero_y)))

    def batch_matmul(self, x: relax.Expr, y: relax.Expr, *, zero_x: int, zero_y: int) -> relax.Expr:
        """The product of the last two axes of (x - zero_x) and (y - zero_y), int32."""
        left, right = self._centred(x, zero_x), self._centred(y, zero_y)
        return self._result(_op.matmul(left, right, out_dtype="int32"))

    def sum_pool(
        self,
        x: relax.Expr,
        *,
        kernel: Sequence[int],
        strides: Sequence[int],
        pads: Sequence[int],
        zero_point: int,
    ) -> relax.Expr:
        """The sum of (x - zero_point) under each window, int32: a depthwise convolution by ones, or one sum."""
        centred = self._centred(x, zero_point)
        _, *spatial, channels = (int(n) for n in x.ty.shape)
        rank = len(kernel)
        if list(kernel) == spatial and not any(pads):
            return self._result(_op.sum(centred, axis=list(range(1, rank + 1)), keepdims=True))
        if any(pads):
            centred = self._emit(self._framed(centred, (*pads[:rank], 0, *pads[rank:], 0), 0))
        function, layout, kernel_layout = _CONV[rank]
        ones = typed(np.ones((channels, *kernel, 1), np.int8))
        return self._result(
            function(
                centred,
                ones,
                strides=list(strides),
                padding=0,
                groups=channels,
                data_layout=layout,
                kernel_layout=kernel_layout,
                out_dtype="int32",
            )
        )

    def _centred(self, x: relax.Expr, zero_point: int) -> relax.Expr:
        wide = self._emit(_op.astype(x, "int32"))
        return self._emit(_op.subtract(wide, typed(np.array(zero_point, np.int32))))

    # -------------------------------------------------------------------------------- rescaling

    def rescale(
        self,
        accs: Sequence[tuple[relax.Expr, Number, Number]],
        vals: Sequence[tuple[relax.Expr, int, Number]],
        *,
        f: Number,
        zero_point: int,
        low: int,
        high: int,
        dtype: str,
    ) -> relax.Expr:
        """Sum ((acc << pre_shift) * multiplier) >> 32 and (value - zero) * multiplier; round half up at `f` bits once.

        Accumulators stand with pre-shift and multiplier, values with zero point and multiplier.
        """
        terms = [self._high(self._shifted(x, shift), multiplier) for x, shift, multiplier in accs]
        for x, zero, multiplier in vals:
            wide = self._emit(_op.astype(x, "int64"))
            centred = self._emit(_op.subtract(wide, self._wide(zero)))
            terms.append(self._emit(_op.multiply(centred, self._wide(multiplier))))
        total = terms[0]
        for term in terms[1:]:
            total = self._emit(_op.add(total, term))
        return self._result(
            _op.astype(self._clamped(self._rounded(total, f), zero_point, low, high), dtype)
        )

    def _shifted(self, x: relax.Expr, shift: Number) -> relax.Expr:
        wide = self._emit(_op.astype(x, "int64"))
        return wide if shift == 0 else self._emit(_op.left_shift(wide, self._wide(shift)))

    def _high(self, x: relax.Expr, multiplier: Number) -> relax.Expr:
        product = self._emit(_op.multiply(x, self._wide(multiplier)))
        return self._emit(_op.right_shift(product, self._wide(32)))

    def _rounded(self, total: relax.Expr, f: Number) -> relax.Expr:
        shift = self._constants[f].astype(np.int64) if isinstance(f, str) else np.array(f, np.int64)
        half = typed(np.int64(1) << (shift - 1))
        return self._emit(_op.right_shift(self._emit(_op.add(total, half)), typed(shift)))

    def _clamped(self, x: relax.Expr, zero_point: int, low: int, high: int) -> relax.Expr:
        moved = self._emit(_op.add(x, self._wide(zero_point)))
        floor = self._emit(_op.maximum(moved, self._wide(low)))
        return self._emit(_op.minimum(floor, self._wide(high)))

    # ---------------------------------------------------------------------- tables and softmax

    def lut(self, x: relax.Expr, table: str, *, lowest: int) -> relax.Expr:
        """table[x - lowest]."""
        return self._result(self._taken(table, self._centred(x, lowest)))

    def _taken(self, table: str, index: relax.Expr) -> relax.Expr:
        return _op.take(self.constant(table), index, axis=0, mode="clip")

    def softmax(self, x: relax.Expr, table: str, *, bits: int, dtype: str) -> relax.Expr:
        """Exponentials by table, over the sum of a row by one reciprocal, rounded once to `bits` bits."""
        wide = self._emit(_op.astype(x, "int32"))
        largest = self._emit(_op.max(wide, axis=-1, keepdims=True))
        below = self._emit(_op.subtract(largest, wide))
        e = self._emit(_op.astype(self._emit(self._taken(table, below)), "int64"))
        total = self._emit(_op.sum(e, axis=-1, keepdims=True))
        # the position of the highest bit is how many powers of two from 2**1 on the sum reaches
        powers = typed(np.int64(1) << np.arange(1, 31, dtype=np.int64))
        reached = self._emit(_op.astype(self._emit(_op.greater_equal(total, powers)), "int64"))
        top = self._emit(_op.sum(reached, axis=-1, keepdims=True))
        spread = self._emit(_op.subtract(self._wide(30), top))
        inverse = self._reciprocal(self._emit(_op.left_shift(total, spread)))
        shift = self._emit(_op.add(top, self._wide(31 - bits)))
        half = self._emit(
            _op.left_shift(self._wide(1), self._emit(_op.subtract(shift, self._wide(1))))
        )
        product = self._emit(_op.multiply(e, inverse))
        rounded = self._emit(_op.right_shift(self._emit(_op.add(product, half)), shift))
        low = -(1 << (bits - 1))
        return self._result(_op.astype(self._clamped(rounded, low, low, -low - 1), dtype))

    def _reciprocal(self, s: relax.Expr) -> relax.Expr:
        """About 2**61 / s for s in [2**30, 2**31)."""
        slope = self._emit(_op.multiply(s, self._wide(LINE_SLOPE)))
        line = self._emit(_op.right_shift(slope, self._wide(31)))
        x = self._emit(_op.subtract(self._wide(LINE_CONSTANT), line))
        for _ in range(NEWTON_STEPS):
            product = self._emit(_op.right_shift(self._emit(_op.multiply(s, x)), self._wide(30)))
            error = self._emit(_op.subtract(self._wide(1 << 31), product))
            step = self._emit(_op.right_shift(self._emit(_op.multiply(x, error)), self._wide(31)))
            x = self._emit(_op.add(x, step))
        return x

    def normalize(
        self, x: relax.Expr, *, fraction: int, epsilon: int, bits: int, dtype: str
    ) -> relax.Expr:
        """Each row less its mean, over the root of its variance and epsilon, rounded once at `fraction` bits."""
        wide = self._emit(_op.astype(x, "int64"))
        entries = self._wide(int(x.ty.shape[-1]))
        total = self._emit(_op.sum(wide, axis=-1, keepdims=True))
        squares = self._emit(_op.sum(self._emit(_op.multiply(wide, wide)), axis=-1, keepdims=True))
        variance = self._emit(
            _op.subtract(
                self._emit(_op.multiply(squares, entries)), self._emit(_op.multiply(total, total))
            )
        )
        root, count = self._inverse_root(self._emit(_op.add(variance, self._wide(epsilon))))
        deviation = self._emit(_op.subtract(self._emit(_op.multiply(wide, entries)), total))
        product = self._emit(_op.multiply(deviation, root))
        shift = self._emit(_op.add(count, self._wide(30 - fraction)))
        half = self._emit(
            _op.left_shift(self._wide(1), self._emit(_op.subtract(shift, self._wide(1))))
        )
        rounded = self._emit(_op.right_shift(self._emit(_op.add(product, half)), shift))
        low = -(1 << (bits - 1))
        return self._result(_op.astype(self._clamped(rounded, 0, low, -low - 1), dtype))

    def _inverse_root(self, v: relax.Expr) -> tuple[relax.Expr, relax.Expr]:
        """About 2**(30 + count) / sqrt(v), and how many powers of 4, from 4 on, v reaches."""
        fours = typed(np.int64(1) << np.arange(2, 61, 2, dtype=np.int64))
        reached = self._emit(_op.astype(self._emit(_op.greater_equal(v, fours)), "int64"))
        count = self._emit(_op.sum(reached, axis=-1, keepdims=True))
        places = self._emit(_op.subtract(self._emit(_op.add(count, count)), self._wide(30)))
        right = self._emit(_op.maximum(places, self._wide(0)))
        left = self._emit(_op.subtract(right, places))
        s = self._emit(_op.right_shift(self._emit(_op.left_shift(v, left)), right))
        slope = self._emit(_op.multiply(s, self._wide(ROOT_SLOPE)))
        line = self._emit(_op.right_shift(slope, self._wide(32)))
        x = self._emit(_op.subtract(self._wide(ROOT_CONSTANT), line))
        for _ in range(ROOT_STEPS):
            square = self._emit(_op.right_shift(self._emit(_op.multiply(x, x)), self._wide(29)))
            near = self._emit(_op.right_shift(self._emit(_op.multiply(s, square)), self._wide(31)))
            rest = self._emit(_op.subtract(self._wide(3 << 30), near))
            x = self._emit(_op.right_shift(self._emit(_op.multiply(x, rest)), self._wide(31)))
        return x, count

    # ------------------------------------------------------------------------- what only moves

    def max_pool(
        self,
        x: relax.Expr,
        *,
        kernel: Sequence[int],
        strides: Sequence[int],
        pads: Sequence[int],
        dilations: Sequence[int],
    ) -> relax.Expr:
        """The largest code under each window; the border is the lowest number of the type, so that it never wins."""
        function, layout = _MAX_POOL[len(kernel)]
        return self._result(
            function(
                x,
                pool_size=list(kernel),
                strides=list(strides),
                padding=list(pads),
                dilation=list(dilations),
                layout=layout,
            )
        )

    def concat(self, *xs: relax.Expr, axis: int) -> relax.Expr:
        """The operands one after the other."""
        return self._result(_op.concat(list(xs), axis=axis))

    def slice(
        self, x: relax.Expr, *, starts: Sequence[int], ends: Sequence[int], steps: Sequence[int]
    ) -> relax.Expr:
        """x[:, starts:ends:steps]."""
        axes = list(range(1, len(starts) + 1))
        return self._result(_op.strided_slice(x, axes, list(starts), list(ends), list(steps)))

    def pad(self, x: relax.Expr, *, pads: Sequence[int], value: int) -> relax.Expr:
        """Put `value` around every axis after the first; all begins, then all ends."""
        return self._result(self._framed(x, pads, value))

    def _framed(self, x: relax.Expr, pads: Sequence[int], value: int) -> relax.Expr:
        half = len(pads) // 2
        pairs = zip(pads[:half], pads[half:], strict=True)
        # a pad value is a double in Relax, which holds every int32
        return _op.nn.pad(x, [0, 0, *(n for pair in pairs for n in pair)], "constant", float(value))

    def take(self, x: relax.Expr, indices: str, *, axis: int) -> relax.Expr:
        """The elements at the places in `indices` along an axis."""
        return self._result(_op.take(x, self.constant(indices), axis=axis, mode="clip"))

    def extreme(self, x: relax.Expr, y: relax.Expr, *, largest: bool) -> relax.Expr:
        """The larger of two, or the smaller."""
        return self._result(_op.maximum(x, y) if largest else _op.minimum(x, y))

    def arg_extreme(self, x: relax.Expr, *, axis: int, largest: bool, last: bool) -> relax.Expr:
        """Where along an axis the largest or smallest stands: of equal ones the first, or the last."""
        best = self._emit((_op.max if largest else _op.min)(x, axis=axis, keepdims=True))
        extent, rank = int(x.ty.shape[axis]), len(x.ty.shape)
        shape = [extent if i == axis else 1 for i in range(rank)]
        places = typed(np.arange(extent, dtype=np.int32).reshape(shape))
        nowhere = typed(np.array(-1 if last else extent, np.int32))
        found = self._emit(_op.where(self._emit(_op.equal(x, best)), places, nowhere))
        return self._result((_op.max if last else _op.min)(found, axis=axis, keepdims=True))

    def reshape(self, x: relax.Expr, *, shape: Sequence[int]) -> relax.Expr:
        """The same elements in the same order."""
        return self._result(_op.reshape(x, list(shape)))

    def transpose(self, x: relax.Expr, *, perm: Sequence[int]) -> relax.Expr:
        """Axis i of the result is axis perm[i] of x."""
        return self._result(_op.permute_dims(x, list(perm)))
