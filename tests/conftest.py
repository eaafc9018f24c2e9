"""Fixtures of the whole suite: where data is, what a part needs, and that no test leaves a task behind."""

from __future__ import annotations

import asyncio
import inspect
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import hypothesis
import pytest
import pytest_asyncio

from tests import postgres as postgres_server
from tools import kafka_broker as broker_tool

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
REQUIRED = frozenset(part for part in os.environ.get("CYBERMESH_REQUIRE", "").split(",") if part)

hypothesis.settings.register_profile("fast", max_examples=60, deadline=None)
hypothesis.settings.register_profile("deep", max_examples=5_000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))

# Otherwise asking for the main thread's loop makes one (Python 3.11), which pytest-asyncio keeps, forgets, and nobody closes.
asyncio.set_event_loop(None)


def skip_or_fail(part: str, reason: str) -> None:
    """Skip the test because ``part`` is absent, unless ``CYBERMESH_REQUIRE`` names it."""
    if part in REQUIRED:
        pytest.fail(f"{part} is required but {reason}")
    pytest.skip(f"{part}: {reason}")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The development data beside the repository; tests that need it are skipped without."""
    data = SHARED / "data"
    if not data.is_dir():
        skip_or_fail("shared", "the development data ../shared/data is not there")
    return data


@pytest.fixture(scope="session")
def netns() -> None:
    """Root, ``ip`` and the firewalls' programs are here and a network namespace can be made."""
    missing = [tool for tool in ("ip", "nft", "iptables", "ipset") if shutil.which(tool) is None]
    if missing:
        skip_or_fail("netns", f"not installed: {', '.join(missing)}")
    if os.geteuid() != 0:
        skip_or_fail("netns", "network namespaces need root")
    name = f"cm-probe-{os.getpid()}"
    probe = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        skip_or_fail("netns", f"ip netns add: {probe.stderr.strip()}")
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@pytest.fixture(scope="session")
def kafka_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[broker_tool.Broker]:
    """A running Kafka broker of our own, on a directory of its own.

    It runs only when Kafka is required: a test run must surprise nobody with a download or with a broker.
    """
    if "kafka" not in REQUIRED:
        pytest.skip("kafka: the broker is started only with CYBERMESH_REQUIRE=kafka")
    try:
        jars = broker_tool.fetch()
    except broker_tool.BrokerError as error:
        skip_or_fail("kafka", str(error))
        raise
    with broker_tool.Broker(tmp_path_factory.mktemp("kafka"), jars) as broker:
        yield broker


@pytest.fixture(scope="session")
def postgres() -> Iterator[postgres_server.Cluster]:
    """A running PostgreSQL of our own, one per test process; ``database()`` makes a fresh, migrated database in it."""
    try:
        cluster = postgres_server.Cluster()
        cluster.__enter__()
    except postgres_server.PostgresError as error:
        skip_or_fail("postgres", str(error))
        raise
    try:
        yield cluster
    finally:
        cluster.__exit__()


@pytest.fixture(autouse=True)
def _no_leftover_tasks(request: pytest.FixtureRequest) -> None:
    """Fail an asynchronous test that ends with tasks still running."""
    if inspect.iscoroutinefunction(getattr(request.node, "function", None)):
        request.getfixturevalue("_watched_tasks")


@pytest_asyncio.fixture
async def _watched_tasks() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    left = {task for task in asyncio.all_tasks() - before - {asyncio.current_task()} if not task.done()}
    if left:
        pytest.fail(f"left running: {sorted(task.get_name() for task in left)}")


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of the caller's environment do not leak into tests."""
    for name in list(os.environ):
        if name.startswith("CYBERMESH_") and name != "CYBERMESH_REQUIRE":
            monkeypatch.delenv(name)
