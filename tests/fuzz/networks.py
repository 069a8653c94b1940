"""Random small networks of the operators that are taken, with any attributes ONNX's own inference finds consistent."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from onnx import helper

from tests.fuzz.arithmetic import (
    arg,
    binary,
    clip,
    conv,
    elementwise,
    normal,
    pool,
    product,
    reduction,
    softmax,
)
from tests.fuzz.maker import OPSET, Array, Draw, Maker
from tests.fuzz.movement import (
    concat,
    move,
    pad,
    rare,
    recurrent,
    reshape,
    resize,
    sliced,
    split,
    transpose,
)

KINDS = (
    elementwise, elementwise, clip, binary, binary, conv, conv, pool, product, reduction, arg, softmax, normal,
    reshape, transpose, concat, split, sliced, pad, move, resize, recurrent,
)  # fmt: skip


@dataclass(frozen=True)
class Network:
    """A model, samples for it, and how it is to be compiled."""

    model: bytes
    samples: dict[str, Array]
    recipe: str
    options: dict[str, object]
    nodes: tuple[str, ...]


@st.composite
def networks(draw: Draw, most: int = 6) -> Network:
    """A few operators on each other's results, compiled in any of the ways there are."""
    rng = np.random.default_rng(draw(st.integers(0, 1 << 20)))
    free = draw(st.booleans())
    batch = 2 if free else draw(st.integers(1, 3))
    maker = Maker(draw, rng, free, batch)
    shapes = (
        (batch, maker.int(1, 6), maker.int(1, 7), maker.int(1, 7)),
        (batch, maker.int(1, 6), maker.int(1, 8)),
        (maker.int(1, 5), 1, maker.int(1, 6)),
        (batch, maker.int(1, 12)),
        (batch, maker.int(1, 3), maker.int(1, 4), maker.int(1, 4), maker.int(1, 4)),
    )
    for _ in range(draw(st.sampled_from((1, 1, 1, 2)))):
        maker.feed(maker.one((*shapes[:1] * 3, *shapes)))
    for _ in range(draw(st.integers(1, most))):
        maker.one((*KINDS, rare) if maker.yes(12) else KINDS)(maker)
    if not maker.nodes:
        maker.add("Relu", [maker.inputs[0]])
    made = [n for n in maker.values if n not in maker.inputs]
    chosen = made[-1:]
    chosen += (
        [maker.one(made) for _ in range(draw(st.sampled_from((0, 0, 0, 1, 2))))] if made else []
    )
    outputs = [(n, 1) for n in dict.fromkeys(chosen)] + [(n, 7) for n in maker.whole[-1:]]
    read = {n for node in maker.nodes for n in node.input}
    graph = helper.make_graph(
        maker.nodes,
        "fuzzed",
        [
            helper.make_tensor_value_info(
                n, 1, ["N" if free and i == 0 else d for i, d in enumerate(maker.values[n])]
            )
            for n in maker.inputs
        ],
        [helper.make_tensor_value_info(n, kind, None) for n, kind in outputs],
        [t for t in maker.constants if t.name in read],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    spread = maker.one((1.0, 1.0, 0.1, 5.0, 300.0))
    shift = maker.one((0.0, 0.0, 1.0, -3.0))
    times = draw(st.sampled_from((1, 2, 4))) if free else 1
    shapes = {n: (times * maker.values[n][0], *maker.values[n][1:]) for n in maker.inputs}
    samples = {n: rng.normal(shift, spread, s).astype(np.float32) for n, s in shapes.items()}
    options: dict[str, object] = {}
    for key, choices in CHOICES.items():
        if maker.yes(6):
            options[key] = maker.one(choices)
    recipe = maker.one(("fast", "fast", "default", "data-free", "fixed-point", "fixed-point-khot"))
    return Network(
        model.SerializeToString(), samples, recipe, options, tuple(n.op_type for n in maker.nodes)
    )


CHOICES: dict[str, tuple[object, ...]] = {
    "weights": ("int2", "int3", "int4", "int6"),
    "activations": ("int4", "int16"),
    "first_last": ("int8",),
    "per_channel": (False,),
    "method": ("minmax", "mse", "entropy", "percentile"),
    "input_dtype": ("uint8", "int16"),
    "output_dtype": ("int8", "int32"),
    "io_layout": ("nhwc",),
}
