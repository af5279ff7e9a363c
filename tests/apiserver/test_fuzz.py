"""A short run of the fuzzer; ``python tests/apiserver/fuzz.py`` is the long one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("schemathesis", reason="the fuzzer is not installed")

sys.path.insert(0, str(Path(__file__).parent))
from fuzz import fuzz


@pytest.mark.timeout(600)
async def test_the_server_answers_whatever_is_sent_as_its_document_says() -> None:
    result = await fuzz(1, seed=1, examples=2, phases="coverage,fuzzing")
    assert not result["complaints"], result["complaints"][0]
    assert result["fiveHundreds"] == 0
    assert result["requests"] > 1000
    assert {"200", "201", "204", "400", "401", "404", "405", "409", "422"} <= set(result["statuses"])
