"""``flame serve``: the server, in the foreground."""

from __future__ import annotations



