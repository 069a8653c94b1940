"""Turn a torch network into a shipped folder: train, export, write data and accuracy.

Development only: needs torch; the version that made the shipped files is in each README.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from digits import CALIB_SAMPLES, samples, split
from torch import nn

EPOCHS = 60
BATCH = 64


def shifted(images: torch.Tensor) -> torch.Tensor:
    """Each 8x8 image moved by -1, 0 or 1 pixels in both directions, zeros moving in."""
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    dy, dx = torch.randint(0, 3, (2, len(images), 1, 1))
    rows = torch.arange(8).view(1, 8, 1) + dy
    columns = torch.arange(8).view(1, 1, 8) + dx
    return padded[torch.arange(len(images)).view(-1, 1, 1), 0, rows, columns].unsqueeze(1)


def fit(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Train in place; on return the network is in evaluation mode.

    The schedule is fixed: nothing is chosen by looking at the evaluation samples.
    """
    steps = len(images) // BATCH
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1e-2, epochs=EPOCHS, steps_per_epoch=steps
    )
    loss = nn.CrossEntropyLoss(label_smoothing=0.05)
    network.train()
    for _ in range(EPOCHS):
        order = torch.randperm(len(images))[: steps * BATCH].view(steps, BATCH)
        for chosen in order:
            optimizer.zero_grad()
            loss(network(shifted(images[chosen])), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    network.eval()


def export(network: nn.Module, path: Path, *, keep_batchnorm: bool) -> None:
    """Write the network as ONNX, opset 17, with a free batch dimension N."""
    mode = torch.onnx.TrainingMode
    torch.onnx.export(
        network,
        (torch.zeros(1, 1, 8, 8),),
        str(path),
        # The TorchScript exporter is the one that can leave BatchNormalization in the graph.
        dynamo=False,
        opset_version=17,
        training=mode.PRESERVE if keep_batchnorm else mode.EVAL,
        do_constant_folding=not keep_batchnorm,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "N"}, "logits": {0: "N"}},
    )
    onnx.checker.check_model(str(path), full_check=True)


def dataset(file: str, *, labelled: bool) -> str:
    """The TOML description of a data file."""
    labels = 'labels = "y"\nmetric = "top1"\n' if labelled else ""
    return f'file = "{file}"\n{labels}\n[inputs.image]\nkey = "image"\n'


def make(folder: Path, network: Callable[[], nn.Module], *, keep_batchnorm: bool) -> None:
    """Train what `network` builds and fill its folder: model, data, data descriptions, accuracy."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    images, labels = samples()
    train, held_out = split()
    model = network()
    fit(model, torch.from_numpy(images[train]), torch.from_numpy(labels[train]))
    export(model, folder / "model.onnx", keep_batchnorm=keep_batchnorm)

    np.savez_compressed(folder / "calib.npz", image=images[train[:CALIB_SAMPLES]])
    np.savez_compressed(folder / "eval.npz", image=images[held_out], y=labels[held_out])
    (folder / "calib.toml").write_text(dataset("calib.npz", labelled=False))
    (folder / "eval.toml").write_text(dataset("eval.npz", labelled=True))

    session = onnxruntime.InferenceSession(folder / "model.onnx")
    (logits,) = session.run(["logits"], {"image": images[held_out]})
    correct = int((logits.argmax(axis=1) == labels[held_out]).sum())
    (folder / "model.toml").write_text(
        f'[accuracy]\nmetric = "top1"\ncorrect = {correct}\nsamples = {len(held_out)}\n'
    )
    second, first = np.sort(logits, axis=1)[:, -2:].T
    print(f"{folder.name}: {correct} of {len(held_out)}, closest call {np.min(first - second):.3f}")
