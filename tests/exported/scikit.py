"""`python scikit.py FOLDER`: small networks as skl2onnx writes them (scikit-learn 1.9, skl2onnx 1.20)."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
from skl2onnx import to_onnx
from sklearn.decomposition import PCA
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, RobustScaler, StandardScaler


def main() -> None:
    """Write every network, trained for a moment."""
    warnings.simplefilter("ignore")
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(200, 8)) * 3 + 1).astype(np.float32)
    classes = (x[:, 0] + x[:, 1] > 2).astype(int) + (x[:, 2] > 3)
    networks = {
        "three-classes": (
            make_pipeline(StandardScaler(), MLPClassifier((12, 8), max_iter=30, random_state=0)),
            classes,
        ),
        "two-classes": (
            make_pipeline(RobustScaler(), MLPClassifier((6,), activation="logistic", max_iter=30, random_state=0)),
            classes > 0,
        ),
        "regressor": (
            make_pipeline(
                MinMaxScaler(), PCA(4),
                MLPRegressor(hidden_layer_sizes=(12,), activation="tanh", max_iter=30, random_state=0),
            ),
            x @ rng.normal(size=8),
        ),
    }  # fmt: skip
    for name, (network, wanted) in networks.items():
        network.fit(x, wanted)
        options = {id(network): {"zipmap": False}} if "classes" in name else None
        made = to_onnx(network, x[:1], options=options)
        (Path(sys.argv[1]) / f"sklearn-{name}.onnx").write_bytes(made.SerializeToString())


if __name__ == "__main__":
    main()
