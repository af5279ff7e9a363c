"""Computes that an operator declares when a server starts (``flame serve --computes FILE``)."""

from __future__ import annotations

from typing import Any

import pytest

from flame.errors import SpecError
from flame.spec.nouns import Compute


async def test_declared_computes_are_registered_once_and_brought_up_to_date(bench: Any) -> None:
    register, shelf = bench.controller.register, bench.controller.context.compute_shelf
    await register.declare([Compute(name="a", kind="local", region="us", slots=3), Compute(name="b", kind="local")])
    first = (await shelf.get("a")).record
    assert (first.slots, first.region) == (3, "default/us")
    saved = await shelf.get("a")
    saved.record.drained = True
    await shelf.put(saved, saved.record)
    await register.declare([Compute(name="a", kind="local", region="eu", slots=4)])
    again = (await shelf.get("a")).record
    assert (again.slots, again.region, again.created_at) == (4, "default/eu", first.created_at)
    assert again.drained, "what an operator has drained since stays so"
    assert await shelf.get("b") is not None, "who is not declared any more is not forgotten"


async def test_nothing_is_registered_where_one_of_the_declared_is_wrong(bench: Any) -> None:
    register, shelf = bench.controller.register, bench.controller.context.compute_shelf
    with pytest.raises(SpecError, match="slots"):
        await register.declare([Compute(name="a", kind="local"), Compute(name="b", kind="local", config={"slots": 0})])
    assert await shelf.get("a") is None
