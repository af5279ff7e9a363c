"""The table of permissions in docs/security.md. ``python tests/apiserver/permission_table.py`` writes it anew."""

from __future__ import annotations

import sys
from pathlib import Path

from flame.apiserver.app import ROUTES
from flame.apiserver.permissions import Access
from flame.spec.people import UserRole

PAGE = Path(__file__).parents[2] / "docs" / "security.md"
BEGIN, END = "<!-- permissions: begin -->\n", "<!-- permissions: end -->\n"


def table() -> str:
    """What the page is to say."""
    roles = list(UserRole)
    lines = [f"| permission | for | {' | '.join(role.value for role in roles)} |", f"|---|---|{'---|' * len(roles)}"]
    for access in Access:
        marks = ["yes" if access.lets_in(role) else "" for role in roles]
        lines.append(f"| `{access.name}` | {access.value} | {' | '.join(marks)} |")
    lines += ["", "| request | permission |", "|---|---|"]
    lines += [
        f"| `{route.method} {route.path}` | `{route.access.name}` |" for route in sorted(ROUTES, key=lambda r: r.path)
    ]
    return "\n".join(lines) + "\n"


def shown(page: str) -> str:
    """What the page says."""
    return page[page.index(BEGIN) + len(BEGIN) : page.index(END)]


if __name__ == "__main__":
    text = PAGE.read_text("utf-8")
    PAGE.write_text(text.replace(BEGIN + shown(text) + END, BEGIN + table() + END), "utf-8")
    sys.stdout.write(f"{PAGE} is written.\n")
