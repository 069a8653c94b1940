"""The portable kernels with what they take on cores with the DSP extension, in instructions."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qcompile.ir import Node, Rescale, ops

from ..c.convolve import Depthwise, Dot
from ..c.kernel import Kernel, Step
from ..c.kernels import Elementwise, Move, Pool, SoftmaxRows, Table
from ..c.window import window_of
from . import counted
from .dsp_weights import multiplies


def rescaled(step: Step) -> int:
    """Instructions that rescale and store one element."""
    node = step.rescale or step.node
    if not isinstance(node.op, Rescale):
        return 2
    rows = [node.op.f, *(r for a in node.op.accs for r in (a.multiplier, a.pre_shift))]
    rows += [v.multiplier for v in node.op.vals]
    vectors = sum(len(set(row)) > 1 for row in rows)
    return 3 + 7 * len(node.op.accs) + 2 * len(node.op.vals) + 2 * vectors


@dataclass(frozen=True)
class ScalarDot(Dot):
    """Convolutions of several groups."""

    def matches(self, step: Step) -> bool:
        """What no micro-kernel multiplies."""
        return super().matches(step) and not multiplies(step)

    def cost(self, step: Step) -> int:
        """Three for a product, and for each tap of a patch and each result."""
        copies = (
            10 * step.output.type.size // self.outputs(step) * self.groups(step) * self.depth(step)
        )
        return 3 * step.macs + 12 * step.output.type.size + copies


@dataclass(frozen=True)
class ScalarDepthwise(Depthwise):
    """One channel a group."""

    def cost(self, step: Step) -> int:
        """Five for a product, and for each result."""
        return 5 * step.macs + 14 * step.output.type.size


@dataclass(frozen=True)
class ScalarPool(Pool):
    """All channels of a pixel."""

    def cost(self, step: Step) -> int:
        """Five for a tap of a channel, and for each result."""
        size, taps = step.output.type.size, window_of(step.node).taps
        pixels = size // step.output.type.shape[-1]
        return pixels * (40 + 10 * taps) + size * (5 * taps + 4 + rescaled(step))


@dataclass(frozen=True)
class ScalarElementwise(Elementwise):
    """One element after the other."""

    def cost(self, step: Step) -> int:
        """For each element."""
        product = 3 if isinstance(step.node.op, ops.Mul) else 0
        return 30 + step.output.type.size * (product + rescaled(step))


@dataclass(frozen=True)
class ScalarTable(Table):
    """One load for each element."""

    def cost(self, step: Step) -> int:
        """Four for each, and loops that compilers unroll."""
        return 20 + step.output.type.size * 21 // 5


@dataclass(frozen=True)
class ScalarSoftmax(SoftmaxRows):
    """Three passes over a row, and a reciprocal."""

    def cost(self, step: Step) -> int:
        """For each row and each element."""
        channels = step.output.type.shape[-1]
        return 20 + step.output.type.size // channels * (172 + 37 * channels)


@dataclass(frozen=True)
class ScalarMove(Move):
    """Copies of runs."""

    def cost(self, step: Step) -> int:
        """For each run, each four bytes, each byte that is left; single elements are copied one by one."""
        out, op, total = step.output.type, step.node.op, 20
        if isinstance(op, ops.Pad):
            total += out.bytes * 27 // 100
        run_start = {ops.Concat: 16, ops.Pad: 21}.get(type(op), 13)
        for size, run in self._runs(step.node):
            length = run * out.dtype.bytes
            if run > 1:
                total += size // run * (run_start + length // 4 * 5 + length % 4 * 4)
            else:
                total += size * 43 // 20 + size // out.shape[-1]
        return total

    def _runs(self, node: Node) -> list[tuple[int, int]]:
        """Of each copied operand its elements, and how many of them lie side by side here and there."""
        x, out = node.inputs[0].type.shape, node.output.type.shape
        rank = len(out)
        match node.op:
            case ops.Concat(axis=axis):
                shapes = (v.type.shape for v in node.inputs)
                return [(math.prod(s), math.prod(s[axis:])) for s in shapes]
            case ops.Slice(steps=steps):
                cut = [i for i in range(1, rank) if x[i] != out[i]]
                last = max(cut, default=0)
                inner = last + (last > 0 and steps[last - 1] > 1)
                return [(math.prod(out), math.prod(out[inner:]))]
            case ops.Pad():
                last = max((i for i in range(1, rank) if x[i] != out[i]), default=0)
                return [(math.prod(x), math.prod(x[last:]))]
            case ops.Transpose(perm=perm):
                last = max((i for i in range(rank) if perm[i] != i), default=-1)
                return [(math.prod(out), math.prod(out[last + 1 :]))]
            case _:
                return [(math.prod(out), 1)]


SCALAR: tuple[Kernel, ...] = (
    ScalarDot(), ScalarDepthwise(), ScalarPool(), ScalarElementwise(), ScalarTable(), ScalarSoftmax(),
    ScalarMove(), *counted.SCALAR,
)  # fmt: skip
"""Together they compute every operator but Reshape."""
