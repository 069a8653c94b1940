"""`python -m tests.fuzz.guided KIND FOLDER [libFuzzer's options]`: one reader, guided by its branches."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["qcompile", "tomllib"]):
    from tests.fuzz import readers, seeds

LARGEST = 4096
_FIXED = ("-timeout=10", "-rss_limit_mb=3000", f"-max_len={LARGEST}", "-len_control=0")


def main() -> None:
    """Fuzz; libFuzzer ends the process."""
    kind, folder, *options = sys.argv[1:]
    seeds.write(kind, Path(folder))
    seeds.prepared()

    def mutator(content: bytes, largest: int, seed: int) -> bytes:
        if seed % 4 == 0:
            return atheris.Mutate(content, largest)
        made = readers.mutated(kind, content, random.Random(seed))
        return made if len(made) <= largest else content

    arguments = ["fuzz", folder, *_FIXED, *options]
    atheris.Setup(arguments, readers.TARGETS[kind], custom_mutator=mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
