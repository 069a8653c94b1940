"""Calibration and evaluation data: opened from any source, checked, and read again in bounded batches."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from qcompile.description import Description, Reading, did_you_mean, read_description
from qcompile.errors import BadInput
from qcompile.npz import ArrayFile, open_arrays

Origin = Literal["files", "iterable", "random", "synthetic"]
Arrays = Mapping[str, NDArray[np.generic]]

# A batch holds at most this many bytes and rows: enough to hide the cost of Python, small beside any model.
BATCH_BYTES = 8 << 20
BATCH_ROWS = 256
MADE_UP_SAMPLES = 64


@dataclass(frozen=True, slots=True)
class InputSpec:
    """An input of the model; the leading axis is the batch, None or a name is a size left open."""

    name: str
    shape: tuple[int | str | None, ...]
    dtype: np.dtype[np.generic]

    def __str__(self) -> str:
        sizes = ", ".join(str(n) if isinstance(n, int) else str(n or "?") for n in self.shape)
        return f"{self.name!r} ({np.dtype(self.dtype).name}[{sizes}])"

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Is this the shape of a batch of rows, its leading axis aside?"""
        return len(shape) == len(self.shape) and all(
            n == m or not isinstance(m, int) for n, m in zip(shape[1:], self.shape[1:], strict=True)
        )


@runtime_checkable
class Reader(Protocol):
    """What onnxruntime calls a CalibrationDataReader; `rewind()` is used where it exists."""

    def get_next(self) -> Arrays | None:
        """The next batch, None at the end."""
        ...


