"""Operators that move, repeat and pick values, in terms of Reshape, Transpose, Slice, Concat and Gather."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx_ir as ir

from qcompile.onnx.edit import constant, dims, operand

from ..fold import pad_widths
from .expression import Expression, evenly_spaced

MOST_INDICES = 1 << 16
"""How many entries a constant list of indices may have."""


def split(e: Expression) -> list[ir.Value]:
    """Split -> Slices."""
    x = e.input(0)
    axis, outputs = e.axis(0, x), len(e.node.outputs)
    size = e.size(x, axis)
    widths = e.integers(1, "sizes")
    if widths is None:
        each = -(-size // outputs)
        widths = [min(each, size - each * i) for i in range(outputs)]
    if sum(widths) != size or len(widths) != outputs or min(widths) < 1:
        raise e.refuse(f"into {widths} does not divide {size} entries")
    starts = np.cumsum([0, *widths]).tolist()
    return [e.slice(x, axis, a, b) for a, b in pairwise(starts)]


def depth_to_space(e: Expression) -> ir.Value:
    """DepthToSpace -> Reshape, Transpose, Reshape."""
    x, block = e.input(0), e.node.attributes.get_int("blocksize", 1)
    n, c, h, w = e.shape(x)[0], *(e.size(x, i) for i in (1, 2, 3))
    depth = c // block**2
    if e.node.attributes.get_string("mode", "DCR") == "CRD":
        x = e.transpose(e.reshape(x, (n, depth, block, block, h, w)), (0, 1, 4, 2, 5, 3))
    else:
        x = e.transpose(e.reshape(x, (n, block, block, depth, h, w)), (0, 3, 4, 1, 5, 2))
    return e.reshape(x, (n, depth, h * block, w * block))


def space_to_depth(e: Expression) -> ir.Value:
    """SpaceToDepth -> Reshape, Transpose, Reshape."""
    x, block = e.input(0), e.node.attributes.get_int("blocksize", 1)
    n, c, h, w = e.shape(x)[0], *(e.size(x, i) for i in (1, 2, 3))
    x = e.reshape(x, (n, c, h // block, block, w // block, block))
    x = e.transpose(x, (0, 3, 5, 1, 2, 4))
    return e.reshape(x, (n, c * block**2, h // block, w // block))


def expand(e: Expression) -> ir.Value:
    """Expand -> repeated picks."""
    x, shape = e.input(0), e.integers(1, "a shape")
    assert shape is not None
    have = e.shape(x)
    rank = max(len(shape), len(have))
    have = (1,) * (rank - len(have)) + have
    wanted = [1] * (rank - len(shape)) + shape
    return e.spread(x, [n if w == 1 else w for n, w in zip(have, wanted, strict=True)])


def tile(e: Expression) -> ir.Value:
    """Tile -> repeated picks."""
    x, repeats = e.input(0), e.integers(1, "repeats")
    assert repeats is not None
    for axis, times in enumerate(repeats):
        if times != 1:
            size = e.size(x, axis)
            _bounded(e, size * times)
            x = e.take(x, axis, list(range(size)) * times)
    return x


def gather(e: Expression) -> ir.Value | None:
    """Gather by constants -> one pick along an axis."""
    x = e.input(0)
    if constant(x) is not None:
        raise e.refuse("from a table by computed indices has no integer form here; keep it outside")
    indices = e.constant(1, "indices")
    assert indices is not None
    axis = e.axis(0, x)
    shape, size = e.shape(x), e.size(x, axis)
    rows = [int(i) + size * (i < 0) for i in indices.reshape(-1).tolist()]
    if not rows or min(rows) < 0 or max(rows) >= size:
        raise e.refuse(f"with indices outside of 0..{size - 1}")
    _bounded(e, len(rows))
    canonical = e.node.attributes.get_int("axis", 0) == axis and indices.tolist() == rows
    if canonical and not evenly_spaced(rows):
        return None
    return e.reshape(e.take(x, axis, rows), (*shape[:axis], *indices.shape, *shape[axis + 1 :]))


def slices(e: Expression) -> ir.Value | None:
    """A Slice with negative steps -> picks; others stay."""
    x = e.input(0)
    starts, ends = (e.integers(i, "bounds") for i in (1, 2))
    axes, steps = e.integers(3, "axes"), e.integers(4, "steps")
    assert starts is not None
    assert ends is not None
    if steps is None or min(steps) > 0:
        return None
    rank = len(e.shape(x))
    for i, step in enumerate(steps):
        axis = (i if axes is None else axes[i]) % rank
        size = e.shape(x)[axis]
        if not isinstance(size, int):
            if (starts[i], step) == (0, 1) and ends[i] >= 2**31 - 1:
                continue
            e.size(x, axis)
            continue
        x = e.take(x, axis, picked(size, starts[i], ends[i], step))
    return x


def picked(size: int, start: int, end: int, step: int) -> range:
    """The indices that a Slice keeps of an axis (ONNX operator specification: how bounds are clamped)."""
    start, end = (n + size * (n < 0) for n in (start, end))
    if step > 0:
        return range(min(max(start, 0), size), min(max(end, 0), size), step)
    # unlike Python's, a start below the axis is its first entry
    return range(min(max(start, 0), size - 1), min(max(end, -1), size - 1), step)


def pad(e: Expression) -> ir.Value | None:
    """Borders that repeat or mirror values -> picks; negative widths -> Slices; others stay."""
    x, widths = e.input(0), pad_widths(e.node)
    if widths is None:
        raise e.refuse("with widths computed at run time; make them constants")
    mode, rank = e.node.attributes.get_string("mode", "constant"), len(widths) // 2
    if mode == "constant" and min(widths, default=0) >= 0:
        return None
    begins, ends = list(widths[:rank]), list(widths[rank:])
    for axis in range(rank):
        b, a = begins[axis], ends[axis]
        if not b and not a:
            continue
        size = e.size(x, axis)
        _bounded(e, size + b + a)
        places = np.arange(-b, size + a)
        match mode:
            case "edge":
                places = places.clip(0, size - 1)
            case "wrap":
                places = places % size
            case "reflect":
                period = max(2 * (size - 1), 1)
                places = (
                    (size - 1) - np.abs(places % period - (size - 1)) if size > 1 else places * 0
                )
            case "constant":
                places = places[(places >= 0) & (places < size)]
                if not len(places):
                    raise e.refuse(
                        f"by {b} and {a} leaves nothing of axis {axis}, of size {size}; make the result a constant"
                    )
            case _:
                raise e.refuse(f"in mode {mode} has no integer form here")
        x = e.take(x, axis, places.tolist())
    if mode != "constant":
        return x
    fill = operand(e.node, 2)
    value = 0.0 if fill is None else float(np.asarray(constant(fill)).reshape(-1)[0])
    return e.pad(x, [max(b, 0) for b in begins], [max(a, 0) for a in ends], value)


def reshaped(e: Expression) -> ir.Value | None:
    """Flatten, Squeeze, Unsqueeze and Reshape -> Reshape to the shape that is known."""
    x, output = e.input(0), e.node.outputs[0]
    shape = dims(output)
    if shape is None or output.is_graph_output() or not shape:
        return None
    return None if shape == dims(x) else e.reshape(x, shape)


def _bounded(e: Expression, count: int) -> None:
    if count > MOST_INDICES:
        raise e.refuse(f"makes {count} entries along one axis; {MOST_INDICES} are the most")
