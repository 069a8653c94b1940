"""Loop nests over strided operands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .text import affine


@dataclass(frozen=True, slots=True)
class Nest:
    """Loops (variable, extent), outermost first, and each operand's index expression in them."""

    loops: tuple[tuple[str, int], ...]
    at: Mapping[str, str]


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense tensor."""
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * shape[i + 1]
    return tuple(strides)


def broadcast(shape: Sequence[int], result: Sequence[int]) -> tuple[int, ...]:
    """Strides with which a dense tensor is read along the axes of the shape it broadcasts to."""
    strides = [0 if n == 1 else s for n, s in zip(shape, row_major(shape), strict=True)]
    return (*[0] * (len(result) - len(shape)), *strides)


def parameter_strides(shape: Sequence[int], spatial: bool) -> tuple[int, ...]:
    """Strides of a Rescale's parameter row: along the last axis, or over all spatial positions."""
    if spatial:
        return (0, *row_major(shape[1:-1]), 0)
    return (*[0] * (len(shape) - 1), 1)


def named(
    shape: Sequence[int], variables: Sequence[str], operands: Mapping[str, Sequence[int]]
) -> Nest:
    """One loop for each axis longer than 1, with the given variables."""
    live = [v if n > 1 else "0" for v, n in zip(variables, shape, strict=True)]
    return Nest(
        tuple((v, n) for v, n in zip(variables, shape, strict=True) if n > 1),
        {name: affine(zip(live, s, strict=True)) for name, s in operands.items()},
    )


def merged(
    shape: Sequence[int], operands: Mapping[str, Sequence[int]], variables: str = "ijpqrsuv"
) -> Nest:
    """The fewest loops: neighbouring axes become one wherever every operand runs through both evenly."""
    extents: list[int] = []
    strides: dict[str, list[int]] = {name: [] for name in operands}
    for axis, extent in enumerate(shape):
        if extent == 1:
            continue
        here = {name: s[axis] for name, s in operands.items()}
        if extents and all(strides[name][-1] == here[name] * extent for name in operands):
            extents[-1] *= extent
            for name in operands:
                strides[name][-1] = here[name]
        else:
            extents.append(extent)
            for name in operands:
                strides[name].append(here[name])
    return named(extents, variables[: len(extents)], strides)
