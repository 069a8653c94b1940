"""The TOML description of a data set: which array feeds which input, and how it becomes float."""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qcompile.errors import BadInput

LAYOUTS = ("nhwc", "nchw", "nwc", "ncw", "ndhwc", "ncdhw")
_TOP = ("file", "inputs", "labels", "index", "metric")
_INPUT = ("key", "layout", "scale", "zero_point", "mean", "std")


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """`; did you mean 'x'?` where an option is near, nothing otherwise."""
    near = difflib.get_close_matches(name, list(options), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


@dataclass(frozen=True, slots=True)
class Reading:
    """How an array of a file becomes an input: ((x - zero_point) * scale - mean) / std in float32.

    `layout` names the axes of the array; they are moved to the model's order, which its shape tells.
    """

    key: str | None = None
    layout: str | None = None
    scale: float | None = None
    zero_point: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def shaped(
        self, shape: tuple[int, ...], model: tuple[int | str | None, ...]
    ) -> tuple[int, ...]:
        """The shape of a batch once its axes are in the model's order."""
        return tuple(shape[axis] for axis in self._order(shape, model))

    def __call__(
        self, rows: NDArray[np.generic], model: tuple[int | str | None, ...]
    ) -> NDArray[np.generic]:
        """The rows as the model takes them."""
        order = self._order(rows.shape, model)
        # Float32 and in this order, so that x * scale is what DequantizeLinear makes of integers x.
        if self.zero_point is not None:
            rows = rows.astype(np.float32) - np.float32(self.zero_point)
        if self.scale is not None:
            rows = rows.astype(np.float32) * np.float32(self.scale)
        if self.mean is not None:
            rows = rows.astype(np.float32) - self._channels(self.mean, rows.shape)
        if self.std is not None:
            rows = rows.astype(np.float32) / self._channels(self.std, rows.shape)
        return np.ascontiguousarray(rows.transpose(order))

    def _order(
        self, shape: tuple[int, ...], model: tuple[int | str | None, ...]
    ) -> tuple[int, ...]:
        same = tuple(range(len(shape)))
        if self.layout is None:
            return same
        if len(self.layout) != len(shape):
            raise BadInput(f"layout {self.layout!r} does not fit data of shape {shape}")
        c = self.layout.index("c")
        space = [axis for axis in same[1:] if axis != c]
        for order in ((0, c, *space), (0, *space, c)):
            moved = [shape[axis] for axis in order]
            if all(n == m for n, m in zip(moved[1:], model[1:], strict=True) if isinstance(m, int)):
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


@dataclass(frozen=True, slots=True)
class Description:
    """A data set in words: the file, what feeds each input, the labels and how they are scored."""

    file: Path
    inputs: Mapping[str, Reading] = field(default_factory=dict)
    labels: str | None = None
    index: str | None = None
    metric: str | None = None


def read_description(path: Path, names: Sequence[str]) -> Description:
    """The description in a TOML file, checked against the names of the model's inputs."""
    try:
        with path.open("rb") as file:
            top = tomllib.load(file)
    except FileNotFoundError as e:
        raise BadInput(f"{str(path)!r} does not exist") from e
    except (OSError, RecursionError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise BadInput(f"{str(path)!r} cannot be read: {e}") from e
    where = repr(str(path))
    _check_keys(where, top, _TOP)
    inputs = top.get("inputs", {})
    if not isinstance(inputs, dict) or any(not isinstance(t, dict) for t in inputs.values()):
        raise BadInput(f"{where}: inputs are tables, written [inputs.NAME]")
    _check_keys(f"{where}, [inputs]", inputs, names)
    return Description(
        _contained(path, _text(where, top, "file")),
        {name: _reading(f"{where}, [inputs.{name}]", table) for name, table in inputs.items()},
        _text(where, top, "labels"),
        _text(where, top, "index"),
        _text(where, top, "metric"),
    )


def _reading(where: str, table: Mapping[str, object]) -> Reading:
    _check_keys(where, table, _INPUT)
    layout = _text(where, table, "layout")
    if layout is not None and layout not in LAYOUTS:
        raise BadInput(
            f"{where}: layout {layout!r} is not one of {', '.join(LAYOUTS)}"
            f"{did_you_mean(layout, LAYOUTS)}"
        )
    scale, zero = _numbers(where, table, "scale"), _numbers(where, table, "zero_point")
    mean, std = _numbers(where, table, "mean"), _numbers(where, table, "std")
    for key, values in (("scale", scale), ("zero_point", zero)):
        if values is not None and len(values) != 1:
            raise BadInput(f"{where}: {key} is one number; per channel write mean and std")
    if 0.0 in (scale or ()) or 0.0 in (std or ()):
        raise BadInput(f"{where}: scale and std cannot be 0")
    return Reading(
        _text(where, table, "key"),
        layout,
        None if scale is None else scale[0],
        None if zero is None else zero[0],
        mean,
        std,
    )


def _check_keys(where: str, table: Mapping[str, object], allowed: Iterable[str]) -> None:
    options = list(allowed)
    for key in table:
        if key not in options:
            raise BadInput(
                f"{where}: unknown key {key!r}{did_you_mean(key, options)}; "
                f"known are {', '.join(options)}"
            )


def _text(where: str, table: Mapping[str, object], key: str) -> str | None:
    value = table.get(key)
    if value is not None and not isinstance(value, str):
        raise BadInput(f"{where}: {key} is a string, not {value!r}")
    return value


def _numbers(where: str, table: Mapping[str, object], key: str) -> tuple[float, ...] | None:
    value = table.get(key)
    if value is None:
        return None
    values = value if isinstance(value, list) else [value]
    try:
        numbers = [
            float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)
        ]
    except OverflowError:
        numbers = [math.inf] * len(values)
    if not values or len(numbers) != len(values) or not all(map(math.isfinite, numbers)):
        raise BadInput(f"{where}: {key} is a number or a list of numbers, not {value!r}")
    return tuple(numbers)


def _contained(path: Path, name: str | None) -> Path:
    if name is None:
        raise BadInput(f"{str(path)!r}: the key file is missing; it names the .npz or .npy")
    folder = path.resolve().parent
    try:
        file = (folder / name).resolve()
    except (OSError, RuntimeError, ValueError) as e:
        # a NUL is no path, nor is a loop of links
        raise BadInput(f"{str(path)!r}: file {name!r} cannot be found: {e}") from e
    if not file.is_relative_to(folder):
        raise BadInput(f"{str(path)!r}: file {name!r} lies outside the folder of the description")
    if file.suffix not in (".npz", ".npy"):
        raise BadInput(f"{str(path)!r}: file {name!r} is neither .npz nor .npy")
    return file
