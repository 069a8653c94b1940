"""How what a file holds becomes an input of the model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qcompile.errors import BadInput

LAYOUTS = ("nhwc", "nchw", "nwc", "ncw", "ndhwc", "ncdhw")
EVERY_KIND = ("file", "scale", "zero_point", "mean", "std")


@dataclass(frozen=True, slots=True)
class Reading:
    """How a file becomes an input: what of it is read, then ((x - zero_point) * scale - mean) / std in float32.

    `layout` names the axes of what is read; they are moved to the model's order, which its shape tells.
    Which of the others mean something depends on the kind of file; docs/data.md lists them.
    """

    file: Path | None = None
    key: str | None = None
    layout: str | None = None
    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    resize: tuple[int, ...] | None = None
    crop: tuple[int, ...] | None = None
    filter: str | None = None
    channels: str | None = None
    rate: int | None = None
    window: int | None = None
    hop: int | None = None
    pad: bool | None = None
    columns: tuple[str | int, ...] | None = None
    scale: float | None = None
    zero_point: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def stated(self) -> dict[str, object]:
        """What was stated, for the manifest; of the file its name."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.file is not None:
            given["file"] = self.file.name
        return {
            k: list(v) if isinstance(v, tuple) else v for k, v in given.items() if v is not None
        }

    def only(self, where: str, what: str, keys: Iterable[str]) -> None:
        """Raise BadInput where something is stated that does not concern this kind of file."""
        allowed = {*EVERY_KIND, *keys}
        for key in self.stated():
            if key not in allowed:
                raise BadInput(f"{where}: {key} is not for {what}, which take {', '.join(keys)}")

    def shaped(
        self, shape: tuple[int, ...], model: tuple[int | str | None, ...], *, joins: bool = False
    ) -> tuple[int, ...]:
        """The shape of a batch as the model takes it; with `joins`, a single channel or feature axis needs no axis."""
        order = self._order(shape, model)
        moved = tuple(shape[axis] for axis in order)
        if not joins or (len(moved) == len(model) and _fits(moved, model)):
            return moved
        long = [n for n in shape[1:] if n != 1]
        wanted = [n for n in model[1:] if isinstance(n, int) and n != 1]
        if (
            all(isinstance(n, int) for n in model[1:])
            and math.prod(long) == math.prod(wanted)
            and (long == wanted or len(long) < 2 or (len(wanted) < 2 and shape[-1] == 1))
        ):
            return (shape[0], *(n for n in model[1:] if isinstance(n, int)))
        return moved

    def __call__(
        self,
        rows: NDArray[np.generic],
        model: tuple[int | str | None, ...],
        *,
        joins: bool = False,
    ) -> NDArray[np.generic]:
        """The rows as the model takes them."""
        order = self._order(rows.shape, model)
        shape = self.shaped(rows.shape, model, joins=joins)
        # Float32 and in this order, so that x * scale is what DequantizeLinear makes of integers x.
        if self.zero_point is not None:
            rows = rows.astype(np.float32) - np.float32(self.zero_point)
        if self.scale is not None:
            rows = rows.astype(np.float32) * np.float32(self.scale)
        if self.mean is not None:
            rows = rows.astype(np.float32) - self._channels(self.mean, rows.shape)
        if self.std is not None:
            rows = rows.astype(np.float32) / self._channels(self.std, rows.shape)
        return np.ascontiguousarray(rows.transpose(order)).reshape(shape)

    def _order(
        self, shape: tuple[int, ...], model: tuple[int | str | None, ...]
    ) -> tuple[int, ...]:
        same = tuple(range(len(shape)))
        if self.layout is None:
            return same
        if len(self.layout) != len(shape):
            raise BadInput(f"layout {self.layout!r} does not fit data of shape {shape}")
        if len(model) != len(shape):
            return same
        c = self.layout.index("c")
        space = [axis for axis in same[1:] if axis != c]
        for order in ((0, c, *space), (0, *space, c)):
            if _fits([shape[axis] for axis in order], model):
                return order
        return same

    def _channels(self, values: tuple[float, ...], shape: tuple[int, ...]) -> NDArray[np.float32]:
        if len(values) == 1:
            return np.asarray(values, np.float32)
        axis = 1 if self.layout is None else self.layout.index("c")
        if axis >= len(shape) or shape[axis] != len(values):
            raise BadInput(
                f"mean or std has {len(values)} values, but the channel axis of data of shape "
                f"{shape} is {'1, as no layout is given' if self.layout is None else axis}"
            )
        return np.asarray(values, np.float32).reshape(
            [-1 if a == axis else 1 for a in range(len(shape))]
        )


def _fits(shape: Iterable[int], model: tuple[int | str | None, ...]) -> bool:
    """Are these the model's sizes, those left open and the batch aside?"""
    sizes = list(shape)
    return all(n == m for n, m in zip(sizes[1:], model[1:], strict=True) if isinstance(m, int))
