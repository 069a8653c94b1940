"""Conv and MatMul for Cortex-M cores with Helium: sixteen products and their sum in one VMLADAVA (mve.h)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qcompile.ir import Value, ops

from ..c.kernel import Kernel, Layer, Scratch, Step, aligned, ends, key, loops
from ..c.nest import Nest
from ..c.text import affine, at, c_int, render
from ..c.window import window_of
from . import counted
from . import mve_portable as portable
from .mve_depthwise import HEADER, Depthwise
from .mve_lanes import Elementwise, replaced
from .mve_plan import Plan
from .mve_pool import Largest, Sums
from .mve_rescale import Four, Sixteen, in_lanes

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Products:
    """Conv of one group and MatMul: two pixels by four channels at a time, or one by eight where pixels are alone.

    Activations are read where they lie when a pixel's taps are whole vectors side by side; otherwise the rows of a
    window are first copied to a strip of columns. Sums of some pixels are stored, then rescaled by vectors.
    """

    name: str = "mve"
    includes: Sequence[str | Path] = (HEADER,)

    def matches(self, step: Step) -> bool:
        """Bytes and int16; a kernel dilated along a row has no taps side by side."""
        node = step.node
        if not isinstance(node.op, ops.Conv | ops.MatMul):
            return False
        kind = node.inputs[0].type.dtype
        if kind.bits > (16 if kind.signed else 8) or node.inputs[0].const is not None:
            return False
        if isinstance(node.op, ops.MatMul):
            return True
        if node.op.groups > 1 or len(node.inputs[1].type.shape) > 4:
            return False
        geometry = window_of(node)
        return geometry.x.kernel == 1 or geometry.x.dilation == 1

    def cost(self, step: Step) -> int:
        """Executed instructions."""
        return Plan(step).cost()

    def scratch(self, step: Step) -> Scratch:
        """Sums, and the strip with one pixel of border."""
        return Plan(step).scratch()

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """A fused Rescale's other operands; never the one whose pixels are read again."""
        return tuple(v for v in aligned(step, *step.terms) if v is not step.node.inputs[0])

    def raster(self, step: Step) -> int | None:
        """A row where it is copied first, else the pixels that are rescaled together."""
        plan = Plan(step)
        if not plan.pairs:
            return 1 if plan.run >= plan.outputs else None
        return plan.width if plan.strip else plan.run

    def packed(self, step: Step) -> tuple[Value, ...]:
        """Weights and bias."""
        return step.node.inputs[1:]

    def body(self, layer: Layer) -> str:
        """See the template."""
        return _Code(layer).text()


@dataclass(frozen=True)
class _Rows:
    """The copy of an input row to the strip: C expressions, and the conditions under which the row is there."""

    position: str
    inside: list[str]
    to: str
    source: str
    count: int


