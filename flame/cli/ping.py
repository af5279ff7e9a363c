"""``flame ping``: empty tasks, to see whether sessions work and how fast they are."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import Any

import click

from flame.cli import output
from flame.cli.app import CONTEXT, FAILED, examples, output_option, server_option
from flame.cli.counts import CountsView

_APPLICATION = "flame.sessions.application:echo"


@click.command(context_settings=CONTEXT, epilog=examples("flame ping", "flame ping -n 10000 --max-instances 4"))
@click.option(
    "-n", "--tasks", "count", type=click.IntRange(min=1), default=10, show_default=True, help="How many tasks."
)
@click.option("--max-instances", type=click.IntRange(min=1), help="Most executors; else as many as there is room for.")
@server_option
@output_option
def ping(count: int, max_instances: int | None, server: str | None, how: str) -> int:
    """Open a session, run empty tasks in it, and say how long all of it took."""
    result = asyncio.run(_ping(count, max_instances, server, how))
    if how != "table":
        output.document(result, how)
    return 0 if result["succeed"] == count else FAILED


async def _ping(count: int, max_instances: int | None, server: str | None, how: str) -> dict[str, Any]:
    from flame import sessions
    from flame.spec.sessions import Application, Counts

    async with sessions.connect(server) as connection:
        application = Application(name="ping", entry=_APPLICATION)
        begin = time.perf_counter()
        async with connection.open(application, max_instances=max_instances) as session:
            opened = time.perf_counter() - begin
            _say(how, f"Session {session.id} was created in {output.span(opened)}.")
            begin = time.perf_counter()
            futures = session.submit_many([b""] * count)
            await session.accepted()
            submitted = time.perf_counter() - begin
            _say(how, f"{count} {'task was' if count == 1 else 'tasks were'} created in {output.span(submitted)}.\n")
            everything = asyncio.gather(*futures, return_exceptions=True)
            last = Counts()
            if how == "table":
                with CountsView() as view:
                    async with aclosing(session.watch()) as news:
                        async for last in news:
                            view.show(last)
                            if last.succeed + last.failed + last.cancelled >= count:
                                break
            answers = await everything
            took = time.perf_counter() - begin
        failed = sum(isinstance(answer, Exception) for answer in answers)
        _say(how, f"\nDone in {output.span(took)}: {count / took:,.0f} tasks a second.")
        return {
            "session": session.id,
            "tasks": count,
            "succeed": count - failed,
            "failed": failed,
            "sessionSeconds": opened,
            "submitSeconds": submitted,
            "seconds": took,
        }


def _say(how: str, text: str) -> None:
    if how == "table":
        click.echo(text)
