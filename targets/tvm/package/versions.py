"""Which releases of TVM this package is for: others crash where nothing says why."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

PINS: Mapping[str, str] = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post0"}
"""TVM renames its interfaces in every release, and a newer ffi under this compiler is a segmentation fault."""

INSTALL = "pip install " + " ".join(f"'{name}=={version}'" for name, version in PINS.items())


def lacks() -> list[str]:
    """What is installed otherwise than it has to be, a sentence each; nothing is imported to find out."""
    found: list[str] = []
    for name, wanted in PINS.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            found.append(f"{name} is not installed")
            continue
        if version != wanted:
            found.append(f"{name} {version} is installed, and only {wanted} is known to work")
    return found
