"""What `import flame.client` gives, and what it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import flame.client


def test_the_public_names_are_these() -> None:
    assert sorted(flame.client.__all__) == ["Client", "JobBundle", "load_job", "run"]
    for name in flame.client.__all__:
        assert getattr(flame.client, name).__name__ == name


def test_there_is_nothing_else() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        _ = flame.client.nothing


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("flame.client", {"asyncio", "msgspec", "yaml", "aiohttp"}),
        ("flame.client.local", {"asyncio", "msgspec", "yaml", "aiohttp"}),
        ("flame.client.client", {"yaml", "rich", "numpy", "click", "aiohttp"}),
        (
            "flame.flamelet.agent",
            {"aiohttp", "yaml", "rich", "numpy", "click", "flame.client.client", "flame.spec.load"},
        ),
        ("flame.cli.main", {"asyncio", "msgspec", "yaml", "aiohttp", "rich", "flame.client"}),
        ("flame.cli.run", {"asyncio", "msgspec", "yaml", "aiohttp", "rich"}),
        ("flame.cli.running", {"rich", "numpy"}),
    ],
)
def test_what_starts_often_imports_little(module: str, unwanted: set[str]) -> None:
    program = f"import sys, {module}; print(*sys.modules)"
    imported = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not unwanted & set(imported.stdout.split())
