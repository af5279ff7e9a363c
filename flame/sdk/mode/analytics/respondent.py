"""A site of federated analytics: it answers questions about its table, and never shows a row of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from flame.errors import WorkerError
from flame.sdk.codec import Message
from flame.sdk.mode.analytics.statistics import Summary, present, tally
from flame.sdk.mode.composer import Composer
from flame.sdk.mode.horizontal.syncfl.follower import Follower
from flame.sdk.mode.message import MessageType
from flame.sdk.mode.tasklet import Loop, Tasklet

TAG_ANSWER = "answer"

SUMMARY = "summary"
HISTOGRAM = "histogram"


class Respondent(Follower):
    """Has a table. The user writes ``load_data``, which sets :attr:`table`.

    :ivar table: columns of numbers by name; columns may have any length, and what is NaN is missing.
    """

    table: Mapping[str, Any]
    _question: Message | None = None

    def initialize(self) -> None:
        """There is no model."""

    def get(self, tag: str) -> None:
        """What the tasklet ``fetch`` does: wait for a question."""
        self._question = self._newest(self.channel(tag))
        self._work_done = bool(self._question.get(MessageType.EOT))

    def put(self, tag: str) -> None:
        """What the tasklet ``answer`` does."""
        question = self._question
        if question is None:
            return
        self._round = question[MessageType.ROUND]
        answer = self._answers(str(question[MessageType.QUERY]), question.get(MessageType.EXTRA) or {})
        self._answer(self.channel(tag), {MessageType.ANSWER: answer, MessageType.ROUND: self._round})

    def _answers(self, kind: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The answers by column; columns that are not here, or have too few values, are left out."""
        table = getattr(self, "table", None)
        if not isinstance(table, Mapping):
            raise WorkerError(f"{type(self).__name__} has no table: set self.table in load_data to columns by name.")
        least = int(self.config.hyperparameters.get("leastCount", 1))
        found: dict[str, Any] = {}
        for name in asked or table:
            values = present(table[name]) if name in table else np.zeros(0)
            if len(values) < least or not len(values):
                continue
            if kind == HISTOGRAM:
                found[name] = tally(values, np.asarray(asked[name], np.float64))
            elif kind == SUMMARY:
                found[name] = Summary.of(values).row()
            else:
                raise WorkerError(f"A question of an unknown kind came: {kind!r}.")
        return found

    def compose(self) -> None:
        """Put the workflow together: load_data, then until the work is done fetch and answer."""
        with Composer() as composer:
            self.composer = composer
            internal_init = Tasklet("internal_init", self.internal_init)
            load_data = Tasklet("load_data", self.load_data)
            initialize = Tasklet("initialize", self.initialize)
            fetch = Tasklet("fetch", self.get, TAG_ANSWER)
            answer = Tasklet("answer", self.put, TAG_ANSWER)
            loop = Loop(loop_check_fn=lambda: self._work_done)
        internal_init >> load_data >> initialize >> loop(fetch >> answer)

    @classmethod
    def get_func_tags(cls) -> list[str]:
        """See :class:`Role`."""
        return [TAG_ANSWER]
