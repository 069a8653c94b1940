"""Data in files: a file, a folder, a list or a description becomes the samples of every input."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qcompile.data import images, places, signals
from qcompile.data.dataset import Dataset, InputSpec, rows_per_batch
from qcompile.data.description import Description, did_you_mean, read_description
from qcompile.data.places import Kind, Place
from qcompile.data.reading import Reading
from qcompile.data.rows import ArrayRows, Block, JoinedRows, Rows, TensorRows, raw_rows
from qcompile.errors import BadInput
from qcompile.npz import ArrayFile, open_arrays

MOST_SAMPLES = 1 << 26
FOLDERS = "folders"
"""The labels of samples that lie in a folder for each class: the number of the folder, in the order of their names."""


@dataclass(frozen=True, slots=True)
class _Part:
    """The samples that feed one input."""

    spec: InputSpec
    place: Place
    rows: Rows
    reading: Reading

    @property
    def _joins(self) -> bool:
        return self.place.kind is not Kind.ARRAYS

    def check(self) -> None:
        """Raise BadInput where the samples do not fit the input."""
        shape = self.rows.shape
        if shape[0] > MOST_SAMPLES or 0 in shape[1:]:
            raise BadInput(
                f"{self.place} has {shape[0]} samples of shape {shape[1:]}; at most {MOST_SAMPLES} are read, "
                "none without values"
            )
        if self.reading.layout is None or len(self.reading.layout) == len(shape):
            shape = self.reading.shaped(shape, self.spec.shape, joins=self._joins)
        if not self.spec.fits(shape):
            raise BadInput(
                f"{self.place} has samples of shape {self.rows.shape[1:]}, which does not fit input {self.spec}"
            )

    def blocks(self, chosen: NDArray[np.int64], step: int) -> Iterator[Block]:
        """The chosen samples as the model takes them."""
        found = self.rows.blocks(chosen, step)
        return (self.reading(b, self.spec.shape, joins=self._joins) for b in found)

    def about(self) -> dict[str, object]:
        """What was read and how, for the manifest."""
        said: dict[str, object] = {
            "file": self.place.source.name,
            "kind": self.place.kind.value,
            "files": len(self.place.paths),
        }
        if isinstance(self.rows, signals.WindowRows):
            said |= {"window": self.rows.window, "hop": self.rows.hop}
        if self.reading.resize is not None:
            said["filter"] = images.DEFAULT_FILTER
        return said | self.reading.stated()


def open_files(
    path: Path,
    inputs: Sequence[InputSpec],
    samples: int | None,
    seed: int,
    warn: Callable[[str], None],
) -> Dataset:
    """The samples of a file, a folder, a list or a description; where fewer are asked for, they are drawn."""
    description = (
        read_description(path, [spec.name for spec in inputs])
        if path.suffix == ".toml" and not os.path.isdir(path)
        else Description(path, path.resolve().parent if path.suffix == ".txt" else None)
    )
    parts = [_part(description, spec, inputs) for spec in inputs]
    first = parts[0]
    for part in parts[1:]:
        alike = part.place.source == first.place.source
        mine, its = part.rows.counts, first.rows.counts
        if mine != its if alike else sum(mine) != sum(its):
            counts = {p.spec.name: sum(p.rows.counts) for p in parts}
            raise BadInput(f"{str(path)!r}: the inputs differ in number of samples: {counts}")
    count = sum(first.rows.counts)
    chosen = np.arange(count)
    if description.index is not None:
        index = _per_sample(description, first, description.index)
        chosen = np.flatnonzero(_mask(path, index, count))
    labels = None
    if description.labels is not None:
        labels = _per_sample(description, first, description.labels)
        if labels.ndim < 1 or len(labels) != count:
            raise BadInput(f"{str(path)!r}: there must be one label for each sample")
    available = len(chosen)
    if samples is not None and samples < available:
        # the raw stream of a bit generator is the same in every version of numpy, what is made of it is not
        ranks = np.argsort(np.random.PCG64(seed % (1 << 128)).random_raw(available), kind="stable")
        chosen = chosen[np.sort(ranks[:samples])]
    step = rows_per_batch(sum(part.rows.row_bytes for part in parts))

    def batches() -> Iterator[object]:
        blocks = zip(*(part.blocks(chosen, step) for part in parts), strict=True)
        return ({p.spec.name: b for p, b in zip(parts, row, strict=True)} for row in blocks)

    about: dict[str, object] = {
        "source": path.name,
        "available": available,
        "inputs": {part.spec.name: part.about() for part in parts},
    }
    if any(part.place.kind is Kind.IMAGES for part in parts):
        about["versions"] = images.versions()
    return Dataset(
        inputs,
        batches,
        "files",
        count=len(chosen),
        labels=None if labels is None else labels[chosen],
        metric=description.metric,
        about=about,
        warn=warn,
    )


def _part(description: Description, spec: InputSpec, inputs: Sequence[InputSpec]) -> _Part:
    reading = description.inputs.get(spec.name, Reading())
    source = reading.file or description.file
    assert source is not None
    own = reading.file is not None
    names = [spec.name] if own else [s.name for s in inputs]
    place = places.find(source, description, names, names.index(spec.name))
    if len(names) > 1 and not place.many:
        raise BadInput(
            f"the model has several inputs and {place} holds {place.kind.value} for one: give each a file of its "
            "own in a .toml description, or a list of lines with NAME:=PATH"
        )
    reading.only(f"[inputs.{spec.name}]", place.kind.value, _KEYS[place.kind])
    rows, reading = _rows(place, description, spec, reading, len(names) == 1)
    part = _Part(spec, place, rows, reading)
    part.check()
    return part


def _rows(
    place: Place, description: Description, spec: InputSpec, reading: Reading, alone: bool
) -> tuple[Rows, Reading]:
    """The samples in files, and how they are read now that the files have been looked at."""
    paths = place.paths
    match place.kind:
        case Kind.ARRAYS:
            return _joined([_array(p, spec, reading, alone) for p in paths], paths), reading
        case Kind.TENSORS:
            return _joined([TensorRows(p, len(spec.shape)) for p in paths], paths), reading
        case Kind.RAW:
            shape, dtype = reading.shape or _sizes(spec), reading.dtype or "float32"
            return _joined([raw_rows(p, dtype, shape) for p in paths], paths), reading
        case Kind.IMAGES:
            if not description.written and np.dtype(spec.dtype).kind == "f":
                raise BadInput(
                    f"{place} holds images, and how they become {spec} has to be stated: write a .toml description "
                    "beside it with file, and under [inputs.NAME] resize, crop, scale, mean and std"
                )
            return images.image_rows(paths, reading), replace(reading, layout="nhwc")
        case Kind.AUDIO:
            files = signals.wav_files(paths, reading)
            rows = signals.window_rows(files, reading, spec.shape, "channels")
            return rows, replace(reading, layout="nwc", rate=files[0].rate)
        case Kind.TABLES:
            signals.check_sizes(paths)
            without = [n for n in (description.labels, description.index) if n is not None]
            tables = [signals.table_file(p, reading.columns, without) for p in paths]
            if reading.window is None:
                return signals.table_rows(tables, reading), reading
            rows = signals.window_rows(tables, reading, spec.shape, "columns")
            return rows, replace(reading, layout="nwc")


_KEYS: Mapping[Kind, tuple[str, ...]] = {
    Kind.ARRAYS: ("key", "layout"),
    Kind.TENSORS: ("layout",),
    Kind.RAW: ("dtype", "shape", "layout"),
    Kind.IMAGES: images.KEYS,
    Kind.AUDIO: signals.WAV_KEYS,
    Kind.TABLES: signals.TABLE_KEYS,
}


def _joined(parts: Sequence[Rows], paths: Sequence[Path]) -> Rows:
    return parts[0] if len(parts) == 1 else JoinedRows(parts, paths)


def _sizes(spec: InputSpec) -> tuple[int, ...]:
    sizes = tuple(n for n in spec.shape[1:] if isinstance(n, int))
    if len(sizes) < len(spec.shape) - 1:
        raise BadInput(f"input {spec} has open sizes: state shape under [inputs.{spec.name}]")
    return sizes


def _array(path: Path, spec: InputSpec, reading: Reading, alone: bool) -> ArrayRows:
    arrays = open_arrays(path)
    if reading.key is None and len(arrays) == 1 and alone:
        array = next(iter(arrays.values()))
    else:
        array = _named(path, arrays, reading.key or spec.name)
    if len(array.shape) not in (len(spec.shape), len(spec.shape) - 1):
        raise BadInput(f"{array} has shape {array.shape}, which does not fit input {spec}")
    return ArrayRows(array, single=len(array.shape) == len(spec.shape) - 1)


def _named(path: Path, arrays: Mapping[str, ArrayFile], name: str) -> ArrayFile:
    if name not in arrays:
        have = ", ".join(sorted(map(repr, arrays))) if "" not in arrays else "one array, nameless"
        raise BadInput(
            f"{str(path)!r} holds no array {name!r}{did_you_mean(name, arrays)}; it has {have}; "
            "rename it or describe the data set in a .toml file"
        )
    return arrays[name]


def _per_sample(description: Description, part: _Part, name: str) -> NDArray[np.generic]:
    """Labels or an index: an array or a column of the data, the folders they lie in, or a file of their own."""
    place = part.place
    if name == FOLDERS:
        return np.repeat(place.classes(), part.rows.counts)
    if Path(name).suffix in (".npy", ".txt"):
        assert description.bounds is not None
        file = description.contained("labels and index", description.bounds, name)
        return places.numbers(file) if file.suffix == ".txt" else open_arrays(file)[""].whole()
    if place.kind is Kind.ARRAYS:
        found = [_named(p, open_arrays(p), name).whole() for p in place.paths]
        return found[0] if len(found) == 1 else np.concatenate(found)
    if place.kind is Kind.TABLES and isinstance(part.rows, signals.TableRows):
        values = np.concatenate([signals.table_file(p, [name]).values[:, 0] for p in place.paths])
        if not np.array_equal(values, np.rint(values)):
            raise BadInput(f"{place}: column {name!r} holds other than whole numbers")
        return values.astype(np.int64)
    raise BadInput(
        f"{place} holds {place.kind.value} and no {name!r}: labels and index are a .txt or .npy file beside them, "
        f'or labels = "{FOLDERS}"'
    )


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
