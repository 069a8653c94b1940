"""The kernels of each kind of AArch64 core."""

from __future__ import annotations

from ..c.kernel import Kernel
from ..c.kernels import PORTABLE
from .depthwise import Depthwise
from .plan import DOT, MULTIPLY, PAIRS
from .products import Products

PLAIN: tuple[Kernel, ...] = (Products(MULTIPLY), Depthwise(dots=False), *PORTABLE)
"""For every core."""

DOTPROD: tuple[Kernel, ...] = (Products(DOT), Depthwise(dots=True), *PLAIN)
"""For cores with the dot product of Armv8.2."""

I8MM: tuple[Kernel, ...] = (Products(PAIRS), *DOTPROD)
"""For cores that multiply matrices of bytes."""
