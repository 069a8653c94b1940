"""Placeholder until the kernels land."""

from __future__ import annotations

from ..c.kernel import Kernel
from ..c.kernels import PORTABLE

KERNELS: tuple[Kernel, ...] = PORTABLE
