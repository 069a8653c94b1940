"""Channels in the lanes of vectors: how parameters lie there, and C of what becomes of the accumulators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..c.kernel import Layer
from ..c.text import affine, c_int
from .planes import LANES
from .requantize import Parameters, Requantization, channel_word, column


@dataclass(frozen=True)
class Lanes:
    """Which channel each lane of the accumulators a0, a1, ... holds: [group][accumulator][lane], -1 where none.

    A lane of neighbouring accumulators holds neighbouring channels, so that packing puts them side by side.
    """

    channel: NDArray[np.int64]

    def spread(self, row: Sequence[int] | NDArray[np.int64], missing: int) -> NDArray[np.int64]:
        """The entries of a row over channels, lane by lane."""
        return np.array([*row, missing], np.int64)[self.channel]

    def parameter(self, layer: Layer, role: str, row: Sequence[int], group: str, i: int) -> str:
        """C of accumulator i's lanes of a row of parameters, in a constant array for all groups."""
        name = layer.constant(role, self.spread(row, row[0]).astype(np.int32))
        words = self.channel.shape[1] * LANES
        place = affine([(group, words)], i * LANES)
        return f"hvx_load({name}{'' if place == '0' else ' + ' + place})"

    def store(
        self,
        layer: Layer,
        plan: Requantization,
        made: str,
        accumulators: Sequence[int],
        group: str,
        terms: Callable[[int], str],
    ) -> list[str]:
        """C that makes the vector `made` of a word's accumulators; `terms` name the columns that are added."""
        lines: list[str] = []

        def vector(role: str, row: Sequence[int], i: int) -> str:
            if len(row) == 1:
                return f"Q6_V_vsplat_R({c_int(row[0])})"
            return self.parameter(layer, role, row, group, accumulators[i])

        added = []
        for at, term in enumerate(plan.terms):
            for i, a in enumerate(accumulators):
                word = channel_word(term.value, terms(at), a)
                lines.append(f"const HVX_Vector x{at}_{made}_{i} = {word};")
            added.append(f"x{at}_{made}_{{0}}")
        lines.append(f"HVX_Vector {made};")
        names = [f"a{a}" for a in accumulators]
        return [*lines, *column(plan, made, names, added, Parameters(vector))]
