"""What the dyadic rewrite hands on: the integer graph, and what its values stand for."""

from __future__ import annotations

from dataclasses import dataclass, field

from qcompile.ir import Graph


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an integer value comes from: float tensor, and which float axis each of its axes is."""

    tensor: str
    axes: tuple[int, ...]


@dataclass(slots=True)
class Integerized:
    """The integer graph, the origins of its values by name, and the error of each rescale's multipliers."""

    graph: Graph
    origins: dict[str, Origin] = field(default_factory=dict)
    multiplier_errors: dict[str, float] = field(default_factory=dict)
