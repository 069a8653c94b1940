"""`python -m tests.fuzz.rounds network|damaged SEED SECONDS FOLDER`: round after round until the time is over.

What fails is left in the folder: for a network its model, minimal, and beside it what was raised.
"""

from __future__ import annotations

import contextlib
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded

from qcompile.ir import Graph
from tests.fuzz import chain, readers, seeds
from tests.fuzz.networks import Network, networks

HANG = 10.0
"""CPU seconds that nothing small may take."""

NETWORKS, WHOLE = 20, 20
"""Networks of a round; one of so many is compiled as a user does."""


class Hang(Exception):
    """It took longer than anything small may."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Raise Hang after so much CPU time, children's included once they have ended."""

    def late(*_: object) -> None:
        raise Hang(f"no end after {HANG} CPU seconds")

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    old = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, HANG)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, old)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if after.ru_utime - before.ru_utime > HANG:
        raise Hang(f"a child took {after.ru_utime - before.ru_utime:.0f} CPU seconds")


def network_round(seed: int, folder: Path) -> tuple[int, int]:
    """How many networks were tried and how many compiled; AssertionError once one is in the folder."""
    graphs: list[tuple[Network, Graph]] = []
    tried: list[Network] = []

    @seeded(seed)
    @settings(
        max_examples=NETWORKS, database=None, deadline=None, print_blob=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(networks())
    def run(network: Network) -> None:
        tried.append(network)
        with limited():
            made = chain.compiled(network)
        if isinstance(made, Graph):
            graphs.append((network, made))

    try:
        run()
    except BaseException:
        _keep(
            folder, f"network-{seed}", tried[-1].model, f"{tried[-1]!r}\n{traceback.format_exc()}"
        )
        raise
    try:
        chain.equal_in_c([g for _, g in graphs])
    except AssertionError:
        for network, graph in graphs:
            try:
                chain.equal_in_c([graph])
            except AssertionError:
                _keep(folder, f"c-{seed}", network.model, f"{network!r}\n{traceback.format_exc()}")
        raise
    chosen = tried[seed % len(tried)]
    try:
        chain.whole(chosen)
    except BaseException:
        _keep(folder, f"whole-{seed}", chosen.model, f"{chosen!r}\n{traceback.format_exc()}")
        raise
    return len(tried), len(graphs)


def damaged_round(seed: int, folder: Path) -> tuple[int, int]:
    """One of ONNX's own tests, changed; it lies in the folder while it is tried, in case the process dies."""
    rng = random.Random(seed)
    model = readers.mutated("model", rng.choice(list(_models())), rng)
    place = folder / f"damaged-{seed}.onnx"
    place.write_bytes(model)
    try:
        with limited():
            refused = chain.damaged(model, as_users_do=seed % 20 == 0)
    except BaseException:
        _keep(folder, f"damaged-{seed}", model, traceback.format_exc())
        raise
    place.unlink()
    return 1, int(refused is None)


_MODELS: list[bytes] = []


def _models() -> list[bytes]:
    if not _MODELS:
        _MODELS.extend(seeds.models())
    return _MODELS


def _keep(folder: Path, name: str, model: bytes, about: str) -> None:
    (folder / f"{name}.onnx").write_bytes(model)
    (folder / f"{name}.txt").write_text(about)


def main() -> None:
    """Run; the last line counts what was done."""
    kind, first, seconds, place = sys.argv[1:]
    folder = Path(place)
    folder.mkdir(parents=True, exist_ok=True)
    work = {"network": network_round, "damaged": damaged_round}[kind]
    seed, end, tried, made = int(first), time.monotonic() + float(seconds), 0, 0
    while time.monotonic() < end:
        done = work(seed, folder)
        tried, made, seed = tried + done[0], made + done[1], seed + 1
    print(f"{tried} tried, {made} compiled, next seed {seed}")


if __name__ == "__main__":
    main()
