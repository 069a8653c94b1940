"""The TOML description of a data set: which file feeds which input, and how it becomes float."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qcompile.data.reading import LAYOUTS, Reading
from qcompile.errors import BadInput

FILTERS = ("bilinear", "bicubic", "nearest")
CHANNELS = ("rgb", "bgr", "gray", "mono")
DTYPES = (
    "float32", "float64", "float16", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "bool",
)  # fmt: skip
MOST_BYTES = 1 << 20
LARGEST = 1 << 24
"""No size that is stated exceeds this."""
_MOST = 3.4e38
"""What float32 can hold."""
_TOP = ("file", "root", "inputs", "labels", "index", "metric")


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """`; did you mean 'x'?` where an option is near, nothing otherwise."""
    near = difflib.get_close_matches(name, list(options), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


@dataclass(frozen=True, slots=True)
class Description:
    """A data set in words: what feeds each input, the labels and how they are scored.

    Not `written` is one that a path alone stands for. Paths in lists are relative to `root`, or to the list where None;
    none leads out of `bounds`.
    """

    file: Path | None
    bounds: Path | None
    root: Path | None = None
    inputs: Mapping[str, Reading] = field(default_factory=dict)
    labels: str | None = None
    index: str | None = None
    metric: str | None = None
    written: bool = False

    def contained(self, where: str, folder: Path, name: str) -> Path:
        """The path that a name in a folder means; BadInput where it leads out of bounds."""
        try:
            path = (folder / name).resolve()
        except (OSError, RuntimeError, ValueError) as e:
            raise BadInput(f"{where}: {name!r} is no path: {e}") from e
        if self.bounds is not None and not path.is_relative_to(self.bounds):
            raise BadInput(
                f"{where}: {name!r} lies outside the folder {str(self.bounds)!r}; a description "
                "may state another folder with root"
            )
        return path


def read_description(path: Path, names: Sequence[str]) -> Description:
    """The description in a TOML file, checked against the names of the model's inputs."""
    where = repr(str(path))
    try:
        if not os.path.isfile(path):
            raise BadInput(f"{where} does not exist or is not a file")
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise BadInput(f"{where} has more than {MOST_BYTES:,} bytes, which no description has")
        top = tomllib.loads(content.decode())
    except (OSError, ValueError, RecursionError) as e:
        raise BadInput(f"{where} cannot be read: {e}") from e
    _check_keys(where, top, _TOP)
    tables = top.get("inputs", {})
    if not isinstance(tables, dict) or any(not isinstance(t, dict) for t in tables.values()):
        raise BadInput(f"{where}: inputs are tables, written [inputs.NAME]")
    _check_keys(f"{where}, [inputs]", tables, names)
    folder = path.resolve().parent
    root = _Table(where, top).text("root")
    bounds = folder if root is None else (folder / root).resolve()
    bare = Description(None, bounds, None if root is None else bounds)
    inputs = {n: _reading(f"{where}, [inputs.{n}]", t, bare) for n, t in tables.items()}
    table = _Table(where, top)
    shared = table.text("file")
    if shared is None and not all(n in inputs and inputs[n].file is not None for n in names):
        raise BadInput(
            f"{where}: the key file is missing; it names what is read: a file, a list or a folder"
        )
    return Description(
        None if shared is None else bare.contained(where, bounds, shared),
        bounds,
        bare.root,
        inputs,
        table.text("labels"),
        table.text("index"),
        table.text("metric"),
        written=True,
    )


@dataclass(frozen=True, slots=True)
class _Table:
    """A table of a TOML file; what has the wrong type is refused."""

    where: str
    values: Mapping[str, object]

    def text(self, key: str, choices: Sequence[str] = ()) -> str | None:
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise BadInput(f"{self.where}: {key} is a string, not {value!r}")
        if value is not None and choices and value not in choices:
            raise BadInput(
                f"{self.where}: {key} {value!r} is not one of {', '.join(choices)}"
                f"{did_you_mean(value, choices)}"
            )
        return value

    def flag(self, key: str) -> bool | None:
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise BadInput(f"{self.where}: {key} is true or false, not {value!r}")
        return value

    def numbers(self, key: str) -> tuple[float, ...] | None:
        value = self.values.get(key)
        if value is None:
            return None
        values = value if isinstance(value, list) else [value]
        numbers = [
            float(v)
            for v in values
            if isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < _MOST
        ]
        if not values or len(numbers) != len(values):
            raise BadInput(f"{self.where}: {key} is a number or a list of numbers, not {value!r}")
        return tuple(numbers)

    def number(self, key: str) -> float | None:
        numbers = self.numbers(key)
        if numbers is not None and len(numbers) != 1:
            raise BadInput(f"{self.where}: {key} is one number; per channel write mean and std")
        return None if numbers is None else numbers[0]

    def sizes(self, key: str, most: int) -> tuple[int, ...] | None:
        value = self.values.get(key)
        if value is None:
            return None
        values = value if isinstance(value, list) else [value]
        sizes = tuple(v for v in values if type(v) is int and 1 <= v <= LARGEST)
        if not values or len(sizes) != len(values) or len(values) > most:
            what = "a positive integer" + (f" or a list of up to {most}" if most > 1 else "")
            raise BadInput(f"{self.where}: {key} is {what}, not {value!r}")
        return sizes

    def size(self, key: str) -> int | None:
        sizes = self.sizes(key, 1)
        return None if sizes is None else sizes[0]

    def columns(self, key: str) -> tuple[str | int, ...] | None:
        value = self.values.get(key)
        if value is None:
            return None
        columns = value if isinstance(value, list) else [value]
        if not columns or any(
            type(c) not in (str, int) or (type(c) is int and c < 0) for c in columns
        ):
            raise BadInput(f"{self.where}: {key} are names or numbers from 0, not {value!r}")
        return tuple(columns)


def _reading(where: str, table: Mapping[str, object], within: Description) -> Reading:
    _check_keys(where, table, Reading.__dataclass_fields__)
    given = _Table(where, table)
    scale, std = given.number("scale"), given.numbers("std")
    if scale == 0.0 or 0.0 in (std or ()):
        raise BadInput(f"{where}: scale and std cannot be 0")
    file = given.text("file")
    bounds = within.bounds
    assert bounds is not None
    return Reading(
        file=None if file is None else within.contained(where, bounds, file),
        key=given.text("key"),
        layout=given.text("layout", LAYOUTS),
        dtype=given.text("dtype", DTYPES),
        shape=given.sizes("shape", 5),
        resize=given.sizes("resize", 2),
        crop=given.sizes("crop", 2),
        filter=given.text("filter", FILTERS),
        channels=given.text("channels", CHANNELS),
        rate=given.size("rate"),
        window=given.size("window"),
        hop=given.size("hop"),
        pad=given.flag("pad"),
        columns=given.columns("columns"),
        scale=scale,
        zero_point=given.number("zero_point"),
        mean=given.numbers("mean"),
        std=std,
    )


def _check_keys(where: str, table: Mapping[str, object], allowed: Iterable[str]) -> None:
    options = list(allowed)
    for key in table:
        if key not in options:
            raise BadInput(
                f"{where}: unknown key {key!r}{did_you_mean(key, options)}; "
                f"known are {', '.join(options)}"
            )
