"""`python keras_.py FOLDER`: small networks as Keras writes them (keras 3.15, tensorflow 2.21, tf2onnx 1.17)."""

from __future__ import annotations

import sys
from pathlib import Path

import keras
import numpy as np
import onnx
from keras import layers as kl


def chain(shape: tuple[int, ...], *layers: keras.Layer) -> keras.Model:
    """One layer after another."""
    return keras.Sequential([keras.Input(shape), *layers])


def mobile() -> keras.Model:
    """An inverted residual with squeeze and excitation."""
    x = image = keras.Input((8, 8, 3))
    x = first = kl.ReLU(6.0)(
        kl.BatchNormalization()(kl.Conv2D(8, 3, strides=2, padding="same", use_bias=False)(x))
    )
    x = kl.Activation("swish")(kl.BatchNormalization()(kl.DepthwiseConv2D(3, padding="same")(x)))
    gate = kl.Dense(4, activation="relu")(kl.GlobalAveragePooling2D(keepdims=True)(x))
    x = kl.Multiply()([x, kl.Dense(8, activation="sigmoid")(gate)])
    x = kl.GlobalMaxPooling2D()(kl.Add()([first, x]))
    return keras.Model(image, kl.Dense(5, activation="softmax")(x))


def unet() -> keras.Model:
    """One step down, two ways up."""
    image = keras.Input((8, 8, 3))
    fine = kl.Conv2D(8, 3, padding="same", activation="elu")(image)
    coarse = kl.Conv2D(8, 3, padding="same", activation="selu")(kl.MaxPool2D()(fine))
    up = kl.UpSampling2D(2, interpolation="bilinear")(coarse)
    spread = kl.Conv2DTranspose(4, 3, strides=2, padding="same")(coarse)
    return keras.Model(
        image, kl.Conv2D(2, 1, activation="sigmoid")(kl.Concatenate()([fine, up, spread]))
    )


def networks() -> dict[str, keras.Model]:
    """All of them, the same weights every time."""
    keras.utils.set_random_seed(0)
    return {
        "mobile": mobile(),
        "unet": unet(),
        "lstm": chain((5, 8), kl.Bidirectional(kl.LSTM(6, return_sequences=True)), kl.TimeDistributed(kl.Dense(3))),
        "gru": chain((5, 8), kl.GRU(6, return_sequences=True), kl.GRU(4), kl.Dense(4)),
        "rnn": chain((5, 8), kl.SimpleRNN(5)),
        "signal": chain(
            (32, 4), kl.Conv1D(8, 5, strides=2, padding="same"), kl.LeakyReLU(), kl.SeparableConv1D(8, 3), kl.PReLU(),
            kl.MaxPool1D(2), kl.Flatten(), kl.Dense(3),
        ),
        "causal": chain(
            (32, 4), kl.Conv1D(8, 3, dilation_rate=2, padding="causal", activation="relu"), kl.ZeroPadding1D(1),
            kl.Cropping1D(2), kl.GlobalAveragePooling1D(),
        ),
        "curves": chain(
            (12,), kl.Dense(8, activation="softplus"), kl.Dense(8, activation="softsign"),
            kl.Dense(8, activation="hard_sigmoid"), kl.Dense(8, activation="mish"), kl.UnitNormalization(),
        ),
    }  # fmt: skip


def main() -> None:
    """Write every network."""
    for name, network in networks().items():
        path = Path(sys.argv[1]) / f"keras-{name}.onnx"
        # a network that never ran is not exported
        network(np.zeros((1, *network.inputs[0].shape[1:]), np.float32))
        network.export(path, format="onnx", verbose=False)
        onnx.save(onnx.load(path), path)


if __name__ == "__main__":
    main()