class _Code:
    """The statements of one layer."""

    def __init__(self, layer: Layer) -> None:
        plan = Plan(layer.step)
        self.layer, self.plan = layer, plan
        whole = plan.width if plan.pairs else plan.outputs
        self.looped = plan.run < whole
        self.first = ("first" if plan.pairs else "o") if self.looped else "0"
        self.count = str(min(plan.run, whole))
        if self.looped and whole % plan.run:
            self.count = "pixels" if plan.pairs else "channels"

    def text(self) -> str:
        """See the template."""
        layer, plan = self.layer, self.plan
        op = layer.step.node.op
        x = layer[layer.step.node.inputs[0]]
        words = str(plan.block_words * (plan.padded // plan.lanes))
        weights = layer.constant("weights", plan.pack())
        if not plan.pairs and self.looped:
            each = plan.block_words // 8
            weights = f"{weights} + o * {each}"
            words = f"{self.count} * {each}" if self.count != "channels" else ""
            words = words or f"(channels + 7) / 8 * {plan.block_words}"
        bytes_ = plan.channels * plan.size
        return render(
            "mve_dot.c.j2",
            HERE,
            plan=plan,
            scratch=layer.scratch.declarations,
            outer=Nest(plan.outer, {}),
            rows=self._rows(x) if plan.strip else None,
            copy="mve_bytes" if bytes_ == 1 else "mve_columns",
            bytes=f"{bytes_}, " if bytes_ > 1 else "",
            column_bytes=bytes_,
            pitch=plan.rows * bytes_,
            pad_value=c_int(op.pad_value) if isinstance(op, ops.Conv) else "0",
            looped=self.looped,
            count=self.count,
            taps=self._taps(x),
            weights=weights,
            words=words,
            rescaled=self._rescaled(),
            loops=loops,
            ends=ends,
            at=at,
        )

    def _taps(self, x: str) -> str:
        """Where the taps of the first pixel begin."""
        plan = self.plan
        along = (self.first if plan.pairs else "0", plan.pixel_step)
        if plan.strip:
            return at("strip", affine([along]))
        if plan.window is None:
            return at(x, self._row_of(along[0]))
        if plan.flat:
            return at(x, affine([along]))
        y = plan.window.y
        return at(x, plan.window.source(affine([(y.o, y.stride)]), "0", along))

    def _row_of(self, pixel: str) -> str:
        """Index of a row of a MatMul's operand."""
        index = self.plan.nest.at["x"]
        return replaced(index, self.plan.nest.loops[-1][0], pixel) if self.plan.pairs else index

    def _rows(self, x: str) -> _Rows:
        plan, w = self.plan, self.plan.window
        if w is None:
            return _Rows("0", [], "0", at(x, self._row_of("0")), plan.width)
        ky = ("ky" if plan.rows > 1 else "0", plan.channels)
        to = affine([ky], w.x.pad * plan.rows * plan.channels)
        y = w.y.i if w.y.inside else f"({w.y.position})" if w.y.position != "0" else "0"
        inner = min(w.x.size, plan.columns - w.x.pad)
        return _Rows(w.y.position, w.y.inside, to, at(x, w.source(y, "0")), inner)

    def _rescaled(self) -> str:
        """C that turns the sums into results."""
        if self.plan.sixteen is not None:
            return self._by_sixteen(self.plan.sixteen)
        if self.plan.four is not None:
            return self._by_four(self.plan.four)
        return self._one_by_one()

    def _index(self, operand: str) -> str:
        """Index of the first channel that is rescaled, in an operand of the result's shape."""
        plan = self.plan
        if plan.pairs and plan.flat:
            return affine([(self.first, plan.outputs)])
        index = plan.nest.at[operand]
        if plan.pairs:
            index = replaced(index, plan.nest.loops[-1][0], self.first)
        return replaced(index, "c", "0" if plan.pairs else self.first)

    def _parameter(
        self, role: str, data: np.ndarray[tuple[int, ...], np.dtype[np.signedinteger]]
    ) -> str:
        """A constant for each channel, from the first one that is rescaled on."""
        name = self.layer.constant(role, data)
        return f"{name} + o" if self.first == "o" else name

    def _by_sixteen(self, q: Sixteen) -> str:
        plan, y = self.plan, at("y", self._index("y"))
        multiplier = self._parameter("multiplier", q.multiplier)
        shift = self._parameter("shift", q.shift)
        if not plan.pairs:
            return f"mve_rescale_1x16(acc, {self.count}, {multiplier}, {shift}, {q.zero}, {y});"
        if q.value is None:
            return (
                f"mve_rescale_2x16(acc, {self.count}, {plan.outputs}, {multiplier}, {shift},"
                f" {q.zero}, {y});"
            )
        before = self._parameter("before", q.before)
        value = at(self.layer[q.value], self._index(key(q.value)))
        each = len(set(q.factor)) > 1
        factor = c_int(q.factor[0])
        if each:
            rows = in_lanes(np.array(q.factor, np.int32)).astype(np.int32)
            factor = self._parameter("factor", rows)
        return (
            f"mve_rescale_{'sums' if each else 'sum'}_2x16(acc, {self.count}, {plan.outputs},"
            f" {multiplier}, {before}, {shift}, {value}, {q.value_zero}, {factor}, {q.zero}, {y});"
        )

    def _by_four(self, q: Four) -> str:
        plan = self.plan
        multiplier = self._parameter("multiplier", q.multiplier)
        shift = self._parameter("shift", q.shift)
        index = self._index("y")
        if plan.pairs:
            index = " + ".join(part for part in (index, f"pixel * {plan.outputs}") if part != "0")
        y = at("y", index)
        if q.kind == "u8":
            y = f"(int8_t *)({y})"
        rest = f"{multiplier}, {shift}, {q.zero}, {c_int(q.lo)}, {c_int(q.hi)}, {y});"
        name = f"mve_rescale_4_{'s16' if q.kind == 's16' else 's8'}"
        if not plan.pairs:
            return f"{name}(acc, 4, {self.count}, {rest}"
        return (
            f"for (int pixel = 0; pixel < {self.count}; ++pixel) {{\n"
            f"{name}({self._sums}, 8, {plan.outputs}, {rest}\n}}"
        )

    def _one_by_one(self) -> str:
        plan = self.plan
        if not plan.pairs:
            sums = "acc[c - o]" if self.first == "o" else "acc[c]"
            last = affine([("o", 1), (self.count, 1)]) if self.first == "o" else self.count
            store = self.layer.store(plan.nest.at, sums)
            return f"for (int c = {self.first}; c < {last}; ++c) {{\n{store}\n}}"
        v = plan.nest.loops[-1][0]
        store = self.layer.store(plan.nest.at, "sums[c / 4 * 8 + c % 4]")
        return (
            f"for (int pixel = 0; pixel < {self.count}; ++pixel) {{\n"
            f"const int {v} = {affine([(self.first, 1), ('pixel', 1)])};\n"
            f"const int32_t *const sums = {self._sums};\n"
            f"for (int c = 0; c < {plan.outputs}; ++c) {{\n{store}\n}}\n}}"
        )

    @property
    def _sums(self) -> str:
        """The sums of one pixel of a pair."""
        return f"acc + pixel / 2 * {2 * self.plan.padded} + pixel % 2 * 4"


KERNELS: tuple[Kernel, ...] = (
    Products(), Depthwise(), Largest(), Sums(), Elementwise(), portable.GatheredTable(), portable.Dot(),
    portable.Depthwise(), portable.Pool(), portable.Table(), portable.Softmax(), portable.Move(),
    *counted.HELIUM,
)  # fmt: skip
"""For cores with Helium; what has no kernel here is portable."""
