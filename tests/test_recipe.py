"""Recipes: the ones that ship can be read, and what people write wrong is said so."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from qcompile import recipe
from qcompile.errors import BadInput
from qcompile.formats import parse_format
from qcompile.passes.binary_point import BinaryPoint
from qcompile.passes.calibrate import Calibrate
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.correct import Correct
from qcompile.passes.equalize import Equalize
from qcompile.passes.fold import Fold
from qcompile.passes.outline import Outline
from qcompile.passes.place import Place
from qcompile.passes.refine import Refine
from qcompile.passes.round import Round
from qcompile.passes.shift import Shift
from qcompile.passes.widen import Widen
from qcompile.recipe import Recipe, Step, known_keys, one_of

PASSES = {
    p.name: p
    for p in (
        Fold,
        Outline,
        Canonicalize,
        Place,
        Equalize,
        Shift,
        Calibrate,
        Refine,
        Widen,
        BinaryPoint,
        Correct,
        Round,
    )
}
GOOD = """
summary = "what it is for"
residual = "int16"
requant = "shift"

[[pass]]
name = "fold"

[[pass]]
name = "calibrate"
method = "mse"
bins = 4096
"""


def test_what_a_recipe_says() -> None:
    assert recipe.parse(GOOD, "mine") == Recipe(
        "mine",
        "what it is for",
        (Step("fold"), Step("calibrate", {"method": "mse", "bins": 4096})),
        "int16",
        "shift",
    )
    assert recipe.parse("", "nothing") == Recipe("nothing", "", ())


def test_recipes_ship() -> None:
    assert recipe.names() == [
        "accurate",
        "auto",
        "data-free",
        "default",
        "fast",
        "fixed-point",
        "fixed-point-khot",
        "import",
    ]


@pytest.mark.parametrize("name", recipe.names())
def test_shipped_recipes_name_passes_and_options_that_are(name: str) -> None:
    found = recipe.load(name)
    assert found.name == name
    assert found.summary
    # a model that another tool has quantized rounds every operand of a sum
    assert found.residual == ("int8" if name == "import" else "accumulator")
    order = [s.name for s in found.steps]
    assert order == [n for n in PASSES if n in order]
    assert order[:4] == list(PASSES)[:4]
    for step in found.steps:
        for variant in filter(None, step.variants):
            kind = PASSES[step.name]
            assert set(variant.options) <= {f.name for f in fields(kind)}
            formats = {k: parse_format(str(v)) for k, v in variant.options.items() if k == "pool"}
            kind(**{**variant.options, **formats})


def test_recipe_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    assert recipe.load(path) == recipe.load(str(path)) == recipe.parse(GOOD, "mine")


BAD = {
    "deep nesting": ("x = " + "[" * 5000, "recipe r: "),
    "no TOML": ("summary = ", "recipe r: "),
    "misspelt key": ('sumary = "x"', "recipe r: unknown key 'sumary'; did you mean 'summary'"),
    "strange key": (
        "qqq = 1",
        "recipe r: unknown key 'qqq'; known: summary, pass, residual, requant, digits, shifts",
    ),
    "one pass without brackets": ("[pass]\nname = 'fold'", "entries have a name each"),
    "passes are texts": ("pass = ['fold']", "entries have a name each"),
    "nameless pass": ("[[pass]]\nmethod = 'mse'", "entries have a name each"),
    "misspelt residual": (
        "residual = 'int15'",
        "residual: 'int15' is unknown; did you mean 'int16'",
    ),
    "residual is a list": ("residual = []", "residual: .* choices: accumulator, int8, int16"),
    "strange requant": (
        "requant = 'qqq'",
        "requant: 'qqq' is unknown; choices: dyadic, shift, khot",
    ),
    "strange shifts": ("shifts = 'qqq'", "shifts: 'qqq' is unknown; choices: channel, layer"),
    "many digits": ("requant = 'khot'\ndigits = 4", "digits is 1 to 3, not 4"),
    "no digits": ("requant = 'khot'\ndigits = 0", "digits is 1 to 3, not 0"),
    "digits are a truth": ("requant = 'khot'\ndigits = true", "digits is 1 to 3, not True"),
    "digits of any multiplier": ("digits = 2", "digits are those of requant = 'khot'"),
    "one shift of powers of two": (
        "requant = 'shift'\nshifts = 'layer'",
        "a power of two for each channel is a shift for each channel",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_a_recipe_is_said(name: str) -> None:
    text, reason = BAD[name]
    with pytest.raises(BadInput, match=reason):
        recipe.parse(text, "r")


def test_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no recipe 'defualt'; did you mean default"):
        recipe.load("defualt")
    names = "accurate, auto, data-free, default, fast, fixed-point, fixed-point-khot, import"
    with pytest.raises(
        BadInput, match=rf"no recipe 'qqq'; recipes: {names}, or a path ending in \.toml"
    ):
        recipe.load("qqq")
    with pytest.raises(BadInput, match=r"missing\.toml"):
        recipe.load(tmp_path / "missing.toml")


def test_recipe_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="cannot read the recipe"):
        recipe.load(path)
    text = tmp_path / "recipe.txt"
    text.write_text(GOOD)
    with pytest.raises(BadInput, match=r"ending in \.toml"):
        recipe.load(text)
    folder = tmp_path / "folder.toml"
    folder.mkdir()
    with pytest.raises(BadInput, match=r"folder\.toml"):
        recipe.load(folder)


def test_known_keys() -> None:
    known_keys({"a": 1}, ("a", "b"), "here")
    with pytest.raises(BadInput, match="here: unknown key 'methd'; did you mean 'method'"):
        known_keys({"methd": 1}, ("method",), "here")


def test_one_of() -> None:
    assert one_of("mse", ("mse", "minmax"), "here") == "mse"
    with pytest.raises(BadInput, match="here: 'minmx' is unknown; did you mean 'minmax'"):
        one_of("minmx", ("mse", "minmax"), "here")
