"""The data of the digit networks: scikit-learn's bundled 8x8 images and their one split."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

EVAL_SAMPLES = 400
CALIB_SAMPLES = 256


def samples() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """All images as [1797, 1, 8, 8] with pixels k / 16 in [0, 1], and their digits."""
    digits = load_digits()
    return (digits.images / 16).astype(np.float32)[:, None], digits.target.astype(np.int64)


def split() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The indices of the training and of the evaluation samples: disjoint, together all of them."""
    order = np.random.default_rng(0).permutation(len(load_digits().target))
    return order[EVAL_SAMPLES:], order[:EVAL_SAMPLES]
