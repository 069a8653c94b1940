"""Samples that are made up where none are given; every report marks them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from qcompile.data.dataset import Dataset, InputSpec, rows_per_batch
from qcompile.errors import BadInput

MADE_UP_SAMPLES = 64


def made_up(smooth: bool, inputs: Sequence[InputSpec], samples: int, seed: int) -> Dataset:
    """Seeded samples: smooth ones, or white noise."""
    for spec in inputs:
        if np.dtype(spec.dtype).kind != "f":
            raise BadInput(
                f"input {spec} is not float, its values cannot be made up: give data with --calib"
            )
        if any(not isinstance(n, int) for n in spec.shape[1:]):
            raise BadInput(f"input {spec} has open sizes: fix them with --input-dim, or give data")
    make = _smooth if smooth else _white

    def batches() -> Iterator[object]:
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
