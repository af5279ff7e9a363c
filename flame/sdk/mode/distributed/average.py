"""The weighted mean of the models of a ring's members: a model becomes flat vectors, goes round the ring, and becomes a model again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from flame.errors import WorkerError
from flame.sdk.mode.distributed.agreement import Plan
from flame.sdk.mode.distributed.ring import Parts, allreduce
from flame.sdk.mode.distributed.table import Table
from flame.sdk.mode.message import MessageType
from flame.sdk.optimizers.base import Weights
from flame.sdk.optimizers.layout import Flat, Layout, widen
from flame.sdk.optimizers.sums import check_finite


class RingMean:
    """Averages among the members of a table.

    :param table: this member's place among the others.
    :param warn: tells the user that an update is left out.
    """

    def __init__(self, table: Table, warn: Callable[[str], None]) -> None:
        self._table = table
        self._warn = warn
        self._layout: Layout | None = None

    def __call__(self, plan: Plan, weights: Weights, count: float) -> tuple[Mapping[str, Any], float]:
        """The mean of all members' models, in the dtypes of this one's; and how many samples it stands for.

        With no samples at all the mean has no meaning. An update with values that are not finite counts as none, after a warning.

        :param plan: names the ring; this member is one of it.
        :param weights: this member's model, which is not changed.
        :param count: how many samples it stands for.
        :raises flame.sdk.mode.distributed.carrier.Torn: a member has left, or has torn the plan.
        :raises flame.errors.WorkerError: the members have different models.
        """
        table, ring = self._table, plan.ring
        rank = ring.index(table.me.end)
        before, after = ring[rank - 1], ring[(rank + 1) % len(ring)]
        flat, count = self._scaled(weights, count, plan.round)

        def send(index: int, parts: Parts, samples: float) -> None:
            table.send_segment(after, {MessageType.RING_WEIGHTS: parts}, {"index": index, "samples": samples})

        def receive(index: int) -> tuple[Parts, float]:
            message = table.next_segment(before, index)
            return message[MessageType.RING_WEIGHTS], float(message.metadata["samples"])

        table.channel.set_property("round", plan.round)
        total = allreduce(flat, count, rank, len(ring), send, receive)
        assert self._layout is not None
        return self._layout.weights(flat), total

    def _scaled(self, weights: Weights, count: float, number: int) -> tuple[Flat, float]:
        """A model times its number of samples, as flat vectors; and the number."""
        if self._layout is None or not self._layout.fits(weights):
            self._layout = Layout(weights)
        flat = self._layout.empty()
        runs = self._layout.runs(weights, self._table.me.end)
        try:
            check_finite(runs, self._table.me.end)
        except WorkerError as error:
            self._warn(f"Round {number}: {error.message}")
            count = 0.0
        for run in runs:
            target = flat[run.group][run.start : run.start + run.array.size]
            if count > 0:
                np.multiply(widen(run.array), count, out=target, dtype=target.dtype, casting="unsafe")
            else:
                target.fill(0)
        return flat, count
