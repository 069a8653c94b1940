"""Signals in time: WAV files and tables, cut into windows; tables whose rows are samples."""

from __future__ import annotations

import csv
import math
import warnings
import wave
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qcompile.data.description import did_you_mean
from qcompile.data.reading import Reading
from qcompile.errors import BadInput

TABLE_BYTES = 1 << 28
"""Tables are read in one piece, and all together may be this large."""
HEADER_BYTES = 44
"""The least a WAV file has before its samples."""
WAV_KEYS = ("channels", "rate", "window", "hop", "pad")
TABLE_KEYS = ("columns", "window", "hop", "pad")

Values = NDArray[np.float32]


class Signal(Protocol):
    """Values over time, several channels at each step."""

    @property
    def path(self) -> Path:
        """Where they are."""
        ...

    @property
    def length(self) -> int:
        """How many steps there are."""
        ...

    @property
    def channels(self) -> int:
        """How many values each step has."""
        ...

    def read(self, start: int, count: int) -> Values:
        """Some steps, [count, channels]."""
        ...


@dataclass(frozen=True)
class WindowRows:
    """Windows at equal distances over every signal, a row each: [window, channels]."""

    signals: Sequence[Signal]
    window: int
    hop: int
    pad: bool

    @cached_property
    def counts(self) -> list[int]:
        """The windows of every signal; an incomplete one at the end counts if it is padded."""
        return [self._count(s) for s in self.signals]

    @property
    def shape(self) -> tuple[int, ...]:
        """Windows, steps, channels."""
        return (sum(self.counts), self.window, self.signals[0].channels)

    @property
    def row_bytes(self) -> int:
        """The size of one window."""
        return 4 * math.prod(self.shape[1:])

    def blocks(self, chosen: NDArray[np.int64], step: int) -> Iterator[NDArray[np.generic]]:
        """The chosen windows."""
        starts = np.cumsum([0, *self.counts])
        owner = np.searchsorted(starts, chosen, side="right") - 1
        places = list(zip(owner.tolist(), (chosen - starts[owner]).tolist(), strict=True))
        for at in range(0, len(places), step):
            yield np.stack([self._row(self.signals[i], n) for i, n in places[at : at + step]])

    def _count(self, signal: Signal) -> int:
        length = signal.length
        if not length or (length < self.window and not self.pad):
            raise BadInput(
                f"{str(signal.path)!r} has {length} steps, and a window has {self.window}: "
                "pad = true in a .toml description fills it with zeros"
            )
        whole = (length - self.window) // self.hop + 1 if length >= self.window else 0
        seen = (whole - 1) * self.hop + self.window if whole else 0
        return whole + (self.pad and max(seen, whole * self.hop) < length)

    def _row(self, signal: Signal, number: int) -> Values:
        start = number * self.hop
        rows = signal.read(start, min(self.window, max(signal.length - start, 0)))
        missing = self.window - len(rows)
        return np.pad(rows, ((0, missing), (0, 0))) if missing else rows


def window_rows(
    signals: Sequence[Signal], reading: Reading, model: tuple[int | str | None, ...], unit: str
) -> WindowRows:
    """The windows of signals with equally many channels; as long as the model's input where that is not stated."""
    _alike(signals, unit)
    window = reading.window
    if window is None:
        sizes = [n for n in model[1:] if isinstance(n, int)]
        if len(sizes) < len(model) - 1 or math.prod(sizes) % signals[0].channels:
            raise BadInput("how long a window is does not follow from the model: state window")
        window = math.prod(sizes) // signals[0].channels
    return WindowRows(signals, window, reading.hop or window, bool(reading.pad))


def _alike(signals: Sequence[Signal], unit: str) -> None:
    for signal in signals:
        if signal.channels != signals[0].channels:
            raise BadInput(
                f"{str(signal.path)!r} has {signal.channels} {unit} and {str(signals[0].path)!r} "
                f"{signals[0].channels}: all have to be alike"
            )


@dataclass(frozen=True)
class WavFile:
    """A file of linear PCM, in units of full scale: from -1 up to, but not including, 1."""

    path: Path
    length: int
    found: int
    width: int
    rate: int
    mono: bool

    @property
    def channels(self) -> int:
        """Those of the file, or one where they are averaged."""
        return 1 if self.mono else self.found

    def read(self, start: int, count: int) -> Values:
        """Some steps; values of 32 bits are rounded to float32."""
        with _wav(self.path) as file:
            file.setpos(start)
            data = file.readframes(count)
        if len(data) != count * self.found * self.width:
            raise BadInput(f"{str(self.path)!r} is truncated: its header promises more")
        codes = np.frombuffer(data, np.uint8).reshape(count, self.found, self.width)
        wide = np.zeros((count, self.found, 4), np.uint8)
        # eight bits are unsigned in a WAV file, more are not
        wide[..., 4 - self.width :] = codes ^ 0x80 if self.width == 1 else codes
        values = wide.view("<i4")[..., 0] / 2.0**31
        return (values.mean(1, keepdims=True) if self.mono else values).astype(np.float32)


