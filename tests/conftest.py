"""A skipped test fails the run: a missing tool is never hidden. Tests marked `zoo` run where the networks are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ZOO = Path(os.environ.get("QCOMPILE_ZOO", ROOT.parent / "shared" / "zoo"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if ZOO.is_dir():
        return
    absent = [item for item in items if item.get_closest_marker("zoo")]
    if absent:
        config.hook.pytest_deselected(items=absent)
        items[:] = [item for item in items if item not in absent]


def pytest_report_header() -> str:
    return f"zoo: {'beside the project' if ZOO.is_dir() else 'absent, its tests are left out'}"


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and reporter.stats.get("skipped") and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def models() -> Path:
    return ROOT / "models"


@pytest.fixture(scope="session")
def zoo() -> Path:
    return ZOO
