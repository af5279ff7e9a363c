"""``python -m benchmarks.chaos_campaign --cases 500 --seed 1``: the campaign of ``tests/chaos`` by hand; writes the table of ``docs/reliability.md``.

Each case is one job in which one thing is done to one part at one moment. A case is *lost* when the job did not complete by itself, has other
rounds or another model than the undisturbed one, changed its state as it may not, or left something behind.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import shutil
import sys
import tempfile
import time
from collections import Counter

from flame.chaos import interrupt

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests" / "chaos"))
from campaign import ACTS, TARGETS, Result, campaign, draw


def table(results: list[Result]) -> str:
    """How many cases of each target and act there were, and how many of them were lost."""
    all_of: Counter[tuple[str, str]] = Counter()
    lost: Counter[tuple[str, str]] = Counter()
    for result in results:
        key = (result.case.deed.who, result.case.deed.act)
        all_of[key] += 1
        lost[key] += bool(result.faults)
    names = list(dict.fromkeys(who for targets in TARGETS.values() for who in targets))
    lines = ["| target | killed | stopped for 10 s | cut off |", "|---|---|---|---|"]
    for who in names:
        cells = [f"{all_of[who, act]}, {lost[who, act]} lost" for act in ACTS]
        lines.append(f"| {who} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Run the cases; status 0 if none was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lanes", type=int, default=8, help="how many jobs run at a time")
    parser.add_argument("--kind", action="append", choices=list(TARGETS), help="only these")
    parser.add_argument("--only", default="", help="only cases in whose text this expression is found")
    parser.add_argument("--folder", type=pathlib.Path, help="keep what lost cases have left there")
    arguments = parser.parse_args()
    cases = draw(arguments.cases, arguments.seed, arguments.kind or list(TARGETS))
    cases = [case for case in cases if re.search(arguments.only, str(case))]
    folder = arguments.folder or pathlib.Path(tempfile.mkdtemp(prefix="flame-campaign-"))
    began = time.monotonic()
    lost: list[str] = []

    def tell(result: Result) -> None:
        if result.faults:
            lost.append(str(result.case))
        verdict = "LOST " + " | ".join(result.faults) if result.faults else "ok" if result.done else "ok, never there"
        print(
            f"{time.monotonic() - began:7.1f} {result.seconds:6.1f} s  {result.case}  [{result.what}]  {verdict}",
            flush=True,
        )

    try:
        results, skipped = interrupt.run(campaign(cases, folder, arguments.seed, lanes=arguments.lanes, tell=tell))
    except KeyboardInterrupt:
        print("Interrupted; all that was started has been ended.", flush=True)
        return 130
    finally:
        if not lost and not arguments.folder:
            shutil.rmtree(folder)
    print(table(results))
    for kind, why in skipped.items():
        print(f"Without {kind}: {why}.")
    print(
        json.dumps(
            {
                "cases": len(results),
                "done": sum(result.done for result in results),
                "lost": lost,
                "seed": arguments.seed,
                "seconds": round(time.monotonic() - began, 1),
            }
        )
    )
    return bool(lost)


if __name__ == "__main__":
    sys.exit(main())
