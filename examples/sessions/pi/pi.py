"""Pi from random points: many short tasks, each with its own stretch of random numbers.

python examples/sessions/pi/pi.py
"""

import argparse
import math
import random

import flame.sessions.sync

POINTS = 20_000


def inside(seed: int) -> int:
    """How many of twenty thousand random points of a square lie in the circle inside it."""
    draw = random.Random(seed).random
    return sum(draw() ** 2 + draw() ** 2 < 1 for _ in range(POINTS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=1000)
    tasks = parser.parse_args().tasks
    with flame.sessions.sync.open(inside) as session:
        total = sum(session.map(range(tasks)))
    pi = 4 * total / (tasks * POINTS)
    print(f"pi is about {pi:.5f}, which is {abs(pi - math.pi):.5f} off, by {tasks} tasks of {POINTS:,} points")


if __name__ == "__main__":
    main()
