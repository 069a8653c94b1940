"""Windows that are no plain Conv or pool, in terms of those that are."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import onnx_ir as ir

from qcompile.onnx.edit import Editor, constant, set_inputs, sole_use

from ..fold import affine
from ..linear import floats
from ..window import Window, window
from .expression import Expression, volume


def absorb(node: ir.Node, editor: Editor) -> None:
    """A BatchNormalization, factor or addend per channel behind a ConvTranspose goes into its weights."""
    while sole_use(node.outputs[0]):
        follower = node.outputs[0].consumers()[0]
        a, weight = affine(follower), floats(node.inputs[1])
        if a is None or weight is None or weight.ndim < 3:
            return
        group = node.attributes.get_int("group", 1)
        outputs = weight.shape[1] * group
        found = a.along(1, outputs)
        bias = floats(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(outputs, np.float32)
        if found is None or bias is None:
            return
        scale, shift = found
        whole = weight.reshape(group, -1, *weight.shape[1:])
        grouped = whole * scale.reshape(group, 1, -1, *(1,) * (weight.ndim - 2))
        set_inputs(
            node,
            {
                1: editor.const(
                    grouped.reshape(weight.shape).astype(np.float32), f"{node.name}_weight"
                ),
                2: editor.const((bias * scale + shift).astype(np.float32), f"{node.name}_bias"),
            },
        )
        editor.take_over(follower.outputs[0], node.outputs[0])


def conv_transpose(e: Expression) -> ir.Value:
    """ConvTranspose -> a Conv that makes all phases of the stride as channels, spread out, and a crop.

    With stride s, output q * s + r sums x[q - m] over the taps k with k * dilation = r + m * s (sub-pixel convolution,
    Shi et al. 2016): as many products as the ConvTranspose has, none with an inserted zero.
    """
    absorb(e.node, e.editor)
    x, a = e.input(0), e.node.attributes
    weight, bias = e.constant(1, "weights"), e.constant(2, "a bias")
    assert weight is not None
    kernel, rank = weight.shape[2:], weight.ndim - 2
    group = a.get_int("group", 1)
    strides = tuple(a.get_ints("strides") or (1,) * rank)
    dilations = tuple(a.get_ints("dilations") or (1,) * rank)
    size = tuple(e.size(x, 2 + i) for i in range(rank))
    after = _spatial(e, e.node.outputs[0])
    begins = _begins(e, size, after, kernel, strides, dilations)
    taps = tuple((k - 1) * d // s + 1 for k, d, s in zip(kernel, dilations, strides, strict=True))
    first = tuple(min(b // s, m - 1) for b, s, m in zip(begins, strides, taps, strict=True))
    last = tuple(
        max((b + n - 1) // s, w - 1)
        for b, n, s, w in zip(begins, after, strides, size, strict=True)
    )
    phases = math.prod(strides)
    depth, width = weight.shape[0] // group, weight.shape[1]
    made = np.zeros((group, width, phases, depth, math.prod(taps)), np.float32)
    grouped = weight.reshape(group, depth, width, -1)
    for k, tap in enumerate(product(*map(range, kernel))):
        places = [divmod(i * d, s) for i, d, s in zip(tap, dilations, strides, strict=True)]
        at = [t - 1 - m for t, (m, _) in zip(taps, places, strict=True)]
        phase = np.ravel_multi_index([r for _, r in places], strides)
        made[:, :, phase, :, np.ravel_multi_index(at, taps)] = grouped[..., k].transpose(0, 2, 1)
    outputs = group * width
    rows = np.zeros(outputs) if bias is None else bias
    counts = tuple(b - a + 1 for a, b in zip(first, last, strict=True))
    n = e.shape(x)[0]
    y = e.op(
        "Conv",
        x,
        e.floats(made.reshape(outputs * phases, depth, *taps), "weight"),
        e.floats(np.repeat(rows, phases), "bias"),
        shape=(n, outputs * phases, *counts),
        dilations=(1,) * rank,
        group=group,
        kernel_shape=taps,
        pads=(
            *(m - 1 - f for m, f in zip(taps, first, strict=True)),
            *(b - w + 1 for b, w in zip(last, size, strict=True)),
        ),
        strides=(1,) * rank,
    )
    if phases > 1:
        y = e.reshape(y, (n, outputs, *strides, *counts))
        order = [i for axis in range(rank) for i in (2 + rank + axis, 2 + axis)]
        y = e.transpose(y, (0, 1, *order))
        wide = tuple(c * s for c, s in zip(counts, strides, strict=True))
        y = e.reshape(y, (n, outputs, *wide))
    for axis in range(rank):
        start = begins[axis] - first[axis] * strides[axis]
        y = e.slice(y, 2 + axis, start, start + after[axis])
    return y


def _begins(
    e: Expression,
    size: tuple[int, ...],
    after: tuple[int, ...],
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
) -> tuple[int, ...]:
    """How many elements each axis loses at its front (ONNX ConvTranspose, `auto_pad` and `output_shape`)."""
    a, rank = e.node.attributes, len(size)
    auto = a.get_string("auto_pad", "NOTSET")
    if auto == "NOTSET" and "output_shape" not in a:
        return tuple(a.get_ints("pads") or (0,) * 2 * rank)[:rank]
    more = tuple(a.get_ints("output_padding") or (0,) * rank)
    totals = [
        max((n - 1) * s + o + (k - 1) * d + 1 - m, 0)
        for n, s, o, k, d, m in zip(size, strides, more, kernel, dilations, after, strict=True)
    ]
    return tuple(t // 2 if auto != "SAME_LOWER" else t - t // 2 for t in totals)


def global_max(e: Expression) -> ir.Value:
    """GlobalMaxPool -> MaxPool whose window is the image."""
    x = e.input(0)
    shape = e.shape(x)
    kernel = tuple(e.size(x, i) for i in range(2, len(shape)))
    return e.op(
        "MaxPool",
        x,
        shape=(*shape[:2], *(1,) * len(kernel)),
        kernel_shape=kernel,
        strides=(1,) * len(kernel),
        pads=(0,) * 2 * len(kernel),
    )


def global_average(e: Expression) -> ir.Value | None:
    """GlobalAveragePool over more than two axes -> over one of as many values."""
    x = e.input(0)
    shape = e.shape(x)
    if len(shape) <= 4:
        return None
    count = math.prod(e.size(x, i) for i in range(2, len(shape)))
    rows = e.reshape(x, (*shape[:2], count))
    y = e.op("GlobalAveragePool", rows, shape=(*shape[:2], 1))
    return e.reshape(y, (*shape[:2], *(1,) * (len(shape) - 2)))


def conv(e: Expression) -> ir.Value | None:
    """Conv over three axes -> the planes under each tap of the first are channels of a Conv over two; others stay."""
    x, weight = e.input(0), constant(e.input(1))
    if weight is None or weight.ndim != 5:
        return None
    w = window(e.node, weight.shape[2:])
    if w is None:
        raise e.refuse("has pads that ONNX does not allow")
    n, channels, outputs = e.shape(x)[0], e.size(x, 1), weight.shape[0]
    count, height, width = w.outputs(_spatial(e, x))
    if min(count, height, width) < 1:
        raise e.refuse("has a window larger than its padded operand, so that nothing is computed")
    x = e.pad(x, (0, 0, w.pads[0], 0, 0), (0, 0, w.pads[3], 0, 0))
    taps = np.arange(w.kernel[0]) * w.dilations[0]
    x = e.take(x, 2, ((np.arange(count) * w.strides[0])[:, None] + taps).reshape(-1).tolist())
    size = e.shape(x)[3:]
    x = e.reshape(x, (n, channels, count, w.kernel[0], *size))
    x = e.transpose(x, (0, 2, 1, 3, 4, 5))
    rows = n * count if isinstance(n, int) else n
    x = e.reshape(x, (rows, channels * w.kernel[0], *size))
    numbers = e.constant(2, "a bias")
    y = e.op(
        "Conv",
        x,
        e.floats(weight.reshape(outputs, -1, *w.kernel[1:]).astype(np.float64), "weight"),
        e.floats(np.zeros(outputs) if numbers is None else numbers.astype(np.float64), "bias"),
        shape=(rows, outputs, height, width),
        dilations=w.dilations[1:],
        group=e.node.attributes.get_int("group", 1),
        kernel_shape=w.kernel[1:],
        pads=(*w.pads[1:3], *w.pads[4:]),
        strides=w.strides[1:],
    )
    y = e.reshape(y, (n, count, outputs, height, width))
    return e.transpose(y, (0, 2, 1, 3, 4))


def max_pool(e: Expression) -> ir.Value | None:
    """MaxPool over more than two axes -> one axis after the other; others stay."""
    x = e.input(0)
    kernel = tuple(e.node.attributes.get_ints("kernel_shape") or ())
    if len(kernel) <= 2 or len(e.node.outputs) > 1:
        return None
    w, after = window(e.node, kernel), _spatial(e, e.node.outputs[0])
    if w is None or w.outputs(_spatial(e, x)) != after:
        raise e.refuse("has a window that ONNX and its runtimes place differently")
    for i, count in enumerate(after):
        shape = e.shape(x)
        rows = (*shape[:2], *shape[2 : 2 + i])
        flat = e.reshape(x, (shape[0], volume(rows[1:]), e.size(x, 2 + i), volume(shape[3 + i :])))
        y = e.op(
            "MaxPool",
            flat,
            shape=(*e.shape(flat)[:2], count, e.shape(flat)[3]),
            kernel_shape=(w.kernel[i], 1),
            strides=(w.strides[i], 1),
            dilations=(w.dilations[i], 1),
            pads=(w.pads[i], 0, w.pads[w.rank + i], 0),
        )
        x = e.reshape(y, (*shape[: 2 + i], count, *shape[3 + i :]))
    return x


def average(e: Expression) -> ir.Value | None:
    """AveragePool with dilations, over many axes, or counting what rounding up adds -> sums; others stay."""
    x, a = e.input(0), e.node.attributes
    kernel = tuple(a.get_ints("kernel_shape") or ())
    w, counted = window(e.node, kernel), a.get_int("count_include_pad", 0)
    stated = tuple(a.get_ints("pads") or (0,) * 2 * len(kernel))
    if w is None:
        return None
    plain = w.rank <= 2 and max(w.dilations) == 1 and not (counted and w.pads != stated)
    if plain:
        return None
    size, after = _spatial(e, x), _spatial(e, e.node.outputs[0])
    if w.outputs(size) != after:
        return None
    y = _windows_sum(e, x, w, after)
    inside = np.ones(())
    for i, n in enumerate(size):
        starts = np.arange(after[i]) * w.strides[i] - w.pads[i]
        places = starts[:, None] + np.arange(kernel[i]) * w.dilations[i]
        lo, hi = (-stated[i], n + stated[len(kernel) + i]) if counted else (0, n)
        inside = np.multiply.outer(inside, ((places >= lo) & (places < hi)).sum(axis=1))
    if inside.min() < 1:
        raise e.refuse("has a window that lies wholly in its padding; lessen the padding")
    return e.times(y, 1 / inside if np.ptp(inside) else 1 / float(inside.max()))


def _spatial(e: Expression, value: ir.Value) -> tuple[int, ...]:
    return tuple(e.size(value, i) for i in range(2, len(e.shape(value))))


def _windows_sum(e: Expression, x: ir.Value, w: Window, after: tuple[int, ...]) -> ir.Value:
    """The sum under each window, zeros around: a depthwise Conv, or over more than two axes one after the other."""
    channels, n = e.size(x, 1), e.shape(x)[0]
    if w.rank <= 2:
        return e.op(
            "Conv",
            x,
            e.floats(np.ones((channels, 1, *w.kernel)), "ones"),
            e.floats(np.zeros(channels), "zeros"),
            shape=(n, channels, *after),
            dilations=w.dilations,
            group=channels,
            kernel_shape=w.kernel,
            pads=w.pads,
            strides=w.strides,
        )
    x = e.pad(x, (0, 0, *w.pads[: w.rank]), (0, 0, *w.pads[w.rank :]))
    for i, count in enumerate(after):
        taps = np.arange(w.kernel[i]) * w.dilations[i]
        places = (np.arange(count) * w.strides[i])[:, None] + taps
        x = e.take(x, 2 + i, places.reshape(-1).tolist())
        shape = e.shape(x)
        x = e.reshape(x, (*shape[: 2 + i], count, w.kernel[i], *shape[3 + i :]))
        order = [*(k for k in range(len(shape) + 1) if k != 3 + i), 3 + i]
        y = e.matmul(e.transpose(x, order), np.ones((w.kernel[i], 1)))
        x = e.reshape(y, e.shape(y)[:-1])
    return x


def lp_pool(e: Expression) -> ir.Value:
    """LpPool -> the root of a sum of powers under each window."""
    x, p = e.input(0), e.node.attributes.get_int("p", 2)
    kernel = tuple(e.node.attributes.get_ints("kernel_shape") or ())
    w, after = window(e.node, kernel), _spatial(e, e.node.outputs[0])
    if w is None or w.outputs(_spatial(e, x)) != after:
        raise e.refuse("has a window that ONNX and its runtimes place differently")
    x = e.unary("Abs", x)
    if p != 1:
        x = e.op("Pow", x, e.floats(float(p), "p"), shape=e.shape(x))
    y = _windows_sum(e, x, w, after)
    return y if p == 1 else e.op("Pow", y, e.floats(1 / p, "root"), shape=e.shape(y))


def lrn(e: Expression) -> ir.Value:
    """LRN -> x times a function of the mean square of its neighbour channels, which a 1x1 Conv adds up."""
    x, a = e.input(0), e.node.attributes
    shape, channels, size = e.shape(x), e.size(x, 1), a.get_int("size", 1)
    alpha, beta, bias = (
        a.get_float(k, v) for k, v in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0))
    )
    before = (size - 1) // 2
    i = np.arange(channels)
    near = (i[None] >= i[:, None] - before) & (i[None] <= i[:, None] + size - 1 - before)
    wide = shape if len(shape) > 2 else (*shape, 1)
    spatial = len(wide) - 2
    square = e.op("Pow", x, e.floats(2.0, "two"), shape=shape)
    mean = e.op(
        "Conv",
        e.reshape(square, wide),
        e.floats((near * (alpha / size)).reshape(channels, channels, *(1,) * spatial), "weight"),
        e.floats(np.full(channels, bias), "bias"),
        shape=wide,
        dilations=(1,) * spatial,
        group=1,
        kernel_shape=(1,) * spatial,
        pads=(0,) * 2 * spatial,
        strides=(1,) * spatial,
    )
    factor = e.op("Pow", mean, e.floats(-beta, "power"), shape=wide)
    return e.binary("Mul", x, e.reshape(factor, shape))