class Dataset:
    """Samples of a model's inputs; iterating gives checked batches of bounded size, as often as asked.

    `marked` data were made up and reports must say so. `count` is None until it is known.
    """

    def __init__(
        self,
        inputs: Sequence[InputSpec],
        batches: Callable[[], Iterator[Arrays]],
        origin: Origin,
        *,
        limit: int | None = None,
        count: int | None = None,
        labels: NDArray[np.generic] | None = None,
        metric: str | None = None,
        warn: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self.inputs = tuple(inputs)
        self.origin = origin
        self.count = count if count is None or limit is None else min(count, limit)
        self.labels = labels if labels is None else labels[:limit]
        self.metric = metric
        self._batches = batches
        self._limit = limit
        self._warn = warn

    @property
    def marked(self) -> bool:
        """Were the samples made up?"""
        return self.origin in ("random", "synthetic")

    def __iter__(self) -> Iterator[dict[str, NDArray[np.generic]]]:
        done = 0
        extremes: dict[str, tuple[float, float]] = {}
        for given in self._batches():
            arrays = self._arrays(given, done)
            rows = len(next(iter(arrays.values())))
            if self._limit is not None:
                rows = min(rows, self._limit - done)
            row_bytes = sum(
                math.prod(arrays[s.name].shape[1:]) * np.dtype(s.dtype).itemsize
                for s in self.inputs
            )
            step = rows_per_batch(row_bytes)
            for start in range(0, rows, step):
                end = min(start + step, rows)
                batch = {}
                for spec in self.inputs:
                    array = _cast(arrays[spec.name][start:end], spec, done)
                    lo, hi = _finite_extremes(array, spec, done)
                    seen = extremes.get(spec.name, (lo, hi))
                    extremes[spec.name] = min(lo, seen[0]), max(hi, seen[1])
                    batch[spec.name] = array
                yield batch
                done += end - start
            if done == self._limit:
                break
        if not done:
            raise BadInput("the data set is empty: give at least one sample")
        self.count = done
        for name, (lo, hi) in extremes.items():
            if lo == hi:
                self._warn(f"input {name!r} is {lo:g} in every sample: ranges found say little")

    def rows(self, n: int) -> dict[str, NDArray[np.generic]]:
        """The first `n` samples, or all where there are fewer, as one batch."""
        taken: list[dict[str, NDArray[np.generic]]] = []
        missing = n
        for batch in self:
            taken.append({k: a[:missing] for k, a in batch.items()})
            missing -= len(next(iter(taken[-1].values())))
            if missing <= 0:
                break
        return {s.name: np.concatenate([b[s.name] for b in taken]) for s in self.inputs}

    @cached_property
    def digest(self) -> str:
        """The sha256 of what the model sees, whatever file or batch it comes in."""
        hashes = {spec.name: hashlib.sha256() for spec in self.inputs}
        shapes: dict[str, tuple[int, ...]] = {}
        for batch in self:
            for name, array in batch.items():
                hashes[name].update(np.ascontiguousarray(array).data)
                shapes[name] = array.shape[1:]
        whole = hashlib.sha256()
        for spec in self.inputs:
            about = (spec.name, np.dtype(spec.dtype).str, shapes[spec.name])
            whole.update(f"{about!r} {hashes[spec.name].hexdigest()}\n".encode())
        return whole.hexdigest()

    def _arrays(self, batch: Arrays, done: int) -> dict[str, NDArray[np.generic]]:
        """The arrays of a given batch, with equally many rows of the right shape."""
        if not isinstance(batch, Mapping):
            raise BadInput(
                f"a sample is a dict of arrays by input name, not {type(batch).__name__}"
            )
        names = [spec.name for spec in self.inputs]
        for name in batch:
            if name not in names:
                raise BadInput(f"the model has no input {name!r}{did_you_mean(str(name), names)}")
        arrays = {}
        for spec in self.inputs:
            if spec.name not in batch:
                raise BadInput(f"sample {done} lacks input {spec}; it has {sorted(batch)}")
            try:
                array = np.asarray(batch[spec.name])
            except ValueError as e:
                raise BadInput(f"input {spec}: sample {done} is no array: {e}") from e
            if array.dtype.kind not in "biuf":
                raise BadInput(f"input {spec}: sample {done} has dtype {array.dtype}, no numbers")
            if array.ndim == len(spec.shape) - 1:
                array = array[np.newaxis]
            if not spec.fits(array.shape):
                raise BadInput(f"input {spec}: sample {done} has shape {array.shape}")
            arrays[spec.name] = array
        counts = {name: len(array) for name, array in arrays.items()}
        if len(set(counts.values())) > 1:
            raise BadInput(f"from sample {done} on, the inputs differ in number of rows: {counts}")
        return arrays


def open_data(
    source: object,
    inputs: Sequence[InputSpec],
    *,
    samples: int | None = None,
    seed: int = 0,
    warn: Callable[[str], None] = lambda sentence: None,
) -> Dataset:
    """The data set that `source` names, its first batch read and checked; at most `samples` samples.

    `source` is the path of a .npz, a .npy, a folder of these or a .toml description; an array dict
    or an iterable of them; an object with `get_next()`; "random"; or None for synthetic samples.
    """
    if samples is not None and samples < 1:
        raise BadInput(f"a data set has at least one sample, not {samples}")
    if not inputs or any(not spec.shape for spec in inputs):
        raise BadInput("every input of the model needs a batch axis, and there must be an input")
    match source:
        case None | "random":
            dataset = _made_up(source is None, inputs, samples or MADE_UP_SAMPLES, seed)
        case str() | os.PathLike():
            dataset = _from_path(Path(source), inputs, samples, warn)
        case Mapping():
            dataset = Dataset(inputs, lambda: iter([source]), "iterable", limit=samples, warn=warn)
        case Reader() if callable(rewind := getattr(source, "rewind", None)):

            def again() -> Iterator[Arrays]:
                rewind()
                return _until_none(source)

            dataset = Dataset(inputs, again, "iterable", limit=samples, warn=warn)
        case Reader():
            dataset = _spilled(inputs, _until_none(source), samples, warn)
        case Iterable() if iter(source) is source:
            dataset = _spilled(inputs, iter(source), samples, warn)
        case Iterable():
            dataset = Dataset(inputs, lambda: iter(source), "iterable", limit=samples, warn=warn)
        case _:
            raise BadInput(
                f"{type(source).__name__} is no data source: give a path, dicts of arrays, or an "
                "object with get_next()"
            )
    for _ in dataset:
        break
    return dataset


def rows_per_batch(row_bytes: int) -> int:
    """How many rows of this size make a batch."""
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max(row_bytes, 1)))


def _cast(array: NDArray[np.generic], spec: InputSpec, done: int) -> NDArray[np.generic]:
    wanted = np.dtype(spec.dtype)
    if array.dtype == wanted or not array.size:
        return array.astype(wanted, copy=False)
    where = f"input {spec}, from sample {done} on"
    if wanted.kind == "f":
        if array.dtype.kind in "iu":
            exact = 1 << {2: 11, 4: 24, 8: 53}[wanted.itemsize]
            if max(-int(array.min()), int(array.max())) > exact:
                raise BadInput(f"{where}: {array.dtype} values above {exact} are no {wanted}")
        with np.errstate(over="ignore"):
            return array.astype(wanted)
    if array.dtype.kind == "f" or wanted.kind == "b":
        raise BadInput(f"{where}: {array.dtype} values are given; convert them to {wanted}")
    limits = np.iinfo(wanted.str)
    if int(array.min()) < limits.min or int(array.max()) > limits.max:
        raise BadInput(f"{where}: {array.dtype} values are outside {wanted}")
    return array.astype(wanted)


