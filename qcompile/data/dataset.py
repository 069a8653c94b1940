"""Samples of a model's inputs: checked, cast, and read again in bounded batches as often as asked."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qcompile.data.convert import as_arrays
from qcompile.data.survey import Survey
from qcompile.errors import BadInput

Origin = Literal["files", "iterable", "random", "synthetic"]
Arrays = Mapping[str, NDArray[np.generic]]

# A batch holds at most this many bytes and rows: enough to hide the cost of Python, small beside any model.
BATCH_BYTES = 8 << 20
BATCH_ROWS = 256


@dataclass(frozen=True, slots=True)
class InputSpec:
    """An input of the model; the leading axis is the batch, None or a name is a size left open.

    `gain` is how much the first layer can amplify it, the largest norm of a row of its weights, where that is known.
    """

    name: str
    shape: tuple[int | str | None, ...]
    dtype: np.dtype[np.generic]
    gain: float | None = field(default=None, compare=False)

    def __str__(self) -> str:
        sizes = ", ".join(str(n) if isinstance(n, int) else str(n or "?") for n in self.shape)
        return f"{self.name!r} ({np.dtype(self.dtype).name}[{sizes}])"

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Is this the shape of a batch of rows, its leading axis aside?"""
        return len(shape) == len(self.shape) and all(
            n == m or not isinstance(m, int) for n, m in zip(shape[1:], self.shape[1:], strict=True)
        )


class Dataset:
    """Samples of a model's inputs; iterating gives checked batches of bounded size, as often as asked.

    `marked` data were made up and reports must say so. `count` is None until it is known. `about` says what was read
    and how it was prepared. The first whole pass warns of what looks wrong.
    """

    def __init__(
        self,
        inputs: Sequence[InputSpec],
        batches: Callable[[], Iterator[object]],
        origin: Origin,
        *,
        limit: int | None = None,
        count: int | None = None,
        labels: NDArray[np.generic] | None = None,
        metric: str | None = None,
        about: Mapping[str, object] | None = None,
        warn: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self.inputs = tuple(inputs)
        self.origin = origin
        self.count = count if count is None or limit is None else min(count, limit)
        self.labels = labels
        self.metric = metric
        self.about = dict(about or {})
        self._batches = batches
        self._limit = limit
        self._warn = warn
        self._surveyed = False

    @property
    def marked(self) -> bool:
        """Were the samples made up?"""
        return self.origin in ("random", "synthetic")

    def __iter__(self) -> Iterator[dict[str, NDArray[np.generic]]]:
        done = 0
        survey = None if self._surveyed else Survey()
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
                batch = {
                    spec.name: _checked(arrays[spec.name][start:end], spec, done)
                    for spec in self.inputs
                }
                if survey is not None:
                    survey.add(batch)
                yield batch
                done += end - start
            if done == self._limit:
                break
        if not done:
            raise BadInput("the data set is empty: give at least one sample")
        self.count = done
        if survey is not None:
            self._surveyed = True
            scaled = self.about.get("inputs", {})
            assert isinstance(scaled, Mapping)
            for spec in self.inputs:
                for sentence in survey.of_input(spec.name, spec.gain, scaled.get(spec.name, {})):
                    self._warn(sentence)
            for sentence in survey.of_samples():
                self._warn(sentence)

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

    def _arrays(self, given: object, done: int) -> Arrays:
        """The arrays of a given batch, with equally many rows of the right shape."""
        batch = as_arrays(given, [spec.name for spec in self.inputs], done)
        arrays = {}
        for spec in self.inputs:
            if spec.name not in batch:
                raise BadInput(f"sample {done} lacks input {spec}; it has {sorted(batch)}")
            array = batch[spec.name]
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


def rows_per_batch(row_bytes: int) -> int:
    """How many rows of this size make a batch."""
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max(row_bytes, 1)))


def _checked(array: NDArray[np.generic], spec: InputSpec, done: int) -> NDArray[np.generic]:
    """The rows in the input's dtype, every value finite."""
    rows = _cast(array, spec, done)
    if rows.dtype.kind == "f" and not np.isfinite(rows).all():
        flat = rows.reshape(len(rows), -1)
        bad = ~np.isfinite(flat.astype(np.float64))
        row = int(bad.any(axis=1).argmax())
        value = flat[row][bad[row].argmax()]
        raise BadInput(f"input {spec.name!r}: sample {done + row} holds {value}; clean the data")
    return rows


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
