"""Depthwise Conv for Helium: sixteen channels of a pixel side by side, their sums in int16 as long as those fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qcompile.ir import Array, Value, ops

from ..c.kernel import Layer, Scratch, Step, aligned, constant, ends, loops
from ..c.nest import Nest
from ..c.text import affine, at, c_int, render
from ..c.window import Window, pixels, window_of
from .mve_rescale import in_lanes, sixteen

HERE = Path(__file__).parent
HEADER = HERE / "mve.h"
_INT16 = (1 << 15) - 1
_CODE = 128
_FLIP = 0x80
_MOST_TAPS = 49
_BYTE = (-128, 127)


@dataclass(frozen=True)
class Depthwise:
    """Conv with one channel in and out of every group: rows are copied between borders, as many as a window spans.

    The taps are cut into groups whose products, whatever the codes, add up in int16; the groups' sums are widened
    to int32. Weights of at most 127 leave room for any two taps, and most networks' for four or five.
    """

    name: str = "mve depthwise"
    includes: Sequence[str | Path] = (HEADER,)

    def matches(self, step: Step) -> bool:
        """Bytes to int8, one output channel for each input channel."""
        op, q = step.node.op, sixteen(step)
        if not isinstance(op, ops.Conv) or q is None or q.value is not None:
            return False
        x, w = step.node.inputs[0], step.node.inputs[1].type
        if op.groups != x.type.shape[-1] or w.shape[0] != op.groups or len(w.shape) > 4:
            return False
        taps = int(np.prod(w.shape[1:], dtype=np.int64))
        return x.type.dtype.bits <= 8 and x.const is None and taps <= _MOST_TAPS

    def cost(self, step: Step) -> int:
        """Executed instructions, fitted to counts."""
        geometry = window_of(step.node)
        groups = len(tap_groups(step))
        block = 46 + 6 * geometry.taps + 8 * groups
        blocks = -(-geometry.channels // 16)
        outputs = geometry.batch * geometry.y.out * geometry.x.out
        rows = geometry.batch * (geometry.y.out * geometry.y.stride + geometry.y.kernel)
        return outputs * (12 + blocks * block) + rows * (60 + 4 * geometry.x.size * blocks)

    def scratch(self, step: Step) -> Scratch:
        """The rows a window spans, and one border pixel."""
        lines = _Lines(window_of(step.node))
        return Scratch(
            (
                ("lines", "int8_t", lines.slots * lines.pitch),
                ("border", "uint8_t", lines.padded),
            )
        )

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """A fused Rescale's other operands, of which there are none."""
        return tuple(v for v in aligned(step, *step.terms) if v is not step.node.inputs[0])

    def raster(self, step: Step) -> int | None:
        """A row: what its windows span is copied first."""
        return window_of(step.node).x.out

    def packed(self, step: Step) -> tuple[Value, ...]:
        """Weights and bias."""
        return step.node.inputs[1:]

    def body(self, layer: Layer) -> str:
        """See the template."""
        step, node = layer.step, layer.step.node
        assert isinstance(node.op, ops.Conv)
        q = sixteen(step)
        assert q is not None
        x = node.inputs[0]
        geometry = window_of(node)
        lines = _Lines(geometry)
        nest = pixels(step, geometry)
        flip = 0 if x.type.dtype.signed else _FLIP
        groups = tap_groups(step)
        # Offsets from the middle column fit the loads of 64 channels, those from the first one do not.
        width, hop = geometry.x.kernel, geometry.x.dilation * lines.padded
        middle = width // 2
        taps = [[(tap // width, (tap % width - middle) * hop) for tap in group] for group in groups]
        return render(
            "mve_depthwise.c.j2",
            HERE,
            scratch=layer.scratch.declarations,
            window=geometry,
            lines=lines,
            whole=geometry.channels == lines.padded,
            outer=Nest(tuple(loop for loop in nest.loops if loop[0] == "n"), {}),
            groups=taps,
            middle=middle * hop,
            pad_value=c_int(node.op.pad_value) if x.type.dtype.signed else node.op.pad_value,
            flip=flip,
            from_row=at(layer[x], geometry.source("iy", "0")),
            weights=layer.constant("weights", _pack(step, groups)),
            bias=layer.constant("bias", _bias(step, flip)),
            multiplier=layer.constant("multiplier", q.multiplier),
            shift=layer.constant("shift", q.shift),
            q=q,
            clamped=(q.lo, q.hi) != _BYTE,
            at=at,
            affine=affine,
            loops=loops,
            ends=ends,
        )


class _Lines:
    """A ring of input rows with their borders: `slots` rows of `columns` pixels, each of whole vectors."""

    def __init__(self, window: Window) -> None:
        x, y = window.x, window.y
        self.padded = -(-window.channels // 16) * 16
        self.columns = max((x.out - 1) * x.stride + (x.kernel - 1) * x.dilation + 1, x.pad + 1)
        self.inner = min(x.size, self.columns - x.pad)
        self.pitch = self.columns * self.padded
        self.reach = (y.kernel - 1) * y.dilation
        self.slots = self.reach + 1


def tap_groups(step: Step) -> list[list[int]]:
    """Taps in groups whose products add up in int16 for any codes: few of them, found first fit."""
    rows = _rows(step)
    reach = np.abs(rows.astype(np.int64)) * _CODE
    groups: list[list[int]] = []
    sums: list[NDArray[np.int64]] = []
    for tap in np.argsort(-reach.max(axis=0), kind="stable").tolist():
        for group, total in zip(groups, sums, strict=True):
            if int((total + reach[:, tap]).max()) <= _INT16:
                group.append(tap)
                total += reach[:, tap]
                break
        else:
            groups.append([tap])
            sums.append(reach[:, tap].copy())
    return [sorted(group) for group in groups]


def _rows(step: Step) -> Array:
    weights = constant(step.node, 1)
    return weights.reshape(len(weights), -1)


def _pack(step: Step, groups: list[list[int]]) -> NDArray[np.int8]:
    """[sixteen channels][tap, group by group][channel], filled with zeros."""
    order = [tap for group in groups for tap in group]
    taps = _rows(step).astype(np.int8)[:, order]
    filled = np.pad(taps, ((0, -len(taps) % 16), (0, 0)))
    return np.ascontiguousarray(filled.reshape(-1, 16, len(order)).transpose(0, 2, 1))


def _bias(step: Step, flip: int) -> NDArray[np.int32]:
    """In the order of the lanes; codes less 128 where they are flipped."""
    bias = constant(step.node, 2).astype(np.int64)
    if flip:
        bias = bias + _CODE * _rows(step).astype(np.int64).sum(axis=1)
    return in_lanes(bias.astype(np.int32)).astype(np.int32)
