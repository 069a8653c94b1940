"""Conv and MatMul on NEON: tiles of pixels by channels whose sums stay in registers until they are results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qcompile.ir import Value, ops

from ..c.kernel import Layer, Scratch, Step, aligned, constant, ends, loops
from ..c.nest import Nest
from ..c.text import affine, at, render
from .plan import Plan, Way, cut
from .rescale import lanes, loads, results

HERE = Path(__file__).parent
HEADER = HERE / "neon.h"


@dataclass(frozen=True)
class Products:
    """Conv of one group and MatMul, of signed bytes by constants."""

    way: Way
    includes: Sequence[str | Path] = (HEADER,)

    @property
    def name(self) -> str:
        """The family of instructions."""
        return self.way.name

    def matches(self, step: Step) -> bool:
        """Signed bytes in one group; see `rescale.results` for what their sums become."""
        node = step.node
        if not isinstance(node.op, ops.Conv | ops.MatMul) or results(step) is None:
            return False
        x, w, bias = node.inputs
        if not x.type.dtype.signed or x.type.dtype.bits > 8:
            return False
        if w.const is None or bias.const is None or w.constant.min() < self.way.lowest:
            return False
        if isinstance(node.op, ops.Conv) and (node.op.groups > 1 or len(w.type.shape) > 4):
            return False
        return not self.way.pairs or Plan(step, self.way).pairs

    def cost(self, step: Step) -> int:
        """Executed instructions."""
        return Plan(step, self.way).cost()

    def scratch(self, step: Step) -> Scratch:
        """The image."""
        return Plan(step, self.way).scratch()

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """A fused Rescale's other operands; never the one whose pixels are read again."""
        return tuple(v for v in aligned(step, *step.terms) if v is not step.node.inputs[0])

    def raster(self, step: Step) -> int | None:
        """A whole image where it is copied first; None where pixels are read again for more channels."""
        plan = Plan(step, self.way)
        if plan.image:
            return plan.height * plan.width
        alone = len(blocks := plan.channel_blocks()) == 1 and blocks[0][1] == 4 * blocks[0][2]
        return plan.tile.pixels if alone and not plan.channels_first else None

    def packed(self, step: Step) -> tuple[Value, ...]:
        """Weights and bias."""
        return step.node.inputs[1:]

    def body(self, layer: Layer) -> str:
        """See the template."""
        return _Code(layer, Plan(layer.step, self.way)).text()


@dataclass(frozen=True)
class Part:
    """A loop over tiles along one direction; `size` is what one of them holds."""

    variable: str
    first: int
    last: int
    step: int
    size: int

    @staticmethod
    def cut(variable: str, whole: int, size: int) -> list[Part]:
        """Tiles of `size`, and what is left."""
        return [Part(variable, a, b, n, n) for a, b, n in cut(whole, size)]

    @property
    def at(self) -> str:
        """Where a tile begins."""
        return self.variable if self.last - self.first > self.step else str(self.first)


@dataclass(frozen=True)
class _TileCode:
    """What the template writes for one tile."""

    pixels: int
    vectors: int
    channel: str
    source: str
    two: bool
    ahead: bool
    start: list[str]
    finish: list[str]


