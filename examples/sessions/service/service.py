"""A service that loads what it needs once for each executor, and then answers many questions.

python examples/sessions/service/service.py
"""

import argparse
import asyncio
import os
import sqlite3
import time
from typing import Any

import numpy as np

import flame.sessions

WORDS, LENGTH = 40_000, 64


class Nearest:
    """Finds the words whose vectors are nearest to a given one. Words are in a database, vectors in shared memory."""

    loaded = 0

    def on_session_enter(self, ctx: Any) -> None:
        """Once for each executor: this takes long, compared with a question."""
        began = time.perf_counter()
        self.vectors = ctx.common_data["vectors"]  # mapped: one copy on a host, however many executors
        self.squares = np.einsum("ij,ij->i", self.vectors, self.vectors)
        self.database = sqlite3.connect(":memory:")
        self.database.execute("create table words (number integer primary key, word text)")
        words = (f"word-{number}" for number in range(len(self.vectors)))
        self.database.executemany("insert into words values (?, ?)", enumerate(words))
        self.seconds = time.perf_counter() - began
        self.loaded += 1

    def on_task_invoke(self, ctx: Any, task: Any) -> dict[str, Any]:
        """A question."""
        began = time.perf_counter()
        distances = self.squares - 2 * (self.vectors @ task.input)
        number = int(distances.argmin())
        (word,) = self.database.execute("select word from words where number = ?", (number,)).fetchone()
        return {
            "word": word,
            "executor": os.getpid(),
            "loaded": self.loaded,
            "loading": self.seconds,
            "answering": time.perf_counter() - began,
        }

    def on_session_leave(self) -> None:
        """The session was closed, or another one needs the room."""
        self.database.close()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=1000)
    questions = parser.parse_args().questions
    rng = np.random.default_rng(5)
    vectors = rng.standard_normal((WORDS, LENGTH), np.float32)
    asked = rng.integers(WORDS, size=questions)

    common, one_core = {"vectors": vectors}, {"cpu": 1}  # so there are as many executors as there are cores
    async with flame.sessions.open(Nearest, common_data=common, resources=one_core) as session:
        nearly = (vectors[number] + rng.normal(0, 0.1, LENGTH).astype(np.float32) for number in asked)
        answers = [answer async for answer in session.map(nearly)]

    right = sum(answer["word"] == f"word-{number}" for answer, number in zip(answers, asked, strict=True))
    print(f"{right} of {questions} questions were answered with the right word")
    for executor in sorted({answer["executor"] for answer in answers}):
        mine = [answer for answer in answers if answer["executor"] == executor]
        mean = sum(answer["answering"] for answer in mine) / len(mine)
        print(
            f"executor {executor}: loaded {mine[-1]['loaded']} time in {mine[0]['loading'] * 1000:.0f} ms, "
            f"answered {len(mine)}, in {mean * 1000:.1f} ms each"
        )


if __name__ == "__main__":
    asyncio.run(main())
