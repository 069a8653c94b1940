"""`python -m tests.fuzz`: everything in turn for a while, each in a process of its own; docs/fuzzing.md says more."""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

from tests.fuzz.seeds import KINDS

NETWORKS = ("network", "damaged")
SLICE = 60.0
"""Seconds that one kind has before it is another's turn."""


def command(kind: str, turn: int, seconds: int, place: Path) -> list[str]:
    """What fuzzes a kind for so many seconds."""
    crashes = place / "crashes"
    if kind in NETWORKS:
        # no turn begins where another did: a round takes far longer than a hundredth of a second
        work = [kind, str(turn * int(100 * SLICE)), str(seconds), str(crashes)]
        return [sys.executable, "-m", "tests.fuzz.rounds", *work]
    corpus = place / kind
    corpus.mkdir(parents=True, exist_ok=True)
    limits = [f"-max_total_time={seconds}", f"-artifact_prefix={crashes}/{kind}-"]
    return [sys.executable, "-m", "tests.fuzz.guided", kind, str(corpus), *limits]


def main() -> None:
    """Run turn by turn; the exit code is 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long, by the clock")
    parser.add_argument(
        "--kinds", default=",".join((*KINDS, *NETWORKS)), help="what, comma-separated"
    )
    parser.add_argument("--folder", type=Path, default=Path("out/fuzz"), help="corpora and crashes")
    given = parser.parse_args()
    kinds = given.kinds.split(",")
    (given.folder / "crashes").mkdir(parents=True, exist_ok=True)
    end, turn, failed = time.monotonic() + 60 * given.minutes, 0, 0
    while time.monotonic() < end:
        kind = kinds[turn % len(kinds)]
        seconds = max(1, round(min(SLICE, end - time.monotonic())))
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        ran = subprocess.run(
            command(kind, turn, seconds, given.folder), capture_output=True, text=True, errors="replace"
        )  # fmt: skip
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(
            f"{kind}: {took:.0f} CPU seconds, {'clean' if ran.returncode == 0 else 'FAILED'}",
            flush=True,
        )
        if ran.returncode != 0:
            failed += 1
            print(ran.stderr[-3000:], flush=True)
        turn += 1
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    minutes = (used.ru_utime + used.ru_stime) / 60
    print(
        f"{turn} turns, {minutes:.1f} CPU minutes, {failed} failed; crashes are in {given.folder / 'crashes'}"
    )
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
