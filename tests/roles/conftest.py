"""Deployments of one and of four validators."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from tests.roles.site import Site


@pytest_asyncio.fixture
async def alone(tmp_path: Path) -> AsyncIterator[Site]:
    """A committee of one, which decides at once."""
    site = Site(tmp_path, 1)
    async with site.bus:
        yield site


@pytest_asyncio.fixture
async def four(tmp_path: Path) -> AsyncIterator[Site]:
    """A committee of four."""
    site = Site(tmp_path, 4)
    async with site.bus:
        yield site
