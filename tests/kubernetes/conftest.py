"""A namespace of a real cluster for each file of tests, removed with all that is in it."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import engines


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test waits for the image, which may have to be built; only what a test does itself is timed."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(180, func_only=True))


@pytest.fixture(scope="session")
def kubeconfig() -> str:
    """The path of the credentials of a cluster that answers."""
    return engines.kubeconfig()


@pytest.fixture(scope="session")
def image(kubeconfig: str) -> str:
    """The project's image, which the cluster has."""
    return engines.kubernetes_image()


@pytest.fixture(scope="module")
def namespace(kubeconfig: str) -> Iterator[str]:
    """A namespace of our own."""
    name = f"flame-test-{uuid.uuid4().hex[:8]}"
    engines.kubectl("create", "namespace", name)
    yield name
    engines.kubectl("delete", "namespace", name, "--wait=false")
    engines.kubectl("delete", "pods", "--all", "-n", name, "--grace-period=0", "--force", check=False)
