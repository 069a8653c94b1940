"""Decide the integer weights of every product for what the product makes, not for the weights themselves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.errors import BadInput
from qcompile.pipeline import Context
from qcompile.plan import QuantPlan

from . import learn as learning
from .adaquant import AdaQuant
from .adaround import AdaRound
from .descent import descend, quantease, quantease_clipped, search
from .flexround import FlexRound
from .gptq import gptq
from .layers import partition
from .prefix import Prefix, Site, spread
from .quadratic import MOST_INPUTS, Array, Moments, Problem, Rounded, to_codes

Method = Literal[
    "nearest",
    "descent",
    "quantease",
    "quantease-clipped",
    "gptq",
    "adaround",
    "flexround",
    "adaquant",
    "learned",
]
Target = Literal["weights", "regression", "auto"]

LEARNED = frozenset({"adaround", "flexround", "adaquant", "learned"})
EVIDENCE = 32
"""A regression needs this many rows for each input, or it follows the samples instead of the layer."""


@dataclass(frozen=True)
class Round:
    """Every product has integer weights that keep its output close to float on the quantized prefix, and such a bias.

    One pass over the layers: second moments of a layer's operands as the layers before it, already quantized, make
    them; integers by `method` at least squared output error toward the float weights, or toward those that a
    regression of the float output on these operands gives (`auto`: only below 8 bits and with rows enough). Below
    8 bits `fractions` scales per channel are tried. Learned methods run for `iterations` from nearest, are descended
    from, and are taken in the channels where that beats QuantEase; `learned` is FlexRound where scales are searched and
    QuantEase where they stay; in a rehearsal QuantEase stands in for all of them. The bias is the one that keeps the
    mean of the sum (closed form). Where a result of fewer than 8 bits is clamped at 0, its negative values need no
    exact value, only their sign: `rectified` times the regression is done again so. Moments are of at most `rows`
    positions, over at most `samples` samples spread over the data. With `digits` the integers are those with at most so
    many nonzero signed digits, and a product is a sum of as many shifted operands; without `scales` all scales stay.
    """

    name: ClassVar[str] = "round"
    method: Method = "descent"
    target: Target = "auto"
    bias: bool = True
    damp: float = 0.01
    fractions: int = 6
    digits: int | None = None
    scales: bool = True
    rectified: int = 0
    iterations: int = 2000
    rows: int = 32768
    samples: int = 512
    threads: int = 1
    fuse_residual: bool = True

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise BadInput(
                f"rounding method '{self.method}' is not one of {', '.join(get_args(Method))}"
            )
        if self.target not in get_args(Target):
            raise BadInput(
                f"rounding target '{self.target}' is not one of {', '.join(get_args(Target))}"
            )
        if self.digits is not None and (
            self.digits < 1 or self.method not in ("descent", "quantease")
        ):
            raise BadInput("rounding to digits, at least 1, is by descent or quantease")
        if not 0.0 < self.damp <= 1.0:
            raise BadInput(f"damp lies above 0 and up to 1, {self.damp} does not")
        if min(self.fractions, self.rows, self.samples, self.iterations) < 1 or self.rectified < 0:
            raise BadInput(
                "fractions, rows, samples and iterations are at least 1, rectified at least 0"
            )

    def __call__(self, model: ir.Model, plan: QuantPlan, context: Context) -> bool:
        """Set the codes, and with `bias` the biases, of the plan; scales too where they were searched."""
        if context.samples is None:
            raise BadInput("rounding needs data; give --calib")
        prefix = Prefix(
            model,
            plan,
            spread(context.samples, self.samples),
            seed=context.seed,
            threads=self.threads,
            fuse_residual=self.fuse_residual,
            fit_bias=self.bias,
        )
        stands_in = context.rehearsal and self.method in LEARNED
        method = replace(self, method="quantease") if stands_in else self
        count = len(partition(model, fuse_residual=self.fuse_residual))
        for done, (_, sites) in enumerate(prefix.steps(), 1):
            for site in sites:
                if site.weight in plan.codes or self.method == "nearest":
                    continue
                inputs = site.weights.shape[2]
                if inputs > MOST_INPUTS:
                    context.log(
                        f"round: {site.weight} is rounded to nearest: it has {inputs} inputs"
                    )
                    if self.digits is not None:
                        plan.codes[site.weight] = self._nearest(site)
                    continue
                context.log(f"round: {site.weight}, layer {done} of {count}")
                method._decide(site, plan, context)
        return True

    def _decide(self, site: Site, plan: QuantPlan, context: Context) -> None:
        """Codes of one weight, and its scales where they were searched; from the store if they are known."""
        key = f"{self!r} {site.product}"
        found = context.store.load(key)
        if found is None:
            rounded = self._rounded(site, context.seed)
            found = {"codes": site.shaped(rounded.codes), "scale": rounded.scale.ravel()}
            context.store.save(key, found)
        plan.codes[site.weight] = found["codes"].astype(np.int8)
        if self._searches(site):
            scale = tuple(float(s) for s in found["scale"])
            plan.quantizers[site.weight] = replace(site.w, scale=scale)

    def _nearest(self, site: Site) -> NDArray[np.int8]:
        fmt = site.w.format
        steps = site.weights / site.scale[..., None]
        return site.shaped(to_codes(steps, fmt.lo, fmt.hi, self.digits))

    def _searches(self, site: Site) -> bool:
        return self.scales and site.w.format.bits < 8 and site.w.per_channel

    def _rounded(self, site: Site, seed: int) -> Rounded:
        weights, fmt = site.weights, site.w.format
        moments = Moments()
        for x, y in site.rows(self.rows):
            moments.add(x, y)
        regress = self.target == "regression" or (
            self.target == "auto" and fmt.bits < 8 and moments.count >= EVIDENCE * weights.shape[2]
        )
        target = moments.regressed(weights, self.damp) if regress else weights
        problem = Problem(moments.hessian, target, fmt.lo, fmt.hi, self.digits).damped(self.damp)
        found = self._solved(problem, site, seed)
        hides = regress and site.layer.clamp.lo == 0.0 and site.y.format.bits < 8
        for _ in range(self.rectified if hides else 0):
            found = self._solved(self._hidden(site, moments, found), site, seed)
        return found

    def _solved(self, problem: Problem, site: Site, seed: int) -> Rounded:
        if not self._searches(site):
            return self._at(problem, site.scale, False, seed)
        reach = np.abs(problem.target).max(axis=2)
        widest = np.where(reach > 0, reach / problem.hi, site.scale)
        fractions = tuple(np.linspace(0.5, 1.0, self.fractions)) if self.fractions > 1 else (1.0,)
        found = search(problem, widest, fractions)
        if self.method != "descent":
            found = found.or_better(self._at(problem, found.scale, True, seed))
        kept = np.maximum(found.scale.astype(np.float32), np.finfo(np.float32).tiny).astype(
            np.float64
        )
        return descend(problem, kept, found.codes)

    def _at(self, problem: Problem, scale: Array, free: bool, seed: int) -> Rounded:
        """Codes at a scale, by the recipe's method; learned methods move the scale too where it is `free`."""
        match self.method:
            case "gptq":
                return gptq(problem, scale)
            case "quantease":
                return quantease(problem, scale)
            case "quantease-clipped":
                return quantease_clipped(problem, scale)
            case "adaround":
                return self._learned(problem, AdaRound(), scale, free, seed)
            case "flexround":
                return self._learned(problem, FlexRound(), scale, free, seed)
            case "adaquant":
                return self._learned(problem, AdaQuant(), scale, free, seed)
            case "learned" if free:
                return self._learned(problem, FlexRound(), scale, free, seed)
            case "learned":
                return quantease(problem, scale)
            case _:
                return descend(problem, scale)

    def _learned(
        self, problem: Problem, method: learning.Method, scale: Array, free: bool, seed: int
    ) -> Rounded:
        """Learned from nearest, then descended (better at every width than learning from descent), or QuantEase."""
        bias = np.zeros(scale.shape)
        start = learning.nearest(problem.target, scale, bias, problem.lo, problem.hi)
        loss = learning.Quadratic(problem.hessian, problem.target)
        posed = learning.Problem(problem.target, start, problem.lo, problem.hi, loss, free)
        made = learning.learn(posed, method, learning.Adam(self.iterations), seed).rounding
        return quantease(problem, scale).or_better(descend(problem, made.scale, made.codes))

    def _hidden(self, site: Site, moments: Moments, found: Rounded) -> Problem:
        """The problem in which a negative pre-activation needs no exact value, only its sign (one MM step)."""
        weights = found.codes * found.scale[..., None]
        bias = moments.mean_y - np.einsum("gok,gk->go", weights, moments.mean_x)
        rectified = Moments()
        for x, y in site.rows(self.rows):
            made = x @ weights.transpose(0, 2, 1) + bias[:, None]
            rectified.add(x, np.where(y > 0, y, np.minimum(made, 0.0)).astype(np.float32))
        target = rectified.regressed(site.weights, self.damp)
        fmt = site.w.format
        return Problem(rectified.hessian, target, fmt.lo, fmt.hi, self.digits).damped(self.damp)
