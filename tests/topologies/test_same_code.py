"""Moving from one topology to another takes a schema and at most another base class, never other training code."""

from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def script(example):
    return (EXAMPLES / example / "trainer" / "main.py").read_text().splitlines()


@pytest.mark.parametrize("example", ["parallel", "eager"])
def test_only_the_schema_differs(example):
    assert script(example) == script("hierarchical")


@pytest.mark.parametrize("example", ["async", "coordinated"])
def test_only_the_base_class_differs(example):
    changed = [pair for pair in zip(script("hierarchical"), script(example), strict=True) if pair[0] != pair[1]]
    assert len(changed) == 1
    assert all(line.startswith("from flame.sdk.mode.horizontal.") for line in changed[0])
    assert all(line.endswith(".trainer import Trainer") for line in changed[0])
