"""Keep every bias and every rescale inside 32 bits by coarser weight scales, where they would not fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.pipeline import Context
from qcompile.plan import QuantPlan

from .layers import Linear, Rescaled, initializer, partition


@dataclass(frozen=True)
class Widen:
    """Every bias fits `bias_bits` bits at its accumulator's scale; no accumulator step is below 2**-28 output steps.

    A channel of very small weights under an ordinary bias (a dead filter, a folded BatchNorm) would otherwise
    overflow or saturate its bias; its weights lose precision instead, which such a channel does not miss.
    """

    name: ClassVar[str] = "widen"
    bias_bits: int = 29
    fuse_residual: bool = True

    def __call__(self, model: ir.Model, plan: QuantPlan, context: Context) -> bool:
        """Enlarge weight scales in the plan; name the layers in the log."""
        changed = False
        for layer in partition(model, fuse_residual=self.fuse_residual):
            if isinstance(layer, Rescaled):
                for term in layer.terms:
                    if isinstance(term, Linear) and self._widen(term, layer, plan):
                        changed = True
                        context.log(
                            f"widen: weight scales of {layer.name} enlarged so that its bias fits 32 bits"
                        )
        return changed

    def _widen(self, term: Linear, layer: Rescaled, plan: QuantPlan) -> bool:
        x, y, w = (plan.of(str(v.name)) for v in (term.x, layer.out, term.weight))
        if x is None or y is None or w is None:
            return False
        bias = np.zeros(1) if term.bias is None else np.asarray(initializer(term.bias), np.float64)
        need = np.maximum(
            np.abs(bias.ravel()) / (x.scale[0] * 2.0**self.bias_bits),
            y.scale[0] / x.scale[0] * 2.0**-28,
        )
        scale = np.array(w.scale, np.float64)
        if len(scale) == 1:
            need = need.max(keepdims=True)
        short = scale < need
        if not short.any():
            return False
        wider = np.where(short, np.nextafter(need.astype(np.float32), np.float32(np.inf)), scale)
        key = plan.owner(str(term.weight.name))
        assert key is not None
        plan.quantizers[key] = replace(
            w, scale=tuple(float(np.float32(s)) for s in np.broadcast_to(wider, scale.shape))
        )
        return True
