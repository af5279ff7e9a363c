"""``python -m flame.flamelet``: one worker, one attempt of one task. See :mod:`flame.flamelet.agent`.

Exit status: 0 when the server knows how the attempt ended, whatever that is; 1 when it could not be told, or refuses
this attempt (a newer one has taken its place, or the task is gone).
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from flame.errors import FlameError
from flame.flamelet.agent import Agent
from flame.flamelet.settings import Settings

_ASKED = "Its worker was asked to end (SIGTERM): by the server, by somebody on its host, or by what it runs on as that shut down."


async def work() -> bool:
    """Be the worker that the environment says. SIGTERM and SIGINT end the task with it."""
    environment = dict(os.environ)
    settings = Settings.read(environment)
    agent = Agent(settings, environment)
    loop = asyncio.get_running_loop()
    if settings.leash:

        def pulled() -> None:
            loop.remove_reader(0)
            agent.stop("Its owner has left.", hurry=True)

        loop.add_reader(0, pulled)  # nothing is ever written: it can only come to its end
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: agent.stop(_ASKED, hurry=True))
    return await agent.run()


def main() -> int:
    """Run a flamelet; gives its exit status."""
    try:
        return 0 if asyncio.run(work()) else 1
    except FlameError as error:
        print(f"flamelet: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the end of the job waits for this process, and taking down an interpreter takes long
