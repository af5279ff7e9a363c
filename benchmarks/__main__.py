"""``python -m benchmarks [NAME...]``: run the benchmarks one after another, each in a process of its own."""

from __future__ import annotations

import pathlib
import subprocess
import sys

NOT_BENCHMARKS = {"__init__", "__main__", "report"}
#: They take a quarter of an hour and more, so they are run when they are named.
BY_HAND = {"chaos_campaign", "soak"}


def main() -> int:
    """Run the named benchmarks, or all but those that take long; the exit status is that of the worst."""
    here = pathlib.Path(__file__).parent
    names = sys.argv[1:] or sorted(path.stem for path in here.glob("*.py") if path.stem not in NOT_BENCHMARKS | BY_HAND)
    worst = 0
    for name in names:
        print(f"== {name}", flush=True)
        worst = max(worst, subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode)
    return worst


if __name__ == "__main__":
    sys.exit(main())
