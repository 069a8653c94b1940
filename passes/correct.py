"""Biases, and with them weight scales, that give every product the statistics it has in the float network.

    sequential   the mean of every layer's sum, layer by layer on the quantized prefix: all errors before it are seen
    empirical    b' = b - (W_q - W) E[x], with E[x] from one run of the float network
    analytic     the same with E[x] from the BatchNormalizations before x, without data

After Nagel et al. 2019 (Data-Free Quantization Through Weight Equalization and Bias Correction, section 4.2 and
appendices B to D). The last two know the rounding of the weights only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.errors import BadInput, Unsupported
from qcompile.onnx.edit import constant, dims, operand, static
from qcompile.onnx.execute import FloatSession
from qcompile.pipeline import Context, Samples
from qcompile.plan import QuantPlan

from . import exact
from .codes import real_bias, weight_codes
from .fold import Normal, normals, pad_widths
from .layers import TABLES, Linear, Rescaled, initializer, partition
from .linear import floats
from .prefix import Prefix, Site, spread

Method = Literal["sequential", "empirical", "analytic"]
Statistics = Literal["mean", "mean-variance"]
Doubles = NDArray[np.float64]

MOST_GAIN = 2.0
"""A scale moves by no more than this factor either way, so that widen's proofs of 32 bits keep their room."""
QUADRATURE = 48
FAR = 40.0
"""Beyond so many standard deviations a normal has no mass in float64."""


@dataclass(frozen=True)
class Correct:
    """Every product's bias makes up for what quantization does to the mean of its output; codes stay as they are.

    With statistics `mean-variance`, `sequential` only, the scale of each channel's weights is also multiplied by the
    gain at which the quantized product is nearest to the float one in the mean square, where one product alone reads
    the weights and they have a scale per channel (after the per-channel reparametrization of Hubara et al. 2021,
    Improving Post Training Neural Quantization, section 3.4). The integers that this scales are recorded in the plan.
    Looked at are `samples` samples, spread over the data, at most, and for gains about `rows` positions of a product.
    Biases decided before are replaced.
    """

    name: ClassVar[str] = "correct"
    method: Method = "sequential"
    statistics: Statistics = "mean"
    samples: int = 512
    rows: int = 32768
    threads: int = 1
    fuse_residual: bool = True

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise BadInput(
                f"correct: method is one of {', '.join(get_args(Method))}, not '{self.method}'"
            )
        if self.statistics not in get_args(Statistics):
            raise BadInput(
                f"correct: statistics is one of {', '.join(get_args(Statistics))}, not '{self.statistics}'"
            )
        if self.statistics == "mean-variance" and self.method != "sequential":
            raise BadInput(
                f"correct: only method=sequential sees variances; {self.method} takes statistics=mean"
            )
        if min(self.samples, self.rows) < 1:
            raise BadInput("correct: samples and rows are at least 1")

    def __call__(self, model: ir.Model, plan: QuantPlan, context: Context) -> bool:
        """Fill `plan.biases`; with `mean-variance` also change weight scales."""
        if (slot := next(iter(plan.open_slots()), None)) is not None:
            raise BadInput(
                f"correct finds no scale for {slot.tensor}; put it behind calibrate in the recipe"
            )
        if self.method != "analytic" and context.samples is None:
            raise BadInput(
                f"correct by method={self.method} needs data; give --calib, or take method=analytic"
            )
        if self.method == "sequential":
            return self._sequential(model, plan, context)
        products = [
            term
            for layer in partition(model, fuse_residual=self.fuse_residual)
            if isinstance(layer, Rescaled)
            for term in layer.terms
            if isinstance(term, Linear) and initializer(term.x) is None
        ]
        if self.method == "analytic":
            means = expected(model, plan, products)
        else:
            assert context.samples is not None
            means = measured(model, products, context.samples, self.samples, self.threads)
        known = [term for term in products if str(term.x.name) in means]
        for term in known:
            product = str(term.node.outputs[0].name)
            bias = real_bias(term, QuantPlan())
            plan.biases[product] = bias - drift(term, plan, means[str(term.x.name)])
        if len(known) < len(products):
            context.log(
                f"correct: {len(products) - len(known)} of {len(products)} products keep their bias, "
                "because no BatchNormalization tells the mean of what they read"
            )
        return bool(known)

    def _sequential(self, model: ir.Model, plan: QuantPlan, context: Context) -> bool:
        assert context.samples is not None
        prefix = Prefix(
            model,
            plan,
            spread(context.samples, self.samples),
            seed=context.seed,
            threads=self.threads,
            fuse_residual=self.fuse_residual,
            fit_bias=True,
        )
        found = False
        for _, sites in prefix.steps():
            found |= bool(sites)
            if self.statistics == "mean-variance":
                for site in sites:
                    if site.w.per_channel and len(site.term.weight.uses()) == 1:
                        self._rescale(site, plan)
        return found

    def _rescale(self, site: Site, plan: QuantPlan) -> None:
        """Multiply the weight scales of a product by its gains, and record the codes they belong to."""
        codes = weight_codes(site.term, site.w, plan)
        scale = np.array(site.w.scale) * gains(site, codes, self.rows)
        rounded = np.maximum(scale.astype(np.float32), np.finfo(np.float32).tiny)
        plan.codes[site.weight] = codes.astype(np.int8)
        plan.quantizers[site.weight] = replace(
            site.w, scale=tuple(rounded.astype(np.float64).tolist())
        )


