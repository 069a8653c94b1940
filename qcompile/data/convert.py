"""Samples as Python programs hold them: arrays, tensors of any framework, pairs with labels, dicts by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from qcompile.data.description import did_you_mean
from qcompile.errors import BadInput

LABELS = ("label", "labels")
"""What loaders call labels in the dicts they give; they are not read."""


class OnHost(Protocol):
    """A tensor in the memory of the CPU."""

    def numpy(self) -> object:
        """Its values as an array."""
        ...


class Detached(Protocol):
    """A tensor that remembers nothing of how it was computed."""

    def cpu(self) -> OnHost:
        """The tensor in the memory of the CPU."""
        ...


@runtime_checkable
class Tensor(Protocol):
    """What PyTorch's tensors are here; PyTorch itself is not needed."""

    def detach(self) -> Detached:
        """The tensor without its history."""
        ...


def as_arrays(given: object, names: Sequence[str], done: int) -> dict[str, NDArray[np.generic]]:
    """The arrays by input name of what an iterable gives: a dict, a tensor, or tensors with a label behind them."""
    if isinstance(given, Mapping):
        for name in given:
            if name not in names and name not in LABELS:
                raise BadInput(f"the model has no input {name!r}{did_you_mean(str(name), names)}")
        return {name: as_array(given[name], name, done) for name in names if name in given}
    tensors = given
    if isinstance(tensors, Sequence) and tensors and isinstance(tensors[0], tuple | list):
        tensors = tensors[0]
    if is_array(tensors):
        tensors = [tensors]
    if (
        not isinstance(tensors, tuple | list)
        or not all(map(is_array, tensors[: len(names)]))
        or not len(names) <= len(tensors) <= len(names) + 1
    ):
        raise BadInput(
            f"sample {done} is no dict of arrays by input name and no tensor for each input, with or without a label: "
            f"it is {_kind(given)}, and the inputs are {', '.join(map(repr, names))}"
        )
    return {name: as_array(t, name, done) for name, t in zip(names, tensors, strict=False)}


def is_array(thing: object) -> bool:
    """Is this an array or a tensor by itself?"""
    return isinstance(thing, np.ndarray | Tensor)


def as_array(thing: object, name: str, done: int) -> NDArray[np.generic]:
    """An array of numbers from an array, a tensor or nested lists."""
    try:
        if isinstance(thing, Tensor):
            thing = thing.detach().cpu().numpy()
        return np.asarray(thing)
    except (AttributeError, RuntimeError, TypeError, ValueError) as e:
        raise BadInput(f"input {name!r}: sample {done} is no array: {e}") from e


def _kind(thing: object) -> str:
    if isinstance(thing, tuple | list):
        return f"a {type(thing).__name__} of {len(thing)}"
    return f"of type {type(thing).__name__}"