def _finite_extremes(array: NDArray[np.generic], spec: InputSpec, done: int) -> tuple[float, float]:
    if not array.size:
        return math.inf, -math.inf
    lo, hi = float(array.min()), float(array.max())
    if not math.isfinite(lo) or not math.isfinite(hi):
        bad = ~np.isfinite(array.reshape(len(array), -1).astype(np.float64))
        row = int(bad.any(axis=1).argmax())
        value = array.reshape(len(array), -1)[row][bad[row].argmax()]
        raise BadInput(f"input {spec.name!r}: sample {done + row} holds {value}; clean the data")
    return lo, hi


def _until_none(reader: Reader) -> Iterator[Arrays]:
    while (batch := reader.get_next()) is not None:
        yield batch


def _spilled(
    inputs: Sequence[InputSpec],
    once: Iterator[Arrays],
    limit: int | None,
    warn: Callable[[str], None],
) -> Dataset:
    """What can be read only once goes, checked, to a nameless temporary file."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(tempfile.TemporaryFile())
        checked = Dataset(inputs, lambda: once, "iterable", limit=limit, warn=warn)
        batches = 0
        for batch in checked:
            for spec in inputs:
                np.save(file, batch[spec.name], allow_pickle=False)
            batches += 1
        kept = stack.pop_all()

    def again() -> Iterator[Arrays]:
        position = 0
        for _ in range(batches):
            file.seek(position)
            batch = {spec.name: np.load(file, allow_pickle=False) for spec in inputs}
            position = file.tell()
            yield batch

    dataset = Dataset(inputs, again, "iterable", count=checked.count)
    weakref.finalize(dataset, kept.close)
    return dataset


def _from_path(
    path: Path, inputs: Sequence[InputSpec], limit: int | None, warn: Callable[[str], None]
) -> Dataset:
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in (".npy", ".npz"))
        if not files:
            raise BadInput(f"the folder {str(path)!r} holds no .npy or .npz file")
        return _from_files(files, Description(path), inputs, limit, warn)
    match path.suffix:
        case ".toml":
            description = read_description(path, [spec.name for spec in inputs])
            return _from_files([description.file], description, inputs, limit, warn)
        case ".npy" | ".npz":
            return _from_files([path], Description(path), inputs, limit, warn)
        case suffix:
            raise BadInput(
                f"{str(path)!r}: data come as .npz, .npy, .toml or a folder, not {suffix or 'this'}"
            )


@dataclass(frozen=True, slots=True)
class _Part:
    """The array of one file that feeds one input."""

    array: ArrayFile
    reading: Reading
    spec: InputSpec
    single: bool

    @property
    def rows(self) -> int:
        return 1 if self.single else self.array.shape[0]

    @property
    def row_bytes(self) -> int:
        return self.array.nbytes // max(self.rows, 1)

    def blocks(self, rows: int) -> Iterator[NDArray[np.generic]]:
        pieces = iter([self.array.whole()[None]]) if self.single else self.array.blocks(rows)
        return (self.reading(piece, self.spec.shape) for piece in pieces)


def _from_files(
    files: Sequence[Path],
    description: Description,
    inputs: Sequence[InputSpec],
    limit: int | None,
    warn: Callable[[str], None],
) -> Dataset:
    parts: list[dict[str, _Part]] = []
    chosen: NDArray[np.bool_] | None = None
    labels: NDArray[np.generic] | None = None
    for path in files:
        arrays = open_arrays(path)
        parts.append({s.name: _part(path, arrays, s, inputs, description) for s in inputs})
        counts = {name: part.rows for name, part in parts[-1].items()}
        if len(set(counts.values())) > 1:
            raise BadInput(f"{str(path)!r}: the inputs differ in number of samples: {counts}")
        if description.index is not None:
            index = _named(path, arrays, description.index).whole()
            chosen = _mask(path, index, next(iter(counts.values())))
        if description.labels is not None:
            labels = _named(path, arrays, description.labels).whole()
            if labels.ndim < 1 or len(labels) != next(iter(counts.values())):
                raise BadInput(f"{str(path)!r}: there must be one label for each sample")
    count = sum(next(iter(p.values())).rows for p in parts)
    if chosen is not None:
        count = int(chosen.sum())
        labels = None if labels is None else labels[chosen]

    def batches() -> Iterator[Arrays]:
        for part in parts:
            rows = rows_per_batch(sum(p.row_bytes for p in part.values()))
            done = 0
            for blocks in zip(*(p.blocks(rows) for p in part.values()), strict=True):
                keep = slice(None) if chosen is None else chosen[done : done + rows]
                yield {name: block[keep] for name, block in zip(part, blocks, strict=True)}
                done += rows

    return Dataset(
        inputs,
        batches,
        "files",
        limit=limit,
        count=count,
        labels=labels,
        metric=description.metric,
        warn=warn,
    )


def _part(
    path: Path,
    arrays: Mapping[str, ArrayFile],
    spec: InputSpec,
    inputs: Sequence[InputSpec],
    description: Description,
) -> _Part:
    reading = description.inputs.get(spec.name, Reading())
    if reading.key is None and len(arrays) == len(inputs) == 1:
        array = next(iter(arrays.values()))
    else:
        array = _named(path, arrays, reading.key or spec.name)
    single = len(array.shape) == len(spec.shape) - 1
    part = _Part(array, reading, spec, single)
    shape = (1, *array.shape) if single else array.shape
    if len(shape) == len(spec.shape):
        shape = reading.shaped(shape, spec.shape)
    if not spec.fits(shape):
        raise BadInput(f"{array} has shape {array.shape}, which does not fit input {spec}")
    return part


def _named(path: Path, arrays: Mapping[str, ArrayFile], name: str) -> ArrayFile:
    if name not in arrays:
        have = ", ".join(sorted(map(repr, arrays))) if "" not in arrays else "one array, nameless"
        raise BadInput(
            f"{str(path)!r} holds no array {name!r}{did_you_mean(name, arrays)}; it has {have}; "
            "rename it or describe the data set in a .toml file"
        )
    return arrays[name]


def _mask(path: Path, index: NDArray[np.generic], rows: int) -> NDArray[np.bool_]:
    mask = np.zeros(rows, np.bool_)
    if index.ndim == 1 and index.dtype.kind == "b" and len(index) == rows:
        return index.astype(np.bool_)
    if index.ndim != 1 or index.dtype.kind not in "iu":
        raise BadInput(f"{str(path)!r}: an index is one axis of integers, not {index.dtype}")
    if index.size and not (0 <= int(index.min()) and int(index.max()) < rows):
        raise BadInput(f"{str(path)!r}: the index names samples outside 0 to {rows - 1}")
    mask[index.astype(np.int64)] = True
    return mask


def _made_up(smooth: bool, inputs: Sequence[InputSpec], samples: int, seed: int) -> Dataset:
    for spec in inputs:
        if np.dtype(spec.dtype).kind != "f":
            raise BadInput(
                f"input {spec} is not float, its values cannot be made up: give data with --calib"
            )
        if any(not isinstance(n, int) for n in spec.shape[1:]):
            raise BadInput(f"input {spec} has open sizes: fix them with --input-dim, or give data")
    make = _smooth if smooth else _white

    def batches() -> Iterator[Arrays]:
        shapes = [tuple(n for n in spec.shape[1:] if isinstance(n, int)) for spec in inputs]
        step = rows_per_batch(4 * sum(math.prod(shape) for shape in shapes))
        for start in range(0, samples, step):
            rows = range(start, min(start + step, samples))
            yield {
                spec.name: np.stack(
                    [make(np.random.default_rng([seed, i, row]), shape) for row in rows]
                )
                for i, (spec, shape) in enumerate(zip(inputs, shapes, strict=True))
            }

    return Dataset(inputs, batches, "synthetic" if smooth else "random", count=samples)


def _white(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    return rng.standard_normal(shape, np.float32)


def _smooth(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Noise with the 1/f amplitudes of natural images, its mean and contrast drawn anew each time."""
    noise = rng.standard_normal(shape)
    axes = [axis for axis, n in enumerate(shape) if n > 4]
    if axes:
        grids = np.meshgrid(*(np.fft.fftfreq(shape[a]) * shape[a] for a in axes), indexing="ij")
        radius = np.maximum(np.sqrt(sum(g * g for g in grids)), 1.0)
        spread = [n if axis in axes else 1 for axis, n in enumerate(shape)]
        noise = np.fft.ifftn(np.fft.fftn(noise, axes=axes) / radius.reshape(spread), axes=axes).real
        noise /= max(float(noise.std()), 1e-12)
    mean, contrast = 0.5 * rng.standard_normal(), np.exp(0.3 * rng.standard_normal())
    smooth: NDArray[np.float32] = np.clip(mean + contrast * noise, -2.5, 2.5).astype(np.float32)
    return smooth