def gains(site: Site, codes: NDArray[np.int64], rows: int) -> Doubles:
    """The factor of each output channel that brings the product of codes nearest to the float one, up to a constant.

    cov(float, quantized) / var(quantized). Equal variances would take the square root of the ratio of variances
    instead, which puts noise power in the place of lost signal.
    """
    weights = site.grouped(codes.astype(np.float64)) * site.scale[..., None]
    sums = np.zeros((5, *site.scale.shape))
    for x, y in site.rows(rows):
        made, wanted = x @ weights.transpose(0, 2, 1), y.astype(np.float64)
        sums[0] += made.shape[1]
        for k, part in enumerate((made, wanted, made * made, made * wanted), 1):
            sums[k] += part.sum(axis=1)
    count, made, wanted, square, both = sums
    variance = square - made * made / count
    alive = variance > 1e-9 * square
    gain = np.ones_like(variance)
    gain[alive] = (both - made * wanted / count)[alive] / variance[alive]
    return np.asarray(np.clip(gain, 1 / MOST_GAIN, MOST_GAIN).ravel())


# --- the drift of a product whose weights are rounded ---------------------------------------------------------------


def drift(term: Linear, plan: QuantPlan, mean: Doubles) -> Doubles:
    """(W_q - W) E[x] per output channel, averaged over the positions of the product, borders of zeros included.

    `mean` is E[x] without the batch axis. A product is linear: the product of the mean is the mean of the product.
    """
    q = plan.of(str(term.weight.name))
    assert q is not None
    codes = np.moveaxis(weight_codes(term, q, plan), term.channel_axis, 0)
    weights = np.asarray(initializer(term.weight), np.float64)
    weights = np.moveaxis(weights, term.channel_axis, 0)
    scale = np.broadcast_to(np.array(q.scale), (len(codes),))
    error = codes * scale.reshape(-1, *(1,) * (codes.ndim - 1)) - weights
    seen = window_means(term.node, mean)
    grouped = error.reshape(len(seen), len(error) // len(seen), -1)
    return np.asarray(np.einsum("gok,gk->go", grouped, seen).ravel())


def window_means(node: ir.Node, mean: Doubles) -> Doubles:
    """What each input of a product's window is on average over all positions: [groups, inputs of a group]."""
    if node.op_type != "Conv":
        return np.asarray(mean.reshape(1, -1, mean.shape[-1]).mean(axis=1))
    a, rank = node.attributes, mean.ndim - 1
    kernel, strides, pads, dilations = (
        tuple(a.get_ints(key)) for key in ("kernel_shape", "strides", "pads", "dilations")
    )
    padded = np.pad(mean, [(0, 0), *zip(pads[:rank], pads[rank:], strict=True)])
    steps = list(zip(kernel, strides, dilations, padded.shape[1:], strict=True))
    places = [(n - d * (k - 1) - 1) // s + 1 for k, s, d, n in steps]
    taps = [
        padded[
            (
                slice(None),
                *(
                    slice(t * d, t * d + (m - 1) * s + 1, s)
                    for t, (_, s, d, _), m in zip(tap, steps, places, strict=True)
                ),
            )
        ].reshape(len(mean), -1)
        for tap in np.ndindex(*kernel)
    ]
    means = np.stack([tap.mean(axis=1) for tap in taps], axis=1)
    return means.reshape(a.get_int("group", 1), -1)


def measured(
    model: ir.Model, products: Iterable[Linear], samples: Samples, count: int, threads: int
) -> dict[str, Doubles]:
    """E[x] of what each product reads, element by element, from one run of the float model over `count` samples."""
    rank = {str(t.x.name): len(dims(t.x) or ()) - 1 for t in products}
    if not rank:
        return {}
    session = FloatSession(model, sorted(rank), threads)
    total: dict[str, Doubles] = {}
    seen = dict.fromkeys(rank, 0)
    for batch in spread(samples, count):
        for chunk in session.stream(batch):
            for name, array in chunk.items():
                rows = array.reshape(-1, *array.shape[array.ndim - rank[name] :])
                total[name] = total.get(name, 0.0) + rows.sum(axis=0, dtype=np.float64)
                seen[name] += len(rows)
    if not total:
        raise BadInput("correct needs at least one sample; the data set is empty")
    for name in total:
        total[name] /= seen[name]
        if not np.isfinite(total[name]).all():
            raise BadInput(f"the float model computes NaN or Inf at {name!r}; repair it")
    return total


# --- means without data ---------------------------------------------------------------------------------------------


def expected(model: ir.Model, plan: QuantPlan, products: Iterable[Linear]) -> dict[str, Doubles]:
    """E[x] of what each product reads, where BatchNormalizations tell it.

    Values behind a BatchNormalization are normal. What enters a Relu, a Clip or another function is taken for normal,
    the operands of a sum for independent; an average keeps the mean and has no spread.
    """
    known: dict[str, Normal] = {}
    for name, normal in normals(model.graph).items():
        known[name] = normal
        if (c := plan.channels.get(name)) is not None:
            known[name] = normal.affine(np.array(c.scale), np.array(c.shift))
    for node in model.graph:
        name = str(node.outputs[0].name)
        made = _curved(model, node, known) if _is_curve(node) else _through(node, known)
        if name not in known and made is not None:
            known[name] = made
    found: dict[str, Doubles] = {}
    for term in products:
        x, shape = known.get(str(term.x.name)), static((dims(term.x) or ())[1:])
        if x is None or not shape or len(x.mean) != shape[0] or term.node.op_type == "MatMul":
            continue
        column = x.mean.reshape(-1, *(1,) * (len(shape) - 1))
        found[str(term.x.name)] = np.broadcast_to(column, shape)
    return found


def _through(node: ir.Node, known: Mapping[str, Normal]) -> Normal | None:
    """What a node makes of normals, channel by channel of axis 1."""
    if node.domain:
        return None
    operands = [known.get(str(v.name)) for v in node.inputs if v is not None]
    x = operands[0] if operands else None
    match node.op_type:
        case "Concat" if node.attributes.get_int("axis", 0) == 1:
            parts = [n for n in operands if n is not None]
            if len(parts) < len(operands):
                return None
            return Normal(
                np.concatenate([n.mean for n in parts]),
                np.concatenate([n.deviation for n in parts]),
            )
        case _ if x is None:
            return None
        case "Relu":
            return clipped(x, 0.0, np.inf)
        case "Clip":
            lo, hi = floats(operand(node, 1)), floats(operand(node, 2))
            if lo is None or hi is None:
                return None
            return clipped(x, float(lo.reshape(())), float(hi.reshape(())))
        case "Identity":
            return x
        case "Add" | "Sub":
            y, shapes = operands[1], {dims(v) for v in node.inputs}
            if y is None or len(shapes) > 1:
                return None
            sign = -1 if node.op_type == "Sub" else 1
            return Normal(x.mean + sign * y.mean, np.hypot(x.deviation, y.deviation))
        case "AveragePool" | "GlobalAveragePool":
            if node.attributes.get_int("count_include_pad", 0):
                return None
            return Normal(x.mean, np.zeros_like(x.deviation))
        case "Reshape":
            return _flattened(node, x)
        case "Slice":
            axes = constant(operand(node, 3))
            return x if axes is not None and axes.min() > 1 else None
        case "Pad":
            return _padded(node, x)
    return None


def _is_curve(node: ir.Node) -> bool:
    return node.domain == "qcompile" or (not node.domain and node.op_type in TABLES)


def _curved(model: ir.Model, node: ir.Node, known: Mapping[str, Normal]) -> Normal | None:
    """Mean and standard deviation of a function of one normal, by Gauss-Hermite quadrature."""
    x = known.get(str(node.inputs[0].name)) if node.inputs[0] is not None else None
    if x is None:
        return None
    places, weights = np.polynomial.hermite_e.hermegauss(QUADRATURE)
    points = x.mean[:, np.newaxis] + x.deviation[:, np.newaxis] * places
    try:
        values = np.array(exact.unary(model, node, points.ravel().tolist()), np.float64)
    except Unsupported:
        # the logarithm of a normal has no mean
        return None
    values = values.reshape(points.shape)
    weights = weights / weights.sum()
    mean = values @ weights
    return Normal(mean, np.sqrt(np.maximum(np.square(values) @ weights - mean * mean, 0.0)))


def _padded(node: ir.Node, x: Normal) -> Normal | None:
    """Constant channels beside those that are known."""
    widths, value = pad_widths(node), floats(operand(node, 2))
    if widths is None or value is None:
        return None
    around = np.array(widths).reshape(2, -1).T
    if around[[0, *range(2, len(around))]].any():
        return None
    lo, hi = around[1].tolist()
    mean = np.pad(x.mean, (lo, hi), constant_values=float(value.reshape(())))
    return Normal(mean, np.pad(x.deviation, (lo, hi)))


def _flattened(node: ir.Node, x: Normal) -> Normal | None:
    """[N, C, ...] as [N, C * ...]."""
    before, after = (static((dims(v) or ())[1:]) for v in (node.inputs[0], node.outputs[0]))
    if not before or not after or len(after) != 1 or before[0] != len(x.mean):
        return None
    each = after[0] // before[0]
    return Normal(np.repeat(x.mean, each), np.repeat(x.deviation, each))


def clipped(x: Normal, lo: float, hi: float) -> Normal:
    """Mean and standard deviation of a normal clipped to [lo, hi] (Nagel et al. 2019, appendix C)."""
    from scipy.special import ndtr

    unit = np.where(x.deviation > 0, x.deviation, 1.0)
    a, b = (np.clip((bound - x.mean) / unit, -FAR, FAR) for bound in (lo, hi))
    below, above, inside = ndtr(a), ndtr(-b), ndtr(b) - ndtr(a)
    density_a, density_b = (np.exp(-z * z / 2) / np.sqrt(2 * np.pi) for z in (a, b))
    mean = a * below + b * above + density_a - density_b
    square = a * a * below + b * b * above + inside + a * density_a - b * density_b
    spread_ = np.sqrt(np.maximum(square - mean * mean, 0.0))
    return Normal(np.clip(x.mean + x.deviation * mean, lo, hi), x.deviation * spread_)
