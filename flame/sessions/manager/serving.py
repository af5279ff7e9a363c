"""Giving tasks to executors: which of a session's executors gets how many of those that wait, and what becomes of slow ones."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from flame.sessions import wire
from flame.sessions.manager.committer import Committer
from flame.sessions.manager.executors import STALLED, Executor
from flame.sessions.manager.live import Live, failure
from flame.spec.sessions import ExecutorState


class Serving:
    """Gives tasks to executors.

    :param committer: who writes the ends of tasks that ran for too long.
    :param lose: ends an executor, with the reason.
    """

    def __init__(self, committer: Committer, lose: Callable[[Executor, str], None]) -> None:
        self._committer = committer
        self._lose = lose

    def serve(self, live: Live) -> None:
        """Give a session's executors what waits."""
        book = live.book
        if not book.waiting:
            return
        ready = [one for one in live.executors.values() if one.ready]
        if live.form.batch_size > 1:
            ready = ready[: len(ready) // live.form.batch_size * live.form.batch_size]
        if not ready:
            return
        window = live.window()
        share = -(-book.waiting // len(ready))
        if len(ready) > 1:
            ready.sort(key=lambda one: len(book.given(one.id)))
        for executor in ready:
            have = len(book.given(executor.id))
            if have and (executor.stalled or have > window // 2):
                continue
            works = book.give(executor.id, min(window - have, share))
            if not works:
                continue
            executor.never("idle")
            executor.give(works)
            live.changed()
            if not have:
                self.limit(executor)
            if len(works) + have > 1 and "stall" not in executor.timers:
                executor.after("stall", STALLED, lambda one=executor: self._stalled(one))  # type: ignore[misc]
            if not book.waiting:
                return

    def limit(self, executor: Executor) -> None:
        """See that what an executor runs ends in time. The time of a task begins once its executor is bound."""
        live = executor.live
        if live is None or executor.state is not ExecutorState.BOUND:
            return
        work = next(iter(live.book.given(executor.id).values()), None)
        if work is not None and work.options.timeout is not None:
            executor.after("expiry", work.options.timeout, lambda: self._expired(executor, work.id))

    def _stalled(self, executor: Executor) -> None:
        """An executor with tasks ahead has said nothing for a while: perhaps its task is a long one."""
        live = executor.live
        if live is None or len(live.book.given(executor.id)) < 2:
            return
        quiet = asyncio.get_running_loop().time() - executor.heard
        if quiet >= STALLED:
            executor.send(wire.REVOKE, None)
        else:
            executor.after("stall", STALLED - quiet, lambda: self._stalled(executor))

    def _expired(self, executor: Executor, id: int) -> None:
        """A task has run for too long. It cannot be interrupted, so its executor is ended."""
        live = executor.live
        if live is None or next(iter(live.book.given(executor.id)), None) != id:
            return
        seconds = live.book.live[id].options.timeout
        end = live.book.expire(executor.id, failure("TimeoutError", f"The task ran for more than {seconds:g} s."))
        self._committer.ended(live, [end] if end is not None else [])
        self._lose(executor, "Its task ran for too long.")
