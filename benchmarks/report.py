"""How every benchmark ends: a table for people, then one line of JSON for programs."""

from __future__ import annotations

import json
from typing import NamedTuple


class Figure(NamedTuple):
    """One measured figure. ``asked`` is the bar, such as ``<= 2``; empty where there is none."""

    name: str
    value: float
    unit: str
    asked: str = ""


def report(figures: list[Figure]) -> None:
    """Print the figures aligned, then as one JSON object on the last line."""
    width = max(len(figure.name) for figure in figures)
    for figure in figures:
        print(f"{figure.name:<{width}}  {figure.value:>12.4g} {figure.unit:<24} {figure.asked}".rstrip())
    print(
        json.dumps(
            {
                figure.name: {"value": float(f"{figure.value:.4g}"), "unit": figure.unit, "asked": figure.asked}
                for figure in figures
            }
        ),
        flush=True,
    )
