"""Make this folder: trains the network by backpropagation through time, exports it and writes its data files."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import numpy as np
import onnx
import onnxruntime
from keywords import (
    CALIB_SAMPLES,
    CLASSES,
    COEFFICIENTS,
    FRAMES,
    SCALE,
    TRAIN_SAMPLES,
    samples,
)
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Floats = NDArray[np.float32]
Weights = dict[str, Floats]

HIDDEN = 32
EPOCHS, BATCH, RATE = 20, 50, 8e-3
_TINY = 1e-8


def initial(rng: np.random.Generator) -> Weights:
    """Random weights: W, R and their biases of the gates z, r, h one below the other, F and its bias of the logits."""
    bound = HIDDEN**-0.5

    def uniform(*shape: int) -> Floats:
        return rng.uniform(-bound, bound, shape).astype(np.float32)

    return {
        "W": uniform(3 * HIDDEN, COEFFICIENTS),
        "R": uniform(3 * HIDDEN, HIDDEN),
        "Wb": np.zeros(3 * HIDDEN, np.float32),
        "Rb": np.zeros(3 * HIDDEN, np.float32),
        "F": uniform(len(CLASSES), HIDDEN),
        "Fb": np.zeros(len(CLASSES), np.float32),
    }


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(-x))."""
    return (0.5 + 0.5 * np.tanh(0.5 * x)).astype(np.float32)


def gradients(p: Weights, x: Floats, y: NDArray[np.int64]) -> tuple[float, Weights]:
    """Cross entropy of the last state's logits and its derivative with respect to every weight."""
    cut = (HIDDEN, 2 * HIDDEN)
    rows = np.arange(len(x))
    h = np.zeros((len(x), HIDDEN), np.float32)
    sums = x @ p["W"].T + p["Wb"]
    tape = []
    for t in range(FRAMES):
        inner = h @ p["R"].T + p["Rb"]
        az, ar, an = np.split(sums[:, t], cut, axis=1)
        bz, br, bn = np.split(inner, cut, axis=1)
        z, r = sigmoid(az + bz), sigmoid(ar + br)
        new = np.tanh(an + r * bn)
        tape.append((h, z, r, new, bn))
        h = (1 - z) * new + z * h
    logits = h @ p["F"].T + p["Fb"]
    logits -= logits.max(axis=1, keepdims=True)
    share = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    loss = -float(np.log(share[rows, y] + _TINY).mean())

    share[rows, y] -= 1
    share /= len(x)
    d_sums, d_inner = np.empty_like(sums), np.empty_like(sums)
    dh = share @ p["F"]
    d_recurrent = np.zeros_like(p["R"])
    for t in reversed(range(FRAMES)):
        before, z, r, new, bn = tape[t]
        dn = dh * (1 - z) * (1 - new * new)
        dz = dh * (before - new) * z * (1 - z)
        dr = dn * bn * r * (1 - r)
        d_sums[:, t] = np.concatenate((dz, dr, dn), axis=1)
        d_inner[:, t] = np.concatenate((dz, dr, dn * r), axis=1)
        d_recurrent += d_inner[:, t].T @ before
        dh = dh * z + d_inner[:, t] @ p["R"]
    found = {
        "W": np.einsum("ntg,nti->gi", d_sums, x, optimize=True),
        "R": d_recurrent,
        "Wb": d_sums.sum(axis=(0, 1)),
        "Rb": d_inner.sum(axis=(0, 1)),
        "F": share.T @ h,
        "Fb": share.sum(axis=0),
    }
    return loss, found


