"""The sliding windows of Conv and the pools, with every attribute spelled out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qcompile.onnx.edit import dims, static


@dataclass(frozen=True, slots=True)
class Window:
    """Kernel, strides, dilations and pads (all begins, then all ends), one entry per spatial axis."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]

    @property
    def rank(self) -> int:
        """The number of spatial axes."""
        return len(self.kernel)

    def reach(self, axis: int) -> int:
        """How many elements one dilated kernel spans."""
        return self.dilations[axis] * (self.kernel[axis] - 1) + 1

    def outputs(self, size: Sequence[int]) -> tuple[int, ...]:
        """How many windows fit along each spatial axis of a tensor of this size."""
        return tuple(
            (n + self.pads[i] + self.pads[i + self.rank] - self.reach(i)) // self.strides[i] + 1
            for i, n in enumerate(size)
        )


def window(node: ir.Node, kernel: tuple[int, ...]) -> Window | None:
    """The window of a Conv or pool with `auto_pad` and `ceil_mode` resolved into pads.

    None where the spatial size is unknown and needed, or the pads are not what ONNX allows.
    """
    attributes, rank = node.attributes, len(kernel)
    strides = tuple(attributes.get_ints("strides") or (1,) * rank)
    dilations = tuple(attributes.get_ints("dilations") or (1,) * rank)
    pads = tuple(attributes.get_ints("pads") or (0,) * 2 * rank)
    shape = dims(node.inputs[0])
    size = None if shape is None else static(shape[2:])
    if size is None or not len(size) == len(strides) == len(dilations) == len(pads) // 2 == rank:
        return None
    auto = attributes.get_string("auto_pad", "NOTSET")
    plain = Window(kernel, strides, dilations, pads)
    if auto == "VALID":
        pads = (0,) * 2 * rank
    elif auto != "NOTSET":
        totals = [
            max((-(-n // strides[i]) - 1) * strides[i] + plain.reach(i) - n, 0)
            for i, n in enumerate(size)
        ]
        small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
        pads = (*large, *small) if auto == "SAME_LOWER" else (*small, *large)
    elif attributes.get_int("ceil_mode", 0):
        pads = _ceiled(plain, size)
    return Window(kernel, strides, dilations, pads)


def _ceiled(w: Window, size: tuple[int, ...]) -> tuple[int, ...]:
    """Pads with which rounding down yields as many windows as rounding up did."""
    ends = list(w.pads[w.rank :])
    for i, n in enumerate(size):
        span = n + w.pads[i] + ends[i] - w.reach(i)
        last = -(-span // w.strides[i])
        # A window that would start beyond the data and the left padding does not exist.
        if last * w.strides[i] >= n + w.pads[i]:
            last -= 1
        ends[i] += max(last * w.strides[i] - span, 0)
    return (*w.pads[: w.rank], *ends)
