"""How names and numbers are shown to a person, on a terminal and on a page."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from typing import TypeGuard

NOTHING = "–"
_UNSEEN = frozenset({"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"})


def visible(text: str) -> str:
    r"""The text on one line, with every character that could act instead of being seen written as `\x1b`.

    Model strings are untrusted: terminal escapes, line ends, bidirectional overrides and lone surrogates.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(c) if unicodedata.category(c) in _UNSEEN else c for c in text)


def shown(value: object) -> str:
    """Any value of a report in a few words; what is not there is a dash."""
    match value:
        case None:
            return NOTHING
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return number(value)
        case str():
            return visible(value)
        case Sequence() if value and all(_is_number(v) for v in value) and len(value) > 4:
            return f"{shown(min(value))} … {shown(max(value))} ({len(value)} values)"
        case Sequence():
            return ", ".join(shown(v) for v in value) or NOTHING
        case _:
            return visible(str(value))


def short(name: object, longest: int) -> str:
    """The end of a name, which tells layers apart better than its beginning."""
    text = visible(str(name))
    return text if len(text) <= longest else f"…{text[1 - longest :]}"


def number(value: object, digits: int = 4) -> str:
    """A number with so many significant digits."""
    if not _is_number(value):
        return NOTHING
    if value != value:
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:.{digits}g}"


def exact(value: object) -> str:
    """A number with all its digits, as code needs it."""
    return repr(value) if _is_number(value) else shown(value)


def decibel(value: object) -> str:
    """A signal-to-noise ratio; `exact` where there is no noise at all."""
    if not _is_number(value) or value != value:
        return NOTHING
    if value == math.inf:
        return "exact"
    return f"{value:.1f}"


def percent(value: object, digits: int = 2) -> str:
    """A percentage, given in percent."""
    if not _is_number(value) or not math.isfinite(value):
        return NOTHING
    return f"{value:.{digits}f} %"


def fraction(value: object) -> str:
    """A share between 0 and 1, in percent."""
    return percent(100 * value) if _is_number(value) else NOTHING


def signed(value: object) -> str:
    """A difference, with its sign."""
    return f"{value:+.2f}" if _is_number(value) else NOTHING


def duration(nanoseconds: float) -> str:
    """A time, short: 812 ns, 18.2 us."""
    return _scaled(nanoseconds, 1000, (" ns", " us", " ms", " s"))


def amount(value: object) -> str:
    """A count, short: 812, 530.4 k, 3.87 G."""
    return _scaled(value, 1000, ("", " k", " M", " G", " T"))


def size(value: object) -> str:
    """A number of bytes, short: 812 B, 18.2 KiB."""
    return _scaled(value, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def shape(value: object) -> str:
    """A shape as `N×3×8×8`."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return shown(value)
    return "×".join("N" if n is None else visible(str(n)) for n in value) or "scalar"


def _scaled(value: object, step: int, units: Sequence[str]) -> str:
    if not _is_number(value) or not math.isfinite(value):
        return NOTHING
    if abs(value) < step:
        return f"{value:g}{units[0]}"
    power = min(int(math.log(abs(value), step)), len(units) - 1)
    scaled = value / step**power
    if round(scaled, 1) >= step and power + 1 < len(units):
        scaled, power = scaled / step, power + 1
    return f"{scaled:.{2 if scaled < 10 else 1}f}{units[power]}"


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _escaped(c: str) -> str:
    code = ord(c)
    return (
        f"\\x{code:02x}"
        if code < 0x100
        else f"\\u{code:04x}"
        if code < 0x10000
        else f"\\U{code:08x}"
    )
