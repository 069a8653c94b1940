"""qcompile: from a float ONNX model to a verified integer-only program.

`qcompile.compile(model, target=..., calibration=...)` makes an `Artifact`; `qcompile.load(folder)` opens one.
Importing this package imports nothing heavy: each name is fetched when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qcompile.artifact import Artifact, load
    from qcompile.driver import compile
    from qcompile.errors import QcompileError
    from qcompile.options import Options
    from qcompile.verify import Mismatch, Verification

__all__ = ["Artifact", "Mismatch", "Options", "QcompileError", "Verification", "compile", "load"]

_HOMES = {
    "Artifact": "qcompile.artifact",
    "Mismatch": "qcompile.verify",
    "Options": "qcompile.options",
    "QcompileError": "qcompile.errors",
    "Verification": "qcompile.verify",
    "compile": "qcompile.driver",
    "load": "qcompile.artifact",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'qcompile' has no attribute '{name}'")
    from importlib import import_module

    found: object = getattr(import_module(_HOMES[name]), name)
    return found
