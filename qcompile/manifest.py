"""What a compilation was made from and what it made: enough to make it again and compare every byte."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path

from qcompile.errors import BadInput
from qcompile.options import Options

VERSION = 1
MANIFEST_FILE = "manifest.json"
FOLDING_FILE = "folding.json"
"""Beside the manifest of a design: how each layer is folded."""
TUNING_FILE = "tuning.json"
"""Beside the manifest of a program: the tiles of its layers, as they were measured."""
MEASURED = frozenset({"report.json", "report.html", "manifest.json"})
"""Files that hold what was observed on a machine; they are not compared byte by byte."""

Json = dict[str, object]


@dataclass(frozen=True, slots=True)
class Reproduction:
    """Every hashed file of a compilation against the same file made again: same, differs or missing."""

    files: tuple[tuple[str, str], ...]

    @property
    def identical(self) -> bool:
        """Is every byte the same?"""
        return bool(self.files) and all(state == "same" for _, state in self.files)


def sha256(content: bytes) -> str:
    """The hexadecimal digest of some bytes."""
    return hashlib.sha256(content).hexdigest()


def describe(
    *,
    name: str,
    model_file: str | None,
    model_sha256: str,
    input_dims: Mapping[str, int],
    target: str,
    cpu: str,
    recipe: str,
    recipe_sha256: str,
    options: Options,
    data: Json,
    files: Mapping[str, bytes],
) -> Json:
    """The manifest of a compilation; no clock, host or folder is in it."""
    kept = {k: v for k, v in asdict(options).items() if k != "plan"}
    kept["overrides"] = dict(options.overrides)
    kept["encodings"] = None if options.encodings is None else str(options.encodings)
    kept["folding"] = None if options.folding is None else FOLDING_FILE
    kept["tune"] = None if options.tune is None else TUNING_FILE
    return {
        "version": VERSION,
        "qcompile": metadata.version("qcompile"),
        "name": name,
        "model": {"file": model_file, "sha256": model_sha256, "input_dims": dict(input_dims)},
        "target": target,
        "cpu": cpu,
        "recipe": {"name": recipe, "sha256": recipe_sha256},
        "options": kept,
        "data": data,
        "versions": {
            p: metadata.version(p)
            for p in ("numpy", "onnx", "onnxruntime", "onnx-ir", "onnxscript")
        },
        "files": {path: sha256(files[path]) for path in sorted(files) if path not in MEASURED},
    }


def read(path: Path) -> Json:
    """A manifest from its file; BadInput if it is none."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as e:
        raise BadInput(f"cannot read the manifest {path}: {e}") from e
    if not isinstance(data, dict) or data.get("version") != VERSION:
        raise BadInput(f"{path} is no manifest of version {VERSION}")
    for key, kind in (("name", str), ("model", dict), ("target", str), ("cpu", str), ("recipe", dict),
                      ("options", dict), ("files", dict)):  # fmt: skip
        if not isinstance(data.get(key), kind):
            raise BadInput(f"{path}: '{key}' is missing or of the wrong kind")
    return data


def options_of(data: Json, plan: Path | None) -> Options:
    """The options a manifest records, starting from `plan` where one is given."""
    given = data["options"]
    assert isinstance(given, dict)
    known = {f.name for f in fields(Options)} - {"plan"}
    unknown = sorted(set(given) - known)
    if unknown:
        raise BadInput(f"the manifest has options this version does not know: {', '.join(unknown)}")
    try:
        return Options(**given, plan=plan)
    except TypeError as e:
        raise BadInput(f"the manifest's options are damaged: {e}") from e


def compare(data: Json, folder: Path) -> Reproduction:
    """The files a manifest names against those in a folder."""
    wanted = data["files"]
    assert isinstance(wanted, dict)
    rows = []
    for path, digest in sorted(wanted.items()):
        file = folder / path
        state = (
            "missing"
            if not file.is_file()
            else "same"
            if sha256(file.read_bytes()) == digest
            else "differs"
        )
        rows.append((path, state))
    return Reproduction(tuple(rows))
