"""Layers of the float network that are out of proportion with the rest of it: damaged before anything was rounded.

Such a network quantizes well, because the codes follow its ranges, so no error shows it. Two things do: how much a
layer amplifies, by its weights and by what it makes of the data, against the layers around it, which training holds
within a factor of ten of each other; and, in a first layer, whose input has a unit of its own, how far the results are
from the biases that were trained with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.onnx.execute import FloatSession
from qcompile.report.facts import Finding

from .layers import Linear, Rescaled, partition

ROWS = 4
"""Samples that the layers are looked at on."""
TIMES = 16.0
"""In the lesser of both ratios sound networks stay below 7, a layer scaled by 100 is above 26 (docs/decisions.md)."""
BIASES = 40.0
"""A sound first layer's results are at most 20 times its biases, those of one scaled by 100 at least 60 times."""
FEWEST = 3
"""With fewer other layers there is nothing to compare with."""


@dataclass(frozen=True, slots=True)
class Gain:
    """How much one product with weights amplifies.

    `norm` is the Euclidean norm of the median output channel's weights, `gain` the root mean square of the results
    without bias over that of the operand; `biases` is the results over the biases, None where these are 0. The `first`
    layers are those that no other product feeds.
    """

    layer: str
    node: str
    weight: str
    norm: float
    gain: float
    biases: float | None
    first: bool


def out_of_proportion(model: ir.Model, rows: Mapping[str, NDArray[np.generic]]) -> list[Finding]:
    """The layers that stand out, the furthest first; none in a sound network."""
    return judged(list(gains(model, rows)))


def judged(found: Sequence[Gain]) -> list[Finding]:
    """What stands out among these."""
    listed = [f for g in found if (f := _drowns(g) if g.first else _amplifies(g, found))]
    return sorted(listed, key=lambda f: -f.times)


def gains(model: ir.Model, rows: Mapping[str, NDArray[np.generic]]) -> Iterator[Gain]:
    """Every product with weights, in order of execution, on these samples."""
    terms = [
        (layer.name, term)
        for layer in partition(model)
        if isinstance(layer, Rescaled)
        for term in layer.terms
        if isinstance(term, Linear)
    ]
    if not terms:
        return
    ends = [n for _, t in terms for n in (str(t.x.name), str(t.node.outputs[0].name))]
    biases = {str(t.node.outputs[0].name): _bias(t) for _, t in terms}
    energy, count = dict.fromkeys(ends, 0.0), dict.fromkeys(ends, 0)
    products = dict.fromkeys(biases, 0.0)
    session = FloatSession(model, list(dict.fromkeys(ends)), threads=1)
    for chunk in session.stream(rows):
        for name, values in chunk.items():
            real = values.astype(np.float64)
            energy[name] += float(np.square(real).sum())
            count[name] += real.size
            if name in biases:
                products[name] += float(np.square(real - biases[name]).sum())
    fed = _fed_by_a_product(model, terms)
    for layer, term in terms:
        x, y = str(term.x.name), str(term.node.outputs[0].name)
        operand, result = (energy[n] / max(count[n], 1) for n in (x, y))
        bias = float(np.square(biases[y]).mean())
        yield Gain(
            layer,
            str(term.node.name),
            str(term.weight.name),
            _norm(term),
            (products[y] / max(count[y], 1) / operand) ** 0.5 if operand > 0 else 0.0,
            (result / bias) ** 0.5 if bias > 0 else None,
            x not in fed,
        )


def _amplifies(g: Gain, found: Sequence[Gain]) -> Finding | None:
    others = [o for o in found if o is not g and not o.first and o.norm > 0 and o.gain > 0]
    if len(others) < FEWEST:
        return None
    norm, gain = (median(getattr(o, key) for o in others) for key in ("norm", "gain"))
    times = min(g.norm / norm, g.gain / gain)
    if not TIMES < times < math.inf:
        return None
    return Finding(
        "amplifies",
        g.layer,
        g.weight,
        times,
        f"layer {g.node} is out of proportion with the rest of the network: its weights are {g.norm / norm:,.0f} times "
        f"those of a typical layer, and its results {g.gain:,.0f} times its input, where a typical layer's are "
        f"{gain:,.2g} times; weights that were scaled by mistake, or that training let run away, look like this, and "
        "the program computes them as they are: check the weights of this layer in the float model",
    )


def _drowns(g: Gain) -> Finding | None:
    if g.biases is None or not BIASES < g.biases < math.inf:
        return None
    return Finding(
        "drowns",
        g.layer,
        g.weight,
        g.biases,
        f"layer {g.node}, which reads the network's input, is out of proportion: its results are {g.biases:,.0f} times "
        "its biases, where training leaves a few times; weights that were scaled by mistake look like this, and so do "
        "inputs that lack the normalization of the training: check this layer's weights and the samples",
    )


def _norm(term: Linear) -> float:
    weights = np.asarray(_constant(term.weight))
    rows = np.moveaxis(weights, term.channel_axis, 0).reshape(weights.shape[term.channel_axis], -1)
    return float(np.median([np.linalg.norm(row.astype(np.float64)) for row in rows]))


def _bias(term: Linear) -> NDArray[np.float64]:
    """In the shape that the results' channels ask for."""
    if term.bias is None:
        return np.zeros(1)
    bias = np.asarray(_constant(term.bias), np.float64)
    spatial = np.asarray(_constant(term.weight)).ndim - 2 if term.node.op_type == "Conv" else 0
    return bias.reshape(-1, *[1] * spatial)


def _constant(value: ir.Value) -> NDArray[np.generic]:
    if value.const_value is None:
        return np.zeros(1)
    return np.asarray(value.const_value.numpy())


def _fed_by_a_product(model: ir.Model, terms: Sequence[tuple[str, Linear]]) -> set[str]:
    """Values that a product with weights had a part in."""
    products = {term.node for _, term in terms}
    fed: set[str] = set()
    for node in model.graph:
        if node in products or any(v is not None and v.name in fed for v in node.inputs):
            fed.update(str(v.name) for v in node.outputs)
    return fed
