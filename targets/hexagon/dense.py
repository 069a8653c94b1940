"""MatMul of few rows, and Conv of one pixel: every lane makes a channel of its own from the row's bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qcompile.ir import Array, Value, ops

from ..c.kernel import Layer, Scratch, Step, aligned
from ..c.text import affine, at, c_int, render
from ..c.window import window_of
from .channels import Lanes
from .convolve import HEADER, HERE, fixed, wrapped
from .planes import LANES, VECTOR, whole, words
from .requantize import requantization, splat16


@dataclass(frozen=True)
class Dense:
    """Four depths of a row in all lanes, times the weights of 32 channels a vector; 16-bit depths are two of 8."""

    name: str = "hvx-dense"
    includes: Sequence[str | Path] = (HEADER,)

    def matches(self, step: Step) -> bool:
        """A MatMul, or a Conv whose window is the whole operand; values are added to 8-bit results only."""
        node = step.node
        match node.op:
            case ops.MatMul():
                pass
            case ops.Conv(groups=1, pads=pads) if len(node.inputs[0].type.shape) <= 4:
                window = window_of(node)
                covered = (window.y.kernel, window.x.kernel) == (window.y.size, window.x.size)
                if any(pads) or not covered:
                    return False
            case _:
                return False
        plan = requantization(step)
        if plan is None or not fixed(step):
            return False
        # The bytes of an added value lie in the words of four channels, and only byte results do as well.
        return not plan.terms or plan.per_word == 4

    def cost(self, step: Step) -> int:
        """Packets, roughly."""
        size = step.node.inputs[0].type.dtype.bytes
        groups, accumulators, _ = map(int, _lanes(step).channel.shape)
        products = groups * (size * accumulators * words(size * _depth(step)) * 5 // 4 + 20)
        return _rows(step) * (products + size * _depth(step) // 64 + 10)

    def scratch(self, step: Step) -> Scratch:
        """One row."""
        size = step.node.inputs[0].type.dtype.bytes * _depth(step)
        return Scratch((("bytes", "uint8_t", whole(size) + VECTOR - 16),))

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """A fused Rescale's other operands."""
        return tuple(v for v in aligned(step, *step.terms) if v is not step.node.inputs[0])

    def raster(self, step: Step) -> int | None:
        """A row: it is copied first."""
        return 1

    def packed(self, step: Step) -> tuple[Value, ...]:
        """Weights and bias."""
        return step.node.inputs[1:]

    def body(self, layer: Layer) -> str:
        """See the template."""
        step = layer.step
        node, plan, lanes = step.node, requantization(step), _lanes(step)
        assert plan is not None
        groups, accumulators = lanes.channel.shape[:2]
        channels = step.output.type.shape[-1]
        group = "g" if groups > 1 else "0"
        each = VECTOR // plan.out.bytes
        thin = ""
        if accumulators == 1 and plan.per_word > 1:
            thin = "Q6_Vh_vpacke_VwVw(made, made)"
            if plan.per_word == 4:
                thin = f"Q6_Vb_vpacke_VhVh({thin}, {thin})"
        indices = [i % accumulators for i in range(plan.per_word)]
        x = node.inputs[0].type.dtype
        offset = 1 << 15 if x.bytes == 2 and x.signed else 0
        rows = node.inputs[1].constant.astype(np.int64).reshape(channels, -1)
        bias = wrapped(node.inputs[2].constant - offset * rows.sum(axis=1)).tolist()
        return render(
            "dense.c.j2",
            HERE,
            scratch=layer.scratch.declarations,
            rows=_rows(step),
            depth=_depth(step),
            bytes=x.bytes * _depth(step),
            steps=words(x.bytes * _depth(step)),
            parts=x.bytes,
            flip=c_int(splat16(offset)) if offset else "",
            x=layer[node.inputs[0]],
            signed=x.signed and x.bytes == 1,
            groups=groups,
            g=group,
            accumulators=accumulators,
            weights=layer.constant("weights", _pack(node.inputs[1].constant, lanes, x.bytes)),
            bias=[lanes.parameter(layer, "bias", bias, group, a) for a in range(accumulators)],
            terms=[
                {
                    "name": f"term{i or ''}",
                    "x": layer[t.value],
                    "step": each,
                    "bytes": min(channels, each)
                    if groups == 1
                    else f"g < {groups - 1} ? {each} : {channels - (groups - 1) * each}",
                }
                for i, t in enumerate(plan.terms)
            ],
            store=lanes.store(layer, plan, "made", indices, group, lambda i: f"term{i or ''}"),
            thin=thin,
            step=each,
            last=(channels - (groups - 1) * each) * plan.out.bytes,
            channels=channels,
            affine=affine,
            at=at,
        )


def _rows(step: Step) -> int:
    shape = step.output.type.shape
    return math.prod(shape[:-1])


def _depth(step: Step) -> int:
    return math.prod(step.node.inputs[1].type.shape[1:])


def _lanes(step: Step) -> Lanes:
    """Channels side by side in a word's accumulators; 32 or fewer need but one."""
    plan = requantization(step)
    assert plan is not None
    channels = step.output.type.shape[-1]
    beside = 1 if channels <= LANES and not plan.terms else plan.per_word
    groups = -(-channels // (beside * LANES))
    channel = np.arange(groups * beside * LANES).reshape(groups, LANES, beside).transpose(0, 2, 1)
    return Lanes(np.where(channel < channels, channel, -1))


def _pack(weights: Array, lanes: Lanes, size: int) -> NDArray[np.int8]:
    """[group][word of the sum][part of the operand][accumulator][lane], four depths each, filled with zeros."""
    rows = weights.reshape(len(weights), -1).astype(np.int8)
    parts = np.zeros((len(rows) + 1, size, 4 * words(size * rows.shape[1])), np.int8)
    for part in range(size):
        parts[:-1, part, part : size * rows.shape[1] : size] = rows
    found = parts.reshape(len(parts), size, -1, 4)[lanes.channel]
    return np.ascontiguousarray(found.transpose(0, 4, 3, 1, 2, 5))