def fit(x: Floats, y: NDArray[np.int64]) -> Weights:
    """Adam with a rate that rises and falls; the schedule is fixed and sees no evaluation sample."""
    rng = np.random.default_rng(0)
    mean, std = x.mean(axis=(0, 1)), x.std(axis=(0, 1))
    # Adam's steps are alike for all weights, so it sees features of one size; W takes the scale back below.
    x = (x - mean) / std
    p = initial(rng)
    first = {k: np.zeros_like(v) for k, v in p.items()}
    second = {k: np.zeros_like(v) for k, v in p.items()}
    total, step = EPOCHS * (len(x) // BATCH), 0
    for epoch in range(EPOCHS):
        losses = []
        for chosen in rng.permutation(len(x)).reshape(-1, BATCH):
            step += 1
            loss, found = gradients(p, x[chosen], y[chosen])
            losses.append(loss)
            size = np.sqrt(sum(float((g * g).sum()) for g in found.values()))
            rate = RATE * min(1.0, step / (0.1 * total)) * 0.5 * (1 + np.cos(np.pi * step / total))
            for k, g in found.items():
                clipped = g * min(1.0, 1 / size)
                first[k] = 0.9 * first[k] + 0.1 * clipped
                second[k] = 0.99 * second[k] + 0.01 * clipped * clipped
                width = np.sqrt(second[k] / (1 - 0.99**step)) + _TINY
                p[k] -= (rate * first[k] / (1 - 0.9**step) / width).astype(np.float32)
        print(f"epoch {epoch + 1}: loss {np.mean(losses):.4f}")
    p["W"] = p["W"] / std
    p["Wb"] = p["Wb"] - p["W"] @ mean
    return p


def export(p: Weights, path: Path) -> None:
    """Write the network as PyTorch does one with batch_first: time to the front, GRU, its last state, a Gemm."""
    weights = {
        "gru.W": p["W"][None],
        "gru.R": p["R"][None],
        "gru.B": np.concatenate((p["Wb"], p["Rb"]))[None],
        "classify.weight": p["F"],
        "classify.bias": p["Fb"],
        "axes": np.array([0]),
    }
    nodes = [
        helper.make_node("Transpose", ["features"], ["frames"], "turn", perm=[1, 0, 2]),
        helper.make_node(
            "GRU",
            ["frames", "gru.W", "gru.R", "gru.B"],
            ["", "last"],
            "gru",
            hidden_size=HIDDEN,
            linear_before_reset=1,
        ),
        helper.make_node("Squeeze", ["last", "axes"], ["state"], "squeeze"),
        helper.make_node(
            "Gemm",
            ["state", "classify.weight", "classify.bias"],
            ["logits"],
            "classify",
            transB=1,
        ),
    ]
    shapes = {"features": ["N", FRAMES, COEFFICIENTS], "logits": ["N", len(CLASSES)]}
    features, logits = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    )
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "keywords-gru", [features], [logits], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def dataset(file: str, *, labelled: bool) -> str:
    """The TOML description of a data file."""
    labels = 'labels = "y"\nmetric = "top1"\n' if labelled else ""
    return f'file = "{file}"\n{labels}\n[inputs.features]\nkey = "x"\nscale = {SCALE}\n'


def make(folder: Path) -> None:
    """Train the network and fill its folder: model, data, data descriptions, accuracy."""
    codes, labels = samples()
    features = codes * np.float32(SCALE)
    train, held_out = slice(None, TRAIN_SAMPLES), slice(TRAIN_SAMPLES, None)
    export(fit(features[train], labels[train]), folder / "model.onnx")

    np.savez_compressed(folder / "calib.npz", x=codes[:CALIB_SAMPLES])
    np.savez_compressed(folder / "eval.npz", x=codes[held_out], y=labels[held_out])
    (folder / "calib.toml").write_text(dataset("calib.npz", labelled=False))
    (folder / "eval.toml").write_text(dataset("eval.npz", labelled=True))

    session = onnxruntime.InferenceSession(folder / "model.onnx")
    (logits,) = session.run(["logits"], {"features": features[held_out]})
    correct = int((logits.argmax(axis=1) == labels[held_out]).sum())
    count = len(logits)
    (folder / "model.toml").write_text(
        f'[accuracy]\nmetric = "top1"\ncorrect = {correct}\nsamples = {count}\n'
    )
    print(f"{folder.name}: {correct} of {count}")


if __name__ == "__main__":
    make(Path(__file__).resolve().parent)