class _Code:
    """The statements of one layer."""

    def __init__(self, layer: Layer, plan: Plan) -> None:
        self.layer, self.plan = layer, plan
        self.constants = plan.results.constants(layer.constant)
        self.bias = layer.constant("bias", plan.pack_bias(constant(layer.step.node, 2)))
        self.x = layer[layer.step.node.inputs[0]]

    def text(self) -> str:
        """See the template."""
        plan = self.plan
        share = plan.share
        pixels = [Part("ox", a, b, n, n * share) for a, b, n in plan.pixel_tiles()]
        channels = [Part("o", a, b, 4 * n, n) for a, b, n in plan.channel_blocks()]
        return render(
            "products.c.j2",
            HERE,
            plan=plan,
            scratch=self.layer.scratch.declarations,
            image=self._image() if plan.image else "",
            images=Nest((("n", plan.batch),) if plan.batch > 1 else (), {}),
            rows=Nest((("oy", plan.height),) if plan.height > 1 else (), {}),
            parts=(channels, pixels) if plan.channels_first else (pixels, channels),
            tile=self._tile,
            weights=self.layer.constant("weights", plan.pack(constant(self.layer.step.node, 1))),
            affine=affine,
            at=at,
            loops=loops,
            ends=ends,
        )

    @property
    def _n(self) -> str:
        return "n" if self.plan.batch > 1 else "0"

    @property
    def _oy(self) -> str:
        return "oy" if self.plan.height > 1 else "0"

    def _image(self) -> str:
        """C that copies an image between its borders."""
        plan, w = self.plan, self.plan.window
        x = self.x
        if w is None or plan.flat:
            whole = plan.width * plan.channels
            if plan.way.pairs:
                return f"neon_flat_pairs(image, {x}, {plan.half * plan.channels}, {whole});"
            return f"neon_copy(image, {x}, {whole});"
        op, image = self.layer.step.node.op, plan.framed
        assert isinstance(op, ops.Conv)
        if not plan.way.pairs:
            return image.copy(x, op.pad_value)
        return (
            f"neon_framed_pairs(image, line, {image.source(x)}, {image.given}, {image.left},"
            f" {image.pitch}, {plan.half * w.x.stride * plan.channels}, {plan.pitch // 2},"
            f" {image.top}, {image.bottom}, {op.pad_value});"
        )

    def _tile(self, outer: Part, inner: Part) -> _TileCode:
        """The tile of two loops."""
        plan = self.plan
        pixels, channels = (inner, outer) if plan.channels_first else (outer, inner)
        vectors = channels.size
        start, sums = self._start(pixels.size, vectors, channels.at)
        return _TileCode(
            pixels.size,
            vectors,
            channels.at,
            self._source(pixels.at),
            plan.twice(pixels.size, vectors),
            plan.ahead(pixels.size, vectors),
            start,
            [*sums, *self._finish(pixels, channels)],
        )

    def _source(self, pixel: str) -> str:
        """Where the runs of a tile's first pixel begin."""
        plan, w = self.plan, self.plan.window
        terms = [(pixel, plan.pixel_step)]
        if w is not None and not plan.flat:
            terms.insert(0, (self._oy, w.y.stride * plan.pitch))
            if not plan.image:
                terms.insert(0, (self._n, w.y.size * plan.pitch))
        terms += [(v, step) for v, _, step in plan.runs]
        return at("image" if plan.image else self.x, affine(terms))

    def _start(self, pixels: int, vectors: int, first: str) -> tuple[list[str], list[str]]:
        """C before a tile's products, and between them and their results."""
        way = self.plan.way
        bias = at(self.bias, affine([(first, self.plan.share)]))
        if way.pairs:
            first_sums = loads(bias, 2 * vectors)
            start = [
                f"int32x4_t pair{p}_{v} = {first_sums[v]};"
                for p in range(pixels // 2)
                for v in range(2 * vectors)
            ]
            return start, [
                f"int32x4_t sum{2 * p + i}_{v} = neon_{which}_pixel"
                f"(pair{p}_{2 * v}, pair{p}_{2 * v + 1});"
                for p in range(pixels // 2)
                for i, which in enumerate(("first", "second"))
                for v in range(vectors)
            ]
        every = [(p, v) for p in range(pixels) for v in range(vectors)]
        if way.sums == 1:
            first_sums = loads(bias, vectors)
            return [f"int32x4_t sum{p}_{v} = {first_sums[v]};" for p, v in every], []
        start = [
            f"int32x4_t part{p}_{c} = vdupq_n_s32(0);"
            for p in range(pixels)
            for c in range(4 * vectors)
        ]
        lines, names = lanes(bias, "bias", vectors)
        return start, [
            *lines,
            *(
                f"int32x4_t sum{p}_{v} = vaddq_s32({names[v]}, neon_sums("
                + ", ".join(f"part{p}_{4 * v + i}" for i in range(4))
                + "));"
                for p, v in every
            ),
        ]

    def _finish(self, pixels: Part, channels: Part) -> list[str]:
        """C that turns the sums into results."""
        plan, found = self.plan, self.plan.results
        vectors = channels.size
        lines, parameters = found.parameters(self.constants, channels.at, vectors)
        last = channels.at == str(channels.first)
        count = min(4 * vectors, plan.outputs - channels.first) if last else 4 * vectors
        for p in range(pixels.size):
            ahead = p // plan.share + p % plan.share * plan.half
            index = affine(
                [
                    (self._n, plan.height * plan.width * plan.outputs),
                    (self._oy, plan.width * plan.outputs),
                    (pixels.at, plan.outputs),
                    (channels.at, 1),
                ],
                ahead * plan.outputs,
            )
            stored = found.store(
                [f"sum{p}_{v}" for v in range(vectors)],
                parameters,
                at("y", index),
                [at(self.layer[v], index) for v in found.values],
                count,
            )
            if ahead + pixels.last - pixels.step >= plan.width:
                lines.append(f"if ({affine([(pixels.at, 1)], ahead)} < {plan.width})")
            lines.append(stored)
        return lines
