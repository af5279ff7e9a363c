"""How fast the store is: ``python -m benchmarks.store``.

Many coroutines append events and replace documents, each waiting for its own write, as the server does. In the same
run, turn by turn, the bare sqlite3 module does the same changes with executemany() in one transaction, which is the most that this
machine's SQLite gives to Python. The ratio of the two says what asyncio, JSON and the group commit cost.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sqlite3
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.report import Figure, report
from flame.notifier import Notifier
from flame.store import open_store

COROUTINES = 200


async def through_the_store(url: str, folder: Path, operations: int) -> tuple[float, float, float]:
    """Operations a second with appends and replaces by turns; the same with publishing and a follower; median latency of one write alone in seconds."""
    store = open_store(url, folder)
    each = operations // COROUTINES // 2

    async def work(worker: int) -> None:
        for n in range(1, each + 1):
            await store.append(f"job/{worker % 20}", [("metrics", {"worker": worker, "round": n})])
            await store.replace("tasks", str(worker), {"jobId": "j", "state": "running", "n": n}, version=n)

    for worker in range(COROUTINES):
        await store.insert("tasks", str(worker), {"jobId": "j", "state": "ready"})
    begin = time.perf_counter()
    await asyncio.gather(*(work(worker) for worker in range(COROUTINES)))
    rate = each * COROUTINES * 2 / (time.perf_counter() - begin)

    notifier = Notifier(store)

    async def publish(worker: int) -> None:
        for n in range(each):
            await notifier.publish("published", "metrics", {"worker": worker, "round": n})

    async def follow() -> None:
        async for _ in notifier.follow("published", until=lambda event: event.seq == each * COROUTINES):
            pass

    begin = time.perf_counter()
    await asyncio.gather(follow(), *(publish(worker) for worker in range(COROUTINES)))
    published = each * COROUTINES / (time.perf_counter() - begin)

    alone = []
    for n in range(500):
        begin = time.perf_counter()
        await store.append("alone", [("metrics", {"round": n})])
        alone.append(time.perf_counter() - begin)
    await store.close()
    return rate, published, statistics.median(alone)


def bare(folder: Path, operations: int) -> float:
    """Operations a second of executemany() with ready-made rows in one transaction, half inserts, half updates."""
    db = sqlite3.connect(folder / "bare.db", isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    db.execute(
        "CREATE TABLE events (stream TEXT, seq INTEGER, time REAL, type TEXT, data TEXT, PRIMARY KEY (stream, seq)) WITHOUT ROWID"
    )
    db.execute("CREATE TABLE documents (id TEXT PRIMARY KEY, version INTEGER, body TEXT)")
    body = json.dumps({"jobId": "j", "state": "running", "n": 1})
    db.executemany("INSERT INTO documents VALUES (?, 1, ?)", [(str(n), body) for n in range(COROUTINES)])
    half = operations // 2
    events = [(f"job/{n % 20}", n, 0.0, "metrics", json.dumps({"worker": n, "round": n})) for n in range(half)]
    changes = [(body, str(n % COROUTINES)) for n in range(half)]
    begin = time.perf_counter()
    db.execute("BEGIN")
    db.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?)", events)
    db.executemany("UPDATE documents SET version = version + 1, body = ? WHERE id = ?", changes)
    db.execute("COMMIT")
    rate = half * 2 / (time.perf_counter() - begin)
    db.close()
    return rate


def main() -> None:
    """Take turns, and report the medians."""
    parser = argparse.ArgumentParser(description="The speed of the store beside bare SQLite's.")
    parser.add_argument("--operations", type=int, default=40_000)
    parser.add_argument("--db", default="sqlite:///flame.db", help="an empty MongoDB database, with --repeat 1")
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    runs = []
    for _ in range(arguments.repeat):
        with tempfile.TemporaryDirectory() as folder:
            ours = asyncio.run(through_the_store(arguments.db, Path(folder), arguments.operations))
            runs.append((*ours, bare(Path(folder), arguments.operations)))
    rate, published, alone, raw = (statistics.median(column) for column in zip(*runs, strict=True))
    ratio = statistics.median(run[0] / run[3] for run in runs)
    report(
        [
            Figure("store, appends and replaces", rate, "operations/s", ">= 20000"),
            Figure("store, published and followed", published, "events/s"),
            Figure("store, one append alone", alone * 1e6, "us"),
            Figure("sqlite3.executemany, the same rows", raw, "operations/s"),
            Figure("store / sqlite3", ratio, "ratio"),
        ]
    )


if __name__ == "__main__":
    main()
