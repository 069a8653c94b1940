"""BatchMatMul and Normalize in portable C."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qcompile.ir import Value, arith, ops

from .kernel import Kernel, Layer, Scratch, Step, aligned, ends, loops, strides
from .nest import merged, row_major
from .text import affine, at, c_type, minus, render


@dataclass(frozen=True)
class Products:
    """BatchMatMul: the sums of one row side by side, one row of the right operand after the other."""

    name: str = "batch matmul"
    includes: Sequence[str | Path] = ()

    def matches(self, step: Step) -> bool:
        """Every BatchMatMul."""
        return isinstance(step.node.op, ops.BatchMatMul)

    def cost(self, step: Step) -> int:
        """Products."""
        return step.macs

    def scratch(self, step: Step) -> Scratch:
        """The sums of one row."""
        return Scratch((("acc", "int32_t", step.output.type.shape[-1]),))

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """A fused Rescale's other operands."""
        return tuple(v for v in aligned(step, *step.terms) if v not in step.node.inputs)

    def raster(self, step: Step) -> int | None:
        """None: both operands are read again for later rows."""
        return None

    def packed(self, step: Step) -> tuple[Value, ...]:
        """None."""
        return ()

    def body(self, layer: Layer) -> str:
        """See the template."""
        step, node = layer.step, layer.step.node
        assert isinstance(node.op, ops.BatchMatMul)
        x, y = node.inputs
        depth, columns = y.type.shape[-2:]
        operands = strides(step)
        rows = {k: s[:-1] for k, s in operands.items()}
        rows |= {"x": row_major(x.type.shape)[:-1], "right": (*row_major(y.type.shape)[:-2], 0)}
        nest = merged(step.output.type.shape[:-1], rows)
        store = {k: affine([(nest.at[k], 1), ("c", s[-1])]) for k, s in operands.items()}
        return render(
            "products.c.j2",
            scratch=layer.scratch.declarations,
            nest=nest,
            depth=depth,
            columns=columns,
            left=minus(f"{layer[x]}[{affine([(nest.at['x'], 1), ('k', 1)])}]", node.op.zero_x),
            right=at(layer[y], affine([(nest.at["right"], 1), ("k", columns)])),
            type=c_type(y.type.dtype),
            factor=minus("from[c]", node.op.zero_y),
            store=layer.store(store, "acc[c]"),
            loops=loops,
            ends=ends,
        )


@dataclass(frozen=True)
class Standardized:
    """Normalize: sums of a row and of its squares in one pass, one inverse root, the results in another pass."""

    name: str = "normalize"
    includes: Sequence[str | Path] = ()

    def matches(self, step: Step) -> bool:
        """Every Normalize."""
        return isinstance(step.node.op, ops.Normalize)

    def cost(self, step: Step) -> int:
        """Two passes."""
        return 2 * step.output.type.size

    def scratch(self, step: Step) -> Scratch:
        """None."""
        return Scratch()

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """The operand: the last pass reads an element before it writes there."""
        return aligned(step, step.node.inputs[0])

    def raster(self, step: Step) -> int | None:
        """None: a row is still read while it is written."""
        return None

    def packed(self, step: Step) -> tuple[Value, ...]:
        """None."""
        return ()

    def body(self, layer: Layer) -> str:
        """See the template."""
        node = layer.step.node
        assert isinstance(node.op, ops.Normalize)
        x, out = node.inputs[0].type, node.op.out
        rows = row_major(x.shape)[:-1]
        return render(
            "normalize.c.j2",
            nest=merged(x.shape[:-1], {"x": rows, "y": rows}),
            x=layer[node.inputs[0]],
            type=c_type(x.dtype),
            y_type=c_type(out),
            entries=x.shape[-1],
            epsilon=node.op.epsilon,
            shift=arith.ROOT_BITS - node.op.fraction,
            lowest=out.lo,
            largest=out.hi,
            at=at,
            loops=loops,
            ends=ends,
        )


ATTENTION: tuple[Kernel, ...] = (Products(), Standardized())
"""One for each operator."""
