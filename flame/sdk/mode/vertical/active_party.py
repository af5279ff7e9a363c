"""The active party of vertical federated learning: it has the labels and the top model, and closes the rounds.

A round is ``epochs`` passes over the common samples. For each batch it asks all feature parties for their outputs at once,
steps, and lets the gradients go along with the next request.

**Who may be missing.** Each party has a part of every sample. By default all are needed, and a job that loses one fails. One that
says how many are enough (``minTrainers`` of two or more, or a ``roundDeadline``) goes on: zeros stand in for the outputs of a
party that has left, or until the next round for those of one that was too slow. Here ``roundDeadline`` is the longest wait for
the outputs of one batch: it is in each of them that all wait for the slowest.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from flame.errors import DeadlineExceeded, RoundFailed, WorkerError
from flame.sdk.channel import Channel
from flame.sdk.checkpoints import State
from flame.sdk.codec import Message
from flame.sdk.mode.composer import Composer
from flame.sdk.mode.farewell import say_done
from flame.sdk.mode.gathering import await_all
from flame.sdk.mode.message import MessageType
from flame.sdk.mode.roundkeeper import RoundKeeper
from flame.sdk.mode.tasklet import Loop, Tasklet
from flame.sdk.mode.vertical.alignment import common, hashed
from flame.sdk.mode.vertical.rewind import PartyLost, Rewinding
from flame.sdk.mode.vertical.split import (
    ANEW,
    BACK_TO,
    HAS,
    KEEP,
    KEPT,
    LAST,
    PURPOSE,
    TAG_ALIGN,
    TAG_BACKWARD,
    TAG_FORWARD,
    as_tensor,
    ids_of,
    make_optimizer,
    pytorch,
)

__all__ = ["TAG_ALIGN", "TAG_BACKWARD", "TAG_FORWARD", "ActiveParty"]

log = logging.getLogger(__name__)

#: Samples of one request when nothing is learned from them.
CHUNK = 4096
#: How long a party may take the word that the work is done, in seconds.
FAREWELL_SECONDS = 10.0
#: How long parties are waited for that may be there, or may have heard already that the work is done, in seconds.
LATE_SECONDS = 3.0


class ActiveParty(RoundKeeper, Rewinding):
    """Has the labels and the top model.

    The user writes ``load_data``, which sets :attr:`ids` and :attr:`y` (and :attr:`held_out`), ``initialize``, which sets
    ``self.model`` to a PyTorch module (and :attr:`optimizer`, if it shall not be SGD at the job's learning rate), :meth:`loss`, and
    ``evaluate``, for which :meth:`predict` gives the whole network's outputs. Rows are always this party's own.

    :ivar ids: which sample each row is of.
    :ivar y: the labels, a tensor ``[samples, ...]`` in the order of the ids.
    :ivar held_out: which rows are not trained on, booleans ``[samples]``; None: all are trained on.
    :ivar parties: the feature parties' names, in the order of their outputs; set by ``align``.
    :ivar training_rows: the common samples to train on, a tensor of int64; set by ``align``.
    :ivar held_out_rows: the other common samples; set by ``align``.
    """

    ids: Sequence[Any]
    y: Any
    held_out: Any = None
    parties: list[str]
    training_rows: Any
    held_out_rows: Any
    _ends: list[str]
    _at: Any  # own row -> place among the common samples
    _order: Any
    _step: int = 0
    _deadline: float | None = None
    _gradients: dict[str, Any]
    _widths: dict[str, int]
    _absent: dict[str, str]  # why: for this round those that are late, for good those that have left
    _gone: set[str]
    _patient: bool = False  # who has left is replaced, and waited for
    _anew: bool = False

    # What a user may replace.

    def loss(self, scores: Any, labels: Any) -> Any:
        """For the user: the mean loss of a batch, a tensor ``[]``."""
        raise WorkerError(f"{type(self).__name__} has no loss: write loss(self, scores, labels).")

    def scores(self, parts: list[Any], rows: Any) -> Any:
        """The top model's outputs; for the user to replace where it takes more, such as features that this party has.

        :param parts: the feature parties' outputs, tensors ``[samples, outputs]`` in the order of :attr:`parties`.
        :param rows: which samples these are.
        """
        return self.model(pytorch().cat(parts, 1))

    def batches(self) -> Iterator[Any]:
        """The rows of each batch of a round: ``epochs`` passes in an order that the hyperparameter ``seed`` decides."""
        hyper = self.config.hyperparameters
        for _ in range(hyper.epochs):
            order = pytorch().randperm(len(self.training_rows), generator=self._order)
            yield from self.training_rows[order].split(hyper.batch_size)

    # Alignment.

    def align(self, tag: str = TAG_ALIGN) -> None:
        """What the tasklet ``align`` does: find the samples that all parties have, and tell them.

        :raises flame.errors.RoundFailed: too few parties.
        :raises flame.errors.WorkerError: there is no sample that all have.
        """
        channel = self.channel(tag)
        self.optimizer = make_optimizer(self)
        self._order = pytorch().Generator().manual_seed(int(self.config.hyperparameters.get("seed", 0)))
        self._remember_beginning()
        self._patient = self.config.restart.of(channel.other_role()).attempts > 0
        if self._available()[-1] >= self._rounds and self._go_back(self._rounds):
            # Its predecessor was about to say so: the parties need not be here any more.
            self._ends, self._gradients, self._work_done, self._round = [], {}, True, self._rounds + 1
            channel.wait_until(
                lambda: len(channel.all_ends()) >= self.config.peers.get(channel.name(), 0), LATE_SECONDS
            )
            return
        self._align_until_all_are_there(channel)

    def _align_until_all_are_there(self, channel: Channel) -> None:
        while True:
            try:
                return self._align(channel)
            except PartyLost:
                self._call_together(channel)

    def _call_together(self, channel: Channel) -> None:
        """Tell all to align anew."""
        channel.broadcast({MessageType.METADATA: {ANEW: True}}, timeout=FAREWELL_SECONDS, kind="vertical")

    def realign(self) -> None:
        """What the tasklet ``realign`` does: when a party was lost in the middle of a round, go back with all of them."""
        if self._anew:
            self._anew = False
            channel = self.channel(TAG_ALIGN)
            self.link.warning(f"A party is replaced in round {self._round}: all go back to a round that all have.")
            self.take_metrics()
            self._call_together(channel)
            self._align_until_all_are_there(channel)

    def _unless_lost(self, work: Callable[[], None]) -> Callable[[], None]:
        """A step of the round, which is broken off when a party is lost."""

        def step() -> None:
            if not self._anew:
                try:
                    work()
                except PartyLost:
                    self._anew = True

        return step

    def _align(self, channel: Channel) -> None:
        self._gradients, self._widths, self._absent, self._gone, self._ends = {}, {}, {}, set(), []
        self._deadline = None
        mine = hashed(ids_of(self), self.cm.secret(PURPOSE))
        await_all(self, channel, self._fewest())
        hashes: dict[str, Any] = {}
        names: dict[str, str] = {}
        common_rounds = set(self._available())
        pending = set(channel.all_ends())
        while pending:
            for message, (end, _) in channel.recv_fifo(list(pending)):
                if message is None:
                    self._lose(end, "left")
                elif MessageType.IDS not in message:
                    continue  # an answer of the time before
                else:
                    hashes[end], names[end] = np.array(message.get(MessageType.IDS)), str(message.get(MessageType.NAME))
                    common_rounds &= set((message.get(MessageType.METADATA) or {}).get(HAS, [0]))
                pending.discard(end)
        self._ends = sorted(names, key=lambda end: names[end])
        self.parties = [names[end] for end in self._ends]
        twice = next((name for name in self.parties if self.parties.count(name) > 1), None)
        if twice is not None:
            raise WorkerError(f"Two feature parties are called {twice!r}: give each a name of its own (self.name).")
        self._check_enough()
        own, *others = common([mine, *(hashes[end] for end in self._ends)])
        if not len(own):
            raise WorkerError(
                f"No sample is known to all of {', '.join(self.parties)} and this party: see that ids are spelt the same."
            )
        back = max(common_rounds, default=0)
        if (back or self._step) and not self._go_back(back):
            raise WorkerError(f"What was kept of round {back} cannot be read.")
        for end, rows in zip(self._ends, others, strict=True):
            self._tell(channel, end, {MessageType.ROWS: rows, MessageType.METADATA: {BACK_TO: back}})
        self._round = back + 1
        self._work_done = self._round > self._rounds
        log.info("%d samples are common to %s and this party, of %d.", len(own), ", ".join(self.parties), len(mine))
        self._place(own, len(mine))

    def _place(self, own: Any, count: int) -> None:
        torch = pytorch()
        self._at = torch.full((count,), -1, dtype=torch.int64)
        self._at[torch.from_numpy(own)] = torch.arange(len(own))
        held = np.zeros(count, bool) if self.held_out is None else np.asarray(self.held_out, bool)
        if held.shape != (count,):
            raise WorkerError(f"self.held_out is {list(held.shape)}: it must hold a boolean for each of {count} ids.")
        there = np.sort(own)
        self.training_rows = torch.from_numpy(there[~held[there]])
        self.held_out_rows = torch.from_numpy(there[held[there]])
        if not len(self.training_rows):
            raise WorkerError("All samples that the parties have in common are held out: there is nothing to train on.")

    # A round.

    def train(self) -> None:
        """What the tasklet ``train`` does: learn from each batch. Reports the mean loss as ``loss``."""
        self._started = time.monotonic()
        self._seed_round(self._round)
        self._absent = {end: reason for end, reason in self._absent.items() if end in self._gone}
        total, count = 0.0, 0
        for rows in self.batches():
            self.model.train()
            total += self._learn(rows) * len(rows)
            count += len(rows)
        if count:
            self.update_metrics({"loss": total / count})

    def _learn(self, rows: Any) -> float:
        """One step of the whole network; gives the loss."""
        parts = self._ask(rows, training=True)
        for part in parts.values():
            part.requires_grad_()
        scores = self.scores([self._part(end, parts, len(rows)) for end in self._ends], rows)
        loss = self.loss(scores, self.y[rows])
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        self._gradients = {end: part.grad for end, part in parts.items() if part.grad is not None}
        return float(loss.detach())

    def predict(self, rows: Any = None) -> Any:
        """The whole network's outputs for some samples; nothing is learned from them.

        :param rows: which of the common samples, a tensor ``[samples]`` of int64; None: those that are held out.
        :returns: a tensor ``[samples, ...]``.
        """
        torch = pytorch()
        self.model.eval()
        found = []
        with torch.no_grad():
            for some in (self.held_out_rows if rows is None else rows).split(CHUNK):
                parts = self._ask(some, training=False)
                found.append(self.scores([self._part(end, parts, len(some)) for end in self._ends], some))
        return torch.cat(found)

    def _part(self, end: str, parts: Mapping[str, Any], count: int) -> Any:
        if end in parts:
            return parts[end]
        if end not in self._widths:
            raise RoundFailed(
                f"The feature party {self._called(end)} {self._absent[end]} before it gave any output: nobody knows how wide it is."
            )
        like = self._like()
        return pytorch().zeros(count, self._widths[end], device=None if like is None else like.device)

    # Asking.

    def _ask(self, rows: Any, *, training: bool) -> dict[str, Any]:
        """All parties' outputs for some samples, by end; those that are absent are left out."""
        at = self._at[rows]
        if bool((at < 0).any()):
            raise WorkerError(
                "A sample was asked for that not all parties have: take rows from training_rows or held_out_rows."
            )
        channel = self.channel(TAG_FORWARD)
        channel.set_property("round", self._round)
        limit = self.config.policy.round_deadline
        self._deadline = None if limit is None else time.monotonic() + limit
        self._step += 1
        question = {
            MessageType.ROWS: at.numpy(),
            MessageType.STEP: self._step,
            MessageType.ROUND: self._round,
            MessageType.TRAINING: training,
        }
        for end in self._ends:
            if end not in self._absent:
                self._tell(channel, end, {**question, **self._gradient(end)})
        waiting = {end for end in self._ends if end not in self._absent}
        parts: dict[str, Any] = {}
        while waiting:
            try:
                for message, (end, _) in channel.recv_fifo(waiting, timeout=self._left()):
                    self._answered(end, message, len(rows), parts)
                waiting -= {*parts, *self._absent}  # who is left has answered an older question
            except DeadlineExceeded:
                for end in waiting - {*parts, *self._absent}:
                    self._lose(end, "was too slow (policy.roundDeadline)", for_good=False)
                waiting.clear()
        self._check_enough()
        return parts

    def _answered(self, end: str, message: Message | None, count: int, parts: dict[str, Any]) -> None:
        if message is None:
            self._lose(end, "left")
            return
        if message.get(MessageType.STEP) != self._step:
            return
        called = f"The feature party {self._called(end)}"
        part = as_tensor(message.get(MessageType.ACTIVATIONS), self._like(), called)
        if len(part) != count or part.shape[1] != self._widths.setdefault(end, part.shape[1]):
            raise WorkerError(f"{called} sent outputs {list(part.shape)} for {count} samples.")
        parts[end] = part

    def _gradient(self, end: str) -> dict[Any, Any]:
        gradient = self._gradients.pop(end, None)
        return {} if gradient is None else {MessageType.GRADIENTS: gradient}

    def _like(self) -> Any:
        """A tensor on the top model's device; None where the model has none."""
        return next(iter(self.model.parameters()), None)

    def _tell(self, channel: Channel, end: str, message: Mapping[Any, Any]) -> None:
        failed = channel.broadcast(message, [end], self._left(), kind="vertical")
        for reason in failed.values():
            self._lose(end, reason)

    def _left(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    # Who is missing.

    def _fewest(self) -> int | None:
        """How many parties are enough; None: all are needed. The control plane reads the policy in the same way."""
        policy = self.config.policy
        return policy.min_trainers if policy.min_trainers > 1 or policy.round_deadline is not None else None

    def _lose(self, end: str, reason: str, *, for_good: bool = True) -> None:
        if for_good and self._patient:
            raise PartyLost(end)
        if end not in self._absent:
            self._absent[end] = reason
            self._gradients.pop(end, None)
            if self._fewest() is not None:
                self.link.warning(
                    f"Round {self._round} goes on without the features of {self._called(end)}: it {reason}."
                )
        if for_good:
            self._gone.add(end)

    def _check_enough(self) -> None:
        fewest = self._fewest()
        there = sum(end not in self._absent for end in self._ends)
        if there >= (len(self._ends) + len(set(self._absent) - set(self._ends)) if fewest is None else fewest):
            return
        details = "; ".join(f"{self._called(end)} {reason}" for end, reason in self._absent.items())
        need = (
            "all are needed, as policy.minTrainers says nothing else"
            if fewest is None
            else f"policy.minTrainers: {fewest}"
        )
        raise RoundFailed(f"Round {self._round} has the features of {there} parties ({need}). {details[:200]}.")

    def _called(self, end: str) -> str:
        return self.parties[self._ends.index(end)] if end in self._ends else end

    # What is kept.

    def _state(self) -> State:
        """See :class:`Role`: also where the order of the samples is."""
        state = super()._state()
        state.arrays["order"] = self._order.get_state().numpy()
        return state

    def _load(self, state: State) -> None:
        super()._load(state)
        self._order.set_state(pytorch().from_numpy(np.array(state.arrays["order"])))

    def keep_round(self) -> None:
        """See :class:`RoundKeeper`: all parties keep the round, once the last gradients have arrived.

        Behind the last round nobody goes back any more, and each party hands in what it has kept of it, whoever is still there. So that
        one is kept by all before it counts as kept here.
        """
        last = self._round >= self._rounds
        if not (self._strict and self._round % self.config.policy.checkpoint.every == 0) and not self._kept.due(
            self._round, last=last
        ):
            return
        self._deadline = None
        for end in self._ends:
            if end not in self._absent:
                told = {KEEP: True, LAST: True} if last else {KEEP: True}
                message = {MessageType.ROUND: self._round, MessageType.METADATA: told}
                self._tell(self.channel(TAG_FORWARD), end, {**message, **self._gradient(end)})
        if last:
            self._await_kept()
        self._keep_state(self._round)

    def _await_kept(self) -> None:
        """Wait until all parties have kept the round."""
        limit = self.config.policy.round_deadline
        deadline = None if limit is None else time.monotonic() + limit
        waiting = {end for end in self._ends if end not in self._absent}
        while waiting:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                for message, (end, _) in self.channel(TAG_FORWARD).recv_fifo(waiting, timeout=left):
                    if message is None:
                        self._lose(end, "left")
                    elif (message.get(MessageType.METADATA) or {}).get(KEPT) != self._round:
                        continue  # the answer to an older question
                    waiting = waiting - {end}
            except DeadlineExceeded:
                for end in waiting:
                    self._lose(end, "was too slow (policy.roundDeadline)", for_good=False)
                return

    # At the end.

    def inform_end_of_training(self) -> None:
        """Give out the last gradients, and tell all parties that the work is done."""
        channel = self.channel(TAG_FORWARD)
        self._patient = False
        self._deadline = time.monotonic() + FAREWELL_SECONDS
        for end in list(self._gradients):
            self._tell(channel, end, self._gradient(end))
        say_done(channel)

    def compose(self) -> None:
        """Put the workflow together: load_data, initialize, align, then in each round train, evaluate, save_metrics."""
        with Composer() as composer:
            self.composer = composer
            internal_init = Tasklet("internal_init", self.internal_init)
            load_data = Tasklet("load_data", self.load_data)
            initialize = Tasklet("initialize", self.initialize)
            base_model = Tasklet("load_base_model", self.load_base_model)
            align = Tasklet("align", self.align, TAG_ALIGN)
            realign = Tasklet("realign", self.realign)
            train = Tasklet("train", self._unless_lost(self.train))
            evaluate = Tasklet("evaluate", self._unless_lost(self.evaluate))
            save_metrics = Tasklet("save_metrics", self._unless_lost(self.save_metrics))
            checkpoint = Tasklet("checkpoint", self._unless_lost(self.keep_round))
            inc_round = Tasklet("inc_round", self._unless_lost(self.increment_round))
            inform = Tasklet("inform_end_of_training", self.inform_end_of_training)
            save_model = Tasklet("save_model", self.save_model)
            loop = Loop(loop_check_fn=lambda: self._work_done, skip_fn=lambda: self._work_done)
        (
            internal_init
            >> load_data
            >> initialize
            >> base_model
            >> align
            >> loop(realign >> train >> evaluate >> save_metrics >> checkpoint >> inc_round)
            >> inform
            >> save_model
        )

    @classmethod
    def get_func_tags(cls) -> list[str]:
        """See :class:`Role`."""
        return [TAG_ALIGN, TAG_FORWARD, TAG_BACKWARD]
