"""Telling by its values which well-known function a body of operators computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import onnx.helper
import onnx.reference
import onnx_ir as ir
from numpy.typing import NDArray

Doubles = NDArray[np.float64]


def _sigmoid(x: Doubles) -> Doubles:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))


def _gelu_erf(x: Doubles) -> Doubles:
    from scipy.special import erf

    return np.asarray(0.5 * x * (1 + erf(x / np.sqrt(2))))


KNOWN: dict[str, Callable[[Doubles], Doubles]] = {
    "HardSigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1),
    "HardSwish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "Sigmoid": _sigmoid,
    "Tanh": np.tanh,
    "Silu": lambda x: x * _sigmoid(x),
    "QuickGelu": lambda x: x * _sigmoid(1.702 * x),
    "GeluErf": _gelu_erf,
    "GeluTanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "Mish": lambda x: x * np.tanh(np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)),
    "Softplus": lambda x: np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0),
    "Softsign": lambda x: x / (1 + np.abs(x)),
    "Square": np.square,
}
"""Name and meaning of the functions networks use."""

# Between these points the known functions differ by far more than float32 rounds.
_POINTS = np.linspace(-8, 8, 129)


def recognise(body: ir.Graph) -> str | None:
    """The name of the function that `body` computes, None if it is not a well-known one."""
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(
            [ir.to_proto(n) for n in body],
            "body",
            [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [len(_POINTS)])],
            [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [len(_POINTS)])],
        ),
        opset_imports=[onnx.helper.make_opsetid("", body.opset_imports[""])],
    )
    with np.errstate(all="ignore"):
        try:
            evaluator = onnx.reference.ReferenceEvaluator(proto)
            result = evaluator.run(["y"], {"x": _POINTS.astype(np.float32)})
        except Exception:
            # The reference lacks an operator or refuses a constant: a name is a nicety, not needed.
            return None
    y = np.asarray(cast("list[object]", result)[0], np.float64)
    for name, function in KNOWN.items():
        if np.allclose(y, function(_POINTS), rtol=2e-6, atol=2e-6):
            return name
    x = _POINTS
    slopes = y[x < 0] / x[x < 0]
    if np.allclose(y[x >= 0], x[x >= 0]) and np.ptp(slopes) < 1e-6:
        return "LeakyRelu"
    return None
