"""What a pass over the samples saw, and what of it looks like a mistake of whoever prepared them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

FEWEST_SAMPLES = 32
"""Ranges from fewer samples depend on which ones they happen to be."""
COMPARED = 1 << 16
"""So many samples are compared with each other: memory must not grow with their number."""
COPIES_IN_100 = 1
PIXELS = (64, 255)
"""The largest value of samples that look like raw pixels lies above the first and not above the second."""
AMPLIFIED = 64.0
"""Whole pixels that a first layer turns into larger values than this are not what it was trained on: weights after the
usual initializations have rows of norm about 1 for inputs of variance 1, and 1/255 of it where pixels are divided
inside the network."""
NORMALIZED = (0.1, 50.0)
"""What a stated mean, std or scale has normalized spans more than the first and stays below the second."""


class Survey:
    """Extremes of every input and copies among the samples."""

    def __init__(self) -> None:
        self._extremes: dict[str, tuple[float, float]] = {}
        self._whole: dict[str, bool] = {}
        self._seen: set[bytes] = set()
        self._compared = 0
        self._count = 0

    def add(self, batch: Mapping[str, NDArray[np.generic]]) -> None:
        """Take in the rows of a batch."""
        for name, array in batch.items():
            if not array.size:
                continue
            lo, hi = float(array.min()), float(array.max())
            before = self._extremes.get(name, (lo, hi))
            self._extremes[name] = min(lo, before[0]), max(hi, before[1])
            whole = self._whole.get(name, True)
            self._whole[name] = whole and bool(np.array_equal(np.rint(array), array))
        rows = len(next(iter(batch.values())))
        self._count += rows
        for row in range(min(rows, COMPARED - self._compared)):
            digest = hashlib.blake2b(digest_size=8)
            for array in batch.values():
                digest.update(np.ascontiguousarray(array[row]).data)
            self._seen.add(digest.digest())
            self._compared += 1

    def of_samples(self) -> Iterator[str]:
        """What is odd about the samples as a set."""
        copies = self._compared - len(self._seen)
        if copies and copies * 100 >= COPIES_IN_100 * self._compared:
            yield (
                f"{copies} of {self._compared} samples are copies of others: they count twice and say nothing new"
            )
        if self._count < FEWEST_SAMPLES:
            yield (
                f"there {'is' if self._count == 1 else 'are'} only {self._count} sample{'s'[: self._count != 1]}: "
                f"ranges from fewer than {FEWEST_SAMPLES} depend on chance; 100 to 300 are usual"
            )

    def of_input(
        self, name: str, gain: float | None, prepared: Mapping[str, object]
    ) -> Iterator[str]:
        """What is odd about the values of an input, given its first layer's gain and its stated preparation."""
        lo, hi = self._extremes.get(name, (0.0, 1.0))
        from_to = f"input {name!r} goes from {lo:g} to {hi:g}"
        stated = [key for key in ("scale", "mean", "std") if key in prepared]
        if lo == hi:
            yield f"input {name!r} is {lo:g} in every sample: ranges found say little"
        elif not stated:
            raw = lo >= 0 and PIXELS[0] < hi <= PIXELS[1] and self._whole[name]
            if raw and gain is not None and gain * hi > AMPLIFIED:
                yield (
                    f"{from_to} like pixels that are not normalized, and the network's first layer does not divide "
                    "them: if it was trained on normalized ones, state scale, mean and std in a .toml description"
                )
        elif "std" in stated and max(-lo, hi) > NORMALIZED[1]:
            yield (
                f"{from_to} after the stated {_and(stated)}, which look made for smaller values: "
                "pixels from 0 to 255 take scale = 0.00392156862745098 as well"
            )
        elif hi - lo < NORMALIZED[0] and math.isfinite(hi - lo):
            yield (
                f"{from_to} after the stated {_and(stated)}: the samples seem to be normalized already"
            )


def _and(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
