"""The analyst of federated analytics: it asks, and adds up what the sites answer. Each question is a round."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from flame.errors import DeadlineExceeded, RoundFailed, WorkerError
from flame.sdk.codec import Message
from flame.sdk.mode.analytics.respondent import HISTOGRAM, SUMMARY
from flame.sdk.mode.analytics.statistics import Bracket, Estimate, Summary, closed
from flame.sdk.mode.composer import Composer
from flame.sdk.mode.farewell import say_done
from flame.sdk.mode.gathering import await_all
from flame.sdk.mode.horizontal.syncfl.rounds import order_of
from flame.sdk.mode.message import MessageType
from flame.sdk.mode.roundkeeper import ARTIFACT_SECONDS, REGISTRY_SECONDS, RoundKeeper
from flame.sdk.mode.tasklet import Tasklet

TAG_QUERY = "query"

#: Bins by which a quantile is narrowed down in a round: six bits of its value.
BINS = 64
#: More rounds than this are not needed for any number there is, unless the sites' data change meanwhile.
MOST_ROUNDS = 60
#: How long a site may take the word that the work is done, in seconds.
FAREWELL_SECONDS = 10.0

T = TypeVar("T")


class Analyst(RoundKeeper):
    """Asks the sites. The user writes :meth:`analyse`, whose result is handed in as ``results.json``.

    A round goes on without sites that have left, or are not ready at the policy's ``roundDeadline``, while ``minTrainers``
    of them answer.
    """

    results: Any = None
    _met: bool = False

    def initialize(self) -> None:
        """There is no model."""

    def analyse(self) -> Any:
        """For the user: ask with :meth:`summary`, :meth:`histogram`, :meth:`quantiles`, and return the results (for JSON)."""
        raise WorkerError(f"{type(self).__name__} asks nothing: write analyse(self).")

    def summary(self, columns: Sequence[str] | None = None) -> dict[str, Summary]:
        """Count, mean, variance, least and greatest value of each column, over all sites. One round.

        :param columns: None: all that the sites have.
        :raises flame.errors.WorkerError: nobody answers for a column.
        """
        merged = self._ask(SUMMARY, {name: np.zeros(0) for name in columns or ()}, _summary_of)
        self._need(columns or (), merged)
        return dict(sorted(merged.items()))

    def histogram(self, column: str, edges: Sequence[float] | npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """How many values lie in each bin, over all sites; as ``numpy.histogram``, exact. One round.

        :param edges: of the bins, ``[n + 1]``, increasing; values outside are not counted.
        :returns: ``[n]``.
        :raises flame.errors.WorkerError: the edges do not increase, or nobody answers.
        """
        try:
            wanted = closed(edges)
        except ValueError as error:
            raise WorkerError(f"histogram({column!r}): {error}.") from error
        merged = self._ask(HISTOGRAM, {column: wanted}, _counts_of)
        self._need([column], merged)
        return merged[column][1:-1]

    def quantiles(
        self, columns: str | Sequence[str], qs: Sequence[float], error: float = 0.0
    ) -> dict[str, dict[float, Estimate]]:
        """Quantiles of columns, over all sites, in a few rounds that all of them share.

        The q-quantile of n values is the ceil(q n)-th smallest of them. A first round finds the ranges; each further one
        narrows all quantiles down by the factor :data:`BINS`, until each is known to ``error``.

        :param error: the largest error, in the column's unit; 0: to the last bit, in at most eleven of those rounds.
        :returns: by column and q: the estimate, and how far off it may be.
        :raises flame.errors.WorkerError: nobody answers for a column.
        """
        names = [columns] if isinstance(columns, str) else list(columns)
        if not all(0 <= q <= 1 for q in qs) or error < 0:
            raise WorkerError(f"quantiles({names}, {list(qs)}, {error}): q is from 0 to 1, and an error not below 0.")
        brackets: dict[tuple[str, float], Bracket] = {}
        for _ in range(MOST_ROUNDS):
            unknown = [name for name in names if (name, qs[0]) not in brackets] if qs else []
            if unknown:
                for name, found in self.summary(unknown).items():
                    brackets |= {(name, q): Bracket(q, error, found.least, found.greatest) for q in qs}
            open_ones = {key: bracket for key, bracket in brackets.items() if not bracket.done}
            if not open_ones:
                break
            self._narrow(open_ones, brackets)
        else:
            raise RoundFailed(f"The quantiles of {', '.join(names)} were not found: the sites' data change too often.")
        return {name: {q: brackets[name, q].estimate for q in qs} for name in names}

    def _narrow(
        self, open_ones: dict[tuple[str, float], Bracket], all_of_them: dict[tuple[str, float], Bracket]
    ) -> None:
        """One round for all quantiles that are not known well enough; one that was lost sight of begins anew."""
        edges = {
            name: np.unique(np.concatenate([one.edges(BINS) for (of, _), one in open_ones.items() if of == name]))
            for name in {name for name, _ in open_ones}
        }
        merged = self._ask(HISTOGRAM, edges, _counts_of)
        self._need(list(edges), merged)
        for (name, _), bracket in open_ones.items():
            if not bracket.narrow(edges[name], merged[name]):
                for key in [key for key in all_of_them if key[0] == name]:
                    all_of_them.pop(key)

    def _need(self, columns: Sequence[str], merged: Mapping[str, Any]) -> None:
        missing = [name for name in columns if name not in merged]
        if missing:
            raise WorkerError(f"No site answers for {', '.join(missing)}: see the columns' names, and leastCount.")

    # A round.

    def _ask(self, kind: str, asked: Mapping[str, Any], read: Callable[[Any, Any], T]) -> dict[str, T]:
        """Ask all sites, and add up their answers by column."""
        channel = self.channel(TAG_QUERY)
        policy = self.config.policy
        if self._met:
            self.close_round()
        else:
            await_all(self, channel, policy.min_trainers)
            self._met = True
        self._started = time.monotonic()
        limit = policy.round_deadline
        deadline = None if limit is None else self._started + limit
        channel.set_property("round", self._round)
        question = {MessageType.QUERY: kind, MessageType.EXTRA: dict(asked), MessageType.ROUND: self._round}
        waiting = set(channel.all_ends())
        lost = channel.broadcast(question, waiting, limit, kind="query")
        waiting -= set(lost)
        answers = 0
        merged: dict[str, Any] = {}
        while waiting:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            # In order where the job asks for it: sums of floats depend on it in their last bits.
            turn = [min(waiting, key=lambda end: order_of(channel, end))] if policy.deterministic else list(waiting)
            try:
                for message, (end, _) in channel.recv_fifo(turn, timeout=left):
                    if message is not None and message.get(MessageType.ROUND) != self._round:
                        continue  # an answer that came too late for its own round
                    waiting.discard(end)
                    if message is None:
                        lost[end] = "left"
                    else:
                        answers += self._take(end, message, asked, read, merged)
            except DeadlineExceeded:
                lost |= dict.fromkeys(turn, "was too slow (policy.roundDeadline)")
                waiting.difference_update(turn)
        if lost:
            self.link.warning(
                f"Round {self._round}: {'; '.join(f'{end} {why}' for end, why in list(lost.items())[:3])}."
            )
        if answers < policy.min_trainers:
            raise RoundFailed(
                f"Round {self._round} has {answers} of at least {policy.min_trainers} answers (policy.minTrainers)."
            )
        return merged

    def _take(
        self,
        end: str,
        message: Message,
        asked: Mapping[str, Any],
        read: Callable[[Any, Any], T],
        merged: dict[str, Any],
    ) -> bool:
        try:
            found = {
                str(name): read(value, asked.get(str(name)))
                for name, value in message[MessageType.ANSWER].items()
                if not asked or name in asked
            }
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            self.link.warning(f"Round {self._round}: what {end} sent is no answer: {error}.")
            return False
        for name, value in found.items():
            merged[name] = merged[name] + value if name in merged else value
        return True

    def close_round(self) -> None:
        """Report the round of the last question, with what :meth:`update_metrics` was told since."""
        if self._met:
            self.save_metrics()
            self._round += 1

    # At the end.

    def run_analysis(self) -> None:
        """What the tasklet ``analyse`` does."""
        self.results = self.analyse()

    def inform_end_of_training(self) -> None:
        """Tell all sites that the work is done."""
        say_done(self.channel(TAG_QUERY))

    def save_results(self) -> None:
        """Hand the results to the server, as ``results.json``."""
        path = self.link.folder / "results.json"
        path.write_text(json.dumps(_plain(self.results), indent=1) + "\n", encoding="utf-8")
        self.link.artifact(path.name, path, ARTIFACT_SECONDS)
        self.registry_client.finish(REGISTRY_SECONDS)

    def compose(self) -> None:
        """Put the workflow together: load_data, analyse, then inform the sites and save the results."""
        with Composer() as composer:
            self.composer = composer
            internal_init = Tasklet("internal_init", self.internal_init)
            load_data = Tasklet("load_data", self.load_data)
            initialize = Tasklet("initialize", self.initialize)
            analyse = Tasklet("analyse", self.run_analysis)
            close_round = Tasklet("close_round", self.close_round)
            inform = Tasklet("inform_end_of_training", self.inform_end_of_training)
            save_results = Tasklet("save_results", self.save_results)
        internal_init >> load_data >> initialize >> analyse >> close_round >> inform >> save_results

    @classmethod
    def get_func_tags(cls) -> list[str]:
        """See :class:`Role`."""
        return [TAG_QUERY]


def _summary_of(value: Any, asked: Any) -> Summary:
    count, *rest = (float(each) for each in np.asarray(value, np.float64).reshape(5))
    if count < 0 or not all(np.isfinite([count, *rest])):
        raise ValueError("its summary is not one of numbers")
    return Summary(int(count), *rest)


def _counts_of(value: Any, asked: Any) -> npt.NDArray[np.int64]:
    counts = np.array(value)
    if counts.dtype != np.int64 or counts.shape != (len(asked) + 1,) or (counts < 0).any():
        raise ValueError(f"its counts are {counts.dtype}{list(counts.shape)}")
    return counts


def _plain(value: Any) -> Any:
    """A result as JSON takes it: summaries and estimates by their fields' names, arrays as lists."""
    if isinstance(value, Summary):
        return {**asdict(value), "variance": value.variance}
    if hasattr(value, "_asdict"):
        return {name: _plain(each) for name, each in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value.tolist() if hasattr(value, "tolist") else value
