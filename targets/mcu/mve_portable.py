"""Portable kernels on Helium, their costs in executed instructions as counted, and tables by gathered loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from qcompile.ir import ops

from ..c import convolve, kernels
from ..c.kernel import Layer, Step, constant
from ..c.nest import Nest
from ..c.window import window_of


@dataclass(frozen=True)
class Dot(convolve.Dot):
    """Any dot products."""

    def cost(self, step: Step) -> int:
        """About four instructions for what is one there."""
        return 200 + 4 * super().cost(step)


@dataclass(frozen=True)
class Depthwise(convolve.Depthwise):
    """Any depthwise Conv."""

    def cost(self, step: Step) -> int:
        """About four instructions for what is one there."""
        return 200 + 4 * super().cost(step)


@dataclass(frozen=True)
class Pool(kernels.Pool):
    """Any pooling."""

    def cost(self, step: Step) -> int:
        """About five for an element under a window, where compilers do not vectorise."""
        window = window_of(step.node)
        outputs = window.batch * window.y.out * window.x.out
        return 100 + outputs * (100 + window.taps * (10 + 5 * window.channels))


@dataclass(frozen=True)
class Softmax(kernels.SoftmaxRows):
    """Any softmax."""

    def cost(self, step: Step) -> int:
        """Three passes over a row of scalars, and a reciprocal."""
        shape = step.output.type.shape
        return 20 + prod(shape[:-1]) * (165 + 39 * shape[-1] // 2)


@dataclass(frozen=True)
class Table(kernels.Table):
    """Any table."""

    def cost(self, step: Step) -> int:
        """Four an element; compilers gather unsigned ones."""
        size = step.output.type.size
        return 20 + (4 * size if step.node.inputs[0].type.dtype.signed else size // 4)


@dataclass(frozen=True)
class GatheredTable(kernels.Table):
    """Lut to bytes: sixteen loads in one instruction."""

    name: str = "mve table"
    includes: Sequence[str] = ("<arm_mve.h>",)

    def matches(self, step: Step) -> bool:
        """Entries are bytes."""
        return super().matches(step) and step.output.type.dtype.bytes == 1

    def cost(self, step: Step) -> int:
        """Load, offset, gather, store, and the loop's end."""
        return 20 + 5 * -(-step.output.type.size // 16)

    def raster(self, step: Step) -> int | None:
        """A vector."""
        return 16

    def body(self, layer: Layer) -> str:
        """One loop, its last turn predicated."""
        x = layer.step.node.inputs[0]
        entries = constant(layer.step.node, 1)
        lowest = len(entries) // 2 if x.type.dtype.signed else 0
        table = layer.constant("table", entries)
        return f"""\
const uint8_t *const table = (const uint8_t *){table};
const uint8_t *from = (const uint8_t *){layer[x]};
uint8_t *to = (uint8_t *)y;
for (int left = {x.type.size}; left > 0; left -= 16) {{
const mve_pred16_t lanes = vctp8q((uint32_t)left);
const uint8x16_t places = vaddq_n_u8(vldrbq_z_u8(from, lanes), {lowest});
vstrbq_p_u8(to, vldrbq_gather_offset_z_u8(table, places, lanes), lanes);
from += 16;
to += 16;
}}"""


@dataclass(frozen=True)
class Move(kernels.Move):
    """Any copies."""

    def cost(self, step: Step) -> int:
        """Elements one by one, runs by calls of memcpy, which copies words."""
        recorder = _Recorder()
        recorder.body(Layer(step, {v: "x" for v in step.reads}, lambda role, _: role))
        sliced = isinstance(step.node.op, ops.Slice | ops.Transpose)
        call = 13 if sliced else 16
        total = 20 + (step.output.type.bytes // 8 if isinstance(step.node.op, ops.Pad) else 0)
        for times, run in recorder.copies:
            bytes_ = run * step.output.type.dtype.bytes
            each = 2 if run == 1 else call + bytes_ // 4 * 5 + bytes_ % 4 * 4
            total += times * each
        return total


@dataclass(frozen=True)
class _Recorder(kernels.Move):
    """Records how often the copies run, and how many elements each time."""

    copies: list[tuple[int, int]] = field(default_factory=list)

    def _copy(
        self,
        x: str,
        shape: Sequence[int],
        to: Sequence[int],
        to_first: int,
        source: Sequence[int],
        source_first: int,
    ) -> Mapping[str, object]:
        part = super()._copy(x, shape, to, to_first, source, source_first)
        nest, run = part["nest"], part["run"]
        assert isinstance(nest, Nest)
        assert isinstance(run, int)
        self.copies.append((prod(n for _, n in nest.loops), run))
        return part
