"""ONNX's own tests of every operator: as docs/operators.md says, and the same from C on x86 and AArch64."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from qcompile.ir import Graph
from tests.native import ZIG, check
from tests.node_cases import NAMED, PAGE, Outcome, attempt, by_operator, refusals, row

SHARDS = 12


@cache
def outcomes(operator: str) -> tuple[Outcome, ...]:
    return tuple(map(attempt, by_operator()[operator]))


@pytest.mark.parametrize("shard", range(SHARDS))
def test_cases_are_as_the_page_says(shard: int) -> None:
    lines = PAGE.read_text().splitlines()
    for operator in list(by_operator())[shard::SHARDS]:
        found = outcomes(operator)
        off = {o.case.name: o.error for o in found if not o.passed and not o.refused}
        assert not off, off
        if any(o.passed for o in found):
            assert row(operator, found) in lines
        for line in refusals(operator, found):
            assert line in lines
        assert operator not in NAMED or any(o.passed for o in found)


def graphs(shard: int, of: int) -> list[Graph]:
    """The first and the last passing case of every operator of a shard."""
    picked: list[Graph] = []
    for operator in sorted(NAMED)[shard::of]:
        passing = [o.graph for o in outcomes(operator) if o.graph is not None]
        picked += passing[:1] + passing[1:][-1:]
    return picked


@pytest.mark.parametrize("shard", range(2))
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_c_equals_the_graph(tmp_path: Path, machine: str, shard: int) -> None:
    if machine == "x86_64":
        check(graphs(shard, 2), tmp_path)
        return
    compiler = (*ZIG, "-target", "aarch64-linux-musl", "-O1")
    check(graphs(shard, 2), tmp_path, compiler=compiler, emulator=("qemu-aarch64",))
