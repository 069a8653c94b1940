"""The kernels for HVX, the vector extension of Hexagon."""

from __future__ import annotations

from ..c.kernel import Kernel
from ..c.kernels import PORTABLE
from .convolve import PixelLanes
from .dense import Dense
from .windows import Windows

KERNELS: tuple[Kernel, ...] = (PixelLanes(), Dense(), Windows(), *PORTABLE)
"""For chips with vectors of 128 bytes; the rest is portable."""
