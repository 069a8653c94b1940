"""Calibration and evaluation data: opened from any source, checked, and read again in bounded batches."""

from __future__ import annotations

import contextlib
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from qcompile.data.convert import is_array
from qcompile.data.dataset import BATCH_BYTES, BATCH_ROWS, Arrays, Dataset, InputSpec
from qcompile.data.files import open_files
from qcompile.data.made_up import MADE_UP_SAMPLES, made_up
from qcompile.errors import BadInput

__all__ = ["BATCH_BYTES", "BATCH_ROWS", "Dataset", "InputSpec", "Reader", "open_data"]

SPILLED_BYTES = 1 << 34
"""What can be read only once is copied to a temporary file of at most this size."""


@runtime_checkable
class Reader(Protocol):
    """What onnxruntime calls a CalibrationDataReader; `rewind()` is used where it exists."""

    def get_next(self) -> Arrays | None:
        """The next batch, None at the end."""
        ...


def open_data(
    source: object,
    inputs: Sequence[InputSpec],
    *,
    samples: int | None = None,
    seed: int = 0,
    warn: Callable[[str], None] = lambda sentence: None,
) -> Dataset:
    """The data set that `source` names, its first batch read and checked; at most `samples` samples.

    `source` is a path to what docs/data.md lists; an array; a dict of arrays or an iterable of them, of tensors or of
    pairs of tensor and label; an object with `get_next()`; "random"; or None for synthetic samples. Of files as many
    samples as asked for are drawn with the seed, of what is read in turn the first are taken.
    """
    if samples is not None and samples < 1:
        raise BadInput(f"a data set has at least one sample, not {samples}")
    if not inputs or any(not spec.shape for spec in inputs):
        raise BadInput("every input of the model needs a batch axis, and there must be an input")
    match source:
        case _ if is_array(source):
            if len(inputs) > 1:
                raise BadInput(
                    "the model has several inputs: give samples as dicts of arrays by name"
                )
            dataset = Dataset(inputs, lambda: iter([source]), "iterable", limit=samples, warn=warn)
        case None | "random":
            dataset = made_up(source is None, inputs, samples or MADE_UP_SAMPLES, seed)
        case str() | os.PathLike():
            dataset = open_files(Path(source), inputs, samples, seed, warn)
        case Mapping():
            dataset = Dataset(inputs, lambda: iter([source]), "iterable", limit=samples, warn=warn)
        case Reader() if callable(rewind := getattr(source, "rewind", None)):

            def again() -> Iterator[object]:
                rewind()
                return _until_none(source)

            dataset = Dataset(inputs, again, "iterable", limit=samples, warn=warn)
        case Reader():
            dataset = _spilled(inputs, _until_none(source), samples, warn)
        case list() | tuple():
            dataset = Dataset(inputs, lambda: iter(source), "iterable", limit=samples, warn=warn)
        case Iterable():
            # A loader may shuffle and augment: every pass has to see the samples of the first one.
            dataset = _spilled(inputs, iter(source), samples, warn)
        case _:
            raise BadInput(
                f"{type(source).__name__} is no data source: give a path, dicts of arrays, tensors, or an "
                "object with get_next()"
            )
    for _ in dataset:
        break
    return dataset


def _until_none(reader: Reader) -> Iterator[object]:
    while (batch := reader.get_next()) is not None:
        yield batch


def _spilled(
    inputs: Sequence[InputSpec],
    once: Iterator[object],
    limit: int | None,
    warn: Callable[[str], None],
) -> Dataset:
    """What can be read only once goes, checked, to a nameless temporary file."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(tempfile.TemporaryFile())
        checked = Dataset(inputs, lambda: once, "iterable", limit=limit)
        batches = 0
        for batch in checked:
            for spec in inputs:
                np.save(file, batch[spec.name], allow_pickle=False)
            batches += 1
            if file.tell() > SPILLED_BYTES:
                raise BadInput(
                    f"the first {batches} batches take more than {SPILLED_BYTES >> 30} GiB: "
                    "take fewer samples with --samples"
                )
        kept = stack.pop_all()

    def again() -> Iterator[object]:
        position = 0
        for _ in range(batches):
            file.seek(position)
            batch = {spec.name: np.load(file, allow_pickle=False) for spec in inputs}
            position = file.tell()
            yield batch

    dataset = Dataset(inputs, again, "iterable", count=checked.count, warn=warn)
    weakref.finalize(dataset, kept.close)
    return dataset
