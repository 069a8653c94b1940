"""The shape of the project: packages, weight of an import, who may import whom, docstrings of public things."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"qcompile": "qcompile", "qcompile.passes": "passes", "qcompile.targets": "targets"}


def modules() -> dict[str, Path]:
    """Every module of the project by its import name."""
    found = {}
    for package, folder in ROOMS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((package, *parts))] = path
    return found


MODULES = modules()


def imports(module: str, path: Path) -> Iterator[str]:
    """The full names of everything a module imports when it runs, also inside functions."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text(), str(path))
    for_the_checker = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in for_the_checker:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def room(module: str) -> str:
    return next((r for r in ("passes", "targets") if within(module, f"qcompile.{r}")), "core")


def test_packages_are_the_folders_with_an_init() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["package-dir"] == ROOMS
    folders = [name for name, path in MODULES.items() if path.name == "__init__.py"]
    assert sorted(settings["packages"]) == sorted(folders)
    orphans = [n for n in MODULES if n != "qcompile" and n.rpartition(".")[0] not in folders]
    assert orphans == []


def test_type_checkers_see_the_rooms() -> None:
    for name in ("passes", "targets"):
        assert (ROOT / "typings" / "qcompile" / name).resolve() == ROOT / name


@pytest.mark.parametrize(
    "light",
    [
        "qcompile",
        "qcompile.errors",
        "qcompile.formats",
        "qcompile.plan",
        "qcompile.pipeline",
        "qcompile.target",
        *(name for name in MODULES if within(name, "qcompile.ir")),
    ],
)
def test_importing_the_core_is_light(light: str) -> None:
    """In an interpreter of its own: no model, solver or runtime library comes along."""
    heavy = [
        "onnx",
        "onnx_ir",
        "onnxruntime",
        "onnxscript",
        "scipy",
        "networkx",
        "torch",
        "sklearn",
    ]
    code = f"import sys, {light}; print(*(m for m in {heavy} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


@pytest.mark.parametrize("module", MODULES)
def test_who_may_import_whom(module: str) -> None:
    """Passes and targets do not know each other; the core names neither, but for the story in driver.py."""
    names = list(imports(module, MODULES[module]))
    forbidden = {
        "passes": ["qcompile.targets", "qcompile.driver", "qcompile.cli"],
        "targets": ["qcompile.passes", "qcompile.driver", "qcompile.cli"],
        "core": [] if module == "qcompile.driver" else ["qcompile.passes", "qcompile.targets"],
    }[room(module)]
    assert [n for n in names if any(within(n, f) for f in forbidden)] == []
    if room(module) == "core":
        relative = [
            node.lineno
            for node in ast.walk(ast.parse(MODULES[module].read_text()))
            if isinstance(node, ast.ImportFrom) and node.level
        ]
        assert relative == [], "the core imports by absolute names"


def test_the_import_rules_see_every_spelling(tmp_path: Path) -> None:
    """The guard itself: each line is one way to reach a target."""
    for line in (
        "import qcompile.targets.x86 as t",
        "from qcompile.targets import x86",
        "from qcompile import targets",
        "from ..targets.x86 import target",
        "from .. import targets",
        "def f():\n    from qcompile.targets.c import emit",
        "if TYPE_CHECKING:\n    pass\nelse:\n    import qcompile.targets",
    ):
        path = tmp_path / "thief.py"
        path.write_text(line + "\n")
        found = list(imports("qcompile.passes.thief", path))
        assert any(within(n, "qcompile.targets") for n in found), line
    path.write_text(
        "from .linear import fold\nimport qcompile.target\n"
        "if TYPE_CHECKING:\n    from qcompile.targets import x86\n"
    )
    found = list(imports("qcompile.passes.thief", path))
    assert "qcompile.passes.linear.fold" in found
    assert not any(within(n, "qcompile.targets") for n in found)


Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def undocumented(tree: ast.Module) -> Iterator[str]:
    """Public classes, functions and methods without a docstring, and the module itself where it holds anything."""
    if tree.body and not ast.get_docstring(tree):
        yield "the module"
    rooms: list[tuple[str, ast.Module | ast.ClassDef]] = [("", tree)]
    for prefix, scope in rooms:
        for node in scope.body:
            if isinstance(node, Documented) and not node.name.startswith("_"):
                if not ast.get_docstring(node) and not overloaded(node):
                    yield f"{prefix}{node.name} in line {node.lineno}"
                if isinstance(node, ast.ClassDef):
                    rooms.append((f"{prefix}{node.name}.", node))


def overloaded(node: Documented) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "overload" for d in node.decorator_list)


@pytest.mark.parametrize("module", MODULES)
def test_public_things_have_a_docstring(module: str) -> None:
    assert list(undocumented(ast.parse(MODULES[module].read_text()))) == []


def test_a_missing_docstring_is_seen() -> None:
    text = '"""M."""\nclass A:\n    """A."""\n    def f(self): ...\n    def _g(self): ...\ndef h(): ...\n'
    assert list(undocumented(ast.parse(text))) == ["h in line 6", "A.f in line 4"]
    assert list(undocumented(ast.parse("x = 1"))) == ["the module"]
    assert list(undocumented(ast.parse(""))) == []
