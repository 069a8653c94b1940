"""Where a recipe leaves a choice, it is made by how close the integer graph comes to float on samples held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qcompile import border
from qcompile.errors import BadInput
from qcompile.ir import Graph
from qcompile.pipeline import Batch, Samples
from qcompile.recipe import Step

if TYPE_CHECKING:
    import onnx_ir as ir

MARGIN_DB = 0.1
"""What a step must gain to be taken: differences below it are the samples' doing."""
HELD_OUT = 4
"""Every fourth sample is held out."""
FEWEST = 16
"""Held-out samples below this number decide nothing."""
CEILING_DB = 200.0
"""The SQNR of an output without any error; float32 outputs get no nearer to float64 sums than about 150 dB."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One way to do a step, the SQNR of the outputs on held-out samples in dB, its gain, and whether it was taken."""

    step: str
    sqnr_db: float
    gain_db: float
    taken: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """The steps that were run, and what was tried before."""

    steps: tuple[Step, ...]
    trials: tuple[Trial, ...] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """Every fourth sample, or all the others."""

    samples: Samples
    held_out: bool

    def __iter__(self) -> Iterator[Batch]:
        done = 0
        for batch in self.samples:
            size = len(next(iter(batch.values())))
            mine = ((np.arange(done, done + size) % HELD_OUT) == HELD_OUT - 1) == self.held_out
            if mine.any():
                yield {name: array[mine] for name, array in batch.items()}
            done += size


def choose(
    steps: Sequence[Step], score: Callable[[Sequence[Step]], float], log: Callable[[str], None]
) -> Choice:
    """The steps without choices, and what was tried: each choice in turn, given the ones before it.

    `score` is the SQNR in dB that some steps reach on held-out samples; what is no number never wins.
    """

    def rated(tried: Sequence[Step | None]) -> float:
        found = score([s for s in tried if s is not None])
        return -CEILING_DB if np.isnan(found) else min(max(found, -CEILING_DB), CEILING_DB)

    taken: list[Step | None] = [s.variants[0] for s in steps]
    best = rated(taken)
    trials = [Trial("as the recipe begins", best, 0.0, True)]
    log(f"choose: the recipe begins at {best:.2f} dB on held-out samples")
    for i, step in enumerate(steps):
        for variant in step.variants[1:]:
            reached = rated([*taken[:i], variant, *taken[i + 1 :]])
            better = reached >= best + MARGIN_DB
            log(
                f"choose: {variant}: {reached:.2f} dB ({reached - best:+.2f}), {'taken' if better else 'left'}"
            )
            trials.append(Trial(str(variant), reached, reached - best, better))
            if better:
                taken[i], best = variant, reached
    return Choice(tuple(s for s in taken if s is not None), tuple(trials))


def enough(samples: Samples, lead: int = 1) -> bool:
    """Are there enough samples to hold some out, in whole batches of `lead` rows?"""
    held = sum(len(next(iter(b.values()))) for b in Part(samples, held_out=True))
    return held // lead * lead >= FEWEST


def whole_batches(samples: Samples, lead: int) -> Iterator[Batch]:
    """The samples in order in batches of a multiple of `lead` rows; the last rows that fill no batch are left out."""
    pending: Batch = {}
    for batch in samples:
        joined = {k: np.concatenate([pending[k], a]) if pending else a for k, a in batch.items()}
        rows = len(next(iter(joined.values()))) // lead * lead
        if rows:
            yield {name: array[:rows] for name, array in joined.items()}
        pending = {name: array[rows:] for name, array in joined.items()}


def output_sqnr(
    graph: Graph,
    model: ir.Model,
    samples: Samples,
    threads: int = 1,
    *,
    channels_last: bool = False,
) -> float:
    """The lowest SQNR of an output of the integer graph against the float model, in dB, at most CEILING_DB.

    An output that is all 0 in float says nothing and is left out. Where the batch is fixed, rows of successive batches
    are joined to it, and those that fill none are not counted. BadInput where nothing is left to compare.
    """
    from qcompile.onnx import integer, weights
    from qcompile.onnx.exact import ExactSession
    from qcompile.onnx.execute import FloatSession

    outputs = [port.name for port, _ in graph.outputs]
    floats = FloatSession(model, outputs, threads)
    exact = ExactSession(b"".join(weights.streamed(*integer.written(graph))), threads)
    signal, noise = dict.fromkeys(outputs, 0.0), dict.fromkeys(outputs, 0.0)
    lead = max(value.type.shape[0] for _, value in graph.inputs)
    rows = 0
    for batch in whole_batches(samples, lead):
        rows += len(next(iter(batch.values())))
        codes = border.encode(graph, border.to_channels_last(batch) if channels_last else batch)
        got = border.decode(graph, border.run_graph(graph, codes, exact.run))
        mine = border.to_channels_first(got) if channels_last else got
        for name, real in floats.run(batch).items():
            if not np.isfinite(real).all():
                raise BadInput(f"the float model computes NaN or Inf at {name!r}; repair it")
            wide = border.end_to_end(real, mine[name])
            signal[name] += float(np.square(wide).sum())
            noise[name] += float(np.square(wide - mine[name].astype(np.float64)).sum())
    if not rows:
        raise BadInput(
            f"the held-out samples do not fill one batch of {lead} rows, so no step can be judged by them; "
            "give more samples, or a recipe without choices"
        )
    if not any(signal.values()):
        raise BadInput(
            "every output of the float model is 0 on the held-out samples, so no step can be judged by them; "
            "give other samples, or a recipe without choices"
        )
    ratios = [signal[n] / noise[n] for n in outputs if noise[n] > 0 < signal[n]]
    return min(float(10 * np.log10(min(ratios))), CEILING_DB) if ratios else CEILING_DB
