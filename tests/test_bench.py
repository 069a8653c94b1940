"""`executed`: what an emulator counts, layer by layer, beside what the layers compute; and where time is asked."""

from __future__ import annotations

import platform
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.table import Table

from qcompile import bench
from qcompile import target as families
from qcompile.errors import ToolchainMissing
from qcompile.report import tables
from qcompile.target import Counts, LayerCount, Runner
from tests.targets.test_families import data, network


def place(folder: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output folder with a small CNN, opened as an artifact."""
    target, g = families.get(family), network()
    cpu = target.cpus[0]
    for name, content in target.lower(g, name="net", cpu=cpu, vectors=()).files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    def runner() -> Runner:
        return target.runner(folder, g, name="net", cpu=cpu)

    opened = SimpleNamespace(target=target, graph=g, name="net", cpu=cpu, runner=runner)
    monkeypatch.setattr(bench, "load", lambda folder: opened)
    return folder


@pytest.mark.parametrize("family", ["cortex-m3", "cortex-m55"])
def test_layers_are_counted_beside_their_work(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = place(tmp_path, family, monkeypatch)
    found = bench.executed(folder)
    macs = {"first": 12 * 12 * 8 * 27, "pool": 0, "second": 3 * 3 * 16 * 72, "dense": 10 * 144}
    assert found == bench.executed(folder)
    assert found.unit == "instructions"
    assert sorted(layer.macs for layer in found.layers) == sorted(macs.values())
    assert found.macs == sum(macs.values())
    assert all(layer.predicted > 0 for layer in found.layers)
    assert found.total == found.entry + sum(layer.executed for layer in found.layers)
    # The convolution with nineteen times the work of the dense layer executes more.
    most, least = (
        next(layer for layer in found.layers if layer.macs == macs[name])
        for name in ("first", "dense")
    )
    assert most.executed > least.executed > 100
    assert most.per_mac == most.executed / macs["first"]


def test_the_table_has_every_layer_and_the_total(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {'image */ #include "x"': next(iter(data(1).values()))}
    found = bench.executed(place(tmp_path, "cortex-m3", monkeypatch), row)
    columns = table_of(found).columns
    names, executed = ([str(cell) for cell in columns[i].cells] for i in (0, 4))
    assert names == [*(w.name for w in found.layers), "between layers", "total"]
    assert columns[4].header == "instructions"
    numbers = [int(cell.replace(",", "")) for cell in executed]
    assert sum(numbers[:-1]) == numbers[-1] == found.total


def test_a_layer_without_macs_has_no_rate() -> None:
    found = Counts("packets", 7, (LayerCount("pool", "pool", 0, 12, 9000),))
    assert found.layers[0].per_mac is None
    columns = table_of(found).columns
    assert [[str(cell) for cell in column.cells] for column in columns] == [
        ["pool", "between layers", "total"],
        ["pool", "", ""],
        ["", "", "0"],
        ["12", "", ""],
        ["9,000", "7", "9,007"],
        ["", "", ""],
    ]


def table_of(found: Counts) -> Table:
    shown = tables.counted(found)
    assert isinstance(shown, Table)
    return shown


@pytest.mark.parametrize(
    ("machine", "emulated"),
    [
        ("x86_64", ["arm", "cortex-m4", "cortex-m55"]),
        ("aarch64", ["x86", "cortex-m4", "cortex-m55"]),
    ],
)
def test_emulators_are_asked_for_instructions_and_machines_for_time(
    tmp_path: Path, machine: str, emulated: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    for family in ("x86", "arm", "cortex-m4", "cortex-m55"):
        opened = SimpleNamespace(target=SimpleNamespace(name=family))
        monkeypatch.setattr(bench, "load", lambda folder, opened=opened: opened)
        assert bench.emulated(tmp_path) is (family in emulated)
        if family in emulated:
            with pytest.raises(ToolchainMissing, match="an emulator tells no times"):
                bench.bench(tmp_path)


def test_what_runs_natively_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ToolchainMissing, match="only an emulator can count"):
        bench.executed(place(tmp_path, "x86", monkeypatch))
