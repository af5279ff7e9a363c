"""``python -m benchmarks [NAME...]``: run the benchmarks one after another, each in a process of its own."""

from __future__ import annotations

import pathlib
import subprocess
import sys

NOT_BENCHMARKS = {"__init__", "__main__", "report"}


def main() -> int:
    """Run the named benchmarks, or all; the exit status is that of the worst."""
    here = pathlib.Path(__file__).parent
    names = sys.argv[1:] or sorted(path.stem for path in here.glob("*.py") if path.stem not in NOT_BENCHMARKS)
    worst = 0
    for name in names:
        print(f"== {name}", flush=True)
        worst = max(worst, subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode)
    return worst


if __name__ == "__main__":
    sys.exit(main())
