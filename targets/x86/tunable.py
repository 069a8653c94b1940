"""Kernels that can do a step with several tiles of registers, and which one a step has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar, runtime_checkable

from qcompile.errors import BadInput

from ..c.kernel import Step

Tile = TypeVar("Tile")


@runtime_checkable
class Tunable(Protocol):
    """A kernel whose tiles can be measured instead of predicted."""

    def signature(self, step: Step) -> str:
        """All that the time of a step depends on, but for processor and compiler."""
        ...

    def tiles(self, step: Step) -> list[str]:
        """The names of the tiles that there are, the fastest by the model first."""
        ...


def chosen(
    kernel: Tunable, step: Step, ranked: Sequence[tuple[Tile, float]], tuned: Mapping[str, str]
) -> Tile:
    """The tile that `tuned` has for the step, or else the first; BadInput where there is none of that name."""
    if not tuned or (name := tuned.get(kernel.signature(step))) is None:
        return ranked[0][0]
    found = next((tile for tile, _ in ranked if str(tile) == name), None)
    if found is None:
        raise BadInput(
            f"the tuning has tile {name!r} for {step.name}, which is none of {kernel.signature(step)};"
            " leave the file out, or tune anew"
        )
    return found
