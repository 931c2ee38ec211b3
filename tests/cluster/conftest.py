from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.cluster import cluster

# Tasks inherit it. The nodes are names of this machine that nothing resolves.
os.environ |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(cluster.ROOT), **cluster.ENVIRONMENT}


@pytest.fixture(scope="session", autouse=True)
def _two_nodes() -> Iterator[None]:
    cluster.up()
    yield
    cluster.down()


@pytest.fixture(autouse=True)
def _both_idle(_two_nodes: None) -> Iterator[None]:
    yield
    cluster.call("scancel", "--user", "root")
    cluster.wait_for(cluster.idle, 60, "nodes are not idle after a test")
