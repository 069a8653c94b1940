"""Recipes: ordered lists of passes with options, written in TOML, independent of the target."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import resources
from pathlib import Path

from qcompile.errors import BadInput

RESIDUALS = ("accumulator", "int8", "int16")
REQUANTS = ("dyadic", "shift", "khot")
SHIFTS = ("channel", "layer")
MOST_DIGITS = 3
"""More signed digits than this in a multiplier cost more adders than a multiplication is worth."""


@dataclass(frozen=True, slots=True)
class Step:
    """One pass by name, with its options as written.

    An `optional` one is left out at first; it, and every entry of `otherwise` (options in place of those written), is
    taken only where that brings the network closer to float on samples held out.
    """

    name: str
    options: Mapping[str, object] = field(default_factory=dict)
    optional: bool = False
    otherwise: tuple[Mapping[str, object], ...] = ()

    @property
    def variants(self) -> tuple[Step | None, ...]:
        """The ways to do this step, the one to start from first; None leaves it out."""
        written = Step(self.name, self.options)
        others = tuple(Step(self.name, {**self.options, **o}) for o in self.otherwise)
        return (None, written, *others) if self.optional else (written, *others)

    def __str__(self) -> str:
        said = ", ".join(f"{k} = {v}" for k, v in self.options.items())
        return f"{self.name} ({said})" if said else self.name


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is done to the float graph and the plan, in order, and how sums are rescaled.

    `requant` says which multipliers there are: any of 16 bits (dyadic), powers of two (shift), or at most `digits`
    signed digits (khot); `shifts`, whether every channel has its own shift or all of a layer share one.
    """

    name: str
    summary: str
    steps: tuple[Step, ...]
    residual: str = "accumulator"
    requant: str = "dyadic"
    digits: int = 3
    shifts: str = "channel"


def names() -> list[str]:
    """The recipes that ship with qcompile."""
    folder = resources.files("qcompile.recipes")
    return sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".toml"))


def load(source: str | os.PathLike[str]) -> Recipe:
    """A shipped recipe by name, or a TOML file by path; BadInput says what is wrong with it."""
    text = str(source)
    if text in names():
        content = (resources.files("qcompile.recipes") / f"{text}.toml").read_text()
        return parse(content, text)
    path = Path(source)
    if path.suffix != ".toml" or not path.is_file():
        near = get_close_matches(text, names(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise BadInput(
            f"there is no recipe '{text}'; {hint}recipes: {', '.join(names())}, or a path ending in .toml"
        )
    try:
        return parse(path.read_text(), path.stem)
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"cannot read the recipe {path}: {e}") from e


def parse(text: str, name: str) -> Recipe:
    """Read a recipe; unknown keys are refused with the nearest known one."""
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise BadInput(f"recipe {name}: {e}") from e
    keys = ("summary", "pass", "residual", "requant", "digits", "shifts")
    known_keys(data, keys, f"recipe {name}")
    entries = data.get("pass", [])
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and "name" in e for e in entries
    ):
        raise BadInput(f"recipe {name}: [[pass]] entries have a name each")
    residual = one_of(data.get("residual", "accumulator"), RESIDUALS, f"recipe {name}: residual")
    requant = one_of(data.get("requant", "dyadic"), REQUANTS, f"recipe {name}: requant")
    shifts = one_of(data.get("shifts", "channel"), SHIFTS, f"recipe {name}: shifts")
    digits = data.get("digits", 3)
    if type(digits) is not int or not 1 <= digits <= MOST_DIGITS:
        raise BadInput(f"recipe {name}: digits is 1 to {MOST_DIGITS}, not {digits}")
    if "digits" in data and requant != "khot":
        raise BadInput(f"recipe {name}: digits are those of requant = 'khot'")
    if requant == "shift" and shifts == "layer":
        raise BadInput(
            f"recipe {name}: a power of two for each channel is a shift for each channel; "
            "take requant = 'khot' or 'dyadic' with shifts = 'layer'"
        )
    steps = tuple(_step(e, f"recipe {name}, pass {e['name']}") for e in entries)
    summary = str(data.get("summary", ""))
    return Recipe(name, summary, steps, residual, requant, digits, shifts)


def _step(entry: Mapping[str, object], where: str) -> Step:
    optional, otherwise = entry.get("optional", False), entry.get("otherwise", [])
    if not isinstance(optional, bool):
        raise BadInput(f"{where}: optional is true or false")
    if not isinstance(otherwise, list) or not all(isinstance(o, dict) for o in otherwise):
        raise BadInput(f"{where}: otherwise is a list of tables of options")
    options = {k: v for k, v in entry.items() if k not in ("name", "optional", "otherwise")}
    return Step(str(entry["name"]), options, optional, tuple(otherwise))


def known_keys(given: Mapping[str, object], known: tuple[str, ...], where: str) -> None:
    """Raise BadInput with a did-you-mean at the first key that is not known."""
    for key in given:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(known)}"
            raise BadInput(f"{where}: unknown key '{key}'{hint}")


def one_of(value: object, choices: tuple[str, ...], where: str) -> str:
    """The value as text if it is one of the choices, BadInput otherwise."""
    if value not in choices:
        near = get_close_matches(str(value), choices, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise BadInput(f"{where}: '{value}' is unknown; {hint}choices: {', '.join(choices)}")
    return str(value)
