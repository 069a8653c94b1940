"""Number formats: what the values of a quantized tensor may be."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qcompile.errors import BadInput


@dataclass(frozen=True, slots=True)
class Int:
    """A two's complement or unsigned integer of `bits` bits; `narrow` leaves out the lowest code.

    A narrow signed format is symmetric: int8 narrow is [-127, 127].
    """

    bits: int
    signed: bool = True
    narrow: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 32:
            raise BadInput(f"integer formats have 2 to 32 bits, not {self.bits}")

    @property
    def lo(self) -> int:
        """The smallest code."""
        return (-(1 << (self.bits - 1)) if self.signed else 0) + int(self.narrow)

    @property
    def hi(self) -> int:
        """The largest code."""
        return (1 << (self.bits - int(self.signed))) - 1

    @property
    def levels(self) -> int:
        """How many codes there are."""
        return self.hi - self.lo + 1

    def __str__(self) -> str:
        return f"{'' if self.signed else 'u'}int{self.bits}{'-narrow' if self.narrow else ''}"


def parse_format(text: str) -> Int:
    """Return the format that `text` names (`int8`, `uint8`, `int4-narrow`); `BadInput` otherwise."""
    match = re.fullmatch(r"(u?)int(\d{1,2})(-narrow)?", text.strip())
    if match is None:
        raise BadInput(f"'{text}' is no number format; write int8, uint8, int4, int16 or the like")
    return Int(int(match[2]), signed=not match[1], narrow=match[3] is not None)