def wav_files(paths: Sequence[Path], reading: Reading) -> list[WavFile]:
    """WAV files of one rate, whose headers have been read and are true."""
    if reading.channels not in (None, "mono"):
        raise BadInput('channels of audio are "mono", or left out: all there are')
    files = [_wav_file(path, reading) for path in paths]
    for file in files:
        if file.rate != files[0].rate:
            raise BadInput(
                f"{str(file.path)!r} has {file.rate} samples a second and {str(paths[0])!r} "
                f"{files[0].rate}: resample them"
            )
    return files


def _wav_file(path: Path, reading: Reading) -> WavFile:
    with _wav(path) as file:
        length, found, width, rate = (
            file.getnframes(), file.getnchannels(), file.getsampwidth(), file.getframerate()
        )  # fmt: skip
    if not 1 <= width <= 4 or not found:
        raise BadInput(f"{str(path)!r} has samples of {width} bytes; 1 to 4 are read")
    if length * found * width > path.stat().st_size - HEADER_BYTES:
        raise BadInput(f"{str(path)!r} is truncated: its header promises {length} steps")
    if reading.rate not in (None, rate):
        raise BadInput(
            f"{str(path)!r} has {rate} samples a second, and {reading.rate} are stated: resample it"
        )
    return WavFile(path, length, found, width, rate, reading.channels == "mono")


@contextmanager
def _wav(path: Path) -> Iterator[wave.Wave_read]:
    try:
        with wave.open(str(path), "rb") as file:
            yield file
    except (OSError, EOFError, wave.Error, RuntimeError, ValueError, ZeroDivisionError) as e:
        raise BadInput(
            f"{str(path)!r} cannot be read as linear PCM, which WAV files have to hold: "
            f"{str(e) or 'it is truncated'}"
        ) from e


@dataclass(frozen=True)
class TableFile:
    """The numbers in some columns of a table, read in one piece."""

    path: Path
    values: NDArray[np.float64]

    @property
    def length(self) -> int:
        """How many rows there are."""
        return len(self.values)

    @property
    def channels(self) -> int:
        """How many columns there are."""
        return int(self.values.shape[1])

    def read(self, start: int, count: int) -> Values:
        """Some rows."""
        with np.errstate(over="ignore"):
            return self.values[start : start + count].astype(np.float32)


@dataclass(frozen=True)
class TableRows:
    """The rows of tables, a sample each."""

    tables: Sequence[TableFile]

    @property
    def counts(self) -> list[int]:
        """The rows of every table."""
        return [t.length for t in self.tables]

    @cached_property
    def _values(self) -> Values:
        return np.concatenate([t.read(0, t.length) for t in self.tables])

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        return (sum(self.counts), self.tables[0].channels)

    @property
    def row_bytes(self) -> int:
        """The size of one row."""
        return 4 * self.tables[0].channels

    def blocks(self, chosen: NDArray[np.int64], step: int) -> Iterator[NDArray[np.generic]]:
        """The chosen rows."""
        return (self._values[chosen[at : at + step]] for at in range(0, len(chosen), step))


def table_rows(tables: Sequence[TableFile], reading: Reading) -> TableRows:
    """The rows of tables with equally many columns."""
    if reading.hop is not None or reading.pad is not None:
        raise BadInput("hop and pad are of windows over the rows of a table: state window as well")
    _alike(tables, "columns")
    return TableRows(tables)


def check_sizes(paths: Sequence[Path]) -> None:
    """Raise BadInput where tables are too large to be read in one piece."""
    if (size := sum(path.stat().st_size for path in paths)) > TABLE_BYTES:
        raise BadInput(
            f"{str(paths[0])!r} and what is read with it have {size} bytes, and tables may have {TABLE_BYTES}: "
            "save a .npy, which is streamed"
        )


def table_file(
    path: Path, columns: Sequence[str | int] | None, without: Sequence[str] = ()
) -> TableFile:
    """Some columns of a table, or all that are not left out."""
    where = repr(str(path))
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter)
            first = next((row for row in reader if row), None)
            if first is None:
                raise BadInput(f"{where} is empty")
            headed = not all(map(_is_number, first))
            names = tuple(t.strip() if headed else str(i) for i, t in enumerate(first))
            used = [
                _column(where, c, names)
                for c in (range(len(first)) if columns is None else columns)
            ]
            used = [c for c in used if names[c] not in without]
            if not used:
                raise BadInput(f"{where} has no column left to read")
            skipped = reader.line_num if headed else 0
            file.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                values = np.loadtxt(
                    file, np.float64, None, delimiter, skiprows=skipped, usecols=used, ndmin=2, quotechar='"'
                )  # fmt: skip
    except UserWarning as e:
        raise BadInput(
            f"{where} has no row of numbers below {', '.join(names)}; columns are separated by "
            f"{'tabs' if delimiter != ',' else 'commas'}"
        ) from e
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as e:
        raise BadInput(f"{where} cannot be read as a table: {e}") from e
    return TableFile(path, values)


def _column(where: str, column: str | int, names: Sequence[str]) -> int:
    if isinstance(column, int) and column < len(names):
        return column
    if names.count(str(column)) > 1:
        raise BadInput(f"{where} has several columns {column!r}: give their numbers, from 0")
    if isinstance(column, int) or column not in names:
        raise BadInput(
            f"{where} has no column {column!r}{did_you_mean(str(column), names)}; "
            f"it has {', '.join(map(repr, names))}"
        )
    return names.index(column)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
