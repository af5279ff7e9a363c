"""Amounts of memory as people write them: a number of bytes, or one with a suffix as Kubernetes has them."""

from __future__ import annotations

import re

from flame.errors import SpecError

_SUFFIXES = {"": 1} | {
    suffix: base**power
    for base, letters, tail in ((1000, "kMGTP", ""), (1024, "KMGTP", "i"))
    for power, letter in enumerate(letters, 1)
    for suffix in (letter + tail,)
}
_FORM = re.compile(r"([0-9]+(?:\.[0-9]+)?)([A-Za-z]*)")


def parse_bytes(amount: str | int, where: str | None = None) -> int:
    """An amount of memory in bytes.

    :param amount: bytes, or text such as ``512Mi``, ``2G`` or ``1.5Gi``.
    :param where: the file and field that says it, for the complaint.
    :raises flame.errors.SpecError: it is no amount of memory.
    """
    if isinstance(amount, int):
        found = amount
    else:
        match = _FORM.fullmatch(amount.strip()) if len(amount) <= 40 else None
        if match is None or match[2] not in _SUFFIXES:
            raise SpecError(
                f"{amount[:40]!r} is no amount of memory; write it like 512Mi, 2Gi or a number of bytes.", where
            )
        found = int(float(match[1]) * _SUFFIXES[match[2]])
    if found < 1:
        raise SpecError(f"{amount!r} is no amount of memory: it must be more than nothing.", where)
    return found


def show_bytes(amount: int) -> str:
    """An amount of memory for people, in the largest unit of which there is at least one."""
    for power, letter in ((4, "Ti"), (3, "Gi"), (2, "Mi"), (1, "Ki")):
        if amount >= 1024**power:
            return f"{amount / 1024**power:.4g}{letter}"
    return str(amount)
