"""Compression of what travels, declared per channel: ``compression: {sort: int8, kwargs: {block: 256}}``.

``none``, ``float16``, ``bfloat16``, ``int8`` (with error feedback) and ``topk`` (of differences, with error feedback) are built
in; :func:`register` adds one, and so does an entry point in the group ``flame.compressions``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flame.sdk.plugins import Plugins, integer

if TYPE_CHECKING:
    from flame.sdk.channel import Compression
    from flame.sdk.compression.base import Compressor

_HERE = "flame.sdk.compression"

#: Every compressor by name.
compressors: Plugins[Compressor] = Plugins(
    "compression",
    "flame.compressions",
    {
        "bfloat16": f"{_HERE}.casts:BFloat16",
        "float16": f"{_HERE}.casts:Float16",
        "int8": f"{_HERE}.int8:Int8",
        "topk": f"{_HERE}.topk:TopK",
    },
)
register = compressors.register


def names() -> list[str]:
    """Every name that :func:`make` knows, sorted."""
    return sorted(["none", *compressors.names()])


def make(sort: str, kwargs: Mapping[str, Any] | None = None, *, differences: bool = False) -> Compression:
    """What a channel compresses with.

    :param sort: one of :func:`names`.
    :param kwargs: the compressor's, and ``history`` (see :class:`flame.sdk.compression.exchange.Exchange`).
    :param differences: the job's optimizer has trainers send differences in place of models.
    :raises flame.errors.SpecError: no such compression, or an argument that it does not take, or a value that cannot be.
    """
    from flame.sdk.compression.exchange import Exchange, Nothing

    kwargs = dict(kwargs or {})
    if sort == "none":
        return Nothing()
    history = integer("history", kwargs.pop("history", 1), low=1)
    return Exchange(compressors.make(sort, kwargs), history, differences=differences)


__all__ = ["compressors", "make", "names", "register"]
