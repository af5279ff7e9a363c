"""The coordinator of asynchronous aggregation: it keeps a balanced list of who works with whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flame.sdk.mode.composer import Composer
from flame.sdk.mode.farewell import FAREWELL_SECONDS
from flame.sdk.mode.horizontal.coord_syncfl.balance import rebalance
from flame.sdk.mode.horizontal.coord_syncfl.coordinator import (
    TAG_COORDINATE_WITH_MID_AGG,
    TAG_COORDINATE_WITH_TOP_AGG,
    TAG_COORDINATE_WITH_TRAINER,
)
from flame.sdk.mode.horizontal.coord_syncfl.coordinator import Coordinator as SyncCoordinator
from flame.sdk.mode.horizontal.syncfl.rounds import order_of
from flame.sdk.mode.message import MessageType
from flame.sdk.mode.tasklet import Loop, Tasklet

__all__ = [
    "TAG_COORDINATE_WITH_MID_AGG",
    "TAG_COORDINATE_WITH_TOP_AGG",
    "TAG_COORDINATE_WITH_TRAINER",
    "Coordinator",
]


class Coordinator(SyncCoordinator):
    """Says who works with whom, whenever that changes. There is nothing that a user must write."""

    _seen: tuple[set[str], set[str]] = (set(), set())

    def assign(self, trainers: Sequence[str], aggregators: Sequence[str]) -> Mapping[str, Sequence[str]]:
        """See the base class: as few changes to :attr:`agg_to_trainer` as it takes."""
        return rebalance(self.agg_to_trainer, trainers, aggregators)

    def pair_mid_aggs_and_trainers(self) -> None:
        """Spread who is there, and tell those for whom something has changed."""
        middles, workers = self.channel(TAG_COORDINATE_WITH_MID_AGG), self.channel(TAG_COORDINATE_WITH_TRAINER)
        if not self._met:
            self._await_all(middles, workers)
        trainers = sorted(workers.all_ends(), key=lambda end: order_of(workers, end))
        aggregators = sorted(middles.all_ends(), key=lambda end: order_of(middles, end))
        before, self._seen = self.agg_to_trainer, (set(trainers), set(aggregators))
        self.agg_to_trainer = {end: list(each) for end, each in self.assign(trainers, aggregators).items()}
        for aggregator, each in self.agg_to_trainer.items():
            known = set(before.get(aggregator, ()))
            if aggregator not in before or known != set(each):
                self._tell(middles, aggregator, each)
            new = [trainer for trainer in each if trainer not in known]
            workers.broadcast(self._news(aggregator), new, FAREWELL_SECONDS, kind="assignment")

    def await_change(self) -> None:
        """Wait until somebody comes or goes, or the top says that the work is done."""
        top = self.channel(TAG_COORDINATE_WITH_TOP_AGG)
        middles, workers = self.channel(TAG_COORDINATE_WITH_MID_AGG), self.channel(TAG_COORDINATE_WITH_TRAINER)
        self.await_peer(top)
        top.wait_until(
            lambda: bool(top.heard()) or top.empty() or self._seen != (set(workers.all_ends()), set(middles.all_ends()))
        )
        for end in top.heard():
            message, _ = top.recv(end)
            self._work_done = self._work_done or (message is not None and MessageType.EOT in message)

    def compose(self) -> None:
        """Put the workflow together: until the work is done spread the trainers, and wait until something changes."""
        with Composer() as composer:
            self.composer = composer
            internal_init = Tasklet("internal_init", self.internal_init)
            initialize = Tasklet("initialize", self.initialize)
            pair = Tasklet("pair_mid_aggs_and_trainers", self.pair_mid_aggs_and_trainers)
            change = Tasklet("await_change", self.await_change)
            inform = Tasklet("inform_end_of_training", self.inform_end_of_training)
            loop = Loop(loop_check_fn=lambda: self._work_done)
        internal_init >> initialize >> loop(pair >> change) >> inform
